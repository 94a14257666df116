"""The operations, one a file: the reference in eager torch and the fused kernel beside it."""
