"""Corpora: building, reading, order and batches."""
