"""Drop-ins that put unlearn_kernels under the frameworks people already run, one module per framework.

Each module imports its framework itself, so `import unlearn_adapters` needs none of them.
"""

from importlib.metadata import version

__version__ = version("unlearn-kernels")
