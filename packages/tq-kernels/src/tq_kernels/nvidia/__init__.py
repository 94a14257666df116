"""Decode kernels that use NVIDIA instructions (sm_80 and newer): byte permute and int8 ``mma.sync``."""
