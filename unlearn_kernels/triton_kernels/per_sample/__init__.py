"""Per-sample gradients in Triton, a module per layer."""
