"""Triton kernels in plain Triton, for every GPU that it compiles for and its interpreter."""
