"""The parts of `examples/audit_removal.py`."""
