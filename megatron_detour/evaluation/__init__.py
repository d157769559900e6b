"""What a trained model knows: probes."""
