"""Vocabularies, word boundaries and the bytes of tokens."""

LARGEST_VOCABULARY = 1 << 22  # beyond any tokenizer, and small enough for tables of ids
