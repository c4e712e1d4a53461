"""``python3 -m experiments.gpu``: see :mod:`experiments.gpu.parts`."""

import sys

from experiments.gpu.parts import main

if __name__ == "__main__":
    sys.exit(main())
