"""Hand-fused Triton kernels for GPUs, and their plain PyTorch reference."""
