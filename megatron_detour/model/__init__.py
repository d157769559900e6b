"""Encoders: families (one file each), the parts that they share, attention and FLOPs."""
