"""`python -m lit_prune` is `lit-prune`."""

import sys

from lit_prune.cli.front import main

if __name__ == "__main__":
    sys.exit(main())
