"""KFAC for PyTorch: second-order training and curvature, convolutions as tensor networks."""

__version__ = "0.1.0"
