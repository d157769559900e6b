"""Observing runs: metrics file, TensorBoard, wandb, progress, run reports and comparisons."""
