"""Checkpoints: publishing folders whole, gathering a run's state by parameter name, Hugging Face's format."""
