"""One public op a file: a torch reference and, where eligible, a fused kernel behind the same signature."""
