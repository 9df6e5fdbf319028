"""Kernels in Triton's interpreter. Triton chooses it when imported, so these tests need their own process.

`test_interpreter.py` starts it, and a plain run of pytest passes them by.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
