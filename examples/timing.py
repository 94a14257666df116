"""Figure "timing": ``python examples/timing.py [--quick]`` writes timing.png and .csv here.

Needs ``pip install 'tq-core[plots]'``. ``tq reproduce timing`` does the same.
"""

import sys
from pathlib import Path

from tq_core.reproduce import timing
from tq_core.reproduce.rows import write_csv

rows = timing.measure(quick="--quick" in sys.argv)
write_csv(rows, Path("timing.csv"))
timing.draw(rows, Path("timing.png"))
