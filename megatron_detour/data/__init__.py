"""Corpora: building, reading, order, packing and batches."""
