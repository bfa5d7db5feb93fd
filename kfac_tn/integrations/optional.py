"""Packages that kfac_tn can do without."""

from importlib import import_module
from types import ModuleType


def load(module: str, package: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Its name.
        package: What to tell pip to install.

    Raises:
        ImportError: If it can't be imported, with the command that installs it.

    Example:
        >>> load("math", "no-package").pi > 3
        True
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: binaries made for another torch
        raise ImportError(
            f"{module} can't be imported ({error}); it comes with: pip install '{package}'"
        ) from error
