"""`python -m mlpreduce.search`."""

from __future__ import annotations

import sys

from mlpreduce.search.cli import main
from mlpreduce.words.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))
