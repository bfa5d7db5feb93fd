"""Curvature in the objects of other packages, one module each, imported only by who asks for it."""
