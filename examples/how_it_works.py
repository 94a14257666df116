"""Pictures of docs/how-it-works.md: ``python examples/how_it_works.py [folder]``.

Needs ``pip install 'tq-core[plots]'``.
"""

import sys
from pathlib import Path

import numpy as np
from tq_core import HadamardRotation, coordinate_law, lloyd_max
from tq_core.reproduce.figures import figure, save

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
dim, bits = 128, 3

# A vector as keys are: most coordinates small, a few outlier channels large.
rng = np.random.default_rng(4)
x = rng.standard_normal(dim) * 0.3
x[[17, 50, 101]] = [9.0, -7.0, 6.0]
x /= np.linalg.norm(x)
y = HadamardRotation(dim).apply(x)

fig, (before, after) = figure(2)
for axes, vector, title in ((before, x, "a vector"), (after, y, "the same vector, rotated")):
    axes.bar(range(dim), vector, width=1.0)
    axes.set(title=title, xlabel="coordinate", ylim=(-0.85, 0.85))
save(fig, folder / "rotation.png")

book, law = lloyd_max(dim, bits), coordinate_law(dim)
t = np.linspace(-0.32, 0.32, 400)
fig, (axes,) = figure()
axes.plot(t, law.pdf(t), label="density of a rotated coordinate")
axes.vlines(book.boundaries, 0, law.pdf(0.0), "k", "dotted", lw=1, label="boundaries")
axes.plot(book.centroids, np.zeros(2**bits), "o", clip_on=False, label="centroids")
axes.set(title=f"{bits}-bit codebook, head_dim {dim}", xlabel="coordinate")
axes.set_ylim(0, 1.4 * law.pdf(0.0))  # room for the legend
axes.legend(fontsize=8, loc="upper right")
save(fig, folder / "codebook.png")
