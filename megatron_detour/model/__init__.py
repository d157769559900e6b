"""ModernBERT: its shape, rotary positions, attention and layers."""
