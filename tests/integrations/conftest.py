"""Lets laplace-torch be imported beside a broken torchvision; in CI, no package may be missing."""

import os
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
    import laplace

    for name in names:
        del sys.modules[name]

if "CI" in os.environ:  # elsewhere, tests of what isn't installed are skipped
    import backpack  # noqa: F401
    import curvlinops  # noqa: F401
    import kronfluence  # noqa: F401
    import laplace  # noqa: F401
    import nngeometry.metrics  # noqa: F401
