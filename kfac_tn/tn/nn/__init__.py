"""Convolutions in any number of spatial dimensions as modules, and with randomized gradients."""

from kfac_tn.tn.nn.conv import ConvNd, ConvTransposeNd
from kfac_tn.tn.nn.randomized import RandomizedConvNd, randomize

__all__ = ["ConvNd", "ConvTransposeNd", "RandomizedConvNd", "randomize"]
