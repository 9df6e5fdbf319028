"""`python -m unlearn_kernels [--json]` diagnoses the installation; exit status 1: the kernels do not work."""

import argparse
import json
import sys

from unlearn_kernels import _diagnose, _report


def main() -> int:
    """Print the report, and tell by the status whether the kernels are built and right."""
    parser = argparse.ArgumentParser("python -m unlearn_kernels", description="Diagnose this installation.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    report = _diagnose.collect()
    print(json.dumps(report, indent=2) if parser.parse_args().json else _report.render(report))
    return 0 if _diagnose.healthy(report) else 1


if __name__ == "__main__":
    sys.exit(main())
