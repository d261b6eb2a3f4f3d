"""`python -m zo_dist`, so that torchrun and deepspeed can start it as a module."""

import sys

from zo_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
