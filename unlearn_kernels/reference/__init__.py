"""The specification: every operator in plain PyTorch, exact in float64."""
