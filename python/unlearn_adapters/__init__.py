"""Drop-ins that put unlearn_kernels under the frameworks people already run, one module per framework.

Each module imports its framework itself, so that `import unlearn_adapters` needs none of them.
"""

from unlearn_kernels import __version__

__all__ = ["__version__"]
