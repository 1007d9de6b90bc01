"""What a call or a command came to, in one text."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from mlpreduce import ReductionError


def outcome(call: Callable[[], Any]) -> str:
    """Nothing for success, else what it came to; `status` 2 of a command is a refusal, with its text."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            status = call()
    except ReductionError as error:
        return f"refused: {error}"
    except SystemExit as error:
        status = error.code
    except Exception as error:
        return f"broken: {type(error).__name__}: {error}"
    text = err.getvalue().strip()
    if isinstance(status, str):  # what Python prints then, and ends with 1
        status, text = 1, f"{text}{status}"
    if not isinstance(status, int) or not status:
        return ""
    if status == 2 and text.startswith("error: "):
        return f"refused: {text.removeprefix('error: ')}"
    return f"broken: status {status}: {text or 'nothing was printed'}"
