"""Per-sample gradients in plain formulas, a module per layer."""
