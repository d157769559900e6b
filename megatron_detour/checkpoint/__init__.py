"""Checkpoints: atomic publishing of folders, a run's state by parameter name, and the Hugging Face format."""
