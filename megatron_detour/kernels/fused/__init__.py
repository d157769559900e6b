"""Triton kernels. Each reads and writes its operands once, computes in fp32 and rounds once."""
