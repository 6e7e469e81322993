"""`python -m pte` is the command `pte`."""

import sys

from pte.cli import main

if __name__ == "__main__":
    sys.exit(main())
