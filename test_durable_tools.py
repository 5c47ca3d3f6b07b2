"""Tests of durable_tools: the command line, its demo, the page, the engine on PostgreSQL.

In this order:

* The package
* The run of a step, elsewhere
* Looking
* Writing
* The user's code
* Schedules
* The past, and code against the file
* What is shown, and where
* Processes
* Diagrams
* What the page shows
* The page and its file
* What the page does
* Who may ask for the page
* The page in a browser
* Several machines

What the tests of durable have for all tests, these use too.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, cast
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import apsw
import attrs
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

import durable
import durable_tools
import test_durable
from durable import (
    FSM,
    Await,
    Cancel,
    Done,
    DuplicateError,
    DurableError,
    Engine,
    Insert,
    Instance,
    Next,
    Retry,
    ScheduleChildren,
    Signal,
    Status,
    Stop,
    step,
    tools,
)
from durable_tools import cli, page, screen, texts
from durable_tools import dbos as machines
from durable_tools.dbos import DBOSEngine
from test_durable import (
    BLOCKS,
    ENDS_OF_THE_CALENDAR,
    PATIENCE,
    Clock,
    Ctx,
    banners,
    client,
    code_lines,
    contents,
    environment,
    eventually,
    posix,
    run_script,
    start_script,
)


class CliOrder(FSM, name="cli.Order", queue="orders"):
    @step
    def start(self, ctx: Ctx) -> Await:
        return Await("paid", then="ship", timeout=3600)

    @step
    def ship(self, ctx: Ctx) -> Done:
        return Done({"amount": [signal.payload for signal in ctx.awaited]})


class Broken(FSM, name="cli.Broken"):
    def perform(self, args: dict[str, Any]) -> None:
        raise Cancel("the disk\nis on fire \x1b[31m")


class Parent(FSM, name="cli.Parent", queue="parents"):
    @step
    def start(self, ctx: Ctx) -> ScheduleChildren:
        return ScheduleChildren([Insert(Broken), Insert(CliOrder)], then="join")

    @step
    def join(self, ctx: Ctx) -> Done:
        return Done(len(ctx.children))


@durable.job(name="cli.add")
def cli_add(a: int) -> int:
    """Add one."""
    return a + 1


CLI_SCRIPT = """
import durable
from durable import FSM, Engine

class Greet(FSM, queue="greetings"):
    def perform(self, args):
        return f"hello {args['name']}"

@durable.job
def add(a: int, b: int = 1) -> int:
    return a + b

class Boom(FSM):
    def perform(self, args):
        raise durable.Cancel("boom")
"""


@attrs.frozen
class Said:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line, in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        status = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        return Said(status, said.out, said.err)

    return run


@pytest.fixture
def known_alone() -> Iterator[None]:
    """Know the classes of this file alone, while the test runs: what checks code would find faults of others' too."""
    known = dict(durable._registry)
    for key, spec in known.items():
        if spec.cls.__module__ != __name__ or "<locals>" in spec.cls.__qualname__:
            del durable._registry[key]
    yield
    durable._registry.clear()
    durable._registry.update(known)


@pytest.fixture
def local_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put this machine into a time zone, where the system lets a process do so."""

    def put(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        getattr(time, "tzset", lambda: None)()

    yield put
    monkeypatch.undo()
    getattr(time, "tzset", lambda: None)()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A file with one instance of each kind: 1 done, 2 failed, 3 awaiting a signal, 4 scheduled."""
    path = tmp_path / "shop.db"
    with client(path) as engine:
        engine.insert(CliOrder, correlation_key="order:1", step="ship")
        engine.insert(Broken, correlation_key="broken:1")
        engine.insert(CliOrder, correlation_key="order:2")
        engine.insert(Broken, schedule_in=3600, queue="later")
        engine.drain(with_scheduled=False)
    return path


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's script, whose stem is no other module's; forgotten afterwards."""
    path = tmp_path / "cli_jobs.py"
    path.write_text(textwrap.dedent(CLI_SCRIPT), encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield path
    sys.modules.pop("cli_jobs", None)


def start(*words: object, **variables: str) -> subprocess.Popen[str]:
    """The command line as a process of its own, its standard error told apart."""
    return subprocess.Popen(
        [sys.executable, "-m", "durable", *map(str, words)],
        env=environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def get(path: Path, target: int | str) -> Instance:
    """TARGET as the file has it."""
    with client(path) as engine:
        return engine.get(target)


def found(path: Path) -> list[Instance]:
    """All that the file has, oldest first."""
    with client(path) as engine:
        return engine.find()[::-1]


# ---- The package ---------------------------------------------------------------------------------

MODULES = sorted(Path(durable_tools.__file__).parent.glob("*.py"))
SURFACE = {*durable.__all__, "tools", "__file__"}
TOOLS = {name for name in vars(durable.tools) if not name.startswith("_")}


def test_the_contents_of_these_tests_are_their_banners() -> None:
    """The docstring of the tests lists their sections, in the order in which they stand."""
    assert banners(Path(__file__)) == contents(__doc__)


def test_what_tools_may_use_is_listed_where_it_stands() -> None:
    """`durable.tools` is no part of `__all__`; its docstring has a line for each of its names, and no other."""
    assert "tools" not in durable.__all__
    assert set(re.findall(r"^ *\* `(\w+)`:", durable.tools.__doc__ or "", re.MULTILINE)) == TOOLS


def names_used_of_durable(tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports from durable or reads of it, `tools.` before what it reads of the tools."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "durable":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("durable", "tools", "durable.tools"):
            yield node.attr if ast.unparse(node.value) == "durable" else f"tools.{node.attr}"


@pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])
def test_a_tool_uses_nothing_private_of_durable(path: Path) -> None:
    """Of durable it has the public names and those of `durable.tools`; of objects that are not its own, no private."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert set(names_used_of_durable(tree)) <= SURFACE | {f"tools.{name}" for name in TOOLS}
    private = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match("_(?!_)", node.attr)
        and node.attr not in ("_asdict", "_fields", "_make", "_replace")  # what a named tuple has is not private
        and ast.unparse(node.value) not in ("self", "os")
    ]
    assert private == []


def test_durable_imports_none_of_its_tools() -> None:
    """The arrows go one way: not even within a function; the command line is loaded by name when it is asked for."""
    for node in ast.walk(ast.parse(Path(durable.__file__).read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Import | ast.ImportFrom) and "durable_tools" in ast.unparse(node))


def test_durable_alone_says_how_to_get_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the module was dropped into a folder without the package: one line on standard error, status 1."""
    monkeypatch.delitem(sys.modules, "durable_tools.cli")
    monkeypatch.setitem(sys.modules, "durable_tools", None)
    assert durable.main(["list", "x.db"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "pip install durable-fsm" in said.err


def test_durable_alone_works(tmp_path: Path) -> None:
    """The one file, dropped into a folder of its own, is the engine."""
    shutil.copy(durable.__file__, tmp_path)
    program = """
        import sys
        sys.modules["durable_tools"] = None
        import durable

        @durable.job
        def add(a: int, b: int) -> int:
            return a + b

        with durable.Engine("alone.db") as engine:
            print(engine.result(engine.insert(add, args=dict(a=1, b=2))), durable.__file__)
        """
    assert run_script(tmp_path, textwrap.dedent(program)).split() == ["3", str(tmp_path / "durable.py")]


@pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])
def test_no_function_of_a_tool_is_long(path: Path) -> None:
    """No function has over 40 lines of code."""
    source = path.read_text(encoding="utf-8")
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert sum(at in lines for at in range(node.lineno + 1, node.end_lineno or 0)) <= 40, node.name


# ---- The run of a step, elsewhere ----------------------------------------------------------------


class Elsewhere:
    """A host that keeps nothing but what its steps have asked for."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[str | None, bool]] = {}
        self.shown: list[str] = []
        self.cancelled: set[int] = set()
        self.is_held = True
        self.now = 1_700_000_000.0

    def clock(self) -> float:
        return self.now

    def policy(self, name: str) -> tools.Limit | None:
        return tools.Limit(name, 5, 1000, 2) if name == "api" else None

    def children(self, instance: int) -> tuple[Instance, ...]:
        return ()

    def calls(self, instance: int) -> dict[str, tuple[str | None, bool]]:
        return self.kept

    def is_cancelled(self, instance: int) -> bool:
        return instance in self.cancelled

    def keep_call(self, row: tools.Row, call: tools.Call) -> bool:
        self.kept[call.name] = (call.value, call.is_awaited)
        return self.is_held

    def show_progress(self, row: tools.Row, progress: str) -> None:
        self.shown.append(progress)

    def later(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call())
        return future


def claimed(new: tools.NewRow, **columns: Any) -> tools.Row:
    """The row of an instance that was inserted and claimed for the first time, but for what is given."""
    first = {"id": 1, "claim": 1, "attempt": 0, "crashes": 0, "joining": 0, "has_calls": 0, "has_inbox": 0}
    given = {**dict.fromkeys(tools.Row._fields), **new._asdict(), **first, **columns}
    return tools.Row(**{name: given[name] for name in tools.Row._fields})


class Elsewhen(FSM, name="tools.Elsewhen"):
    """Its step comes to the outcome, or raises the error, that its test has set."""

    outcome: Any = Done(1)

    @step
    def start(self, ctx: Ctx) -> Any:
        outcome = type(self).outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(ctx) if callable(outcome) else outcome

    @step
    def end(self, ctx: Ctx) -> Done:
        return Done()

    def handle(self, error: Exception, ctx: Ctx) -> Any:
        return Retry(7) if isinstance(error, LookupError | TimeoutError) else super().handle(error, ctx)


SIGNALS = (tools.record(Signal, (4, "go", "1", 0)), tools.record(Signal, (5, "other", None, 0)))


def outcome_of(outcome: Any, host: Elsewhere | None = None, **columns: Any) -> tools.Outcome:
    """What a run of Elsewhen's first step leaves, with two signals in its inbox, of which it has awaited the first."""
    Elsewhen.outcome = staticmethod(outcome) if callable(outcome) else outcome
    steps = tools.Steps(host or Elsewhere())
    row = claimed(steps.new_row(Elsewhen, {"state": {"n": 1}}), **{"awaits": '["go"]', "has_inbox": 1, **columns})
    claim = steps.claim(row, SIGNALS)
    assert claim is not None
    left = steps.run(claim, asyncio.run)
    assert left is not None
    return left


def add_everything(ctx: Ctx) -> Next:
    """A step that adds one of each to its commit, and goes on inline."""
    ctx.execute("update account set n = n - ?", (5,))
    ctx.insert(CliOrder, correlation_key="k")
    ctx.signal("k", "paid", 3, dedup_key="d")
    return Next("end", {"n": 2}, inline=True)


@pytest.mark.parametrize(
    ("outcome", "kind", "columns"),
    [
        (Next("end", {"n": 2}), "next", {"status": "runnable", "step": "end", "state": '{"n":2}', "awaits": None}),
        (Next("end", rate_limit="api"), "next", {"rate_limit": "api", "weight": 1, "attempt": 0}),
        (Retry(3), "retry", {"status": "runnable", "attempt": 4, "eligible_at": 1_700_000_003_000}),
        (Await("go", "end", timeout=2), "await", {"status": "awaiting_signal", "await_deadline": 1_700_000_002_000}),
        (ScheduleChildren([Insert(CliOrder)], "end"), "children", {"status": "awaiting_children", "joining": 1}),
        (Done({"a": 1}), "done", {"status": "done", "result": '{"a":1}', "awaits": None}),
        (Stop("enough"), "stop", {"status": "failed", "last_error": "enough", "worker": None}),
        (ValueError("boom"), "stop", {"status": "failed", "last_error": "ValueError: boom"}),
        (LookupError("gone"), "retry", {"eligible_at": 1_700_000_007_000, "last_error": "LookupError: gone"}),
        (lambda _: sys.exit(3), "crash", {"status": "runnable", "attempt": 4, "crashes": 1}),
    ],
    ids=["next", "rate", "retry", "await", "children", "done", "stop", "error", "handle", "crash"],
)
def test_a_row_that_was_claimed_elsewhere_comes_to_an_outcome_to_commit(
    outcome: Any, kind: str, columns: dict[str, Any]
) -> None:
    """`tools.Steps` runs a step of a row that no file has, and says what its columns become and what it consumes."""
    left = outcome_of(outcome, attempt=3)
    assert left.kind == kind
    assert {name: left.columns[name] for name in columns} == columns
    assert left.columns["worker"] is left.columns["cancel_reason"] is None
    assert (left.row.id, left.row.claim) == (1, 1)
    if kind in ("next", "children", "await"):
        assert left.shown == (4,)
    assert [child.parent_id for child in left.children] == [1] * (kind == "children")


def test_an_outcome_has_what_its_step_added_in_order() -> None:
    """The user's statements, inserts and signals; and how it goes on inline, under the next claim."""
    left = outcome_of(add_everything)
    statement, new, message = left.effects
    assert statement == tools.Statement("update account set n = n - ?", (5,))
    assert isinstance(new, tools.NewRow)
    assert (new.fsm, new.correlation_key) == ("cli.Order", "k")
    assert message == tools.Message("k", "paid", "3", "d")
    assert left.is_inline
    assert (left.advanced.step, left.advanced.claim, left.advanced.state) == ("end", 2, '{"n":2}')
    assert outcome_of(Stop("x")).effects == ()


@pytest.mark.parametrize("outcome", [Next("end"), Retry(1), Await("go", "end"), Done(1), Stop("x")])
def test_an_outcome_sets_the_columns_that_the_file_would_have(tmp_path: Path, outcome: Any) -> None:
    """What `tools.Steps` says of a row is what an engine writes into its file for the same row and outcome."""
    apart = ("eligible_at", "await_deadline", "has_inbox", "claim")  # dates, and what the next claim writes
    names = [*(name for name in tools.Row._fields if name not in apart), "status", "result", "last_error"]
    with client(tmp_path / "x.db") as engine, closing(engine.connect()) as connection:
        Elsewhen.outcome = outcome
        instance = engine.insert(Elsewhen, state={"n": 1})
        select = f"SELECT {', '.join(names)} FROM durable_instances WHERE id = ?"
        [before] = connection.execute(select, (instance,))
        with pytest.raises(DurableError, match="max_steps") if isinstance(outcome, Next | Retry) else nullcontext():
            engine.drain(max_steps=1)
        [after] = connection.execute(select, (instance,))
    row = dict(zip(names, before, strict=True))
    left = outcome_of(outcome, **row)
    assert {**row, **{name: left.columns[name] for name in names if name in left.columns}} == dict(
        zip(names, (*after[:-3], "runnable" if after[-3] == "executing" else after[-3], *after[-2:]), strict=True)
    )


def test_steps_elsewhere_keep_calls_and_tell_of_progress() -> None:
    """A kept call is the host's to commit; it is given back, and where the claim is lost the step's outcome is void."""
    host = Elsewhere()

    def call(ctx: Ctx) -> Done:
        ctx.progress(1, 2, "half")
        return Done(ctx.call("one", lambda: [1, 2]))

    assert outcome_of(call, host).columns["result"] == "[1,2]"
    assert host.kept == {"one": ("[1,2]", False)}
    assert host.shown == ['[1,2,"half",1700000000000]']
    host.kept["one"] = ('"kept"', False)
    assert outcome_of(call, host, has_calls=1).columns["result"] == '"kept"'
    host.is_held = False
    host.kept.clear()
    assert outcome_of(call, host).columns["status"] == "failed"


def test_a_step_elsewhere_that_is_over_its_timeout_is_disowned() -> None:
    """`time_out` asks `handle`; what the step still comes to is nothing, and one that has ended is not timed out."""

    class Slow(FSM, name="tools.Slow", timeout=5):
        def perform(self, args: dict[str, Any]) -> str:
            timed_out.append(steps.time_out(claim))
            return "late"

    steps, timed_out = tools.Steps(Elsewhere()), list[tools.Outcome | None]()
    claim = cast(tools.Claim, steps.claim(claimed(steps.new_row(Slow, {}))))
    assert claim.timeout_s == 5
    assert steps.run(claim, asyncio.run) is None
    assert cast(tools.Outcome, timed_out[0]).columns["last_error"] == "TimeoutError: step 'perform' took over 5 s"
    claim = cast(tools.Claim, steps.claim(claimed(steps.new_row(Broken, {}))))
    assert steps.run(claim, asyncio.run) is not None
    assert steps.time_out(claim) is None


def test_a_step_elsewhere_that_nobody_has_disowned_in_time_is_over_its_timeout_all_the_same() -> None:
    """At the latest when it returns: what it returns then is dropped."""

    class Late(FSM, name="tools.Late", timeout=0.01):
        def perform(self, args: dict[str, Any]) -> str:
            time.sleep(0.05)
            return "late"

    steps = tools.Steps(Elsewhere())
    claim = cast(tools.Claim, steps.claim(claimed(steps.new_row(Late, {}))))
    left = cast(tools.Outcome, steps.run(claim, asyncio.run))
    assert left.columns["last_error"] == "TimeoutError: step 'perform' took over 0.01 s"


def test_an_async_step_elsewhere_runs_where_its_host_says() -> None:
    """A coroutine goes to the host's loop and keeps to its timeout there; `handle` is asked in the calling thread."""

    class Async(FSM, name="tools.Async", timeout=PATIENCE):
        async def perform(self, args: dict[str, Any]) -> str:
            await asyncio.sleep(args["sleep"])
            return "done"

    class Overdue(Async, name="tools.Overdue", timeout=0.1):
        pass

    steps = tools.Steps(Elsewhere())
    for fsm, sleep, status in ((Async, 0, "done"), (Overdue, 2 * PATIENCE, "runnable")):
        claim = cast(tools.Claim, steps.claim(claimed(steps.new_row(fsm, {"args": {"sleep": sleep}}))))
        assert claim.is_async
        assert cast(tools.Outcome, steps.run(claim, asyncio.run)).columns["status"] == status


def test_a_commit_that_was_refused_elsewhere_is_the_steps_error() -> None:
    """A statement that fails goes to `handle`, once: what `handle` has added and is refused again ends the instance."""
    steps = tools.Steps(Elsewhere())
    left = outcome_of(add_everything)
    handled = steps.refused(left, LookupError("no such table"))
    assert (handled.kind, handled.columns["last_error"]) == ("retry", "LookupError: no such table")
    assert steps.refused(handled, LookupError("again")).columns["status"] == "failed"


def test_a_row_whose_process_died_elsewhere_runs_again_or_fails() -> None:
    """`crashed` counts the attempt and the crash; a cancelled one fails, and so does one that crashed too often."""
    row = claimed(tools.Steps(Elsewhere()).new_row(CliOrder, {}))
    again = tools.crashed(row, "gone", 5)
    assert (again["status"], again["attempt"], again["crashes"], again["eligible_at"]) == ("runnable", 1, 1, 5)
    assert tools.crashed(row._replace(cancel_reason="no"), "gone", 5)["last_error"] == "no"
    assert tools.crashed(row._replace(crashes=19), "gone", 5)["status"] == "failed"


def test_the_history_of_a_run_elsewhere_is_what_the_file_would_keep() -> None:
    """An outcome says how its run stands in the history; of a job only a failed attempt does."""
    entry = outcome_of(Next("end", {"n": 2})).entry("worker 1")
    assert entry is not None
    assert (entry.seq, entry.kind, entry.state, entry.to, entry.signals) == (1, "next", '{"n":1}', "end", '["go"]')
    steps = tools.Steps(Elsewhere())
    claim = cast(tools.Claim, steps.claim(claimed(steps.new_row(cli_add, {"args": {"a": 1}}))))
    assert cast(tools.Outcome, steps.run(claim, asyncio.run)).entry("worker 1") is None


class Ledger:
    """A transaction of a host that keeps one instance, its history and its schedules in memory."""

    def __init__(self, row: tools.Row | None = None, now: int = 1_700_000_000_000) -> None:
        self.worker, self.keeps_history = "worker 1", True
        self.has_fired: Container[str] = ("fired",)
        self.now = now
        self.held = row
        self.rows: dict[str, tools.ScheduleRow] = {}
        self.inserted: list[tools.NewRow] = []
        self.entries: list[tools.Entry] = []
        self.done: list[tuple[Any, ...]] = []

    def insert(self, row: tools.NewRow) -> int:
        self.inserted.append(row)
        return len(self.inserted)

    def file_id(self) -> str:
        return "one"

    def fired(self, name: str) -> None:
        self.done.append(("fired", name))

    def status(self, instance: int) -> str | None:
        return "done"

    def schedule(self, name: str) -> tools.ScheduleRow | None:
        return self.rows.get(name)

    def save_schedule(self, row: tools.ScheduleRow) -> None:
        self.rows[row.name] = row

    def rename_schedule(self, old: str, new: str) -> None:
        self.rows[new] = self.rows.pop(old)._replace(name=new)

    def unschedule(self, name: str) -> bool:
        return self.rows.pop(name, None) is not None

    def declared_schedules(self) -> list[tools.ScheduleRow]:
        return [row for row in self.rows.values() if row.is_declared]

    def due_schedules(self, after: int, until: int) -> list[tools.ScheduleRow]:
        return [row for row in self.rows.values() if row.fires_at is not None and after < row.fires_at <= until]

    def schedules_ahead(self, now: int) -> list[tools.ScheduleRow]:
        return [row for row in self.rows.values() if row.next_at is not None and row.next_at > now]

    def has_occurrence(self, name: str, nominal: int) -> bool:
        return False

    def row(self, instance: int) -> tuple[tools.Row, str] | None:
        return None if self.held is None else (self.held, "done")

    def record(self, entries: Sequence[tools.Entry]) -> None:
        self.entries.extend(entries)

    def entries_from(self, instance: int, seq: int) -> list[tools.Entry]:
        return [entry for entry in self.entries if entry.seq >= seq]

    def latest_run(self, instance: int, step_name: str) -> tools.Run | None:
        return self._last([entry for entry in self.entries if entry.step == step_name])

    def run(self, instance: int, seq: int) -> tools.Run | None:
        return self._last([entry for entry in self.entries if entry.seq == seq])

    def _last(self, entries: Sequence[tools.Entry]) -> tools.Run | None:
        runs = [tools.Run(entry.seq, entry.version, entry.step) for entry in entries]
        return runs[-1] if runs else None

    def retention(self, instance: int) -> int | None:
        return 5

    def refuse_taken_key(self, instance: int) -> None:
        self.done.append(("refuse_taken_key", instance))

    def detach(self, parent: int, first_child: int) -> None:
        self.done.append(("detach", parent, first_child))

    def bring_back(self, target: int, seq: int) -> None:
        self.done.append(("bring_back", target, seq))

    def drop_calls(self, instance: int) -> None:
        self.done.append(("drop_calls", instance))

    def rewind(self, entry: tools.Entry, max_attempts: int | None, now: int) -> None:
        self.done.append(("rewind", entry.version, entry.step, entry.state, max_attempts))


def test_schedules_are_gone_through_in_a_transaction_elsewhere() -> None:
    """`tools.Steps.schedules` writes, fires, triggers and pauses schedules that a host keeps."""
    steps, book = tools.Steps(Elsewhere()), Ledger()
    every = durable.Every(60)
    steps.schedules(book).write(steps.schedule_row("s", cli_add, every, {"args": {"a": 1}, "overlap": True}))
    steps.schedules(book).write(steps.schedule_row("fired", cli_add, every, {"args": {"a": 1}}))
    assert (book.rows["s"].next_at, book.inserted) == (book.now + 60_000, [])
    steps.schedules(book).fire(-(2**62))
    assert book.inserted == []
    book.now += 60_000
    steps.schedules(book).fire(-(2**62))
    assert [(row.fsm, row.schedule, row.scheduled_at) for row in book.inserted] == [("cli.add", "s", book.now)]
    assert book.done == [("fired", "s")]
    assert steps.schedules(book).trigger("s") == 2
    steps.schedules(book).pause("s")
    assert cast(tools.ScheduleRow, book.schedule("s")).next_at is None
    steps.schedules(book).resume("s")
    assert cast(tools.ScheduleRow, book.schedule("s")).next_at == book.now + 60_000
    assert steps.schedules(book).remove("s")
    steps.schedules(book).declare(*steps.declared())
    steps.schedules(book).realign()


def test_the_past_is_gone_back_to_in_a_transaction_elsewhere() -> None:
    """`tools.Steps.history` records what a host has done to a row, rewinds and forks it."""
    steps = tools.Steps(Elsewhere())
    new = steps.new_row(CliOrder, {})
    row = claimed(new)
    book = Ledger(row)
    claim = cast(tools.Claim, steps.claim(row))
    book.record([cast(tools.Entry, cast(tools.Outcome, steps.run(claim, asyncio.run)).entry("worker 1", 7))])
    instance = stored(new)
    steps.history(book).record(row, "cancel", seq=2, error="no")
    assert [(entry.seq, entry.kind, entry.error) for entry in book.entries] == [(1, "await", None), (2, "cancel", "no")]
    steps.history(book).rewind(1, steps.past(book, instance, 1, None))
    assert book.done == [
        ("refuse_taken_key", 1),
        ("detach", 1, 7),
        ("bring_back", 1, 1),
        ("drop_calls", 1),
        ("rewind", 1, "start", "{}", None),
    ]
    assert book.entries[-1].kind == "rewind"
    past = steps.past(book, instance, 1, {"n": 1})
    assert steps.history(book).fork(1, past, steps.fork_row(instance, {"queue": "q"})) == 1
    assert (book.inserted[0].state, book.inserted[0].queue, book.inserted[0].retention) == ('{"n":1}', "q", 5)


def stored(new: tools.NewRow) -> Instance:
    """The instance of a row, as `tools.record` makes it of its columns."""
    columns = {**dict.fromkeys(field.name for field in attrs.fields(Instance)), **new._asdict()}
    columns |= {"id": 1, "status": "done", "attempt": 0, "crashes": 0}
    return tools.record(Instance, [columns[field.name] for field in attrs.fields(Instance)])


def test_rows_elsewhere_are_held_against_the_code() -> None:
    """`tools.check_code` tells of the rows whose class, version, step or state is not that of the code."""

    class Rows:
        def live(self) -> list[tuple[Any, ...]]:
            return [(1, "cli.Order", 1, "nowhere", "{}"), (2, "gone.Away", 1, "start", "{}")]

        def schedule_rows(self) -> list[tools.ScheduleRow]:
            return []

    first, second, *_ = tools.check_code(Rows())
    assert "no step 'nowhere'" in first
    assert "no class of that name" in second


# ---- Looking -------------------------------------------------------------------------------------


def test_counts_as_json_are_what_the_method_returns(command: Command, shop: Path) -> None:
    """`counts --json` is the object that `Engine.counts()` returns."""
    with client(shop) as engine:
        expected = engine.counts()
    assert command("counts", shop, "--json").json == expected


def test_list_as_json_has_the_fields_of_instance(command: Command, shop: Path) -> None:
    """`list --json` is an array of objects keyed by Instance's fields, instants as ISO text."""
    found = command("list", shop, "--json").json
    assert [one["id"] for one in found] == [4, 3, 2, 1]
    assert all(set(one) == {field.name for field in attrs.fields(Instance)} for one in found)
    assert datetime.fromisoformat(found[0]["eligible_at"]) == get(shop, 4).eligible_at
    assert found[1]["awaits"] == ["paid"]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (["--status", "failed"], [2]),
        (["--fsm", "cli.Broken"], [4, 2]),
        (["--queue", "later"], [4]),
        (["--key", "order:1"], [1]),
        (["--limit", "2"], [4, 3]),
        (["--before", "3"], [2, 1]),
        (["--parent", "1"], []),
    ],
)
def test_list_filters(command: Command, shop: Path, filters: list[str], ids: list[int]) -> None:
    """Each filter of `list` narrows it as `find` does, newest first."""
    assert [one["id"] for one in command("list", shop, "--json", *filters).json] == ids


def test_list_for_people_says_what_became_of_each(command: Command, shop: Path) -> None:
    """A line for each instance, with its error, what it waits for, or its result; nothing steers the terminal."""
    said = command("list", shop)
    head, scheduled, parked, failed, done = said.out.splitlines()
    assert head.split()[:4] == ["id", "fsm", "step", "status"]
    assert re.search(r"due in (1 h|60 min|5\d min)", scheduled)
    assert "paid, in" in parked
    assert "the disk is on fire" in failed
    assert '{"amount": []}' in done
    assert "\x1b" not in said.out


def test_empty_lists_are_no_error(command: Command, shop: Path) -> None:
    """Nothing found is the head of a table, or an empty array, and exit status 0."""
    assert command("list", shop, "--queue", "nowhere").status == 0
    assert command("workers", shop, "--json") == Said(0, "[]\n", "")


@pytest.mark.parametrize(
    "words",
    [
        *[[verb] for verb in ("list", "counts", "workers", "watch", "check", "gc")],
        *[[verb, "1"] for verb in ("show", "wait", "cancel", "retry", "pause", "resume")],
        ["signal", "1", "x"],
    ],
    ids=lambda words: str(words[0]),
)
def test_a_missing_file_is_refused(command: Command, tmp_path: Path, words: list[str]) -> None:
    """A verb about what a file holds makes no file: exit status 1, one line that names it."""
    said = command(words[0], tmp_path / "missing.db", *words[1:])
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "missing.db" in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "words"),
    [("show", ["nobody"]), ("signal", ["order:1", "paid"]), ("retry", ["order:1"]), ("cancel", ["order:1"])],
)
def test_a_refusal_is_one_line(command: Command, shop: Path, verb: str, words: list[str]) -> None:
    """A target that is not there, or that had ended: exit status 1, one line on standard error."""
    said = command(verb, shop, *words)
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)


def test_looking_changes_nothing(command: Command, shop: Path) -> None:
    """The verbs that look leave the file as it was, byte for byte, and no other beside it."""
    before = shop.read_bytes()
    for words in (["list"], ["counts"], ["workers"], ["check"], ["show", "2"], ["wait", "1"]):
        assert command(words[0], shop, *words[1:]).status == 0
    assert shop.read_bytes() == before
    assert list(shop.parent.iterdir()) == [shop]


AS_SOMEBODY = """
import os, sys
import encodings.idna, socket, urllib.parse  # this Python may lie where only root may read
from durable_tools import cli
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
print("may write:", os.access(sys.argv[2], os.W_OK), file=sys.stderr)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def readable(shop: Path) -> Iterator[Path]:
    """A copy of the shop that everybody may read, in a folder where nobody but root may write."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(shop, folder))
        path.chmod(0o444)
        Path(folder).chmod(0o555)
        yield path
        Path(folder).chmod(0o755)


def as_somebody(folder: Path, *words: object, may_write: bool = False) -> Said:
    """The command line in a process of somebody who may not write to the file that it is about, or to its folder."""
    with start_script(folder, AS_SOMEBODY, *words) as process:
        out, err = process.communicate(timeout=2 * PATIENCE)
    first, _, err = err.partition("\n")
    assert first == f"may write: {may_write}"
    return Said(process.returncode, out, err)


@posix
def test_looking_needs_no_leave_to_write(readable: Path, tmp_path: Path) -> None:
    """A file whose engines have ended is read as it lies there, where no log can be made beside it."""
    for words in (["list"], ["counts"], ["workers"], ["check"], ["show", "2"], ["wait", "1"]):
        said = as_somebody(tmp_path, words[0], readable, *words[1:])
        assert (said.status, said.err) == (0, "")
    assert "later" in as_somebody(tmp_path, "counts", readable).out
    assert list(readable.parent.iterdir()) == [readable]
    assert as_somebody(tmp_path, "pause", readable, "orders").status == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to become another user")
def test_looking_sees_what_another_user_commits(readable: Path, tmp_path: Path) -> None:
    """Where an engine has the file open, its log is read as well; the first look and the next see what is there."""
    readable.chmod(0o644)
    readable.parent.chmod(0o755)
    with start_script(tmp_path, AS_SOMEBODY, "watch", readable, "--interval", "0.01") as process:
        out, err = cast(IO[str], process.stdout), cast(IO[str], process.stderr)
        assert err.readline() == "may write: False\n"
        assert "1 runnable" in out.readline()
        assert "#2" in out.readline()
        with client(readable) as engine:
            engine.insert(CliOrder, correlation_key="order:9")
            assert "2 runnable" in out.readline()
        process.terminate()


def test_a_file_that_changes_while_it_is_read_as_unchanging_is_refused(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not write reads without locks; what was read while somebody else wrote is not to be trusted."""
    monkeypatch.setattr(os, "access", lambda *_: False)

    with durable.tools.Reader(shop) as reader, pytest.raises(DurableError, match="look again"):  # noqa: SIM117 - two acts
        with reader.reading(), client(shop) as engine:
            engine.insert(Broken)


@pytest.mark.parametrize("words", [["counts"], ["watch", "--until-idle"]], ids=lambda words: words[0])
def test_a_look_that_a_writer_was_in_the_way_of_is_taken_again(
    command: Command, shop: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Who may not write, and meets somebody who writes for a moment, sees what that one has left."""
    with client(shop) as engine:
        engine.cancel(3)
        engine.cancel(4)
    connect, queues = durable._connect, ["first", "second"]

    def meanwhile(path: str, *given: Any, **options: Any) -> apsw.Connection:
        if "immutable" in path and queues:
            queue = queues.pop(0)
            with client(shop) as engine:
                engine.cancel(engine.insert(Broken, queue=queue))
        return connect(path, *given, **options)

    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(durable, "_connect", meanwhile)
    said = command(words[0], shop, *words[1:])
    assert (said.status, said.err, queues) == (0, "", [])
    assert ("second" if words == ["counts"] else "5 failed") in said.out


@posix
@pytest.mark.parametrize(("mode", "folder_mode"), [(0o666, 0o555), (0o444, 0o555), (0o444, 0o755)])
@pytest.mark.parametrize("words", [["pause", "orders"], ["gc"]], ids=str)
def test_who_may_not_write_is_told_that_it_is_needed(
    readable: Path, tmp_path: Path, words: list[str], mode: int, folder_mode: int
) -> None:
    """In one line, whether it is the file that can't be written or its folder."""
    readable.parent.chmod(folder_mode)
    readable.chmod(mode)
    said = as_somebody(tmp_path, words[0], readable, *words[1:], may_write=mode == 0o666)
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "can only be read: durable needs to write" in said.err


@posix
def test_a_hard_link_is_told_from_a_file_of_somebody_elses(tmp_path: Path) -> None:
    """What engines have written may stand in a log that is found by the file's other name alone."""
    with client(tmp_path / "shop.db"):
        (tmp_path / "link.db").hardlink_to(tmp_path / "shop.db")
        look = "import sys; from durable_tools import cli; sys.exit(cli.main(sys.argv[1:]))"
        with start_script(tmp_path, look, "list", tmp_path / "link.db") as process:
            _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert "it has 2 names" in err


@posix
def test_a_log_that_cannot_be_read_says_what_helps(readable: Path, tmp_path: Path) -> None:
    """A log that a crash has left, in a folder that can't be written: one line, not an answer without its commits."""
    readable.parent.chmod(0o755)
    Path(f"{readable}-wal").write_bytes(b"left by a crash")
    Path(f"{readable}-wal").chmod(0o444)
    readable.parent.chmod(0o555)
    said = as_somebody(tmp_path, "list", readable)
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "copy both" in said.err


def test_a_file_of_an_older_version_is_not_misread(
    command: Command, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look can't migrate a file: it says what does."""
    monkeypatch.setattr(durable, "_SCHEMA_VERSION", durable._SCHEMA_VERSION + 1)
    said = command("list", shop)
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert "open an engine on it once" in said.err


def test_a_file_of_somebody_else_is_left_alone(command: Command, tmp_path: Path) -> None:
    """A database without durable's tables is refused, by the verbs that write too, and gets none."""
    path = tmp_path / "other.db"
    with closing(apsw.Connection(str(path))) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    for words in (["list"], ["gc"], ["pause", "q"]):
        said = command(words[0], path, *words[1:])
        assert (said.status, said.err.count("\n")) == (1, 1)
    assert path.read_bytes() == before


def test_looking_refuses_what_is_no_database(command: Command, tmp_path: Path) -> None:
    """A file that is no database is refused in one line."""
    path = tmp_path / "notes.txt"
    path.write_text("dear diary " * 1000, encoding="utf-8")
    said = command("list", path)
    assert (said.status, said.err.count("\n")) == (1, 1)


def test_show_says_what_an_instance_waits_for(command: Command, shop: Path) -> None:
    """A parked instance: the signal, until when, its inbox, and the command that sends the signal."""
    with client(shop) as engine:
        engine.signal("order:2", "note", {"to": "someone"}, dedup_key="n-1")
    out = command("show", shop, "order:2").out
    assert "cli.Order #3" in out
    assert "the signal paid, until" in out
    assert f"durable signal {shop} 3 paid" in out
    assert '{"to":"someone"}' in out.replace(": ", ":")


def test_show_has_the_traceback_and_the_verb_that_helps(command: Command, shop: Path) -> None:
    """A failed instance: its last error, where it was raised, and `retry`."""
    out = command("show", shop, "2").out
    assert "the disk" in out
    assert f"durable retry {shop} 2" in out
    assert "\x1b" not in out


def test_show_tells_why_a_runnable_instance_does_not_run(command: Command, shop: Path) -> None:
    """A date, a paused queue, a queue without an engine: each has its own sentence."""
    with client(shop) as engine:
        engine.insert(CliOrder, correlation_key="order:3")
    assert "its time, " in command("show", shop, "4").out
    assert "an engine that runs the queue orders" in command("show", shop, "order:3").out
    command("pause", shop, "orders")
    assert f"durable resume {shop} orders" in command("show", shop, "order:3").out


def test_show_quotes_the_file_in_the_commands_it_suggests(command: Command, tmp_path: Path) -> None:
    """A path with a space in it is quoted, so that the command can be copied into a shell."""
    path = tmp_path / "my shop.db"
    with client(path) as engine:
        engine.insert(CliOrder)
    assert f"durable run MODULE --database '{path}'" in command("show", path, "1").out


def test_show_counts_children_and_lists_the_failed_first(command: Command, tmp_path: Path) -> None:
    """A parent: how many children stand how, those that failed by name."""
    path = tmp_path / "family.db"
    with client(path) as engine:
        engine.insert(Parent, correlation_key="p")
        engine.drain()
    out = command("show", path, "p").out
    assert "1 failed, 1 awaiting_signal" in out or "1 awaiting_signal, 1 failed" in out
    assert "cli.Broken" in out


@pytest.mark.parametrize("zone", ["UTC0", "JST-9", "EST5"])
@pytest.mark.parametrize("end", ENDS_OF_THE_CALENDAR, ids=["first", "last"])
def test_show_tells_of_instants_at_the_ends_of_the_calendar(
    command: Command, tmp_path: Path, local_zone: Callable[[str], None], end: datetime, zone: str
) -> None:
    """Where this machine's own calendar does not reach so far, it is shown by UTC."""
    local_zone(zone)
    path = tmp_path / "ends.db"
    instant = end.replace(tzinfo=UTC, microsecond=0)
    with client(path, clock=Clock((instant - datetime.fromtimestamp(0, UTC)).total_seconds())) as engine:
        engine.insert(Broken, schedule_at=instant)
    for verb in ("show", "list"):
        said = command(verb, path, *["1"] * (verb == "show"))
        assert (said.status, said.err) == (0, ""), verb


def test_show_as_json_is_the_instance(command: Command, shop: Path) -> None:
    """`show --json` is one object with Instance's fields, and its history."""
    found = command("show", shop, "order:2", "--json").json
    assert set(found) == {field.name for field in attrs.fields(Instance)} | {"history"}
    assert found["status"] == "awaiting_signal"


def test_wait_prints_the_result(command: Command, shop: Path) -> None:
    """`wait` prints the result of what is done, as JSON."""
    assert command("wait", shop, "order:1").json == {"amount": []}


def test_wait_fails_with_the_instance(command: Command, shop: Path) -> None:
    """`wait` for what failed: exit status 1, the error in one line on standard error."""
    said = command("wait", shop, "2")
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "the disk; is on fire" in said.err


def test_wait_runs_out(command: Command, shop: Path) -> None:
    """A wait that runs out: exit status 1, and how the instance stands."""
    said = command("wait", shop, "3", "--timeout", "0")
    assert said.status == 1
    assert "awaiting_signal" in said.err


def test_check_finds_a_sound_file_sound(command: Command, shop: Path) -> None:
    """`check` says so and gives 0; as JSON it is the empty list."""
    assert command("check", shop) == Said(0, "sound\n", "")
    assert command("check", shop, "--json").json == []


def test_check_names_problems(command: Command, shop: Path) -> None:
    """`check` of a file that breaks an invariant: the problem in words, exit status 1."""
    with client(shop) as engine, closing(engine.connect()) as connection:
        connection.execute("INSERT INTO durable_signals (target, name, sent_at) VALUES (999, 'lost', 0)")
    said = command("check", shop)
    assert said.status == 1
    assert said.out.strip()


# ---- Writing -------------------------------------------------------------------------------------


def test_signal_sends(command: Command, shop: Path) -> None:
    """`signal FILE TARGET NAME JSON` is `Engine.signal`, deduplicated by --dedup-key."""
    for _ in range(2):
        assert command("signal", shop, "order:2", "paid", '{"amount": 1}', "--dedup-key", "e1").status == 0
    with client(shop) as engine:
        engine.drain(queue="orders")
    assert get(shop, "order:2").result == {"amount": [{"amount": 1}]}


def test_cancel_says_which_could_not(command: Command, shop: Path) -> None:
    """Every target gets its turn; one that had ended is said, and makes the exit status 1."""
    said = command("cancel", shop, "order:1", "order:2", "--reason", "sold out")
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert "order:1" in said.err
    assert get(shop, 3).last_error == "sold out"
    assert command("cancel", shop, "4").status == 0


def test_retry_one_and_all(command: Command, shop: Path) -> None:
    """`retry TARGET` runs it again; `--all` whatever failed and passes the filters."""
    assert command("retry", shop, "2").status == 0
    assert get(shop, 2).status is Status.RUNNABLE
    with client(shop) as engine:
        engine.drain(with_scheduled=False)
    command("retry", shop, "--all", "--queue", "elsewhere")
    assert get(shop, 2).status is Status.FAILED
    command("retry", shop, "--all", "--fsm", "cli.Broken")
    assert get(shop, 2).status is Status.RUNNABLE


@pytest.mark.parametrize("words", [[], ["2", "--all"]])
def test_retry_takes_targets_or_all(command: Command, shop: Path, words: list[str]) -> None:
    """Neither or both of TARGET and --all is a usage error."""
    assert command("retry", shop, *words).status == 2


def test_pause_and_resume(command: Command, shop: Path) -> None:
    """A paused queue is kept in the file, until it is resumed."""
    command("signal", shop, "3", "paid")
    command("pause", shop, "orders")
    with client(shop) as engine:
        assert engine.drain(queue="orders")["steps"] == 0
        command("resume", shop, "orders")
        assert engine.drain(queue="orders")["done"] == 1


def test_counts_show_which_queue_is_paused(command: Command, shop: Path) -> None:
    """To people: a row for each queue, with a column for each status."""
    command("pause", shop, "later")
    head, *rows = command("counts", shop).out.splitlines()
    assert head.split() == ["queue", "done", "failed", "executing", "awaiting_children", "awaiting_signal", "runnable"]
    assert [row.split() for row in rows] == [
        ["default", "0", "1", "0", "0", "0", "0"],
        ["later", "(paused)", "0", "0", "0", "0", "0", "1"],
        ["orders", "1", "0", "0", "0", "1", "0"],
    ]


def test_gc_prints_how_many(command: Command, shop: Path) -> None:
    """`gc` deletes what ended longer than the retention ago."""
    assert command("gc", shop).out == "0\n"
    assert command("gc", shop, "--retention", "0").out == "2\n"


def test_snapshot_copies(command: Command, shop: Path, tmp_path: Path) -> None:
    """`snapshot` makes a second file with the same instances; it does not overwrite."""
    copy = tmp_path / "copy.db"
    assert command("snapshot", shop, copy).status == 0
    assert command("counts", copy, "--json").json == command("counts", shop, "--json").json
    assert command("snapshot", shop, copy).status == 1


@pytest.fixture
def digits(shop: Path) -> Path:
    """The shop, where 5 carries the key "3", 6 its own id as a key, 7 and 8 what only looks like an id."""
    with client(shop) as engine:
        for key in ("3", "6", "002", "9" * 30):
            engine.insert(CliOrder, correlation_key=key)
        engine.drain(queue="orders", with_scheduled=False)
    return shop


@pytest.mark.parametrize(
    ("words", "id_"),
    [
        (["1"], 1),
        (["3", "--key"], 5),
        (["--key", "3"], 5),
        (["3", "--id"], 3),
        (["6"], 6),
        (["6", "--key"], 6),
        (["002"], 7),
        (["9" * 30], 8),
        (["order:2"], 3),
        (["order:2", "--key"], 3),
    ],
    ids=str,
)
def test_a_target_of_digits_is_an_id_or_by_flag_a_key(
    command: Command, digits: Path, words: list[str], id_: int
) -> None:
    """A number is an id unless --key says otherwise; digits that no id is written with are a key."""
    assert command("show", digits, *words, "--json").json["id"] == id_
    assert command("signal", digits, *words, "paid").status == (1 if id_ == 1 else 0)
    assert command("cancel", digits, *words).status == (1 if id_ == 1 else 0)
    assert command("wait", digits, *words).status == (0 if id_ == 1 else 1)
    assert get(digits, id_).status is (Status.DONE if id_ == 1 else Status.FAILED)
    assert command("retry", digits, *words).status == (1 if id_ == 1 else 0)
    changed = [it.id for it in found(digits) if it.status is Status.RUNNABLE]
    assert changed == [4] if id_ == 1 else sorted([4, id_])


@pytest.mark.parametrize("verb", ["show", "wait", "signal", "cancel", "retry"])
def test_a_target_that_could_be_an_id_or_a_key_is_refused(command: Command, digits: Path, verb: str) -> None:
    """Where another instance carries the digits as its key: exit status 1, a line that says how to say which."""
    before = found(digits)
    said = command(verb, digits, "3", *(["paid"] if verb == "signal" else []))
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "#5" in said.err
    assert "--key" in said.err
    assert "--id" in said.err
    assert found(digits) == before


def test_show_suggests_commands_that_are_not_refused(command: Command, digits: Path) -> None:
    """Of an instance whose id is another's key, the command to copy says that the id is meant."""
    assert f"durable signal {digits} 3 --id paid" in command("show", digits, "3", "--id").out
    assert f"durable signal {digits} 6 paid" in command("show", digits, "6").out


def test_retry_all_takes_a_key_as_a_filter(command: Command, digits: Path) -> None:
    """With --all, what stands after --key narrows what is retried."""
    command("cancel", digits, "order:2", "6")
    assert command("retry", digits, "--all", "--key").status == 2
    assert command("retry", digits, "--all", "--key", "6").status == 0
    assert [it.status for it in found(digits) if it.id in (2, 3, 6)] == ["failed", "failed", "awaiting_signal"]


def test_options_may_stand_anywhere(command: Command, digits: Path) -> None:
    """Also before an argument that may be left out; behind `--` all are arguments."""
    assert command("signal", digits, "--dedup-key", "k", "order:2", "paid", '{"amount": 1}').status == 0
    with tools.Reader(digits) as reader:
        assert [signal.payload for signal in reader.signals(3)] == [{"amount": 1}]
    assert command("retry", digits, "--id", "2").status == 0
    assert get(digits, 2).status == "runnable"
    with client(digits) as engine:
        dashed = engine.insert(CliOrder, correlation_key="--all")
    assert command("cancel", "--", digits, "--all").status == 0
    assert get(digits, dashed).status == "failed"


# ---- The user's code -----------------------------------------------------------------------------


def test_insert_by_script_names_the_class_as_python_would(command: Command, script: Path, tmp_path: Path) -> None:
    """A class of a script is stored under the script's stem, as `python SCRIPT` stores it."""
    database = tmp_path / "x.db"
    words = ("--database", database, "--state", '{"name": "you"}', "--key", "g", "--priority", "-3", "--in", "60")
    assert command("insert", f"{script}:Greet", *words).out == "1\n"
    it = get(database, "g")
    assert (it.fsm, it.state, it.priority, it.queue) == ("cli_jobs.Greet", {"name": "you"}, -3, "greetings")
    assert it.eligible_at - it.inserted_at == timedelta(seconds=60)


def test_insert_a_function_job_of_a_module(
    command: Command, script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A module is found from the current directory; a function job is inserted by its name."""
    monkeypatch.chdir(script.parent)
    database = tmp_path / "x.db"
    assert command("insert", "cli_jobs:add", "--database", database, "--args", '{"a": 2}').status == 0
    assert command("drain", "cli_jobs", "--database", database).out == "1 steps, 1 done\n"
    assert command("wait", database, "1").json == 3


def test_insert_refuses_a_duplicate(command: Command, script: Path, tmp_path: Path) -> None:
    """A key that is taken: exit status 1 and one line."""
    words = ("insert", f"{script}:Greet", "--database", tmp_path / "x.db", "--key", "k", "--state", '{"name": "x"}')
    assert command(*words).status == 0
    said = command(*words)
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-verb"],
        ["list"],
        ["list", "x.db", "--status", "happy"],
        ["signal", "x.db", "1", "paid", "{bad"],
        ["insert", "m:C", "--database", "x.db", "--state", "{bad"],
        ["insert", "m:C"],
        ["insert", "json", "--database", "x.db"],
        ["run", "jobs", "--database", "x.db", "--queue", "default"],
        ["run", "jobs", "--queue", "default=3"],
        ["insert", "m:C", "--database", "x.db", "--at", "tomorrow"],
        ["insert", "m:C", "--database", "x.db", "--state", "[" * 90_000],
        ["signal", "x.db", "1", "paid", "[" * 90_000 + "]" * 90_000],
        ["signal", "x.db", "1", "paid", "NaN"],
        ["insert", "m:C", "--database", "x.db", "--state", '{"a": [-Infinity]}'],
        ["wait", "x.db", "1", "--timeout", "nan"],
        ["watch", "x.db", "--interval", "inf"],
        ["watch", "x.db", "--interval", "-1"],
        ["list", "x.db", "--limit", "0"],
        ["gc", "x.db", "--retention", "-1"],
        ["insert", "m:C", "--database", "x.db", "--in", "-5"],
        ["insert", "m:C", "--database", "x.db", "--weight", "0"],
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_usage_errors(command: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that cannot be meant, bad JSON among it: exit status 2, one line, no file."""
    monkeypatch.chdir(tmp_path)
    said = command(*words)
    assert (said.status, said.out, said.err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "says"),
    [("1 / 0", "ZeroDivisionError"), ("import nowhere_at_all", "nowhere_at_all"), ("(", "SyntaxError")],
)
def test_code_that_cannot_be_loaded(command: Command, tmp_path: Path, code: str, says: str) -> None:
    """A script that raises: exit status 1, one line with the error and its place."""
    path = tmp_path / "cli_wrong.py"
    path.write_text(code, encoding="utf-8")
    said = command("run", path, "--database", tmp_path / "x.db")
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert says in said.err
    assert "cli_wrong.py" in said.err


@pytest.mark.parametrize("depth", [100, 900, 20_000])
def test_a_state_nested_deeply_is_inserted_or_refused_in_one_line(
    command: Command, script: Path, tmp_path: Path, depth: int
) -> None:
    """However deep JSON is nested, there is no traceback: what is inserted can be shown, the rest is refused."""
    with script.open("a", encoding="utf-8") as file:
        file.write("@durable.job\ndef keep(x=None): return x\n")
    words = ("--database", tmp_path / "x.db", "--args", '{"x": ' + "[" * depth + "]" * depth + "}")
    said = command("insert", f"{script}:keep", *words)
    assert (said.status, said.err.count("\n")) in [(0, 0), (1, 1), (2, 1)]
    if said.status == 0:
        assert command("show", tmp_path / "x.db", "1").status == 0
    assert said.status == 0 or depth > 100


def test_what_nobody_thought_of_is_one_line(command: Command, script: Path, tmp_path: Path) -> None:
    """An error of no kind that the command line knows: its type, its text, and the user's line that raised it."""
    with script.open("a", encoding="utf-8") as file:
        file.write("class Odd(Engine):\n    def drain(self, **_):\n        raise LookupError('odd')\n")
        file.write(f"engine = Odd({str(tmp_path / 'x.db')!r})\n")
    said = command("drain", script)
    assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert "LookupError: odd" in said.err
    assert f"{script}:" in said.err


def test_a_script_is_a_module_like_any_other(command: Command, script: Path, tmp_path: Path) -> None:
    """With a spec and a loader, which Python's own modules ask for."""
    with script.open("a", encoding="utf-8") as file:
        file.write("assert (__spec__.name, __spec__.loader.path) == (__name__, __file__)\n")
    assert command("drain", script, "--database", tmp_path / "x.db").status == 0


def test_a_script_must_not_hide_another_module(command: Command, tmp_path: Path) -> None:
    """A script called as a module that is there already is refused, not loaded over it."""
    path = tmp_path / "json.py"
    path.write_text("", encoding="utf-8")
    assert "name of its own" in command("run", path, "--database", tmp_path / "x.db").err


def test_run_needs_one_engine(command: Command, script: Path) -> None:
    """A module without an engine, and no --database: exit status 1, and what to do."""
    said = command("run", script)
    assert said.status == 1
    assert "--database" in said.err


@pytest.mark.parametrize("how", ["engine.insert(add, args=dict(a=1))", "insert_into(engine.connect(), add)"])
def test_a_target_that_inserts_when_it_is_loaded_is_told_of(
    command: Command, script: Path, tmp_path: Path, how: str
) -> None:
    """What a script does at its top level it does at each `run`: a line says which file, and what helps."""
    database = tmp_path / "x.db"
    inserts = f"""
from durable import insert_into as _insert_into
def insert_into(connection, fsm):
    with connection:
        _insert_into(connection, fsm, args=dict(a=1))
    connection.close()
def main():
    with Engine({str(database)!r}, queues={{}}) as engine:
        {how}
main()
"""
    with script.open("a", encoding="utf-8") as file:
        file.write(inserts)
    said = command("drain", script, "--database", database, "--log-level", "error")
    assert (said.status, said.out, said.err.count("\n")) == (0, "1 steps, 1 done\n", 1)
    assert str(database) in said.err
    assert "__main__" in said.err


LATER = """
import threading
engine = Engine({database!r})
connection = engine.connect()
connection.execute("BEGIN IMMEDIATE")
engine.{how}
threading.Timer(0.25, connection.execute, ["COMMIT"]).start()
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [("insert_nowait(add, args=dict(a=1))", "inserts into"), ("signal_nowait(1, 'a')", "sends signals into")],
)
def test_a_target_that_writes_without_waiting_when_it_is_loaded_is_told_of(
    command: Command, script: Path, tmp_path: Path, how: str, says: str
) -> None:
    """What is asked for at the top level may be committed a little later: it is waited for, and told of."""
    database = tmp_path / "x.db"
    with client(database) as engine:
        assert engine.insert(CliOrder, state={"n": 1}, schedule_in=3600) == 1
    with script.open("a", encoding="utf-8") as file:
        file.write(LATER.format(database=str(database), how=how))
    said = command("drain", script, "--log-level", "error")
    assert (said.status, said.err.count("\n")) == (0, 1)
    assert f"{says} {database} each time it is loaded" in said.err


def test_a_target_that_only_makes_an_engine_is_not_told_of(command: Command, script: Path, tmp_path: Path) -> None:
    """An engine at the top level writes its limits and itself into its file, and no instance."""
    with script.open("a", encoding="utf-8") as file:
        limits = "rate_limits={'stripe': durable.RateLimit(1, per=1)}"
        file.write(f"engine = Engine({str(tmp_path / 'x.db')!r}, {limits})\nengine.counts()\n")
    assert command("drain", script) == Said(0, "nothing was due\n", "")


def test_the_first_example_of_the_readme_is_a_script_and_a_target(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved as a file it runs by itself, and `durable run` and `drain` take its engine without doing that again."""
    code, shown = BLOCKS[0]
    path = tmp_path / "program.py"
    assert run_script(tmp_path, code) == shown
    monkeypatch.chdir(tmp_path)
    assert command("drain", path) == Said(0, "nothing was due\n", "")
    assert command("counts", "shop.db", "--json").json == {"checkout": {"done": 1}}


def test_run_says_so_when_the_script_has_run_its_engine_itself(command: Command, tmp_path: Path) -> None:
    """A script whose top level is `with Engine(...)` has stopped it when it is loaded."""
    path = tmp_path / "withe.py"
    path.write_text(f"import durable\nwith durable.Engine({str(tmp_path / 'w.db')!r}) as engine: pass\n", "utf-8")
    said = command("run", path)
    assert said.status == 1
    assert "was stopped when that was loaded" in said.err


def test_drain_runs_what_is_due_and_no_more(command: Command, script: Path, tmp_path: Path) -> None:
    """`drain` leaves what is scheduled for later; --with-scheduled takes it too; status 1 if one failed."""
    database = tmp_path / "x.db"
    command("insert", f"{script}:Greet", "--database", database, "--state", '{"name": "x"}', "--in", "60")
    assert command("drain", script, "--database", database) == Said(0, "nothing was due\n", "")
    assert command("drain", script, "--database", database, "--with-scheduled").out == "1 steps, 1 done\n"
    command("insert", f"{script}:Boom", "--database", database)
    said = command("drain", script, "--database", database, "--log-level", "error")
    assert (said.status, said.out) == (1, "1 steps, 1 stop\n")


@pytest.mark.parametrize("suffix", ["", ":engine", ":tools.engine"])
def test_a_target_may_have_an_engine_of_its_own(command: Command, script: Path, tmp_path: Path, suffix: str) -> None:
    """A module's only engine, or the one that is named: it runs, and --database beside a name is refused."""
    database = tmp_path / "own.db"
    code = f"engine = Engine({str(database)!r}, queues={{}})\nclass tools:\n    engine = engine\n"
    with script.open("a", encoding="utf-8") as file:
        file.write(code)
    with client(database) as engine:
        engine.insert(Broken)
    said = command("drain", f"{script}{suffix}")
    assert (said.status, said.out) == (1, "1 steps, 1 stop\n")
    if suffix:
        assert command("drain", f"{script}{suffix}", "--database", database).status == 1


@pytest.mark.parametrize("zone", ["UTC0", "JST-9", "EST5"])
def test_an_instant_on_the_command_line_may_be_at_an_end_of_the_calendar(
    command: Command, script: Path, tmp_path: Path, local_zone: Callable[[str], None], zone: str
) -> None:
    """With a zone it is taken; without one, what this machine's clock can't place is refused in one line."""
    local_zone(zone)
    insert = ["insert", f"{script}:Greet", "--database", tmp_path / "at.db", "--state", '{"name": "Ann"}', "--at"]
    for end in ENDS_OF_THE_CALENDAR:
        assert command(*insert, f"{end.isoformat()}+00:00").status == 0
        said = command(*insert, end.isoformat())
        assert said.status == 0 or (said.status, said.out, said.err.count("\n")) == (2, "", 1)


# ---- Schedules -----------------------------------------------------------------------------------


@durable.job(name="cli.report")
def cli_report(n: int = 0) -> int:
    """Report."""
    return n


@pytest.fixture
def scheduled(tmp_path: Path) -> Path:
    """A file with one schedule that is due every ten minutes, and one that is paused."""
    path = tmp_path / "scheduled.db"
    with client(path) as engine:
        engine.schedule("often", cli_report, durable.Every(600), args={"n": 1})
        engine.schedule("seldom", cli_report, durable.Cron("0 3 * * *", zone="UTC"))
        engine.pause_schedule("seldom")
    return path


def test_schedules_are_listed_with_what_comes_next(command: Command, scheduled: Path) -> None:
    """The next instants, and why one does not fire; as JSON keyed by `Schedule`'s fields, and `next`."""
    often, seldom = command("schedules", scheduled, "--next", "3", "--json").json
    assert (often["name"], len(often["next"]), often["fsm"]) == ("often", 3, "cli.report")
    first, second, third = map(datetime.fromisoformat, often["next"])
    assert second - first == third - second == timedelta(minutes=10)
    assert (seldom["next"], seldom["is_paused"]) == ([], True)
    assert set(often) == set(attrs.fields_dict(durable.Schedule)) | {"next"}
    out = command("schedules", scheduled).out
    assert "no engine runs on the file" in out
    assert "paused" in out
    assert command("schedules", scheduled, "--next", "0").status == 2


def test_trigger_pause_resume_unschedule(command: Command, scheduled: Path) -> None:
    """They do what the methods do; an unknown name is refused in one line, and neither or both is a usage error."""
    ident = int(command("trigger", scheduled, "often").out)
    assert get(scheduled, ident).schedule == "often"
    assert f"skipped while #{ident} is live" in command("schedules", scheduled).out
    assert command("pause", scheduled, "--schedule", "often").status == 0
    assert command("resume", scheduled, "--schedule", "seldom").status == 0
    with client(scheduled) as engine:
        assert {one.name: one.is_paused for one in engine.schedules()} == {"often": True, "seldom": False}
    assert command("unschedule", scheduled, "often").status == 0
    for words in (["trigger", "often"], ["unschedule", "often"], ["pause", "--schedule", "often"]):
        said = command(words[0], scheduled, *words[1:])
        assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    for words in ([], ["default", "--schedule", "seldom"]):
        assert command("pause", scheduled, *words).status == 2


# ---- The past, and code against the file ---------------------------------------------------------


def test_history_is_a_timeline(command: Command, shop: Path) -> None:
    """`history` lists the runs, `show` has them too; as JSON they are keyed by `Transition`'s fields."""
    out = command("history", shop, "order:1").out
    assert out.splitlines()[0].split() == ["run", "when", "took", "step", "kind", "to", "worker", "error"]
    [run] = command("history", shop, "order:1", "--json").json
    assert (run["seq"], run["step"], run["kind"], run["to"]) == (1, "ship", "done", None)
    assert set(run) == set(attrs.fields_dict(durable.Transition))
    assert "ship" in command("show", shop, "order:1").out.split("run", 1)[1]
    assert command("show", shop, "order:1", "--json").json["history"] == [run]


def test_rewind_and_fork_do_what_the_methods_do(command: Command, shop: Path) -> None:
    """TO is a run's number or a step; a fork's id is printed; what they refuse is one line and status 1."""
    said = command("rewind", shop, "order:1", "1", "--state", '{"again": true}')
    assert (said.status, said.out) == (0, "")
    assert (get(shop, "order:1").status, get(shop, "order:1").state) == ("runnable", {"again": True})
    new = int(command("fork", shop, "order:2", "start").out)
    assert (get(shop, new).step, get(shop, new).correlation_key) == ("start", None)
    for words in (["77"], ["nowhere"], ["ship", "--state", "[1]"]):
        said = command("rewind", shop, "order:2", *words)
        assert (said.status, said.out, said.err.count("\n")) == (1, "", 1)
    assert command("rewind", shop, "order:2", "start", "--state", "{").status == 2


@pytest.mark.usefixtures("known_alone")
def test_check_holds_the_file_against_the_code(command: Command, script: Path, tmp_path: Path) -> None:
    """With TARGET: what would no longer run, by its classes; without, only the file's own soundness."""
    database = tmp_path / "x.db"
    with client(database) as engine:
        engine.insert(CliOrder)
        engine.drain()
    assert command("check", database, script).out == "sound\n"
    kept = durable._registry.pop(("cli.Order", 1))
    try:
        assert command("check", database).status == 0
        said = command("check", database, script)
        assert (said.status, "cli.Order" in said.out) == (1, True)
        assert command("check", database, script, "--json").json == [said.out.strip()]
    finally:
        durable._registry["cli.Order", 1] = kept
    assert command("check", database, tmp_path / "none.py").status == 1


def test_cancel_takes_children_along(command: Command, tmp_path: Path) -> None:
    """With --children; else nothing cascades."""
    path = tmp_path / "p.db"
    with client(path) as engine:
        parent = engine.insert(Parent)
        engine.drain()
    assert command("cancel", path, parent, "--children").status == 0
    with client(path) as engine:
        assert {one.status for one in engine.find()} == {Status.FAILED}


def test_progress_is_shown(command: Command, tmp_path: Path) -> None:
    """By `list` and `show`, while the step runs."""
    path = tmp_path / "x.db"
    shown: list[str] = []

    @durable.job(name="cli.counting")
    def counting(ctx: Ctx) -> None:
        ctx.progress(3, 8, "unpacking")
        eventually(lambda: tools_get(path, ctx.id).progress is not None)
        shown.extend(command(*words).out for words in (["list", path], ["show", path, ctx.id]))

    with client(path, queues={"default": 1}) as engine:
        engine.start()
        engine.result(engine.insert(counting), 60)
    assert all("3 of 8, 38%: unpacking" in out for out in shown), shown
    assert len(shown) == 2


def tools_get(path: Path, target: int) -> Instance:
    """An instance as the tools read it."""
    with durable.tools.Reader(path) as reader:
        return reader.get(target)


FLEET = """
import os, time
import durable

@durable.job
def where() -> int:
    time.sleep(0.05)
    return os.getpid()
"""


@posix
def test_several_processes_are_kept_alive_by_their_parent(tmp_path: Path) -> None:
    """Those that die are replaced, signals are passed on, and nothing is lost."""
    script, path = tmp_path / "cli_fleet.py", tmp_path / "fleet.db"
    script.write_text(FLEET, encoding="utf-8")
    with start("run", script, "--database", path, "--processes", "2") as parent, client(path) as engine:
        try:
            eventually(lambda: len(engine.workers()) == 2)
            victim = engine.workers()[0].pid
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: len({one.pid for one in engine.workers()} - {victim}) == 2)
            with start("insert", f"{script}:where", "--database", path) as process:
                ident = int(process.communicate(timeout=2 * PATIENCE)[0])
            assert engine.result(ident, 60) in {one.pid for one in engine.workers()}
            parent.send_signal(signal.SIGTERM)
            _, err = parent.communicate(timeout=2 * PATIENCE)
        finally:
            parent.kill()
        assert (parent.returncode, f"worker {victim} has died" in err) == (0, True), err
        assert engine.workers() == []


@posix
def test_a_target_that_no_process_can_run_is_refused_once(tmp_path: Path) -> None:
    """Its workers are not started again and again."""
    with start("run", tmp_path / "none.py", "--database", tmp_path / "x.db", "--processes", "2") as parent:
        _, err = parent.communicate(timeout=2 * PATIENCE)
    assert (parent.returncode, "has died" in err) == (1, False), err


SLOW_STARTS = {
    "loading": "begin()",
    "starting": """
class Slow(durable.Engine):
    def run(self):
        begin()

engine = Slow(__file__ + ".db")
""",
}


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("where", SLOW_STARTS)
def test_processes_that_are_stopped_before_they_run_anything_have_not_failed(
    tmp_path: Path, where: str, number: signal.Signals
) -> None:
    """Their parent ends with status 0, and no traceback is seen."""
    script = tmp_path / "cli_slow.py"
    begin = f"def begin():\n    open({str(tmp_path)!r} + f'/{{os.getpid()}}.mark', 'x').close()\n    time.sleep(600)\n"
    script.write_text(f"import os, time, durable\n{begin}{SLOW_STARTS[where]}", encoding="utf-8")
    with start("run", script, "--processes", "2") as parent:
        try:
            eventually(lambda: len(list(tmp_path.glob("*.mark"))) == 2)
            parent.send_signal(number)
            said = parent.communicate(timeout=2 * PATIENCE)
        finally:
            parent.kill()
    assert (parent.returncode, said) == (0, ("", ""))


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_a_number_of_processes_is_a_number(command: Command, script: Path, count: str) -> None:
    """Exit status 2, naming what was given."""
    said = command("run", script, "--processes", count)
    assert (said.status, count in said.err) == (2, True)


# ---- What is shown, and where --------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(*words: object) -> str:
    """What a command shows on a terminal."""
    with redirect_stdout(Terminal()) as terminal:
        cli.main([str(word) for word in words])
    return terminal.getvalue()


def test_colour_only_on_a_terminal(command: Command, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal has colours, a pipe none, nor has a terminal whose owner wants none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in shown("list", shop)
    assert "\x1b" not in command("list", shop).out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown("list", shop)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.04, "40 ms"), (1, "1 s"), (3.25, "3.2 s"), (59, "59 s"), (3600, "1 h"), (90_000, "1 d")],
)
def test_lengths_of_time_read_well(seconds: float, text: str) -> None:
    """A length of time is in its largest unit, with a decimal only where it is short of ten."""
    assert screen.span(seconds) == text


@pytest.mark.parametrize("blocks", [False, True])
def test_json_for_programs_is_what_the_file_holds(blocks: bool) -> None:
    """Also half of a surrogate pair, which no encoding has."""
    shown = screen.Screen(live=False, colour=False, blocks=blocks)
    for value in ("é☃", "é☃\ud800"):
        assert json.loads(shown.json([value]).encode()) == [value]
    assert ("é" in shown.json(["é"])) is blocks


@given(st.dictionaries(st.sampled_from(Status), st.integers(0, 10**9)), st.integers(9, 200))
def test_a_bar_has_its_width_and_shows_every_status(tally: dict[str, int], width: int) -> None:
    """However small its share, a status that is there is seen; the bar is as wide as asked for."""
    bar = screen.Screen(live=False, colour=False, blocks=True).bar(tally, width)
    assert len(bar) == width
    assert {screen.BLOCKS[Status(status)][0] for status, count in tally.items() if count} <= set(bar)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_fit_the_terminal(shop: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """No line is longer than the terminal is wide; letters that take two columns count as two."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    with client(shop) as engine:
        engine.insert(CliOrder, correlation_key="注文" * 60)
    lines = shown("list", shop).splitlines()
    assert len(lines) == 6
    assert all(len(line) + sum(letter in "注文" for letter in line) <= columns for line in lines)


def test_output_survives_a_poor_encoding(shop: Path) -> None:
    """Where the encoding lacks a letter it is replaced; bars and JSON keep to ASCII."""
    with client(shop) as engine:
        engine.insert(CliOrder, correlation_key="注文")
    for words in (["list"], ["list", "--json"], ["watch", "--interval", "0.01"]):
        with start(words[0], shop, *words[1:], PYTHONIOENCODING="ascii") as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            process.terminate()
            assert process.communicate()[1] == ""


def test_help_has_examples(command: Command) -> None:
    """Every verb's help has a command to copy."""
    for verb in cli.VERBS:
        said = command(verb, "--help")
        assert said.status == 0
        assert f"\ndurable {verb} " in said.out


def test_version(command: Command) -> None:
    """`--version` says what is installed."""
    said = command("--version")
    assert said.status == 0
    assert said.out.startswith("durable ")


def test_watch_in_a_pipe_says_what_changed(command: Command, shop: Path) -> None:
    """A line with the counts and one for each of the latest failures, and no escape sequences."""
    command("cancel", shop, "3", "4")
    said = command("watch", shop, "--until-idle")
    assert said.status == 0
    assert "1 done  3 failed" in said.out
    assert "#2 cli.Broken failed in perform: the disk" in said.out
    assert "\x1b" not in said.out


def test_watch_ends_when_nothing_is_left(command: Command, shop: Path) -> None:
    """`--until-idle` waits for what an engine does meanwhile; who waits for a signal without end keeps nobody."""
    command("cancel", shop, "3", "4")
    with Engine(shop, queues={"orders": 1}) as engine:
        engine.insert(CliOrder, step="ship", schedule_in=0.2)
        said = command("watch", shop, "--until-idle", "--interval", "0.01")
    assert "2 done  3 failed" in said.out.splitlines()[-1]


def test_watch_waits_for_no_paused_queue(command: Command, shop: Path) -> None:
    """Time alone does not bring on what somebody has to resume."""
    command("cancel", shop, "3")
    command("pause", shop, "later")
    assert "1 runnable" in command("watch", shop, "--until-idle").out


def test_watch_on_a_terminal_gives_the_screen_back(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second screen is left, the cursor shown again, and the last frame stays to be read."""
    monkeypatch.setenv("COLUMNS", "80")
    with client(shop) as engine:
        engine.cancel(3)
        engine.cancel(4)
    text = shown("watch", shop, "--until-idle")
    first, last = text.split("\x1b[?25h\x1b[?1049l")
    assert first.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    assert "orders" in last
    assert "cli.Broken" in last


def test_watch_may_be_interrupted_before_it_has_seen_anything(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the first look, which takes its time on a large file: the screen is given back, and no more."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.tools.Reader, "counts", interrupted)
    assert shown("watch", shop) == "\x1b[?1049h\x1b[?25l\x1b[?25h\x1b[?1049l"


# ---- Processes -----------------------------------------------------------------------------------


def test_the_module_runs_as_a_program(script: Path, tmp_path: Path) -> None:
    """`python -m durable` knows the classes of a script that imports `durable`: the module is not there twice."""
    database = tmp_path / "x.db"
    with start("insert", f"{script}:add", "--database", database, "--args", '{"a": 1}') as process:
        out, err = process.communicate(timeout=2 * PATIENCE)
    assert (process.returncode, out, err) == (0, "1\n", "")


def shell(line: str, *words: object) -> Said:
    """The command line as a shell runs it, in `line` under the name `$@`."""
    buffered = {"PYTHONUNBUFFERED": ""}  # argparse swallows the error of what it writes at once
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "durable", *map(str, words)]
    done = subprocess.run(
        command, env=environment() | buffered, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)


@posix
@pytest.mark.parametrize("words", [["list"], ["counts", "--json"], ["show", "1"], ["wait", "1"], ["watch"], ["gc"]])
def test_a_closed_output_is_refused_in_one_line(shop: Path, words: list[str]) -> None:
    """`durable list FILE >&-` has nobody to tell: exit status 1, one line, and nothing is done."""
    said = shell('"$@" >&-', words[0], shop, *words[1:])
    assert said == Said(1, "", "durable: standard output is closed\n")


@posix
def test_what_cannot_be_told_is_not_inserted(script: Path, tmp_path: Path) -> None:
    """`insert` whose id nobody would hear of inserts nothing; a verb that says nothing needs no output."""
    database = tmp_path / "x.db"
    insert = ("insert", f"{script}:add", "--database", database, "--args", '{"a": 1}')
    assert shell('"$@" >&-', *insert).status == 1
    assert not database.exists()
    assert shell('"$@"', *insert).out == "1\n"
    assert shell('"$@" >&-', "cancel", database, "1") == Said(0, "", "")
    assert get(database, 1).status is Status.FAILED


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_an_output_that_fails_is_one_line(shop: Path) -> None:
    """A full disk behind standard output: exit status 1, one line; behind standard error: silence."""
    for words in (["list", shop], ["--help"]):
        said = shell('"$@" >/dev/full', *words)
        assert (said.status, said.err.count("\n")) == (1, 1)
    for line in ('"$@" 2>/dev/full', '"$@" 2>&-', '"$@" 2>&- >&-'):
        assert shell(line, "list", shop.parent / "missing.db") == Said(1, "", "")


@posix
def test_a_reader_that_leaves_early_is_no_error(shop: Path) -> None:
    """`durable list … | head -1` says nothing on standard error."""
    with client(shop) as engine:
        engine.insert_all([Insert(Broken) for _ in range(500)])
    with start("list", shop, "--json", "--limit", "500") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


SLEEPER = """
import time, durable
from pathlib import Path

@durable.job
def nap(seconds: float, mark: str) -> str:
    Path(mark).touch()
    time.sleep(seconds)
    return "rested"
"""


@contextmanager
def napping(tmp_path: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """`durable run` in the middle of a job that takes SECONDS; database nap.db, job 1."""
    script, mark = tmp_path / "cli_naps.py", tmp_path / "mark"
    script.write_text(SLEEPER, encoding="utf-8")
    words = ("--database", tmp_path / "nap.db")
    arguments = json.dumps({"seconds": seconds, "mark": str(mark)})
    with start("insert", f"{script}:nap", *words, "--args", arguments) as process:
        process.communicate()
    with start("run", script, *words, "--queue", "default=2", "other=1") as process:
        try:
            eventually(mark.exists)
            yield process
        finally:
            process.kill()


WINDOWS = """
import os, signal, subprocess, sys, types
import durable
from durable_tools import cli

breaks = {"SIGBREAK": signal.SIGUSR1, "CTRL_BREAK_EVENT": signal.SIGUSR1}  # the one signal that a process can be sent
cli.signal = types.SimpleNamespace(**vars(signal) | breaks)
cli.os = types.SimpleNamespace(**vars(os) | {"name": "nt"})

@durable.job
def breaks_off(n: int) -> int:
    os.kill(os.getpid(), signal.SIGUSR1)
    return n

def worker(database):
    with durable.Engine(database, queues={}) as engine:
        engine.insert(breaks_off, args={"n": 1})
    assert cli.main(["run", __file__, "--database", database]) == 0
    with durable.Engine(database, queues={}) as engine:
        print(engine.counts())

class Told(subprocess.Popen):  # while it is started: as early as may be
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        os.kill(os.getpid(), signal.SIGUSR1)

def fleet(database):
    cli.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": Told})
    fleet = cli._Fleet(types.SimpleNamespace(target="", log_level="", database=None, queue=None, processes=2))
    fleet._command = [sys.executable, "-c", "import time; time.sleep(600)"]
    print(fleet.run() == 128 + signal.SIGUSR1, fleet._workers)

if __name__ == "__main__":
    {"worker": worker, "fleet": fleet}[sys.argv[1]](sys.argv[2])
"""


@posix
@pytest.mark.parametrize(("who", "shown"), [("worker", "{'default': {'done': 1}}"), ("fleet", "True []")])
def test_on_windows_a_ctrl_break_drains_and_is_passed_on(tmp_path: Path, who: str, shown: str) -> None:
    """A worker ends in order, its running job done; a parent passes it on and leaves no worker behind."""
    assert run_script(tmp_path, WINDOWS, who, tmp_path / "w.db") == f"{shown}\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_sigterm_drains(tmp_path: Path) -> None:
    """The first signal lets running steps end: the job is done when the process is, with status 0 and a log."""
    with napping(tmp_path, 1.0) as process:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0
    assert "INFO" in err
    assert get(tmp_path / "nap.db", 1).result == "rested"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send")
def test_the_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    """The second signal does not wait: the job is left as after a crash, and the next engine runs it again."""
    with napping(tmp_path, 600) as process:

        def has_left() -> bool:
            process.send_signal(signal.SIGINT)  # two of one kind that come at the same time are one
            return process.poll() is not None

        assert not has_left()
        eventually(has_left)
        process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert get(tmp_path / "nap.db", 1).status is Status.EXECUTING  # a drain would have given it back


@pytest.mark.slow
def test_several_runs_share_a_file(command: Command, script: Path, tmp_path: Path) -> None:
    """Two `run`s on one file share its work; `workers` lists both, and one that is killed is seen to be gone."""
    database = tmp_path / "x.db"
    run = ("run", script, "--database", database)

    def pids() -> set[int]:
        return {worker["pid"] for worker in command("workers", database, "--json").json}

    with client(database), start(*run) as one, start(*run) as two:
        try:
            eventually(lambda: pids() == {one.pid, two.pid})
            one.kill()
            command("insert", f"{script}:Greet", "--database", database, "--state", '{"name": "you"}', "--key", "g")
            assert command("wait", database, "g", "--timeout", PATIENCE).json == "hello you"
            eventually(lambda: pids() == {two.pid})
        finally:
            one.kill()
            two.kill()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux for a terminal")
def test_watch_in_a_real_terminal(shop: Path) -> None:
    """At 80 columns by 24 lines: bars, counts, the latest failure; the screen is given back."""
    name = f"durable-{os.getpid()}"
    tmux = ["tmux", "-L", name]
    code = f"import sys; from durable_tools import cli; sys.exit(cli.main(['watch', {str(shop)!r}]))"
    shell = [*tmux, "-f", os.devnull, "new-session", "-d", "-x", "80", "-y", "24", "sh"]
    subprocess.run(shell, check=True, env=environment())

    def screen() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], check=True, capture_output=True, text=True).stdout

    def shows_all(text: str) -> bool:  # a frame comes piece by piece
        drawn = ("orders", "the disk is on fire", "1 awaiting_signal", "█")
        return "before" not in text and all(part in text for part in drawn)

    def type_in(*keys: str) -> None:
        subprocess.run([*tmux, "send-keys", *keys], check=True)

    try:
        type_in(f'echo before; {sys.executable} -c "{code}"', "Enter")
        seen = seen_at_last(lambda: next((it for it in [screen()] if shows_all(it)), None))
        type_in("C-c")
        eventually(lambda: "before" in screen())
    finally:
        subprocess.run([*tmux, "kill-server"], check=True)
    assert all(len(line) <= 80 for line in seen.splitlines())


def test_demo_survives_a_real_kill(tmp_path: Path) -> None:
    """`demo` kills its worker process half-way, goes on with another, and gets what a plain loop gets."""
    files = tmp_path / "files"
    for number in range(60):
        path = files / str(number % 3) / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}", encoding="utf-8")
    with start("demo", files) as process:
        out, err = process.communicate(timeout=2 * PATIENCE)
    assert (process.returncode, err) == (0, "")
    assert "60 in all" in out
    assert "is killed after" in out
    assert out.count(" starts: ") == 2
    assert "the same" in out


def test_demo_needs_files(command: Command, tmp_path: Path) -> None:
    """An empty directory shows nothing: exit status 1."""
    assert command("demo", tmp_path).status == 1


# ---- Diagrams ------------------------------------------------------------------------------------


class DrawnSteps(FSM, name="drawn.Steps"):
    @step
    def start(self, ctx: Ctx) -> Await:
        return Await("paid", then=DrawnSteps.ship)

    @step
    def ship(self, ctx: Ctx) -> Any:
        if ctx.attempt:
            return Next(ctx.state["where"])
        return ScheduleChildren([], then="close") if ctx.awaited else Stop("never paid")

    @step
    async def close(self, ctx: Ctx) -> Any:
        return Retry(5) if ctx.attempt else Done()

    def handle(self, error: Exception, ctx: Ctx) -> Any:
        return Retry(5) if ctx.attempt < 3 else Next("close")


class DrawnNames(FSM, name="drawn.Names"):
    def step(self, name: str, ctx: Ctx) -> Any:
        match name:
            case "start":
                return Next("to: #1")
            case "to: #1":
                return Done()
        return Stop("no such step")


class DrawnJob(FSM, name="tools.DrawnJob"):
    fsm = "an attribute of its own"

    def perform(self, args: dict[str, Any]) -> str:
        return self.fsm


@durable.job(name="drawn.job")
def drawn_job(n: int) -> int:
    """A job that does nothing."""
    return n


def test_a_machine_of_step_methods_is_drawn_from_their_text(command: Command) -> None:
    """A line for each outcome: where it stands and leads; `?` for a computed name, and what `handle` repeats."""
    said = command("diagram", f"{__name__}:DrawnSteps")
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines() == [
        "stateDiagram-v2",
        "    %% drawn.Steps, version 1",
        '    state "?" as s3',
        '    state "handle, after an error in any step" as handle',
        "    [*] --> start",
        "    start --> ship : Await",
        "    ship --> s3 : Next",
        "    ship --> close : ScheduleChildren",
        "    ship --> [*] : Stop",
        "    close --> close : Retry",
        "    close --> [*] : Done",
        "    handle --> s3 : Retry",
        "    handle --> close : Next",
    ]


def test_a_machine_with_one_step_method_is_drawn_by_the_names_that_it_matches(command: Command) -> None:
    """`def step(self, name, ctx)`: names that Mermaid would read otherwise stand in quotes, with its codes."""
    lines = [line.strip() for line in command("diagram", f"{__name__}:DrawnNames").out.splitlines()]
    assert 'state "to#58; #35;1" as s1' in lines
    assert {"[*] --> start", "start --> s1 : Next", "s1 --> [*] : Done"} <= set(lines)


@pytest.mark.parametrize("job", ["drawn_job", "DrawnJob"])
def test_a_job_is_drawn_as_what_may_become_of_it(command: Command, job: str) -> None:
    """It is done when it returns, is tried again when it raises, and fails in the end: no outcome has to say so."""
    lines = [line.strip() for line in command("diagram", f"{__name__}:{job}").out.splitlines()]
    assert lines[2:] == [
        "[*] --> perform",
        "perform --> [*] : Done",
        "perform --> perform : Retry",
        "perform --> [*] : Stop",
    ]


def test_a_diagram_with_a_file_counts_what_was_seen_there(command: Command, tmp_path: Path) -> None:
    """How often each way was taken, and how many live instances stand at each step."""
    path = tmp_path / "drawn.db"
    with client(path) as engine:
        for key in ("a", "b", "c"):
            engine.insert(DrawnSteps, correlation_key=key)
        engine.drain()
        engine.signal("a", "paid")
        engine.drain()
    lines = [line.strip() for line in command("diagram", f"{__name__}:DrawnSteps", "--file", path).out.splitlines()]
    assert 'state "ship: 2 here" as ship' in lines
    assert {"start --> ship : Await (3)", "close --> [*] : Done (1)", "ship --> [*] : Stop (0)"} <= set(lines)


@pytest.mark.parametrize(
    ("target", "status", "words"), [("json", 2, "TARGET:CLASS"), ("json:JSONDecoder", 1, "no machine and no job")]
)
def test_what_is_no_machine_is_not_drawn(command: Command, target: str, status: int, words: str) -> None:
    """A module without a class is a usage error, another class a refusal; both name what was given."""
    said = command("diagram", target)
    assert (said.status, said.out) == (status, "")
    assert words in said.err


def test_a_misspelt_step_is_found_in_the_text_of_a_class() -> None:
    """Where it stands in quotes, in `Next`, `Await` or `ScheduleChildren`, by position or by name; with its line."""

    class Typo(FSM, name="test.typo"):
        @step
        def start(self, ctx: Ctx) -> Next | Await:
            return Next("shpi") if ctx.state else Await("go", then="edn")

        @step
        def ship(self, ctx: Ctx) -> Next:
            return Next("start")

        def handle(self, error: Exception, ctx: Ctx) -> Any:
            return Next("mend")

    found = [line for line in texts.misspelt() if "test.typo" in line]
    line = inspect.getsourcelines(Typo.start)[1] + 2
    assert [one.partition(", which")[0] for one in found] == [
        f"test.typo: step 'start' goes on with 'shpi' (test_durable_tools.py, line {line})",
        f"test.typo: step 'start' goes on with 'edn' (test_durable_tools.py, line {line})",
        f"test.typo: handle goes on with 'mend' (test_durable_tools.py, line {line + 7})",
    ]
    assert all(one.endswith("none of its steps 'start', 'ship'") for one in found)
    del durable._registry["test.typo", 1]


class Traveller(FSM, name="test.traveller"):
    """Its steps say in all the ways that there are where they lead."""

    @step
    def start(self, ctx: Ctx) -> Any:
        if ctx.attempt:
            return durable.Retry(3)
        return Next("pack" if ctx.state else "leave")

    @step(max_attempts=3)
    async def pack(self, ctx: Ctx) -> Any:
        children = [Insert(CliOrder)]
        return ScheduleChildren(children, Traveller.leave) if children else self._rest(ctx)

    @step
    def leave(self, ctx: Ctx) -> Any:
        match ctx.state:
            case {}:
                return Next(ctx.state["where"])
            case _:
                return Done({"next": str(Next)})

    def _rest(self, ctx: Ctx) -> Any:
        return Await(["call", "letter"], then="start") if ctx.state else self._rest(ctx)

    def handle(self, error: Exception, ctx: Ctx) -> Any:
        return Retry(1) if ctx.attempt < 3 else Stop(error)


class Matcher(FSM, name="test.matcher"):
    """One `step` for all names."""

    def step(self, name: str, ctx: Ctx) -> Any:
        if name == "start":
            return Next("a")
        if name in ("a", "b"):
            return Next(step="c")
        if "f" == name:  # noqa: SIM300 - some write it so
            return Next("a")
        match name:
            case "c" | "d":
                return self._end(name)
            case "e" if ctx.attempt:
                return Done()
        return Stop("unknown")

    def _end(self, name: str) -> Any:
        return Done() if name else Next(name)


def edges_of(cls: type[FSM]) -> list[tuple[str | None, str, str | None]]:
    """What the text of a class shows, without the lines."""
    spec = cls._spec
    assert spec is not None
    return [edge[:3] for edge in texts.edges(spec)]


def test_the_text_of_a_class_shows_which_outcomes_lead_where() -> None:
    """Of all outcomes, through methods of its own; `?` is computed, or what `handle` repeats, an end None."""
    assert edges_of(Traveller) == [
        ("start", "Retry", "start"),
        ("start", "Next", "pack"),
        ("start", "Next", "leave"),
        ("pack", "ScheduleChildren", "leave"),
        ("pack", "Await", "start"),
        ("leave", "Next", "?"),
        ("leave", "Done", None),
        (None, "Retry", "?"),
        (None, "Stop", None),
    ]


def test_the_text_of_one_step_for_all_names_is_told_apart_by_them() -> None:
    """By `match name` and by `if name ==`, either way round; what stands outside is no step's that could be told."""
    assert edges_of(Matcher) == [
        ("start", "Next", "a"),
        ("a", "Next", "c"),
        ("b", "Next", "c"),
        ("f", "Next", "a"),
        ("c", "Done", None),
        ("c", "Next", "?"),
        ("d", "Done", None),
        ("d", "Next", "?"),
        ("e", "Done", None),
        ("?", "Stop", None),
    ]


def test_a_class_without_a_text_has_no_edges() -> None:
    """One made of what was typed at a prompt is told of as one that shows nothing."""
    space: dict[str, Any] = {"durable": durable, "__name__": "typed"}
    exec("class Typed(durable.FSM):\n    def perform(self, args): return durable.Done()", space)
    assert edges_of(space["Typed"]) == []
    del durable._registry["typed.Typed", 1]


@pytest.mark.usefixtures("known_alone")
def test_check_tells_of_a_misspelt_step_where_it_is_given_the_code(command: Command, tmp_path: Path) -> None:
    """With TARGET, whatever stands in the file."""
    script = tmp_path / "shop.py"
    script.write_text("""
from durable import FSM, Next, step
class Shop(FSM, name="test.misspelt"):
    @step
    def start(self, ctx):
        return Next("shpi")
""")
    with client(tmp_path / "x.db"):
        pass
    assert command("check", tmp_path / "x.db").out == "sound\n"
    said = command("check", tmp_path / "x.db", script)
    assert said.status == 1
    assert "test.misspelt: step 'start' goes on with 'shpi' (shop.py, line 6)" in said.out


# ---- What the page shows -------------------------------------------------------------------------


@attrs.frozen
class Answer:
    """What the page's application answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Viewer:
    """Who asks the page's application, as its own page does unless a header says otherwise."""

    def __init__(self, file: Path, **options: Any) -> None:
        self.app = page.make_app(file, **options)

    def ask(self, path: str, query: Any = None, *, method: str = "GET", body: Any = None, **extra: Any) -> Answer:
        text = urllib.parse.urlencode({name: value for name, value in (query or {}).items() if value is not None})
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": text,
        }
        if body is not None:
            environ |= {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(data)), "HTTP_X_DURABLE": "page"}
        environ |= {"wsgi.input": io.BytesIO(data)} | extra
        setup_testing_defaults(environ)
        started: list[Any] = []
        answer = self.app(environ, cast(Any, lambda *given: started.extend(given[:2])))
        body = b"".join(answer)
        getattr(answer, "close", bytes)()
        return Answer(int(started[0].split()[0]), dict(started[1]), body)

    def get(self, name: str, **query: Any) -> Any:
        answer = self.ask(f"/api/{name}", query)
        assert answer.status == 200, answer.body
        return answer.json

    def do(self, **asked: Any) -> Answer:
        return self.ask("/api/do", method="POST", body=asked)


LOOKS_FOR_S = page.LOOKS_FOR_S
"""For how long a request looks, as users have it."""


@pytest.fixture
def viewer() -> Iterator[Callable[..., Viewer]]:
    """Make viewers of files; in the end these are let go of. A look that is held up has time to come to its end."""
    made: list[Viewer] = []

    def make(file: Path, **options: Any) -> Viewer:
        made.append(Viewer(file, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patient:
        patient.setattr(page, "LOOKS_FOR_S", PATIENCE)
        yield make
    for one in made:
        one.app.close()


View = Callable[..., Viewer]


def noted(seen: list[Any], one: Any) -> list[Any]:
    """`seen` with one more."""
    seen.append(one)
    return seen


def seen_at_last(look: Callable[[], Any]) -> Any:
    """What `look` returns once that is true."""
    seen: list[Any] = []
    eventually(lambda: bool(noted(seen, look())[-1]))
    return seen[-1]


def test_the_overview_counts_what_the_engine_counts(shop: Path, viewer: View) -> None:
    """For each queue its statuses, the pause, the width of the engines that serve it, and the last hour by minute."""
    with client(shop) as engine:
        engine.pause("later")
        expected = engine.counts()
    seen = {queue["name"]: queue for queue in viewer(shop).get("overview")["queues"]}
    assert {name: queue["tally"] for name, queue in seen.items()} == expected
    assert [name for name, queue in seen.items() if queue["is_paused"]] == ["later"]
    assert [sum(minute[0] for minute in seen["orders"]["chart"]), len(seen["orders"]["chart"])] == [1, 60]
    assert sum(minute[1] for minute in seen["default"]["chart"]) == 1


def test_the_overview_begins_with_what_is_wrong(tmp_path: Path, viewer: View) -> None:
    """Due work that no engine serves, a paused queue, failures: since when, and what helps; the worst first."""
    path = tmp_path / "monday.db"
    with client(path, clock=Clock(time.time() - 600)) as engine:
        engine.insert(Broken)
        engine.drain()
        engine.insert(CliOrder)
        engine.insert(Broken, queue="held")
        engine.pause("held")
    troubles = viewer(path).get("overview")["attention"]
    assert [trouble["level"] for trouble in troubles] == ["bad", "bad", "warn"]
    unserved, failed, paused = troubles
    assert "No engine serves the queue orders, where 1 wait" in unserved["what"]
    assert "durable run" in unserved["command"]
    assert 590_000 < time.time() * 1000 - unserved["since"] < 700_000
    assert "cli.Broken failed in perform: the disk" in failed["what"]
    assert "held is paused: 1 wait there" in paused["what"]
    assert paused["resume"] == "held"


def test_what_is_tried_again_and_again_is_told_before_it_fails(tmp_path: Path, viewer: View) -> None:
    """An error that a retry may mend: of what, in which step, how often at most, and the latest one to read."""

    class Flaky(FSM, name="page.Flaky"):
        def perform(self, args: Any) -> None:
            raise ConnectionError("the mail server is away")

    with client(tmp_path / "flaky.db", clock=Clock()) as engine:  # by which no retry becomes due
        ids = engine.insert_all(Insert(Flaky) for _ in range(3))
        engine.drain(with_scheduled=False)
    (trouble,) = viewer(tmp_path / "flaky.db").get("overview")["attention"]
    assert "3 instances of page.Flaky are tried again in perform, with attempt 1 at most" in trouble["what"]
    assert "the mail server is away" in trouble["what"]
    assert (trouble["level"], trouble["id"]) == ("warn", ids[-1])


def test_a_command_to_be_copied_is_quoted_for_the_shell(tmp_path: Path, viewer: View) -> None:
    """Whatever a queue or the file is called: what somebody pastes into a shell is one command with these words."""
    path = tmp_path / "my shop; touch x.db"
    with client(path) as engine:
        engine.insert(CliOrder, queue="$(reboot) 'now'")
        engine.pause("$(reboot) 'now'")
        engine.insert(CliOrder, queue="old", schedule_at=datetime.now(UTC) - timedelta(hours=1))
    eye = viewer(path)
    commands = [shlex.split(trouble["command"]) for trouble in eye.get("overview")["attention"]]
    assert commands == [
        ["durable", "run", "MODULE", "--database", str(path)],
        ["durable", "resume", str(path), "$(reboot) 'now'"],
    ]
    assert shlex.split(eye.get("about")["in_shell"]) == [str(path)]


def test_nothing_is_wrong_with_an_empty_file(tmp_path: Path, viewer: View) -> None:
    """No queue, no trouble, no failure: every list is there, and empty."""
    with client(tmp_path / "new.db"):
        pass
    seen = viewer(tmp_path / "new.db").get("overview")
    assert (seen["attention"], seen["queues"], seen["running"], seen["workers"]) == ([], [], [], [])


def test_what_runs_is_shown_with_its_progress_and_worker(tmp_path: Path, viewer: View) -> None:
    """The overview has what executes, since when, how far, and who runs it; and the workers with their queues."""
    held = threading.Event()

    class Long(FSM, name="page.Long", queue="long"):
        def perform(self, args: Any, ctx: Ctx) -> None:
            ctx.progress(3, 8, "unpacking")
            held.wait(60)

    with Engine(tmp_path / "runs.db", queues={"long": 2}, name="presser") as engine:
        id_ = engine.insert(Long)
        eye = viewer(tmp_path / "runs.db")
        seen = seen_at_last(lambda: next((it for it in eye.get("overview")["running"] if it["progress"]), None))
        workers = eye.get("overview")["workers"]
        held.set()
        assert (seen["id"], seen["progress"][:3]) == (id_, [3, 8, "unpacking"])
        assert [(one["name"], one["queues"]) for one in workers] == [("presser", {"long": 2})]
        assert seen["worker"] == workers[0]["id"]


def ids_of(eye: Viewer, **filters: Any) -> list[int]:
    """All that the list of instances shows with these filters, page after page."""
    ids: list[int] = []
    before = None
    while True:
        found = eye.get("instances", q=json.dumps(filters), before=before)
        ids += [line["id"] for line in found["lines"]]
        if found["reached"] is None:
            return ids
        assert before is None or found["reached"] < before
        before = found["reached"]


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        ({}, [4, 3, 2, 1]),
        ({"status": ["failed"]}, [2]),
        ({"status": ["runnable", "awaiting_signal"]}, [4, 3]),
        ({"status": "done"}, [1]),
        ({"fsm": "cli.Broken"}, [4, 2]),
        ({"fsm": "Broken"}, [4, 2]),
        ({"fsm": "roken"}, []),
        ({"queue": "later"}, [4]),
        ({"key": "order:1"}, [1]),
        ({"error": "ON FIRE"}, [2]),
        ({"error": "%"}, []),
        ({"status": ["failed"], "kind": "the disk"}, [2]),
        ({"status": ["failed"], "kind": "another"}, []),
    ],
)
def test_the_list_of_instances_filters(shop: Path, viewer: View, filters: dict[str, Any], ids: list[int]) -> None:
    """By status, class (its name, or what stands behind a dot of it), queue, key, text of the error; newest first."""
    assert ids_of(viewer(shop), **filters) == ids


def test_pages_of_instances_show_each_once(tmp_path: Path, viewer: View) -> None:
    """All of many, whatever they are filtered by, and though ids between them are missing."""
    path = tmp_path / "many.db"
    with client(path, retention=0) as engine:
        engine.insert_all(Insert(CliOrder, step="ship") for _ in range(60))
        engine.drain()
        kept = engine.insert_all(Insert(CliOrder, queue="abc"[n % 3]) for n in range(240))
        engine.gc()
    eye = viewer(path)
    assert ids_of(eye) == kept[::-1]
    assert ids_of(eye, queue="b") == kept[1::3][::-1]
    assert ids_of(eye, status=["runnable"], queue="c") == kept[2::3][::-1]


def test_a_look_that_takes_too_long_is_gone_on_with(shop: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long what is looked for is not found: a request ends, with the id from which the next goes on."""
    monkeypatch.setattr(page, "_LOT", 1)
    monkeypatch.setattr(page, "LOOKS_FOR_S", 0.0)
    eye = viewer(shop)
    first = eye.get("instances", q='{"key": null, "fsm": "cli.Order"}')
    assert (first["lines"], first["reached"], first["looked_at"]) == ([], 4, 1)
    assert ids_of(eye, fsm="cli.Order") == [3, 1]


class Picky(FSM, name="page.Picky", max_attempts=1):
    def perform(self, args: dict[str, Any]) -> None:
        raise ValueError(f"order {args['n']} of 'customer {args['n']}' is unknown")


def test_failures_are_grouped_by_class_and_kind_of_error(shop: Path, viewer: View) -> None:
    """What differs from one to the next, numbers and quoted texts, makes no group of its own; the latest is shown."""
    with client(shop) as engine:
        ids = engine.insert_all(Insert(Picky, args={"n": n}) for n in range(5))
        engine.drain(with_scheduled=False)
    groups = viewer(shop).get("failures")["groups"]
    assert [(one["fsm"], one["count"]) for one in groups] == [("page.Picky", 5), ("cli.Broken", 1)]
    assert groups[0]["kind"] == "ValueError: order … of … is unknown"
    assert groups[0]["id"] in ids
    assert ids_of(viewer(shop), status="failed", kind=groups[0]["kind"]) == ids[::-1]


def test_one_instance_shows_its_past_and_what_it_waits_for(command: Command, shop: Path, viewer: View) -> None:
    """Its runs with the state before each, its state as it is written, and the words and the command of `show`."""
    seen = viewer(shop).get("instance", id=3)
    said = command("show", shop, 3).out
    assert seen["waits_for"].partition(", until")[0] in said
    assert seen["command"] in said
    assert [(run["step"], run["kind"], run["to"]) for run in seen["runs"]["items"]] == [("start", "await", "ship")]
    assert seen["runs"]["items"][0]["duration"] < 60
    assert json.loads(seen["it"]["state"]["text"]) == {}
    assert (seen["it"]["awaits"], seen["it"]["correlation_key"]) == (["paid"], "order:2")


def test_one_instance_shows_its_machine_with_its_step(shop: Path, viewer: View) -> None:
    """By its class's text and by what it did; where the class is not known, by what is seen in the histories."""
    machine = viewer(shop).get("instance", id=3)["machine"]
    assert (machine["steps"], machine["initial"], machine["standing"]) == (["start", "ship"], "start", {"ship": 1})
    taken = {(arrow["step"], arrow["outcome"], arrow["to"]): arrow["seen"] for arrow in machine["arrows"]}
    assert taken == {("start", "Await", "ship"): 1, ("ship", "Done", None): 0}
    connection = apsw.Connection(str(shop))
    connection.execute("UPDATE durable_instances SET fsm = 'gone.Order' WHERE fsm = 'cli.Order'")
    connection.close()
    machine = viewer(shop).get("instance", id=3)["machine"]
    assert {(arrow["step"], arrow["to"]): arrow["seen"] for arrow in machine["arrows"]} == {
        ("start", "ship"): 1,
        ("ship", None): 0,  # as another of its class did
    }
    assert not any(arrow["is_in_text"] for arrow in machine["arrows"])


def test_children_come_in_pages_those_first_that_need_somebody(tmp_path: Path, viewer: View) -> None:
    """A count by status and fifty at a time: failed before done, each once."""

    class Many(FSM, name="page.Many"):
        @step
        def start(self, ctx: Ctx) -> ScheduleChildren:
            return ScheduleChildren([Insert(Broken if n % 3 == 0 else CliOrder) for n in range(130)], then="start")

    path = tmp_path / "family.db"
    with client(path) as engine:
        parent = engine.insert(Many)
        engine.drain(queue="default")
    eye = viewer(path)
    pages = [eye.get("instance", id=parent)["children"]]
    assert pages[0]["tally"] == {"failed": 44, "runnable": 86}
    while pages[-1]["has_more"]:
        last = pages[-1]["items"][-1]
        pages.append(eye.get("children", id=parent, status=last["status"], after=last["id"]))
    shown = [(it["status"], it["id"]) for one in pages for it in one["items"]]
    assert [len(one["items"]) for one in pages] == [50, 50, 30]
    assert shown == sorted(shown, key=lambda it: (it[0] != "failed", it[1]))
    assert len(set(shown)) == 130
    assert [one["id"] for one in eye.get("instance", id=shown[0][1])["ancestors"]] == [parent]


def test_long_values_are_asked_for_by_themselves(tmp_path: Path, viewer: View) -> None:
    """A state of megabytes is shown as its length; asked for, it comes as it is written, numbers of any length too."""
    state = {"big": ["x" * 90] * 20_000, "exact": 12345678901234567890}
    with client(tmp_path / "long.db") as engine:
        id_ = engine.insert(CliOrder, state=state)
    eye = viewer(tmp_path / "long.db")
    seen = eye.get("instance", id=id_)["it"]["state"]
    assert seen["text"] is None
    assert seen["size"] > 1_800_000
    answer = eye.ask("/api/value", {"what": "state", "id": id_})
    assert len(answer.body) == seen["size"]
    assert answer.json == state


def test_a_target_is_an_id_or_a_key(shop: Path, viewer: View) -> None:
    """What somebody types into the page is looked for as both."""
    eye = viewer(shop)
    assert [eye.get("target", target=word)["id"] for word in ("2", "order:2", "broken:1")] == [2, 3, 2]
    assert eye.ask("/api/target", {"target": "nobody"}).status == 404


def test_who_has_the_same_answer_is_told_so(shop: Path, viewer: View) -> None:
    """A second look costs one status, 304, until the file has changed; then it is answered anew."""
    eye = viewer(shop)
    first = eye.ask("/api/instances")
    again = eye.ask("/api/instances", HTTP_IF_NONE_MATCH=first.headers["ETag"])
    assert (again.status, again.body) == (304, b"")
    with client(shop) as engine:
        id_ = engine.insert(CliOrder)
    answer = seen_at_last(
        lambda: (
            answer
            if (answer := eye.ask("/api/instances", HTTP_IF_NONE_MATCH=first.headers["ETag"])).status == 200
            else None
        )
    )
    assert answer.json["lines"][0]["id"] == id_


def test_one_look_answers_all_viewers(shop: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred who look at one thing cost the file what one costs."""
    made: list[int] = []
    real = page._overview

    def overview(*given: Any) -> Any:
        made.append(1)
        return real(*given)

    monkeypatch.setattr(page, "_overview", overview)
    eye = viewer(shop)
    with ThreadPoolExecutor(8) as pool:
        bodies = set(pool.map(lambda _: eye.ask("/api/overview").body, range(100)))
        assert len(bodies) <= len(made) < 50  # the time of day is part of an answer
        missing = set(pool.map(lambda _: eye.ask("/api/instance", {"id": 99}).status, range(100)))
    assert missing == {404}


def test_a_large_file_is_counted_apart_and_from_there_by_what_is_new(
    tmp_path: Path, viewer: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a count costs decides how often all is counted; in between what is new is added to it at once."""
    monkeypatch.setattr(page._Tally, "QUICK_S", -1.0)
    monkeypatch.setattr(page._Tally, "SHARE", 1_000_000)
    path = tmp_path / "large.db"
    with client(path, clock=Clock(time.time() - 100)) as engine:
        engine.insert_all(Insert(CliOrder, step="ship") for _ in range(50))
        engine.insert_all(Insert(Broken) for _ in range(7))
        engine.drain()
    eye = viewer(path)
    eventually(lambda: eye.get("overview")["is_counted"])
    with client(path) as engine:
        engine.insert_all(Insert(CliOrder, step="ship", queue="new") for _ in range(20))
        engine.insert(Broken)
        engine.drain(queue="new")
        expected = engine.counts()
    eventually(lambda: {one["name"]: one["tally"] for one in eye.get("overview")["queues"]} == expected)


def test_very_many_failures_are_grouped_apart(tmp_path: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look has the newest; soon all are there, and a new one joins them."""
    monkeypatch.setattr(page._Failures, "QUICK_S", 0.0)
    path = tmp_path / "bad.db"
    with client(path) as engine:
        engine.insert_all(Insert(Picky, args={"n": n}) for n in range(600))
    connection = apsw.Connection(str(path))
    error = "'ValueError: order ' || id || ' of ''customer 0'' is unknown'"
    connection.execute(f"UPDATE durable_instances SET status = 'failed', last_error = {error}")
    connection.close()
    eye = viewer(path)
    first = eye.get("failures")
    assert (first["groups"][0]["count"], first["looked_at"], first["is_all"]) == (500, 500, False)
    eventually(lambda: eye.get("failures")["groups"][0]["count"] == 600)
    with client(path) as engine:
        engine.insert(Picky, args={"n": 0})
        engine.drain()
    eventually(lambda: eye.get("failures")["groups"][0]["count"] == 601)


def test_a_large_file_answers_at_once(tmp_path: Path, viewer: View) -> None:
    """Of 60,000 rows each view is there in far under a second: no request reads all rows."""
    path = tmp_path / "large.db"
    with client(path) as engine:
        engine.insert_all(Insert(CliOrder, queue="abc"[n % 3]) for n in range(60_000))
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE durable_instances SET status = 'done', updated_at = updated_at - id WHERE id % 10")
    connection.execute("UPDATE durable_instances SET status = 'failed', last_error = 'x ' || id WHERE id % 100 = 1")
    connection.close()
    eye = viewer(path)
    views: list[tuple[str, dict[str, Any]]] = [
        ("overview", {}),
        ("instances", {}),
        ("instances", {"q": '{"key": "none"}'}),
        ("instances", {"q": '{"error": "none"}'}),
        ("instances", {"q": '{"status": "failed", "fsm": "none"}'}),
        ("failures", {}),
        ("instance", {"id": 9}),
    ]
    for name, query in views:
        eye.app._answers.forget()
        begun = time.thread_time()  # of the processor: the machine may have something else to do
        eye.get(name, **query)
        assert time.thread_time() - begun < 0.8, (name, query)


def every_view(eye: Viewer) -> None:
    """Ask for all that the page shows of the family, by each way that leads there."""
    filters: list[dict[str, Any]] = [{}, {"status": ["failed"]}, {"key": "order:2"}, {"schedule": "nightly"}]
    filters += [{"error": "x"}, {"fsm": "none"}, {"step": "start", "queue": "orders"}, {"kind": "x"}]
    for meant in (*filters, *({"status": [status]} for status in Status)):
        eye.get("instances", q=json.dumps(meant))
        eye.get("count", q=json.dumps(meant), verb="cancel")
    for name in ("overview", "failures"):
        eye.get(name)
    for id_ in ids_of(eye):
        eye.get("instance", id=id_)
        eye.get("children", id=id_)
        eye.get("runs", id=id_)
    for what in page._VALUES:
        eye.ask("/api/value", {"what": what, "id": 3, "name": 1})
    for target in ("3", "order:2"):
        eye.get("target", target=target)


def test_no_statement_of_the_page_reads_all_rows(family: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its rows by an index or by their ids, or has a limit; all are counted apart, by an index."""
    asked: set[str] = set()

    def note(traced: dict[str, Any]) -> None:
        asked.add(traced["sql"])

    def trace(connection: apsw.Connection) -> None:
        connection.trace_v2(apsw.SQLITE_TRACE_STMT, note)

    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, trace])
    with client(family, clock=Clock()) as engine:  # what is tried again, later
        engine.insert(Picky, args={"n": 0}, max_attempts=2, queue="again")
        engine.drain(queue="again", with_scheduled=False)
    asked.clear()
    every_view(viewer(family))
    constants = [text for text in vars(page).values() if isinstance(text, str) and text.lstrip().startswith("SELECT")]
    constants += [*page._LIVE_IDS.values(), *page._VALUES.values()]
    assert [text for text in constants if "{}" not in text and text not in asked] == []
    connection = apsw.Connection(str(family))
    for sql in (sql for sql in asked if "sqlite_schema" not in sql):
        info = apsw.ext.query_info(connection, sql, explain_query_plan=True)
        for detail in all_of(info.query_plan):
            if read := re.match(r"(SCAN|SEARCH) (durable_instances|durable_transitions|durable_signals|i|c)\b", detail):
                assert re.search("USING (COVERING )?INDEX|PRIMARY KEY", detail), (detail, sql)
                assert read[1] == "SEARCH" or "LIMIT" in sql or sql == page._ENDED_BEFORE, (detail, sql)
    connection.close()


def all_of(plan: Any) -> Iterator[str]:
    """The lines of a query's plan."""
    yield plan.detail
    for part in plan.sub or ():
        yield from all_of(part)


@pytest.mark.slow
def test_a_million_rows_answer_within_a_tenth_of_a_second(
    tmp_path: Path, viewer: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each view of them, made anew each time: the processor's time, at its best of several."""
    monkeypatch.setattr(page, "LOOKS_FOR_S", LOOKS_FOR_S)
    path = tmp_path / "million.db"
    with client(path) as engine:
        engine.insert(CliOrder)
    connection = apsw.Connection(str(path))
    columns = "fsm, version, step, state, max_crashes, queue, priority, eligible_at, weight, correlation_scope"
    connection.execute(f"""
        WITH RECURSIVE n(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM n WHERE n < 1000000)
        INSERT INTO durable_instances ({columns}, id, inserted_at, updated_at, status, last_error)
        SELECT {columns}, n, inserted_at, updated_at - (1000000 - n) * 80,
            CASE WHEN n > 900000 THEN 'runnable' WHEN n % 50 THEN 'done' ELSE 'failed' END,
            CASE WHEN n <= 900000 AND n % 50 = 0 THEN 'ValueError: order ' || n || ' is unknown' END
        FROM n, durable_instances WHERE id = 1""")
    connection.close()
    eye = viewer(path)
    eventually(lambda: eye.get("overview")["is_counted"])
    views: list[tuple[str, dict[str, Any]]] = [
        ("overview", {}),
        ("instances", {}),
        ("instances", {"q": '{"queue": "none"}'}),
        ("instances", {"q": '{"status": "failed", "fsm": "none"}'}),
        ("instances", {"q": '{"error": "none"}'}),
        ("failures", {}),
        ("instance", {"id": 500_000}),
    ]
    for name, query in views:
        took: list[float] = []
        for _ in range(10):
            eye.app._answers.forget()
            begun = time.thread_time()
            eye.get(name, **query)
            took.append(time.thread_time() - begun)
        assert min(took) < 0.1, (name, query, took)


# ---- The page and its file -----------------------------------------------------------------------


def test_a_file_that_was_replaced_is_shown_as_it_is_now(shop: Path, viewer: View, tmp_path: Path) -> None:
    """Another file under the same name is opened anew, by the next look."""
    eye = viewer(shop)
    assert len(ids_of(eye)) == 4
    with client(tmp_path / "other.db") as engine:
        engine.insert(CliOrder)
    os.replace(tmp_path / "other.db", shop)
    assert ids_of(eye) == [1]


def test_a_file_that_is_gone_is_told_in_words_and_found_again(shop: Path, viewer: View, tmp_path: Path) -> None:
    """While it is away each request says so, with what helps; when it is back it is shown."""
    eye = viewer(shop)
    assert len(ids_of(eye)) == 4
    shop.rename(tmp_path / "away.db")
    answer = eye.ask("/api/overview")
    assert (answer.status, answer.json["error"]) == (503, f"{shop}: no such file")
    assert "by itself" in answer.json["helps"]
    (tmp_path / "away.db").rename(shop)
    assert len(ids_of(eye)) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"no database" * 500), "no database"),
        (lambda path: path.mkdir(), "no file"),
        (lambda path: apsw.Connection(str(path)).execute("CREATE TABLE t (x)"), "no database of durable's"),
    ],
)
def test_what_is_no_file_of_durables_is_told_in_words(
    tmp_path: Path, viewer: View, make: Callable[[Path], object], words: str
) -> None:
    """Never a stack trace: one line that says what lies there."""
    make(tmp_path / "x.db")
    answer = viewer(tmp_path / "x.db").ask("/api/overview")
    assert answer.status == 503
    assert words in answer.json["error"]
    assert "Traceback" not in answer.body.decode()


def test_a_file_of_an_old_version_is_not_migrated_by_looking(tmp_path: Path, viewer: View) -> None:
    """Not even by the page that may write: it says what migrates it, and leaves the file as it is."""
    path = tmp_path / "old.db"
    connection = apsw.Connection(str(path))
    connection.execute(durable._SCHEMA)
    connection.execute("INSERT INTO durable_meta VALUES ('schema_version', '1')")
    connection.close()
    before = path.read_bytes()
    eye = viewer(path, write=True)
    assert "open an engine on it once to migrate it" in eye.ask("/api/overview").json["error"]
    assert "open an engine on it once to migrate it" in eye.do(verb="pause", queue="default").json["error"]
    assert path.read_bytes() == before


def test_a_file_that_is_locked_is_told_in_words(shop: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's write lock hinders no look; who wants to write hears of it when ten seconds, here less, are over."""
    monkeypatch.setattr(durable, "_LOCK_TIMEOUT_S", 0.2)
    eye = viewer(shop, write=True)
    holder = apsw.Connection(str(shop))
    holder.execute("BEGIN IMMEDIATE")
    assert eye.ask("/api/overview").status == 200
    answer = eye.do(verb="pause", queue="orders")
    assert (answer.status, "held the write lock" in answer.json["error"]) == (409, True)
    holder.execute("ROLLBACK")
    holder.close()


HOLDER = """
import apsw, sys
connection = apsw.Connection(sys.argv[1])
for sql in sys.argv[2:]:
    list(connection.execute(sql))
print("held", flush=True)
sys.stdin.readline()
connection.close()
"""


@pytest.mark.parametrize(
    "statements",
    [
        ["PRAGMA journal_mode = DELETE", "BEGIN EXCLUSIVE"],
        ["PRAGMA locking_mode = EXCLUSIVE", "UPDATE durable_meta SET value = value"],
    ],
)
def test_a_file_that_another_process_has_for_itself_is_told_and_found_again(
    shop: Path, viewer: View, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, statements: list[str]
) -> None:
    """All who ask meanwhile wait together, not one after another, and hear why; afterwards they see it."""
    monkeypatch.setattr(durable, "_LOCK_TIMEOUT_S", 2.0)
    monkeypatch.setattr(durable, "_LONG_WAIT_S", 0.0)  # each wait is told in the log
    eye = viewer(shop)
    words = [sys.executable, "-c", HOLDER, str(shop), *statements]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: eye.ask("/api/overview"), range(16)))
        holder.communicate("\n", timeout=PATIENCE)
    assert {answer.status for answer in answers} == {503}
    assert {"locked" in answer.json["error"] for answer in answers} == {True}
    waits = [record for record in caplog.records if "has had the lock" in record.message]
    assert 0 < len(waits) < 16  # one, but for a thread that began late
    assert eye.ask("/api/overview").status == 200
    assert len(ids_of(eye)) == 4


def test_a_file_is_shown_while_it_is_copied_and_vacuumed(shop: Path, viewer: View, tmp_path: Path) -> None:
    """Neither a snapshot nor a VACUUM keeps who looks from an answer, or shows half of the file."""
    eye = viewer(shop)

    def tidy() -> None:
        with client(shop) as engine, closing(apsw.Connection(str(shop))) as connection:
            connection.set_busy_timeout(int(1000 * PATIENCE))
            for n in range(10):
                engine.snapshot(tmp_path / f"copy{n}.db")
                connection.execute("VACUUM")

    with ThreadPoolExecutor(1) as pool:
        tidied = pool.submit(tidy)
        while not tidied.done():
            eye.app._answers.forget()
            assert len(ids_of(eye)) == 4
            assert sum(sum(one["tally"].values()) for one in eye.get("overview")["queues"]) == 4
        tidied.result()


def test_the_page_lets_go_of_a_file_that_nobody_looks_at(shop: Path, viewer: View) -> None:
    """Beside a file that was closed lies nothing; and the next look opens it again."""
    eye = viewer(shop)
    assert len(ids_of(eye)) == 4
    eye.app.close(unless_used_for_s=60)
    eye.app.close()
    assert [path.name for path in shop.parent.glob("shop.db*")] == ["shop.db"]
    assert len(ids_of(eye)) == 4


# ---- What the page does --------------------------------------------------------------------------


def test_a_page_that_may_not_write_refuses_to(shop: Path, viewer: View) -> None:
    """Without `write` every verb is refused, with the word that allows it, and changes nothing."""
    before = found(shop)
    refused: list[dict[str, Any]] = [{"verb": "retry", "id": 2}, {"verb": "pause", "queue": "orders"}]
    for asked in refused:
        answer = viewer(shop).do(**asked)
        assert answer.status == 403
        assert "--write" in answer.json["helps"]
    assert found(shop) == before
    assert viewer(shop).get("about")["write"] is False


def test_the_page_does_to_one_instance_what_the_methods_do(shop: Path, viewer: View) -> None:
    """Retry, cancel, signal, rewind: each says what it did."""
    eye = viewer(shop, write=True)
    assert eye.do(verb="retry", id=2).json["said"] == "Retried #2"
    assert get(shop, 2).status == Status.RUNNABLE
    assert eye.do(verb="cancel", id=4, options={"reason": "out of stock"}).json["said"] == "Cancelled #4"
    assert get(shop, 4).last_error == "out of stock"
    signal = {"name": "paid", "payload": '{"n": 12345678901234567890}', "dedup_key": "e1"}
    assert eye.do(verb="signal", id=3, options=signal).json["said"] == "Sent the signal to #3"
    with client(shop) as engine:
        engine.drain(queue="orders")
    assert get(shop, 3).result == {"amount": [{"n": 12345678901234567890}]}
    assert eye.do(verb="rewind", id=3, options={"to": "start", "state": '{"again": 1}'}).json["said"] == "Rewound #3"
    assert (get(shop, 3).step, get(shop, 3).state) == ("start", {"again": 1})


def test_the_page_pauses_resumes_and_triggers(tmp_path: Path, viewer: View) -> None:
    """Queues and schedules, by their names."""
    with client(tmp_path / "s.db") as engine:
        engine.schedule("nightly", CliOrder, durable.Every(3600))
    eye = viewer(tmp_path / "s.db", write=True)
    for verb, thing, name in [("pause", "queue", "orders"), ("pause", "schedule", "nightly")]:
        assert name in eye.do(verb=verb, **{thing: name}).json["said"]
    seen = seen_at_last(lambda: (it := eye.get("overview"))["schedules"][0]["is_paused"] and it)
    assert (seen["queues"][0]["name"], seen["queues"][0]["is_paused"]) == ("orders", True)
    for verb, thing, name in [("resume", "queue", "orders"), ("resume", "schedule", "nightly")]:
        assert eye.do(verb=verb, **{thing: name}).status == 200
    assert eye.do(verb="trigger", schedule="nightly").json["id"] == 1
    assert get(tmp_path / "s.db", 1).schedule == "nightly"


def test_a_filter_is_acted_on_after_a_count(shop: Path, viewer: View) -> None:
    """The count has those that the verb can mean; what came later than the count is left alone, a refusal is told."""
    with client(shop) as engine:
        ids = [engine.insert(Picky, args={"n": n}, correlation_key=f"k{n}") for n in range(5)]
        engine.drain(queue="default")
        engine.insert(CliOrder, correlation_key="k3")  # so that the fourth can't be retried
    eye = viewer(shop, write=True)
    meant = {"fsm": "Picky"}
    counted = eye.get("count", verb="retry", q=json.dumps(meant))
    assert (counted["count"], counted["reached"], counted["newest"]) == (5, None, [ids[-1]])
    with client(shop) as engine:
        later = engine.insert(Picky, args={"n": 9})
        engine.drain(queue="default")
    done, refused, before = 0, [], counted["newest"][0] + 1
    while before is not None:  # a request does what it can in a second
        said = eye.do(verb="retry", filter=meant, before=before).json
        done, before = done + said["done"], said["reached"]
        refused += said["refused"]
    assert done == 4
    assert [(one["id"], "k3" in one["why"]) for one in refused] == [(ids[3], True)]
    assert [get(shop, id_).status for id_ in (*ids, later)] == [
        "runnable" if id_ not in (ids[3], later) else "failed" for id_ in (*ids, later)
    ]


def test_a_filter_of_many_is_acted_on_piece_by_piece(tmp_path: Path, viewer: View) -> None:
    """Each request takes a second or two at most and says from where to go on, so that one sees it go and can stop."""
    with client(tmp_path / "many.db") as engine:
        engine.insert_all(Insert(CliOrder) for _ in range(450))
    eye = viewer(tmp_path / "many.db", write=True)
    before: int | None = 451
    done = 0
    while before is not None:
        said = eye.do(verb="cancel", filter={}, before=before).json
        assert said["done"] <= 200
        done, before = done + said["done"], said["reached"]
    assert done == 450
    with client(tmp_path / "many.db") as engine:
        assert engine.counts() == {"orders": {"failed": 450}}


@pytest.mark.parametrize(
    ("asked", "status", "words"),
    [
        ({"verb": "delete", "id": 1}, 400, "there is no 'delete'"),
        ({"verb": "retry", "id": "1"}, 400, "an id is a number"),
        ({"verb": "retry", "id": 99}, 404, "99"),
        ({"verb": "retry", "id": 1}, 409, "not failed"),
        ({"verb": "cancel", "id": 2}, 409, "had ended"),
        ({"verb": "signal", "id": 3, "options": {"name": "paid", "payload": "{"}}, 400, "payload is no JSON"),
        ({"verb": "signal", "id": 3, "options": {"name": "\ud800"}}, 400, "UTF-8"),
        ({"verb": "rewind", "id": 3, "options": {"to": ""}}, 400, "to which run"),
        ({"verb": "rewind", "id": 3, "options": {"to": 77}}, 400, "77"),
        ({"verb": "trigger", "schedule": "nope"}, 404, "nope"),
        ({"verb": "retry", "filter": {"status": ["odd"]}, "before": 9}, 400, "runnable"),
        ({"verb": "retry", "filter": {"where": "1=1"}, "before": 9}, 400, "a filter is"),
        ({"verb": "retry", "filter": {}}, 400, "before"),
        ({"verb": "retry", "filter": {}, "before": 1 << 63}, 400, "before"),
        ([], 400, "object"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(
    shop: Path, viewer: View, asked: Any, status: int, words: str
) -> None:
    """A refusal names what was given, or what stands in the way."""
    before = found(shop)
    answer = viewer(shop, write=True).ask("/api/do", method="POST", body=asked)
    assert (answer.status, found(shop)) == (status, before)
    assert words in answer.json["error"]


# ---- Who may ask for the page --------------------------------------------------------------------


def test_without_the_token_nothing_is_shown(shop: Path, viewer: View) -> None:
    """The page wants it in its address, or a cookie that it has set; data want it in a header, never a cookie."""
    eye = viewer(shop, token="secret")
    assert [eye.ask(path).status for path in ("/", "/api/overview", "/api/value")] == [401, 401, 401]
    assert [eye.ask("/", {"token": word}).status for word in ("wrong", "", "secrét")] == [401, 401, 401]
    opened = eye.ask("/", {"token": "secret"})
    assert opened.status == 200
    cookie = opened.headers["Set-Cookie"]
    assert "secret" not in cookie
    assert {"HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert eye.ask("/", HTTP_COOKIE=cookie.partition(";")[0]).status == 200
    assert eye.ask("/api/overview", HTTP_COOKIE=cookie.partition(";")[0]).status == 401
    assert eye.ask("/api/overview", {"token": "secret"}).status == 401
    assert eye.ask("/api/overview", HTTP_AUTHORIZATION="Bearer secret").status == 200
    assert eye.ask("/api/overview", HTTP_AUTHORIZATION="Bearer secre").status == 401


def test_a_foreign_name_in_the_host_header_is_refused(shop: Path, viewer: View) -> None:
    """A name of another site that was made to mean this machine gets nothing, with the token or without."""
    eye = viewer(shop, token="secret", hosts=["127.0.0.1:8000", "localhost"])
    for host, status in [("127.0.0.1:8000", 200), ("localhost:1", 200), ("evil.example", 421), ("", 421)]:
        assert eye.ask("/", {"token": "secret"}, HTTP_HOST=host).status == status
    assert eye.ask("/api/overview", HTTP_HOST="evil.example", HTTP_AUTHORIZATION="Bearer secret").status == 421


def test_by_which_names_a_mounted_page_is_asked_is_its_applications_affair(shop: Path, viewer: View) -> None:
    """Any will do behind a login, which another site's name has no share in; without one, `hosts` keeps others out."""
    assert viewer(shop).ask("/api/overview", HTTP_HOST="shop.example").status == 200
    guarded = viewer(shop, write=True, hosts=["localhost"])
    same_site = {"HTTP_HOST": "evil.example", "HTTP_SEC_FETCH_SITE": "same-origin"}
    assert guarded.ask("/api/overview", HTTP_HOST="localhost:8000").status == 200
    assert guarded.ask("/api/overview", **same_site).status == 421
    assert guarded.ask("/api/do", method="POST", body={"verb": "pause", "queue": "default"}, **same_site).status == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"HTTP_SEC_FETCH_SITE": "cross-site"},
        {"HTTP_SEC_FETCH_SITE": "same-site"},
        {"HTTP_ORIGIN": "https://evil.example"},
        {"HTTP_ORIGIN": "null"},
        {"HTTP_ORIGIN": "http://127.0.0.1:99"},
        {"HTTP_X_DURABLE": ""},
        {"CONTENT_TYPE": "text/plain"},
        {"CONTENT_TYPE": "application/x-www-form-urlencoded"},
    ],
)
def test_another_site_cannot_write(shop: Path, viewer: View, headers: dict[str, str]) -> None:
    """Though the browser would send what the user may send: no form, no script of another site, no other port."""
    before = found(shop)
    answer = viewer(shop, write=True).ask("/api/do", method="POST", body={"verb": "retry", "id": 2}, **headers)
    assert answer.status in (403, 415)
    assert found(shop) == before


def test_the_page_itself_may_write(shop: Path, viewer: View) -> None:
    """Behind a proxy that changes the Host header too, as far as the browser says that it is the same site."""
    for headers in (
        {"HTTP_ORIGIN": "http://127.0.0.1"},
        {"HTTP_SEC_FETCH_SITE": "same-origin", "HTTP_ORIGIN": "http://x"},
    ):
        asked = {"verb": "pause", "queue": "orders"}
        assert viewer(shop, write=True).ask("/api/do", method="POST", body=asked, **headers).status == 200


def test_another_site_gets_no_data(shop: Path, viewer: View) -> None:
    """What a foreign page asks the browser for is not answered."""
    assert viewer(shop).ask("/api/overview", HTTP_SEC_FETCH_SITE="cross-site").status == 403


@pytest.mark.parametrize("path", ["/", "/api/overview", "/api/nothing", "/api/value"])
def test_each_answer_says_how_it_may_be_used(shop: Path, viewer: View, path: str) -> None:
    """In no frame, as nothing else than it is, kept by nobody, refusals too."""
    headers = viewer(shop).ask(path).headers
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_the_page_runs_its_own_script_and_no_other(shop: Path, viewer: View) -> None:
    """Script and style stand in the page and are known by their hashes; nothing is fetched, framed or posted."""
    answer = viewer(shop).ask("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        assert policy[directive] == f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert (policy["base-uri"], policy["form-action"], policy["trusted-types"]) == ("'none'", "'none'", "'none'")
    page_text = answer.body.decode()
    assert set(re.findall(r"https?://[^'\"\s)]+", page_text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|<[^>]* (src|on\w+)=", page_text
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("DELETE", "/api/overview", 405),
        ("GET", "/api/do", 404),
        ("GET", "/../durable.py", 404),
        ("GET", "/api/instance", 400),
        ("HEAD", "/", 200),
        ("HEAD", "/api/overview", 200),
    ],
)
def test_other_methods_and_paths_are_refused(shop: Path, viewer: View, method: str, path: str, status: int) -> None:
    """A page, its data, and one place to write to; HEAD is GET without the body."""
    answer = viewer(shop, write=True).ask(path, method=method)
    assert answer.status == status
    assert method != "HEAD" or answer.body == b""


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/api/instance", {"id": "x"}),
        ("/api/instance", {"id": 1 << 70}),
        ("/api/instances", {"q": "["}),
        ("/api/instances", {"q": "[" * 100_000}),
        ("/api/instances", {"q": "[]"}),
        ("/api/instances", {"q": '{"queue": "\\ud800"}'}),
        ("/api/instances", {"q": '{"queue": 7}'}),
        ("/api/instances", {"before": "1e3"}),
        ("/api/children", {"id": 1, "status": "odd"}),
        ("/api/value", {"what": "password", "id": 1}),
        ("/api/count", {"verb": "x"}),
    ],
)
def test_bad_questions_get_a_line_that_says_what_was_bad(
    shop: Path, viewer: View, path: str, query: dict[str, Any]
) -> None:
    """Whatever a question has in it: status 400, an error in words, and no log of ours."""
    answer = viewer(shop).ask(path, query)
    assert answer.status == 400, answer.body
    assert answer.json["error"]


def test_a_request_says_how_long_it_is(shop: Path, viewer: View) -> None:
    """One without a length, or with too large a one, is not read."""
    eye = viewer(shop, write=True)
    for length in ("", "-1", "x", "999999999"):
        answer = eye.ask("/api/do", method="POST", body={"verb": "pause", "queue": "orders"}, CONTENT_LENGTH=length)
        assert answer.status == 413


def test_an_application_mounts_the_page_under_a_prefix(shop: Path, viewer: View) -> None:
    """With the prefix left in the path, or taken off by the server; without a slash at the end it is led there."""
    eye = viewer(shop, prefix="/ops/jobs")
    assert eye.ask("/ops/jobs/").status == 200
    assert eye.ask("/ops/jobs/api/about").status == 200
    assert eye.ask("/api/about", SCRIPT_NAME="/ops/jobs").status == 200
    led = eye.ask("/ops/jobs", {"a": 1})
    assert (led.status, led.headers["Location"]) == (308, "/ops/jobs/?a=1")
    led = eye.ask("", SCRIPT_NAME="/ops/jobs")
    assert (led.status, led.headers["Location"]) == (308, "/ops/jobs/")
    for prefix in ("jobs", "/jobs/", "/", "/a?b", None):
        with pytest.raises(ValueError, match="prefix must be"):
            page.make_app(shop, prefix=cast(str, prefix))


def test_the_application_keeps_to_wsgi(shop: Path, viewer: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers, as the checker of the standard library has it."""
    eye = viewer(shop, write=True, prefix="/jobs")
    monkeypatch.setattr(eye, "app", validator(cast(Any, eye.app)))
    etag = eye.ask("/api/instances").headers["ETag"]
    found = [
        eye.ask("/jobs").status,
        eye.ask("/jobs/").status,
        eye.ask("/jobs/", method="HEAD").status,
        eye.ask("/api/instances", HTTP_IF_NONE_MATCH=etag).status,
        eye.ask("/api/instance", {"id": "x"}).status,
        eye.ask("/api/none").status,
        eye.ask("/", method="DELETE").status,
        eye.do(verb="pause", queue="orders").status,
    ]
    assert found == [308, 200, 200, 304, 400, 404, 405, 200]


def test_a_prefix_may_have_any_letters(shop: Path, viewer: View) -> None:
    """WSGI has the bytes of a path as a string's letters; the address that leads there is spelled with codes."""
    given, led_to = "/auftr\u00e4ge".encode().decode("latin-1"), "/auftr%C3%A4ge/"
    eye = viewer(shop, prefix="/auftr\u00e4ge")
    assert eye.ask(f"{given}/api/about").status == 200
    assert eye.ask(given).headers["Location"] == led_to
    assert viewer(shop).ask("", SCRIPT_NAME=given).headers["Location"] == led_to


@contextmanager
def page_served(file: Path, *words: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`durable page` as a process, and the address that it prints."""
    process = start("page", file, *words)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()


def test_the_page_is_served_on_the_loopback_interface(shop: Path) -> None:
    """It prints its address with a token of its own, answers there, and a Ctrl-C ends it with status 0."""
    with page_served(shop) as (address, process):
        parts = urllib.parse.urlsplit(address)
        assert parts.hostname == "127.0.0.1"
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            assert b"<!doctype html>" in answer.read()
        token = urllib.parse.parse_qs(parts.query)["token"][0]
        data = f"http://{parts.netloc}/api/about"
        looked = urllib.request.Request(data.replace("about", "overview"), headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(looked, timeout=PATIENCE) as answer:
            assert "queues" in json.load(answer)
        asked = urllib.request.Request(data, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert json.load(answer)["file"] == str(shop)
        for refused, headers in ((f"http://{parts.netloc}/", {}), (address, {"Host": "evil.example"})):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(refused, headers=headers), timeout=PATIENCE)
            error.value.close()
            assert error.value.code in (401, 421)
    assert process.returncode == 0
    assert [path.name for path in shop.parent.glob("shop.db*")] == ["shop.db"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, "--expose"),
        (["--host", "192.0.2.1"], 2, "unencrypted"),
        (["--port", "70000"], 2, "not a port"),
        (["--port", "x"], 2, "--port"),
        (["no.module"], 1, "cannot be loaded"),
    ],
)
def test_the_page_is_not_served_to_others_by_accident(
    command: Command, shop: Path, words: list[str], status: int, said: str
) -> None:
    """Another interface asks for a word, and says what that means; what can't be meant is a usage error."""
    answer = command("page", shop, *words)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err


def test_the_page_of_a_missing_file_is_not_served(command: Command, tmp_path: Path) -> None:
    """It says so at once, and makes none."""
    answer = command("page", tmp_path / "none.db")
    assert (answer.status, list(tmp_path.iterdir())) == (1, [])
    assert "no such file" in answer.err


def test_a_port_that_is_taken_is_named(command: Command, shop: Path) -> None:
    """The page is not served, and what is said has the address."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        answer = command("page", shop, "--port", port)
    assert (answer.status, answer.out) == (1, "")
    assert f"at 127.0.0.1, port {port}: " in answer.err


def test_what_is_exposed_answers_to_addresses_and_its_own_names(shop: Path) -> None:
    """No name of another's: an address can't be made to mean another machine."""
    server, address = page.make_server(shop, host="0.0.0.0")
    with server:
        token = urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)["token"][0]
        eye = Viewer(shop)
        eye.app = cast(Any, server.get_app())
        for host, status in [
            ("10.1.2.3:80", 200),
            ("[fe80::1]:80", 200),
            (socket.gethostname(), 200),
            ("evil.example", 421),
        ]:
            assert eye.ask("/", {"token": token}, HTTP_HOST=host).status == status
        eye.app.close()


# ---- The page in a browser -----------------------------------------------------------------------


@attrs.frozen
class Chromium:
    """A browser, and the thread in which alone it may be used: its library takes the thread's event loop for itself."""

    thread: ThreadPoolExecutor
    browser: Any


def start_chromium(opened: ExitStack) -> Any:
    """Start a Chromium without a window; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    running = opened.enter_context(playwright.sync_playwright())
    try:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=1000 * PATIENCE)
    except playwright.Error as error:
        pytest.skip(f"no Chromium: apt install chromium, or playwright install chromium ({str(error)[:80]})")
    opened.callback(browser.close)
    return browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests."""
    with ThreadPoolExecutor(1) as thread:
        opened = ExitStack()
        try:
            yield Chromium(thread, thread.submit(start_chromium, opened).result())
        finally:
            thread.submit(opened.close).result()


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in the browser's thread."""

    @pytest.mark.browser
    @functools.wraps(test)
    def run(chromium: Chromium, **given: Any) -> None:
        chromium.thread.submit(test, **given).result()

    parameters = inspect.signature(test).parameters.values()
    first = inspect.Parameter("chromium", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    cast(Any, run).__signature__ = inspect.Signature([first, *parameters])
    return cast("Callable[..., None]", run)


KEEPS_WHAT_IS_SAID = """
window.said = [];
addEventListener('DOMContentLoaded', () => {
    const line = document.getElementById('said');
    new MutationObserver(() => said.push(line.textContent)).observe(line, { childList: true });
});
"""


class Screened:
    """A page in a browser: what it said on its console, what it asked of whom."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(1000 * PATIENCE)
        self.context.add_init_script(KEEPS_WHAT_IS_SAID)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda said: self.trouble.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("request", lambda request: self.asked.add(urllib.parse.urlsplit(request.url).netloc))
        self.page.goto(address)

    def go(self, place: str, waits_for: str = "h1") -> Any:
        """Go to a view, and wait for it: until it is drawn, what is waited for may stand in the one before."""
        kind, _, id_ = place.removeprefix("#/").partition("?")[0].partition("/")
        title = re.compile(rf"(\(\d+\) )?{f'#{id_}' if id_ else kind.title() or 'Overview'} · ")
        self.page.evaluate("place => { location.hash = place; }", place)
        eventually(lambda: title.match(self.page.title()) or self.page.wait_for_timeout(50))
        self.page.wait_for_selector(f"main >> {waits_for}")
        return self.page

    def hears(self, text: str) -> None:
        """Wait until the page has said that; its line is taken away after some seconds, however late one looks."""
        said = "text => window.said.some(one => one.includes(text))"
        eventually(lambda: self.page.evaluate(said, text) or self.page.wait_for_timeout(50))


@pytest.fixture
def screened(chromium: Chromium) -> Iterator[Callable[..., Screened]]:
    """Serve files and open their pages; in the end all that was opened is closed, and no page had trouble."""
    opened = ExitStack()
    screens: list[Screened] = []

    def show(file: Path, *, write: bool = False, **options: Any) -> Screened:
        server, address = page.make_server(file, write=write)
        opened.enter_context(server)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        opened.callback(thread.join)
        opened.callback(server.shutdown)
        opened.callback(cast(Any, server.get_app()).close)
        screens.append(Screened(chromium.browser, address, **options))
        opened.callback(screens[-1].context.close)
        return screens[-1]

    try:
        yield show
    finally:
        chromium.thread.submit(opened.close).result()
    assert [one.trouble for one in screens] == [[]] * len(screens)


Show = Callable[..., Screened]


@pytest.fixture
def family(shop: Path) -> Path:
    """The shop with a parent and its children, a long failure, a schedule, and an inbox."""
    with client(shop) as engine:
        engine.insert(Parent, correlation_key="family")
        engine.insert_all(Insert(Picky, args={"n": n}) for n in range(60))
        engine.schedule("nightly", CliOrder, durable.Every(3600))
        engine.drain(with_scheduled=False)
        engine.signal("order:2", "note", {"text": "hello"})
        engine.pause("later")
    return shop


VIEWS = ("#/", "#/instances", "#/failures", "#/instance/2", "#/instance/3", "#/instance/5")


@in_browser
def test_every_view_is_drawn_and_asks_nobody_else(family: Path, screened: Show) -> None:
    """No word on the console, no request to another host; the token is gone from the address."""
    one = screened(family)
    for place in VIEWS:
        text = one.go(place).locator("main").inner_text()
        assert len(text) > 40
    assert "token" not in one.page.url
    assert one.asked == {urllib.parse.urlsplit(one.page.url).netloc}


@in_browser
def test_the_page_is_live(family: Path, screened: Show) -> None:
    """What another process commits is there without a reload, and what has the focus keeps it."""
    one = screened(family)
    one.go("#/instances", "table")
    one.page.locator("main table a").nth(4).focus()
    focused = one.page.evaluate("() => document.activeElement.textContent")
    with client(family) as engine:
        id_ = engine.insert(CliOrder, correlation_key="fresh")
    one.page.wait_for_selector(f"main table >> text=#{id_}", timeout=1000 * PATIENCE)
    assert one.page.evaluate("() => document.activeElement.textContent") == focused
    one.go(f"#/instance/{id_}", "text=runnable")
    with client(family) as engine:
        engine.drain(queue="orders", with_scheduled=False)
    one.page.wait_for_selector("main >> text=awaiting signal", timeout=1000 * PATIENCE)


HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202egnp.exe\u0007\"'&amp;"


@in_browser
def test_nothing_of_the_users_is_taken_as_html(tmp_path: Path, screened: Show) -> None:
    """Names, keys, states, errors, payloads, calls, notes: shown as text, marks that would steer it by their codes."""

    class Hostile(FSM, name=f"h.{HOSTILE}", queue=HOSTILE):
        def step(self, name: str, ctx: Ctx) -> Any:
            if name == "start":
                ctx.call(HOSTILE, str)
                return Await(HOSTILE, then=HOSTILE, state={HOSTILE: [HOSTILE, "\ud800"]})
            return Stop(HOSTILE)

    path = tmp_path / "hostile.db"
    with client(path, name=HOSTILE) as engine:
        failed = engine.insert(Hostile, correlation_key=HOSTILE)
        engine.drain()
        engine.signal(HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
        engine.drain()
        parked = engine.insert(Hostile, correlation_key=HOSTILE)
        engine.drain()
        engine.signal(parked, "other", HOSTILE)
        engine.schedule(HOSTILE, Hostile, durable.Every(3600))
    one = screened(path, write=True)
    for place in ("#/", "#/instances", "#/failures", f"#/instance/{failed}", f"#/instance/{parked}"):
        shown = one.go(place, "text=<img src=x")
        assert shown.locator("main img, main script").count() == 0
        assert "\\u202e" in shown.locator("main").inner_text()
        assert "\u202e" not in shown.locator("main").inner_text()
    one.page.get_by_role("button", name="Cancel…").click()
    one.page.wait_for_selector("dialog[open]")
    assert one.page.locator("dialog img").count() == 0


@in_browser
def test_the_keyboard_is_enough(family: Path, screened: Show) -> None:
    """From the overview to a failure, and to its retry, without a pointer; each key is listed under `?`."""
    one = screened(family, write=True)
    one.page.wait_for_selector("main h1")
    press = one.page.keyboard.press
    press("?")
    one.page.wait_for_selector("dialog[open]")
    assert one.page.locator("dialog kbd").count() > 8
    press("Escape")
    press("3")
    press("j")
    press("j")
    press("Enter")
    one.page.wait_for_selector("main h1 >> text=Instances")
    one.go("#/instance/2", "text=Last error")
    one.page.get_by_role("button", name="Retry…").focus()
    press("Enter")
    one.page.wait_for_selector("dialog[open]")
    press("Tab")
    press("Enter")
    one.hears("Retried #2")
    assert get(family, 2).status == Status.RUNNABLE
    for key in "/order:2":
        press(key)
    eventually(lambda: one.page.locator("main tbody tr").count() == 1 or one.page.wait_for_timeout(50))


@in_browser
def test_a_key_is_heard_as_soon_as_a_dialog_is_closed(family: Path, screened: Show) -> None:
    """Closed, a dialog keeps the focus until its event has come; a key in between is no longer the dialog's."""
    one = screened(family)
    one.page.wait_for_selector("main h1")
    one.page.keyboard.press("?")
    one.page.wait_for_selector("dialog[open]")
    one.page.evaluate(
        "() => { document.querySelector('dialog').close();"
        " document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: '3', bubbles: true})); }"
    )
    one.page.wait_for_selector("main h1 >> text=Failures")


@in_browser
@pytest.mark.parametrize(
    ("keys", "fragment"),
    [
        (["2", "j", "j", "Enter"], "#/instance/66"),
        (["/", *"order:3"], "#/instances?key=order%3A3"),
        (["/", "3", "Enter"], "#/instance/3"),
        (["2", "3"], "#/failures"),
    ],
)
def test_keys_wait_for_the_view_that_they_are_meant_for(
    family: Path, screened: Show, keys: list[str], fragment: str
) -> None:
    """However long a view is on its way: what is typed meanwhile acts on that one, as if it had been there."""
    one = screened(family)
    one.page.wait_for_selector("main h1")
    held: list[Any] = []
    are_let_go: list[bool] = []
    one.page.route("**/api/instances*", lambda asked: asked.continue_() if are_let_go else held.append(asked))
    for key in keys:
        one.page.keyboard.press(key)
    one.page.wait_for_timeout(100)
    are_let_go.append(True)
    for asked in held:
        asked.continue_()
    eventually(lambda: one.page.url.endswith(fragment) or one.page.wait_for_timeout(50))


@in_browser
def test_the_fields_of_the_filter_say_what_is_filtered(family: Path, screened: Show) -> None:
    """Also where a link has set the filter beside them, and after a step back; what is typed stays as it was typed."""
    one = screened(family)

    def given() -> dict[str, str]:
        fields = one.page.evaluate("() => Object.fromEntries(new FormData(document.querySelector('#filters')))")
        return {name: value for name, value in fields.items() if value}

    one.go("#/instances", "table")
    assert given() == {}
    one.page.locator("main td a.name", has_text="default").first.click()
    eventually(lambda: given() == {"queue": "default"} or one.page.wait_for_timeout(50))
    one.page.locator("#filters [name=fsm]").fill("Picky")
    eventually(lambda: one.page.url.endswith("?fsm=Picky&queue=default") or one.page.wait_for_timeout(50))
    assert given() == {"queue": "default", "fsm": "Picky"}
    one.page.go_back()
    eventually(lambda: given() == {} or one.page.wait_for_timeout(50))


@in_browser
def test_a_filter_is_acted_on_after_a_preview_of_how_many(family: Path, screened: Show) -> None:
    """It says how many and which first, does nothing when one leaves it, and says what it did."""
    one = screened(family, write=True)
    one.go("#/instances?fsm=page.Picky", "table")
    one.page.get_by_role("button", name="Retry those…").click()
    one.page.wait_for_selector("dialog >> text=60 pass it that have failed")
    one.page.get_by_role("button", name="Leave it").click()
    with client(family) as engine:
        assert engine.counts()["default"]["failed"] == 62
    one.page.get_by_role("button", name="Retry those…").click()
    one.page.get_by_role("button", name="Retry 60").click()
    one.hears("Retried 60.")
    with client(family) as engine:
        assert engine.counts()["default"] == {"failed": 2, "runnable": 60}


@in_browser
def test_each_verb_asks_once_and_says_what_it_did(family: Path, screened: Show) -> None:
    """A button opens a question; its answer does it, in one click, and a line says so."""
    one = screened(family, write=True)

    def press(button: str, confirm: str, said: str, **fields: str) -> None:
        one.page.get_by_role("button", name=button).first.click()
        for name, value in fields.items():
            one.page.locator(f"dialog [name={name}]").fill(value)
        one.page.locator("dialog").get_by_role("button", name=confirm, exact=True).click()
        one.hears(said)
        one.page.wait_for_selector("dialog", state="detached")

    one.go("#/", "text=nightly")
    press("Trigger…", "Trigger", "Inserted an instance of the schedule nightly")
    press("Resume…", "Resume", "Resumed the queue later")
    one.go("#/instance/3", "text=Inbox")
    press("Signal…", "Signal", "Sent the signal to #3", name="paid", payload='{"n": 1}')
    press("Cancel…", "Cancel", "Cancelled #3", reason="enough")
    one.page.wait_for_selector("main >> text=enough")
    one.page.get_by_role("button", name="Rewind…").first.click()
    one.page.locator("dialog select").select_option("1")
    one.page.locator("dialog textarea").fill('{"again": true}')
    one.page.get_by_role("button", name="Rewind", exact=True).click()
    one.hears("Rewound #3")
    with client(family) as engine:
        it = engine.get(3)
        assert (it.status, it.step, it.state) == ("runnable", "start", {"again": True})


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@in_browser
def test_axe_finds_no_serious_fault(family: Path, screened: Show, scheme: str, width: int) -> None:
    """Names, roles, contrast, order of headings: of every view and of a dialog; and nothing is wider than a phone."""
    axe = pytest.importorskip("axe_playwright_python", reason="pip install '.[browser]'")
    source = Path(axe.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    one = screened(family, write=True, color_scheme=scheme, viewport={"width": width, "height": 844}, bypass_csp=True)
    one.page.evaluate(source)

    def check(place: str) -> None:
        faults = one.page.evaluate("async () => (await axe.run()).violations")
        serious = [(it["id"], it["nodes"][0]["html"]) for it in faults if it["impact"] in ("serious", "critical")]
        assert serious == [], place
        assert one.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), place

    for place in VIEWS:
        one.go(place)
        check(place)
    one.go("#/instance/2", "text=Last error")
    one.page.get_by_role("button", name="Rewind…").click()
    one.page.wait_for_selector("dialog[open]")
    check("dialog")


@pytest.mark.slow
@in_browser
def test_ten_megabytes_and_ten_thousand_children_do_not_freeze_it(tmp_path: Path, screened: Show) -> None:
    """A long state is unfolded when it is asked for, children are a count and a page; the page goes on beating."""

    class Huge(FSM, name="page.Huge"):
        @step
        def start(self, ctx: Ctx) -> ScheduleChildren:
            return ScheduleChildren([Insert(CliOrder) for _ in range(10_000)], then="start")

    path = tmp_path / "huge.db"
    with client(path) as engine:
        id_ = engine.insert(Huge, state={"rows": [{"n": n, "text": "x" * 80} for n in range(100_000)]})
        engine.drain(queue="default")
    one = screened(path)
    one.go(f"#/instance/{id_}", "text=10,000 runnable")
    assert one.page.locator("main .tree li").count() == 51
    one.page.get_by_role("button", name="50 more").click()
    eventually(lambda: one.page.locator("main .tree li").count() == 101 or one.page.wait_for_timeout(50))
    one.page.evaluate(
        "() => { let at = performance.now(); window.longest = 0; setInterval(() => {"
        " window.longest = Math.max(window.longest, performance.now() - at); at = performance.now(); }, 20); }"
    )
    one.page.get_by_role("button", name=re.compile(r"Show .* MB")).click()
    one.page.locator("main .json summary").nth(1).click()
    one.page.wait_for_selector("main .json >> text=100 more of 99,900")
    assert one.page.evaluate("() => window.longest") < 10_000  # milliseconds; a few hundred on a quiet machine


@in_browser
def test_a_file_that_goes_away_is_told_on_the_page(shop: Path, screened: Show, tmp_path: Path) -> None:
    """What was seen last stays to be seen, with a line that says what is wrong, until it is back."""
    one = screened(shop)
    one.go("#/instances", "table")
    shop.rename(tmp_path / "away.db")
    one.page.wait_for_selector("main [role=alert] >> text=no such file")
    assert one.page.locator("main tbody tr").count() == 4
    (tmp_path / "away.db").rename(shop)
    one.page.wait_for_selector("main [role=alert]", state="detached")
    one.trouble.clear()  # the browser's own words for the answers in between


# ---- Several machines ----------------------------------------------------------------------------

# Against a real PostgreSQL, which these tests start where one is installed and DURABLE_TEST_POSTGRES is set: in the
# larger run .ci/test.py sees to both.

_POSTGRES = "DURABLE_TEST_POSTGRES"

LONG = 5 * PATIENCE
"""What hundreds of jobs have, in several processes on a machine that is busy with others."""

_PG_WAITS = ("-w", "-t", f"{LONG:.0f}")
"""A server that takes its time to start has failed only then: another on its folder would find it running."""


def free_port() -> int:
    """A port that is free, and below those that clients are given: none takes it while the server restarts."""
    for port in random.sample(range(15000, 32000), 100):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


class Server:
    """A PostgreSQL server of the tests' own, as an unprivileged user, without the syncs that a power cut would need."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        is_root = os.geteuid() == 0  # as whom it does not run; nor may others look into the temporary folder of root's
        self._user = ["runuser", "-u", "postgres", "--"] if is_root else []
        self.folder = Path(tempfile.mkdtemp(prefix="durable-postgres-", dir="/tmp" if is_root else None))
        if is_root:
            shutil.chown(self.folder, "postgres")
        self.port = 0
        self._count = itertools.count(1)

    def start(self) -> None:
        """Make the server and start it."""
        how = ["-A", "trust", "-U", "postgres", "--no-sync", "--no-locale", "-E", "UTF8"]
        self._run("initdb", "-D", self.folder / "data", *how)
        with (self.folder / "data" / "pg_hba.conf").open("a") as access:
            access.write("host all all 10.0.0.0/8 trust\n")
        for _ in range(9):  # between a port's being found and its being bound another process may take it
            with suppress(subprocess.CalledProcessError):
                self.port = free_port()
                self._start()
                break
        else:
            raise AssertionError((self.folder / "log").read_text(encoding="utf-8"))
        self.execute("postgres", "CREATE DATABASE template_durable")
        DBOSEngine(self.url("template_durable"), queues={}).stop()

    def restart(self) -> None:
        """Stop it at once, as a crash would, and start it again."""
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", *_PG_WAITS, "stop")
        self._start()

    def close(self) -> None:
        """Stop it and leave nothing behind."""
        with suppress(subprocess.CalledProcessError):  # it did not start
            self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", *_PG_WAITS, "stop")
        shutil.rmtree(self.folder)

    def database(self) -> str:
        """The URL of a new database that has the tables."""
        name = f"test_{next(self._count)}"
        self.insist(f"CREATE DATABASE {name} TEMPLATE template_durable")
        return self.url(name)

    def url(self, name: str, host: str = "127.0.0.1") -> str:
        """The URL of a database."""
        return f"postgresql://postgres@{host}:{self.port}/{name}"

    def execute(self, name: str, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement in a database."""
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            cursor = connection.execute(cast(Any, sql))
            return cursor.fetchall() if cursor.description else []

    def insist(self, sql: str) -> None:
        """Run a statement about a whole database, for whose sessions to end the server itself waits only 5 s."""

        def is_done() -> bool:
            with suppress(psycopg.errors.ObjectInUse):
                self.execute("postgres", sql)
                return True
            return False

        eventually(is_done)

    def _start(self) -> None:
        settings = {
            "port": self.port,
            "listen_addresses": "*",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "full_page_writes": "off",
            "max_connections": 200,
        }
        options = " ".join(f"-c {name}={value!s}" for name, value in settings.items())
        self._run("pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options, *_PG_WAITS, "start")

    def _run(self, program: str, *arguments: object) -> None:
        subprocess.run(
            [*self._user, str(self._programs / program), *map(str, arguments)],
            check=True,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
        )


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A PostgreSQL server, started for these tests."""
    if not os.environ.get(_POSTGRES):
        pytest.skip(f"needs a PostgreSQL of its own: set {_POSTGRES}=1 where one is installed, as the larger run does")
    installed = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]
    assert installed, f"{_POSTGRES} is set, and no PostgreSQL is installed here"
    log = logging.getLogger("dbos")  # to which DBOS would give the stderr of the first test, closed at that test's end
    log.addHandler(logging.StreamHandler(sys.__stderr__))
    log.propagate = False
    server = Server(installed[0].parent)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """A new database."""
    url = server.database()
    yield url
    server.insist(f"DROP DATABASE {name_of(url)} WITH (FORCE)")


def name_of(url: str) -> str:
    """The name of a URL's database."""
    return url.rpartition("/")[2]


@pytest.fixture
def _patient_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tests of the engine on a file."""
    monkeypatch.setattr(machines._Loop.close, "__defaults__", (PATIENCE,))


@pytest.fixture
def make_engine(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DBOSEngine]]:
    """A factory of engines on the test's database, for tests of the engine on a file; `clock` is their Core's."""
    engines: list[DBOSEngine] = []

    def make(**options: Any) -> DBOSEngine:
        clock = options.pop("clock", None)
        for name in ("synchronous", "prefetch"):
            options.pop(name, None)
        if clock is not None:
            monkeypatch.setattr(machines._Core, "clock", lambda _: clock())
        engines.append(DBOSEngine(url, **options))
        return engines[-1]

    yield make
    for engine in reversed(engines):
        engine.stop()


def on_postgres(test: Any) -> Any:
    """The same test, against a PostgreSQL server: `make_engine` here is that of this module."""
    copied = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copied.__dict__.update(test.__dict__)
    copied.__doc__, copied.__annotations__, copied.__module__ = test.__doc__, test.__annotations__, __name__
    # A thread of DBOS's may outlive its engine, with a connection that nobody closes.
    left = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning").mark
    cast(Any, copied).pytestmark = [*getattr(test, "pytestmark", ()), pytest.mark.postgres.mark, left]
    return copied


SAME = [
    "test_who_awaits_a_future_that_is_cancelled_is_cancelled",
    "test_who_gives_up_waiting_leaves_nothing_in_the_future",
    "test_who_is_cancelled_at_the_start_of_an_async_block_leaves_no_engine_running",
    "test_a_step_that_the_callers_loop_cancels_runs_again",
    "test_a_task_that_a_step_left_behind_ends_with_the_engine",
    "test_what_a_task_left_behind_fails_with_at_its_end_is_logged",
    "test_an_engine_is_not_copied",
    "test_fsms_takes_one_object_of_a_class",
    "test_insert_writes_every_option_into_its_column",
    "test_cancel_of_a_running_step_drops_its_outcome",
    "test_cancel_of_a_running_step_holds_however_it_ends",
    "test_a_cancelled_step_that_would_go_on_does_not",
    "test_retry_runs_a_failed_instance_again_from_its_current_step",
    "test_retry_shows_the_step_what_it_had_been_shown",
    "test_retry_of_what_was_cancelled_while_it_waited_waits_again",
    "test_retry_wakes_at_once_what_has_missed_its_deadline_meanwhile",
    "test_retry_does_not_wait_again_for_what_has_come_or_run_out",
    "test_retry_of_a_parent_waits_for_the_children_that_live",
    "test_retry_of_a_join_waits_for_a_child_that_is_retried_too",
    "test_retry_of_a_later_step_does_not_wait_for_children_of_an_earlier_one",
    "test_what_was_cancelled_while_it_waited_can_be_rewound_as_well",
    "test_drain_counts_what_it_ran",
    "test_drain_counts_future_work_as_due_unless_told_otherwise",
    "test_drain_does_not_fire_deadlines_before_the_clock_does",
    "test_drain_runs_all_queues_but_paused_ones_or_the_one_named",
    "test_a_started_engine_is_not_drained",
    "test_an_argument_that_cannot_be_meant_is_named",
    "test_a_timeout_is_any_number_of_seconds",
    "test_result_raises_when_its_time_is_up",
    "test_who_waits_for_what_nobody_runs_is_told_in_the_log",
    "test_async_steps_of_a_drain_share_no_context_variables",
    "test_a_wider_scope_reserves_the_key_until_the_row_is_collected",
    "test_a_signal_of_another_name_is_stored_and_wakes_nobody",
    "test_a_signal_has_an_id_a_name_and_the_instant_it_was_sent",
    "test_a_dedup_key_makes_redelivery_a_no_op_also_after_consumption",
    "test_a_dedup_key_is_the_names_own",
    "test_a_dedup_key_holds_among_racing_threads",
    "test_next_deletes_exactly_the_awaited_signals_it_was_shown",
    "test_a_set_is_collected_by_awaiting_again_with_one_wake_for_each_signal",
    "test_signals_that_came_together_are_one_wake",
    "test_a_new_await_is_woken_by_what_came_while_its_step_ran",
    "test_a_new_await_for_another_name_is_woken_by_an_older_signal",
    "test_an_await_after_awaiting_something_else_is_woken_by_what_was_shown_long_ago",
    "test_an_await_of_handle_is_not_woken_by_what_its_step_was_shown",
    "test_an_await_of_handle_is_woken_by_what_came_while_its_step_ran",
    "test_a_deadline_wakes_with_nothing_and_leaves_the_attempt",
    "test_a_timeout_of_zero_wakes_at_once",
    "test_a_signal_and_a_deadline_are_one_wake",
    "test_a_deadline_wakes_a_collecting_set_with_what_has_arrived",
    "test_a_parent_is_parked_until_all_children_have_ended_and_sees_them_all",
    "test_children_are_inserted_all_or_none",
    "test_refused_duplicates_are_not_counted_and_none_at_all_is_no_wait",
    "test_children_may_have_children",
    "test_a_later_round_shows_the_children_of_earlier_ones_too",
    "test_a_child_that_was_collected_is_shown_no_more",
    "test_cancelling_a_parent_leaves_its_children_and_a_cancelled_child_wakes_it",
    "test_a_retried_child_is_waited_for_again",
    "test_a_child_whose_key_is_taken_by_now_is_not_waited_for_again",
    "test_the_history_of_a_machine_has_every_outcome",
    "test_an_error_that_handle_has_answered_stands_in_the_history",
    "test_a_job_keeps_only_its_failed_attempts",
    "test_what_handle_answers_with_an_end_stands_in_the_history",
    "test_a_crash_stands_in_the_history_with_its_cause",
    "test_a_running_step_that_is_cancelled_is_entered_once",
    "test_a_cancelled_run_stands_in_the_history_as_any_other",
    "test_a_run_that_was_cancelled_is_the_latest_of_its_step",
    "test_what_the_end_of_a_job_has_emptied_comes_back",
    "test_rewind_past_a_consumption_brings_the_signal_back",
    "test_children_of_what_is_rewound_go_on_without_a_parent",
    "test_a_running_instance_cannot_be_rewound_but_forked",
    "test_the_state_of_a_schedule_from_an_earlier_version_is_migrated",
    "test_each_class_says_how_long_its_instances_are_kept",
    "test_a_call_is_not_repeated_by_a_repeat_of_its_step",
    "test_what_a_call_raises_is_raised_and_its_name_is_free_again",
    "test_calls_that_cannot_be_meant_are_refused",
    "test_progress_goes_with_an_instance_that_is_cancelled_while_it_waits",
    "test_progress_of_a_running_step_is_read_by_others",
    "test_a_step_may_have_a_rule_of_its_own",
    "test_exit_out_of_a_step_is_a_crash_that_the_worker_survives",
    "test_job_fails_when_crashes_use_up_its_attempts",
    "test_exit_out_of_drain_is_raised_on_after_its_commit",
    "test_overdue_coroutine_is_cancelled",
    "test_a_cancel_reaches_a_running_coroutine",
    "test_a_cancel_reaches_a_coroutine_of_a_drain",
    "test_a_cancelled_coroutine_cleans_up_undisturbed",
    "test_a_coroutine_that_took_no_notice_of_a_cancel_hears_of_the_stop",
    "test_a_step_of_a_drain_is_told_that_it_is_over_its_timeout",
    "test_what_a_job_failed_with_stands_in_the_history_whatever_handle_makes_of_it",
    "test_new_code_takes_over_what_old_code_has_left",
    "test_a_migrate_that_fails_is_for_handle",
    "test_what_ends_right_after_a_migrate_has_the_state_of_its_version",
    "test_a_run_that_handle_has_answered_for_a_migrate_is_of_the_version_that_it_had",
    "test_an_answer_for_a_migrate_that_is_not_committed_leaves_the_version",
    "test_an_answer_for_a_migrate_without_a_state_leaves_what_is_stored",
    "test_an_answer_for_a_migrate_may_set_the_state_in_its_place",
    "test_a_migrate_from_job_to_machine_or_back_brings_the_rule_of_its_kind",
    "test_a_run_from_before_a_migrate_is_migrated_when_it_is_gone_back_to",
    "test_a_run_from_before_a_migrate_is_its_own_classs_where_that_is_known",
    "test_a_state_given_for_a_run_from_before_a_migrate_is_of_the_version_that_the_row_has",
    "test_a_rewind_past_a_migrate_can_be_undone",
    "test_a_run_that_no_class_would_take_is_not_gone_back_to",
    "test_going_back_past_a_migrate_between_job_and_machine_brings_the_rule_of_its_kind",
    "test_check_of_code_that_is_older_than_the_file_says_so",
]
"""Tests of the engine on a file that hold on PostgreSQL word by word."""

for _name in filter(vars(test_durable).get, SAME):
    globals()[f"{_name}_on_postgres"] = on_postgres(vars(test_durable)[_name])

clock, gate = test_durable.clock, test_durable.gate


def test_what_holds_on_postgres_word_by_word_is_tested_on_files() -> None:
    """The tests that are run on both engines are those of the engine on a file."""
    assert [name for name in SAME if name not in vars(test_durable)] == []


WORKERS = """
import sys, time
import durable
from durable import FSM, Done, Insert, ScheduleChildren, step
from durable_tools.dbos import DBOSEngine

@durable.job(name="trial.work")
def work(n: int, ctx, seconds: float = 0.02):
    time.sleep(seconds)
    ctx.execute("INSERT INTO effects (job, attempt) VALUES (?, ?)", (n, ctx.attempt))

class Tree(FSM, name="trial.Tree"):
    @step
    def start(self, ctx):
        n = ctx.state["n"]
        return ScheduleChildren([Insert(work, args={"n": 100 * n + child}) for child in range(20)], then="join")

    @step
    def join(self, ctx):
        ctx.execute("INSERT INTO effects (job, attempt) VALUES (?, ?)", (100_000 + ctx.state["n"], ctx.attempt))
        return Done(sum(child.status == "done" for child in ctx.children))
"""
WORKER = f"""
{WORKERS}
if __name__ == "__main__":
    queues = {{"default": 10, "trees": 2}}
    with DBOSEngine(sys.argv[1], queues=queues, lease_ttl=float(sys.argv[2]), heartbeat_interval=0.5):
        print("ready", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start engines in processes of their own, ready when they are returned; killed at the end."""
    script = tmp_path / "trial_worker.py"
    script.write_text(WORKER, encoding="utf-8")
    processes: list[subprocess.Popen[str]] = []

    def start(url: str, lease: float = 600, before: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, str(script), url, str(lease)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        with process:
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture
def trial(url: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DBOSEngine]:
    """A client of a new database that has a table for what jobs do, and knows their classes."""
    (tmp_path / "trial_classes.py").write_text(WORKERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("trial_classes")
    server.execute(
        name_of(url), "CREATE TABLE effects (job bigint PRIMARY KEY, attempt bigint, at timestamptz DEFAULT now())"
    )
    engine = DBOSEngine(url, queues={})
    yield engine
    engine.stop()
    sys.modules.pop("trial_classes")


def insert_jobs(engine: DBOSEngine, count: int, first: int = 0, **args: Any) -> None:
    """Insert so many jobs, numbered."""
    engine.insert_all([Insert("trial.work", args={"n": n, **args}) for n in range(first, first + count)])


def effects(server: Server, url: str) -> list[int]:
    """The jobs whose effects are in the database, each once: its number is a primary key."""
    return [job for (job,) in server.execute(name_of(url), "SELECT job FROM effects ORDER BY job")]


def effects_from(server: Server, url: str, first: int = 0) -> int:
    """How many jobs from that number on have left theirs."""
    return cast(int, server.execute(name_of(url), f"SELECT count(*) FROM effects WHERE job >= {first}")[0][0])


@contextmanager
def closing_engine(engine: DBOSEngine) -> Iterator[DBOSEngine]:
    """An engine that is not started, and is stopped at the end."""
    try:
        yield engine
    finally:
        engine.stop()


@pytest.mark.postgres
def test_the_first_program_runs_on_postgres(url: str) -> None:
    """The README's first machine, unchanged: a signal, a result, a key that is free again."""

    class Checkout(FSM, name="machines.Checkout", queue="checkout"):
        @attrs.frozen
        class State:
            order: int
            paid: float = 0.0

        @step
        def start(self, ctx: Ctx) -> Await:
            return Await("payment_confirmed", then="ship", timeout=3600)

        @step
        def ship(self, ctx: Ctx) -> Any:
            if not ctx.awaited:
                return Stop("payment never came")
            return Done({"order": ctx.state.order, "paid": ctx.awaited[0].payload["amount"]})

    with DBOSEngine(url, queues={"default": 10, "checkout": 5}) as engine:
        engine.insert(Checkout, state={"order": 42}, correlation_key="order:42")
        engine.signal("order:42", "payment_confirmed", {"amount": 100}, dedup_key="evt-7")
        assert engine.result("order:42", timeout=PATIENCE) == {"order": 42, "paid": 100}
        assert [one.kind for one in engine.history("order:42")] == ["await", "done"]
        assert [(one.name, one.queues) for one in engine.workers()] == [("durable", {"default": 10, "checkout": 5})]
        with closing_engine(DBOSEngine(url)) as second, pytest.raises(DurableError, match="one per process"):
            second.start()


@pytest.mark.postgres
def test_of_two_processes_one_is_killed_and_nothing_is_lost_or_doubled(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """500 jobs, ten times: what was killed goes on long before its lease is over; at most its width runs again."""
    running, again = [fleet(url), fleet(url)], 0
    for first in range(0, 5000, 500):
        insert_jobs(trial, 500, first)
        eventually(lambda: effects_from(server, url, first) >= 45 * (first // 500 + 1), LONG)  # noqa: B023 - called at once
        running.pop(0).kill()
        assert trial.wait_idle(timeout=LONG)
        assert effects_from(server, url, first) == 500
        repeated = server.execute(name_of(url), "SELECT count(*) FROM effects WHERE attempt > 0")[0][0]
        assert repeated - again <= 10
        again = repeated
        running.append(fleet(url))
    assert trial.counts() == {"default": {"done": 5000}}
    assert trial.check() == []


@pytest.mark.postgres
def test_processes_that_start_at_once_make_the_tables_once(
    server: Server, url: str, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """One makes them, the others wait, and none for the other."""
    server.execute(name_of(url), "DROP SCHEMA durable CASCADE; DROP SCHEMA dbos CASCADE")
    with ThreadPoolExecutor(3) as threads:
        started = [threads.submit(fleet, url) for _ in range(3)]
        for one in started:
            one.result(LONG)
    with closing_engine(DBOSEngine(url, queues={})) as engine:
        eventually(lambda: len(engine.workers()) == 3)


MORTAL = f"""
{WORKERS}
import os, signal
from durable import tools
from durable_tools import dbos

url, owner, name, is_after = sys.argv[1:]
place = getattr(dbos, owner, None) or getattr(tools, owner)
method = getattr(place, name)

def die(*given, **named):
    if is_after:
        method(*given, **named)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(place, name, die)
with DBOSEngine(url, queues={{"default": 1}}):
    sys.stdin.read()
"""


@pytest.mark.postgres
def test_a_process_may_die_at_any_point_of_a_turn(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """One after the other is killed there, or when it takes over what the last has left; then each effect is there."""
    insert_jobs(trial, 8, seconds=0)
    for place in (
        ("_Claims", "claim", "in the claim's transaction"),
        ("Steps", "run", ""),
        ("Steps", "run", "before the commit"),
        ("_Outcomes", "settle", "in the commit's transaction"),
        ("_Runner", "_commit", "before DBOS is told"),
        ("_Outcomes", "reap", ""),
        ("_Outcomes", "reap", "in the transaction"),
        ("_Dispatcher", "hand_on", ""),
    ):
        with start_script(tmp_path, MORTAL, url, *place, flags=()) as process:
            assert process.wait(LONG) == -signal.SIGKILL
    fleet(url)
    assert trial.wait_idle(timeout=LONG)
    assert effects(server, url) == list(range(8))
    assert trial.counts() == {"default": {"done": 8}}
    assert trial.check() == []


@pytest.mark.postgres
def test_a_process_that_froze_is_taken_for_dead_and_comes_back(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """Its steps run elsewhere when its lease is over; thawed, what it still comes to is dropped, and it goes on."""
    frozen, _ = fleet(url, 4), fleet(url)
    insert_jobs(trial, 200, seconds=0.05)
    eventually(lambda: effects_from(server, url) >= 50, LONG)
    frozen.send_signal(signal.SIGSTOP)
    assert trial.wait_idle(timeout=LONG)
    assert effects(server, url) == list(range(200))
    eventually(lambda: len(trial.workers()) == 1)  # it may have had nothing in hand that was waited for
    frozen.send_signal(signal.SIGCONT)
    eventually(lambda: len(trial.workers()) == 2)
    insert_jobs(trial, 100, 1000)
    assert trial.wait_idle(timeout=LONG)
    assert effects(server, url) == [*range(200), *range(1000, 1100)]
    assert trial.check() == []


@pytest.mark.postgres
def test_workers_are_those_that_live(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """One that died is none as soon as its connection is gone, one that froze when its lease is over; nobody helps."""
    killed, frozen = fleet(url), fleet(url, 3)
    eventually(lambda: len(trial.workers()) == 2)
    frozen.send_signal(signal.SIGSTOP)
    killed.kill()
    eventually(lambda: trial.workers() == [])
    in_100_s = "extract(epoch FROM now()) * 1000 + 100000"  # not of the frozen one, which may hold a lock on its row
    server.execute(name_of(url), f"UPDATE durable.workers SET lease_expires_at = 0 WHERE lease_expires_at > {in_100_s}")
    insert_jobs(trial, 1)
    with pytest.raises(DurableError, match="no running engine serves 'default'"):
        trial.wait_idle(timeout=LONG)


@pytest.mark.postgres
def test_a_fleet_goes_on_though_a_test_freezes_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever freezes `time` in a process: its engine beats, waits end; as on a file."""
    assert (
        re.findall(r"\btime\.(?:monotonic|perf_counter)\(", Path(machines.__file__).read_text(encoding="utf-8")) == []
    )
    with DBOSEngine(url, heartbeat_interval=0.5) as engine, monkeypatch.context() as frozen:
        for name in ("monotonic", "perf_counter", "time"):
            frozen.setattr(time, name, functools.partial(float, getattr(time, name)()))
        instance = engine.insert(Listener)
        assert engine.wait(instance, 0.05, until="terminal").status != "done"
        engine.signal(instance, "go", 1)
        assert engine.result(instance, PATIENCE) == ["anew", [1]]
        [before] = engine.workers()
        eventually(lambda: engine.workers()[0].heartbeat_at > before.heartbeat_at)


def ip(*words: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *words], check=True, stderr=subprocess.PIPE)


def network() -> str:
    """The beginning of the addresses of this run's hosts."""
    return f"10.{100 + os.getpid() % 100}"


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, each with a link of its own to this machine, where that may be done."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"d{os.getpid()}-{at}" for at in (1, 2)]  # another run's, one that was killed maybe, have other names
    try:
        for at, name in enumerate(names, 1):
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "inside", "netns", name)
            ip("addr", "add", f"{network()}.{at}.1/24", "dev", name)
            ip("link", "set", name, "up")
            ip("-n", name, "addr", "add", f"{network()}.{at}.2/24", "dev", "inside")
            ip("-n", name, "link", "set", "inside", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.postgres
def test_a_host_that_is_cut_off_loses_its_steps_to_another(
    server: Server, url: str, trial: DBOSEngine, hosts: list[str], fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """Of two hosts one loses its network: the other runs its steps when its lease is over; back, it goes on."""
    for at, name in enumerate(hosts, 1):
        lease = 3 if name == hosts[0] else 600
        fleet(server.url(name_of(url), f"{network()}.{at}.1"), lease, ["ip", "netns", "exec", name])
    insert_jobs(trial, 200, seconds=0.05)
    eventually(lambda: effects_from(server, url) >= 40, LONG)
    ip("link", "set", hosts[0], "down")
    assert trial.wait_idle(timeout=LONG)
    assert effects(server, url) == list(range(200))
    assert trial.counts() == {"default": {"done": 200}}
    eventually(lambda: len(trial.workers()) == 1)  # it may have had nothing in hand that was waited for
    ip("link", "set", hosts[0], "up")
    eventually(lambda: len(trial.workers()) == 2)
    insert_jobs(trial, 50, 1000)
    assert trial.wait_idle(timeout=LONG)
    assert effects(server, url) == [*range(200), *range(1000, 1050)]
    assert trial.check() == []


@pytest.mark.postgres
def test_a_server_that_restarts_loses_nothing(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """Stopped at once and started again under load: every job is done, its effect is there once."""
    fleet(url), fleet(url)
    insert_jobs(trial, 300)
    eventually(lambda: effects_from(server, url) >= 60, LONG)
    server.restart()
    eventually(lambda: effects_from(server, url) == 300, LONG)
    eventually(lambda: trial.counts() == {"default": {"done": 300}})
    assert trial.check() == []


@pytest.mark.postgres
def test_trees_join_though_their_processes_are_killed(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """20 trees of 20 children, three kills: each parent joins once, with all of its children."""
    running = [fleet(url), fleet(url)]
    parents = [trial.insert("trial.Tree", state={"n": n}) for n in range(20)]
    for kill in range(3):
        eventually(lambda: effects_from(server, url) >= 80 * (kill + 1), LONG)  # noqa: B023 - called at once
        running.pop(0).kill()
        running.append(fleet(url))
    assert [trial.result(parent, LONG) for parent in parents] == [20] * 20
    assert effects(server, url) == sorted(
        [*(100 * n + child for n in range(20) for child in range(20)), *(100_000 + n for n in range(20))]
    )
    assert trial.check() == []


def program_of(tmp_path: Path, file: Path) -> str:
    """A program that runs the jobs of a file, which note in it what they did."""
    (tmp_path / "trial_file.py").write_text(WORKERS, encoding="utf-8")
    return f"""
        import sys, durable, trial_file
        with durable.Engine({str(file)!r}, queues={{"default": 4}}):
            print("ready", flush=True)
            sys.stdin.read()
    """


@pytest.mark.postgres
def test_a_file_is_moved_under_load(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Its engine is killed at work, the file moved: what was done is done, the rest is done there, nothing twice."""
    file = tmp_path / "trial.db"
    with client(file, rate_limits={"api": durable.RateLimit(1000, per=1)}) as engine:
        with closing(engine.connect()) as connection:
            connection.execute("CREATE TABLE effects (job INTEGER PRIMARY KEY, attempt INTEGER)")
        engine.insert_all([Insert("trial.work", args={"n": n, "seconds": 0.1}, rate_limit="api") for n in range(200)])
        order = engine.insert("trial.Tree", state={"n": 5}, correlation_key="tree", queue="trees")
        later = engine.insert("trial.work", args={"n": 8888}, schedule_in=3600)
        due = engine.get(later).eligible_at
        engine.schedule("s", "trial.work", durable.Every(3600), args={"n": 9999})
    fleet(url)
    with start_script(tmp_path, textwrap.dedent(program_of(tmp_path, file))) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with client(file) as engine:
            eventually(lambda: engine.counts()["default"].get("done", 0) >= 50)
            with pytest.raises(DurableError, match="stop them first"):
                machines.move(file, url)
            assert not engine.find(queue="trees", status="done")
        process.kill()
    moved = machines.move(file, url)
    assert (moved.limits, moved.schedules) == (1, 1)
    assert machines.move(file, url) == (0, 0, 0, 0)
    with client(file) as engine, closing(engine.connect()) as connection:
        there = [job for (job,) in connection.execute("SELECT job FROM effects")]
        assert engine.drain() == {}
        assert engine.get("tree").status == "runnable"
    assert trial.result("tree", LONG) == 20
    assert trial.get("tree").id == order
    assert (trial.get(later).status, trial.get(later).eligible_at) == ("runnable", due)
    assert trial.wait_idle(timeout=LONG)
    tree = [*range(500, 520), 100_005]
    assert sorted([*there, *effects(server, url)]) == [*range(200), *tree]
    assert [schedule.name for schedule in trial.schedules()] == ["s"]
    assert trial.check() == []


class Listener(FSM, name="machines.Listener"):
    """Waits for a signal."""

    @step
    def start(self, ctx: Ctx) -> Await:
        return Await("go", then="end", timeout=3600)

    @step
    def end(self, ctx: Ctx) -> Done:
        return Done([ctx.call("once", lambda: "anew"), [one.payload for one in ctx.inbox]])


@pytest.mark.postgres
def test_what_belongs_to_an_instance_is_moved_with_it(
    server: Server, url: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inbox, keys with their scope, history, paused queues; by `durable move`, run again after it failed."""
    file = tmp_path / "shop.db"
    with client(file) as engine:
        waiting = engine.insert(Listener, correlation_key="waits")
        done = engine.insert(cli_add, args={"a": 1}, correlation_key="kept", correlation_scope=[*durable.LIVE, "done"])
        engine.drain()
        engine.signal("waits", "other", 1, dedup_key="d")
        engine.insert(Listener, queue="quiet")
        engine.pause("quiet")
        engine.schedule("s", cli_add, durable.Every(3600), args={"a": 1})
    with monkeypatch.context() as broken:
        broken.setattr(machines._Move, "_copy_limits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            machines.move(file, url)
    said = command("move", file, url)
    assert (said.status, said.out) == (0, "3 instances, 1 signals, 0 limits, 1 schedules\n")
    with client(file) as engine:
        engine.signal("waits", "go", 2)
        assert engine.drain() == {}
    assert command("move", file, url).out == "0 instances, 1 signals, 0 limits, 0 schedules\n"
    with DBOSEngine(url, queues={"default": 5, "quiet": 1}) as fleet:
        assert fleet.result("waits", PATIENCE) == ["anew", [1, 2]]
        assert fleet.get("kept").id == done
        with pytest.raises(DuplicateError):
            fleet.insert(cli_add, args={"a": 1}, correlation_key="kept")
        assert [one.kind for one in fleet.history(waiting)] == ["await", "done"]
        assert fleet.find(queue="quiet")[0].status == "runnable"
        [schedule] = fleet.schedules()
        assert schedule.next_at is not None
        fleet.resume("quiet")
        assert fleet.wait(fleet.find(queue="quiet")[0].id, PATIENCE).status == "awaiting_signal"
        assert fleet.insert(cli_add, args={"a": 1}) > done
    with client(tmp_path / "other.db") as engine:
        engine.insert(Listener)
    said = command("move", tmp_path / "other.db", url)
    assert (said.status, "instances of these ids already: 1" in said.err) == (1, True)
    with client(tmp_path / "other.db") as engine:
        assert engine.drain()["steps"] == 1  # a move that is refused pauses nothing


@pytest.mark.postgres
def test_a_steps_own_sql_is_part_of_its_commit_on_postgres(server: Server, url: str) -> None:
    """With SQLite's placeholders; what fails is the step's error and leaves nothing; what is durable's is refused."""
    server.execute(
        name_of(url), "CREATE TABLE account (id int PRIMARY KEY, balance int CHECK (balance >= 0), note jsonb)"
    )

    @durable.job(name="machines.sql", max_attempts=1)
    def run(ctx: Ctx, statements: list[Any]) -> None:
        for sql, bindings in statements:
            ctx.execute(sql, bindings)

    def outcome(*statements: tuple[str, Any]) -> str | None:
        instance = engine.insert(run, args={"statements": [list(one) for one in statements]})
        engine.drain()
        return engine.get(instance).last_error

    with closing_engine(DBOSEngine(url, queues={})) as engine:
        first = "INSERT INTO account (id, balance, note) VALUES (?, ?2, '{\"a ? :b\": 1}') -- ?"
        assert outcome((first, [1, 10])) is None
        assert outcome(("UPDATE account SET balance = balance - :n WHERE id = :id", {"id": 1, "n": 3})) is None
        assert outcome(("UPDATE account SET balance = 5 WHERE note ?? 'a ? :b' AND id % 2 = ?", [1])) is None
        assert server.execute(name_of(url), "SELECT id, balance FROM account") == [(1, 5)]
        taken = ("UPDATE account SET balance = balance - ?", [1])
        assert "violates check" in str(outcome(taken, ("UPDATE account SET balance = balance - ?", [50])))
        for forbidden in (
            "COMMIT",
            "/* x */ ROLLBACK",
            "/* /* x */ y -- */ ; COMMIT",
            "-- x\rCOMMIT",
            "CREATE TEMP TABLE t (a int)",
            "SELECT 1 INTO TEMPORARY t",
            "DELETE FROM durable.signals",
            "UPDATE dbos.workflow_status SET name = ''",
            "SELECT pg_advisory_lock(?)",
            "SELECT 1 WHERE pg_try_advisory_lock_shared (1)",
            "SELECT PG_Advisory_Unlock_All/* all */()",
            "SELECT pg_terminate_backend(pg_backend_pid())",
        ):
            assert "ctx.execute may not" in str(outcome(taken, (forbidden, []))), forbidden
        assert outcome(("SELECT set_config('search_path', 'nowhere', false)", [])) is None
        assert outcome(("SELECT pg_advisory_xact_lock(1), 'pg_advisory_lock(1)' -- pg_advisory_lock(1)", [])) is None
        assert "violates check" in str(outcome(("UPDATE account SET balance = -1", [])))
        for second in ("COMMIT", "ROLLBACK", "SELECT 1"):
            assert "multiple commands" in str(outcome(taken, (f"UPDATE account SET balance = 4; {second}", [])))
        assert "placeholders" in str(outcome(taken, ("UPDATE account SET balance = ?", [])))
        assert server.execute(name_of(url), "SELECT id, balance FROM account") == [(1, 5)]


@pytest.mark.postgres
def test_whoever_is_at_the_database_when_it_goes_after_its_engine_is_told_so(server: Server, url: str) -> None:
    """In the engine's words, with the server's reason: a DurableError."""
    blocked = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    engine = DBOSEngine(url, queues={})
    with psycopg.connect(url) as connection, ThreadPoolExecutor(1) as pool:
        connection.execute("LOCK TABLE durable.instances")
        looking = pool.submit(engine.counts)
        eventually(lambda: server.execute(name_of(url), f"SELECT pid {blocked}") != [])
        engine.stop()
        server.execute(name_of(url), f"SELECT pg_terminate_backend(pid) {blocked}")
        with pytest.raises(DurableError, match="terminating connection"):
            looking.result(PATIENCE)


@pytest.mark.postgres
def test_what_a_cancelled_step_has_told_of_its_progress_goes_with_it(url: str) -> None:
    """Also what was told after the cancel, and not yet written: it does not come back with a retry."""

    class Telling(FSM, name="machines.Telling"):
        def step(self, name: str, ctx: Ctx) -> Done:
            if ctx.state["is_cancelled"]:
                engine.cancel(ctx.id)
            ctx.progress(1, 2)
            if not ctx.state["is_cancelled"]:  # what the other has told would be written with this
                eventually(lambda: engine.get(ctx.id).progress is not None)
            return Done()

    with closing_engine(DBOSEngine(url, queues={})) as engine:
        cancelled = engine.insert(Telling, state={"is_cancelled": True}, queue="first")
        engine.drain()
        engine.retry(cancelled)
        engine.insert(Telling, state={"is_cancelled": False}, queue="second")
        engine.drain(queue="second")
        assert engine.get(cancelled).progress is None


@pytest.mark.postgres
def test_what_was_cancelled_when_its_process_died_stands_in_the_history_as_cancelled(server: Server, url: str) -> None:
    """Not as crashed: it does not run again."""
    with DBOSEngine(url, queues={}) as engine:
        ident = engine.insert(cli_add, args={"a": 1})
        left = f"UPDATE durable.instances SET status = 'executing', worker = 'gone', claim = 1 WHERE id = {ident}"
        server.execute(name_of(url), left)
        engine.cancel(ident, "enough")
        assert engine.wait(ident, PATIENCE).last_error == "enough"
        assert [(run.kind, run.error, run.to) for run in engine.history(ident)] == [("cancel", "enough", None)]


@pytest.mark.postgres
def test_what_a_fleet_does_not_have_is_refused_with_the_reason(url: str) -> None:
    """Options, methods and URLs that can't be had; a schema of another version; an engine that was stopped."""
    for name in ("clock", "prefetch", "synchronous"):
        with pytest.raises(ValueError, match=f"{name} is no option of a DBOSEngine: "):
            DBOSEngine(url, **{name: 1})
    with pytest.raises(TypeError, match="DBOSEngine: "):
        DBOSEngine(url, colour="red")
    with pytest.raises(ValueError, match="queues"):
        DBOSEngine(url, queues={"default": 0})
    with pytest.raises(DurableError, match="can't be opened"):
        DBOSEngine(url.replace("/test_", "/no_such_"))
    for other in (None, "", "shop.db", "sqlite:///shop.db", "postgresql://user:secret@host:none/shop"):
        with pytest.raises(ValueError, match="postgresql://user:password@host/database") as refused:
            DBOSEngine(cast(str, other))
        assert "secret" not in str(refused.value)
    with closing_engine(DBOSEngine(url, queues={})) as engine:
        with pytest.raises(DurableError, match="no events"):
            engine.subscribe(print)
        with pytest.raises(DurableError, match="pg_dump"):
            engine.snapshot("copy")
        with pytest.raises(durable.UnknownLimitError):
            engine.insert(cli_add, args={"a": 1}, rate_limit="none")
        with engine.connect() as connection:
            with pytest.raises(ValueError, match="no transaction open"):
                engine.insert_into(connection, cli_add, args={"a": 1})
            with connection.begin() as transaction:
                instance = engine.insert_into(connection, cli_add, args={"a": 1})
                transaction.rollback()
        with pytest.raises(durable.NotFoundError):
            engine.get(instance)
        engine.perform(
            lambda transaction: transaction.rows("UPDATE durable.meta SET value = '99' WHERE key = 'schema_version'")
        )
        with pytest.raises(durable.SchemaError, match="99"):
            DBOSEngine(url)
    with pytest.raises(durable.EngineClosedError):
        engine.counts()


@pytest.mark.postgres
def test_who_may_not_write_is_told_so_and_leaves_nothing(server: Server, url: str) -> None:
    """Without the right to make schemas, or to write: `DurableError` where it is tried; with it, all goes on."""
    name = name_of(url)
    server.execute(name, "DROP SCHEMA durable CASCADE; DROP SCHEMA dbos CASCADE")
    server.execute(name, f"CREATE ROLE {name} LOGIN")
    theirs = url.replace("//postgres@", f"//{name}@")
    with pytest.raises(DurableError, match="permission denied"):
        DBOSEngine(theirs)
    assert server.execute(name, "SELECT 1 FROM pg_namespace WHERE nspname IN ('durable', 'dbos')") == []
    DBOSEngine(url, queues={}).stop()
    may_read = "GRANT USAGE ON SCHEMA {0} TO {1}; GRANT SELECT ON ALL TABLES IN SCHEMA {0} TO {1}"
    server.execute(name, "; ".join(may_read.format(schema, name) for schema in ("durable", "dbos")))
    with closing_engine(DBOSEngine(theirs)) as reader:
        assert reader.counts() == {}
        for call in (lambda: reader.insert(cli_add, args={"a": 1}), reader.start, reader.drain):
            with pytest.raises(DurableError, match="permission denied"):
                call()
    with DBOSEngine(url) as engine:
        assert engine.result(engine.insert(cli_add, args={"a": 1}), PATIENCE) == 2
    server.execute(name, f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.postgres
def test_what_postgres_cannot_store_is_an_error_of_the_step(url: str) -> None:
    """It knows no NUL in a text: an error's is replaced, a key with one is refused, a step's to `handle`."""

    @durable.job(name="machines.nul", max_attempts=1)
    def fails(ctx: Ctx, text: str, where: str) -> str:
        if where == "error":
            raise ValueError(text)
        if where == "key":
            ctx.insert(cli_add, args={"a": 1}, correlation_key=text)
        if where == "call":
            ctx.call(text, list)
        return text

    with closing_engine(DBOSEngine(url, queues={})) as engine:
        ids = {where: engine.insert(fails, args=fails.args("a\0b", where)) for where in ("error", "key", "call", "")}
        engine.drain()
        assert engine.get(ids["error"]).last_error == "ValueError: a\ufffdb"
        for where in ("key", "call"):
            assert "PostgreSQL can't store that" in str(engine.get(ids[where]).last_error)
        assert engine.result(ids[""], 0) == "a\0b"
        with pytest.raises(ValueError, match="PostgreSQL can't store that"):
            engine.insert(cli_add, args={"a": 1}, correlation_key="\0")
        assert engine.counts() == {"default": {"failed": 3, "done": 1}}
        assert engine.check() == []


@pytest.mark.postgres
def test_limits_hold_over_all_processes_on_postgres(
    server: Server, url: str, trial: DBOSEngine, fleet: Callable[..., subprocess.Popen[str]]
) -> None:
    """At most one of a key executes over two processes, and a bucket lets no more go than it has tokens."""
    fleet(url), fleet(url)
    trial.insert_all([Insert("trial.work", args={"n": n}, concurrency_key="one") for n in range(20)])
    running = "SELECT count(*) FROM durable.instances WHERE status = 'executing' AND concurrency_key = 'one'"
    seen = {server.execute(name_of(url), running)[0][0] for _ in range(100)}
    assert trial.wait_idle(timeout=LONG)
    assert seen <= {0, 1}
    assert effects(server, url) == list(range(20))
    with closing_engine(DBOSEngine(url, queues={}, rate_limits={"slow": durable.RateLimit(5, per=1, burst=2)})):
        began = time.monotonic()
        trial.insert_all([Insert("trial.work", args={"n": 100 + n}, rate_limit="slow") for n in range(12)])
        eventually(lambda: effects_from(server, url) == 32, LONG)
        assert time.monotonic() - began >= 1.9
    trial.pause("default")
    held = trial.insert("trial.work", args={"n": 999})
    trial.schedule("s", "trial.work", durable.Every(1), args={"n": 5000}, catch_up="none")
    eventually(lambda: trial.find(schedule="s"))
    assert trial.get(held).status == "runnable"
    trial.resume("default")
    eventually(lambda: trial.get(held).status == "done")
    assert trial.check() == []


@pytest.mark.postgres
def test_a_queue_that_is_resumed_while_a_turn_finds_it_paused_loses_no_turn(
    server: Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn looks once more: the resume, which went first, did not see its row."""
    hold = machines._Claims._hold
    with DBOSEngine(url) as engine:

        def resumed_meanwhile(*arguments: Any) -> bool:
            engine.resume("default")
            return hold(*arguments)

        monkeypatch.setattr(machines._Claims, "_hold", resumed_meanwhile)
        server.execute(name_of(url), "INSERT INTO durable.paused (queue) VALUES ('default')")
        instance = engine.insert(cli_add, args={"a": 1})
        assert engine.result(instance, PATIENCE) == 2
        assert server.execute(name_of(url), "SELECT turn FROM durable.instances") == [(1,)]


@pytest.mark.postgres
def test_an_application_awaits_its_fleet(url: str) -> None:
    """`async with` runs coroutines on the caller's loop; its futures can be awaited, and are settled at the stop."""
    loops: list[Any] = []

    @durable.job(name="machines.where")
    async def where() -> bool:
        return asyncio.get_running_loop() in loops

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        async with DBOSEngine(url) as engine:
            instance = await engine.insert_nowait(where)
            assert await engine.result_nowait(instance) is True
            waiting = engine.insert(Listener, correlation_key="w")
            lost = engine.result_nowait(waiting)
            await engine.signal_nowait("w", "other")
        with pytest.raises(durable.EngineClosedError):
            await lost

    asyncio.run(main())
