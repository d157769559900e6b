"""How well models restore masked words: an evaluation without labels."""
