"""What a run shows: metrics file, TensorBoard, wandb, progress, the report page and pages that compare runs."""
