"""Grids of experiments: which points there are, what they are kept under, who computes them, where the results go."""
