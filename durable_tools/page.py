"""The page: a WSGI application that shows a file, live, and with `write=True` acts on it.

`make_app` makes the application, for `durable page` and for applications that mount it behind their own
authentication; `page.html` beside this module is what it serves, without any request to another host. The page
asks for data again and again, for what has changed since: one look at the file answers all viewers.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import copy
import datetime as dt
import functools
import hashlib
import hmac
import http.cookies
import ipaddress
import json
import logging
import os
import re
import secrets
import shlex
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from wsgiref import simple_server

import attrs

import durable
from durable import DurableError, Engine, Instance, NotFoundError, SchemaError, Status, tools
from durable_tools import diagram
from durable_tools.diagnosis import Diagnosis, why_it_does_not_fire
from durable_tools.screen import span

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_log = logging.getLogger("durable.page")

_HOUR_MS, _BUCKET_MS = 3_600_000, 60_000
_JSON_TYPE = "application/json; charset=utf-8"


class RefusedError(Exception):
    """A request that gets no answer: an HTTP status, what was wrong, and what helps."""

    def __init__(self, status: int, text: str, helps: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.helps = helps


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _ms(instant: dt.datetime | None) -> int | None:
    return None if instant is None else round(instant.timestamp() * 1000)


# ---- the file


class _Turns:
    """One at a time; where one fails, so do all who waited for it, so that they do not wait one after another."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._failed_at = 0.0
        self._failure = DurableError()

    @contextlib.contextmanager
    def next(self) -> Iterator[None]:
        """Wait for one's turn, and have it."""
        asked_at = time.monotonic()
        with self.lock:
            if self._failed_at > asked_at:
                raise copy.copy(self._failure)
            try:
                yield
            except DurableError as error:
                self._failed_at, self._failure = time.monotonic(), error
                raise


class _Source:
    """The file, by one reader as long as it stays the same file: one that was replaced is opened anew."""

    LOOKS_EVERY_S = 0.1

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(file))
        self._turns = _Turns()
        self._readers: tuple[tools.Reader, tools.Reader] | None = None
        self._identity: tuple[int, int] | None = None
        self._generation = 0
        self._version = ""
        self._looked_at = -self.LOOKS_EVERY_S
        self._used_at = time.monotonic()

    def reader(self) -> tools.Reader:
        """Return a reader of the file that lies there now; several threads may share it."""
        with self._turns.next():
            return self._open()[0]

    def version(self) -> tuple[int, str]:
        """Return the number of the file, by which one that was replaced is another, and a text that changes with it.

        It is looked at ten times a second, for all who ask.
        """
        with self._turns.next():
            _, watcher = self._open()
            if time.monotonic() - self._looked_at >= self.LOOKS_EVERY_S:
                # The file's own time is for one that is read as if it lay still, by a new connection each time.
                written_at = os.stat(self.path).st_mtime_ns
                self._version = f"{written_at}.{watcher.data_version()}"
                self._looked_at = time.monotonic()
            return self._generation, self._version

    def close(self, *, unless_used_for_s: float = 0, waits: bool = True) -> None:
        """Let go of the file, as far as nobody has asked for so long; not, unless it waits, while somebody is at it."""
        if not self._turns.lock.acquire(blocking=waits):
            return
        try:
            if time.monotonic() - self._used_at >= unless_used_for_s:
                self._close()
        finally:
            self._turns.lock.release()

    def _open(self) -> tuple[tools.Reader, tools.Reader]:
        self._used_at = time.monotonic()
        try:
            status = os.stat(self.path)
        except OSError as error:
            self._close()
            is_missing = isinstance(error, FileNotFoundError)
            text = f"{self.path}: no such file" if is_missing else f"{self.path} can't be looked at: {error.strerror}"
            raise DurableError(text) from error
        identity = status.st_dev, status.st_ino
        if self._readers is None or identity != self._identity:
            self._close()
            with contextlib.ExitStack() as opened:
                watcher, reader = (opened.enter_context(tools.Reader(self.path)) for _ in range(2))
                opened.pop_all()
            # Two: a data version is a connection's, and the watcher has one, which is asked under the lock. It is the
            # first to be opened and the last to be closed: of a file without a log that one takes away what it made.
            self._readers, self._identity = (reader, watcher), identity
            self._generation += 1
            self._looked_at = -self.LOOKS_EVERY_S
        return self._readers

    def _close(self) -> None:
        readers, self._readers = self._readers, None
        for reader in readers or ():
            reader.close()


# ---- counting

_ENDED = "(status = 'done' OR status = 'failed')"  # as the index of the ended rows has it
_NEXT_RETENTION = f"SELECT min(retention) FROM durable_instances WHERE {_ENDED} AND retention > ?"
_ENDED_BY_MINUTE = f"""
SELECT updated_at / {_BUCKET_MS}, queue, status, count(*) FROM durable_instances
WHERE {_ENDED} AND retention IS ? AND updated_at >= ? AND updated_at < ? GROUP BY 1, 2, 3
"""
_ENDED_BEFORE = f"""
SELECT queue, status, count(*) FROM durable_instances WHERE {_ENDED} AND updated_at < ? GROUP BY 1, 2
"""
# Each line reads one partial index and no row, and of it no more than so many entries; in its order, so that
# nothing is sorted: a third of the time.
_LIVE_COUNTS = """
SELECT queue, 'runnable', count(*) FROM (
    SELECT queue FROM durable_instances WHERE status = 'runnable' AND parked_on IS NULL
    ORDER BY queue LIMIT ?1) GROUP BY queue
UNION ALL SELECT queue, 'runnable', count(*) FROM (
    SELECT queue FROM durable_instances WHERE parked_on IS NOT NULL LIMIT ?1) GROUP BY queue
UNION ALL SELECT queue, 'executing', count(*) FROM (
    SELECT queue FROM durable_instances WHERE status = 'executing' LIMIT ?1) GROUP BY queue
UNION ALL SELECT queue, status, count(*) FROM (
    SELECT queue, status FROM durable_instances
    WHERE status = 'awaiting_signal' OR status = 'awaiting_children'
    ORDER BY status, queue LIMIT ?1) GROUP BY status, queue
"""
_Cells = collections.Counter[tuple[str, str]]
"""How many, by queue and status."""


class _Counted(NamedTuple):
    """A count of everything, which for a large file is a matter of a second, and what was added to it since."""

    version: tuple[int, str]
    """The file's, as of which all was counted."""
    made_at: int
    cost_s: float
    live: _Cells
    ended: _Cells
    by_minute: collections.Counter[tuple[int, str, str]]
    until: int
    """Of what ended, what did so before this instant is counted."""

    @classmethod
    def make(cls, reader: tools.Reader, version: tuple[int, str], now: int, until: int) -> _Counted:
        """Count all."""
        begun = time.thread_time()
        ended = _Cells({(queue, status): count for queue, status, count in reader.rows(_ENDED_BEFORE, (until,))})
        live = _live_counts(reader, 1 << 62)
        of_the_hour = cls(version, now, 0, live, _Cells(), collections.Counter(), now - _HOUR_MS).advanced(
            reader, until
        )
        return of_the_hour._replace(ended=ended, cost_s=time.thread_time() - begun)

    def advanced(self, reader: tools.Reader, until: int) -> _Counted:
        """Add what has ended since, up to another instant."""
        ended, by_minute = self.ended.copy(), self.by_minute.copy()
        for minute, queue, status, count in _ended_by_minute(reader, self.until, until):
            ended[queue, status] += count
            by_minute[minute, queue, status] += count
        return self._replace(ended=ended, by_minute=by_minute, until=until)


class _Tally:
    """Counts a file's instances: all at once where that is quick, else what is new upon a count made in between.

    A count of a million ended rows takes half a second. So it is made in a thread, and for at most a twentieth of the
    time; to it is added what has ended since, which an index tells at once. Live rows are counted anew each time, up
    to a bound; beyond that they are as old as the count.
    """

    QUICK_S, SHARE, MOST_LIVE = 0.01, 20, 10_000
    SMALL = 4_000_000
    """A file of so few bytes is counted at once, the first time, too."""
    SETTLED_MS = 1_000
    """What ended so long ago is settled: of later instants a commit may still come."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._counted: tuple[tools.Reader, _Counted] | None = None
        self._thread: threading.Thread | None = None
        self.made_apart = 0
        """How often the thread has come to a new count."""

    def look(self, now: int) -> tuple[dict[str, dict[str, int]], dict[str, list[list[int]]], int] | None:
        """Return the counts by queue and status, what ended by queue and minute of the last hour, and as of when.

        None while a large file is counted for the first time.
        """
        reader = self._source.reader()
        counted = self._count_of(reader, now)
        if counted is None:
            return None
        newest = counted.advanced(reader, 1 << 62)
        live = _live_counts(reader, self.MOST_LIVE)
        is_whole = live.total() < self.MOST_LIVE
        counts: dict[str, dict[str, int]] = {}
        for (queue, status), count in (newest.ended + (live if is_whole else counted.live)).items():
            counts.setdefault(queue, {})[status] = count
        return counts, _charts(newest.by_minute, now), now if is_whole else counted.made_at

    def _count_of(self, reader: tools.Reader, now: int) -> _Counted | None:
        """Return a count up to what is settled; the whole is counted anew where that is due."""
        settled, version = now - self.SETTLED_MS, self._source.version()
        with self._lock:
            known = self._known(reader)
            if self._is_quick(known):
                known = _Counted.make(reader, version, now, settled)
                self._counted = reader, known
            elif self._thread is None and (known is None or self._is_due(known, version, now)):
                count = functools.partial(self._count_apart, reader, version, now, settled)
                self._thread = threading.Thread(target=count, daemon=True)
                self._thread.start()
            thread = self._thread
        if known is None and thread is not None:  # the first time: one that is not so large is counted by then
            thread.join(0.03)
        with self._lock:
            known = self._known(reader)
            if known is not None and known.until < settled:
                known = known.advanced(reader, settled)
                self._counted = reader, known
            return known

    def _is_quick(self, known: _Counted | None) -> bool:
        if known is None:
            return os.path.getsize(self._source.path) <= self.SMALL
        return known.cost_s <= self.QUICK_S

    def _is_due(self, known: _Counted, version: tuple[int, str], now: int) -> bool:
        return known.version != version and now - known.made_at >= self.SHARE * known.cost_s * 1000

    def _known(self, reader: tools.Reader) -> _Counted | None:
        return self._counted[1] if self._counted and self._counted[0] is reader else None

    def _count_apart(self, reader: tools.Reader, version: tuple[int, str], now: int, settled: int) -> None:
        try:
            with contextlib.suppress(DurableError):  # which whoever asks next is told of by its own look
                counted = _Counted.make(reader, version, now, settled)
                with self._lock:
                    self._counted = reader, counted
                    self.made_apart += 1
        finally:
            self._thread = None


def _live_counts(reader: tools.Reader, limit: int) -> _Cells:
    cells = _Cells()
    for queue, status, count in reader.rows(_LIVE_COUNTS, (limit,)):
        cells[queue, status] += count
    return cells


def _ended_by_minute(reader: tools.Reader, since: int, until: int) -> Iterator[tuple[int, str, str, int]]:
    """Yield how many ended, by minute, queue and status: a seek for each retention that rows have."""
    retention: int | None = None
    while True:
        yield from cast("Iterable[tuple[int, str, str, int]]", reader.rows(_ENDED_BY_MINUTE, (retention, since, until)))
        retention = reader.rows(_NEXT_RETENTION, (-1 if retention is None else retention,))[0][0]
        if retention is None:
            return


def _charts(by_minute: Mapping[tuple[int, str, str], int], now: int) -> dict[str, list[list[int]]]:
    """Lay out by queue what ended in each minute of the last hour: [done, failed], the current minute last."""
    first = now // _BUCKET_MS - 59
    charts: dict[str, list[list[int]]] = {}
    for (minute, queue, status), count in by_minute.items():
        if 0 <= minute - first < 60:
            chart = charts.setdefault(queue, [[0, 0] for _ in range(60)])
            chart[minute - first][status == Status.FAILED] += count
    return charts


# ---- which instances


class _Line(NamedTuple):
    """What a list shows of an instance: of long texts their beginning."""

    id: int
    fsm: str
    version: int
    step: str
    status: str
    queue: str
    attempt: int
    max_attempts: int | None
    eligible_at: int
    updated_at: int
    inserted_at: int
    parked_on: str | None
    awaits: str | None
    await_deadline: int | None
    correlation_key: str | None
    worker: str | None
    progress: str | None
    last_error: str | None
    result: str | None

    def shown(self) -> dict[str, Any]:
        return self._asdict() | {
            "awaits": json.loads(self.awaits) if self.awaits else [],
            "progress": json.loads(self.progress) if self.progress else None,
        }


_SHORTENED = {"last_error": "substr(last_error, 1, 300) AS last_error", "result": "substr(result, 1, 120) AS result"}
_LINE = ", ".join(_SHORTENED.get(name, name) for name in _Line._fields)
_LINES_OF = f"""
SELECT {_LINE} FROM durable_instances WHERE id IN (SELECT value FROM json_each(?)) AND {{}} ORDER BY id DESC
"""
_CONDITIONS = {
    "status": "status IN (SELECT value FROM json_each(?))",
    "fsm": "EXISTS (SELECT 1 FROM (SELECT ? AS name) WHERE fsm = name OR substr(fsm, -length(name) - 1) = '.' || name)",
    "queue": "queue = ?",
    "key": "correlation_key = ?",
    "error": "instr(lower(last_error), lower(?)) > 0",
    "step": "step = ?",
    "schedule": "schedule = ?",
}
"""A class is meant by its whole name or by what stands behind a dot of it."""


class _Filter(NamedTuple):
    """Which instances are meant; what is None does not matter."""

    status: tuple[str, ...] | None = None
    fsm: str | None = None
    queue: str | None = None
    key: str | None = None
    error: str | None = None
    step: str | None = None
    schedule: str | None = None
    kind: str | None = None
    """The error without what differs from one to the next of its kind, as `_kind_of` has it."""

    @classmethod
    def of(cls, given: object) -> _Filter:
        """Read what a request has, where an empty text means nothing; RefusedError for what can't be meant."""
        if not isinstance(given, dict) or not given.keys() <= set(cls._fields):
            raise RefusedError(400, f"a filter is an object of {', '.join(cls._fields)}, not {str(given)[:200]}")
        values = {name: value for name, value in given.items() if value not in (None, "", [])}
        statuses = values.pop("status", None)
        statuses = [statuses] if isinstance(statuses, str) else statuses
        if statuses is not None and not (isinstance(statuses, list) and set(map(str, statuses)) <= set(Status)):
            raise RefusedError(400, f"a status is one of {', '.join(Status)}, not {str(statuses)[:200]}")
        texts = {name: _text_of(value, name) for name, value in values.items()}
        return cls(status=None if statuses is None else tuple(statuses), **texts)

    def narrowed(self, statuses: Iterable[str]) -> _Filter:
        """Only those in these statuses, too."""
        return self._replace(status=tuple(one for one in statuses if self.status is None or one in self.status))

    def condition(self) -> tuple[str, list[Any]]:
        """Return what a row has to fulfil, as SQL, and the values that it binds."""
        bound = {name: value for name, value in self._asdict().items() if value is not None and name in _CONDITIONS}
        values = [diagram.json_of(value) if name == "status" else value for name, value in bound.items()]
        return " AND ".join(["TRUE", *map(_CONDITIONS.__getitem__, bound)]), values

    def admits(self, line: _Line) -> bool:
        """Whether a row that fulfils the condition is meant."""
        return self.kind is None or self.kind == _kind_of(line.last_error)


def _text_of(value: object, name: str) -> str:
    """Return a text that can be looked for; RefusedError for another thing, or for half a letter."""
    if isinstance(value, str):
        with contextlib.suppress(UnicodeEncodeError):
            value.encode()
            return value
    raise RefusedError(400, f"{name} is a text that UTF-8 can write, not {str(value)[:200]!r}")


_VARYING = re.compile(
    r"""0x[0-9a-f]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]+|'[^']*'|"[^"]*"|«[^»]*»""", re.IGNORECASE
)


def _kind_of(error: str | None) -> str:
    """An error's first line without the numbers, ids and quoted texts in it: failures of one kind have one."""
    lines = (error or "").strip().splitlines()
    return _VARYING.sub("…", lines[0][:200]) if lines else ""


_FAILED_IDS = "SELECT id FROM durable_instances WHERE status = 'failed' AND id < ? ORDER BY id DESC LIMIT ?"
_ALL_IDS = "SELECT id FROM durable_instances WHERE id < ? ORDER BY id DESC LIMIT ?"
_KEY_IDS = "SELECT id FROM durable_instances WHERE correlation_key = ? AND id < ? ORDER BY id DESC LIMIT ?"
_SCHEDULE_IDS = "SELECT id FROM durable_instances WHERE schedule = ? AND id < ? ORDER BY id DESC LIMIT ?"
_PARKED = "(status = 'awaiting_signal' OR status = 'awaiting_children')"  # as the index of these rows has it
_LIVE_IDS = {
    Status.EXECUTING: "SELECT id FROM durable_instances WHERE status = 'executing' LIMIT ?1",
    Status.AWAITING_SIGNAL: f"SELECT id FROM durable_instances WHERE {_PARKED} AND status = 'awaiting_signal' LIMIT ?1",
    Status.AWAITING_CHILDREN: f"""
        SELECT id FROM durable_instances WHERE {_PARKED} AND status = 'awaiting_children' LIMIT ?1""",
    Status.RUNNABLE: """
        SELECT * FROM (
            SELECT id FROM durable_instances WHERE status = 'runnable' AND parked_on IS NULL LIMIT ?1)
        UNION ALL SELECT * FROM (SELECT id FROM durable_instances WHERE parked_on IS NOT NULL LIMIT ?1)""",
}
_LOT, _FEW = 500, 5_000
LOOKS_FOR_S = 0.06
"""So long a request looks for instances; whoever wants more asks again."""


def _lots_of_ids(reader: tools.Reader, meant: _Filter, before: int) -> Iterator[list[int]]:
    """Yield the ids that may be meant, newest first, in lots, by the index that leaves the fewest."""
    values: tuple[str, ...] = ()
    if meant.key is not None:
        statement, values = _KEY_IDS, (meant.key,)
    elif meant.schedule is not None:
        statement, values = _SCHEDULE_IDS, (meant.schedule,)
    elif meant.status == (Status.FAILED,):
        statement = _FAILED_IDS
    elif (few := _few_live_ids(reader, meant)) is not None:
        ids = sorted((id_ for id_ in few if id_ < before), reverse=True)
        yield from (ids[start : start + _LOT] for start in range(0, len(ids), _LOT))
        return
    else:
        statement = _ALL_IDS
    while ids := [id_ for (id_,) in reader.rows(statement, (*values, before, _LOT))]:
        yield ids
        before = ids[-1]


def _few_live_ids(reader: tools.Reader, meant: _Filter) -> set[int] | None:
    """The ids of the live statuses that are meant, if it is these alone and they are few."""
    if meant.status is None or not set(meant.status) <= durable.LIVE:
        return None
    found: set[int] = set()
    for status in meant.status:
        found.update(id_ for (id_,) in reader.rows(_LIVE_IDS[Status(status)], (_FEW + 1,)))
        if len(found) > _FEW:
            return None
    return found


class _Found(NamedTuple):
    """What was found of those that are meant, newest first."""

    lines: list[_Line]
    reached: int | None
    """Up to which id was looked; None when all was."""
    looked_at: int


def _look_for(
    reader: tools.Reader, meant: _Filter, *, before: int | None, limit: int, within_s: float | None = None
) -> _Found:
    """Look for instances, newest first, for so long at most: whoever wants more asks again, from where it ended."""
    end = time.monotonic() + (LOOKS_FOR_S if within_s is None else within_s)
    condition, values = meant.condition()
    lines: list[_Line] = []
    looked_at = 0
    for ids in _lots_of_ids(reader, meant, _MAX_ID if before is None else before):
        rows = reader.rows(_LINES_OF.format(condition), (diagram.json_of(ids), *values))
        lines += filter(meant.admits, map(_Line._make, rows))
        looked_at += len(ids)
        if len(lines) > limit:
            return _Found(lines[:limit], lines[limit - 1].id, looked_at)
        if time.monotonic() >= end:
            return _Found(lines, ids[-1], looked_at)
    return _Found(lines, None, looked_at)


_MAX_ID = (1 << 63) - 1


# ---- what is shown

_NEXT_PRIORITY = """
SELECT priority, eligible_at FROM durable_instances
WHERE queue = ? AND priority > ? AND status = 'runnable' AND parked_on IS NULL
ORDER BY priority, eligible_at LIMIT 1
"""
_RUNNING = f"SELECT {_LINE} FROM durable_instances WHERE status = 'executing' LIMIT 500"
_FAILURES = """
SELECT id, fsm, step, substr(last_error, 1, 300), updated_at FROM durable_instances
WHERE status = 'failed' AND id < ? ORDER BY id DESC LIMIT 500
"""
# Of the rows that come next; a retry has its backoff before it, so that it stands behind what is due.
_RETRIED = """
SELECT fsm, step, count(*), max(attempt), min(updated_at), min(eligible_at), max(id) FROM (
    SELECT fsm, step, attempt, updated_at, eligible_at, last_error, id FROM durable_instances
    WHERE status = 'runnable' AND parked_on IS NULL LIMIT 1000)
WHERE last_error IS NOT NULL GROUP BY fsm, step ORDER BY count(*) DESC LIMIT 3
"""
_ERROR = "SELECT substr(last_error, 1, 300) FROM durable_instances WHERE id = ?"
_ALL_WORKERS = "SELECT id, name, host, pid, heartbeat_at FROM durable_workers"


def _earliest(reader: tools.Reader, queue: str) -> int | None:
    """When the first of a queue that may run is or was due: a seek for each priority, of which 50 will do."""
    priority, earliest = -(1 << 63), None
    for _ in range(50):
        found = reader.rows(_NEXT_PRIORITY, (queue, priority))
        if not found:
            break
        priority, at = found[0]
        earliest = at if earliest is None else min(earliest, at)
    return earliest


def _failure_groups(reader: tools.Reader, within_s: float) -> dict[str, Any]:
    """Group the newest failures by class, step and kind of error; the most recent group first."""
    end, before = time.monotonic() + within_s, _MAX_ID
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    looked_at = 0
    while rows := reader.rows(_FAILURES, (before,)):
        for id_, fsm, step, error, at in rows:
            kind = _kind_of(error)
            group = groups.setdefault((fsm, step, kind), {"count": 0, "first_at": at, "last_at": at, "id": id_})
            group["count"] += 1
            group["first_at"] = min(group["first_at"], at)
            if at >= group["last_at"]:
                group |= {"last_at": at, "id": id_, "error": (error or "").strip()}
        looked_at += len(rows)
        before = rows[-1][0]
        if time.monotonic() >= end:
            break
    found = [{"fsm": fsm, "step": step, "kind": kind} | group for (fsm, step, kind), group in groups.items()]
    found.sort(key=lambda group: -group["last_at"])
    return {"groups": found[:200], "looked_at": looked_at, "is_all": not rows}


class _Grouped(NamedTuple):
    """The failures by kind, as they were at some instant."""

    reader: tools.Reader
    at: float
    cost_s: float
    groups: dict[str, Any]


class _Failures:
    """The failures by kind: where they are so many that this takes a while, by a thread for a tenth of the time."""

    QUICK_S, LONGEST_S, SHARE = 0.01, 0.25, 10

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._made: _Grouped | None = None
        self._is_made_apart = False
        self.made_apart = 0
        """How often the thread has come to new ones."""

    def look(self) -> dict[str, Any]:
        """Return the groups; of very many failures at first those of the newest, and then as they lately were."""
        reader = self._source.reader()
        with self._lock:
            made = self._made
            is_due = (
                made is None
                or made.reader is not reader
                or time.monotonic() - made.at >= max(0.25, self.SHARE * made.cost_s)
            )
            if made is None or made.reader is not reader or (is_due and self._is_quick(made)):
                made = self._make(reader, self.QUICK_S)
            if is_due and not self._is_quick(made) and not self._is_made_apart:
                self._is_made_apart = True
                threading.Thread(target=self._make_apart, args=(reader,), daemon=True).start()
            return made.groups

    def _is_quick(self, made: _Grouped) -> bool:
        return made.groups["is_all"] and made.cost_s <= self.QUICK_S

    def _make(self, reader: tools.Reader, within_s: float) -> _Grouped:
        begun = time.monotonic()
        groups = _failure_groups(reader, within_s)
        now = time.monotonic()
        made = self._made = _Grouped(reader, now, now - begun, groups)
        return made

    def _make_apart(self, reader: tools.Reader) -> None:
        try:
            with contextlib.suppress(DurableError):  # which whoever asks next is told of by its own look
                self._make(reader, self.LONGEST_S)
                self.made_apart += 1
        finally:
            self._is_made_apart = False


def _shown_worker(one: durable.Worker) -> dict[str, Any]:
    times = {name: _ms(getattr(one, name)) for name in ("started_at", "heartbeat_at", "lease_expires_at")}
    return attrs.asdict(one) | times


def _seconds(duration: float | dt.timedelta) -> float:
    return duration.total_seconds() if isinstance(duration, dt.timedelta) else duration


def _when_in_words(when: durable.Cron | durable.Every) -> str:
    if isinstance(when, durable.Cron):
        return f"{when.expression}, {'local time' if when.zone == 'local' else when.zone}"
    return f"every {span(_seconds(when.interval))}"


def _shown_schedule(reader: tools.Reader, one: durable.Schedule) -> dict[str, Any]:
    following = [_ms(at) for at in tools.next_instants(one, 3)]
    values = {"when": _when_in_words(one.when), "next_at": _ms(one.next_at), "last_at": _ms(one.last_at)}
    return (
        attrs.asdict(one, recurse=False) | values | {"following": following, "why": why_it_does_not_fire(reader, one)}
    )


def _overview(source: _Source, failures: Mapping[str, Any], tally: _Tally) -> dict[str, Any]:
    """All that the first page shows."""
    reader, now = source.reader(), _now_ms()
    looked = tally.look(now)
    counts, charts, counted_at = looked or ({}, {}, None)
    workers, paused = reader.workers(), set(reader.paused())
    widths = collections.Counter({"": 0})
    for worker in workers:
        widths.update(worker.queues)
    running = [_Line._make(row) for row in reader.rows(_RUNNING)]
    queues = [
        {
            "name": name,
            "is_paused": name in paused,
            "tally": counts.get(name, {}),
            "earliest": _earliest(reader, name),
            "width": widths[name],
            "chart": charts.get(name),
        }
        for name in sorted({*counts, *paused, *widths} - {""})
    ]
    answer = {
        "queues": queues,
        "counted_at": counted_at if counted_at != now else None,
        "is_counted": looked is not None,
        "running": [line.shown() for line in sorted(running, key=lambda line: line.updated_at)[:50]],
        "running_count": len(running),
        "workers": [_shown_worker(one) for one in workers],
        "schedules": [_shown_schedule(reader, one) for one in reader.schedules()],
        "failures": {**failures, "groups": failures["groups"][:5], "kinds": len(failures["groups"])},
    }
    troubles = [*_attention(answer, _gone(reader, workers), source.path, now), *_retried(reader, now)]
    return answer | {"attention": sorted(troubles, key=lambda trouble: _LEVELS.index(trouble["level"]))}


def _gone(reader: tools.Reader, living: Iterable[durable.Worker]) -> list[tuple[Any, ...]]:
    """The workers that died, or were cut off, and whose claims nobody has taken over yet."""
    names = {one.id for one in living}
    return [row for row in reader.rows(_ALL_WORKERS) if row[0] not in names]


def _trouble(level: str, what: str, helps: str, since: int | None = None, **more: Any) -> dict[str, Any]:
    """What somebody should look at: how bad it is, what it is, what helps, since when, and what the page links to."""
    return {"level": level, "what": what, "helps": helps, "since": since, **more}


def _retried(reader: tools.Reader, now: int) -> Iterator[dict[str, Any]]:
    """What has not failed yet, but is tried again after an error."""
    for fsm, step, count, attempt, since, next_at, id_ in reader.rows(_RETRIED):
        error = _first_line(reader.rows(_ERROR, (id_,))[0][0])
        many = f"{count:,} instances of {fsm} are" if count > 1 else f"{fsm} is"
        what = f"{many} tried again in {step}, with attempt {attempt}{' at most' if count > 1 else ''}: {error}"
        is_due = next_at <= now
        helps = "A try is due now." if is_due else f"The next try is due in {span((next_at - now) / 1000)}."
        yield _trouble("warn", what, helps, since, id=id_)


_LEVELS = ("bad", "warn", "note")


def _attention(
    answer: Mapping[str, Any], gone: Sequence[tuple[Any, ...]], path: Path, now: int
) -> Iterator[dict[str, Any]]:
    """What is wrong or will be: what, since when, and what helps."""
    for queue in answer["queues"]:
        yield from _trouble_of_queue(queue, path, now)
    for _, name, host, pid, heard_at in gone:
        what = f"Worker {name} (process {pid} on {host}) is gone"
        helps = "The next engine that runs on the file takes over what it had claimed."
        yield _trouble("bad", what, helps, heard_at, command=_run_command(path))
    for worker in answer["workers"]:
        if worker["lease_expires_at"] < now:
            what = f"Worker {worker['name']} (process {worker['pid']} on {worker['host']}) does not beat"
            helps = "Its process lives but is stopped, or its disk hangs; others take over what it had claimed."
            yield _trouble("bad", what, helps, worker["heartbeat_at"])
    for group in answer["failures"]["groups"][:3]:
        least = "" if answer["failures"]["is_all"] else "At least "
        many = f"{least}{group['count']:,} instances of {group['fsm']}" if group["count"] > 1 else f"{group['fsm']}"
        what = f"{many} failed in {group['step']}: {_first_line(group['error'])}"
        links = {"failed": {name: group[name] for name in ("fsm", "step", "kind")}, "id": group["id"]}
        helps = "Read one, mend the cause, then retry them all."
        yield _trouble("bad", what, helps, group["first_at"], until=group["last_at"], **links)
    for schedule in answer["schedules"]:
        if schedule["missed"]:
            what = f"Schedule {schedule['name']} has missed {schedule['missed']:,} occurrences in all"
            yield _trouble("note", what, "No engine that knows its class ran at those times.")


def _trouble_of_queue(queue: Mapping[str, Any], path: Path, now: int) -> Iterator[dict[str, Any]]:
    name, waiting, due = queue["name"], queue["tally"].get(Status.RUNNABLE, 0), queue["earliest"]
    is_due = due is not None and due < now - 2_000
    if queue["is_paused"] and waiting:
        links = {"command": shlex.join(["durable", "resume", str(path), name]), "resume": name}
        helps = "No engine claims from it until it is resumed."
        yield _trouble(
            "warn", f"Queue {name} is paused: {waiting:,} wait there", helps, due if is_due else None, **links
        )
    elif is_due and not queue["width"]:
        what = f"No engine serves the queue {name}, where {waiting:,} wait"
        yield _trouble("bad", what, "Start an engine that runs this queue.", due, command=_run_command(path))
    elif is_due and due < now - 60_000:
        helps = "Its engines are busy with others, or do not know its class."
        yield _trouble("warn", f"The oldest of queue {name} waits for its turn", helps, due)


def _run_command(path: Path) -> str:
    return shlex.join(["durable", "run", "MODULE", "--database", str(path)])


def _first_line(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "")[:200]


_LONGEST_VALUE = 60_000
"""A JSON text of more letters is fetched when somebody wants to see it."""
_VALUES = {
    "state": "SELECT state FROM durable_instances WHERE id = ?",
    "result": "SELECT result FROM durable_instances WHERE id = ?",
    "run": "SELECT state FROM durable_transitions WHERE instance = ? AND seq = ?",
    "signal": "SELECT payload FROM durable_signals WHERE target = ? AND id = ?",
    "call": "SELECT value FROM durable_calls WHERE instance = ? AND name = ?",
}
_INSTANCE_FIELDS = [field.name for field in attrs.fields(Instance)]
_INSTANCE = "SELECT {}, length(state), length(result) FROM durable_instances WHERE id = ?".format(
    ", ".join("'null'" if name in ("state", "result") else name for name in _INSTANCE_FIELDS)
)
_RUNS = f"""
SELECT seq, step, attempt, kind, started_at, duration, worker, substr(error, 1, 4000), substr(traceback, 1, 20000),
    length(state), iif(length(state) <= {_LONGEST_VALUE // 20}, state, NULL), signals, "to"
FROM durable_transitions WHERE instance = ? AND seq < ? ORDER BY seq DESC LIMIT 100
"""
_RUN_FIELDS = (
    *("seq", "step", "attempt", "kind", "started_at", "duration", "worker", "error", "traceback"),
    *("size", "text", "signals", "to"),
)
_RUN_COUNT = "SELECT count(*) FROM durable_transitions WHERE instance = ?"
_INBOX = f"""
SELECT id, name, sent_at, length(payload), iif(length(payload) <= {_LONGEST_VALUE // 20}, payload, NULL)
FROM durable_signals WHERE target = ? AND consumed = 0 ORDER BY id LIMIT 50
"""
_INBOX_COUNT = "SELECT count(*) FROM durable_signals WHERE target = ? AND consumed = 0"
_KEPT_CALLS = f"""
SELECT name, length(value), iif(length(value) <= {_LONGEST_VALUE // 20}, value, NULL)
FROM durable_calls WHERE instance = ? ORDER BY name LIMIT 100
"""
_CHILD_COUNTS = "SELECT status, count(*) FROM durable_instances WHERE parent_id = ? GROUP BY status"
_CHILDREN = f"""
SELECT {_LINE}, EXISTS (SELECT 1 FROM durable_instances c WHERE c.parent_id = i.id)
FROM durable_instances i WHERE parent_id = ? AND status = ? AND id > ? ORDER BY id LIMIT ?
"""
_PARENT = "SELECT parent_id, fsm, status FROM durable_instances WHERE id = ?"
_IN_ORDER_OF_INTEREST = (
    *(Status.FAILED, Status.EXECUTING, Status.RUNNABLE),
    *(Status.AWAITING_SIGNAL, Status.AWAITING_CHILDREN, Status.DONE),
)
_PAGE_OF_CHILDREN = 50


def _value(size: int | None, text: str | None) -> dict[str, Any] | None:
    """A JSON text, or how long it is, where it is to be asked for by itself."""
    return None if size is None else {"size": size, "text": text}


def _instance(reader: tools.Reader, id_: int, path: Path) -> dict[str, Any]:
    """All that the page of one instance shows at first."""
    rows = reader.rows(_INSTANCE, (id_,))
    if not rows:
        raise NotFoundError(f"no instance has the id {id_}: it was collected after its end, or never was")
    *columns, state_size, result_size = rows[0]
    it = tools.record(Instance, columns)
    reason, command = Diagnosis(reader, path, it).plight()
    sizes = {"state": state_size, "result": result_size}
    texts = {
        name: reader.rows(_VALUES[name], (id_,))[0][0] if size and size <= _LONGEST_VALUE else None
        for name, size in sizes.items()
    }
    shown = attrs.asdict(
        it, value_serializer=lambda _, __, value: _ms(value) if isinstance(value, dt.datetime) else value
    )
    return {
        "it": shown | {name: _value(size, texts[name]) for name, size in sizes.items()},
        "waits_for": reason,
        "command": command,
        "is_cancelled": it.status == Status.EXECUTING and reader.is_cancelled(id_),
        "runs": _runs(reader, id_, _MAX_ID),
        "inbox": _inbox(reader, id_),
        "calls": [{"name": name, "value": _value(size, text)} for name, size, text in reader.rows(_KEPT_CALLS, (id_,))],
        "children": _children(reader, id_, None, 0),
        "ancestors": list(_ancestors(reader, it.parent_id)),
        "machine": _shown_machine(_machine(reader, it)),
    }


def _runs(reader: tools.Reader, id_: int, before: int) -> dict[str, Any]:
    """The newest hundred runs of an instance before a number, oldest first."""
    rows = [dict(zip(_RUN_FIELDS, row, strict=True)) for row in reader.rows(_RUNS, (id_, before))]
    for row in rows:
        row["state"] = _value(row.pop("size"), row.pop("text"))
        row["duration"] = row["duration"] / 1000
        row["signals"] = json.loads(row["signals"]) if row["signals"] else []
    return {"count": reader.rows(_RUN_COUNT, (id_,))[0][0], "items": rows[::-1]}


def _inbox(reader: tools.Reader, id_: int) -> dict[str, Any]:
    found = reader.rows(_INBOX, (id_,))
    items = [
        {"id": of, "name": name, "sent_at": at, "payload": _value(size, text)} for of, name, at, size, text in found
    ]
    return {"count": reader.rows(_INBOX_COUNT, (id_,))[0][0], "items": items}


def _ancestors(reader: tools.Reader, parent: int | None) -> Iterator[dict[str, Any]]:
    """The parent, its parent, and so on, as far as they are in the file; the nearest first."""
    for _ in range(8):
        found = [] if parent is None else reader.rows(_PARENT, (parent,))
        if not found:
            return
        id_, (parent, fsm, status) = parent, found[0]
        yield {"id": id_, "fsm": fsm, "status": status}


def _children(reader: tools.Reader, parent: int, status: str | None, after: int) -> dict[str, Any]:
    """A page of an instance's children, those first that somebody has to look at, from behind a status and an id."""
    tally = dict(reader.rows(_CHILD_COUNTS, (parent,)))
    items: list[dict[str, Any]] = []
    first = 0 if status is None else _IN_ORDER_OF_INTEREST.index(Status(status))
    for one in filter(tally.__contains__, _IN_ORDER_OF_INTEREST[first:]):
        since = after if one == status else 0
        rows = reader.rows(_CHILDREN, (parent, one, since, _PAGE_OF_CHILDREN + 1 - len(items)))
        items += [_Line._make(row[:-1]).shown() | {"has_children": bool(row[-1])} for row in rows]
        if len(items) > _PAGE_OF_CHILDREN:
            break
    return {"tally": tally, "items": items[:_PAGE_OF_CHILDREN], "has_more": len(items) > _PAGE_OF_CHILDREN}


def _machine(reader: tools.Reader, it: Instance) -> diagram.Machine:
    """An instance's machine, and how often it took each way: of a class that is not known, by what others did, too."""
    known = diagram.machine_of(it.fsm, it.version)
    if known is None:
        peers = _look_for(reader, _Filter(fsm=it.fsm), before=None, limit=100, within_s=0.01).lines
        known = diagram.machine_seen(it.fsm, it.version).with_seen(
            diagram.seen_of(reader, [line.id for line in peers if line.version == it.version])
        )
    here = {} if it.status in (Status.DONE, Status.FAILED) else {it.step: 1}
    return known.with_seen(diagram.seen_of(reader, [it.id]))._replace(standing=here)


def _shown_machine(machine: diagram.Machine) -> dict[str, Any]:
    return {
        "steps": machine.steps,
        "initial": machine.initial,
        "arrows": [arrow._asdict() for arrow in machine.arrows],
        "standing": machine.standing,
    }


# ---- what is done


def _json_text(options: Mapping[str, Any], name: str) -> Any:
    """Read the JSON that somebody typed into a field; None where it was left empty."""
    text = options.get(name)
    if text is None or not str(text).strip():
        return None
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the {name} is no JSON: {error}") from error


def _cancel(engine: Engine, id_: int, options: Mapping[str, Any]) -> None:
    reason = str(options.get("reason") or "cancelled")
    if not engine.cancel(id_, reason, children=bool(options.get("children"))):
        raise DurableError(f"#{id_} had ended already")


def _rewind(engine: Engine, id_: int, options: Mapping[str, Any]) -> None:
    to = options.get("to")
    if not isinstance(to, int | str) or isinstance(to, bool) or to == "":
        raise RefusedError(400, f"say to which run, by its number or its step, not {to!r}")
    engine.rewind(id_, to, state=_json_text(options, "state"))


def _signal(engine: Engine, id_: int, options: Mapping[str, Any]) -> None:
    name = _text_of(options.get("name"), "the signal's name")
    engine.signal(id_, name, _json_text(options, "payload"), dedup_key=options.get("dedup_key") or None)


class _Act(NamedTuple):
    """What is done to an instance, and to which of those that a filter finds."""

    do: Callable[[Engine, int, Mapping[str, Any]], object]
    done: str
    """How it is told."""
    statuses: frozenset[Status]


_ON_INSTANCES = {
    "retry": _Act(lambda engine, id_, _: engine.retry(id_), "Retried", frozenset({Status.FAILED})),
    "cancel": _Act(_cancel, "Cancelled", durable.LIVE),
    "rewind": _Act(_rewind, "Rewound", frozenset(Status) - {Status.EXECUTING}),
    "signal": _Act(_signal, "Sent the signal to", durable.LIVE),
}
_ON_OTHERS: dict[tuple[str, str], tuple[Callable[[Engine, str], object], str]] = {
    ("pause", "queue"): (Engine.pause, "Paused the queue {}: no engine claims from it until it is resumed"),
    ("resume", "queue"): (Engine.resume, "Resumed the queue {}"),
    ("pause", "schedule"): (Engine.pause_schedule, "Paused the schedule {}: it fires no more until it is resumed"),
    ("resume", "schedule"): (Engine.resume_schedule, "Resumed the schedule {}"),
    ("trigger", "schedule"): (Engine.trigger, "Inserted an instance of the schedule {}"),
}


@contextlib.contextmanager
def _client(source: _Source) -> Iterator[Engine]:
    """An engine on the file that runs nothing, for one request: what is replaced meanwhile is found by the next."""
    source.reader()  # refuses what is missing, or not durable's, or of another version
    engine = Engine(source.path, queues={})
    try:
        yield engine
    finally:
        engine.stop()


def _do(source: _Source, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks for, and say what was done."""
    verb, options = str(asked.get("verb")), asked.get("options") or {}
    if not isinstance(options, dict):
        raise RefusedError(400, "options are an object")
    for thing in ("queue", "schedule"):
        if (verb, thing) in _ON_OTHERS and asked.get(thing) is not None:
            act, text = _ON_OTHERS[verb, thing]
            with _client(source) as engine:
                made = act(engine, _text_of(asked[thing], thing))
            return {"said": text.format(asked[thing]), "id": made if isinstance(made, int) else None}
    if verb not in _ON_INSTANCES:
        raise RefusedError(
            400, f"there is no {verb[:50]!r}; there are {', '.join(_ON_INSTANCES)}, pause, resume, trigger"
        )
    if "filter" in asked:
        return _do_to_those(source, _ON_INSTANCES[verb], options, _Filter.of(asked["filter"]), asked.get("before"))
    id_ = asked.get("id")
    if not isinstance(id_, int) or isinstance(id_, bool):
        raise RefusedError(400, f"an id is a number, not {str(id_)[:50]!r}")
    with _client(source) as engine:
        _ON_INSTANCES[verb].do(engine, id_, options)
    return {"said": f"{_ON_INSTANCES[verb].done} #{id_}"}


def _do_to_those(
    source: _Source, act: _Act, options: Mapping[str, Any], meant: _Filter, before: object
) -> dict[str, Any]:
    """Do it to some of those that a filter finds, for a second at most; `reached` is from where to go on."""
    if not isinstance(before, int) or isinstance(before, bool) or abs(before) > _MAX_ID:
        raise RefusedError(400, "before: the id before which to begin, as the preview had it")
    found = _look_for(source.reader(), meant.narrowed(act.statuses), before=before, limit=200)
    end, done = time.monotonic() + 1, 0
    refused: list[dict[str, Any]] = []
    reached = found.reached
    with _client(source) as engine:
        for line in found.lines:
            try:
                act.do(engine, line.id, options)
                done += 1
            except (DurableError, ValueError) as error:
                refused.append({"id": line.id, "why": str(error)})
            if time.monotonic() >= end and line is not found.lines[-1]:
                reached = line.id
                break
    return {"said": f"{act.done} {done:,}", "done": done, "refused": refused, "reached": reached}


# ---- requests


class _Kept(NamedTuple):
    """An answer: the file's version and the time at which it was made, the processor time it took, what it is."""

    version: str
    at: float
    cost_s: float
    body: bytes


class _Answers:
    """What was answered lately: one answer for all viewers, made anew when the file has changed.

    A file that changes all the time is looked at for a fifteenth of the time at most, and four times a second.
    """

    SIZE, SHARE, EVERY_S, LONGEST_S = 64, 15, 0.25, 5.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, _Turns] = {}
        self._kept: collections.OrderedDict[str, _Kept] = collections.OrderedDict()

    def get(self, key: str, version: str, make: Callable[[], Any]) -> bytes:
        """Return the answer to a question, as JSON."""
        with self._lock:
            turns = self._turns.setdefault(key, _Turns())
        with turns.next():
            kept = self._kept.get(key)
            if kept is not None and (kept.version == version or self._is_fresh(kept)):
                return kept.body
            begun = time.thread_time()  # of the processor: on a machine that is busy with others it is as live
            body = _to_json(make())
            with self._lock:
                self._kept[key] = _Kept(version, time.monotonic(), time.thread_time() - begun, body)
                self._kept.move_to_end(key)
                while len(self._kept) > self.SIZE:
                    self._turns.pop(self._kept.popitem(last=False)[0], None)
            return body

    def _is_fresh(self, kept: _Kept) -> bool:
        lasts_s = min(max(self.EVERY_S, self.SHARE * kept.cost_s), self.LONGEST_S)
        return time.monotonic() - kept.at < lasts_s

    def forget(self) -> None:
        """Make all anew."""
        with self._lock:
            self._kept.clear()


def _to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode()


class _Request(NamedTuple):
    """What of a request matters."""

    method: str
    path: str
    query: dict[str, str]
    environ: WSGIEnvironment

    @classmethod
    def of(cls, environ: WSGIEnvironment, prefix: str) -> _Request:
        path = str(environ.get("PATH_INFO") or "")
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            path = path.removeprefix(prefix)
        query = urllib.parse.parse_qs(str(environ.get("QUERY_STRING") or ""), keep_blank_values=True)
        return cls(environ["REQUEST_METHOD"], path, {name: values[-1] for name, values in query.items()}, environ)

    def header(self, name: str) -> str:
        return str(self.environ.get(f"HTTP_{name.upper().replace('-', '_')}") or "")

    def number(self, name: str, otherwise: int | None = None) -> int | None:
        """Return a number of the query; RefusedError for what is none."""
        text = self.query.get(name, "")
        if not text:
            return otherwise
        if not re.fullmatch("-?[0-9]{1,19}", text) or abs(int(text)) > _MAX_ID:
            raise RefusedError(400, f"{name} is a number, not {text[:50]!r}")
        return int(text)

    def id(self) -> int:
        id_ = self.number("id")
        if id_ is None:
            raise RefusedError(400, "say of which instance: id=")
        return id_

    def filter(self) -> _Filter:
        """Return the filter that the query has as JSON, which can write every text."""
        try:
            return _Filter.of(json.loads(self.query.get("q") or "{}"))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"q is no JSON: {error}") from error

    def body(self) -> dict[str, Any]:
        length = str(self.environ.get("CONTENT_LENGTH") or "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > _LONGEST_BODY:
            raise RefusedError(413, f"a request may have {_LONGEST_BODY:,} bytes, and has to say how many")
        try:
            asked = json.loads(self.environ["wsgi.input"].read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the request is no JSON: {error}") from error
        if not isinstance(asked, dict):
            raise RefusedError(400, "a request is a JSON object")
        return asked


_LONGEST_BODY = 20_000_000
_COOKIE = "durable_page"
_SAFE = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PHRASES = {
    200: "200 OK",
    304: "304 Not Modified",
    308: "308 Permanent Redirect",
    400: "400 Bad Request",
    401: "401 Unauthorized",
    403: "403 Forbidden",
    404: "404 Not Found",
    405: "405 Method Not Allowed",
    409: "409 Conflict",
    413: "413 Content Too Large",
    415: "415 Unsupported Media Type",
    421: "421 Misdirected Request",
    500: "500 Internal Server Error",
    503: "503 Service Unavailable",
}


class _Response(NamedTuple):
    """What is answered."""

    status: int
    body: bytes
    headers: dict[str, str]


@functools.cache
def _html() -> tuple[bytes, str]:
    """The page, and the policy under which it runs: its own script and style, known by their hashes, nothing else."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def hash_of(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in found)

    policy = (
        f"default-src 'none'; script-src {hash_of('script')}; style-src {hash_of('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text.encode(), policy


class PageApplication:
    """The WSGI application; `make_app` makes it. Call `close` to let go of the file; a later request opens it again."""

    def __init__(
        self,
        file: str | os.PathLike[str],
        *,
        write: bool,
        prefix: str,
        token: str | None,
        is_own_host: Callable[[str], bool],
    ) -> None:
        if prefix != "" and not re.fullmatch("(/[^/?#]+)+", str(prefix)):
            raise ValueError(f"prefix must be '' or a path like '/jobs', not {prefix!r}")
        self._source = _Source(file)
        self._write = write
        self._prefix = prefix.encode().decode("latin-1")  # as WSGI has the bytes of a path
        self._token = token
        self._is_own_host = is_own_host
        self._tally = _Tally(self._source)
        self._answers = _Answers()
        self._failures = _Failures(self._source)
        self._routes: dict[str, Callable[[_Request], Any]] = {
            "/api/overview": lambda _: _overview(self._source, self._failures.look(), self._tally),
            "/api/failures": lambda _: self._failures.look(),
            "/api/instances": self._instances,
            "/api/instance": lambda asked: _instance(self._source.reader(), asked.id(), self._source.path),
        }
        self._unkept_routes: dict[str, Callable[[_Request], Any]] = {
            "/api/about": lambda _: self._about(),
            "/api/count": self._count,
            "/api/children": lambda asked: _children(
                self._source.reader(), asked.id(), asked.query.get("status") or None, asked.number("after", 0) or 0
            ),
            "/api/runs": lambda asked: _runs(self._source.reader(), asked.id(), asked.number("before", _MAX_ID) or 0),
            "/api/target": self._target,
        }

    def close(self, *, unless_used_for_s: float = 0, waits: bool = True) -> None:
        """Let go of the file, as far as nobody has asked for so many seconds; unless it waits, not while it is used."""
        self._source.close(unless_used_for_s=unless_used_for_s, waits=waits)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        asked = _Request.of(environ, self._prefix)
        try:
            response = self._respond(asked)
        except RefusedError as error:
            response = _refusal(asked, error.status, str(error), error.helps)
        except NotFoundError as error:
            response = _refusal(asked, 404, str(error))
        except SchemaError as error:
            response = _refusal(asked, 503, str(error), "The page looks again by itself.")
        except (DurableError, OSError) as error:  # the second: of a file that went away between two looks
            status = 409 if asked.method == "POST" else 503
            response = _refusal(asked, status, str(error), "" if status == 409 else "The page looks again by itself.")
        except (ValueError, TypeError) as error:
            response = _refusal(asked, 400, str(error))
        except Exception as error:  # noqa: BLE001 - what nobody thought of: the log has the place, who looks has the words
            _log.exception("%s %s", asked.method, asked.path)
            response = _refusal(asked, 500, f"{type(error).__name__}: {error}", "The log says where.")
        headers = {**_SAFE, "X-Durable-Now": str(_now_ms()), "Content-Length": str(len(response.body))}
        start_response(_PHRASES[response.status], [*{**headers, **response.headers}.items()])
        return [] if asked.method == "HEAD" else [response.body]

    def _respond(self, asked: _Request) -> _Response:
        self._check_host(asked)
        if asked.path in ("", "/"):
            return self._respond_with_page(asked)
        self._check_token(asked)
        if asked.method == "POST" and asked.path == "/api/do":
            self._check_write(asked)
            done = _do(self._source, asked.body())
            self._answers.forget()
            return _Response(200, _to_json(done), {"Content-Type": _JSON_TYPE})
        return self._look(asked)

    def _respond_with_page(self, asked: _Request) -> _Response:
        if asked.method not in ("GET", "HEAD"):
            raise RefusedError(405, "the page is only read here")
        headers = {"Content-Type": "text/html; charset=utf-8"}
        if asked.path == "":
            path = str(asked.environ.get("SCRIPT_NAME") or "") + self._prefix_given(asked) + "/"
            where, query = urllib.parse.quote(path, encoding="latin-1"), asked.environ.get("QUERY_STRING")
            headers["Location"] = f"{where}?{query}" if query else where
            return _Response(308, b"", headers)
        if self._token is not None:
            self._check_page_token(asked)
            headers["Set-Cookie"] = f"{self._cookie_name(asked)}={self._half_token()}; Path=/; HttpOnly; SameSite=Lax"
        body, policy = _html()
        return _Response(200, body, headers | {"Content-Security-Policy": policy})

    def _prefix_given(self, asked: _Request) -> str:
        return self._prefix if str(asked.environ.get("PATH_INFO") or "").startswith(self._prefix) else ""

    def _look(self, asked: _Request) -> _Response:
        """Answer what changes nothing; who has the same already is told so."""
        if asked.method not in ("GET", "HEAD"):
            raise RefusedError(405, f"{asked.path} is only read")
        if asked.header("Sec-Fetch-Site") not in ("", "same-origin", "none"):
            raise RefusedError(403, "another site asks for this page's data: it gets none")
        if asked.path == "/api/value":
            return _Response(200, self._value(asked), {"Content-Type": _JSON_TYPE})
        if asked.path in self._unkept_routes:
            return _Response(200, _to_json(self._unkept_routes[asked.path](asked)), {"Content-Type": _JSON_TYPE})
        if asked.path not in self._routes:
            raise RefusedError(404, f"there is no {asked.path[:200]}")
        # What is told of times (due, heard of) changes without the file, too, and so does what is made apart.
        which_file, content = self._source.version()
        version = f"{content}.{int(time.monotonic() / 4)}.{self._tally.made_apart}.{self._failures.made_apart}"
        key = f"{which_file} {asked.path}?{sorted(asked.query.items())}"
        body = self._answers.get(key, version, lambda: self._routes[asked.path](asked))
        etag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if asked.header("If-None-Match") == etag:
            return _Response(304, b"", {"ETag": etag})
        return _Response(200, body, {"Content-Type": _JSON_TYPE, "ETag": etag})

    # What is looked at

    def _about(self) -> dict[str, Any]:
        path = self._source.path
        return {"file": str(path), "name": path.name, "in_shell": shlex.quote(str(path)), "write": self._write}

    def _instances(self, asked: _Request) -> dict[str, Any]:
        found = _look_for(
            self._source.reader(), asked.filter(), before=asked.number("before"), limit=_PAGE_OF_INSTANCES
        )
        return {**found._asdict(), "lines": [line.shown() for line in found.lines]}

    def _count(self, asked: _Request) -> dict[str, Any]:
        """Count those that a verb and a filter mean, as far as that goes at once."""
        act = _ON_INSTANCES.get(asked.query.get("verb", ""))
        if act is None:
            raise RefusedError(400, f"verb is one of {', '.join(_ON_INSTANCES)}")
        meant = asked.filter().narrowed(act.statuses)
        found = _look_for(self._source.reader(), meant, before=asked.number("before"), limit=100_000)
        ids = [line.id for line in found.lines]
        return {"count": len(ids), "newest": ids[:1], "some": ids[:5], "reached": found.reached}

    def _target(self, asked: _Request) -> dict[str, Any]:
        """Find an instance by what somebody typed: an id, or a key."""
        word = _text_of(asked.query.get("target"), "target")
        reader = self._source.reader()
        if re.fullmatch("[0-9]{1,18}", word):
            with contextlib.suppress(NotFoundError):
                return {"id": reader.get(int(word)).id}
        return {"id": reader.get(word).id}

    def _value(self, asked: _Request) -> bytes:
        what, name = asked.query.get("what", ""), asked.query.get("name", "")
        if what not in _VALUES:
            raise RefusedError(400, f"what is one of {', '.join(_VALUES)}")
        bindings: tuple[Any, ...] = (asked.id(),)
        if what in ("run", "signal"):
            bindings = (*bindings, asked.number("name", 0))
        elif what == "call":
            bindings = (*bindings, _text_of(name, "name"))
        rows = self._source.reader().rows(_VALUES[what], bindings)
        if not rows:
            raise NotFoundError("it is not in the file any more")
        return str("null" if rows[0][0] is None else rows[0][0]).encode()

    # Who may ask

    def _check_host(self, asked: _Request) -> None:
        """Refuse a name that is not this page's: a foreign site's that was made to mean this machine."""
        host = asked.header("Host").lower()
        if not (self._is_own_host(host) or self._is_own_host(re.sub(":[0-9]*$", "", host))):
            raise RefusedError(421, f"this page is not {host[:200]!r}: open the address that was printed")

    def _check_page_token(self, asked: _Request) -> None:
        cookies: http.cookies.SimpleCookie = http.cookies.SimpleCookie()
        with contextlib.suppress(http.cookies.CookieError):
            cookies.load(asked.header("Cookie"))
        name = self._cookie_name(asked)
        is_known = name in cookies and _same(cookies[name].value, self._half_token())
        if not is_known and not self._is_token(asked.query.get("token", "")):
            self._check_token(asked)

    def _check_token(self, asked: _Request) -> None:
        given = asked.header("Authorization").removeprefix("Bearer ")
        if self._token is not None and not self._is_token(given):
            raise RefusedError(401, "this needs the token of the page", "Open the address that `durable page` printed.")

    def _is_token(self, given: str) -> bool:
        return self._token is not None and _same(given, self._token)

    def _half_token(self) -> str:
        """What opens the page but not its data: a cookie goes to every port of the machine, a token must not."""
        return hmac.new(str(self._token).encode(), b"page", hashlib.sha256).hexdigest()[:32]

    @staticmethod
    def _cookie_name(asked: _Request) -> str:
        return f"{_COOKIE}_{asked.environ.get('SERVER_PORT', '')}"

    def _check_write(self, asked: _Request) -> None:
        """Refuse to write unless that is allowed and the page itself asks."""
        if not self._write:
            raise RefusedError(403, "this page only shows", "Serve it with --write to act on the file.")
        if not str(asked.environ.get("CONTENT_TYPE") or "").lower().startswith("application/json"):
            raise RefusedError(415, "what is to be done comes as application/json")
        site, origin = asked.header("Sec-Fetch-Site"), asked.header("Origin")
        is_own = site == "same-origin" if site else urllib.parse.urlsplit(origin).netloc == asked.header("Host")
        if asked.header("X-Durable") != "page" or not (is_own or not (site or origin)):
            raise RefusedError(403, "another site wants to write: it may not")


_PAGE_OF_INSTANCES = 50


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())


def _refusal(asked: _Request, status: int, text: str, helps: str = "") -> _Response:
    """Tell what was wrong: as JSON to the page, as a line of plain text to who wanted the page itself."""
    if asked.path in ("", "/"):
        line = f"{text}\n{helps}\n".encode(errors="replace")
        return _Response(status, line, {"Content-Type": "text/plain; charset=utf-8"})
    return _Response(status, _to_json({"error": text, "helps": helps}), {"Content-Type": _JSON_TYPE})


def make_app(
    file: str | os.PathLike[str],
    *,
    write: bool = False,
    prefix: str = "",
    token: str | None = None,
    hosts: Iterable[str] | None = None,
) -> PageApplication:
    """Make the page of a file, a WSGI application; through an adapter, an ASGI application may mount it, too.

    * `write` (False): it may act on the file: retry, cancel, rewind, signal, pause, resume, trigger
    * `prefix` (""): the path under which it is mounted, such as "/jobs", where the server leaves it in the path
    * `token` (None): what a request must have, in `?token=` of the page's address; without one, who may see the page
      is the affair of the application that mounts it
    * `hosts` (None): the names that a request's Host header may have, with or without the port; None: any, for the
      application that mounts it knows its own. Where it has no login and gives no `token`, name them, also on the
      loopback interface: else a site that has its own name mean this machine reads it, and writes, as the page itself

    It opens nothing until it is asked; `close()` lets go of the file. What a cross-site request wants to write is
    refused, with a token or without. A bad prefix is a `ValueError`.
    """
    names = None if hosts is None else frozenset(host.lower() for host in hosts)
    return PageApplication(
        file, write=write, prefix=prefix, token=token, is_own_host=lambda host: names is None or host in names
    )


# ---- serving it


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    """A thread for each request; between two it lets go of a file that nobody looks at."""

    daemon_threads = True
    request_queue_size = 64
    allow_reuse_address = os.name != "nt"  # where it means that another may take the port away

    IDLE_S = 15.0

    def server_bind(self) -> None:
        """Bind, without asking a name server what the machine is called."""
        socketserver.TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def service_actions(self) -> None:
        """Let go of the file when nobody has looked for a while."""
        cast(PageApplication, self.get_app()).close(unless_used_for_s=self.IDLE_S, waits=False)

    def server_close(self) -> None:
        """End, and let go of the file; a request that still waits for it is not waited for."""
        super().server_close()
        if (page := cast("PageApplication | None", self.get_app())) is not None:
            page.close(waits=False)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a browser that went away."""
        _log.debug("a request of %s broke off", client_address, exc_info=True)


class _Handler(simple_server.WSGIRequestHandler):
    timeout = 30  # seconds that a connection may be silent

    def log_message(self, *_: object) -> None:
        """Say nothing: a page that is looked at asks all the time."""


def make_server(
    file: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 0, write: bool = False
) -> tuple[simple_server.WSGIServer, str]:
    """Make a server of the page, with a token of its own, and return it with the address to open.

    Port 0 is any free one. Beyond the loopback interface it answers to its addresses, its name, and the `host` given.
    """
    token = secrets.token_urlsafe(24)
    server_class = type("_Server6", (_Server,), {"address_family": socket.AF_INET6}) if ":" in host else _Server
    try:
        server = cast(simple_server.WSGIServer, server_class((host, port), _Handler))
    except OSError as error:
        raise OSError(error.errno, f"the page can't be served at {host}, port {port}: {error.strerror}") from error
    names = {"localhost", "127.0.0.1", "[::1]"}
    if not is_loopback(host):
        names |= {host.lower(), socket.gethostname().lower()}

    def is_own_host(name: str) -> bool:
        # A name can be made to mean another machine, an address can't: the browser is where it says.
        return name in names or (not is_loopback(host) and _is_address(name))

    page = PageApplication(file, write=write, prefix="", token=token, is_own_host=is_own_host)
    server.set_app(cast("WSGIApplication", page))
    shown = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return server, f"http://{shown}:{server.server_port}/?token={token}"


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name.strip("[]"))
        return True
    return False


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is served there."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
