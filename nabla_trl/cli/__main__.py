"""`python -m nabla_trl.cli` is the command `nabla-trl`."""

import sys

from nabla_trl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
