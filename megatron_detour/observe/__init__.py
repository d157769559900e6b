"""What a run shows: metrics file, TensorBoard, progress on the terminal, and the report page."""
