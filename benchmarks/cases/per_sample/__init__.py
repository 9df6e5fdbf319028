"""Per-sample gradients, a module per layer."""
