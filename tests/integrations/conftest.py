"""Makes laplace-torch importable where torchvision isn't."""

import sys
from unittest.mock import MagicMock

# laplace-torch imports torchmetrics, and that torchvision if it is installed. PyPI's torchvision is
# made for torch with CUDA: beside a CPU build its import fails. Nothing of it is used here.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    names = ("torchvision", "torchvision.models", "torchvision.transforms")
    sys.modules.update({name: MagicMock() for name in names})
    import laplace  # noqa: F401

    for name in names:
        del sys.modules[name]
