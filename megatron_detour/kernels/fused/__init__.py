"""Triton kernels. Each reads its operands once, computes in fp32, and rounds and writes its results once."""
