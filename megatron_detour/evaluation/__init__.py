"""Evaluation of trained models: fine-tuning on tasks, masked-word scores without labels, fill-mask probes."""
