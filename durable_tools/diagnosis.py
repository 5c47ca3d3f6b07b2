"""What an instance waits for, or a schedule, and the command that helps: the words of `durable show` and the page."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import durable
from durable import Instance, NotFoundError, Status, tools
from durable_tools.screen import distance, moment, now


def namesake(get: Callable[[int | str], Instance], id_: int) -> int | None:
    """The id of another instance that carries the digits of this one as its correlation key."""
    with contextlib.suppress(NotFoundError):
        carrier = get(str(id_)).id
        return None if carrier == id_ else carrier
    return None


def how_far(progress: durable.Progress) -> str:
    """A step's progress: `3 of 8, 38 %: unpacking`."""
    total = "" if progress.total is None else f" of {progress.total:g}"
    percent = "" if progress.fraction is None else f", {progress.fraction:.0%}"
    return f"{progress.done:g}{total}{percent}" + (f": {progress.note}" if progress.note else "")


def why_it_does_not_fire(reader: tools.Reader, one: durable.Schedule) -> str:
    """Why a schedule does not fire, or does not now; empty where it does."""
    if one.is_paused:
        return "paused"
    if one.next_at is None:
        return "no instant comes any more"
    if one.last_id is not None and not one.overlap:
        with contextlib.suppress(NotFoundError):
            if reader.get(one.last_id).status in durable.LIVE:
                return f"skipped while #{one.last_id} is live"
    return "" if reader.workers() else "no engine runs on the file"


_HOLDERS = "SELECT id FROM durable_instances WHERE status = 'executing' AND concurrency_key = ? LIMIT 5"


class Diagnosis(NamedTuple):
    """One instance, and what can be said of why it stands where it does."""

    reader: tools.Reader
    file: Path
    it: Instance

    def verb(self, name: str, *words: object) -> str:
        """A command on the file, to be copied into a shell."""
        file = ["MODULE", "--database", self.file] if name == "run" else [self.file]
        return shlex.join(map(str, ["durable", name, *file, *words]))

    def target(self) -> tuple[object, ...]:
        """How a command says that it means this instance."""
        return (self.it.id, "--id") if namesake(self.reader.get, self.it.id) else (self.it.id,)

    def plight(self) -> tuple[str, str]:
        """What the instance waits for; and the verb that helps, if one does."""
        it = self.it
        match it.status:
            case Status.RUNNABLE:
                return self.why_it_does_not_run()
            case Status.EXECUTING:
                return self.who_runs_it()
            case Status.AWAITING_SIGNAL:
                end = f"until {moment(it.await_deadline)}" if it.await_deadline else "without a deadline"
                return f"the signal {' or '.join(it.awaits)}, {end}", self.verb(
                    "signal", *self.target(), it.awaits[0], "{}"
                )
            case Status.AWAITING_CHILDREN:
                return "the end of its children", self.verb("list", "--parent", it.id)
            case Status.FAILED:
                return "somebody to retry it", self.verb("retry", *self.target())
        return "", ""

    def why_it_does_not_run(self) -> tuple[str, str]:
        """What stands between a runnable instance and a worker."""
        it = self.it
        if it.queue in self.reader.paused():
            return f"its queue {it.queue} to be resumed", self.verb("resume", it.queue)
        if it.parked_on == f"key:{it.concurrency_key}":
            holders = [id_ for (id_,) in self.reader.rows(_HOLDERS, (it.concurrency_key,))]
            others = " ".join(["held by", *(f"#{id_}" for id_ in holders)]) if holders else "free by now"
            return f"its turn on {it.concurrency_key}, {others}", self.verb("show", holders[0]) if holders else ""
        if it.parked_on:
            return f"{it.weight} tokens of {it.rate_limit}, which come by themselves", ""
        if it.eligible_at > now():
            return f"its time, {moment(it.eligible_at)}", ""
        if not any(it.queue in worker.queues for worker in self.reader.workers()):
            return f"an engine that runs the queue {it.queue}", self.verb("run")
        return "a free place, or an engine that knows its class", self.verb("workers")

    def who_runs_it(self) -> tuple[str, str]:
        """The worker that has the instance, if it lives."""
        for worker in self.reader.workers():
            if worker.id == self.it.worker and worker.lease_expires_at > now():
                heard = distance(worker.heartbeat_at)
                where = f"its step, in process {worker.pid} on {worker.host}, heard of {heard}"
                if self.reader.is_cancelled(self.it.id):
                    return f"{where}; it has been asked to end", self.verb("workers")
                return where, self.verb("cancel", *self.target())
        return "an engine to take it from a worker that is gone", self.verb("run")
