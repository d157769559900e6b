"""How well models predict masked words: an evaluation without labels."""
