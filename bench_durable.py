"""Measure `durable`, each piece of work beside the least that anything with its guarantee has to do.

    python bench_durable.py                       every section, in under three minutes
    python bench_durable.py --list                the sections, a line each
    python bench_durable.py --only drain steps    some of them
    python bench_durable.py --full                larger files and more rounds
    python bench_durable.py --peers               the same work on other libraries, where they are installed
    python bench_durable.py --postgres URL        several machines: on a PostgreSQL database that is empty
    python bench_durable.py --json                the figures for a program
    python bench_durable.py --directory DIR       where the files go: the disk is half of every figure

What a floor is. An outcome must be on the disk before anything goes on from it, so an engine on SQLite does
at least this: in one transaction, write the outcomes of the last batch, each guarded, and claim the next
batch; then wait for the disk. `Floor` is that loop and nothing else: one thread, one table with one partial
index, JSON read and written, as many rows a turn as the engine has in flight. It has no features, and no
engine beats it by much. Insertion has a floor of its own: the bare statement, on a table with three
partial indexes.

How to read the table. `ours` is the engine and `floor` what the row compares it to, each the median over the
rounds with (least..most) behind. A unit that ends in /s is a rate, every other a cost. `ratio` is our speed as
a share of the floor's: 1.00 is as fast, and more is better, for rates and costs alike. `over` is what one of
ours takes longer than one of the floor's, in microseconds: where the disk is slower the ratio is nearer to 1,
and this the same, so figures of different disks can be compared by it. Engine and floor take turns, and a ratio
is formed within a turn, so a disk that slows down half-way spoils neither. `bar` is what the row should reach:
`>=` for its ratio, `<=` for our own value. Figures move with the machine, ratios less. The first line says what
the machine is: an fsync of its disk, and how long this Python counts to a million.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import attrs

import durable
from durable import FSM, Context, Engine, Event, Insert, Status

ARGS = {"n": 7}
NAP_S = 0.05
REST_S = 0.003  # long enough for every thread to fall asleep
PATIENCE_S = 120.0  # a figure that takes longer is a fault
now = time.perf_counter

# ---------------------------------------------------------------- figures

UNIT_US = {"us": 1, "ms": 1_000, "s": 1_000_000}
Work = Callable[[Path], float]  # one sample, on a fresh file
Section = Callable[["Bench"], Iterator["Figure"]]
SECTIONS: dict[str, Section] = {}


def section(function: Section) -> Section:
    """Put a function into the table of what is measured, under its name; its docstring is the heading."""
    SECTIONS[function.__name__] = function
    return function


@attrs.frozen
class Figure:
    """One row of the table: a sample for each round, of the engine and of what it is compared to."""

    what: str
    unit: str
    ours: Sequence[float]
    floor: Sequence[float] = ()
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Our speed as a share of the floor's, round by round."""
        pairs = zip(self.ours, self.floor, strict=False)
        return [a / b if self.unit.endswith("/s") else b / a for a, b in pairs if a and b]

    @property
    def over_us(self) -> float | None:
        """What one of ours takes longer than one of the floor's, in microseconds: the median over the rounds."""
        scale = UNIT_US.get(self.unit)
        pairs = [pair for pair in zip(self.ours, self.floor, strict=False) if all(pair)]
        if not pairs or not (scale or self.unit.endswith("/s")):
            return None
        costs = [(a * scale, b * scale) if scale else (1e6 / a, 1e6 / b) for a, b in pairs]
        return statistics.median(a - b for a, b in costs)

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the bar; None where there is no bar."""
        if self.at_least is not None:
            return statistics.median(self.ratios) >= self.at_least
        return None if self.at_most is None else statistics.median(self.ours) <= self.at_most

    def record(self) -> dict[str, Any]:
        """The row for a program."""
        return {**attrs.asdict(self), "ratios": self.ratios, "over_us": self.over_us, "reached": self.reached}

    def line(self) -> str:
        """The row as text."""
        bar = f">= {self.at_least}" if self.at_least else f"<= {self.at_most:g}" if self.at_most else ""
        verdict = {True: "ok", False: "MISSED", None: ""}[self.reached]
        over = "" if self.over_us is None else f"{self.over_us:+,.0f} us"
        compared = f"{spread(self.floor):>25}  {spread(self.ratios):>18} {over:>10}  {bar:<8}{verdict}"
        return f"  {self.what:<42}{spread(self.ours):>25} {self.unit:<7}{compared}".rstrip()


def spread(samples: Sequence[float]) -> str:
    """The median with the least and the most behind: `9,200 (8,900..9,400)`."""
    if len(samples) < 2:
        return "".join(map(number, samples))
    return f"{number(statistics.median(samples))} ({number(min(samples))}..{number(max(samples))})"


def number(value: float) -> str:
    """Three digits, which is more than the machine keeps to."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


@attrs.frozen
class Bench:
    """Where the files go, and how much work is worth while."""

    directory: Path
    full: bool

    @property
    def rounds(self) -> int:
        """How many samples a row has."""
        return 7 if self.full else 3

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """A database's path in a folder of its own, removed afterwards."""
        with tempfile.TemporaryDirectory(dir=self.directory, ignore_cleanup_errors=True) as folder:
            yield Path(folder) / "bench.db"

    def once(self, work: Work) -> float:
        """One sample."""
        with self.file() as path:
            return work(path)

    def compare(self, what: str, unit: str, ours: Work, floor: Work, **bar: float) -> Figure:
        """Both in turns, each time on a fresh file."""
        return self.take_turns(what, unit, lambda: self.once(ours), lambda: self.once(floor), **bar)

    def alone(self, what: str, unit: str, ours: Work) -> Figure:
        """What has no floor."""
        return Figure(what, unit, [self.once(ours) for _ in range(self.rounds)], [])

    def take_turns(
        self, what: str, unit: str, ours: Callable[[], float], floor: Callable[[], float], **bar: float
    ) -> Figure:
        """Both in turns."""
        pairs = [(floor(), ours()) for _ in range(self.rounds)]
        return Figure(what, unit, [a for _, a in pairs], [b for b, _ in pairs], **bar)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = now()
    work()
    return now() - began


def repeat(work: Callable[[], object], times: int) -> None:
    """Do it so many times."""
    for _ in range(times):
        work()


def rested_s(work: Callable[[], object]) -> float:
    """How long it takes after a moment in which nothing happens."""
    time.sleep(REST_S)
    return seconds(work)


def median_ms(sample_s: Callable[[], float], samples: int = 40) -> float:
    """The median of that many."""
    return 1000 * statistics.median([sample_s() for _ in range(samples)])


# ---------------------------------------------------------------- the floor


class Floor:
    """The skeleton of the beat on bare apsw: what durability itself costs, and nothing else."""

    TABLE = """CREATE TABLE work (
        id INTEGER PRIMARY KEY AUTOINCREMENT, fsm TEXT NOT NULL, version INTEGER NOT NULL, step TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('runnable', 'executing', 'done', 'failed')),
        state TEXT NOT NULL, result TEXT, claim INTEGER NOT NULL DEFAULT 0, worker INTEGER,
        queue TEXT NOT NULL, priority INTEGER NOT NULL, eligible_at INTEGER NOT NULL,
        correlation_key TEXT, inserted_at INTEGER NOT NULL, updated_at INTEGER NOT NULL) STRICT"""
    INDEXES = (
        "CREATE INDEX pick ON work (queue, priority, eligible_at, id) WHERE status = 'runnable'",
        "CREATE INDEX executing ON work (worker) WHERE status = 'executing'",
        "CREATE UNIQUE INDEX correlation ON work (correlation_key) WHERE correlation_key IS NOT NULL",
    )
    INSERT = """INSERT INTO work
        (fsm, version, step, status, state, queue, priority, eligible_at, inserted_at, updated_at)
        VALUES ('bench.Noop', 1, 'perform', 'runnable', ?, 'default', 0, ?2, ?2, ?2)"""
    CLAIM = """UPDATE work SET status = 'executing', claim = claim + 1, worker = 1, updated_at = ?1
        WHERE id IN (SELECT id FROM work WHERE status = 'runnable' AND queue = 'default' AND eligible_at <= ?1
                     ORDER BY priority, eligible_at, id LIMIT ?2) RETURNING id, claim, state"""
    OUTCOME = """UPDATE work SET status = 'done', result = ?, worker = NULL, updated_at = ?
        WHERE id = ? AND status = 'executing' AND claim = ?"""
    NEXT = """UPDATE work SET status = 'runnable', step = ?, state = ?, eligible_at = ?3, worker = NULL, updated_at = ?3
        WHERE id = ? AND status = 'executing' AND claim = ?"""
    ADVANCE = """UPDATE work SET step = ?, state = ?, claim = claim + 1, updated_at = ?
        WHERE id = ? AND status = 'executing' AND claim = ?"""

    def __init__(self, path: Path, indexes: int) -> None:
        self.connection = apsw.Connection(str(path))
        self.connection.pragma("journal_mode", "wal")
        self.connection.pragma("synchronous", "full")
        for statement in (self.TABLE, *self.INDEXES[:indexes]):
            self.connection.execute(statement)
        self.turns_s: list[float] = []

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Written and on the disk at its end."""
        self.connection.execute("BEGIN IMMEDIATE")
        yield
        self.connection.execute("COMMIT")

    def insert(self, rows: int = 1) -> None:
        """So many rows in one transaction."""
        at = int(time.time() * 1000)
        with self.transaction():
            self.connection.executemany(self.INSERT, [(json.dumps(ARGS), at)] * rows)

    def drain(self, jobs: int, in_flight: int) -> float:
        """Insert them, then take turns until nothing is left; jobs a second."""
        self.insert(jobs)
        began, batch = now(), self.turn([], in_flight)
        while batch:
            batch = self.turn(batch, in_flight)
        return jobs / (now() - began)

    def march(self, machines: int, in_flight: int, inline: bool) -> float:
        """Insert machines of five steps, which keep their claims from one to the next or queue; steps a second."""
        self.insert(machines)
        began, batch = now(), self.turn([], in_flight)
        if not inline:
            for _ in range(4 * machines // in_flight):
                batch = self.advance(batch, self.NEXT, in_flight)
        while batch:
            for _ in range(4 * inline):
                batch = self.advance(batch, self.ADVANCE)
            batch = self.turn(batch, in_flight)
        return 5 * machines / (now() - began)

    def advance(self, batch: list[tuple[Any, ...]], statement: str, in_flight: int = 0) -> list[tuple[Any, ...]]:
        """Commit the next step of each, and its state; together with the claim of the next batch, where they queue."""
        at = int(time.time() * 1000)
        rows = [("next", json.dumps(json.loads(state)), at, key, claim) for key, claim, state in batch]
        with self.transaction():
            self.connection.executemany(statement, rows)
            claimed = list(self.connection.execute(self.CLAIM, (at, in_flight))) if in_flight else None
        return claimed or [(key, claim + 1, state) for key, claim, state in batch]

    def turn(self, batch: list[tuple[Any, ...]], in_flight: int) -> list[tuple[Any, ...]]:
        """Commit the outcomes of the last batch together with the claim of the next."""
        done = [(json.dumps(json.loads(state).get("result")), key, claim) for key, claim, state in batch]
        began, at = now(), int(time.time() * 1000)
        with self.transaction():
            self.connection.executemany(self.OUTCOME, [(result, at, *row) for result, *row in done])
            batch = list(self.connection.execute(self.CLAIM, (at, in_flight)))
        self.turns_s.append(now() - began)
        return batch


@contextlib.contextmanager
def open_floor(path: Path, indexes: int = 1) -> Iterator[Floor]:
    """A floor on a fresh file."""
    floor = Floor(path, indexes)
    with contextlib.closing(floor.connection):
        yield floor


def bare(sample: Callable[[Floor], float], indexes: int = 1) -> Work:
    """A sample of the floor."""

    def work(path: Path) -> float:
        with open_floor(path, indexes) as floor:
            return sample(floor)

    return work


# ---------------------------------------------------------------- the work


class Noop(FSM):
    """Does nothing."""

    def perform(self, args: dict[str, Any]) -> None:
        """Nothing at all."""


@durable.job
def clock() -> float:
    """Return the instant at which it runs."""
    return now()


@durable.job
def nap() -> None:
    """Wait in a thread, as a call over the network would."""
    time.sleep(NAP_S)


@durable.job
async def nap_async() -> None:
    """Wait on the event loop."""
    await asyncio.sleep(NAP_S)


@durable.job
def spin(loops: int) -> None:
    """Keep a core busy: count in plain Python."""
    for _ in range(loops):
        pass


class Five(FSM, initial="1"):
    """Five steps that do nothing."""

    def step(self, name: str, ctx: Context[Any]) -> durable.Next | durable.Done:
        """On to the next number."""
        return durable.Next(str(int(name) + 1)) if name < "5" else durable.Done()


class FiveInline(Five, inline=True):
    """The same on one claim."""


class Parked(FSM):
    """Waits for a signal; its result is the instant at which it woke."""

    def step(self, name: str, ctx: Context[Any]) -> durable.Await | durable.Done:
        """Park, then look at the clock."""
        return durable.Await("go", then="woken") if name == "start" else durable.Done(now())


class FanOut(FSM):
    """Starts children and counts them when all have ended."""

    def step(self, name: str, ctx: Context[Any]) -> durable.ScheduleChildren | durable.Done:
        """One row each, and the join."""
        if name == "join":
            return durable.Done(len(ctx.children))
        return durable.ScheduleChildren(noops(ctx.state["children"]), then="join")


class Ledger(FSM):
    """Writes a row of the application's own in its commit."""

    def perform(self, args: dict[str, Any], ctx: Context[Any]) -> None:
        """Exactly once."""
        ctx.execute("INSERT INTO ledger (amount) VALUES (?)", (args["n"],))


class Hold(FSM, queue="holder"):
    """Keeps its concurrency key until it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def perform(self, args: dict[str, Any]) -> None:
        """Hold on."""
        self.released.wait(PATIENCE_S)


def noops(jobs: int, **options: Any) -> list[Insert]:
    """So much work that is none."""
    return [Insert(Noop, args=ARGS, **options)] * jobs


def settle(engine: Engine, ids: Sequence[int | None], tail: int = 10) -> None:
    """Wait until all have ended, of which the last `tail` may do so in any order."""
    for key in reversed(ids[-tail:]):
        if key is None or engine.wait(key, PATIENCE_S, until="terminal").status is not Status.DONE:
            raise SystemExit(f"instance {key} did not end as it should: the figures would mean nothing")


def pace(engine: Engine, work: Sequence[Insert], tail: int = 10) -> float:
    """How many instances a second finish on a running engine, their insertion not counted."""
    engine.pause("default")
    ids = engine.insert_all(work)

    def resume_and_settle() -> None:
        engine.resume("default")
        settle(engine, ids, tail)

    return len(work) / seconds(resume_and_settle)


def running(sample: Callable[[Engine], float], **options: Any) -> Work:
    """A sample of a running engine."""

    def work(path: Path) -> float:
        with Engine(path, **options) as engine:
            return sample(engine)

    return work


def rate(work: Sequence[Insert], width: int = 10, **options: Any) -> Work:
    """How many instances a second an engine of that width finishes."""
    return running(lambda engine: pace(engine, work, min(width, 32)), queues={"default": width}, **options)


def lone_s(engine: Engine) -> float:
    """Seconds from the insert of one job to its result, with nothing else to do."""
    return rested_s(lambda: engine.result(engine.insert(clock), PATIENCE_S))


# ---------------------------------------------------------------- the beat


@section
def drain(bench: Bench) -> Iterator[Figure]:
    """No-op jobs through a running engine, beside the skeleton with as many in flight."""
    for width, ahead, jobs, least in ((10, 0, 3_000, 0.75), (32, 0, 6_000, 0.65), (10, 100, 12_000, 0.55)):
        floor = bare(partial(Floor.drain, jobs=jobs, in_flight=width + ahead))
        ours = rate(noops(jobs), width, prefetch=ahead)
        yield bench.compare(f"{width} in flight, {ahead} prefetched", "jobs/s", ours, floor, at_least=least)


@section
def inserts(bench: Bench) -> Iterator[Figure]:
    """Insertion by a client, beside the bare statement on a table with three partial indexes."""
    one, many = 1_000, 100_000 if bench.full else 20_000

    def client(rows: int, insert: Callable[[Engine], object]) -> Work:
        return running(lambda engine: rows / seconds(lambda: insert(engine)), queues={})

    def single(engine: Engine) -> None:
        repeat(lambda: engine.insert(Noop, args=ARGS), one)

    def nowait(engine: Engine) -> None:
        concurrent.futures.wait([engine.insert_nowait(Noop, args=ARGS) for _ in range(many // 4)])

    floor = bare(lambda floor: one / seconds(lambda: repeat(floor.insert, one)), indexes=3)
    yield bench.compare("insert, a commit each", "rows/s", client(one, single), floor, at_least=0.85)
    floor = bare(lambda floor: many / seconds(lambda: floor.insert(many)), indexes=3)
    bulk = client(many, lambda engine: engine.insert_all(noops(many)))
    yield bench.compare("insert_all", "rows/s", bulk, floor, at_least=0.4)
    yield bench.compare("insert_nowait", "rows/s", client(many // 4, nowait), floor)


@section
def latency(bench: Bench) -> Iterator[Figure]:
    """An insert into an idle engine, beside bare commits of one row."""
    with beside_floor(bench) as (engine, floor):
        samples = [latencies_ms(engine, floor) for _ in range(bench.rounds)]
    commit, handler, result, wake = zip(*samples, strict=True)
    yield Figure("insert to result, beside two commits", "ms", result, [2 * ms for ms in commit], at_least=0.8)
    yield Figure("insert to handler, beside one commit", "ms", handler, commit)
    yield Figure("wake: from the insert's return to the handler", "ms", wake, at_most=0.2)


@contextlib.contextmanager
def beside_floor(bench: Bench) -> Iterator[tuple[Engine, Floor]]:
    """A running engine and a floor, each on a file of its own."""
    with (
        bench.file() as path,
        bench.file() as floor_path,
        Engine(path) as engine,
        open_floor(floor_path, indexes=3) as floor,
    ):
        yield engine, floor


def latencies_ms(engine: Engine, floor: Floor, samples: int = 60) -> list[float]:
    """Of a bare commit, from insert to handler and to result, and from its return; medians, taken in turns."""
    seen: list[tuple[float, float, float, float]] = []
    for _ in range(samples):
        commit = rested_s(floor.insert)
        time.sleep(REST_S)
        began = now()
        inserted, committed = engine.insert(clock), now()
        ran_at = engine.result(inserted, PATIENCE_S)
        seen.append((commit, ran_at - began, now() - began, ran_at - committed))
    return [1000 * statistics.median(column) for column in zip(*seen, strict=True)]


@section
def steps(bench: Bench) -> Iterator[Figure]:
    """Steps a second of machines of five, beside as many jobs.

    So many that most commits write over what the log has room for: while it grows, each of them takes longer.
    """

    def machines(fsm: type[FSM], ahead: int) -> Work:
        pace_of = rate([Insert(fsm, state=ARGS)] * 2_200, prefetch=ahead)
        return lambda path: 5 * pace_of(path)

    for what, fsm, least in (
        ("queued between steps", Five, {"at_least": 1.0}),
        ("inline=True", FiveInline, {"at_least": 1.3}),
    ):
        for ahead in (0, 100):
            ours, jobs = machines(fsm, ahead), rate(noops(11_000), prefetch=ahead)
            yield bench.compare(f"{what}, {10 + ahead} in flight", "steps/s", ours, jobs, **({} if ahead else least))
            march = partial(Floor.march, machines=2_200, in_flight=10 + ahead, inline=fsm is FiveInline)
            drain = partial(Floor.drain, jobs=11_000, in_flight=10 + ahead)
            yield bench.compare("  the same of the skeleton", "steps/s", bare(march), bare(drain))


@section
def schedules(bench: Bench) -> Iterator[Figure]:
    """What a thousand schedules cost that are not due: jobs beside them, and an engine that has nothing to do."""

    def beside_schedules(sample: Callable[[Engine], float]) -> Work:
        def work(path: Path) -> float:
            with Engine(path, queues={}) as engine:
                for n in range(1_000):
                    engine.schedule(f"s{n}", Five, durable.Every(86_400), state=ARGS)
            with Engine(path) as engine:
                return sample(engine)

        return work

    work = noops(11_000)
    drain = partial(pace, work=work)
    yield bench.compare("jobs", "jobs/s", beside_schedules(drain), running(drain), at_least=0.95)
    idle = lambda _: percent_of_a_core()  # noqa: E731 - a sample
    yield bench.compare("idle", "% of a core", beside_schedules(idle), running(idle))


@section
def past(bench: Bench) -> Iterator[Figure]:
    """What a history costs: machines of five steps, and jobs, with one and without; and its size in the file."""

    def machines(*, history: bool) -> Work:
        pace_of = rate([Insert(Five, state=ARGS)] * 2_200, history=history)
        return lambda path: 5 * pace_of(path)

    yield bench.compare("five steps", "steps/s", machines(history=True), machines(history=False), at_least=0.8)
    jobs = rate(noops(11_000), history=True), rate(noops(11_000), history=False)
    yield bench.compare("jobs, whose rows say the rest", "jobs/s", *jobs, at_least=0.95)

    def bytes_a_run(engine: Engine) -> float:
        settle(engine, engine.insert_all([Insert(Five, state=ARGS)] * 2_000))
        with contextlib.closing(engine.connect()) as connection:
            size = connection.execute("SELECT sum(pgsize) FROM dbstat WHERE name = 'durable_transitions'").get
        return float(size) / 10_000

    yield bench.alone("a run in the file", "bytes", running(bytes_a_run))


@section
def kept(bench: Bench) -> Iterator[Figure]:
    """Calls that are kept, one after the other in one step, beside a bare commit each; and reports of progress."""

    def call_ms(engine: Engine) -> float:
        return float(engine.result(engine.insert(Calling, state={"calls": 300})))

    def bare_ms(floor: Floor) -> float:
        return median_ms(lambda: seconds(floor.insert), 300)

    yield bench.compare("a kept call", "ms", running(call_ms), bare(bare_ms), at_most=2.0)
    yield bench.alone("a report of progress", "us", running(lambda engine: engine.result(engine.insert(Reporting))))


class Calling(FSM):
    """Makes calls; the median time of one in milliseconds."""

    def perform(self, args: dict[str, int], ctx: Context[Any]) -> float:
        """Call as often as it is told."""
        names = iter(range(args["calls"]))
        return median_ms(lambda: seconds(lambda: ctx.call(str(next(names)), int)), args["calls"])


class Reporting(FSM):
    """Reports progress; the time of one in microseconds."""

    def perform(self, args: object, ctx: Context[Any]) -> float:
        """Report a hundred thousand times."""
        return seconds(lambda: repeat(lambda: ctx.progress(1, 2), 100_000)) * 10


@section
def futures(bench: Bench) -> Iterator[Figure]:
    """Ten thousand that await a result: what they take, and how many threads."""

    def waiters(engine: Engine) -> tuple[float, int]:
        import tracemalloc

        parked = engine.insert(Five, state=ARGS, schedule_in=3600)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        threads = threading.active_count()
        held = [engine.result_nowait(parked) for _ in range(10_000)]
        size = (tracemalloc.get_traced_memory()[0] - before) / len(held)
        tracemalloc.stop()
        return size, threading.active_count() - threads

    yield bench.alone("memory of one", "bytes", running(lambda engine: waiters(engine)[0]))
    yield bench.alone("threads more for all", "threads", running(lambda engine: float(waiters(engine)[1])))


@section
def commits(bench: Bench) -> Iterator[Figure]:
    """The slowest commits under load, beside those of the skeleton."""
    jobs = 20_000 if bench.full else 5_000

    def ours(engine: Engine) -> float:
        durations: list[float] = []
        engine.subscribe(lambda event: durations.append(event.measurements["duration"]), "commit.stop")
        pace(engine, noops(jobs))
        return tail_over_median(durations)

    def skeleton(floor: Floor) -> float:
        floor.drain(jobs, 10)
        return tail_over_median(floor.turns_s)

    yield bench.compare("99th percentile over median", "x", running(ours), bare(skeleton), at_most=5)


def tail_over_median(samples: list[float]) -> float:
    """How far the slow ones stand out."""
    return statistics.quantiles(samples, n=100)[98] / statistics.median(samples)


@section
def execute(bench: Bench) -> Iterator[Figure]:
    """One ctx.execute a step, beside none."""

    def ours(engine: Engine) -> float:
        with contextlib.closing(engine.connect()) as connection:
            connection.execute("CREATE TABLE ledger (id INTEGER PRIMARY KEY, amount INTEGER NOT NULL) STRICT")
        return pace(engine, [Insert(Ledger, args=ARGS)] * 3_000)

    figure = bench.compare("drain, an INSERT a step", "jobs/s", running(ours), rate(noops(3_000)))
    yield figure
    added = [1e6 / a - 1e6 / b for a, b in zip(figure.ours, figure.floor, strict=True)]
    yield Figure("which adds", "us", added)


@section
def events(bench: Bench) -> Iterator[Figure]:
    """Somebody who listens to every event, beside nobody."""

    def ours(engine: Engine) -> float:
        engine.subscribe(ignore)
        return pace(engine, noops(3_000))

    yield bench.compare("drain, 10 in flight", "jobs/s", running(ours), rate(noops(3_000)))


def ignore(event: Event) -> None:
    """Cost nothing."""


@section
def idle(bench: Bench) -> Iterator[Figure]:
    """What a running engine costs that has nothing to do, beside a bare thread that looks as often."""
    ours = running(lambda engine: percent_of_a_core())
    yield bench.compare("processor", "% core", ours, bare(percent_of_a_look), at_most=0.2)


def percent_of_a_core() -> float:
    """What this process spends while its main thread sleeps."""
    time.sleep(2.5)  # for two seconds after any commit an engine looks more often
    used, rest_s = time.process_time(), seconds(lambda: time.sleep(1.5))
    return 100 * (time.process_time() - used) / rest_s


def percent_of_a_look(floor: Floor) -> float:
    """Asking every 50 ms whether another process has committed."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            floor.connection.pragma("data_version")

    thread = threading.Thread(target=look)
    thread.start()
    percent = percent_of_a_core()
    ended.set()
    thread.join()
    return percent


@section
def imports(bench: Bench) -> Iterator[Figure]:
    """Import in a fresh process from bytecode, as of an installed module, beside that of what it needs."""
    pairs = [import_ms(bench) for _ in range(2 * bench.rounds + 2)][1:]  # the first one compiles
    needs, adds = zip(*pairs, strict=True)
    yield Figure("durable, beside apsw + attrs + cattrs", "ms", adds, needs, at_most=50)


def import_ms(bench: Bench) -> tuple[float, float]:
    """Milliseconds that importing takes: what durable needs, and durable after it."""
    code = """if True:
        import time; began = time.perf_counter()
        import apsw, attrs, cattrs, cattrs.preconf.json; needed = time.perf_counter()
        import durable; ended = time.perf_counter()
        print(1000 * (needed - began), 1000 * (ended - needed))"""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(bench.directory), "PYTHONDONTWRITEBYTECODE": ""}
    run = partial(subprocess.run, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    needs_ms, durable_ms = run([sys.executable, "-c", code], cwd=Path(durable.__file__).parent).stdout.split()
    return float(needs_ms), float(durable_ms)


# ---------------------------------------------------------------- machines


@section
def signals(bench: Bench) -> Iterator[Figure]:
    """From a signal to the woken step, beside a bare commit of one row."""
    with beside_floor(bench) as (engine, floor):
        ours = partial(median_ms, partial(signal_to_handler_s, engine))
        bare_commit = partial(median_ms, partial(rested_s, floor.insert))
        yield bench.take_turns("signal to handler", "ms", ours, bare_commit)


def signal_to_handler_s(engine: Engine) -> float:
    """Seconds, to a machine that is parked."""
    target = engine.insert(Parked, state=ARGS)
    engine.wait(target, PATIENCE_S)
    time.sleep(REST_S)
    began = now()
    engine.signal(target, "go", ARGS)
    return float(engine.result(target, PATIENCE_S)) - began


@section
def children(bench: Bench) -> Iterator[Figure]:
    """Fan-out to 10,000 children and their join, beside insert_all and drain of as many."""
    count = 10_000

    def us_a_child(run: Callable[[Engine], object]) -> Work:
        return running(lambda engine: 1e6 / count * seconds(lambda: run(engine)))

    family = us_a_child(lambda engine: settle(engine, [engine.insert(FanOut, state={"children": count})]))
    plain = us_a_child(lambda engine: settle(engine, engine.insert_all(noops(count))))
    yield bench.compare("a child", "us", family, plain)


@section
def waiting(bench: Bench) -> Iterator[Figure]:
    """Steps that wait 50 ms, all at once, beside the bare waiting and the skeleton after it."""

    def threads() -> None:
        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            list(pool.map(time.sleep, [NAP_S] * 200))

    async def tasks() -> None:
        await asyncio.gather(*(asyncio.sleep(NAP_S) for _ in range(5_000)))

    def ms(jobs: int, job: Callable[[], object]) -> Work:
        pool = rate([Insert(job)] * jobs, jobs)
        return lambda path: 1000 * jobs / pool(path)

    def floor_ms(jobs: int, wait: Callable[[], object]) -> Work:
        return bare(lambda floor: 1000 * (seconds(wait) + jobs / floor.drain(jobs, jobs)))

    yield bench.compare("200 in threads", "ms", ms(200, nap), floor_ms(200, threads))
    loop = floor_ms(5_000, lambda: asyncio.run(tasks()))
    yield bench.compare("5,000 on one event loop", "ms", ms(5_000, nap_async), loop)


# ---------------------------------------------------------------- backlogs

Backlog = Callable[[Engine, int], object]


def urgent(engine: Engine, rows: int, **options: Any) -> None:
    """Rows that go before all others, if they can."""
    engine.insert_all(noops(rows, priority=-1, **options))


def held(engine: Engine, rows: int) -> None:
    """Rows whose key somebody holds."""
    engine.insert(Hold, concurrency_key="account:1")
    urgent(engine, rows, concurrency_key="account:1")


throttled = partial(urgent, rate_limit="slow")  # their bucket is empty, once the first has had its one token
dated = partial(urgent, schedule_in=86_400)


def finished(engine: Engine, rows: int) -> None:
    """Rows that have ended: copies of one that really has, but for its id and what SQLite generates."""
    original = engine.insert(Noop, args=ARGS)
    engine.wait(original, PATIENCE_S, until="terminal")
    with contextlib.closing(engine.connect()) as connection:
        names = connection.execute("SELECT name FROM pragma_table_info('durable_instances') WHERE NOT pk")
        columns = ", ".join(name for (name,) in names)
        copies = "WITH RECURSIVE copy (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM copy WHERE n < ?)"
        rows_of = f"SELECT {columns} FROM durable_instances, copy WHERE id = ?"
        connection.execute(f"{copies} INSERT INTO durable_instances ({columns}) {rows_of}", (rows, original))


@contextlib.contextmanager
def loaded(bench: Bench, *backlogs: tuple[Backlog, int]) -> Iterator[Engine]:
    """A running engine on a file with these backlogs."""
    hold, buckets = Hold(), {"slow": durable.RateLimit(1, per=86_400)}
    with (
        bench.file() as path,
        Engine(path, queues={"default": 10, "holder": 1}, rate_limits=buckets, fsms=[hold]) as engine,
    ):
        for backlog, rows in backlogs:
            backlog(engine, rows)
        yield engine
        hold.released.set()


@section
def limits(bench: Bench) -> Iterator[Figure]:
    """Work that can run, in a file with 100,000 more urgent rows that can't, beside an empty file."""
    for what, backlog in (("key held", held), ("bucket empty", throttled), ("tomorrow", dated)):
        with loaded(bench) as empty, loaded(bench, (backlog, 100_000)) as full:
            yield Figure(f"{what}: the first job through", "ms", [1000 * lone_s(full)])
            yield beside(bench, f"{what}: drain", "jobs/s", pace_of_2000, full, empty, 0.8)
            yield beside(bench, f"{what}: insert to result", "ms", lone_ms, full, empty, 0.8)


def beside(
    bench: Bench, what: str, unit: str, sample: Callable[[Engine], float], full: Engine, empty: Engine, at_least: float
) -> Figure:
    """The same on both files, in turns."""
    return bench.take_turns(what, unit, lambda: sample(full), lambda: sample(empty), at_least=at_least)


def pace_of_2000(engine: Engine) -> float:
    """Jobs a second."""
    return pace(engine, noops(2_000))


def lone_ms(engine: Engine) -> float:
    """Milliseconds of one job, the median."""
    return median_ms(lambda: lone_s(engine), 25)


@section
def keys(bench: Bench) -> Iterator[Figure]:
    """A thousand tenants, one after the other, each under a limit of its own, beside the same rows without.

    Concurrency keys of one slot hold nearly every row back once, the buckets none.
    """
    rows = 100 if bench.full else 5
    tenants = [f"tenant:{n // rows}" for n in range(1_000 * rows)]
    plain, buckets = rate(noops(len(tenants))), {"tenant": durable.RateLimit(1_000, per=1)}
    keyed = rate([Insert(Noop, args=ARGS, concurrency_key=tenant) for tenant in tenants])
    charged = rate([Insert(Noop, args=ARGS, rate_limit=tenant) for tenant in tenants], rate_limits=buckets)
    yield bench.compare(f"1,000 keys with {rows} rows each", "jobs/s", keyed, plain)
    yield bench.compare(f"1,000 buckets with {rows} rows each", "jobs/s", charged, plain)


@section
def aged(bench: Bench) -> Iterator[Figure]:
    """A file with much behind it and much ahead, beside an empty one."""
    rows = 1_000_000 if bench.full else 100_000
    with loaded(bench) as empty, loaded(bench, (finished, rows), (dated, 100_000), (held, 100_000)) as full:
        lone_s(full)
        what = f"{rows:,} done, 2 x 100,000 to come"
        yield beside(bench, what, "jobs/s", pace_of_2000, full, empty, 0.9)


@section
def memory(bench: Bench) -> Iterator[Figure]:
    """The most memory a worker takes for 5,000 jobs of a large backlog, beside a file with just these."""

    def peak_mb(rows: int) -> Work:
        def work(path: Path) -> float:
            with Engine(path, queues={}) as engine:
                engine.insert_all(noops(rows))
            return float(child("memory", path, 5_000))

        return work

    rows = 1_000_000 if bench.full else 100_000
    yield bench.compare(f"{rows:,} rows waiting", "MB", peak_mb(rows), peak_mb(5_000), at_least=0.8)


# ---------------------------------------------------------------- processes


@section
def wakes(bench: Bench) -> Iterator[Figure]:
    """From an insert's return in this process to its handler in another one, which looks every 50 ms at rest."""
    with bench.file() as path, Engine(path, queues={}) as engine, workers(engine, path, 1):

        def wake_ms(pause_s: float) -> float:
            time.sleep(pause_s)
            inserted, committed = engine.insert(clock), now()
            return 1000 * (float(engine.result(inserted, PATIENCE_S)) - committed)

        yield Figure("after a rest", "ms", [wake_ms(2.3 + 0.017 * n) for n in range(bench.rounds)], at_most=50)
        busy = [wake_ms(0.013 * (1 + n % 7)) for n in range(40)]
        yield Figure("active within the last second", "ms", busy, at_most=10)


@section
def processes(bench: Bench) -> Iterator[Figure]:
    """Two worker processes on one file, beside one; first what the machine itself makes of two.

    So many steps that waking the workers, and the last steps, which one of them ends alone, do not count.
    """
    loops = int(5_000 / min(seconds(lambda: spin(1_000_000)) for _ in range(5)))
    spins = [Insert(spin, args={"loops": loops})] * 500
    yield bench.take_turns("bare processes that count", "/s", lambda: bare_pace(2), lambda: bare_pace(1))
    yield two_workers(bench, "steps of 5 ms of processor", spins, at_least=1.8)
    yield two_workers(bench, "steps that do nothing", noops(3_000))


def two_workers(bench: Bench, what: str, work: Sequence[Insert], **bar: float) -> Figure:
    """The pace of two, beside one."""
    two, one = (partial(pace_of_workers, bench, work, count) for count in (2, 1))
    return bench.take_turns(what, "jobs/s", two, one, **bar)


def pace_of_workers(bench: Bench, work: Sequence[Insert], count: int) -> float:
    """Jobs a second of so many processes."""
    with bench.file() as path, Engine(path, queues={}, poll_interval=0.002) as engine, workers(engine, path, count):
        return pace(engine, work, tail=10 * count)


def bare_pace(count: int) -> float:
    """How often a second so many processes count to a million, together."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return sum(10 / float(spent_s) for spent_s in pool.map(child, ["spin"] * count))


@contextlib.contextmanager
def workers(engine: Engine, path: Path, count: int) -> Iterator[None]:
    """That many processes that run the work of this file, all up."""
    started = [subprocess.Popen(command("worker", path)) for _ in range(count)]
    try:
        while sum(bool(worker.queues) for worker in engine.workers()) < count:
            if any(process.poll() is not None for process in started):
                raise SystemExit("a worker process ended before its time: its error stands above")
            time.sleep(0.01)
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(PATIENCE_S)


def command(name: str, *arguments: object) -> list[str]:
    """This file as a child process."""
    return [sys.executable, __file__, "--child", name, *map(str, arguments)]


def child(name: str, *arguments: object) -> str:
    """What such a process prints."""
    return subprocess.run(command(name, *arguments), check=True, stdout=subprocess.PIPE, text=True).stdout


def child_worker(path: str) -> None:
    """Run the queue until told to end."""
    Engine(path).run()


def child_memory(path: str, jobs: str) -> None:
    """Run that many jobs and print the peak of resident memory in megabytes."""
    with Engine(path, prefetch=100) as engine:
        engine.wait(int(jobs), PATIENCE_S, until="terminal")
    status = Path("/proc/self/status")
    if status.exists():  # the kernel's other figure, below, starts from that of the process that forked
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line)
        return print(int(kilobytes) / 1024)
    import resource  # not on Windows

    return print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20))


def child_spin() -> None:
    """Count to ten million and print the seconds."""
    print(seconds(lambda: spin(10_000_000)))


def child_machine(url: str) -> None:
    """Run an engine on PostgreSQL until standard input ends; say that it is ready, and what processor time it took."""
    with fleet_engine(url, queues={"default": 10}):
        print("ready", flush=True)
        sys.stdin.read()
    print(time.process_time(), flush=True)


CHILDREN: dict[str, Callable[..., None]] = {
    "machine": child_machine,
    "memory": child_memory,
    "spin": child_spin,
    "worker": child_worker,
}

# ---------------------------------------------------------------- the page


@section
def page(bench: Bench) -> Iterator[Figure]:
    """The page of a large file, which three viewers look at while its worker drains; and that worker without them."""
    rows, jobs = (1_000_000, 60_000) if bench.full else (100_000, 20_000)
    asked_ms: dict[str, list[float]] = {"overview": [], "instances": []}
    with loaded(bench, (finished, rows)) as engine, contextlib.closing(engine.connect()) as connection:

        def drain() -> float:
            return pace(engine, noops(jobs))

        def drain_viewed() -> float:
            with child_beside("viewers", connection.filename) as viewers:
                jobs_a_second = drain()
            for view, ms in json.loads(viewers()).items():
                asked_ms[view] += ms
            return jobs_a_second

        worker = bench.take_turns("its worker, beside three viewers", "jobs/s", drain_viewed, drain, at_least=0.95)
    for view, ms in asked_ms.items():
        longest_ms = sorted(ms)[len(ms) * 19 // 20]
        yield Figure(f"{view} of {rows:,} rows, 19 of 20 within", "ms", [longest_ms], at_most=100)
    yield worker


@contextlib.contextmanager
def child_beside(name: str, *arguments: object) -> Iterator[Callable[[], str]]:
    """Such a process, ready, until the block ends; what it prints then is had by a call."""
    said: list[str] = []
    with subprocess.Popen(
        command(name, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise SystemExit(f"{name}: did not start, its error stands above")
        yield lambda: said[0]
        said.append(process.communicate("\n", PATIENCE_S)[0])


def child_page(file: str) -> None:
    """Serve the page of a file until told to end, its address printed first."""
    server, address = importlib.import_module("durable_tools.page").make_server(file)
    print(address, flush=True)
    server.serve_forever()


def child_viewers(file: str) -> None:
    """Look at a page, three at once and each as a browser does, until standard input ends; print the milliseconds."""
    asked_ms: dict[str, list[float]] = {"overview": [], "instances": []}
    is_over = threading.Event()
    with subprocess.Popen(command("page", file), stdout=subprocess.PIPE, text=True) as server:
        place, _, token = server.stdout.readline().strip().partition("?token=") if server.stdout else ("", "", "")

        def ask(view: str) -> dict[str, Any]:
            request = urllib.request.Request(f"{place}api/{view}", headers={"Authorization": f"Bearer {token}"})
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found

        def look() -> None:
            for view in itertools.cycle(asked_ms):
                asked_ms[view].append(1000 * seconds(partial(ask, view)))
                if is_over.wait(0.5):
                    return

        while not ask("overview")["is_counted"]:  # what is made once, as the first count of all rows, is made
            time.sleep(0.1)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            looks = [pool.submit(look) for _ in range(3)]
            print("ready", flush=True)
            sys.stdin.read()
            is_over.set()
        server.terminate()
    for one in looks:
        one.result()
    print(json.dumps(asked_ms), flush=True)


CHILDREN |= {"page": child_page, "viewers": child_viewers}

# ---------------------------------------------------------------- several machines


def fleet_engine(url: str, **options: Any) -> Any:
    """An engine on PostgreSQL, whose libraries nothing else here needs."""
    return importlib.import_module("durable_tools.dbos").DBOSEngine(url, **options)


@contextlib.contextmanager
def fleet(url: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """So many engines in processes of their own."""
    command = [sys.executable, __file__, "--child", "machine", url]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise SystemExit("a worker did not start")
        yield processes
    finally:
        for process in processes:
            with process:
                process.terminate()


def work_off(engine: Any, work: Sequence[Insert]) -> float:
    """Seconds from the insert of the jobs to the end of the last."""
    ids = engine.insert_all(work)
    return seconds(lambda: settle(engine, ids, len(ids) // 10))


def processor_s(processes: Iterable[subprocess.Popen[str]]) -> float:
    """What they have used by now, as Linux tells it."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def server_s() -> float:
    """What the processes of a PostgreSQL server on this machine have used by now."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")
            if name.endswith("(postgres"):
                ticks += int(fields.split()[11]) + int(fields.split()[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def on_postgres(url: str) -> Section:
    """Make the section that measures several machines on that database."""

    def machines(bench: Bench) -> Iterator[Figure]:
        """The same classes on PostgreSQL, with 1, 2 and 4 processes; the floor is the file, in one process."""
        jobs, engine = 2_000 if bench.full else 500, fleet_engine(url, queues={})
        naps = [Insert(nap)] * (jobs // 2)
        quick, slow = bench.once(rate(noops(jobs))), bench.once(rate(naps))
        for count in (1, 2, 4):
            with fleet(url, count) as processes:
                if count == 1:
                    yield Figure("latency, insert to result", "ms", [1000 * lone_s(engine) for _ in range(10)])
                    used, served = processor_s(processes), server_s()
                    time.sleep(5)
                    yield Figure("idle, worker", "% core", [20 * (processor_s(processes) - used)])
                    yield Figure("idle, server", "% core", [20 * (server_s() - served)])
                used, served = processor_s(processes), server_s()
                yield Figure(
                    f"{count} processes, jobs of nothing", "jobs/s", [jobs / work_off(engine, noops(jobs))], [quick]
                )
                worker_ms, server_ms = processor_s(processes) - used, server_s() - served
                yield Figure("their processor a job, worker", "ms", [1000 * worker_ms / jobs])
                yield Figure("their processor a job, server", "ms", [1000 * server_ms / jobs])
                yield Figure(
                    "steps of five a machine",
                    "steps/s",
                    [5 * jobs / 5 / work_off(engine, [Insert(Five)] * (jobs // 5))],
                )
                yield Figure(f"jobs of {1000 * NAP_S:g} ms", "jobs/s", [len(naps) / work_off(engine, naps)], [slow])
        engine.stop()

    return machines


# ---------------------------------------------------------------- peers

Paces = tuple[float, float]  # rows inserted a second, one by one, and jobs worked off a second


def one_by_one(put: Callable[[], object], work: Callable[[], object], jobs: int) -> Paces:
    """Insert so many with `put`, then work them off, one each time."""
    return jobs / seconds(lambda: repeat(put, jobs)), jobs / seconds(lambda: repeat(work, jobs))


def durable_paces(module: Any, path: Path, jobs: int, synchronous: str) -> Paces:
    """Ours the same way, at ten in flight."""
    with Engine(path, queues={}, synchronous=synchronous) as engine:
        insert_s = seconds(lambda: repeat(lambda: engine.insert(Noop, args=ARGS), jobs))
    return jobs / insert_s, rate(noops(5 * jobs), synchronous=synchronous)(path.with_name("drain.db"))


def huey_paces(huey: Any, path: Path, jobs: int, fsync: bool) -> Paces:
    """Its consumer with one thread: more of them wait for the file's lock."""
    queue = huey.SqliteHuey(filename=str(path), fsync=fsync, results=False)
    ran, ended = itertools.count(1), threading.Event()
    task = queue.task(name="noop")(lambda: ended.set() if next(ran) == jobs else None)
    insert_s = seconds(lambda: repeat(task, jobs))
    consumer = queue.create_consumer(workers=1, periodic=False, initial_delay=0.001)
    work_s = seconds(lambda: (consumer.start(), ended.wait(PATIENCE_S)))
    consumer.stop(graceful=True)
    return jobs / insert_s, jobs / work_s


def litequeue_paces(litequeue: Any, path: Path, jobs: int, synchronous: str) -> Paces:
    """One thread that pops a message and marks it done."""
    queue = litequeue.LiteQueue(path)
    with contextlib.closing(queue.conn):
        queue.conn.execute(f"PRAGMA synchronous = {synchronous}")

        def work() -> None:
            message = queue.pop()
            queue.done(message.message_id, claim_id=message.claim_id)

        return one_by_one(lambda: queue.put("{}"), work, jobs)


def persistqueue_paces(persistqueue: Any, path: Path, jobs: int) -> Paces:
    """One thread that gets an item and acknowledges it."""
    with contextlib.closing(persistqueue.SQLiteAckQueue(str(path.parent))) as queue:
        return one_by_one(lambda: queue.put(ARGS), lambda: queue.ack(queue.get()), jobs)


def dbos_paces(dbos: Any, path: Path, jobs: int) -> Paces:
    """Workflows through a queue that looks a hundred times a second."""
    app = dbos.DBOS(
        config={"name": "bench", "system_database_url": f"sqlite:///{path}", "console_log_level": "CRITICAL"}
    )
    workflow = app.workflow(name="noop")(lambda: None)
    app.launch()
    app.register_queue("bench", worker_concurrency=10, polling_interval_sec=0.01)
    began = now()
    handles = [app.enqueue_workflow("bench", workflow) for _ in range(jobs)]
    insert_s = now() - began
    ended_s = [now() - began for handle in handles if handle.get_result() is None]
    dbos.DBOS.destroy(destroy_registry=True)
    return jobs / insert_s, jobs / ended_s[-1]


def ballast_paces(ballast: Any, path: Path, jobs: int) -> Paces:
    """Its worker in this thread, which marks a job done in the transaction of its handler."""
    database, queue = ballast.Database(path), ballast.JobQueue()
    ballast.install(database)

    def put() -> None:
        with database.transaction() as connection:
            queue.enqueue(connection, "noop", ARGS)

    worker = ballast.JobWorker(database)
    worker.register("noop", lambda connection, payload: None)
    insert_s = seconds(lambda: repeat(put, jobs))
    return jobs / insert_s, jobs / seconds(lambda: worker.drain(2 * jobs))


def potatoq_paces(potatoq: Any, path: Path, jobs: int, durable: bool) -> Paces:
    """Its own drain in this thread, which claims, runs and acknowledges as a worker does."""
    testing = importlib.import_module("potatoq.testing")
    app = potatoq.Potatoq("bench", broker=f"sqlite:///{path}", broker_transport_options={"durable": durable})
    task = app.task(name="noop")(lambda n: None)
    insert_s = seconds(lambda: repeat(lambda: task.delay(7), jobs))
    return jobs / insert_s, jobs / seconds(lambda: testing.drain(app, max_tasks=2 * jobs))


def duroxide_paces(duroxide: Any, path: Path, jobs: int) -> Paces:
    """Orchestrations without activities, on its own runtime of many threads."""
    provider = duroxide.SqliteProvider.open(f"sqlite:{path}?mode=rwc")
    runtime, client, ids = duroxide.Runtime(provider), duroxide.Client(provider), map(str, range(jobs))

    def noop(context: Any, given: Any) -> Iterator[Any]:
        yield from ()

    runtime.register_orchestration("noop", noop)
    insert_s = seconds(lambda: repeat(lambda: client.start_orchestration(next(ids), "noop", ARGS), jobs))

    def work() -> None:
        runtime.start()
        for n in range(jobs):
            client.wait_for_orchestration(str(n), int(1000 * PATIENCE_S))

    work_s = seconds(work)
    runtime.shutdown(100)
    return jobs / insert_s, jobs / work_s


@attrs.frozen
class Peer:
    """A library in one setting, with what a commit waits for."""

    module: str
    setting: str
    fsyncs: bool
    paces: Callable[[Any, Path, int], Paces]
    jobs: int = 1_000


PEERS = (
    Peer("durable", "full", True, partial(durable_paces, synchronous="full")),
    Peer("huey", "SqliteHuey", True, partial(huey_paces, fsync=True)),
    Peer("dbos", "SQLite", True, dbos_paces, jobs=100),
    Peer("litequeue", "full", True, partial(litequeue_paces, synchronous="full")),
    Peer("persistqueue", "SQLiteAckQueue", True, persistqueue_paces),
    Peer("potatoq", "durable", True, partial(potatoq_paces, durable=True)),
    Peer("durable", "normal", False, partial(durable_paces, synchronous="normal")),
    Peer("huey", "SqliteHuey", False, partial(huey_paces, fsync=False)),
    Peer("litequeue", "as it comes", False, partial(litequeue_paces, synchronous="normal")),
    Peer("ballast", "as it comes", False, ballast_paces),
    Peer("duroxide", "as it comes", False, duroxide_paces, jobs=200),
    Peer("potatoq", "as it comes", False, partial(potatoq_paces, durable=False)),
)


def peers(bench: Bench) -> Iterator[Figure]:
    """The same no-op work on other libraries; the floor here is durable at the same durability."""
    ours: dict[bool, tuple[list[float], list[float]]] = {}
    for peer in PEERS:
        what = f"{peer.module} ({peer.setting}, {'fsync' if peer.fsyncs else 'no fsync'})"
        if importlib.util.find_spec(peer.module) is None:
            yield Figure(f"{what}: not installed", "", [])
            continue
        try:
            module = importlib.import_module(peer.module)
            paces = [paces_of(bench, peer, module) for _ in range(bench.rounds)]
        except (AttributeError, ImportError, TypeError) as error:  # another version, with other names
            yield Figure(f"{what}: not measured, {type(error).__name__}: {error}", "", [])
            continue
        inserted, worked = [pair[0] for pair in paces], [pair[1] for pair in paces]
        floor = ours.setdefault(peer.fsyncs, (inserted, worked))
        yield Figure(f"{what}: insert", "rows/s", inserted, floor[0])
        yield Figure(f"{what}: work", "jobs/s", worked, floor[1])


def paces_of(bench: Bench, peer: Peer, module: Any) -> Paces:
    """One sample on a fresh file."""
    with bench.file() as path:
        return peer.paces(module, path, peer.jobs)


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument("--full", action="store_true", help="larger files and more rounds")
    parser.add_argument("--peers", action="store_true", help="the same work on other libraries")
    parser.add_argument("--postgres", metavar="URL", help="several machines, on that database")
    parser.add_argument("--json", action="store_true", help="print an array of figures")
    parser.add_argument("--directory", type=Path, help="where to put the files")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(sections: Iterable[Section], bench: Bench) -> Iterator[tuple[Section, Figure]]:
    """Run the sections one after the other."""
    for run in sections:
        for figure in run(bench):
            yield run, figure


def heading(run: Section) -> str:
    """What a section says of itself."""
    return inspect.cleandoc(run.__doc__ or "")


def machine(directory: Path) -> str:
    """What figures depend on most: the disk, and the speed of this interpreter."""
    with tempfile.TemporaryFile(dir=directory) as file:

        def sync_ms() -> float:
            file.write(bytes(4096))
            file.flush()
            return 1000 * seconds(lambda: os.fsync(file.fileno()))

        fsyncs = [sync_ms() for _ in range(200)]
    counts = [1000 * seconds(lambda: spin(1_000_000)) for _ in range(5)]
    return (
        f"fsync of an appended page {spread(fsyncs)} ms; Python {sys.version.split()[0]} counts to a million in "
        f"{spread(counts)} ms; {os.cpu_count()} processors"
    )


def show(figures: Iterable[tuple[Section, Figure]], directory: Path) -> None:
    """Print the table, each row as soon as it is known."""
    print(machine(directory))
    print(f"  {'':<42}{'ours':>25} {'':<7}{'floor':>25}  {'ratio':>18} {'over':>10}  bar")
    for run, rows in itertools.groupby(figures, key=lambda pair: pair[0]):
        print(f"\n{run.__name__}: {heading(run)}")
        for _, figure in rows:
            print(figure.line(), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print."""
    options = parse(argv)
    if options.child:
        CHILDREN[options.child[0]](*options.child[1:])
        return 0
    sections = [peers] if options.peers else [SECTIONS[name] for name in options.only or SECTIONS]
    if options.postgres:
        sections = [on_postgres(options.postgres)]
    if options.list:
        print(*(f"{run.__name__:<10} {heading(run).splitlines()[0]}" for run in sections), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory, ignore_cleanup_errors=True) as directory:
        figures = measure(sections, Bench(Path(directory), options.full))
        if options.json:
            records = [{"section": run.__name__, **figure.record()} for run, figure in figures]
            print(json.dumps(records, indent=1))
        else:
            show(figures, Path(directory))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
