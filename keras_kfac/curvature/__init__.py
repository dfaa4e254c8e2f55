"""Curvature state: which block covers which weights, and what it remembers."""
