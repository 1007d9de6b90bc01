"""Python in a process of its own that knows nothing of this one, but finds torch and timm imported: that takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 300.0


def python(
    *arguments: str, cwd: Path = ROOT, paths: Sequence[Path] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE ...` or `python -c CODE ...` gives.

    Args:
        arguments: as on the command line.
        cwd: where it runs.
        paths: folders to import from, before all others.
        environment: variables beside those of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm"])
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("out", "err")]
        variables = {**os.environ, **(environment or {})}
        told = (arguments, str(cwd), [str(path) for path in (*paths, ROOT)], variables, streams)
        process = context.Process(target=_run, args=told)
        process.start()
        process.join(DEADLINE)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = (Path(stream).read_text() for stream in streams)
    return subprocess.CompletedProcess(arguments, process.exitcode or 0, out, err)


def _run(
    arguments: Sequence[str], cwd: str, paths: Sequence[str], environment: Mapping[str, str], streams: Sequence[str]
) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    kind, what, *rest = arguments
    sys.path[:0] = [cwd, *paths]
    if kind == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        main = sys.modules["__main__"]
        main.__dict__.pop("__file__", None)
        exec(compile(what, "<string>", "exec"), main.__dict__)
