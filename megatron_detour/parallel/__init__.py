"""Tensor parallelism: process groups, conjugate collectives, sharded layers and the vocabulary-parallel loss."""
