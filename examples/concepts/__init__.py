"""The parts of `examples/forget_a_concept.py`."""
