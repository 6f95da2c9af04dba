"""`python -m skvq` is the command `skvq`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
