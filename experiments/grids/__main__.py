"""``python -m experiments.grids GRID.yaml``: see :mod:`experiments.grids.grid`."""

import sys

from experiments.grids.grid import main

if __name__ == "__main__":
    sys.exit(main())
