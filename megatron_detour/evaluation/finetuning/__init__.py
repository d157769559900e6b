"""Fine-tuning on tasks: protocols, heads, jobs and workers."""
