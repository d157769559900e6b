"""A checkpoint becomes a model for others: folders that transformers opens, a model card, the causal form, upload."""
