"""Figure "histograms": ``python examples/histograms.py [--quick]`` writes histograms.png and .csv here.

Needs ``pip install 'tq-core[plots]'``. ``tq reproduce histograms`` does the same.
"""

import sys
from pathlib import Path

from tq_core.reproduce import histograms
from tq_core.reproduce.rows import write_csv

rows = histograms.measure(quick="--quick" in sys.argv)
write_csv(rows, Path("histograms.csv"))
histograms.draw(rows, Path("histograms.png"))
