"""ModernBERT: its shape, attention, layers and FLOPs."""
