"""Training: DeepSpeed's engine, the loop, validation, and the run from its file to its report."""
