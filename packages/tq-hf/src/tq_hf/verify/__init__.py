"""Quality of a compressed cache, measured on a model: ``tq verify`` and what it is made of.

`measure` runs the cache itself. `simulate` runs a model whose old keys and values are rounded by
any function, in one pass, for ablations.
"""
