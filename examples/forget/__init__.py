"""The parts of `examples/forget_a_module.py`."""
