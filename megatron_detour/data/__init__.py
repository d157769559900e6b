"""Online data: indexed corpora, their order, mixing and batches."""
