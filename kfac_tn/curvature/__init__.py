"""Curvature matrices: blocks, their algebra, robust factorizations, moving averages."""
