"""How well models restore masked words of text: measures that need no labels."""
