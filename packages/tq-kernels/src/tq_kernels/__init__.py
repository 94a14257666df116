"""TurboQuant attention on compressed KV caches, in PyTorch and Triton."""
