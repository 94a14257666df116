"""Figure "distortion": ``python examples/distortion.py [--quick]`` writes distortion.png and .csv here.

Needs ``pip install 'tq-core[plots]'``. ``tq reproduce distortion`` does the same.
"""

import sys
from pathlib import Path

from tq_core.reproduce import distortion
from tq_core.reproduce.rows import write_csv

rows = distortion.measure(quick="--quick" in sys.argv)
write_csv(rows, Path("distortion.csv"))
distortion.draw(rows, Path("distortion.png"))
