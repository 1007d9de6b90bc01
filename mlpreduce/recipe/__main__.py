"""`python -m mlpreduce.recipe`."""

from __future__ import annotations

import sys

from mlpreduce.recipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
