"""Numba functions: every loop over pixels, and the form in which a composed view travels to them."""
