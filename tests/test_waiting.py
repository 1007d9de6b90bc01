"""Progress lines of several threads."""

from __future__ import annotations

from mlpreduce.words import waiting


def test_blocks_that_end_in_another_order_leave_nothing_silent() -> None:
    first, second = waiting.silent(), waiting.silent()  # as two threads have them
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert waiting._busy, "the second block still runs"
    second.__exit__(None, None, None)
    assert not waiting._busy
