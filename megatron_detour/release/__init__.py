"""Releasing a checkpoint: export for transformers, as encoder or decoder, the model card, upload."""
