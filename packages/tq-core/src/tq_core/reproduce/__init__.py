"""The experiments of the TurboQuant paper (arXiv 2504.19874), measured with this library.

Every experiment is a module with two functions: ``measure`` returns rows of numbers, ``draw`` makes
their figure (extra ``plots``). ``tq reproduce`` runs all of them.
"""

from __future__ import annotations

from tq_core.reproduce import distortion, histograms, inner_product, neighbours, timing
from tq_core.reproduce.rows import Experiment

__all__ = ["EXPERIMENTS"]

EXPERIMENTS: dict[str, Experiment] = {
    "distortion": Experiment(distortion.measure, distortion.draw),
    "inner-product": Experiment(inner_product.measure, inner_product.draw),
    "histograms": Experiment(histograms.measure, histograms.draw),
    "neighbours": Experiment(neighbours.measure, neighbours.draw),
    "timing": Experiment(timing.measure, timing.draw),
}
