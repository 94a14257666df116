"""Decode for NVIDIA GPUs from sm_80 on, with byte permutes and int8 ``mma.sync``."""
