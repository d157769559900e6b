"""Fine-tuning models on tasks: protocols, heads, jobs and the workers that do them."""
