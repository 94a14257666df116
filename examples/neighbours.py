"""Figure "neighbours": ``python examples/neighbours.py [--quick]`` writes neighbours.png and .csv here.

Needs ``pip install 'tq-core[plots]'``. ``tq reproduce neighbours`` does the same.
"""

import sys
from pathlib import Path

from tq_core.reproduce import neighbours
from tq_core.reproduce.rows import write_csv

rows = neighbours.measure(quick="--quick" in sys.argv)
write_csv(rows, Path("neighbours.csv"))
neighbours.draw(rows, Path("neighbours.png"))
