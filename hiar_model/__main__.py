"""`python -m hiar_model` is the command `hiar`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
