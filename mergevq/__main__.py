"""Run the command line as `python -m mergevq`."""

import sys

from mergevq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
