"""Vocabularies, word boundaries and the bytes of tokens."""

MAX_VOCABULARY = 1 << 22  # larger than any tokenizer, and small enough for tables of ids
