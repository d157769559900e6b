"""What is fused by hand for bf16 on a GPU, beside the plain form that says what it computes."""
