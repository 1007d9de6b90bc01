"""`python -m mlpreduce.search`."""

from __future__ import annotations

import sys

from mlpreduce.console import run_command
from mlpreduce.search.cli import main

if __name__ == "__main__":
    sys.exit(run_command(main))
