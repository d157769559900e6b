"""What a trained model knows: tasks, measures without labels, probes."""
