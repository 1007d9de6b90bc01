"""`python -m mlpreduce.search`."""

from __future__ import annotations

import sys

from mlpreduce.search.cli import main

if __name__ == "__main__":
    sys.exit(main())
