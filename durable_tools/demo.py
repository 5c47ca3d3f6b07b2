"""`durable demo`: real files, a real kill.

A machine starts a job for each file, which fingerprints it, and joins them. Half-way the worker process is killed and
another goes on; the sum is held against that of a plain loop. Run as a program it is such a worker process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from durable import FSM, Context, Done, DurableError, Engine, Insert, ScheduleChildren, Status, step, tools
from durable_tools.screen import Screen, ended, plain

_WIDTH, _PREFETCH = 8, 24


def _files_under(directory: Path) -> Iterator[str]:
    """The files that can be read and whose names can be written down."""
    for parent, below, names in os.walk(directory):
        below[:] = sorted(name for name in below if name not in ("__pycache__", "site-packages"))
        for path in (os.path.join(parent, name) for name in sorted(names)):
            if path.isprintable() and os.path.isfile(path) and os.access(path, os.R_OK):
                yield path


def _fingerprint(path: str) -> dict[str, Any]:
    """A file's length and sha256."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _sum_up(prints: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Many fingerprints in one, in whatever order they come."""
    found = list(prints)
    digests = "".join(sorted(one["sha256"] for one in found)).encode()
    total = sum(one["bytes"] for one in found)
    return {"files": len(found), "bytes": total, "sha256": hashlib.sha256(digests).hexdigest()}


class Fingerprint(FSM, name="durable.demo.Fingerprint", queue="files", max_attempts=3):
    """One file."""

    def perform(self, args: dict[str, Any]) -> dict[str, Any]:
        """Take so long that there is something to kill, where there are few files."""
        time.sleep(args["pause"])
        return _fingerprint(args["path"])


class Survey(FSM, name="durable.demo.Survey", queue="surveys"):
    """All files: a job for each, and the sum of what they found."""

    @step
    def start(self, ctx: Context[Any]) -> ScheduleChildren:
        """Fan out."""
        children = [
            Insert(Fingerprint, args={"path": path, "pause": ctx.state["pause"]}) for path in ctx.state["paths"]
        ]
        return ScheduleChildren(children, then="join", state={})

    @step
    def join(self, ctx: Context[Any]) -> Done:
        """Sum up."""
        return Done(_sum_up(child.result for child in ctx.children if child.status is Status.DONE))


def _work(database: str) -> None:
    """What a worker process does until its standard input ends: when the demo does, however."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo itself
    with Engine(database, name="demo", queues={"surveys": 1, "files": _WIDTH}, prefetch=_PREFETCH):
        sys.stdin.read()


class Demo:
    """The demo's course: its files, the worker processes it starts and kills, what it tells."""

    def __init__(self, directory: Path, home: Path, screen: Screen) -> None:
        self._directory = directory
        self._database = home / "demo.db"
        self._screen = screen
        self._begun = time.perf_counter()
        self._files = list(_files_under(directory))

    def play(self) -> int:
        """Everything; return the exit status."""
        total = len(self._files)
        if not total:
            raise DurableError(f"{self._directory}: no files there")
        pause = min(0.25, _WIDTH / total) if total < 500 else 0.0
        with Engine(self._database, queues={}) as engine:
            survey = engine.insert(Survey, state={"paths": self._files, "pause": pause})
        self._tell(f"a job for each file under {self._directory}, {total:,} in all")
        with tools.Reader(self._database) as reader:
            with self._worker() as doomed:
                done = self._follow(reader, doomed, lambda done: done >= total // 2)
                doomed.kill()
            self._tell(f"process {doomed.pid} is killed after {done:,} files, with others in its hands")
            with self._worker() as heir:
                self._follow(reader, heir, lambda _: ended(reader.counts()["surveys"]) > 0)
            again = sum(child.attempt > 0 for child in reader.children(survey))
            self._tell(f"joined; {again} files that were in its hands ran again (at most {_WIDTH + _PREFETCH} can be)")
            found = reader.get(survey)
        loop = _sum_up(map(_fingerprint, self._files))
        self._tell(f"a plain loop: {loop['bytes']:,} bytes, sha256 {loop['sha256'][:16]}…")
        same = found.result == loop
        self._tell("the same, in spite of the kill" if same else f"NOT the same: {found.result or found.last_error}")
        return 0 if same else 1

    @contextlib.contextmanager
    def _worker(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process that runs the queues until it is told to end, or killed; in the end it is gone."""
        command = (sys.executable, "-P", "-m", __name__, str(self._database))
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this process's, wherever it has it from
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | path) as process:
            self._tell(f"process {process.pid} starts: {_WIDTH} at a time, every commit synced to disk")
            yield process

    def _follow(self, reader: tools.Reader, process: subprocess.Popen[bytes], enough: Callable[[int], bool]) -> int:
        """Show the progress until `enough` says so of the files done; return how many these are."""
        while process.poll() is None:
            tally = reader.counts().get("files", {})
            done = ended(tally)
            if tally and enough(done):
                return done
            if self._screen.live:
                bar = self._screen.bar(tally or {Status.RUNNABLE: 1}, max(9, self._screen.size[0] - 36))
                print(f"\r{' ' * 11}{bar}  {done:,} of {len(self._files):,}\x1b[K", end="", flush=True)
            time.sleep(0.02)
        raise DurableError(f"the worker process ended early, with status {process.returncode}")

    def _tell(self, text: str) -> None:
        """A line of the timeline, over the bar."""
        clear = "\r\x1b[K" if self._screen.live else ""
        print(f"{clear}{time.perf_counter() - self._begun:7.2f} s  {plain(text)}", flush=True)


if __name__ == "__main__":
    _work(sys.argv[1])
