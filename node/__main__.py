"""`python -m braniac.node`: the command line, for interpreters whose script folder is not on the path."""

import sys

from braniac.node.cli import main

if __name__ == "__main__":
    sys.exit(main())
