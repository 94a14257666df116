"""Figure "inner-product": ``python examples/inner_product.py [--quick]`` writes inner-product.png and .csv here.

Needs ``pip install 'tq-core[plots]'``. ``tq reproduce inner-product`` does the same.
"""

import sys
from pathlib import Path

from tq_core.reproduce import inner_product
from tq_core.reproduce.rows import write_csv

rows = inner_product.measure(quick="--quick" in sys.argv)
write_csv(rows, Path("inner-product.csv"))
inner_product.draw(rows, Path("inner-product.png"))
