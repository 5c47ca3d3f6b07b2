"""The command line: `durable`, or `python -m durable`.

Each verb is a function: its docstring is its help, its decorator has its arguments. Those that only look open their
file with `durable.tools.Reader`, which can't write; the others are clients of the file, or run an engine.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import logging
import math
import operator
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar, cast

import apsw
import attrs

import durable
from durable import DurableError, Engine, Insert, Instance, NotFoundError, Status, Transition, Worker, tools
from durable_tools.diagnosis import Diagnosis, how_far, namesake, why_it_does_not_fire
from durable_tools.screen import BLOCKS, Screen, distance, ended, fit, moment, now, plain, span


class _UsageError(Exception):
    """A command line that cannot be meant: exit status 2."""


# What says by itself what was wrong; anything else is told with its type and its place.
_PLAIN_ERRORS = (_UsageError, DurableError, ValueError, TypeError, OSError, apsw.Error)


def _drop_unwritten(stream: TextIO) -> None:
    """Drop what a stream does not take; Python would try again at exit, and complain with a status of its own."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(text: str) -> None:
    """Say `text` on standard error, in one line, if there is anybody to say it to."""
    line = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"durable: {plain(line)}", file=sys.stderr)
        _drop_unwritten(sys.stderr)


# ---- what verbs are made of


@contextlib.contextmanager
def _client(path: Path, *, may_create: bool = False, **options: Any) -> Iterator[Engine]:
    """An engine on the file that runs nothing."""
    if not may_create:
        tools.Reader(path).close()  # refuses a file that is missing, or is none of durable's
    engine = Engine(path, queues={}, **options)
    try:
        yield engine
    finally:
        engine.stop()


_Target = TypeVar("_Target")
_Opener = Callable[[Path], contextlib.AbstractContextManager[Any]]
_Run = Callable[..., int | None]
_Argument = tuple[tuple[str, ...], dict[str, Any]]  # what argparse will be told of it


class _Verb(NamedTuple):
    """A verb: what it does, what it opens its file with, and about it: commands to copy, and its arguments."""

    run: _Run
    opens: _Opener | None
    prints: bool
    about: tuple[str | _Argument, ...]

    def __call__(self, options: argparse.Namespace) -> int:
        if self.prints:  # looked at first: what can't be told is not done either
            options.screen = Screen.of_stdout()
        if self.opens is None:
            return self.run(options) or 0
        with self.opens(options.file) as opened:
            return self.run(opened, options) or 0


VERBS: dict[str, _Verb] = {}


def _argument(*names: str, **options: Any) -> _Argument:
    return names, options


_FILE = _argument("file", type=Path, metavar="FILE", help="the database")


def _verb(*about: str | _Argument, opens: _Opener | None = None, prints: bool = True) -> Callable[[_Run], _Run]:
    """Make a function a verb: `_list` is `list`, its docstring the help, what it returns the exit status."""

    def register(run: _Run) -> _Run:
        VERBS[run.__name__.removeprefix("_")] = _Verb(run, opens, prints, (_FILE, *about) if opens else about)
        return run

    return register


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that the command line gives a value."""
    return {name: value for name, value in vars(options).items() if name in names and value is not None}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _json_argument(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise _UsageError(f"not JSON: {text!r}: {error}") from error
    except RecursionError:
        raise _UsageError(f"JSON that is nested too deeply: {text[:40]}…") from None


def _seconds_argument(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise _UsageError(f"not a number of seconds: {text!r}")


def _count_argument(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise _UsageError(f"not a number of at least 1: {text!r}")
    return int(text)


def _queue_argument(text: str) -> tuple[str, int]:
    name, _, width = text.rpartition("=")
    if not (name and width.isascii() and width.isdigit()):
        raise _UsageError(f"not NAME=N: {text!r}")
    return name, int(width)


def _instant_argument(text: str) -> dt.datetime:
    try:
        instant = dt.datetime.fromisoformat(text)
        return instant if instant.tzinfo else instant.astimezone()  # without a zone: on this machine's clock
    except (ValueError, OverflowError, OSError) as error:
        raise _UsageError(f"not an instant like 2030-01-31T09:00: {text!r}") from error


_TARGET = functools.partial(_argument, metavar="TARGET", help="an id, which is all digits, or a correlation key")
_BY_ID = _argument("--id", dest="by_id", action="store_true", help="TARGET is an id, whoever has it as a key")
_BY = (
    _argument("--key", dest="by_key", action="store_true", help="TARGET is a correlation key, though it is all digits"),
    _BY_ID,
)
_JSON = _argument("--json", action="store_true", help="for programs")
_FIND_BY = ("status", "fsm", "queue", "parent_id", "correlation_key", "before")
_FILTERS = (
    _argument("--fsm", metavar="NAME", help="only of this class, by its name in the file"),
    _argument("--queue", help="only in this queue"),
)


def _meant(word: str, options: argparse.Namespace, get: Callable[[int | str], Instance]) -> int | str:
    """The instance that a TARGET means: digits are an id, refused where they are another's key and nothing says which.

    Digits that no id is written with, after a zero or too many, are a key.
    """
    if options.by_key or not re.fullmatch("0|[1-9][0-9]{0,18}", word):
        return word
    if not options.by_id and (other := namesake(get, int(word))):
        raise DurableError(f"{word} is also the key of #{other}: say --key if you mean that one, --id if you do not")
    return int(word)


# ---- run, drain, insert: with the user's code


def _load_script(path: Path) -> types.ModuleType:
    """The script under its stem, so that its classes have the names that `python SCRIPT` gives them."""
    path = path.resolve(strict=True)
    known = sys.modules.get(path.stem)
    if known and getattr(known, "__file__", None) == str(path):
        return known
    if known or path.stem in sys.stdlib_module_names:
        raise DurableError(f"another module is called {path.stem!r}; the script needs a name of its own")
    sys.path.insert(0, str(path.parent))
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(cast(Any, spec))
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _blame(error: BaseException) -> str:
    """`error` in one line, with the user's line that raised it."""
    library = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
    own = (durable.__file__, os.path.dirname(__file__), library + "importlib", library + "pathlib", "<")
    users = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    place = f" ({users[-1].filename}:{users[-1].lineno})" if users else ""
    return f"{type(error).__name__}: {error}{place}"


_WRITES = {"durable_instances": "inserts into", "durable_signals": "sends signals into"}
_PATIENCE_S = 5.0


def _await_commits() -> None:
    """Wait for what engines that nobody has started were asked without waiting: each has a thread for that."""
    for thread in threading.enumerate():
        if thread.name == "durable-flush":
            thread.join(_PATIENCE_S)


@contextlib.contextmanager
def _loading(target: str) -> Iterator[None]:
    """Tell of the files that a target has written into while it was loaded: that it does each time."""
    written, opened = set(), []

    def watch(connection: apsw.Connection) -> None:
        def note(action: int, _database: str, table: str, _row: int) -> None:
            if action == apsw.SQLITE_INSERT and table in _WRITES:
                written.add((path, _WRITES[table]))

        path = connection.filename
        opened.append(connection)
        connection.set_update_hook(note)

    apsw.connection_hooks.append(watch)
    try:
        yield
    finally:
        _await_commits()
        apsw.connection_hooks.remove(watch)
        for connection in opened:
            with contextlib.suppress(apsw.Error):  # it may be closed, or busy in a thread of the target's
                connection.set_update_hook(None)
        for path, writes in sorted(written):
            advice = "put what is to run once under `if __name__ == '__main__':`"
            _complain(f"{target} {writes} {path} each time it is loaded: {advice}")


def _load(target: str) -> tuple[types.ModuleType, Any]:
    """The module that `target` means, and what it calls the name behind the colon; None without one."""
    name, _, attribute = target.rpartition(":")
    if not name or not attribute.replace(".", "_").isidentifier():  # no colon, or that of `C:\jobs.py`
        name, attribute = target, ""
    try:
        with _loading(name):
            if name.endswith(".py") or Path(name).is_file():
                module = _load_script(Path(name))
            else:
                sys.path.insert(0, os.getcwd())  # as `python -m` does
                module = importlib.import_module(name)
        return module, operator.attrgetter(attribute)(module) if attribute else None
    except DurableError:
        raise
    except (Exception, SystemExit) as error:
        raise DurableError(f"{target} cannot be loaded: {_blame(error)}") from error


_CODE = (
    _argument("target", metavar="TARGET", help="a module, module:engine, or the path of a script"),
    _argument("--database", type=Path, metavar="FILE", help="make an engine on FILE for TARGET's classes"),
)
_LEVELS = ("debug", "info", "warning", "error")
_LOG_LEVEL = _argument("--log-level", choices=_LEVELS, default="info", help="what to log (info)")


def _engine_for(options: argparse.Namespace, queues: Mapping[str, int]) -> Engine:
    """The engine that the command line means: TARGET's own, or a new one on --database. Now it logs, too."""
    if queues and not options.database:
        raise _UsageError("the queues of TARGET's own engine are its own: --queue goes with --database")
    module, engine = _load(options.target)
    if options.database and engine is None:
        if not tools.registry:
            raise DurableError(f"{options.target} defines no machine and no job")
        engine = Engine(options.database, queues=queues or {spec.queue: 10 for spec in tools.registry.values()})
    else:
        engines = [engine] if engine else [value for value in vars(module).values() if isinstance(value, Engine)]
        if options.database or len(engines) != 1 or not isinstance(engines[0], Engine):
            raise DurableError(f"{options.target} is not one engine: say MODULE:ENGINE, or MODULE and --database FILE")
        engine = engines[0]
        if tools.is_stopped(engine):
            raise DurableError(
                f"the engine of {options.target} was stopped when that was loaded: make it, but do not run it"
            )
    # For a person at a terminal, unless the user's code has set up logging of its own.
    form = "%(asctime)s %(levelname)-7s %(message)s"
    logging.basicConfig(level=options.log_level.upper(), format=form, datefmt="%X")
    return engine


class _Fleet:
    """Worker processes of one target, kept alive by their parent, whose log they share."""

    QUICK_S = 5.0
    """A worker that dies sooner after its start than this is replaced with more and more patience."""
    LONGEST_S = 30.0

    def __init__(self, options: argparse.Namespace) -> None:
        self._command = [sys.executable, "-m", "durable", "run", options.target, "--log-level", options.log_level]
        if options.database:
            self._command += ["--database", str(options.database)]
        if options.queue:
            self._command += ["--queue", *(f"{name}={width}" for name, width in options.queue)]
        self._count = options.processes
        self._workers: list[subprocess.Popen[bytes]] = []
        self._started_at: dict[int, float] = {}
        self._pause_s = 0.25
        self._signals: list[int] = []
        """Those that have come and are not passed on yet: not by their handler, which a worker may be missing then."""
        self._is_stopping = False
        self._stopped: frozenset[int] = frozenset()
        """What workers end with that a signal has met before they ran anything: no fault, if it was the only one."""

    def run(self) -> int:
        """Keep the workers alive until a signal has come and all have ended; return the first status that is not 0."""
        # Windows sends SIGBREAK for Ctrl-Break and a closed console; unheard, the workers would outlive their parent.
        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), lambda number, _: self._signals.append(number))
        while len(self._workers) < self._count and not self._signals:
            self._start()
        statuses: list[int] = []
        while self._workers:
            time.sleep(0.05)
            while self._signals:
                self._pass_on(self._signals.pop(0))
            for worker in [one for one in self._workers if one.poll() is not None]:
                self._workers.remove(worker)
                statuses.append(0 if worker.returncode in self._stopped else worker.returncode)
                if not self._is_stopping and not self._replace(worker):
                    self._pass_on(signal.SIGTERM)
        failed = next((status for status in statuses[-self._count :] if status), 0)
        return failed if failed >= 0 else 128 - failed  # killed: as shells say it

    def _start(self) -> None:
        # A group of its own: the terminal's Ctrl-C reaches the parent alone, who passes it on once.
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        worker = subprocess.Popen(self._command, start_new_session=True, creationflags=flags)
        self._started_at[worker.pid] = time.monotonic()
        self._workers.append(worker)

    def _replace(self, dead: subprocess.Popen[bytes]) -> bool:
        """Start another in place of a worker that has died; False if it was refused, as all others would be."""
        lived_s = time.monotonic() - self._started_at.pop(dead.pid)
        if dead.returncode in (1, 2) and lived_s < self.QUICK_S:
            return False
        if dead.returncode == 0:
            return True  # its engine was stopped: that is meant
        self._pause_s = min(2 * self._pause_s, self.LONGEST_S) if lived_s < self.QUICK_S else 0.25
        _complain(f"worker {dead.pid} has died (status {dead.returncode}): another starts in {self._pause_s:g} s")
        end = time.monotonic() + self._pause_s
        while time.monotonic() < end and not self._signals:
            time.sleep(0.05)
        if not self._signals:
            self._start()
        return True

    def _pass_on(self, number: int) -> None:
        if os.name == "nt":
            meant = getattr(signal, "CTRL_BREAK_EVENT", number)
            endings = 128 + signal.SIGINT, 0xC000013A  # as `run` leaves, and STATUS_CONTROL_C_EXIT
        else:  # to one that is still loading its target SIGINT is a traceback; else the two mean the same
            meant = signal.SIGTERM if number == signal.SIGINT else number
            endings = 128 + meant, -meant
        self._stopped = frozenset() if self._is_stopping else frozenset(endings)
        self._is_stopping = True
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.send_signal(meant)


@_verb(
    "durable run jobs.py",
    "durable run shop.worker:engine",
    "durable run jobs.py --database shop.db --queue default=10 checkout=5",
    *_CODE,
    _argument(
        "--queue",
        type=_queue_argument,
        nargs="+",
        action="extend",
        metavar="NAME=N",
        help="run N steps of queue NAME at once; others not at all",
    ),
    _argument(
        "--processes",
        type=_count_argument,
        default=1,
        metavar="N",
        help="so many processes, for steps that need the processor",
    ),
    _LOG_LEVEL,
    prints=False,
)
def _run(options: argparse.Namespace) -> int:
    """Run an engine until SIGINT or SIGTERM.

    TARGET's own engine, or a new one on --database with all classes of TARGET, in their own queues unless
    --queue says which, and how many steps of each at once. Several may run on one file. The first signal
    asks for a drain: what runs may end, nothing new begins. The second leaves at once. With --processes N a parent
    keeps so many workers alive, replaces those that die, and passes signals on.
    """
    if options.processes > 1:
        return _Fleet(options).run()

    def leave(number: int, _frame: object) -> None:
        os._exit(128 + number)  # nothing is lost: what was committed stays, the rest runs again

    engine = _engine_for(options, dict(options.queue or ()))
    signal.signal(signal.SIGINT, leave)  # until `run` takes its place, and again when that has been asked to stop
    signal.signal(signal.SIGTERM, leave)
    if hasattr(signal, "SIGBREAK"):  # Windows': a parent can send its workers nothing else
        signal.signal(signal.SIGBREAK, lambda *_: signal.raise_signal(signal.SIGINT))
    engine.run()
    return 0


@_verb(
    "durable drain jobs.py --database shop.db",
    *_CODE,
    _argument("--queue", help="only this queue"),
    _argument("--with-scheduled", action="store_true", help="also what is scheduled for later"),
    _LOG_LEVEL,
)
def _drain(options: argparse.Namespace) -> int:
    """Run what is due in this process, print the tally, end.

    Exit status 1 if an instance failed.
    """
    engine = _engine_for(options, {})
    try:
        tally = engine.drain(queue=options.queue, with_scheduled=options.with_scheduled, max_steps=sys.maxsize)
    finally:
        engine.stop()
    print(", ".join(f"{count} {kind}" for kind, count in tally.items() if count) or "nothing was due")
    return 1 if tally["stop"] else 0


@_verb(
    """durable insert jobs.py:fetch --database shop.db --args '{"url": "https://example.org"}'""",
    """durable insert shop.jobs:Checkout --database shop.db --key order:42 --state '{"order": 42}' --in 60""",
    _argument("target", metavar="TARGET:CLASS", help="a module or script, and a class or function job in it"),
    _argument("--database", type=Path, metavar="FILE", required=True, help="made if it is missing"),
    _argument("--state", "--args", type=_json_argument, metavar="JSON", help="its state, a job's arguments"),
    _argument("--key", dest="correlation_key", metavar="KEY", help="a business key, unique among the live"),
    _argument("--in", dest="schedule_in", type=_seconds_argument, metavar="SECONDS", help="not before"),
    _argument("--at", dest="schedule_at", type=_instant_argument, metavar="INSTANT", help="not before"),
    _argument("--queue", help="another queue than its class's"),
    _argument("--priority", type=int, metavar="N", help="lower goes first (0)"),
    _argument("--step", help="another first step"),
    _argument("--concurrency-key", metavar="KEY", help="what it shares its turns with"),
    _argument("--rate-limit", metavar="NAME", help="the bucket that pays for it"),
    _argument("--weight", type=_count_argument, metavar="N", help="how many tokens it costs (1)"),
    _argument("--max-attempts", type=_count_argument, metavar="N", help="of a job (20)"),
)
def _insert(options: argparse.Namespace) -> None:
    """Insert an instance and print its id."""
    if ":" not in options.target:
        raise _UsageError(f"not TARGET:CLASS: {options.target!r}")
    _, fsm = _load(options.target)
    with _client(options.database, may_create=True) as engine:
        print(engine.insert(fsm, **_given(options, attrs.fields_dict(Insert))))


# ---- list, counts, workers, show, wait, check: looking, with a file that is only read


def _timeline(screen: Screen, history: Iterable[Transition]) -> Iterator[str]:
    """What was run of an instance: when, how long, which step, what it came to, where, and what was wrong."""
    rows = [
        (
            it.seq,
            f"{it.started_at.astimezone():%Y-%m-%d %H:%M:%S}",
            span(it.duration),
            it.step,
            it.kind,
            it.to,
            it.worker,
            it.error,
        )
        for it in history
    ]
    return screen.table(("run", "when", "took", "step", "kind", "to", "worker", "error"), rows)


def _remark(it: Instance) -> str:
    """What one asks next about an instance: its error, what it waits for, what came of it."""
    match it.status:
        case Status.DONE:
            return "" if it.result is None else json.dumps(it.result, ensure_ascii=False)
        case Status.AWAITING_SIGNAL:
            return " ".join(it.awaits) + (f", {distance(it.await_deadline)}" if it.await_deadline else "")
        case Status.EXECUTING if it.progress:
            return how_far(it.progress)
        case Status.RUNNABLE if it.parked_on:
            return f"parked on {it.parked_on}"
        case Status.RUNNABLE if it.eligible_at > now():
            return f"due {distance(it.eligible_at)}  {it.last_error or ''}"
    return it.last_error or ""


def _instance_table(screen: Screen, found: Iterable[Instance]) -> Iterator[str]:
    rows = [
        (it.id, it.fsm, it.step, it.status, it.queue, it.correlation_key, distance(it.updated_at), _remark(it))
        for it in found
    ]
    return screen.table(("id", "fsm", "step", "status", "queue", "key", "changed", "remark"), rows)


def _worker_table(screen: Screen, found: Iterable[Worker]) -> Iterator[str]:
    rows = []
    for it in found:
        queues = " ".join(f"{queue}={width}" for queue, width in it.queues.items())
        rows.append((it.name, it.host, it.pid, queues, distance(it.started_at), distance(it.heartbeat_at), it.id))
    return screen.table(("worker", "host", "pid", "queues", "started", "heartbeat", "id"), rows)


@_verb(
    "durable list shop.db --status failed",
    "durable list shop.db --fsm jobs.Resize --json",
    *_FILTERS,
    _argument("--key", dest="correlation_key", metavar="KEY", help="only with this correlation key"),
    _argument("--status", choices=[str(status) for status in Status], help="only with this status"),
    _argument("--parent", dest="parent_id", type=int, metavar="ID", help="only its children"),
    _argument("--before", type=int, metavar="ID", help="only older ones: the next page"),
    _argument("--limit", type=_count_argument, default=100, metavar="N", help="so many at most (100)"),
    _JSON,
    opens=tools.Reader,
)
def _list(reader: tools.Reader, options: argparse.Namespace) -> None:
    """List instances, newest first."""
    screen, found = options.screen, reader.find(_given(options, _FIND_BY), options.limit)
    screen.answer(found, _instance_table(screen, found), as_json=options.json)


@_verb("durable counts shop.db", _JSON, opens=tools.Reader)
def _counts(reader: tools.Reader, options: argparse.Namespace) -> None:
    """Count the instances of every queue by status."""
    screen, counts, paused = options.screen, reader.counts(), reader.paused()
    rows = [
        (f"{queue} (paused)" if queue in paused else queue, *(tally.get(status, 0) for status in BLOCKS))
        for queue, tally in counts.items()
    ]
    screen.answer(counts, screen.table(("queue", *BLOCKS), rows), as_json=options.json)


@_verb("durable workers shop.db", _JSON, opens=tools.Reader)
def _workers(reader: tools.Reader, options: argparse.Namespace) -> None:
    """List the engines that run on FILE."""
    screen, found = options.screen, reader.workers()
    screen.answer(found, _worker_table(screen, found), as_json=options.json)


_CHILD_COUNTS = "SELECT status, count(*) FROM durable_instances WHERE parent_id = ? GROUP BY status"


class _Story(Diagnosis):
    """One instance, for `show`: where it stands, why, and the verb that helps."""

    def facts(self) -> Iterator[tuple[str, object]]:
        """The story, a line each."""
        it, (reason, verb) = self.it, self.plight()
        of_how_many = f" of {it.max_attempts}" if it.max_attempts else ""
        yield "stands at", f"{it.step}, attempt {it.attempt}{of_how_many}"
        yield "since", moment(it.updated_at)
        yield "waits for", reason
        yield "progress", it.progress and f"{how_far(it.progress)}, {distance(it.progress.at)}"
        yield "try", verb
        yield "crashes", it.crashes
        yield "key", it.correlation_key
        yield "queue", f"{it.queue}, priority {it.priority}"
        yield "turns", it.concurrency_key
        yield "pays", it.rate_limit and f"{it.weight} of {it.rate_limit}"
        yield "child of", it.parent_id
        yield "inserted", moment(it.inserted_at)
        yield "state", json.dumps(it.state, ensure_ascii=False)
        yield "result", it.status is Status.DONE and json.dumps(it.result, ensure_ascii=False)

    def tell(self, screen: Screen) -> Iterator[str]:
        """All of it: the facts, the last error, the signals, and of the children ten, those that failed if any did."""
        it, mine = self.it, {"parent_id": self.it.id}
        title = screen.paint(plain(f"{it.fsm} #{it.id}"), "bold")
        yield f"{title}  version {it.version}  {screen.paint(it.status, it.status)}"
        yield from (f"  {screen.paint(fit(label, 9), 'dim')}  {plain(fact)}" for label, fact in self.facts() if fact)
        if it.last_error:
            yield from ("", screen.paint("last error", "bold"))
            yield from (screen.paint(f"  {plain(line)}", Status.FAILED) for line in it.last_error.splitlines())
            yield from (screen.paint(f"  {plain(line)}", "dim") for line in (it.traceback or "").splitlines())
        if history := self.reader.history(it.id):
            yield from ("", *_timeline(screen, history))
        if signals := self.reader.signals(it.id):
            rows = [(each.id, each.name, json.dumps(each.payload), distance(each.sent_at)) for each in signals]
            yield from ("", *screen.table(("signal", "name", "payload", "sent"), rows))
        if tally := self.reader.rows(_CHILD_COUNTS, (it.id,)):
            counts = ", ".join(screen.paint(f"{count} {status}", status) for status, count in tally)
            yield from ("", f"{screen.paint('children', 'bold')}  {counts}")
            failed = self.reader.find(mine | {"status": Status.FAILED}, 10)
            yield from _instance_table(screen, failed or self.reader.find(mine, 10))


@_verb("durable show shop.db 42", "durable show shop.db order:42", _TARGET("target"), *_BY, _JSON, opens=tools.Reader)
def _show(reader: tools.Reader, options: argparse.Namespace) -> None:
    """Tell the story of one instance.

    Where it stands, why, since when, what it waits for, its last error, signals and children, and what helps.
    """
    it = reader.get(_meant(options.target, options, reader.get))
    whole = attrs.asdict(it, recurse=False) | {"history": reader.history(it.id)}
    options.screen.answer(whole, _Story(reader, options.file, it).tell(options.screen), as_json=options.json)


@_verb("durable history shop.db order:42", _TARGET("target"), *_BY, _JSON, opens=tools.Reader)
def _history(reader: tools.Reader, options: argparse.Namespace) -> None:
    """List what was run of an instance, oldest first."""
    it = reader.get(_meant(options.target, options, reader.get))
    history = reader.history(it.id)
    options.screen.answer(history, _timeline(options.screen, history), as_json=options.json)


@_verb(
    "durable wait shop.db order:42 --timeout 60",
    _TARGET("target"),
    *_BY,
    _argument("--timeout", type=_seconds_argument, default=math.inf, metavar="S", help="give up after S seconds"),
    opens=tools.Reader,
)
def _wait(reader: tools.Reader, options: argparse.Namespace) -> None:
    """Wait until an instance is done and print its result as JSON.

    Exit status 1 if it failed, or has not ended after --timeout seconds.
    """
    end, it = time.monotonic() + options.timeout, reader.get(_meant(options.target, options, reader.get))
    while it.status in durable.LIVE and time.monotonic() < end:
        time.sleep(0.02)
        it = reader.get(it.id)
    if it.status is not Status.DONE:
        stands = f"failed: {it.last_error}" if it.status is Status.FAILED else f"is still {it.status}"
        raise DurableError(f"#{it.id} {stands}")
    print(options.screen.json(it.result))


@_verb(
    "durable check shop.db",
    "durable check shop.db shop.worker",
    _argument("target", nargs="?", metavar="TARGET", help="a module or script, whose classes the file is held against"),
    _JSON,
    opens=tools.Reader,
)
def _check(reader: tools.Reader, options: argparse.Namespace) -> int:
    """Audit the file; exit status 1 if it has problems.

    With TARGET every live instance and schedule is also held against its classes, for what would no longer run, and
    their texts are looked through for steps that they name and do not have.
    """
    if options.target is not None:
        _load(options.target)
    problems = reader.check(code=options.target is not None)
    if options.target is not None:
        from durable_tools import texts  # reads sources, for which Python loads a good deal

        problems += texts.misspelt()
    options.screen.answer(problems, map(plain, problems or ["sound"]), as_json=options.json)
    return 1 if problems else 0


@_verb(
    "durable schedules shop.db --next 5",
    _argument("--next", type=_count_argument, default=1, metavar="N", help="so many instants to come of each (1)"),
    _JSON,
    opens=tools.Reader,
)
def _schedules(reader: tools.Reader, options: argparse.Namespace) -> None:
    """List the schedules: of which class, when, the next and the last instant, and why one does not fire."""
    found = reader.schedules()
    instants = {one.name: tools.next_instants(one, options.next) for one in found}
    rows = [
        (
            one.name,
            one.fsm,
            str(one.when),
            ", ".join(f"{at.astimezone():%Y-%m-%d %H:%M:%S}" for at in instants[one.name]),
            one.last_at and moment(one.last_at),
            one.missed,
            why_it_does_not_fire(reader, one),
        )
        for one in found
    ]
    whole = [attrs.asdict(one, recurse=False) | {"when": str(one.when), "next": instants[one.name]} for one in found]
    head = ("name", "fsm", "when", "next", "last", "missed", "remark")
    options.screen.answer(whole, options.screen.table(head, rows), as_json=options.json)


# ---- signal, cancel, retry, pause, resume, gc, snapshot: what the methods do


def _on_each(targets: Iterable[_Target], act: Callable[[_Target], object]) -> int:
    """Call `act` with every target; say what is refused, and go on with the next. The exit status."""
    status = 0
    for target in targets:
        try:
            act(target)
        except DurableError as error:
            _complain(str(error))
            status = 1
    return status


@_verb(
    """durable signal shop.db order:42 payment_confirmed '{"amount": 100}' --dedup-key evt-7""",
    _TARGET("target"),
    *_BY,
    _argument("name", metavar="NAME", help="the signal's name"),
    _argument("payload", type=_json_argument, nargs="?", metavar="JSON", help="its payload (null)"),
    _argument("--dedup-key", metavar="K", help="send it once, however often this is repeated"),
    opens=_client,
    prints=False,
)
def _signal(engine: Engine, options: argparse.Namespace) -> None:
    """Send a signal to a live instance."""
    target = _meant(options.target, options, engine.get)
    engine.signal(target, options.name, options.payload, dedup_key=options.dedup_key)


@_verb(
    "durable cancel shop.db 42 order:43 --reason 'out of stock'",
    _TARGET("targets", nargs="+"),
    *_BY,
    _argument("--reason", default="cancelled", help="what last_error will say (cancelled)"),
    _argument("--children", action="store_true", help="their live descendants as well"),
    opens=_client,
    prints=False,
)
def _cancel(engine: Engine, options: argparse.Namespace) -> int:
    """Fail instances; what a running step does is dropped."""

    def cancel(word: str) -> None:
        if not engine.cancel(_meant(word, options, engine.get), options.reason, children=options.children):
            raise DurableError(f"{word} had ended already")

    return _on_each(options.targets, cancel)


def _all_failed(engine: Engine, filters: Mapping[str, Any]) -> list[int]:
    """The ids of what has failed, oldest first."""
    ids: list[int] = []
    while page := engine.find(status=Status.FAILED, limit=1000, before=ids[-1] if ids else None, **filters):
        ids += [instance.id for instance in page]
    return ids[::-1]


@_verb(
    "durable retry shop.db 42",
    "durable retry shop.db --all --fsm jobs.Resize",
    _TARGET("targets", nargs="*"),
    _argument("--all", action="store_true", help="whatever failed and passes the filters"),
    *_FILTERS,
    _argument(
        "--key",
        dest="correlation_key",
        nargs="?",
        const=True,
        metavar="KEY",
        help="with --all: only with this correlation key; else TARGET is one, though it is all digits",
    ),
    _BY_ID,
    opens=_client,
    prints=False,
)
def _retry(engine: Engine, options: argparse.Namespace) -> int:
    """Run failed instances again from the step they failed in."""
    by_key, targets = options.correlation_key, options.targets
    if isinstance(by_key, str) and not options.all:
        targets = [by_key, *targets]
    if bool(targets) == options.all or (options.all and by_key is True):
        raise _UsageError("retry takes either TARGETs or --all, and with --all a KEY after --key")
    if options.all:
        return _on_each(_all_failed(engine, _given(options, _FIND_BY)), engine.retry)
    options.by_key = by_key is not None
    return _on_each(targets, lambda word: engine.retry(_meant(word, options, engine.get)))


_PAST = (
    _TARGET("target"),
    _argument("to", metavar="TO", help="a run's number in `history`, or a step: its latest run"),
    _argument("--state", type=_json_argument, metavar="JSON", help="another state than it had then"),
    *_BY,
)


def _run_or_step(word: str) -> int | str:
    return int(word) if word.isascii() and word.isdigit() else word


@_verb("durable rewind shop.db order:42 ship", *_PAST, opens=_client, prints=False)
def _rewind(engine: Engine, options: argparse.Namespace) -> None:
    """Have an instance stand again before a run of its history; what was done outside the file stays done."""
    engine.rewind(_meant(options.target, options, engine.get), _run_or_step(options.to), state=options.state)


@_verb("durable fork shop.db order:42 ship", *_PAST, opens=_client)
def _fork(engine: Engine, options: argparse.Namespace) -> None:
    """Insert a new instance that goes on from before a run of another, and print its id."""
    print(engine.fork(_meant(options.target, options, engine.get), _run_or_step(options.to), state=options.state))


_QUEUE_OR_SCHEDULE = (
    _argument("queue", metavar="QUEUE", nargs="?", help="the queue's name"),
    _argument("--schedule", metavar="NAME", help="a schedule in place of a queue"),
)


def _is_of_queue(options: argparse.Namespace) -> bool:
    """Whether a queue is meant, and not a schedule."""
    if (options.queue is None) == (options.schedule is None):
        raise _UsageError("say which: a QUEUE, or --schedule NAME")
    return options.queue is not None


@_verb(
    "durable pause shop.db checkout",
    "durable pause shop.db --schedule report",
    *_QUEUE_OR_SCHEDULE,
    opens=_client,
    prints=False,
)
def _pause(engine: Engine, options: argparse.Namespace) -> None:
    """Keep every engine from claiming from a queue, or a schedule from firing, until it is resumed."""
    if _is_of_queue(options):
        engine.pause(options.queue)
    else:
        engine.pause_schedule(options.schedule)


@_verb(
    "durable resume shop.db checkout",
    "durable resume shop.db --schedule report",
    *_QUEUE_OR_SCHEDULE,
    opens=_client,
    prints=False,
)
def _resume(engine: Engine, options: argparse.Namespace) -> None:
    """Let a paused queue run again, or a paused schedule fire."""
    if _is_of_queue(options):
        engine.resume(options.queue)
    else:
        engine.resume_schedule(options.schedule)


_NAME = _argument("name", metavar="NAME", help="the schedule's name")


@_verb("durable trigger shop.db report", _NAME, opens=_client)
def _trigger(engine: Engine, options: argparse.Namespace) -> None:
    """Insert an instance of a schedule now, beside its grid, and print its id."""
    print(engine.trigger(options.name))


@_verb("durable unschedule shop.db report", _NAME, opens=_client, prints=False)
def _unschedule(engine: Engine, options: argparse.Namespace) -> None:
    """Remove a schedule; one that a class declares is written again when an engine starts that knows it."""
    if not engine.unschedule(options.name):
        raise NotFoundError(f"no schedule is called {options.name!r}")


@_verb(
    "durable gc shop.db --retention 3600",
    _FILE,
    _argument("--retention", type=_seconds_argument, default=86_400.0, metavar="S", help="keep the last S seconds"),
)
def _gc(options: argparse.Namespace) -> None:
    """Delete what ended before the retention and print how many rows that were."""
    with _client(options.file, retention=options.retention) as engine:
        print(engine.gc())


@_verb(
    "durable snapshot shop.db backup.db",
    _argument("copy", type=Path, metavar="COPY", help="the copy; it must not exist"),
    opens=_client,
    prints=False,
)
def _snapshot(engine: Engine, options: argparse.Namespace) -> None:
    """Copy the file while engines run on it; every queue of the copy is paused."""
    engine.snapshot(options.copy)


@_verb(
    "durable move shop.db postgresql://localhost/shop",
    _FILE,
    _argument("url", metavar="URL", help="the database, postgresql://user@host/name"),
)
def _move(options: argparse.Namespace) -> None:
    """Move what lives in the file to PostgreSQL; its queues stay paused. It can be run again after a failure."""
    try:
        dbos = importlib.import_module("durable_tools.dbos")
    except ImportError as error:
        raise DurableError(str(error)) from error
    moved = dbos.move(options.file, options.url)
    print(", ".join(f"{count} {name}" for name, count in moved._asdict().items()))


# ---- watch: the live view


_LATEST_FAILURES = "SELECT id FROM durable_instances WHERE status = 'failed' ORDER BY updated_at DESC, id DESC LIMIT 5"
_ARMED = "SELECT 1 FROM durable_instances WHERE await_deadline IS NOT NULL LIMIT 1"


class _Watch:
    """The latest looks at a file, which is what a rate needs, and how they are shown."""

    def __init__(self, reader: tools.Reader, file: Path) -> None:
        self._reader = reader
        self._file = file
        self.looks: collections.deque[tuple[dt.datetime, dict[str, dict[str, int]]]] = collections.deque(maxlen=24)
        self._failures: list[Instance] = []
        self._told: tuple[str, list[Instance]] = "", []

    def look(self) -> None:
        """Look once more."""
        self._failures = [self._reader.get(id_) for (id_,) in self._reader.rows(_LATEST_FAILURES)]
        self.looks.append((now(), self._reader.counts()))

    def is_idle(self) -> bool:
        """Whether nothing is left that time alone would bring on."""
        paused = self._reader.paused()
        for queue, tally in self.looks[-1][1].items():
            if tally.get(Status.EXECUTING) or (tally.get(Status.RUNNABLE) and queue not in paused):
                return False
        return not self._reader.rows(_ARMED)

    def _rate(self, *queues: str) -> str:
        """How many of the queues' instances ended per second; a collection, which lowers the counts, is no rate."""
        (begun, first), (at, last) = self.looks[0], self.looks[-1]
        count = sum(ended(last[queue]) - ended(first.get(queue, {})) for queue in queues)
        return f"{max(0, count) / ((at - begun).total_seconds() or 1):,.1f}/s"

    def frame(self, screen: Screen) -> list[str]:
        """All that a terminal of this size can show."""
        (at, counts), (columns, lines), paused = self.looks[-1], screen.size, self._reader.paused()
        right = f"  {self._rate(*counts)}  {at.astimezone():%H:%M:%S}"
        frame = [screen.paint(fit(f"durable  {plain(self._file)}", max(9, columns - len(right))), "bold") + right, ""]
        for queue, tally in counts.items():
            share = f"{ended(tally) / sum(tally.values()):4.0%} {self._rate(queue):>11}"
            note = "  paused" if queue in paused else ""
            frame.append(f"{fit(plain(queue), 12)}  {screen.bar(tally, max(9, columns - 40))}  {share}{note}")
            frame.append(
                " " * 14 + "  ".join(screen.paint(f"{tally[it]:,} {it}", it) for it in BLOCKS if tally.get(it))
            )
        failed = [(it.id, it.fsm, it.step, distance(it.updated_at), it.last_error) for it in self._failures]
        frame += ["", *screen.table(("failed", "fsm", "step", "when", "why"), failed)] if failed else []
        return frame[: lines - 1]

    def news(self) -> Iterator[str]:
        """What a pipe is told: the counts if they have changed, and the failures not told before."""
        at, counts = self.looks[-1]
        total = sum(map(collections.Counter, counts.values()), collections.Counter())
        tally = "  ".join(f"{total[status]} {status}" for status in BLOCKS if total[status]) or "empty"
        (tally_told, failures_told), self._told = self._told, (tally, self._failures)
        if tally != tally_told:
            yield f"{at.astimezone():%H:%M:%S}  {tally}  {self._rate(*counts)}"
        for it in reversed(self._failures):
            if it not in failures_told:
                yield plain(f"{at.astimezone():%H:%M:%S}  #{it.id} {it.fsm} failed in {it.step}: {it.last_error}")


@_verb(
    "durable watch shop.db",
    "durable watch shop.db --until-idle > progress.log",
    _argument("--until-idle", action="store_true", help="end when nothing is left that time alone would bring on"),
    _argument("--interval", type=_seconds_argument, default=0.5, metavar="S", help="seconds between two looks (0.5)"),
    opens=tools.Reader,
)
def _watch(reader: tools.Reader, options: argparse.Namespace) -> None:
    """Watch the queues live; Ctrl-C ends it.

    In a pipe: a line for each change of the counts and each failure.
    """
    screen, watch = options.screen, _Watch(reader, options.file)
    with contextlib.ExitStack() as at_end, contextlib.suppress(KeyboardInterrupt):
        if screen.live:  # the terminal's other screen, without a cursor; the first comes back however this ends
            print("\x1b[?1049h\x1b[?25l", end="")
            at_end.callback(print, "\x1b[?25h\x1b[?1049l", end="", flush=True)
        while True:
            begun = time.monotonic()
            watch.look()
            if screen.live:  # over the frame before, line by line: nothing flickers
                print("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in watch.frame(screen)), end="\x1b[J", flush=True)
            else:
                print(end="".join(f"{line}\n" for line in watch.news()), flush=True)
            if options.until_idle and watch.is_idle():
                break
            # To count a large file takes time: a tenth of this process's, at most.
            time.sleep(max(options.interval, 10 * (time.monotonic() - begun)))
    if screen.live and watch.looks:
        print("\n".join(watch.frame(screen)))


@_verb(
    "durable demo",
    "durable demo ~/Pictures",
    _argument("directory", type=Path, nargs="?", metavar="DIRECTORY", help="(this Python's library)"),
)
def _demo(options: argparse.Namespace) -> int:
    """See the engine at work on real files, and survive a kill.

    A machine starts a job for each file under DIRECTORY, which fingerprints it, and joins them. Half-way the
    worker process is killed; a new one goes on. At the end the sum is compared with that of a plain loop.
    """
    from durable_tools.demo import Demo  # here, so that its classes are in no application's registry

    directory = (options.directory or Path(sysconfig.get_path("stdlib"))).resolve(strict=True)
    with tempfile.TemporaryDirectory(prefix="durable-demo-", ignore_cleanup_errors=True) as home:
        return Demo(directory, Path(home), options.screen).play()


# ---- page, diagram: to be looked at


@_verb(
    "durable page shop.db",
    "durable page shop.db shop.worker --write",
    _FILE,
    _argument(
        "target", nargs="?", metavar="TARGET", help="a module or script, whose machines are drawn from their code"
    ),
    _argument("--port", type=int, default=0, metavar="N", help="where to serve it (any free port)"),
    _argument(
        "--write", action="store_true", help="retry, cancel, rewind, signal, pause, resume, trigger from the page"
    ),
    _argument("--host", default="127.0.0.1", help="another interface than this machine's own; it needs --expose"),
    _argument("--expose", action="store_true", help="yes, whoever reaches that interface may try the address"),
)
def _page(options: argparse.Namespace) -> None:
    """Serve a page that shows FILE, live, and print its address; Ctrl-C ends it.

    Read-only unless --write. Only this machine reaches it, and only with the token in the address, which is new each
    time. With TARGET the machines are drawn from their code, else from what their history shows.
    """
    from durable_tools import page  # here: it loads a web server

    if not page.is_loopback(options.host) and not options.expose:
        raise _UsageError(
            f"--host {options.host} lets other machines reach the page: the token in its address is all that keeps"
            " others out, and it goes over the network unencrypted. Say --expose if you mean that;"
            " `ssh -L` or an authenticating proxy is safer"
        )
    if not 0 <= options.port <= 65_535:
        raise _UsageError(f"not a port: {options.port}")
    tools.Reader(options.file).close()
    if options.target is not None:
        _load(options.target)
    server, address = page.make_server(options.file, host=options.host, port=options.port, write=options.write)
    logging.basicConfig(format="%(asctime)s %(levelname)-7s %(message)s", datefmt="%X")
    with server, contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(address, flush=True)
        server.serve_forever()


@_verb(
    "durable diagram jobs.py:Checkout",
    "durable diagram shop.worker:Checkout --file shop.db",
    _argument("target", metavar="TARGET:CLASS", help="a module or script, and a class or function job in it"),
    _argument("--file", type=Path, metavar="FILE", help="how often each way was taken there, and who stands where"),
)
def _diagram(options: argparse.Namespace) -> None:
    """Print a machine as a Mermaid diagram: its steps, and the outcomes that lead from one to another.

    They are read from the code's text, which is not run; a step whose name is computed is `?`. With --file the
    numbers are those of FILE: of transitions seen, and of live instances at each step.
    """
    from durable_tools import diagram

    _, fsm = _load(options.target)
    if fsm is None:
        raise _UsageError(f"not TARGET:CLASS: {options.target!r}")
    machine = diagram.known_machine(fsm)
    if options.file is not None:
        with tools.Reader(options.file) as reader:
            machine = diagram.counted(machine, reader)
    print(machine.mermaid())


# ---- the entry


_OVERVIEW = """Durable state machines and jobs in one SQLite file.

durable demo                              see it at work
durable run jobs.py --database shop.db    run what jobs.py defines
durable watch shop.db                     what goes on
durable show shop.db order:42             one instance, and what helps it"""


def _parser() -> argparse.ArgumentParser:
    """The command line as `VERBS` has it."""

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

        def error(self, message: str) -> NoReturn:
            """Leave it to `main` to say it, in one line."""
            raise _UsageError(f"{message} (see {self.prog} --help)")

    class VerbParser(Parser):
        is_within = False

        def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
            """Let options stand anywhere, also before arguments that may be left out: argparse does from 3.14 on."""
            if self.is_within or "--" in args:  # behind which all are arguments: the two passes would forget it
                return super().parse_known_args(args, namespace)
            self.is_within = True
            return self.parse_known_intermixed_args(args, namespace)

    class Version(argparse.Action):
        def __call__(self, *_: object) -> NoReturn:
            """Look for the distribution only where it is asked for: that reads much of what is installed."""
            import importlib.metadata

            installed = [each.version for each in importlib.metadata.distributions(name="durable-fsm")]
            print("durable", installed[0] if installed else "(not installed)")  # a copied module is of none
            sys.exit(0)

    parser = Parser(prog="durable", description=_OVERVIEW)
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and leave")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=VerbParser)
    for name, verb in VERBS.items():
        about = inspect.cleandoc(verb.run.__doc__ or "")
        examples = "\n".join(it for it in verb.about if isinstance(it, str))
        command = verbs.add_parser(name, help=about.partition("\n")[0], description=f"{about}\n\n{examples}")
        command.set_defaults(verb=verb)
        for names, how in (it for it in verb.about if not isinstance(it, str)):
            command.add_argument(*names, **how)
    return parser


_SILENCE = logging.NullHandler()
"""What takes the records of verbs that set up no log, which Python would write to standard error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `durable ARGV…` and return its exit status; `durable --help` has the verbs."""
    logging.getLogger("durable").addHandler(_SILENCE)
    try:
        try:
            options = _parser().parse_args(argv)
        except SystemExit:  # --help and --version have said it all
            status = 0
        else:
            status = options.verb(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is known what to do if nobody reads any more
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read has seen enough
        status = 1
    except _PLAIN_ERRORS as error:
        _complain(str(error) or type(error).__name__)
        status = 2 if isinstance(error, _UsageError) else 1
    except Exception as error:  # noqa: BLE001 - also of what nobody thought of one line, which says where it was raised
        _complain(_blame(error))
        status = 1
    if sys.stdout is not None:
        _drop_unwritten(sys.stdout)
    return status
