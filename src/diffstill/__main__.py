"""``python -m diffstill``, so that torchrun and accelerate can launch it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
