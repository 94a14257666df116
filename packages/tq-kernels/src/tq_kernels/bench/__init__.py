"""Measurements of the kernels on the machine at hand: ``tq bench``."""
