"""Durable execution in one module, on one SQLite file.

Write a finite-state machine, or its one-step form, a job, as a class. The engine commits its state before the
next step proceeds, so that an instance survives a crash of the process, of the machine, or a power cut, and
resumes where it left off.

>>> import attrs, tempfile
>>> class Greeting(FSM):
...     @attrs.frozen
...     class State:
...         name: str
...     @step
...     def start(self, ctx):
...         return Await("answer", then="end", timeout=3600)
...     @step
...     def end(self, ctx):
...         return Done(f"{ctx.state.name} says {ctx.awaited[0].payload}")
>>> with tempfile.TemporaryDirectory() as folder, Engine(f"{folder}/greetings.db") as engine:
...     _ = engine.insert(Greeting, state={"name": "Ada"}, correlation_key="ada")
...     engine.signal("ada", "answer", "hello")
...     print(engine.result("ada", timeout=10))
Ada says hello

The guarantee: when a step completes, its outcome (step, state, children, consumed signals, the user's own SQL) is
committed and synced in one transaction before anything that depends on it runs. A crash before that commit runs
the step again: at least once. Effects inside the file (`Context.execute`) happen exactly once.

Read from top to bottom; nothing refers to what stands below it:

    Errors, Values, Limits, Schedules, Records, Outcomes, Schemas, Behaviour, Transitions, Files, Store, Execution,
    Threads, Beat, Scheduler, Engine, Tools
"""

from __future__ import annotations

import _thread
import atexit
import collections
import contextlib
import contextvars
import copy
import copyreg
import dataclasses
import datetime as dt
import enum
import errno
import functools
import heapq
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import pathlib
import stat
import sys
import threading
import time
import traceback
import types
import typing
import warnings
import weakref
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Container,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NamedTuple, Self, TypedDict, Unpack, cast, overload

import apsw
import attrs
import cattrs
import cattrs.cols
import cattrs.fns
import cattrs.gen

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures
    import sqlite3

__all__ = [
    "Await",
    "Cancel",
    "Context",
    "Cron",
    "Done",
    "DuplicateError",
    "DurableError",
    "Engine",
    "EngineClosedError",
    "Event",
    "Every",
    "FSM",
    "Fail",
    "FailedError",
    "Insert",
    "Instance",
    "KEEP",
    "LIVE",
    "Next",
    "NoTargetError",
    "NotFoundError",
    "OutcomeError",
    "Progress",
    "RateLimit",
    "Retry",
    "Schedule",
    "ScheduleChildren",
    "SchemaError",
    "SharedFileError",
    "Signal",
    "StateError",
    "Status",
    "Stop",
    "Transition",
    "UnknownFSMError",
    "UnknownLimitError",
    "Worker",
    "insert_into",
    "job",
    "step",
]


_log = logging.getLogger("durable")

_Duration = int | float | dt.timedelta

# ==================================================================================================
# Errors
# ==================================================================================================


class DurableError(Exception):
    """Base of every error that this module raises on its own account.

    The tree::

        DurableError
        |- DuplicateError     the correlation key is taken; `.id` is the occupant's
        |- NoTargetError      a signal found no live instance
        |- NotFoundError      no instance with that id or correlation key
        |- StateError         a state does not fit its schema; `.problems`, one line each
        |- OutcomeError       a step's outcome, or a signal's payload, is malformed; a `ValueError`, too
        |- UnknownFSMError    no class is registered under that name
        |- UnknownLimitError  no rate limit of that name is in the file
        |- FailedError        `result` of an instance that failed
        |- SchemaError        the file is damaged, foreign, or from a newer version
        |- SharedFileError    in one process, an engine and something else would have a file open
        `- EngineClosedError  the engine was stopped, or crossed a fork

    Storage that fails (disk full, input/output error, a lock held too long) is a plain `DurableError` with the
    driver's error as its cause.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Through a process pool it comes with its text and its fields, whatever its constructor takes.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class DuplicateError(DurableError):
    """The correlation key is occupied by the instance `id`."""

    def __init__(self, key: str, occupant: int) -> None:
        super().__init__(f"correlation key {key!r} is taken by instance {occupant}")
        self.key = key
        self.id = occupant


class NoTargetError(DurableError):
    """A signal's target is missing, or has ended.

    `status` is that of the instance, or of the last that carried the key, if it has ended; else None.
    """

    def __init__(self, message: str, status: Status | None = None) -> None:
        super().__init__(message)
        self.status = status


class NotFoundError(DurableError):
    """No instance has that id or carries that correlation key."""


class StateError(DurableError):
    """A state does not fit its schema; `problems` has a line for each, with its path."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class OutcomeError(DurableError, ValueError):
    """An outcome is malformed, or something else was returned in its place; or a signal's payload can't be written."""


class UnknownFSMError(DurableError):
    """No class is registered under that name."""


class UnknownLimitError(DurableError):
    """No rate limit of that name is declared, here or in the file."""


class FailedError(DurableError):
    """The instance `id` failed; the message is its `last_error`."""

    def __init__(self, instance: int, last_error: str | None) -> None:
        super().__init__(last_error)
        self.id = instance
        self.last_error = last_error


class SchemaError(DurableError):
    """The file is no database, is damaged, or was made by a newer version."""


class SharedFileError(DurableError):
    """An engine and `sqlite3`, or a plain `open`, would have one file open in one process, which loses commits."""


class EngineClosedError(DurableError):
    """The engine was stopped, or belongs to the process that this one was forked from."""


# ==================================================================================================
# Values
# ==================================================================================================

_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MILLISECOND = dt.timedelta(milliseconds=1)
_START_OF_TIME = -62_135_596_800_000
"""The first millisecond that a `datetime` of UTC can hold; what is earlier, east of Greenwich, is cut to it."""
_END_OF_TIME = 253_402_300_799_999
"""The last one; later instants mean 'never' and are cut to it."""
_LONG_AGO = _START_OF_TIME - 1
"""Before any instant."""

_MAX_INTEGER = 2**63 - 1


class _Ticks:
    """The clocks that measure waits: seconds from anywhere.

    They are kept here because what freezes time in tests (freezegun) replaces the functions of `time`, and the names of
    modules: a wait whose deadline stands still would never end.
    """

    monotonic = time.monotonic
    perf_counter = time.perf_counter


def _brief(value: object, width: int = 80) -> str:
    """Show a value in an error message, cut where it is long."""
    try:
        shown = repr(value)
    except Exception:  # noqa: BLE001 - nested too deep, or not able to say what it is: still to be refused by its name
        shown = f"<{type(value).__name__}>"
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def _duration_ms(value: object, name: str, error: type[Exception] = ValueError) -> int:
    """Read a duration, seconds or a timedelta, as whole milliseconds, rounded up so that nothing fires early."""
    seconds: Any = value.total_seconds() if isinstance(value, dt.timedelta) else value
    try:  # of a Decimal, a Fraction and another library's float as well
        above, below = (-1, 1) if isinstance(seconds, bool) else seconds.as_integer_ratio()
    except (AttributeError, TypeError, ValueError, OverflowError):  # the latter: of what is not finite
        above, below = -1, 1
    if above < 0:
        raise error(f"{name} must be seconds or a timedelta, finite and not negative, not {_brief(value)}")
    # A float's own error (0.1 * 3 = 0.30000000000000004) must not cost a millisecond: hence the rounding.
    return _END_OF_TIME if above * 1000 > _END_OF_TIME * below else math.ceil(round(above * 1000 / below, 6))


def _positive_ms(value: object, name: str, error: type[Exception] = ValueError) -> int:
    """Read a duration of at least a millisecond."""
    milliseconds = _duration_ms(value, name, error)
    if milliseconds == 0:
        raise error(f"{name} must be more than 0 seconds, not {_brief(value)}")
    return milliseconds


def _timeout_s(value: object, name: str, error: type[Exception] = ValueError) -> float | None:
    """Read how many seconds something may take; None for no limit."""
    return None if value is None else _positive_ms(value, name, error) / 1000


def _instant_ms(value: object, name: str) -> int:
    """Read a timezone-aware datetime as milliseconds since the epoch, rounded up, within what can be shown in UTC."""
    if not isinstance(value, dt.datetime):
        raise ValueError(f"{name} must be a timezone-aware datetime, not {_brief(value)}")
    if value.utcoffset() is None:
        raise ValueError(f"{name} must be timezone-aware, not the naive {_brief(value)}")
    return max(_START_OF_TIME, min(-((_EPOCH - value) // _MILLISECOND), _END_OF_TIME))


def _later(now: int, due: object, name: str) -> int:
    """Say when something is due in that time, or at that instant; one that is past means now."""
    if isinstance(due, dt.datetime):
        return max(now, _instant_ms(due, name))
    return min(now + _duration_ms(due, name), _END_OF_TIME)


def _instant(milliseconds: int) -> dt.datetime:
    """Show an instant of the file; one beyond the calendar as its nearest end, so that looking never fails."""
    try:
        return _EPOCH + milliseconds * _MILLISECOND
    except OverflowError:  # of a clock that counted in other units, or of another hand
        return _EPOCH + (_END_OF_TIME if milliseconds > 0 else _START_OF_TIME) * _MILLISECOND


def _instant_or_none(milliseconds: int | None) -> dt.datetime | None:
    return None if milliseconds is None else _instant(milliseconds)


def _text(value: object, name: str, error: type[Exception] = ValueError) -> str:
    """Check a name or a key: a string, not empty, that UTF-8 can write."""
    if not isinstance(value, str) or not value:
        raise error(f"{name} must be a string that is not empty, not {_brief(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise error(f"{name} must be text that UTF-8 can write, not {_brief(value)}") from None
    return str(value)


def _integer(value: Any, name: str, least: int, error: type[Exception] = ValueError) -> int:
    """Check a whole number that SQLite can hold."""
    is_whole = type(value) is int or (isinstance(value, int) and not isinstance(value, bool))
    if not is_whole or not least <= value <= _MAX_INTEGER:
        allowed = f"of at least {least}" if least > -_MAX_INTEGER else "of at most 64 bits"
        raise error(f"{name} must be an integer {allowed}, not {_brief(value)}")
    return int(value)


def _number(value: object, name: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, not {_brief(value)}")


def _boolean(value: object, name: str, error: type[Exception] = ValueError) -> bool:
    if not isinstance(value, bool):
        raise error(f"{name} must be True or False, not {_brief(value)}")
    return value


_count = functools.partial(_integer, least=1)


def _validator(check: Callable[..., object], **options: Any) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """Make an attrs validator of a check that takes a value and its name."""

    def validate(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        check(value, attribute.name, **options)

    return validate


def _refuse_unknown(given: Iterable[str], allowed: Iterable[str], where: str = "") -> None:
    """Check the names of options."""
    names = list(allowed)
    unknown = set(given).difference(names)
    if unknown:
        raise TypeError(f"{where}unknown option {min(unknown)!r}; allowed are {', '.join(names)}")


def _limit_key(value: object, name: str, error: type[Exception] = ValueError) -> str | None:
    """Read a key of a limit: `"stripe"`, or the pair `("stripe", tenant)`, stored `stripe:tenant`.

    Longer tuples and names with a colon are refused, since the same text would be stored for different ones.
    """
    if value is None:
        return None
    if isinstance(value, tuple) and len(value) in (1, 2) and ":" not in str(value[0]):
        return _text(":".join(map(str, value)), name, error)
    if isinstance(value, str):
        return _text(value, name, error)
    allowed = "a string, a pair such as ('stripe', tenant) with no ':' in its first part, or None"
    raise error(f"{name} must be {allowed}, not {_brief(value)}")


def _limit_name(key: str) -> str:
    return key.partition(":")[0]


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_raw_decode = json.JSONDecoder().raw_decode


def _decode(text: str) -> Any:
    """Read JSON that this module wrote, without white space around it to look for, in a third of the time."""
    return _raw_decode(text)[0]


def _load_value(text: str | None) -> Any:
    """Read a result or a payload: None stands as SQL's NULL."""
    return None if text is None else _decode(text)


_MAX_DEPTH = 200
_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep, or in itself"


def _refuse_depth(value: Any) -> None:
    """Refuse what is nested so deep that reading it again may not have the stack for it: in a thread, or by a step."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        within = itertools.chain.from_iterable(one.values() if isinstance(one, dict) else one for one in level)
        level = [one for one in within if isinstance(one, dict | list | tuple)]
    if level:
        raise ValueError(_TOO_DEEP)


def _json(value: object) -> str:
    """Write JSON as readable text; what UTF-8 can't write (a lone surrogate) is escaped."""
    try:
        text = _encode(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if len(text) > 2 * _MAX_DEPTH and text.count("[") + text.count("{") > _MAX_DEPTH:
        _refuse_depth(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return _encode_ascii(value)
    return text


def _printable(text: str) -> str:
    """Make text that came with an exception fit for storage (file names may hold lone surrogates)."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _error_text(error: str | BaseException) -> str:
    """Write an error the way `last_error` shows it: `ValueError: boom`, or a given reason as it is."""
    if isinstance(error, str):
        return _printable(error)
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - an error that can't say what it is remains an error, not a crash
        message = "(its text can't be made)"
    return _printable(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _own_traceback(error: BaseException) -> types.TracebackType | None:
    """Return an error's traceback from the user's own frame on; None for an error that was never raised."""
    own = error.__traceback__
    while own is not None and own.tb_next is not None and own.tb_frame.f_globals is globals():
        own = own.tb_next
    return own


def _traceback_text(error: BaseException) -> str | None:
    """Write that traceback."""
    own = _own_traceback(error)
    if own is None:
        return None
    return _printable("".join(traceback.format_exception(type(error), error, own)))


# ==================================================================================================
# Limits
# ==================================================================================================


@attrs.frozen
class RateLimit:
    """A token bucket: `allowed` tokens per `per` (seconds or a timedelta), at most `burst` at once.

    `burst` is `allowed` unless given. A bucket that was never used, or that time has filled, is full. Its tokens go to
    the rows of all queues that an engine serves in one order, so that a heavy one gets them at last.

    >>> RateLimit(100, per=60)
    RateLimit(allowed=100, per=60, burst=100)
    """

    allowed: int = attrs.field(validator=_validator(_count))
    per: _Duration
    burst: int = cast(int, None)

    def __attrs_post_init__(self) -> None:
        if cast("int | None", self.burst) is None:
            object.__setattr__(self, "burst", self.allowed)
        if _integer(self.burst, "burst", 1) * max(1000, _positive_ms(self.per, "per")) > _MAX_INTEGER // 4:
            raise ValueError(f"burst times per must be under 2 ** 61 token-milliseconds, not {self!r}")


class _Policy(NamedTuple):
    """A rate limit as the file keeps it.

    Levels are whole numbers, in units of 1/per_ms of a token, so that refilling for a millisecond adds exactly
    `allowed` units and no grant is ever owed to rounding.
    """

    name: str
    allowed: int
    per_ms: int
    burst: int

    @property
    def capacity(self) -> int:
        return self.burst * self.per_ms

    def price(self, weight: int) -> int:
        """Units that a step of that weight takes; a burst lowered below it later on asks for all there is."""
        return min(weight, self.burst) * self.per_ms

    def level(self, level: int, refilled_at: int, now: int) -> int:
        """Units in the bucket now. A clock that was set back adds nothing and takes nothing away."""
        return min(self.capacity, level + max(0, now - refilled_at) * self.allowed)

    def instant_of(self, units: int, level: int, now: int) -> int:
        """First millisecond at which the bucket holds that many units, if nobody takes any."""
        return now + max(0, -(-(units - level) // self.allowed))


def _check_rate(key: str, weight: int, policy: _Policy | None) -> None:
    if policy is None:
        raise UnknownLimitError(f"no rate limit {_limit_name(key)!r} is declared: give Engine(rate_limits=...) one")
    if weight > policy.burst:
        raise ValueError(f"weight {weight} is over the burst of rate limit {policy.name!r}, {policy.burst}")


# ==================================================================================================
# Schedules
# ==================================================================================================

_CRON_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
}
_NO_CRON = "Cron needs the packages cronsim and tzlocal: pip install 'durable-fsm[cron]'"
_COUNTED = 1000
"""So many missed occurrences are counted exactly, and at most so many are caught up."""
_CRON_INTERVAL_MS = 60_000
"""Cron's smallest interval."""
_ON_TIME_MS = 1000
"""An occurrence is late, not missed, while it is younger than this."""


def _local_zone() -> dt.tzinfo:
    """Find this machine's time zone, anew each time, for a laptop travels. It takes over a millisecond."""
    try:
        import tzlocal
    except ImportError as error:
        raise ImportError(_NO_CRON) from error
    try:
        return tzlocal.reload_localzone()
    except Exception as error:  # of its own kinds, files that can't be read, warnings that are errors
        raise ValueError(f"zone 'local' can't be told here, name one or set TZ: {_error_text(error)}") from error


def _zone(name: object) -> dt.tzinfo:
    """Find a time zone."""
    if name == "UTC":
        return dt.UTC  # which cronsim knows to have no changes of the clock
    if name == "local":
        return _local_zone()
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(cast(str, name))
    except (ValueError, TypeError, AttributeError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:
        raise ValueError(
            f"zone must be an IANA name such as 'Europe/Berlin', 'UTC' or 'local', not {_brief(name)}"
        ) from error


def _read_cron(expression: str, start: dt.datetime) -> Iterator[dt.datetime]:
    """Yield the instants of an expression from one on; within an hour that comes twice they may look back."""
    try:
        import cronsim
    except ImportError as error:
        raise ImportError(_NO_CRON) from error
    return cronsim.CronSim(_CRON_ALIASES.get(expression.lower(), expression), start)


def _cron_instants(expression: str, zone: dt.tzinfo, after: int) -> Iterator[int]:
    """Yield the instants of an expression after that one, in order, and at last the end of time."""
    with contextlib.suppress(OverflowError):  # the end of the calendar
        for found in _read_cron(expression, _instant(after).astimezone(zone)):
            at = (found - _EPOCH) // _MILLISECOND
            if at > after:
                yield at
                after = at
    yield _END_OF_TIME


# Schedules of one expression are due together; after a laptop's sleep with many occurrences each.


@functools.lru_cache(maxsize=256)
def _next_cron_instant(expression: str, zone: dt.tzinfo, after: int) -> int:
    return next(_cron_instants(expression, zone, after))


@functools.lru_cache(maxsize=256)
def _count_cron_instants(expression: str, zone: dt.tzinfo, first: int, latest: int, limit: int) -> int:
    passed = itertools.takewhile(lambda at: at <= latest, _cron_instants(expression, zone, first))
    return 1 + sum(1 for _ in itertools.islice(passed, limit - 1))


def _check_cron(expression: object, name: str) -> None:
    allowed = f"five fields (minute, hour, day, month, weekday) or one of {', '.join(_CRON_ALIASES)}"
    refusal = f"{name} must have {allowed}, not {_brief(expression)}"
    if not isinstance(expression, str):
        raise ValueError(refusal)
    if len(expression.split()) != 5 and expression.lower() not in _CRON_ALIASES:
        raise ValueError(refusal)  # cronsim would take a sixth, for seconds
    try:
        next(_read_cron(expression, _EPOCH))
    except ImportError:
        raise
    except StopIteration:
        raise ValueError(f"{name} must name an instant that comes, not {_brief(expression)}") from None
    except Exception as error:
        raise ValueError(f"{refusal}: {error}") from error


class _EveryGrid(NamedTuple):
    """Instants at an interval, before the start as well unless that is an anchor. All is milliseconds."""

    start: int
    interval: int
    is_anchored: bool

    def after(self, instant: int) -> int:
        """Return the first instant of the grid after that one; the end of time if none comes."""
        if self.is_anchored and instant < self.start:
            return self.start
        return min(self.start + ((instant - self.start) // self.interval + 1) * self.interval, _END_OF_TIME)

    def last(self, first: int, until: int, count: int) -> Sequence[int]:
        """Return the last so many instants of the grid from one of it on that are not after `until`."""
        latest = first + (until - first) // self.interval * self.interval
        return range(max(first, latest - (count - 1) * self.interval), latest + 1, self.interval)

    def counted(self, first: int, latest: int, _limit: int) -> int:
        """Count the instants of the grid between two of it, exactly up to a limit at least."""
        return (latest - first) // self.interval + 1


class _CronGrid(NamedTuple):
    """Instants by a cron expression. All is milliseconds; what it has in common with `_EveryGrid` means the same."""

    expression: str
    zone: dt.tzinfo

    def after(self, instant: int) -> int:
        return _next_cron_instant(self.expression, self.zone, instant)

    def last(self, first: int, until: int, count: int) -> Sequence[int]:
        """Look back over longer and longer spans: in some zones cronsim goes back by others than it comes by."""
        span = count * _CRON_INTERVAL_MS
        while True:
            start = max(first - 1, until - span)
            coming = _cron_instants(self.expression, self.zone, start)
            found = collections.deque(itertools.takewhile(lambda at: at <= until, coming), count)
            if start < first or len(found) == count:
                return list(found)
            span *= 2

    def counted(self, first: int, latest: int, limit: int) -> int:
        return _count_cron_instants(self.expression, self.zone, first, latest, limit)


_Grid = _EveryGrid | _CronGrid


@attrs.frozen
class Cron:
    """Instants by a cron expression: minute, hour, day, month and weekday, read as Debian's cron does.

    `expression` may also be `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly` or `@yearly`; `zone` is an IANA
    name, "UTC", or "local", this machine's zone, looked up anew whenever a next instant is worked out. A fixed time in
    the hour that a change of the clock skips is at that hour's end, one in the hour that comes twice the first of the
    two; wildcards follow real time. The library cronsim reads it, an extra: `pip install 'durable-fsm[cron]'`.

    Raises `ValueError` for what is no such expression or zone, `ImportError` without the extra.
    """

    expression: str = attrs.field(validator=_validator(_check_cron))
    zone: str = attrs.field(default="local", kw_only=True, validator=lambda _, __, zone: _zone(zone))

    def _grid(self, _written_at: int, zone_of: Callable[[str], dt.tzinfo]) -> _Grid:
        return _CronGrid(self.expression, zone_of(self.zone))

    def _stored(self) -> dict[str, Any]:
        return {"cron": self.expression, "zone": self.zone}


@attrs.frozen
class Every:
    """Instants at an interval, seconds or a timedelta, on a grid from `anchor`, an aware datetime.

    An anchor that is still to come is the first instant, else the first is the next on the grid. Without one the
    grid starts when the schedule is first written, and the first instant is an interval later. Raises `ValueError`.
    """

    interval: _Duration = attrs.field(
        eq=lambda interval: _positive_ms(interval, "interval"), validator=_validator(_positive_ms)
    )
    anchor: dt.datetime | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_validator(_instant_ms))
    )

    def _grid(self, written_at: int, _zone_of: Callable[[str], dt.tzinfo]) -> _Grid:
        start = written_at if self.anchor is None else _instant_ms(self.anchor, "anchor")
        return _EveryGrid(start, _positive_ms(self.interval, "interval"), self.anchor is not None)

    def _stored(self) -> dict[str, Any]:
        anchor = None if self.anchor is None else _instant_ms(self.anchor, "anchor")
        return {"every": _positive_ms(self.interval, "interval"), "anchor": anchor}


def _read_when(text: str) -> Cron | Every:
    """Read a grid as the file keeps it. It was checked when it was written: this needs no library that reads cron."""
    stored = _decode(text)
    if "every" in stored:
        seconds = stored["every"] / 1000
        whole = int(seconds) if seconds.is_integer() else seconds
        return Every(whole, anchor=_instant_or_none(stored["anchor"]))
    cron = object.__new__(Cron)
    object.__setattr__(cron, "expression", stored["cron"])
    object.__setattr__(cron, "zone", stored["zone"])
    return cron


class _Due(NamedTuple):
    """What has become of a schedule by now."""

    fires: list[int]
    """Nominal instants of the occurrences to insert."""
    missed: int
    next_at: int
    """Nominal instant of the next occurrence; `_END_OF_TIME` if none comes."""


class _Timetable(NamedTuple):
    """When a schedule fires, and what becomes of the occurrences that nobody was there for. Pure: it asks no clock."""

    grid: _Grid
    catch_up: str
    window_ms: int
    jitter_ms: int
    salt: str
    """What jitter is a hash of, beside the instant: so that all processes agree, and other files do not."""

    def fires_at(self, nominal: int) -> int:
        """Return when an occurrence fires: up to the jitter later than its nominal instant, but before the next."""
        if not self.jitter_ms:
            return nominal
        import hashlib  # only users of jitter pay for it

        digest = hashlib.blake2b(f"{self.salt}:{nominal}".encode(), digest_size=8).digest()
        spread = max(1, min(self.jitter_ms + 1, self.grid.after(nominal) - nominal))
        return nominal + int.from_bytes(digest, "big") % spread

    def due(self, next_at: int, now: int) -> _Due:
        """Say which occurrences to insert, from the next one on, which fires by now: one path for late and missed."""
        latest = self._latest_due(next_at, now)
        fires = self._caught_up(next_at, latest, now)
        is_on_time = now - self.fires_at(latest) < _ON_TIME_MS
        if is_on_time and latest not in fires:
            fires.append(latest)
        counted = self.grid.counted(next_at, latest, _COUNTED + len(fires))
        return _Due(fires, counted - len(fires), self.grid.after(latest))

    def _latest_due(self, next_at: int, now: int) -> int:
        """Return the nominal instant of the last occurrence that fires by now."""
        if self.grid.after(next_at) > now:
            return next_at
        *before, latest = self.grid.last(next_at, now, 2)
        return latest if self.fires_at(latest) <= now else before[0]

    def _caught_up(self, first: int, latest: int, now: int) -> list[int]:
        if self.catch_up == "none":
            return []
        fires = self.grid.last(first, latest, _COUNTED) if self.catch_up == "all" else [latest]
        return [at for at in fires if now - at <= self.window_ms]


# ==================================================================================================
# Records
# ==================================================================================================


_Record = typing.TypeVar("_Record", bound="attrs.AttrsInstance")


class Status(enum.StrEnum):
    """Where an instance stands; `done` and `failed` are terminal."""

    RUNNABLE = "runnable"
    EXECUTING = "executing"
    AWAITING_SIGNAL = "awaiting_signal"
    AWAITING_CHILDREN = "awaiting_children"
    DONE = "done"
    FAILED = "failed"


LIVE: frozenset[Status] = frozenset(Status) - {Status.DONE, Status.FAILED}
"""The statuses of an instance that has not ended."""

# Looked through, not hashed: an enumeration's hash is a function in Python.
_TERMINAL = (Status.DONE, Status.FAILED)
_PARKED = (Status.AWAITING_SIGNAL, Status.AWAITING_CHILDREN)


class _Keep(enum.Enum):
    """Type of `KEEP`."""

    KEEP = "keep"

    def __repr__(self) -> str:
        return "KEEP"


KEEP = _Keep.KEEP
"""`Next(concurrency_key=KEEP)`: the instance keeps the key that it has."""


def _columns(record: Any) -> str:
    """List the columns of a record for a statement: its fields have their names, of which some are words of SQL."""
    names = getattr(record, "_fields", None) or [field.name for field in attrs.fields(record)]
    return ", ".join(f'"{name}"' if name in ("when", "to") else name for name in names)


@attrs.frozen
class Signal:
    """A message in an instance's inbox; `payload` is a plain JSON value."""

    id: int
    name: str
    payload: Any
    sent_at: dt.datetime


@attrs.frozen
class Progress:
    """How far a step has come: `done` of `total`, if that is known, with a `note`, as of `at`, an aware datetime."""

    done: float
    total: float | None
    note: str | None
    at: dt.datetime

    @property
    def fraction(self) -> float | None:
        """`done / total`; None without a total, or where that is 0."""
        return self.done / self.total if self.total else None


def _read_progress(text: str | None) -> Progress | None:
    if text is None:
        return None
    done, total, note, at = _decode(text)
    return Progress(done, total, note, _instant(at))


@attrs.frozen(slots=False)  # a frozen object with slots takes twice as long to make
class Instance:
    """One instance as the file has it: every column under its own name, instants as aware UTC datetimes."""

    id: int
    fsm: str
    version: int
    step: str
    status: Status
    state: Any
    result: Any
    last_error: str | None
    traceback: str | None
    attempt: int
    max_attempts: int | None
    crashes: int
    queue: str
    priority: int
    eligible_at: dt.datetime
    worker: str | None
    concurrency_key: str | None
    rate_limit: str | None
    weight: int
    parked_on: str | None
    awaits: tuple[str, ...]
    await_deadline: dt.datetime | None
    parent_id: int | None
    correlation_key: str | None
    progress: Progress | None
    schedule: str | None
    scheduled_at: dt.datetime | None
    inserted_at: dt.datetime
    updated_at: dt.datetime


@attrs.frozen
class Schedule:
    """A schedule as the file has it: which class, when, and how far it has come.

    `next_at`, None while paused, and `last_at` are nominal instants, without jitter; `last_id` is the latest instance,
    `missed` how many occurrences nobody was there for. `is_declared` says whether a class option declares it still.
    `window` and `jitter` are seconds.
    """

    name: str
    fsm: str
    when: Cron | Every
    next_at: dt.datetime | None
    last_at: dt.datetime | None
    last_id: int | None
    missed: int
    is_paused: bool
    is_declared: bool
    catch_up: str
    window: float
    overlap: bool
    jitter: float


@attrs.frozen
class Transition:
    """One run of a step in an instance's past, or what was done to it between two (`kind` "cancel" or "rewind").

    `kind` is that of `step.stop`, or "crash", "timeout", "cancel", "rewind"; `started_at` an aware UTC datetime,
    `duration` seconds; `error` and `traceback` what the run failed with, also where `handle` has answered that;
    `state` the state as it stood before, a plain JSON value; `signals` the names of the signals that the step had
    awaited and was shown; `to` the step that it led to, None at an end.
    """

    seq: int
    step: str
    attempt: int
    kind: str
    started_at: dt.datetime
    duration: float
    worker: str | None
    error: str | None
    traceback: str | None
    state: Any
    signals: tuple[str, ...]
    to: str | None


@attrs.frozen
class Worker:
    """An engine that runs on the file: who it is, what it serves, and until when its lease lasts."""

    id: str
    name: str
    host: str
    pid: int
    queues: dict[str, int]
    started_at: dt.datetime
    heartbeat_at: dt.datetime
    lease_expires_at: dt.datetime


_READS: dict[str, Callable[[Any], Any]] = {
    "Any": _load_value,
    "Cron | Every": _read_when,
    "Progress | None": _read_progress,
    "Status": {str(status): status for status in Status}.__getitem__,
    "bool": bool,
    "dict[str, int]": _decode,
    "dt.datetime": _instant,
    "dt.datetime | None": _instant_or_none,
    "float": lambda milliseconds: milliseconds / 1000,
    "tuple[str, ...]": lambda names: () if names is None else tuple(_decode(names)),
}
"""How a column is read for a field that is annotated so; others are as the file has them."""


@functools.cache
def _maker_of(record: type[_Record]) -> Callable[[Sequence[Any]], _Record]:
    """Make the function that makes such a record of its columns, in the order of its fields."""
    reads = [(at, _READS[field.type]) for at, field in enumerate(attrs.fields(record)) if field.type in _READS]

    def make(row: Sequence[Any]) -> _Record:
        values = list(row)
        for at, read in reads:
            values[at] = read(values[at])
        return record(*values)

    return make


_make_instance = _maker_of(Instance)


@attrs.frozen
class Event:
    """Something that happened: what was measured, and what it happened to.

    * `step.stop`: duration; id, fsm, step, kind (done, stop, next, retry, await, children, crash)
    * `step.progress`: done, total; id, fsm, step, note
    * `pick.stop`, `scheduler.saturation`: count, demand; queue, and in_flight; queue
    * `commit.stop`: outcomes, inserts, duration
    * `scheduler.drain`: released, in_flight; queue: at the stop
    * `scheduler.reclaimed`, `reaper.reaped`: count; worker: of a dead one
    * `concurrency.throttled`, `rate_limit.throttled`: none; id, key, queue
    * `outcome.stale`, `await.timeout`, `inline.continue`, `inline.yield`: none; id, fsm, step
    * `signal.dropped`: none; id, name: it came while the last step ran, which had not been shown it
    * `fsm.unknown`: none; fsm, version, queue
    * `schedule.fired`, `schedule.missed`, `schedule.skipped`: late, count, none; name, and id
    * `gc.swept`: count
    * `store.error`: none; error

    Durations and `late` are seconds. For Prometheus or OpenTelemetry:

        def observe(engine, histogram, tracer):
            def on_step(event):
                labels = {"fsm": event.metadata["fsm"], "kind": event.metadata["kind"]}
                histogram.labels(**labels).observe(event.measurements["duration"])  # prometheus_client
                tracer.start_span(event.metadata["step"], attributes=labels).end()  # opentelemetry

            return engine.subscribe(on_step, "step.stop")
    """

    name: str
    measurements: dict[str, Any]
    metadata: dict[str, Any]


_EVENT_NAMES = frozenset(
    [
        *("step.stop", "step.progress", "pick.stop", "commit.stop", "outcome.stale", "await.timeout", "fsm.unknown"),
        *("scheduler.saturation", "scheduler.drain", "scheduler.reclaimed", "reaper.reaped", "gc.swept"),
        *("concurrency.throttled", "rate_limit.throttled", "inline.continue", "inline.yield", "store.error"),
        *("signal.dropped", "schedule.fired", "schedule.missed", "schedule.skipped"),
    ]
)

_SCOPES = {
    frozenset[Status](): 0,
    LIVE: 1,
    LIVE | {Status.DONE}: 3,
    LIVE | {Status.FAILED}: 5,
    LIVE | {Status.DONE, Status.FAILED}: 7,
}
"""Correlation scopes as the file keeps them: 1 for the live statuses, 2 for done, 4 for failed."""


def _scope_bits(scope: object) -> int:
    try:
        return _SCOPES[frozenset(cast(Any, [scope] if isinstance(scope, str) else scope))]
    except (TypeError, KeyError):
        allowed = "[], LIVE, or LIVE with Status.DONE, Status.FAILED or both"
        raise ValueError(f"correlation_scope must be {allowed}, not {_brief(scope)}") from None


@attrs.frozen(slots=False)  # a frozen object with slots takes twice as long to make
class Insert:
    """One instance to insert: what `Engine.insert` takes, as a value. Bad options are a `ValueError`.

    * `fsm`: a class, a function job, or a registered name, which means its highest version
    * `state`, or `args`, its other name for jobs: a `State` object or a dict; left out, the state's defaults
    * `step`: the first step; the class's `initial` unless given
    * `queue`, `priority` (lower runs first)
    * `schedule_at` (an aware datetime) or `schedule_in` (seconds or a timedelta): not to run before
    * `correlation_key`, unique among instances in the statuses of `correlation_scope`
    * `concurrency_key`, `rate_limit`, `weight`: limits of the first step. A thread over its `timeout` counts no more
      for its key, though its code may run on
    * `max_attempts`: jobs only
    """

    fsm: Any
    state: Any = attrs.field(default=None, kw_only=True)
    args: Any = attrs.field(default=None, kw_only=True)
    step: Any = attrs.field(default=None, kw_only=True)
    queue: str | None = attrs.field(default=None, kw_only=True)
    priority: int = attrs.field(default=0, kw_only=True)
    schedule_at: dt.datetime | None = attrs.field(default=None, kw_only=True)
    schedule_in: _Duration | None = attrs.field(default=None, kw_only=True)
    correlation_key: str | None = attrs.field(default=None, kw_only=True)
    correlation_scope: Iterable[str] = attrs.field(default=LIVE, kw_only=True)
    concurrency_key: str | tuple[object, ...] | None = attrs.field(default=None, kw_only=True)
    rate_limit: str | tuple[object, ...] | None = attrs.field(default=None, kw_only=True)
    weight: int = attrs.field(default=1, kw_only=True)
    max_attempts: int | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.state is not None and self.args is not None:
            raise ValueError("state and args are two names for one thing: give one of them")
        if self.schedule_at is not None and self.schedule_in is not None:
            raise ValueError("schedule_at and schedule_in exclude each other: give one of them")
        _integer(self.weight, "weight", 1)
        _integer(self.priority, "priority", -_MAX_INTEGER)

    def _eligible_at(self, now: int) -> int:
        if self.schedule_at is not None:
            return _instant_ms(self.schedule_at, "schedule_at")
        return now if self.schedule_in is None else _later(now, self.schedule_in, "schedule_in")

    def _check_attempts(self, fsm: str, *, is_job: bool) -> None:
        if self.max_attempts is not None and not is_job:
            raise TypeError(f"max_attempts is for jobs only, and {fsm} is a machine: leave it out")


class _InsertOptions(TypedDict, total=False):
    """The options of `Insert`, for the methods that pass them on."""

    state: Any
    args: Any
    step: Any
    queue: str | None
    priority: int
    schedule_at: dt.datetime | None
    schedule_in: _Duration | None
    correlation_key: str | None
    correlation_scope: Iterable[str]
    concurrency_key: str | tuple[object, ...] | None
    rate_limit: str | tuple[object, ...] | None
    weight: int
    max_attempts: int | None


def _make_insert(fsm: Any, options: _InsertOptions) -> Insert:
    try:
        return Insert(fsm, **options)
    except TypeError as error:  # names are looked at only now: an insert has no time to lose
        refusal = error
    _refuse_unknown(options, _InsertOptions.__annotations__)
    raise refusal


_SET_BACK_MS = 1000
"""A clock that goes back by no more is waited for."""


def _brought_back(instant: int, written_at: int, now: int) -> int:
    """Say when is due what was written by a clock that was ahead of now: after the delay that it was to wait.

    What was dated further ahead than that clock was wrong keeps its date. Pure.
    """
    delay = max(0, instant - written_at)
    return now + delay if delay < written_at - now else instant


class _NewRow(NamedTuple):
    """The columns of an instance to insert, in the order in which the statement binds them."""

    fsm: str
    version: int
    step: str
    state: str
    max_attempts: int | None
    max_crashes: int
    queue: str
    priority: int
    eligible_at: int
    concurrency_key: str | None
    rate_limit: str | None
    weight: int
    parent_id: int | None
    correlation_key: str | None
    correlation_scope: int
    inserted_at: int
    updated_at: int
    schedule: str | None = None
    scheduled_at: int | None = None
    retention: int | None = None

    def brought_back(self, now: int) -> _NewRow:
        """Return it as made now: the clock was set back since it was."""
        eligible_at = _brought_back(self.eligible_at, self.inserted_at, now)
        return self._replace(eligible_at=eligible_at, inserted_at=now, updated_at=now)


# ==================================================================================================
# Outcomes
# ==================================================================================================


def _step_name(value: object) -> str:
    """Read a step's name: a string, or a `@step` method for its name."""
    if type(value) is str and value and value.isascii():
        return value
    if hasattr(value, "_durable_step"):
        return str(cast(Any, value).__name__)
    return _text(value, "a step's name", OutcomeError)


def _signal_names(value: object) -> tuple[str, ...]:
    """Read the names that `Await` waits for: one string, or several."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable):
        raise OutcomeError(f"names must be a string or several, not {_brief(value)}")
    names = tuple(dict.fromkeys(_text(name, "a signal's name", OutcomeError) for name in names))
    if not names:
        raise OutcomeError("names must hold at least one signal's name")
    return names


def _inserts(value: object) -> tuple[Insert, ...]:
    children = tuple(value) if isinstance(value, Iterable) else (value,)
    for child in children:
        if not isinstance(child, Insert):
            raise OutcomeError(f"children must be Insert(...)s, not {_brief(child)}")
    return children


def _reason(value: object) -> str | BaseException:
    if not isinstance(value, str | BaseException):
        raise OutcomeError(f"a reason must be a string or an exception, not {_brief(value)}")
    return value


def _check_due(value: object, name: str, *, error: type[Exception]) -> None:
    """Check when something is due: a duration from now, or an instant."""
    if not isinstance(value, dt.datetime):
        _duration_ms(value, name, error)
    elif value.utcoffset() is None:
        raise error(f"{name} must be a duration or a timezone-aware instant, not the naive {_brief(value)}")


def _check_state(value: object) -> None:
    """Check that a value may be a state at all; it is held against its class's schema when it is written."""
    if value is not None and not isinstance(value, dict) and not attrs.has(type(value)):
        raise OutcomeError(f"state must be a dict or an object of an attrs class, or be left out, not {_brief(value)}")


_check_outcome = functools.partial(_validator, error=OutcomeError)


@attrs.frozen
class Next:
    """Go on with another step, at once. `state` left out means `ctx.state`, as the step leaves it.

    `rate_limit`, `weight` and `concurrency_key` are the limits of that step: the key is kept unless another is
    given, `None` releases it. `inline=True` runs it on the claim already held, if its limits admit it, and if nobody
    has been kept waiting for over 100 ms.
    """

    step: str = attrs.field(converter=_step_name)
    state: Any = None
    rate_limit: str | tuple[object, ...] | None = attrs.field(default=None, kw_only=True)
    weight: int = attrs.field(default=1, kw_only=True)
    concurrency_key: str | tuple[object, ...] | _Keep | None = attrs.field(default=KEEP, kw_only=True)
    inline: bool | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        # Only what was given is looked at: most steps give nothing, and five validators take as long as the rest.
        if self.state is not None:
            _check_state(self.state)
        if self.rate_limit is not None:
            _limit_key(self.rate_limit, "rate_limit", OutcomeError)
        if type(self.weight) is not int or self.weight != 1:
            _integer(self.weight, "weight", 1, OutcomeError)
        if self.concurrency_key is not KEEP:
            _limit_key(self.concurrency_key, "concurrency_key", OutcomeError)
        if self.inline is not None:
            _boolean(self.inline, "inline", OutcomeError)


@attrs.frozen
class Retry:
    """Run the same step again after `delay` (or at an instant); one that is not `counted` leaves `attempt` as it is."""

    delay: _Duration | dt.datetime = attrs.field(default=0, validator=_check_outcome(_check_due))
    state: Any = None
    counted: bool = attrs.field(default=True, kw_only=True, validator=_check_outcome(_boolean))

    def __attrs_post_init__(self) -> None:
        _check_state(self.state)


@attrs.frozen
class Await:
    """Park until a signal of one of `names` comes, or `timeout` (a duration, an instant) is over, then go on.

    Awaiting again consumes nothing; of thousands of signals, keep in the state what you need and go on with `Next` to
    the step that awaits, so that each wake reads only what is new.
    """

    names: tuple[str, ...] = attrs.field(converter=_signal_names)
    then: str = attrs.field(converter=_step_name)
    state: Any = None
    timeout: _Duration | dt.datetime | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_check_outcome(_check_due))
    )

    def __attrs_post_init__(self) -> None:
        _check_state(self.state)


@attrs.frozen
class ScheduleChildren:
    """Insert children and park until all of them have ended, then go on with the step `then`."""

    children: tuple[Insert, ...] = attrs.field(converter=_inserts)
    then: str = attrs.field(converter=_step_name)
    state: Any = None

    def __attrs_post_init__(self) -> None:
        _check_state(self.state)


@attrs.frozen
class Done:
    """End well; `result` is anything that JSON or cattrs can write.

    That shows when it is written, after the step: what can't be goes to `handle`.
    """

    result: Any = None


@attrs.frozen
class Stop:
    """End as failed, for a reason: a text or an exception."""

    reason: str | BaseException = attrs.field(converter=_reason)


class Fail(Exception):
    """Returned or raised by a job: this attempt failed; it is tried again after `backoff`, or given up."""

    def __init__(self, reason: str | BaseException) -> None:
        super().__init__(reason)
        self.reason = _reason(reason)


class Cancel(Exception):
    """Returned or raised by a job: give up at once."""

    def __init__(self, reason: str | BaseException) -> None:
        super().__init__(reason)
        self.reason = _reason(reason)


_Outcome = Next | Retry | Await | ScheduleChildren | Done | Stop
_OUTCOMES = (Next, Retry, Await, ScheduleChildren, Done, Stop)
_JOB_OUTCOMES = (Retry, Done, Stop)

# ==================================================================================================
# Schemas
# ==================================================================================================


def _write_moment(value: Any) -> str:
    """Write a datetime or a time; with its zone only where an offset can't say it, as when clocks are set back."""
    text, zone = value.isoformat(), getattr(value.tzinfo, "key", None)
    is_said = value.utcoffset() is not None and value.fromisoformat(text) == value
    return str(text if zone is None or is_said else f"{text}[{zone}]")


def _read_moment(text: str, cls: Any, zone_of: Callable[[str], dt.tzinfo]) -> Any:
    plain, _, zone = text.partition("[")
    moment = cls.fromisoformat(plain)
    if not zone:
        return moment
    moment = moment.replace(tzinfo=zone_of(zone.removesuffix("]")))
    return moment if moment.isoformat() == plain else moment.replace(fold=1)


# What states need is made when the first one is met: converters and the types they know take 10 ms of an import.


@functools.cache
def _codecs() -> dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any], tuple[type, ...]]]:
    """Return how each scalar type is written to JSON, how it is read, and from which forms: nothing is coerced."""
    import base64
    import decimal
    import uuid
    from zoneinfo import ZoneInfo

    as_it_is, text = cattrs.fns.identity, (str,)
    return {
        bool: (as_it_is, bool, (bool,)),
        int: (as_it_is, int, (int,)),
        float: (as_it_is, float, (int, float)),
        str: (as_it_is, str, text),
        types.NoneType: (as_it_is, as_it_is, (types.NoneType,)),
        pathlib.Path: (str, pathlib.Path, text),
        dt.datetime: (_write_moment, lambda moment: _read_moment(moment, dt.datetime, ZoneInfo), text),
        dt.date: (dt.date.isoformat, dt.date.fromisoformat, text),
        dt.time: (_write_moment, lambda moment: _read_moment(moment, dt.time, ZoneInfo), text),
        dt.timedelta: (dt.timedelta.total_seconds, lambda s: dt.timedelta(seconds=s), (int, float)),
        uuid.UUID: (str, uuid.UUID, text),
        decimal.Decimal: (str, decimal.Decimal, text),
        bytes: (lambda b: base64.b64encode(b).decode(), lambda s: base64.b64decode(s, validate=True), text),
    }


def _invalid(cls: Any, value: object) -> ValueError:
    name = cls.__name__ if isinstance(cls, type) else str(cls).removeprefix("typing.")
    return ValueError(f"not a valid {name}, {_brief(value)}")


def _own(cls: Any) -> Any:
    return typing.get_origin(cls) or cls


def _is_choice(cls: Any) -> bool:
    return typing.get_origin(cls) is typing.Literal or (isinstance(cls, type) and issubclass(cls, enum.Enum))


def _is_union(cls: Any) -> bool:
    return typing.get_origin(cls) in (typing.Union, types.UnionType)


@functools.cache
def _field_names(cls: Any) -> tuple[str, ...] | None:
    """Name the fields of an attrs class or a dataclass; None for any other class."""
    own = _own(cls)
    if attrs.has(own):
        return tuple(field.name for field in attrs.fields(own))
    return tuple(field.name for field in dataclasses.fields(own)) if dataclasses.is_dataclass(own) else None


def _has_fields(cls: Any) -> bool:
    return _field_names(cls) is not None


def _form_of(cls: Any) -> type | None:
    """Return the JSON form of a class with fields, a mapping or another collection; what else there is has its own."""
    if not isinstance(cls, type) or issubclass(cls, str | bytes | enum.Enum):
        return None
    if _has_fields(cls) or issubclass(cls, Mapping):
        return dict
    return list if issubclass(cls, Collection) else None


class _Converter(cattrs.Converter):
    """Reads a value in the form that its type has, and leaves one that is not of its field's type as it is.

    So nothing is turned into another type on its way, and what is wrong shows, with its path, when it is read again.
    """

    @functools.cache  # noqa: B019 - there are two of them, for ever
    def get_structure_hook(self, kind: Any, cache_result: bool = True) -> Callable[[Any, Any], Any]:
        read, own = super().get_structure_hook(kind, cache_result), _own(kind)
        form = _form_of(own)
        if form is None:
            return read

        def hook(value: Any, cls: Any) -> Any:
            if isinstance(value, form):
                return read(value, cls)
            if value.__class__ is own:
                return value
            raise _invalid(own, value)

        return hook

    def structure(self, value: Any, kind: Any) -> Any:
        return self.get_structure_hook(kind)(value, kind)

    def get_unstructure_hook(self, kind: Any, cache_result: bool = True) -> Callable[[Any], Any]:
        write, own = super().get_unstructure_hook(kind, cache_result), _own(kind)
        if own is Any:
            return cattrs.fns.identity
        if write is cattrs.fns.identity or not isinstance(own, type) or _is_union(kind):
            return write
        if _form_of(own) is None:
            return lambda value: write(value) if isinstance(value, own) else value
        return lambda value: write(value) if value.__class__ is own else value


def _read_choice(value: Any, cls: Any) -> Any:
    """Read a member of an enumeration or a Literal; 1 is neither True nor 1.0."""
    for one in typing.get_args(cls) or cls:
        plain = one.value if isinstance(one, enum.Enum) else one
        if one is value or (plain == value and type(plain) is type(value)):
            return one
    raise _invalid(cls, value)


def _scalar_hook(known: type) -> Callable[[Any, Any], Any]:
    _, read, forms = _codecs()[known]

    def hook(value: Any, cls: Any) -> Any:
        if cls is not known and _is_choice(cls):
            return _read_choice(value, cls)
        try:
            if value.__class__ in forms:
                value = read(value)
            elif next((base for base in type(value).__mro__ if base in _codecs()), None) is not known:
                raise _invalid(cls, value)
            return value if isinstance(value, cls) else cls(value)
        except (ValueError, ArithmeticError, LookupError):
            raise _invalid(cls, value) from None

    return hook


def _class_factory(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Read all fields, those that the constructor does not take (`init=False`) too; no default is shared."""
    read = cattrs.gen.make_dict_structure_fn(cls, converter, _cattrs_include_init_false=True)
    fields = attrs.fields(_own(cls)) if attrs.has(cls) else ()
    shared = [
        one.name
        for one in fields
        if not hasattr(one.default, "factory") and copy.deepcopy(one.default) is not one.default
    ]
    if not shared:
        return read

    def hook(value: Any, _: Any) -> Any:
        made = read(value, cls)
        for name in shared:
            if name not in value:
                object.__setattr__(made, name, copy.deepcopy(getattr(made, name)))
        return made

    return hook


def _is_many(cls: Any) -> bool:
    own = _own(cls)
    return own in (set, frozenset, collections.deque) or (own is tuple and typing.get_args(cls)[1:] == (...,))


def _many_factory(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Read a set, a deque or a tuple of any length as a list: cattrs would not look at the form of what is in it."""
    items = types.GenericAlias(list, typing.get_args(cls)[:1] or (Any,))
    read = converter.get_structure_hook(items)
    return lambda value, _: _own(cls)(read(value, items))


def _is_fixed(cls: Any) -> bool:
    return _own(cls) is tuple and bool(typing.get_args(cls)) and not _is_many(cls)


def _fixed_factory(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Read a tuple whose items each have a type of their own; not all releases of cattrs look at their form."""
    kinds = typing.get_args(cls)
    reads = [converter.get_structure_hook(kind) for kind in kinds]

    def hook(value: Any, _: Any) -> Any:
        if len(value) != len(kinds):
            raise _invalid(cls, value)
        made, errors = [], []
        for at, (read, kind) in enumerate(zip(reads, kinds, strict=True)):
            try:
                made.append(read(value[at], kind))
            except Exception as error:  # noqa: BLE001 - all of them are told, each with its place
                error.add_note(cattrs.IterableValidationNote("", at, kind))
                errors.append(error)
        if errors:
            raise cattrs.IterableValidationError("", errors, cls)
        return tuple(made)

    return hook


def _number_keys_factory(cls: Any, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Read a mapping by numbers: JSON has made strings of them."""
    key = typing.get_args(cls)[0]
    read = cattrs.cols.mapping_structure_factory(cls, converter)

    def hook(value: Any, _: Any) -> Any:
        items = {key(name) if isinstance(name, str) else name: item for name, item in value.items()}
        if len(items) < len(value):
            raise ValueError(f"keys must differ as numbers, {_brief(value)}")
        return read(items, cls)

    return hook


def _union_factory(cls: Any, converter: cattrs.Converter, strict: cattrs.Converter | None) -> Callable[[Any, Any], Any]:
    """Read a union as the first of its members that takes the value, the strict reading before the lenient one."""
    members = [one for one in typing.get_args(cls) if one is not types.NoneType]
    takes_none = len(members) < len(typing.get_args(cls))
    readings = [(one.get_structure_hook(kind), kind) for one in (strict, converter) if one for kind in members]

    def hook(value: Any, _: Any) -> Any:
        if value is None and takes_none:
            return None
        if len(members) == 1:
            return readings[-1][0](value, members[0])  # its own error says more than the union's
        for read, kind in readings:
            with contextlib.suppress(Exception):
                return read(value, kind)
        raise _invalid(cls, value)

    return hook


def _sorted(items: Iterable[Any]) -> list[Any]:
    """List a set's items in an order that is the same in every process."""
    items = list(items)
    try:
        return sorted(items)
    except TypeError:
        return sorted(items, key=repr)


def _refuse_type(_: Any, cls: Any) -> Any:
    raise ValueError(f"of a type that a state can't hold, {cls}")


def _make_converter(strict: cattrs.Converter | None = None) -> cattrs.Converter:
    """Make the converter that is strict, or with that one given, the lenient one."""
    converter = _Converter(
        forbid_extra_keys=strict is None,
        structure_fallback_factory=lambda _: _refuse_type,
        unstruct_collection_overrides={set: _sorted, frozenset: _sorted, tuple: list},
    )
    for known, (write, *_) in _codecs().items():
        converter.register_structure_hook(known, _scalar_hook(known))
        converter.register_unstructure_hook(known, write)
    converter.register_unstructure_hook_factory(
        _has_fields, lambda cls: cattrs.gen.make_dict_unstructure_fn(cls, converter, _cattrs_include_init_false=True)
    )
    converter.register_structure_hook_factory(_has_fields, _class_factory)
    converter.register_structure_hook_factory(_is_many, _many_factory)
    converter.register_structure_hook_factory(_is_fixed, _fixed_factory)
    converter.register_structure_hook_factory(
        lambda cls: cattrs.cols.is_mapping(cls) and typing.get_args(cls)[0] in (int, float), _number_keys_factory
    )
    converter.register_structure_hook_factory(_is_union, lambda cls, converter: _union_factory(cls, converter, strict))
    converter.register_structure_hook_func(_is_choice, _read_choice)
    converter.register_structure_hook_func(lambda cls: cls is object, lambda value, _: value)  # as Any
    return converter


@functools.cache
def _strict() -> cattrs.Converter:
    """Return the converter that reads what users give: every key must be known."""
    return _make_converter()


@functools.cache
def _lenient() -> cattrs.Converter:
    """Return the converter that reads what the file holds, which another version of the class may have written."""
    return _make_converter(_strict())


def _problems(error: BaseException, path: str = "") -> Iterator[str]:
    """List what cattrs found wrong, a line each with its path."""
    if isinstance(error, cattrs.ClassValidationError | cattrs.IterableValidationError):
        located, rest = error.group_exceptions()
        for inner, note in located:
            where = f"[{note.index!r}]" if isinstance(note, cattrs.IterableValidationNote) else f".{note.name}"
            yield from _problems(inner, path + where)
        for inner in rest:
            yield from _problems(inner, path)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = ", ".join(_field_names(error.cl) or error.cl.__annotations__) or "none"
        yield from (f"{path}.{key}: unknown key; known are: {known}" for key in sorted(error.extra_fields, key=str))
    elif isinstance(error, KeyError):
        yield f"{path}: missing"
    else:
        yield f"{path}: {error.args[0] if error.args else type(error).__name__}"


_ATOMS = frozenset({type(None), bool, int, float, str})


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Return what a value is made of, by field, key or index; None for a scalar or a set."""
    names = _field_names(value.__class__)
    if names is not None:
        return {name: getattr(value, name, None) for name in names}
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else None


def _members(value: Any) -> Mapping[Any, Any]:
    """Return what a set, or a mapping or collection that is none of JSON's, is made of; nothing for a scalar."""
    if isinstance(value, Mapping):
        return value
    return dict(enumerate(value)) if _form_of(value.__class__) is list else {}


def _is_same(given: Any, again: Any) -> bool:
    """Whether a value came back as it was given: equal, and of the same types, if not of a scalar's own."""
    kind = again.__class__
    if kind in _ATOMS:
        return bool(given == again)
    if kind is not given.__class__:
        return _parts(again) is None and kind not in (set, frozenset) and bool(given == again)
    if (names := _field_names(kind)) is not None:  # as below, in half the time
        return all([_is_same(getattr(given, one), getattr(again, one)) for one in names])  # noqa: C419 - and in less
    ours, theirs = _parts(given), _parts(again)
    if ours is None or theirs is None:
        return bool(given == again)
    return ours.keys() == theirs.keys() and all(map(_is_same, ours.values(), map(theirs.get, ours)))


def _works(call: Callable[[Any], object], value: Any) -> bool:
    try:
        call(value)
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, it is only asked whether there is one
        return False
    return True


def _failing(is_good: Callable[..., bool], *values: Any, path: str = "") -> Iterator[tuple[Any, ...]]:
    """Find the smallest parts of values that are not good, each after its path."""
    parts = [_parts(value) or {} for value in values]
    common = [(key, [one[key] for one in parts]) for key in parts[0] if all(key in one for one in parts)]
    inner = [(key, items) for key, items in common if not is_good(*items)]
    if not inner:
        yield (path, *values)
    for key, items in inner:
        yield from _failing(is_good, *items, path=f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]")


def _has_other_keys(value: Any) -> bool:
    """Whether a mapping somewhere has a key that is no string, which JSON would turn into one."""
    parts, is_mapping = value, isinstance(value, dict)
    if not is_mapping and (parts := _parts(value)) is None:
        is_mapping, parts = isinstance(value, Mapping), _members(value)
    for key, part in parts.items():
        if is_mapping and not isinstance(key, str):
            return True
        if part.__class__ not in _ATOMS and _has_other_keys(part):
            return True
    return False


def _refusal(problems: Iterable[str]) -> StateError:
    return StateError([problem.removeprefix(".").removeprefix(": ") for problem in problems])


def _structure(converter: cattrs.Converter, value: Any, cls: type) -> Any:
    try:
        return converter.structure(value, cls)
    except Exception as error:
        raise _refusal(_problems(error)) from error


def _state_text(value: object) -> str:
    try:
        return _json(value)
    except (TypeError, ValueError) as error:
        works = functools.partial(_works, _encode)
        if works(value):
            raise StateError([str(error)]) from None
        what = "JSON has no {!r}".format, lambda part: f"not a JSON value, {_brief(part)}"
        found = _failing(works, value)
        raise _refusal(f"{path}: {what[not isinstance(part, float)](part)}" for path, part in found) from error


def _unstructured(value: Any) -> Any:
    try:
        return _strict().unstructure(value)
    except Exception as error:
        found = _failing(functools.partial(_works, _strict().unstructure), value)
        raise _refusal(f"{path}: can't be written ({_error_text(error)})" for path, _ in found) from error


def _came_back(given: Any, again: Any) -> bool:
    """Whether it is the same; what can't be compared at all, as a signaling NaN, is not."""
    try:
        return _is_same(given, again)
    except RecursionError:
        raise
    except Exception:  # noqa: BLE001 - the value's own, from its `==` or its truth: it is refused with its path
        return False


def _refuse_changes(given: Any, again: Any) -> None:
    """Refuse what did not come back from JSON as it was given."""
    if not _came_back(given, again):
        found = _failing(_came_back, given, again)
        raise _refusal(f"{path}: {_brief(one)} would come back as {_brief(other)}" for path, one, other in found)


def _dump_plain(value: object) -> str:
    """Write a plain dict: of JSON's values, in which a tuple is one with a list."""
    if not isinstance(value, dict):
        raise StateError([f"not a dict, {_brief(value)}"])
    text = _state_text(value)
    if _has_other_keys(value):
        _refuse_changes(value, _decode(text))
    return text


_Loaded = Mapping[int, Any]
"""The JSON form of each part of a state that was loaded, by the part's identity, and the part, by its form's.

Nothing where the state has no keys that no class knows.
"""
_ALL_KNOWN: _Loaded = {}


def _inner(part: Any, form: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Go through what a part of a state is made of: by key, with its JSON form, None for a field that is not in it."""
    parts = _parts(part) or {}
    forms = map(form.get, parts) if _has_fields(part.__class__) else (_parts(form) or {}).values()
    return zip(parts, parts.values(), forms, strict=False)


def _note_parts(part: Any, form: Any, noted: dict[int, Any]) -> None:
    """Note all parts of a state, but for scalars, and their forms."""
    if form is not None and _parts(part) is not None:
        noted[id(part)], noted[id(form)] = form, part
        for _, inner, inner_form in _inner(part, form):
            _note_parts(inner, inner_form, noted)


def _load_state(cls: type | None, text: str) -> tuple[Any, _Loaded]:
    """Read a stored state: keys that the class does not have are kept aside, new fields take their defaults."""
    value = _decode(text)
    if cls is None:
        return value, _ALL_KNOWN
    with contextlib.suppress(Exception):
        return _strict().structure(value, cls), _ALL_KNOWN
    state = _structure(_lenient(), value, cls)
    loaded: dict[int, Any] = {}
    _note_parts(state, value, loaded)
    return state, loaded


def _keep_unknown(part: Any, form: Any, place: Any, loaded: _Loaded, alive: _Loaded) -> None:
    """Add to what is written of a state the keys that the classes don't know of what was loaded.

    They stay with their object wherever it is by now, else with one of its class that has taken its `place`, in lists
    only if these have not become shorter.
    """
    taken = loaded.get(id(place))
    was = loaded.get(id(part))
    if was is None and part.__class__ is taken.__class__ and id(taken) not in alive:
        was = place
    names = _field_names(part.__class__)
    if names is not None and was is not None:
        form.update({key: was[key] for key in was if key not in names})
    places = {} if was is None or (isinstance(was, list) and len(form) < len(was)) else _parts(was) or {}
    for key, inner, inner_form in _inner(part, form):
        if inner_form is not None and _parts(inner) is not None:
            _keep_unknown(inner, inner_form, places.get(key), loaded, alive)


def _dump_object(cls: type, value: Any, known: str | None, loaded: _Loaded) -> str:
    """Write a state of a class, and hold against it what is read again, by the class's own converters, too."""
    if value.__class__ is not cls:
        if not isinstance(value, dict):
            raise StateError([f"not a {cls.__name__} or a dict, {_brief(value)}"])
        if known is not None and _works(_encode, value) and _json(value) == known:
            return known
        value = _structure(_strict(), value, cls)
    written = _unstructured(value)
    if loaded:
        alive: dict[int, Any] = {}
        _note_parts(value, written, alive)
        _keep_unknown(value, written, next(iter(loaded.values())), loaded, alive)
    text = _state_text(written)
    if text != known:
        _refuse_changes(value, _load_state(cls, text)[0])
    return text


def _dump_state(cls: type | None, value: Any, known: str | None = None, loaded: _Loaded = _ALL_KNOWN) -> str:
    """Write a state as JSON text, held against its schema: what a step will get equals what is given, or it is refused.

    `known` is a text that is known to fit, `loaded` what the state was loaded as.
    """
    try:
        return _dump_plain(value) if cls is None else _dump_object(cls, value, known, loaded)
    except RecursionError:
        raise StateError([_TOO_DEEP]) from None


def _plain(value: Any) -> Any:
    plain = _strict().unstructure(value)
    if plain is value:
        raise TypeError(f"not a JSON value, {_brief(value)}")
    return plain


def _dump_value(value: object, name: str) -> str | None:
    """Write a result or a payload: whatever JSON or cattrs can write, with strings as keys; None stays SQL's NULL.

    Tuples and sets come back as lists, objects as dicts.
    """
    if value is None:
        return None
    try:
        try:
            text = _json(value)
        except TypeError:
            text = _json(_decode(json.dumps(value, default=_plain)))
        if value.__class__ in _ATOMS or not _has_other_keys(value):
            return text
        raise ValueError("keys of a dict must be strings, at any depth")
    except Exception as error:
        raise OutcomeError(f"{name} can't be written as JSON: {_brief(value)} ({_error_text(error)})") from error


# ==================================================================================================
# Behaviour
# ==================================================================================================

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    _State = TypeVar("_State", default=Any)  # so that `Context` may stand without a parameter
else:
    _State = typing.TypeVar("_State")
_AnyStep = typing.TypeVar("_AnyStep", bound=Callable[[Any, Any], "_Outcome | Awaitable[_Outcome]"])
_Called = typing.ParamSpec("_Called")
_Arguments = typing.ParamSpec("_Arguments")
_Returned_co = typing.TypeVar("_Returned_co", covariant=True)

_current: contextvars.ContextVar[Context[Any] | None] = contextvars.ContextVar("durable_step", default=None)


class _Statement(NamedTuple):
    """The user's own SQL, to run in the commit."""

    sql: str
    bindings: tuple[Any, ...] | dict[str, Any]


class _Message(NamedTuple):
    """A signal to deliver: in a step's commit, or in one of its own."""

    target: int | str
    name: str
    payload: str | None
    dedup_key: str | None


_Effect = _Statement | _NewRow | _Message


def _target(value: object) -> int | str:
    """Check what addresses an instance: an id, or a correlation key."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return _text(value, "target (an id or a correlation key)")


def _message(target: int | str, name: str, payload: Any, dedup_key: str | None) -> _Message:
    if dedup_key is not None:
        _text(dedup_key, "dedup_key")
    return _Message(_target(target), _text(name, "a signal's name"), _dump_value(payload, "payload"), dedup_key)


class _Kept(NamedTuple):
    """What a call inside a step returned, as the file keeps it."""

    name: str
    value: str | None
    is_awaited: bool


async def _ready(value: Any) -> Any:
    return value


_NEEDS_ASYNC = "that needs an `async def` step"


def _is_coroutine_function(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _refuse_awaitable(returned: object, message: str, error: type[Exception]) -> None:
    """Refuse what nobody will await."""
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # else Python warns that it never was
        raise error(message)


def _column(name: str, meaning: str) -> Any:
    """Make a read-only attribute of a Context: a column of its row."""
    return property(operator.attrgetter(f"_claim.row.{name}"), doc=meaning)


_NOTE_CHARACTERS = 1_000_000
"""How long a note of a progress may be: it is written beside the step, where no error could go to `handle`."""


class Context(Generic[_State]):
    """What a step sees of its instance, and its verbs that add to the step's commit. Read-only."""

    __slots__ = ("_called", "_children", "_claim", "_effects", "_kept", "_loaded", "_state")

    id: Final[int] = _column("id", "Id of the instance.")
    fsm: Final[str] = _column("fsm", "Name of its class.")
    version: Final[int] = _column("version", "Version of its class.")
    step: Final[str] = _column("step", "Name of the step that runs.")
    attempt: Final[int] = _column("attempt", "How often this step was tried before, 0 the first time.")
    queue: Final[str] = _column("queue", "Queue that it runs in.")
    correlation_key: Final[str | None] = _column("correlation_key", "Its business key, if it has one.")
    parent_id: Final[int | None] = _column("parent_id", "Id of the instance whose child it is, if any.")

    def __init__(self, claim: _Claim, state: _State, loaded: _Loaded = _ALL_KNOWN) -> None:
        self._claim = claim
        self._state = state
        self._loaded = loaded
        self._children: tuple[Instance, ...] | None = None
        self._effects: list[_Effect] | None = []
        self._called: set[str] = set()
        self._kept: dict[str, tuple[str | None, bool]] | None = None

    @classmethod
    def current(cls) -> Context[Any] | None:
        """Return the Context of the step that runs in this thread or task, or None: for logging filters."""
        return _current.get()

    @property
    def state(self) -> _State:
        """Its state, a `State` object or a dict."""
        return self._state

    @property
    def now(self) -> dt.datetime:
        """The present instant by the engine's clock."""
        return _instant(self._claim.services.now())

    @property
    def scheduled_at(self) -> dt.datetime | None:
        """Instant that the instance stands for, if a schedule has inserted it."""
        return _instant_or_none(self._claim.row.scheduled_at)

    @property
    def inbox(self) -> tuple[Signal, ...]:
        """All signals that the instance has, oldest first."""
        return self._claim.inbox

    @property
    def awaited(self) -> tuple[Signal, ...]:
        """The inbox's signals of the names that the last `Await` named."""
        names = self._claim.row.awaited_names
        return tuple(signal for signal in self._claim.inbox if signal.name in names) if names else ()

    @property
    def children(self) -> tuple[Instance, ...]:
        """All children that are still in the file, read when first asked for."""
        if self._children is None:
            self._children = self._claim.services.children(self.id) if self._claim.error is None else ()
        return self._children

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked to cancel the instance by now, or the step is over its `timeout`.

        True, too, where the engine was stopped and has not waited for the step, which no longer counts.
        """
        claim = self._claim
        try:
            return claim.is_disowned or claim.is_late or claim.services.is_cancelled(self.id)
        except EngineClosedError:
            return True

    def execute(self, sql: str, bindings: Sequence[Any] | Mapping[str, Any] = ()) -> None:
        """Add a statement to the step's commit: it happens exactly once, or not at all.

        It runs when the step's outcome is committed, so it returns nothing. If it fails, the step failed with
        that error. Transaction control, ATTACH, pragmas other than `user_version` and a few as harmless, temporary
        objects, and writing to `durable_*` tables are refused.
        """
        _text(sql, "sql")
        if isinstance(bindings, str | bytes) or not isinstance(bindings, Sequence | Mapping):
            raise ValueError(f"bindings must be a sequence or a mapping, not {_brief(bindings)}")
        self._add(_Statement(sql, dict(bindings) if isinstance(bindings, Mapping) else tuple(bindings)))

    def insert(self, fsm: Any, **options: Unpack[_InsertOptions]) -> None:
        """Add an instance to the step's commit, with the options of `Insert`; a duplicate is dropped and logged."""
        self._add(self._claim.services.new_row(_make_insert(fsm, options)))

    def signal(self, target: int | str, name: str, payload: Any = None, *, dedup_key: str | None = None) -> None:
        """Add a signal to the step's commit; one without a live target is dropped and logged."""
        self._add(_message(target, name, payload, dedup_key))

    @overload
    def call(
        self,
        name: str,
        function: Callable[_Arguments, Coroutine[Any, Any, _Returned_co]],
        /,
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> Awaitable[_Returned_co]: ...
    @overload
    def call(
        self,
        name: str,
        function: Callable[_Arguments, _Returned_co],
        /,
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Returned_co: ...
    def call(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function whose effect a repeat of the step is not to repeat, and return what it returned.

        What it returns, anything that JSON or cattrs can write, is committed before this returns it, as plain JSON
        values. When the step runs again, after a `Retry`, an error or a crash, the kept value is returned and the
        function is not called; values are dropped when the step progresses. What it raises is raised and not kept. A
        crash between the effect and its commit repeats that one call.

        `name` is unique within the step. A coroutine function is for `async def` steps: `await ctx.call("model:3",
        client.ask, messages)`; a plain one runs where it is called, and an awaitable that it returns is to be awaited.

        Raises `ValueError` for a name that this run has used, or a value that can't be written, `TypeError` for what
        would have to be awaited in a plain step, and `DurableError` if the engine has lost the instance to another.
        """
        self._begin_call(name, function)
        kept = self._kept_calls().get(name)
        if kept is not None:
            value = _load_value(kept[0])
            return _ready(value) if kept[1] and self._claim.is_async else value
        with self._naming(name):
            if _is_coroutine_function(function) and not self._claim.is_async:
                raise TypeError(f"call {name!r} is of a coroutine function: {_NEEDS_ASYNC}")
            returned = function(*args, **kwargs)
            if self._claim.is_async and inspect.isawaitable(returned):
                return self._finish_call(name, returned)
            _refuse_awaitable(returned, f"call {name!r} returned an awaitable: {_NEEDS_ASYNC}", TypeError)
            call = _Kept(name, _dump_value(returned, f"what call {name!r} returned"), is_awaited=False)
        self._claim.keep(call)
        return _load_value(call.value)

    def _begin_call(self, name: str, function: object) -> None:
        """Check what is to be called, and that the step is still the one that may."""
        _text(name, "a call's name")
        if not callable(function):
            raise TypeError(f"call {name!r}: function must be callable, not {_brief(function)}")
        if self._effects is None:
            raise DurableError(f"the step {self.step!r} of instance {self.id} has ended: it can't call {name!r}")
        if name in self._called:
            raise ValueError(f"call {name!r} was made before in this step: each needs a name of its own")
        self._claim.check_held()
        self._called.add(name)

    def _kept_calls(self) -> dict[str, tuple[str | None, bool]]:
        if self._kept is None:
            self._kept = self._claim.services.calls(self.id) if self._claim.has_calls else {}
        return self._kept

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Set the name of a call free again where nothing comes of it."""
        try:
            yield
        except BaseException:
            self._called.discard(name)
            raise

    async def _finish_call(self, name: str, awaitable: Awaitable[Any]) -> Any:
        with self._naming(name):
            returned = await awaitable
            call = _Kept(name, _dump_value(returned, f"what call {name!r} returned"), is_awaited=True)
        await self._claim.keep_soon(call)
        return _load_value(call.value)

    def progress(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Say how far the step has come: `done`, of `total` if that is known, with a `note`.

        `Instance.progress` shows the latest, in every process; it is written at most five times a second, and the
        event `step.progress` tells of each in this process. It survives a retry, and goes when the step progresses.
        Raises `ValueError` for what is no number, and for a note of over a million characters.
        """
        _number(done, "done")
        if total is not None:
            _number(total, "total")
        if note is not None:
            note = _printable(_text(note, "note"))
            if len(note) > _NOTE_CHARACTERS:
                raise ValueError(f"note must be of at most {_NOTE_CHARACTERS:,} characters, not {len(note):,}")
        if self._effects is not None:
            self._claim.services.report_progress(self._claim, (done, total, note))

    def _add(self, effect: _Effect) -> None:
        if self._claim.services.fork_guard.is_forked:
            raise EngineClosedError(
                f"this process was forked off in step {self.step!r} of instance {self.id}, which goes on in its parent:"
                " nothing can be added to it here"
            )
        if self._effects is None:
            raise DurableError(f"the step {self.step!r} of instance {self.id} has ended: nothing can be added to it")
        self._effects.append(effect)

    def _close(self) -> tuple[_Effect, ...]:
        """Take what the step added; nothing can be added from now on."""
        effects, self._effects = self._effects or (), None
        return tuple(effects)

    def __repr__(self) -> str:
        return f"<Context of instance {self.id}: {self.fsm}, step {self.step!r}, attempt {self.attempt}>"


def _is_generator(function: object) -> bool:
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _must_be_driven(function: object) -> bool:
    """Whether a call of it comes to nothing unless somebody awaits it or goes through what it yields."""
    return _is_coroutine_function(function) or _is_generator(function)


def _check_callback(value: object, name: str) -> None:
    """Check what is called back, in whatever thread: nobody awaits it."""
    if not callable(value) or _must_be_driven(value):
        raise ValueError(f"{name} must be a plain function, or another callable, not {_brief(value)}")


@overload
def step(method: _AnyStep, /) -> _AnyStep: ...
@overload
def step(
    *,
    max_attempts: int | None = None,
    timeout: _Duration | _Keep | None = KEEP,
    backoff: _Duration | Callable[[int], _Duration] | None = None,
) -> Callable[[_AnyStep], _AnyStep]: ...
def step(method: Any = None, /, **options: Any) -> Any:
    """Mark a method `(self, ctx)` as the step of its name; `@step(...)` gives it a rule of its own.

    * `max_attempts`: an error of the step is tried again while it has had fewer, and only then goes to `handle`
    * `backoff`: what to wait before that, a duration or a function of the attempt, counted from 0; the class's
      `backoff` unless given
    * `timeout`: seconds or a timedelta that one run of it may take, in place of the class's; None for none
    """
    _refuse_unknown(options, ("max_attempts", "timeout", "backoff"), "@step: ")
    max_attempts, timeout, backoff = options.get("max_attempts"), options.get("timeout", KEEP), options.get("backoff")
    if max_attempts is not None:
        _integer(max_attempts, "@step: max_attempts", 1, TypeError)
    elif backoff is not None:
        raise TypeError("@step: backoff is for a step that is tried again: give max_attempts, too")
    if backoff is not None and not callable(backoff):
        _duration_ms(backoff, "@step: backoff", TypeError)
    if _must_be_driven(backoff):
        raise TypeError("@step: backoff must be a plain function, which returns its delay")
    rule: dict[str, Any] = {"max_attempts": max_attempts, "backoff": backoff}
    if timeout is not KEEP:
        rule["timeout_s"] = _timeout_s(timeout, "@step: timeout", TypeError)

    def mark(marked: Any) -> Any:
        if not inspect.isfunction(marked):
            raise TypeError(f"@step goes on a method, not on {marked!r}")
        cast(Any, marked)._durable_step = rule
        return marked

    return mark if method is None else mark(method)


class _Plan(NamedTuple):
    """When instances of a class are to be inserted, and how: what a schedule is given, checked."""

    when: Cron | Every
    catch_up: str
    window_ms: int
    overlap: bool
    jitter_ms: int
    insert: _InsertOptions


_PLAN_OPTIONS = ("when", "catch_up", "window", "overlap", "jitter")


def _plan(
    when: object,
    *,
    catch_up: object = "last",
    window: object = dt.timedelta(days=1),
    overlap: object = False,
    jitter: object = 0,
    **insert: Any,
) -> _Plan:
    """Check what a schedule is given; the options of the insert are looked at when its row is made."""
    if not isinstance(when, Cron | Every):
        raise ValueError(f"when must be a Cron(...) or an Every(...), not {_brief(when)}")
    if catch_up not in ("last", "none", "all"):
        raise ValueError(f"catch_up must be 'last', 'none' or 'all', not {_brief(catch_up)}")
    if catch_up == "all" and overlap is False:
        raise ValueError(
            "catch_up='all' needs overlap=True: else each would be skipped while the one before it is live"
        )
    for name in ("schedule_at", "schedule_in"):
        if insert.get(name) is not None:
            raise ValueError(f"{name} is no option of a schedule: its instances are due when they are inserted")
    window_ms, jitter_ms = _duration_ms(window, "window"), _duration_ms(jitter, "jitter")
    return _Plan(when, catch_up, window_ms, _boolean(overlap, "overlap"), jitter_ms, cast(Any, insert))


def _declared_plan(declared: object, where: str) -> _Plan | None:
    """Read the class option `schedule`: a `Cron`, an `Every`, or a dict of what `Engine.schedule` takes."""
    if declared is None:
        return None
    if not isinstance(declared, Cron | Every | dict):
        raise TypeError(f"{where}: schedule must be a Cron, an Every, or a dict with `when`, not {_brief(declared)}")
    options = declared if isinstance(declared, dict) else {"when": declared}
    _refuse_unknown(options, [*_PLAN_OPTIONS, *_InsertOptions.__annotations__], f"{where}: schedule: ")
    try:
        return _plan(**{"when": None, **options})
    except ValueError as error:
        raise TypeError(f"{where}: schedule: {error}") from error


class _FSMOptions(TypedDict, total=False):
    """The class keywords of `FSM`."""

    name: str
    version: int
    queue: str
    initial: str
    state: type
    max_attempts: int
    max_crashes: int
    timeout: _Duration | None
    inline: bool
    retention: _Duration | None
    history: bool
    schedule: Cron | Every | dict[str, Any] | None
    aliases: Sequence[str]


def _aliases(given: object, name: str, error: type[Exception]) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise error(f"{name} must be several names, such as ('old.Name',), not {_brief(given)}")
    return tuple(_text(one, f"a name in {name}", error) for one in given)


def _retention_ms(value: object, name: str, error: type[Exception] = TypeError) -> int:
    """Read how long ended rows are kept; `math.inf` is for ever."""
    return _END_OF_TIME if isinstance(value, float) and value == math.inf else _duration_ms(value, name, error)


def _retention_or_none(value: object, name: str, error: type[Exception]) -> int | None:
    return None if value is None else _retention_ms(value, name, error)


_OPTIONS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "version": (1, _count),
    "queue": ("default", _text),
    "initial": ("start", _text),
    "max_attempts": (20, _count),
    "max_crashes": (20, _count),
    "timeout": (None, _timeout_s),
    "inline": (False, _boolean),
    "retention": (None, _retention_or_none),
    "history": (True, _boolean),
    "aliases": ((), _aliases),
}
"""The class keywords that need no look at the class: what each is unless given, and what checks it."""
_NOT_INHERITED = ("name", "schedule", "aliases")
_PERFORM = "perform"
"""The one step of a job."""
_NO_ARGUMENTS = attrs.make_class("Parameters", {}, frozen=True)
"""The state of a function job without parameters. There is one text of it, and nothing else to be checked."""


class _Code(NamedTuple):
    """A step's code, as the engine calls it, and the rules of its runs."""

    call: Callable[[Any, Context[Any]], Any]
    is_async: bool
    timeout_s: float | None
    max_attempts: int | None = None
    """Of a step that is tried again by a rule of its own."""
    backoff: Any = None


class _Spec(NamedTuple):
    """What a class defines, read once when it is created."""

    cls: type[FSM]
    name: str
    is_job: bool
    state: type | None
    steps: dict[str, _Code]
    any_step: _Code | None
    has_timeouts: bool
    has_async: bool
    migrates: bool
    """Whether it takes rows of earlier versions."""
    plan: _Plan | None
    """The schedule that it declares, if it does."""
    version: int
    queue: str
    initial: str
    max_attempts: int | None
    max_crashes: int
    inline: bool
    retention: int | None
    """Milliseconds."""
    history: bool
    aliases: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which rows of it stand in the file."""
        return (self.name, *self.aliases)

    def find(self, name: str) -> _Code | None:
        """Return the code of a step, if it has that step."""
        return self.steps.get(name, self.any_step)

    def code(self, name: str) -> _Code:
        code = self.steps.get(name, self.any_step)
        if code is None:
            raise OutcomeError(f"{self.name} has no step {name!r}; it has {', '.join(map(repr, self.steps))}")
        return code

    def attempts_of(self, kept: int | None) -> int | None:
        """Return how many attempts a row of it has that had so many: a machine none to run out of, a job some."""
        return kept if self.is_job and kept is not None else self.max_attempts

    def has_ceased_to_declare(self, schedule: _ScheduleRow) -> bool:
        """Whether a schedule came from the code of this class, which does not declare it any more."""
        return bool(schedule.is_from_code) and (self.plan is None or schedule.name != self.name)

    def new_row(self, insert: Insert, now: int, policy_of: Callable[[str], _Policy | None]) -> _NewRow:
        """Make the row of an instance to insert; whatever is wrong with it is raised, before anything is written."""
        insert._check_attempts(self.name, is_job=self.is_job)
        if insert.step is not None:
            self.code(_step_name(insert.step))
        rate_limit = None if insert.rate_limit is None else _limit_key(insert.rate_limit, "rate_limit")
        if rate_limit is not None:
            _check_rate(rate_limit, insert.weight, policy_of(_limit_name(rate_limit)))
        state = insert.state if insert.args is None else insert.args
        is_empty = state is None and self.state in (None, _NO_ARGUMENTS)
        key = insert.correlation_key
        return _NewRow(
            self.name,
            self.version,
            self.initial if insert.step is None else _step_name(insert.step),
            "{}" if is_empty else _dump_state(self.state, {} if state is None else state),
            self.max_attempts if insert.max_attempts is None else _count(insert.max_attempts, "max_attempts"),
            self.max_crashes,
            self.queue if insert.queue is None else _text(insert.queue, "queue"),
            insert.priority,
            insert._eligible_at(now),
            None if insert.concurrency_key is None else _limit_key(insert.concurrency_key, "concurrency_key"),
            rate_limit,
            insert.weight,
            None,
            None if key is None else _text(key, "correlation_key"),
            1 if insert.correlation_scope is LIVE else _scope_bits(insert.correlation_scope),
            now,
            now,
            retention=self.retention,
        )


def _merged_options(cls: type[FSM], options: dict[str, Any]) -> dict[str, Any]:
    """Check the class keywords and add those that the nearest base has; some are never inherited."""
    _refuse_unknown(options, ["abstract", *_FSMOptions.__annotations__], f"{cls.__qualname__}: ")
    bases = (vars(base) for base in cls.__mro__[1:])
    inherited: dict[str, Any] = next((names["_options"] for names in bases if "_options" in names), {})
    dropped = (*_NOT_INHERITED, "state") if "State" in vars(cls) else _NOT_INHERITED
    return {**{name: value for name, value in inherited.items() if name not in dropped}, **options}


def _marked_steps(cls: type) -> dict[str, dict[str, Any]]:
    """Return the methods that are steps, with the rule of the nearest class that marks each; one in its place is it."""
    marked = ((name, one) for base in reversed(cls.__mro__) for name, one in vars(base).items())
    return {name: cast(Any, one)._durable_step for name, one in marked if hasattr(one, "_durable_step")}


def _module_name(module: str) -> str:
    """Name a module as its importers know it: a script run as `__main__` by its stem, or its `-m` name."""
    main = sys.modules.get(module)
    if module not in ("__main__", "__mp_main__") or main is None:  # the second: in a process that spawn started
        return module
    if getattr(main, "__spec__", None) is not None:
        return str(cast(Any, main).__spec__.name)
    file = getattr(main, "__file__", None)
    return pathlib.Path(file).stem if file else module


def _classes_in(kind: Any) -> Iterator[type]:
    """Go through the classes with fields that a type is made of."""
    if _field_names(kind) is not None:
        yield _own(kind)
    for one in typing.get_args(kind):
        yield from _classes_in(one)


def _resolve_annotations(state: type, owner: type, names: dict[str, Any], seen: set[type]) -> None:
    """Resolve the annotations of a state's fields, and of the classes in these; one that can't be is a TypeError.

    A class sees itself and the classes nested in it, and in its owner where it stands there, beside its module's names;
    that of a function's parameters sees the `names` that the function does.
    """
    seen.add(state)
    is_nested = state.__module__ == owner.__module__ and state.__qualname__.startswith(f"{owner.__qualname__}.")
    outer = {**vars(owner), owner.__name__: owner} if is_nested else {}
    around = {} if names else {**outer, **vars(state), state.__name__: state}
    local = {name: one for name, one in around.items() if isinstance(one, type) or typing.get_origin(one) is not None}
    try:
        kinds = list(typing.get_type_hints(state, names or None, local, include_extras=True).values())
        if attrs.has(state):
            kinds = [field.type for field in attrs.fields(attrs.resolve_types(state, names or None, local))]
    except Exception as error:
        raise TypeError(
            f"{owner.__qualname__}: an annotation of its {state.__qualname__} can't be resolved ({_error_text(error)}):"
            " what it names must be known to its module, or be nested in the class"
        ) from error
    for inner in itertools.chain.from_iterable(map(_classes_in, kinds)):
        if inner not in seen:
            _resolve_annotations(inner, owner, {}, seen)


def _job_function(cls: type) -> Any:
    """Return the function that a job's class was made for; None for a class that was written as one."""
    return getattr(getattr(cls, _PERFORM, None), "_function", None)


def _read_state_class(cls: type[FSM]) -> type | None:
    state = cls._options.get("state", getattr(cls, "State", None))
    if state is None:
        return None
    if not isinstance(state, type) or not attrs.has(state):
        raise TypeError(f"{cls.__qualname__}: its state must be an attrs class (@attrs.frozen), not {_brief(state)}")
    function = _job_function(cls)
    is_arguments = function is not None and state is vars(cls).get("State")
    _resolve_annotations(state, cls, inspect.unwrap(function).__globals__ if is_arguments else {}, set())
    return state


def _hides_step(member: object) -> bool:
    """Whether a decorator has taken the mark of a step away."""
    return hasattr(getattr(member, "__wrapped__", None), "_durable_step") and not hasattr(member, "_durable_step")


def _takes(method: Any, count: int) -> bool:
    """Whether a method can be called with so many arguments, `self` among them."""
    with contextlib.suppress(TypeError):
        inspect.signature(method).bind(*range(count))
        return True
    return False


def _checked_method(cls: type, name: str, form: str, *counts: int) -> Any:
    """Return a method that can be called with one of those numbers of arguments."""
    method = getattr(cls, name)
    if not any(_takes(method, count) for count in counts):
        raise TypeError(f"{cls.__qualname__}.{name} must be callable as {name}{form}")
    if _is_generator(getattr(method, "_function", method)):
        raise TypeError(f"{cls.__qualname__}.{name} is a generator: it must return what it comes to, not yield it")
    return method


def _perform_code(cls: type[FSM], timeout_s: float | None) -> _Code:
    method = _checked_method(cls, _PERFORM, "(self, args) or perform(self, args, ctx)", 3, 2)
    is_async = inspect.iscoroutinefunction(getattr(method, "_function", method))
    if _takes(method, 3):
        return _Code(lambda self, ctx: self.perform(ctx.state, ctx), is_async, timeout_s)
    return _Code(lambda self, ctx: self.perform(ctx.state), is_async, timeout_s)


def _any_step_code(cls: type[FSM], timeout_s: float | None) -> _Code:
    method = _checked_method(cls, "step", "(self, name, ctx)", 3)
    return _Code(lambda self, ctx: self.step(ctx.step, ctx), inspect.iscoroutinefunction(method), timeout_s)


def _step_code(cls: type[FSM], name: str, rule: dict[str, Any], timeout_s: float | None) -> _Code:
    method = _checked_method(cls, name, "(self, ctx)", 2)
    return _Code(method, inspect.iscoroutinefunction(method), **{"timeout_s": timeout_s, **rule})


def _refuse_misfits(cls: type[FSM], marked: Collection[str], initial: str, *, is_job: bool, has_any_step: bool) -> None:
    """Refuse a class that could not run."""
    given = cls._options
    neither = (
        " defines neither steps nor perform: mark methods with @step (a machine), define perform (a job), or pass"
        " abstract=True (a shared base)"
    )
    hooks = [
        name for name in ("handle", "backoff", "migrate") if name in marked or _must_be_driven(getattr(cls, name, None))
    ]
    under = [name for base in cls.__mro__ for name, one in vars(base).items() if _hides_step(one)]
    both, known = "defines both steps and perform", ", ".join(map(repr, marked))
    for is_wrong, what in (
        (hooks, f": {', '.join(hooks)} must be a plain method of the class, neither a step nor async"),
        (under, f": @step of {', '.join(under)} must stand above staticmethod and the like, on a method (self, ctx)"),
        (is_job and (marked or has_any_step), f" {both}: keep the steps (a machine) or perform (a job)"),
        (marked and has_any_step, " defines both @step methods and step(self, name, ctx): use one of the two forms"),
        (not (is_job or marked or has_any_step), neither),
        (is_job and "initial" in given, ": initial is for machines only: leave it out"),
        (not is_job and "max_attempts" in given, ": max_attempts is for jobs only: leave it out"),
        (marked and initial not in marked, f": initial={initial!r} is none of its steps {known}: name one of them"),
    ):
        if is_wrong:
            raise TypeError(f"{cls.__qualname__}{what}")


def _read_class(cls: type[FSM]) -> _Spec:
    """Read what a class defines; whatever could not run is a TypeError here."""
    where, marked = cls.__qualname__, _marked_steps(cls)
    values = {
        name: check(cls._options.get(name, default), f"{where}: {name}", error=TypeError)
        for name, (default, check) in _OPTIONS.items()
    }
    is_job = callable(getattr(cls, _PERFORM, None)) and _PERFORM not in marked
    has_any_step = callable(getattr(cls, "step", None)) and "step" not in marked
    _refuse_misfits(cls, marked, values["initial"], is_job=is_job, has_any_step=has_any_step)
    timeout_s = values.pop("timeout")
    if is_job:
        steps, values["initial"] = {_PERFORM: _perform_code(cls, timeout_s)}, _PERFORM
    else:
        steps = {name: _step_code(cls, name, rule, timeout_s) for name, rule in marked.items()}
        values["max_attempts"] = None
    any_step = _any_step_code(cls, timeout_s) if has_any_step else None
    codes = [*steps.values(), *filter(None, [any_step])]
    return _Spec(
        cls=cls,
        name=_text(cls._options.get("name", f"{_module_name(cls.__module__)}.{where}"), f"{where}: name", TypeError),
        is_job=is_job,
        state=_read_state_class(cls),
        steps=steps,
        any_step=any_step,
        has_timeouts=any(code.timeout_s is not None for code in codes),
        has_async=any(code.is_async for code in codes),
        migrates=hasattr(cls, "migrate") and bool(_checked_method(cls, "migrate", "(self, step, state, version)", 4)),
        plan=_declared_plan(cls._options.get("schedule"), where),
        **values,
    )


def _definition(cls: type) -> tuple[str, str]:
    return _module_name(cls.__module__), cls.__qualname__


class _Registry(dict[tuple[str, int], "_Spec"]):
    """The classes by name and version, and how often one was added: an engine that is idle looks for that."""

    changes = 0


_registry = _Registry()


def _register(spec: _Spec) -> None:
    """Make a class known under its names and version; defining the same one again replaces it."""
    for (name, version), known in list(_registry.items()):
        is_taken = name in spec.names and (version == spec.version or known.name != spec.name)
        if is_taken and _definition(known.cls) != _definition(spec.cls):
            raise TypeError(
                f"{spec.cls.__qualname__}: {name!r} version {version} is taken by"
                f" {'.'.join(_definition(known.cls))}: give it another name or version"
            )
    _registry.update({(name, spec.version): spec for name in spec.names})
    _registry.changes += 1


def _names_of(name: str) -> tuple[str, ...]:
    """Return the names of the rows that a name means: all of its class, where that is known here."""
    return next((spec.names for (known, _), spec in list(_registry.items()) if known == name), (name,))


class FSM:
    """Base of machines and jobs.

    A machine has methods marked `@step`, or one `def step(self, name, ctx)` that handles every name; a job has
    `def perform(self, args)` or `def perform(self, args, ctx)`. All may be `async def`. Class keywords:

    * `name` (`module.QualName`), `version` (1): what the row stores
    * `queue` ("default"): queue of its instances
    * `initial` ("start"): first step of a machine
    * `state`: attrs class of the state, a nested `State` unless given; none: a plain dict. A step gets what was given,
      of the same types, or giving it is a `StateError`; only a scalar of a subclass, as a StrEnum's member in a field
      of type `str`, comes back as its equal of the base, unless the field has its own type
    * `max_attempts` (20): of a job
    * `max_crashes` (20): crashes in a row after which an instance fails
    * `timeout` (none): seconds that one run of a step may take. A coroutine is cancelled then; a thread can't be: its
      instance and its concurrency key go on without it while its code runs on, which `ctx.cancelled` may end
    * `inline` (False): run a `Next` in the same worker, on the same claim, for 100 ms at most while others wait for
      the slot or the key
    * `retention` (the engine's): seconds or a timedelta that an instance is kept after its end, stored with it, so that
      every engine on the file keeps to it; `math.inf` for ever
    * `history` (True): keep what was run of it, for `Engine.history`, `rewind` and `fork`: of a machine everything, of
      a job its failed attempts
    * `aliases` (none): names under which rows of it may stand in the file, from before it was moved or renamed
    * `schedule` (none): a `Cron` or an `Every` by which instances are inserted, or a dict of what `Engine.schedule`
      takes, with `when`
    * `abstract=True`: a shared base that defines nothing to run

    `def migrate(self, step, state, version)`, where a class has it, makes rows of earlier versions its own which no
    class is registered for: it gets the step, the state as a plain dict and the row's version, and returns
    `(step, state)`.

    A class that can't work is a `TypeError` when it is created. `self` is one object per engine, made without
    arguments or given in `Engine(fsms=[...])`: the place for dependencies, not for state.
    """

    _spec: ClassVar[_Spec | None] = None
    _options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, abstract: bool = False, **options: Unpack[_FSMOptions]) -> None:
        super().__init_subclass__()
        if "_options" in vars(cls):  # made anew by a decorator (slots of attrs, of a dataclass), without keywords
            first = cls._spec
            abstract, options = first is None, cast(_FSMOptions, vars(cls)["_options"])
            if first is not None:
                cls.__qualname__ = first.cls.__qualname__
        cls._spec = None
        cls._options = _merged_options(cls, dict(options))
        if not abstract:
            spec = cls._spec = _read_class(cls)
            if spec.plan is not None:
                try:  # limits are the engines': any name of one will do
                    spec.new_row(_make_insert(cls, spec.plan.insert), 0, lambda name: _Policy(name, 1, 1, _MAX_INTEGER))
                except (ValueError, StateError) as error:
                    raise TypeError(f"{cls.__qualname__}: schedule: {error}") from error
            _register(spec)

    def backoff(self, attempt: int) -> _Duration:
        """Seconds to wait after the attempt of that number, counted from 0, failed.

        A number or a timedelta. What is none, or an error, stops the instance; its `last_error` keeps the step's own
        error beside that.
        """
        return min(float(2 ** min(attempt, 16)), 300.0)

    def handle(self, error: Exception, ctx: Context[Any]) -> Any:
        """Rule on an error of a step with an outcome: `Stop(error)` for a machine, the retry rule for a job.

        Asked once for each run that fails, and not for one that no longer counts: of a step over its `timeout` it gets
        the TimeoutError, and nothing that the step still comes to. asyncio's CancelledError is an error of the step's
        where nobody has cancelled it.
        """
        return self._retry(error, ctx) or Stop(error)

    def _retry(self, reason: str | BaseException, ctx: Context[Any]) -> Retry | Stop | None:
        """Try a job, or a step that has a rule for it, again while it may be; None once it may not."""
        row, spec = ctx._claim.row, ctx._claim.spec
        code = spec.find(row.step)
        max_attempts = row.max_attempts if spec.is_job or code is None else code.max_attempts
        if row.attempt + 1 >= (max_attempts or 0):
            return None
        backoff = self.backoff if code is None or code.backoff is None else code.backoff
        try:
            return Retry(backoff(row.attempt) if callable(backoff) else backoff)
        except Exception as error:  # noqa: BLE001 - the user's code: what was wrong with the step must not be lost for it
            return Stop(f"{_error_text(reason)}; and backoff({row.attempt}) is no delay: {_error_text(error)}")


_replaced: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes of functions and lambdas that were defined anew, once that was told."""


def _refuse_decorated(function: object, cls: type[FSM], error: type[Exception]) -> None:
    """Refuse a function that carries the class of a job which was made of another."""
    if _job_function(cls) is not function:
        made = f"{_brief(function)} is what a decorator has made of the job {cls.__qualname__}"
        raise error(f"{made}, and would be skipped: put @durable.job above all others")


def _spec_of(fsm: object) -> _Spec:
    """Read what a class, or that of a function job, has defined."""
    cls = fsm if isinstance(fsm, type) else getattr(fsm, "fsm", None)
    if not isinstance(cls, type) or not issubclass(cls, FSM):
        raise TypeError(f"fsm must be an FSM class, a function marked @durable.job, or a name, not {_brief(fsm)}")
    if cls is not fsm:
        _refuse_decorated(fsm, cls, TypeError)
    if cls._spec is None:
        raise TypeError(f"{cls.__qualname__} is abstract: it can't have instances")
    return cls._spec


def _known_versions(fsm: str) -> list[int]:
    """List the versions of the classes of a name that are known here, in order."""
    return sorted(version for name, version in list(_registry) if name == fsm)


def _resolve(fsm: object) -> _Spec:
    """Find what is meant by a class, a function job, or a registered name (its highest version)."""
    if isinstance(fsm, str):
        versions = _known_versions(fsm)
        if not versions:
            raise UnknownFSMError(f"no class is registered as {fsm!r}; import the module that defines it")
        return _registry[fsm, versions[-1]]
    spec = _spec_of(fsm)
    known = _registry.get((spec.name, spec.version))
    if known is not None and known is not spec and "<" in spec.cls.__qualname__ and spec.cls not in _replaced:
        _replaced.add(spec.cls)
        _log.warning(
            "%s was defined anew since, and that is what will run: give what a function or a lambda defines more than"
            " once a name of its own each time (name=...)",
            spec.name,
        )
    return known or spec


class _TakesContext(typing.Protocol[_Arguments]):
    """A function whose first parameter is its Context."""

    def __call__(self, ctx: Context[Any], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Any: ...


class _FunctionJob(typing.Protocol[_Called, _Returned_co]):
    """A function that is a job: it is called as ever, `fsm` is the class made for it, `args` makes its arguments."""

    fsm: type[FSM]
    __name__: str

    def __call__(self, *args: _Called.args, **kwargs: _Called.kwargs) -> _Returned_co: ...
    @overload
    def args(
        self: _TakesContext[_Arguments], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> dict[str, Any]: ...
    @overload
    def args(self, *args: _Called.args, **kwargs: _Called.kwargs) -> dict[str, Any]: ...


def _make_args(function: types.FunctionType) -> Callable[..., dict[str, Any]]:
    """Make the function that turns a call's arguments into the dict for `args=`, held against the signature."""
    signature = inspect.signature(function)
    own = signature.replace(parameters=[one for one in signature.parameters.values() if one.name != "ctx"])

    def args(*arguments: Any, **named: Any) -> dict[str, Any]:
        try:
            return own.bind(*arguments, **named).arguments
        except TypeError as error:
            raise TypeError(f"{function.__qualname__}{own}: {error}") from None

    return args


def _arguments_class(function: types.FunctionType) -> type:
    """Make the attrs class of a function's arguments; parameters that no dict could name are refused."""
    fields = {}
    for name, one in inspect.signature(function).parameters.items():
        if name == "self" or one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise TypeError(
                f"{function.__qualname__}: a job is a function, not a method, whose parameters have names: none may be"
                f" `self`, positional-only, *args or **kwargs, as {one} is"
            )
        if name != "ctx":
            kind = Any if one.annotation is one.empty else one.annotation
            default = attrs.NOTHING if one.default is one.empty else one.default
            fields[name] = attrs.field(type=kind, default=default, alias=name, kw_only=True)
    body = {"__module__": function.__module__}
    return attrs.make_class("Parameters", fields, frozen=True, class_body=body) if fields else _NO_ARGUMENTS


def _function_perform(function: types.FunctionType) -> Callable[[Any, Any, Any], Any]:
    """Make the `perform` that calls a function with the state's fields as its arguments."""
    names = list(inspect.signature(function).parameters)

    def perform(_: Any, args: Any, ctx: Any) -> Any:
        return function(**{name: ctx if name == "ctx" else getattr(args, name) for name in names})

    cast(Any, perform)._function = function
    return perform


class _JobDecorator(typing.Protocol):
    """What `@job(...)` with options returns."""

    def __call__(self, function: Callable[_Called, _Returned_co], /) -> _FunctionJob[_Called, _Returned_co]: ...


@overload
def job(function: Callable[_Called, _Returned_co], /) -> _FunctionJob[_Called, _Returned_co]: ...
@overload
def job(**options: Unpack[_FSMOptions]) -> _JobDecorator: ...
def job(function: Any = None, /, **options: Any) -> Any:
    """Make a function, plain or async, a job, without changing it.

    Its parameters with their annotations and defaults are the schema of its `args`; a parameter named `ctx` gets
    the Context. What it returns and raises is read as from `perform`. Options are the class keywords of `FSM`.
    `fetch.args("http://a", tries=3)` is the dict for `args=`, checked against the signature (by type checkers, too,
    where `ctx`, if there is one, comes first).

    >>> @job(name="greet", max_attempts=3)
    ... def greet(name: str, times: int = 1):
    ...     return f"hello {name}" * times
    >>> greet("you")
    'hello you'
    >>> greet.args("you", times=2)
    {'name': 'you', 'times': 2}
    >>> greet.fsm.__name__
    'greet'
    """
    if function is None:
        return lambda decorated: job(decorated, **options)
    if not inspect.isfunction(function):
        raise TypeError(f"@durable.job goes on a function, not on {function!r}")
    body = {
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__doc__": function.__doc__,
        _PERFORM: _function_perform(function),
        "State": _arguments_class(function),
    }
    cast(Any, function).args = _make_args(function)
    cast(Any, function).fsm = types.new_class(function.__name__, (FSM,), options, lambda space: space.update(body))
    return function


# ==================================================================================================
# Transitions
# ==================================================================================================


_inserted_at = operator.attrgetter("inserted_at")


class _Entry(NamedTuple):
    """A run of a step, in the past of its instance: columns in the order in which the statement binds them.

    `seq` is the number of the claim under which it ran, so that nothing is entered twice.
    """

    instance: int
    seq: int
    version: int
    """Of the class of which its step and its state are."""
    step: str
    attempt: int
    kind: str
    started_at: int
    duration: float
    """Milliseconds."""
    worker: str | None
    error: str | None
    traceback: str | None
    state: str
    signals: str | None
    to: str | None
    awaits: str | None
    joining: int
    first_child: int | None
    """Id of the first child that it inserted; the others come after it."""


class _Run(NamedTuple):
    """Which run of an instance is meant; a step that never ran has no number."""

    seq: int | None
    version: int
    step: str


class _ScheduleRow(NamedTuple):
    """A schedule's columns, in the order in which its statement binds them."""

    name: str
    fsm: str
    when: str
    template: str
    """The instance to insert, as JSON: the columns of a `_NewRow`, and which options were `given` for it."""
    catch_up: str
    window: int
    overlap: int
    jitter: int
    is_declared: int
    is_from_code: int
    """Whether a class option wrote it: then only an engine that knows a class which still declares it fires it."""
    written_at: int
    is_paused: int = 0
    next_at: int | None = None
    fires_at: int | None = None
    last_at: int | None = None
    last_id: int | None = None
    missed: int = 0
    fired_until: int | None = None
    """The latest nominal instant that was inserted from the grid."""

    def timetable(self, salt: str, zone_of: Callable[[str], dt.tzinfo]) -> _Timetable:
        grid = _read_when(self.when)._grid(self.written_at, zone_of)
        return _Timetable(grid, self.catch_up, self.window, self.jitter, f"{salt}:{self.name}")

    def says_the_same(self, other: _ScheduleRow) -> bool:
        """Whether it says what another does; how far they have come apart."""
        said = self._fields.index("written_at")
        return self[:said] == other[:said]

    def going_on_at(self, next_at: int, timetable: _Timetable) -> _ScheduleRow:
        """Say how the row stands with that next instant, unless it is paused."""
        if self.is_paused:
            return self._replace(next_at=None, fires_at=None)
        return self._replace(next_at=next_at, fires_at=timetable.fires_at(next_at))


class _Row(NamedTuple):
    """What the engine reads of an instance to run and to move it.

    In three parts: what stays as it is; what an `_Advance` sets, in the order that it has there; and the claim, with
    what progress clears.
    """

    id: int
    fsm: str
    version: int
    max_attempts: int | None
    max_crashes: int
    queue: str
    priority: int
    parent_id: int | None
    correlation_key: str | None
    scheduled_at: int | None

    step: str
    state: str
    eligible_at: int
    concurrency_key: str | None
    rate_limit: str | None
    weight: int

    claim: int
    last_error: str | None
    traceback: str | None
    attempt: int
    crashes: int
    cancel_reason: str | None
    awaits: str | None
    joining: int
    has_calls: int
    has_inbox: int

    @property
    def awaited_names(self) -> list[str]:
        return [] if self.awaits is None else cast(list[str], _decode(self.awaits))


class _Waiting(NamedTuple):
    """A row in the line of a limit. Sorts in the order of the line."""

    priority: int
    eligible_at: int
    id: int
    queue: str
    weight: int
    fsm: str
    version: int

    @property
    def order(self) -> tuple[int, int, int]:
        return self[:3]


# What an outcome makes of a row: the new values, in the order in which its statement binds them. What is not among
# them is kept, or cleared by the statement.


class _Advance(NamedTuple):
    """A row that comes to another step, with a clean slate: no error, no attempts, no limits but those given."""

    status: str
    step: str
    state: str
    eligible_at: int
    concurrency_key: str | None
    rate_limit: str | None
    weight: int
    awaits: str | None
    await_deadline: int | None
    joining: int


class _Again(NamedTuple):
    """A row whose step runs again, with the limits and the awaited signals that it has."""

    state: str
    attempt: int
    crashes: int
    eligible_at: int
    last_error: str | None
    traceback: str | None

    @property
    def status(self) -> str:
        return Status.RUNNABLE


class _End(NamedTuple):
    """A row that ends."""

    status: str
    result: str | None
    last_error: str | None
    traceback: str | None
    attempt: int
    crashes: int


_Change = _Advance | _Again | _End


def _done(row: _Row, result: str | None) -> _End:
    """End the row well; its attempt stays as it was, its crashes are forgotten."""
    return _End(Status.DONE, result, None, None, row.attempt, 0)


def _failed(row: _Row, last_error: str, traceback: str | None = None) -> _End:
    """End the row as failed, likewise."""
    return _End(Status.FAILED, None, last_error, traceback, row.attempt, 0)


def _transition(row: _Row, outcome: Next | Retry | Await | ScheduleChildren, state: str, now: int) -> _Advance | _Again:
    """Say what an outcome that goes on makes of a row. Pure: no SQL, no clock."""
    key = row.concurrency_key
    match outcome:
        case Next():
            if outcome.concurrency_key is not KEEP:
                key = _limit_key(outcome.concurrency_key, "concurrency_key")
            rate = None if outcome.rate_limit is None else _limit_key(outcome.rate_limit, "rate_limit")
            return _Advance(Status.RUNNABLE, outcome.step, state, now, key, rate, outcome.weight, None, None, 0)
        case Retry():
            eligible_at, attempt = _later(now, outcome.delay, "delay"), row.attempt + outcome.counted
            return _Again(state, attempt, 0, eligible_at, row.last_error, row.traceback)
        case Await():
            deadline = None if outcome.timeout is None else _later(now, outcome.timeout, "timeout")
            names = _json(outcome.names)
            return _Advance(Status.AWAITING_SIGNAL, outcome.then, state, now, key, None, 1, names, deadline, 0)
        case ScheduleChildren():
            return _Advance(Status.AWAITING_CHILDREN, outcome.then, state, now, key, None, 1, None, None, 1)


_CLEAN_SLATE = {"last_error": None, "traceback": None, "attempt": 0, "crashes": 0, "progress": None, "has_calls": 0}
"""What progress makes of the columns that tell of the step before."""
_NOTHING_LEFT = {"awaits": None, "joining": 0, "progress": None}
"""What a good end makes of those that say what was waited for."""
_CLEARED = _CLEAN_SLATE | _NOTHING_LEFT | {"cancel_reason": None, "has_inbox": 0}
_AT_STEP, _AT_CLAIM = map(_Row._fields.index, ("step", "claim"))
_AT_AWAITS = _Advance._fields.index("awaits")
_AS_CLEARED = tuple(_CLEARED[name] for name in _Row._fields[_AT_CLAIM + 1 :])


def _advanced(row: _Row, change: _Advance) -> _Row:
    """Say how the row stands when it goes on inline: under the next claim, at the new step."""
    _, *moved = change[:_AT_AWAITS]
    return _Row._make((*row[:_AT_STEP], *moved, row.claim + 1, *_AS_CLEARED))


def _crashed(row: _Row, cause: str, now: int, traceback: str | None = None) -> _Again | _End:
    """Say what becomes of a row whose step crashed: it runs again, unless it has crashed or been tried too often."""
    if row.cancel_reason is not None:
        return _failed(row, row.cancel_reason)
    attempt, crashes = row.attempt + 1, row.crashes + 1
    poisoned = crashes >= row.max_crashes
    exhausted = row.max_attempts is not None and attempt >= row.max_attempts
    if poisoned or exhausted:
        limit = f"{crashes} crashes in a row" if poisoned else f"attempt {attempt} of {row.max_attempts}"
        cause = f"{cause}; given up after {limit}"
        return _failed(row, cause, traceback)._replace(attempt=attempt, crashes=crashes)
    return _Again(row.state, attempt, crashes, now, cause, traceback)


# ==================================================================================================
# Files
# ==================================================================================================

# One SQLite per process: apsw and the standard sqlite3 module each carry a copy that does not see the other's locks.
# And one way to the file: closing any descriptor of it drops the locks that the process holds on it.

_Identity = tuple[int, int]
"""Device and inode: the same for as long as a file is open, on some file systems no longer than that."""


class _LostFileError(DurableError):
    """The database or its log is no longer the file that was opened: what is written goes nowhere."""


class _Process:
    """What this process has open, whichever load of the module has opened it."""

    def __init__(self) -> None:
        self.open_files: set[_OpenFiles] = set()
        self.inherited_files: set[_Identity | None] = set()
        """Files on which an engine was open when this process was forked off."""
        self.schedulers: weakref.WeakSet[_Scheduler] = weakref.WeakSet()
        self.is_audited = False


_process: _Process = globals().get("_process") or _Process()  # `importlib.reload` must not forget what is open

_SUFFIXES = ("", "-wal", "-shm")
"""Of the files of a database: itself, its write-ahead log, and the log's index, which carries most of the locks."""
_REFUSALS = {
    "sqlite3.connect": (
        "{path} is open in this process with an engine, and the standard sqlite3 module brings another copy of SQLite:"
        " the two do not see each other's locks, and commits would be lost. Use engine.connect() for a connection of"
        " your own, or enqueue from another process with durable.insert_into(sqlite3_connection, ...)"
    ),
    "open": (
        "{path} is open in this process with an engine: closing a plain file on it would drop SQLite's locks, and"
        " commits would be lost. Use engine.snapshot(path) for a copy, engine.connect() to look into it, or another"
        " process"
    ),
}
_LEFT_OPEN = (
    "{path} is open in this process otherwise than through apsw, most likely by a connection of the standard sqlite3"
    " module that was left and not closed (`with sqlite3.connect(...)` does not close it, contextlib.closing does), or"
    " by a plain open(): SQLite's locks would be lost with it, and commits. Close it first; of an open engine,"
    " engine.connect() gives connections and engine.snapshot(path) makes copies"
)
_TAKEN_AWAY = "since {name} is no longer the file that was opened: it was renamed, replaced or removed"
_LOG_TAKEN_AWAY = (
    "since {name} was taken away: something in this process has opened the database and closed it by itself, so that"
    " SQLite's locks were lost, or its folder is reached in two ways that do not see each other's locks. What was"
    " committed last may be missing in the file"
)
_LOCKS_NOT_SHARED = (
    "since another engine has found the lock free that this one holds: the folder is reached in two ways (a view of a"
    " container or a share) that do not see each other's locks"
)
_MIGRATED = (
    "since a later version of durable has brought the file to schema version {found}, and this one knows up to {known}"
)
_SECOND_NAME = (
    "{path} {how}: SQLite finds a database's log by its name, so that whoever opens it by the other one loses commits."
    " {advice}"
)


def _file_id(file: str | bytes | os.PathLike[Any] | int) -> _Identity | None:
    """Return which file is at a path, or has that descriptor, as far as there is one."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _sqlite3_path(database: object) -> str:
    """Return the path that `sqlite3.connect` was given, in whatever form."""
    path = os.fsdecode(cast(Any, database)) if isinstance(database, str | bytes | os.PathLike) else ""
    if path.startswith("file:"):
        import urllib.parse  # only for URIs

        return urllib.parse.unquote(urllib.parse.urlsplit(path).path)
    return path


def _is_engines(identity: _Identity | None) -> bool:
    """Whether a file is open with an engine in this process."""
    return identity is not None and any(files.has(identity) for files in tuple(_process.open_files))


def _audit(
    event: str, arguments: tuple[Any, ...], *, refusals: Mapping[str, str] = _REFUSALS, process: _Process = _process
) -> None:
    """Refuse to open an engine's files by another road than apsw. Python calls it for all that it reports.

    It is called to the interpreter's very end, when the module's names are gone; those of each time it keeps.
    """
    refusal = refusals.get(event)
    if refusal is None or not process.open_files:
        return
    path = _sqlite3_path(arguments[0]) if event == "sqlite3.connect" else arguments[0]
    if path and isinstance(path, str | bytes | os.PathLike) and _is_engines(_file_id(path)):
        raise SharedFileError(refusal.format(path=os.fsdecode(path)))


def _descriptors() -> list[int]:
    """List the process's descriptors; none where the system does not tell."""
    for folder in ("/dev/fd", "/proc/self/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []


def _descriptors_of(identities: Collection[_Identity]) -> dict[_Identity, int]:
    """Find descriptors of the process's for these files; one may be closed by now, as that of the listing itself."""
    return {one: number for number in _descriptors() if (one := _file_id(number)) is not None and one in identities}


def _has_open(connection: apsw.Connection, identity: _Identity | None) -> bool:
    """Whether an apsw connection has a file open; one that does not come to rest in another thread may have it."""
    for _ in range(20):
        try:
            files = [connection.db_filename(name) for name in connection.db_names()]
            return any(_file_id(file) == identity for file in files if file)
        except apsw.ThreadingViolationError:
            time.sleep(0.001)
        except apsw.Error:  # closed by now
            return False
    return True


def _is_open_otherwise(path: str) -> bool:
    """Whether something in this process has the database open that is not apsw, as far as the system tells.

    Where apsw has it open as well, the descriptors may all be its own: it keeps those of closed connections.
    """
    database, *others = map(_file_id, (path + suffix for suffix in _SUFFIXES))
    if database is None or _is_engines(database):  # what has an engine is guarded since
        return False
    is_open = bool(_descriptors_of({database, *filter(None, others)}))
    return is_open and not any(_has_open(connection, database) for connection in apsw.connections())


def _is_mount_point(path: str) -> bool:
    """Whether something is mounted on a file alone, as far as the system tells: of device numbers, only Linux does."""
    point = os.fsencode(path)
    for char in b"\\ \t\n":
        point = point.replace(bytes((char,)), b"\\%03o" % char)
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            return any(line.split(b" ", 5)[4] == point for line in mounts)
    except OSError:
        return False


def _refuse_second_name(path: str) -> None:
    """Refuse what is no file, no database's, or one that can be reached by a name which leads to another log."""
    try:
        status = os.stat(path)
    except OSError:  # there is none yet, or SQLite will say what is wrong with it
        return
    if stat.S_ISDIR(status.st_mode):  # as SQLite says
        return
    if not stat.S_ISREG(status.st_mode):
        raise DurableError(f"{path} is no file, but a device, a pipe or a socket")
    if status.st_size == 1:  # SQLite takes it for an empty one, and would write over it
        raise SchemaError(f"{path} is damaged or no database: it holds one byte")
    if status.st_nlink > 1:
        advice = "Remove the other hard link, or make a copy of the file in its place"
        raise DurableError(_SECOND_NAME.format(path=path, how=f"has {status.st_nlink} names", advice=advice))
    if _is_mount_point(path):
        advice = "Mount the folder that it lies in"
        raise DurableError(_SECOND_NAME.format(path=path, how="is a mount point of its own", advice=advice))


def _refuse_shared(path: str) -> None:
    """Refuse a file whose locks would not hold: it has a second name, or is open in this process otherwise."""
    if not _process.is_audited:  # once: there is no way to remove a hook
        _process.is_audited = True
        sys.addaudithook(_audit)
    _refuse_second_name(path)
    if _is_open_otherwise(path):
        import gc  # only a refusal pays for it

        gc.collect()  # a connection that nobody holds any more is no reason, nor one that apsw was just opening
        if _is_open_otherwise(path):
            raise SharedFileError(_LEFT_OPEN.format(path=path))


def _is_gone(path: str, identity: _Identity) -> bool:
    """Whether another file is in its place, or none. What can't be seen, after dropped privileges say, is no proof."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return (status.st_dev, status.st_ino) != identity


class _OpenFiles:
    """A database's files while an engine has them open: nothing else in the process may open them.

    And they must stay in their places, else commits go where nobody will ever read them, and SQLite says nothing. Once
    they are not, `loss` tells why.
    """

    LOOK_S = 0.005
    """How often commits and reads look, at most: it takes 6 us."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.loss: str | None = None
        self._identities: dict[str, _Identity] = {}
        self._descriptors: dict[_Identity, int] = {}
        self._root: _Identity | None = None
        self._look_at = math.inf
        self.is_closing = False
        """Set before the engine closes them, after which the log goes by itself."""
        self.note()
        _process.open_files.add(self)

    def note(self) -> None:
        """Take down which files they are: once they are open, and before that, so far as they are there."""
        found = {name: _file_id(name) for name in (self.path + suffix for suffix in _SUFFIXES)}
        self._identities = {name: identity for name, identity in found.items() if identity is not None}

    def look_after(self) -> None:
        """See to it from now on that they stay the files that they are: they are open."""
        self.note()
        self._root = _file_id("/")
        self._descriptors = _descriptors_of(self._identities.values())
        self._look_at = 0.0

    def has(self, identity: _Identity) -> bool:
        """Whether a file is one of them."""
        if self.path not in self._identities:  # it is being made
            self.note()
        return identity in self._identities.values()

    def check(self) -> None:
        """Raise an error if they are no longer the files that were opened."""
        if self.loss is None and _Ticks.monotonic() >= self._look_at:
            self.look()
        if self.loss is not None:
            raise _LostFileError(self.loss)

    def look(self) -> None:
        """See whether they are still in their places. Windows lets nobody move what is open."""
        self._look_at = _Ticks.monotonic() + self.LOOK_S
        if sys.platform == "win32" or self.loss is not None:
            return
        for name, identity in self._identities.items():
            if _is_gone(name, identity) and not self.is_closing and not self._is_out_of_sight(identity):
                self.lose((_TAKEN_AWAY if name == self.path else _LOG_TAKEN_AWAY).format(name=name))
                return

    def lose(self, how: str) -> None:
        """Have nothing committed any more, and leave the files to whoever has them now."""
        self.loss = f"{self.path}: nothing is committed any more, {how}. Put it right, and open the file anew"
        for connection in apsw.connections():
            if _has_open(connection, self._identities.get(self.path)):
                self.release(connection)

    def release(self, connection: apsw.Connection) -> None:
        """Have a connection to files that are lost not copy its log into the database when it is closed.

        Others may have written there since. One that is busy in another thread is asked again when it is closed.
        """
        if self.loss is not None:
            with contextlib.suppress(apsw.ThreadingViolationError):
                connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)

    def close(self) -> None:
        """Let others open them."""
        _process.open_files.discard(self)

    def _is_out_of_sight(self, identity: _Identity) -> bool:
        """Whether this process has another root by now, after a chroot, and the file may be where it was."""
        if _file_id("/") == self._root:
            return False
        descriptor = self._descriptors.get(identity, -1)
        with contextlib.suppress(OSError):
            return _file_id(descriptor) != identity or os.fstat(descriptor).st_nlink > 0
        return True


def _check_open_files(path: str) -> None:
    """Raise an error if an engine of this process has lost the files of that path."""
    for files in tuple(_process.open_files):
        if files.path == path:
            files.check()


_HELD = frozenset({errno.EWOULDBLOCK, errno.EACCES})
"""What the system says of a lock that somebody else holds; all else means that there is no locking."""


def _try_to_lock(file: io.FileIO) -> bool:
    """Lock an open file; False if somebody else holds the lock, a DurableError if it can't be locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise DurableError(f"{file.name} can't be locked, which a running engine needs: {error}") from error
    return True


class _LockFile:
    """A file beside the database that a running engine holds locked; the kernel drops the lock when it dies.

    Locks of the whole open file (flock), not of the process: two engines of one process tell each other apart, and
    in containers, where every process is number 1, they work as well.

    Whoever makes one keeps it before it is locked, so that an interrupt leaves no lock that nobody can let go of.
    """

    CREATE_S = 10.0
    """For how long a clean-up may hold a file that is being made."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files: list[io.FileIO] = []
        """What is open at the path; before it what is still somewhere, but no longer at its path.

        Objects, not descriptors: one call in C opens and keeps one, or closes it, and closing it again is nothing.
        """

    @staticmethod
    def path_of(database: str, worker: str) -> str:
        return f"{database}-worker-{worker}.lock"

    def create(self, database: str) -> None:
        """Create the file and lock it; again, if a clean-up took it for a dead worker's in between."""
        deadline = _Ticks.monotonic() + self.CREATE_S
        while _Ticks.monotonic() < deadline:
            self._open_new(database)
            try:
                if _try_to_lock(self._files[-1]) and self.is_in_place():
                    return
            except BaseException:
                self._remove_newest()
                raise
            self._files.pop().close()
            time.sleep(0.001)
        raise DurableError(f"{self._path} is held by somebody else")

    def _open_new(self, database: str) -> None:
        """Open the file, with the database's mode and group: who works on that may judge this worker."""
        try:
            like = os.stat(database)
            opener = functools.partial(os.open, mode=like.st_mode & 0o666)
            self._files.append(io.FileIO(self._path, "a+", opener=opener))
        except OSError as error:
            message = f"a running engine needs a lock file beside its database, and it can't be made: {error}"
            if error.errno == errno.ENAMETOOLONG:
                longest = 255 - len(os.fsencode(self._path)) + len(os.fsencode(database))
                message += f" (the database's name may have {longest} bytes at most)"
            raise DurableError(message) from error
        descriptor = self._files[-1].fileno()
        if hasattr(os, "fchown"):
            with contextlib.suppress(OSError):  # not in that group, or no such thing here: others wait for the lease
                os.fchown(descriptor, like.st_uid if os.geteuid() == 0 else -1, like.st_gid)
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, like.st_mode & 0o666)  # whatever the umask

    def _remove_newest(self) -> None:
        """Remove what was made and can't be locked; what was moved stays as it is."""
        self._files.pop().close()  # first, for Windows
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    @classmethod
    def remove_stale(cls, database: str, living: Iterable[str]) -> None:
        """Remove the files of workers that the database does not know, unless they are just signing on."""
        folder, name = os.path.split(cls.path_of(database, "*"))
        start, end = name.split("*")
        known = {cls.path_of(database, worker) for worker in living}
        try:
            names = os.listdir(folder)
        except OSError as error:
            _log.debug("%s: no look for lock files left behind: %s", database, error)
            return
        for path in (os.path.join(folder, name) for name in names if name.startswith(start) and name.endswith(end)):
            if path not in known:
                cls._remove_of_dead(path)

    @staticmethod
    def _remove_of_dead(path: str) -> None:
        is_dead = False
        with contextlib.suppress(OSError, DurableError), io.FileIO(path, opener=os.open) as file:
            is_dead = _try_to_lock(file)
            if is_dead:
                os.unlink(path)
        if is_dead:
            with contextlib.suppress(OSError):
                os.unlink(path)  # again: Windows removes no open file

    @classmethod
    def is_dropped(cls, path: str) -> bool:
        """Whether the worker whose file it is has died, as far as the file tells."""
        try:
            with io.FileIO(path, opener=os.open) as file:
                return _try_to_lock(file)
        except (OSError, DurableError):
            return False

    @classmethod
    def is_held(cls, path: str) -> bool:
        """Whether the worker whose file it is lives, as far as there is one that tells."""
        return os.path.exists(path) and not cls.is_dropped(path)

    def take_from_dead(self) -> bool:
        """Take the lock of a worker that has died; False if it lives, or as far as the file does not tell."""
        # One's own could be locked, and where this one can't, its lease tells.
        with contextlib.suppress(OSError, DurableError):
            self._files.append(io.FileIO(self._path, opener=os.open))
            if _try_to_lock(self._files[-1]):
                return True
        self.close()
        return False

    def is_in_place(self) -> bool:
        """Whether the file is where others look for it, as far as this process can see.

        What was removed, some FUSE file systems know no more.
        """
        with contextlib.suppress(IndexError, ValueError):  # not open yet, or no more
            return _file_id(self._path) == _file_id(self._files[-1].fileno()) is not None
        return False

    def restore(self, database: str) -> None:
        """Make the file anew if somebody has removed or replaced it, so that others do not take its worker for dead.

        One that was moved is held on to: it may be this process that no longer sees it, after a chroot.
        """
        if self.is_in_place():
            return
        self.create(database)
        for former in self._files[:-1]:
            with contextlib.suppress(OSError, ValueError):  # closed before
                if not os.fstat(former.fileno()).st_nlink:
                    self._files.remove(former)
                    former.close()

    def remove(self) -> None:
        """Remove the file and drop the lock. Windows removes no open file, hence the second try."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def close(self) -> None:
        """Drop the lock; may be done twice, also by two threads."""
        for file in self._files:
            file.close()

    def __del__(self) -> None:
        self.close()  # a reaping that storage refused drops the lock for the next try


def _living(path: str, workers: Iterable[Worker]) -> list[Worker]:
    """Leave out those of a file's workers that have died and wait for an engine to notice."""
    return [one for one in workers if not _LockFile.is_dropped(_LockFile.path_of(path, one.id))]


def _has_threads_that_poll() -> bool:
    """Whether threads, and `select.poll`, are the system's.

    Where a library has put coroutines in place of threads, one that reads stops all; where it has only put a `poll` of
    its own there, that needs the library's loop.
    """
    import select  # only a running engine pays for it

    poll = getattr(select, "poll", None)
    return all(isinstance(one, types.BuiltinFunctionType) for one in (_thread.start_new_thread, poll))


class _LogWatch:
    """Hears of writes to the write-ahead log from Linux's inotify, so that an idle engine need not look for them.

    Armed, it calls once, in a thread of its own, and has to be armed again: while there is work, and so writes, nobody
    pays for it. Unlike an open file it does not touch the locks that SQLite holds on the log.
    """

    _IN_MODIFY, _IN_ONESHOT = 0x2, 0x8000_0000  # of sys/inotify.h

    def __init__(self, path: str, call: Callable[[], object]) -> None:
        import ctypes  # only a running engine pays for it
        import select

        self._path = os.fsencode(path)
        self._call = call
        self._is_closing = False
        self._thread: threading.Thread | None = None
        self._events = select.poll()
        libc = ctypes.CDLL(None, use_errno=True)
        self._add_watch, init = libc.inotify_add_watch, libc.inotify_init1
        self._end = os.eventfd(0)  # closing a descriptor does not wake who waits for it
        self._descriptor = init(os.O_CLOEXEC | os.O_NONBLOCK)

    @classmethod
    def open(cls, path: str, call: Callable[[], object]) -> _LogWatch | None:
        """Return an armed watch, or None where there is no such thing."""
        if sys.platform != "linux" or not _has_threads_that_poll():
            return None
        try:
            watch = cls(path, call)
        except (ImportError, OSError, AttributeError) as error:  # no ctypes, or a libc without inotify
            _log.debug("no inotify: %s", error)
            return None
        if watch._descriptor >= 0 and watch.arm():
            return watch
        watch.close()
        return None

    def start(self) -> bool:
        """Serve from now on, if the watch has heard of the write that was made since it was opened."""
        import select

        self._events.register(self._descriptor, select.POLLIN)
        if not self._events.poll(0):
            return False
        os.read(self._descriptor, 4096)
        self._events.register(self._end, select.POLLIN)
        self._thread = threading.Thread(target=self._serve, name="durable-watch", daemon=True)
        try:
            self._thread.start()  # an interrupt in it may leave a thread that runs: `close` has to know of it
        except RuntimeError as error:  # the system has no more
            _log.debug("no inotify: %s", error)
            return False
        return True

    @property
    def is_alive(self) -> bool:
        """Whether its thread is there to hear."""
        return self._thread is not None and self._thread.is_alive()

    def arm(self) -> bool:
        flags = self._IN_MODIFY | self._IN_ONESHOT
        return bool(self._add_watch(self._descriptor, self._path, flags) >= 0)

    def close(self) -> None:
        """End the thread, and close what is open, also where that was interrupted."""
        self._is_closing = True  # first: a thread that has no `ident` yet finds it
        thread = self._thread
        if thread is not None and thread.ident is not None:
            if self._end >= 0:
                os.eventfd_write(self._end, 1)
            thread.join(1)
            if thread.is_alive():
                return
        if self._end >= 0:
            descriptor, self._end = self._end, -1
            os.close(descriptor)
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _serve(self) -> None:
        while not self._is_closing and self._events.poll() and not self._is_closing:
            os.read(self._descriptor, 4096)
            self._call()


# ==================================================================================================
# Store
# ==================================================================================================

# `correlation_guard` makes duplicates uncommittable and is a signal's address look-up. Every index serves one query
# and is partial, so that finished rows, the bulk of an old file, stand in none that a beat reads. Conditions are
# spelled with OR: for IN, SQLite builds its list anew for each row written, which made an update a third slower.
_SCHEMA = """
CREATE TABLE durable_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE durable_instances (
    id INTEGER PRIMARY KEY AUTOINCREMENT, fsm TEXT NOT NULL, version INTEGER NOT NULL, step TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'runnable' CHECK (
        status = 'runnable' OR status = 'executing' OR status = 'done' OR status = 'failed'
        OR status = 'awaiting_signal' OR status = 'awaiting_children'),
    state TEXT NOT NULL, result TEXT, last_error TEXT, traceback TEXT,
    attempt INTEGER NOT NULL DEFAULT 0, max_attempts INTEGER,
    crashes INTEGER NOT NULL DEFAULT 0, max_crashes INTEGER NOT NULL,
    queue TEXT NOT NULL, priority INTEGER NOT NULL, eligible_at INTEGER NOT NULL,
    worker TEXT, claim INTEGER NOT NULL DEFAULT 0, cancel_reason TEXT,
    concurrency_key TEXT, rate_limit TEXT, weight INTEGER NOT NULL, parked_on TEXT,
    awaits TEXT, await_deadline INTEGER, joining INTEGER NOT NULL DEFAULT 0, parent_id INTEGER,
    correlation_key TEXT, correlation_scope INTEGER NOT NULL,
    correlation_guard TEXT AS (
        CASE WHEN correlation_scope & CASE status WHEN 'done' THEN 2 WHEN 'failed' THEN 4 ELSE 1 END
        THEN correlation_key END),
    inserted_at INTEGER NOT NULL, updated_at INTEGER NOT NULL,
    CHECK ((status = 'executing') = (worker IS NOT NULL)),
    CHECK (parked_on IS NULL OR status = 'runnable'),
    CHECK (await_deadline IS NULL OR status = 'awaiting_signal'),
    CHECK (cancel_reason IS NULL OR status = 'executing')
) STRICT;
CREATE INDEX durable_pick ON durable_instances (queue, priority, eligible_at, id, fsm, version)
    WHERE status = 'runnable' AND parked_on IS NULL;
CREATE INDEX durable_parked ON durable_instances (parked_on, queue, priority, eligible_at, id)
    WHERE parked_on IS NOT NULL;
CREATE INDEX durable_executing ON durable_instances (worker, queue) WHERE status = 'executing';
CREATE INDEX durable_held ON durable_instances (concurrency_key)
    WHERE status = 'executing' AND concurrency_key IS NOT NULL;
CREATE INDEX durable_deadlines ON durable_instances (await_deadline) WHERE await_deadline IS NOT NULL;
CREATE INDEX durable_waiting ON durable_instances (status, queue)
    WHERE status = 'awaiting_signal' OR status = 'awaiting_children';
CREATE INDEX durable_children ON durable_instances (parent_id, status) WHERE parent_id IS NOT NULL;
CREATE UNIQUE INDEX durable_occupants ON durable_instances (correlation_guard) WHERE correlation_guard IS NOT NULL;
CREATE INDEX durable_keys ON durable_instances (correlation_key) WHERE correlation_key IS NOT NULL;
CREATE INDEX durable_finished ON durable_instances (updated_at, queue, status)
    WHERE status = 'done' OR status = 'failed';
CREATE INDEX durable_failed ON durable_instances (id) WHERE status = 'failed';
CREATE TABLE durable_signals (
    id INTEGER PRIMARY KEY AUTOINCREMENT, target INTEGER NOT NULL, name TEXT NOT NULL, payload TEXT, dedup_key TEXT,
    consumed INTEGER NOT NULL DEFAULT 0, sent_at INTEGER NOT NULL
) STRICT;
CREATE INDEX durable_inbox ON durable_signals (target);
CREATE UNIQUE INDEX durable_dedup ON durable_signals (target, dedup_key) WHERE dedup_key IS NOT NULL;
CREATE TABLE durable_limits (
    name TEXT PRIMARY KEY, allowed INTEGER NOT NULL, per_ms INTEGER NOT NULL, burst INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE durable_buckets (
    key TEXT PRIMARY KEY, level INTEGER NOT NULL, refilled_at INTEGER NOT NULL, full_at INTEGER NOT NULL,
    ready_at INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX durable_ready ON durable_buckets (ready_at) WHERE ready_at IS NOT NULL;
CREATE INDEX durable_full ON durable_buckets (full_at);
CREATE TABLE durable_workers (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, queues TEXT NOT NULL,
    started_at INTEGER NOT NULL, heartbeat_at INTEGER NOT NULL, lease_expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE durable_paused (queue TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
"""
_SECOND = """
-- A failed row that waited for a signal when it was cancelled: what `retry` makes of it again, with which deadline.
ALTER TABLE durable_instances ADD COLUMN failed_from TEXT
    CHECK (failed_from IS NULL OR (failed_from = 'awaiting_signal' AND status = 'failed'));
ALTER TABLE durable_instances ADD COLUMN kept_deadline INTEGER
    CHECK (kept_deadline IS NULL OR failed_from IS NOT NULL);
ALTER TABLE durable_instances ADD COLUMN schedule TEXT;
ALTER TABLE durable_instances ADD COLUMN scheduled_at INTEGER;
ALTER TABLE durable_instances ADD COLUMN retention INTEGER;
ALTER TABLE durable_instances ADD COLUMN progress TEXT;
ALTER TABLE durable_instances ADD COLUMN has_calls INTEGER NOT NULL DEFAULT 0;
CREATE INDEX durable_scheduled ON durable_instances (schedule) WHERE schedule IS NOT NULL;
CREATE INDEX durable_at_buckets ON durable_instances (rate_limit, queue, priority, eligible_at, id)
    WHERE status = 'runnable' AND parked_on IS NULL AND rate_limit IS NOT NULL;
DROP INDEX durable_finished;
CREATE INDEX durable_finished ON durable_instances (retention, updated_at, queue, status)
    WHERE status = 'done' OR status = 'failed';
-- A redelivery is one under the same name.
DROP INDEX durable_dedup;
CREATE UNIQUE INDEX durable_dedup ON durable_signals (target, name, dedup_key) WHERE dedup_key IS NOT NULL;
DROP INDEX durable_inbox;
CREATE INDEX durable_inbox ON durable_signals (target, consumed);
CREATE TABLE durable_schedules (
    name TEXT PRIMARY KEY, fsm TEXT NOT NULL, "when" TEXT NOT NULL, template TEXT NOT NULL,
    catch_up TEXT NOT NULL CHECK (catch_up IN ('last', 'none', 'all')),
    window INTEGER NOT NULL, overlap INTEGER NOT NULL, jitter INTEGER NOT NULL,
    is_declared INTEGER NOT NULL, is_from_code INTEGER NOT NULL, written_at INTEGER NOT NULL,
    is_paused INTEGER NOT NULL, next_at INTEGER, fires_at INTEGER,
    last_at INTEGER, last_id INTEGER, missed INTEGER NOT NULL, fired_until INTEGER,
    CHECK (is_paused = (next_at IS NULL) AND is_paused = (fires_at IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX durable_fires ON durable_schedules (fires_at) WHERE fires_at IS NOT NULL;
CREATE TABLE durable_calls (
    instance INTEGER NOT NULL, name TEXT NOT NULL, value TEXT, is_awaited INTEGER NOT NULL, PRIMARY KEY (instance, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE durable_transitions (
    instance INTEGER NOT NULL, seq INTEGER NOT NULL, version INTEGER NOT NULL, step TEXT NOT NULL,
    attempt INTEGER NOT NULL, kind TEXT NOT NULL, started_at INTEGER NOT NULL, duration REAL NOT NULL,
    worker TEXT, error TEXT, traceback TEXT, state TEXT NOT NULL, signals TEXT, "to" TEXT, awaits TEXT,
    joining INTEGER NOT NULL, first_child INTEGER,
    PRIMARY KEY (instance, seq)
) STRICT, WITHOUT ROWID;
INSERT INTO durable_meta (key, value) VALUES ('file_id', lower(hex(randomblob(16))));
"""


def _view(table: str, columns: str, instants: str) -> str:
    """Make a view of a table anew, which shows instants as ISO text."""
    shown = [f"strftime('%Y-%m-%dT%H:%M:%fZ', {at} / 1000.0, 'unixepoch') AS {at}" for at in instants.split()]
    return f"""
DROP VIEW IF EXISTS durable_view_{table};
CREATE VIEW durable_view_{table} AS SELECT {columns}, {", ".join(shown)} FROM durable_{table};
"""


_VIEWS = (
    _view(
        "instances",
        "id, fsm, version, step, status, queue, priority, attempt, max_attempts, crashes, correlation_key, parent_id,"
        " parked_on, awaits, state, result, last_error, concurrency_key, rate_limit, weight, worker, schedule",
        "scheduled_at eligible_at await_deadline inserted_at updated_at",
    )
    + _view("signals", "id, target, name, payload, dedup_key, consumed", "sent_at")
    + _view("workers", "id, name, host, pid, queues", "started_at heartbeat_at lease_expires_at")
    + _view(
        "schedules",
        'name, fsm, "when", template, catch_up, window, overlap, jitter, is_declared, is_paused, last_id, missed',
        "next_at fires_at last_at",
    )
)
_MIGRATIONS: tuple[str, ...] = (_SCHEMA, _SECOND + _VIEWS)
"""The script at position n brings a file from version n to n + 1. One that was released changes in white space only."""
_SCHEMA_VERSION = len(_MIGRATIONS)

_DAMAGE_ERRORS = (apsw.CorruptError, apsw.NotADBError, apsw.FormatError)
_STORE_FAILURES = (
    *_DAMAGE_ERRORS,
    *(apsw.FullError, apsw.IOError, apsw.BusyError, apsw.LockedError, apsw.ProtocolError, apsw.CantOpenError),
    *(apsw.ReadOnlyError, apsw.PermissionsError, apsw.NoMemError, apsw.InterruptError, _LostFileError),
)
"""What is no fault of who asked: storage, or what somebody has done to the file."""
_LOCK_TIMEOUT_S = 10.0
"""How long a transaction waits for another process's write lock."""
_LONG_WAIT_S = 1.0
"""After how long the log is told."""
_LONGEST_PATH = 504
"""What SQLite allows on POSIX, in bytes, with room for what it appends."""


def _reading_error(path: str) -> apsw.Error | None:
    """Return what the system says to a look at a file's head: what can't be read, SQLite calls damage."""
    try:
        with contextlib.closing(apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            connection.read("main", 0, 0, 100)
    except apsw.Error as error:
        return error
    return None


def _opening_trouble(path: str) -> str:
    """Say why a file could not be opened, as far as one can see, for the start of a message."""
    folder = os.path.dirname(path)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        return f"{path} is too long: SQLite takes paths of at most {_LONGEST_PATH} bytes"
    if not os.path.exists(folder):
        return f"{path}: its folder {folder} is missing"
    return f"{path} is a folder" if os.path.isdir(path) else path


_READ_ONLY = "{path} can only be read: durable needs to write"


def _translated(error: apsw.Error, path: str) -> DurableError:
    """Say in the module's own errors what the driver said."""
    trouble = _reading_error(path) if isinstance(error, _DAMAGE_ERRORS) else None
    if trouble is not None:
        translated = DurableError(f"{path} can't be read: {_error_text(trouble)}")
    elif isinstance(error, _DAMAGE_ERRORS):
        translated = SchemaError(f"{path} is damaged or no database: {error}")
    elif isinstance(error, apsw.BusyError):
        held = f"another process held the write lock for over {_LOCK_TIMEOUT_S:g} s"
        translated = DurableError(f"{path}: {held}: {error}")
    elif isinstance(error, apsw.ReadOnlyError):
        where = ", in its folder, too" if getattr(error, "extendedresult", 0) == apsw.SQLITE_READONLY_DIRECTORY else ""
        translated = DurableError(_READ_ONLY.format(path=path) + where)
    else:
        named = _opening_trouble(path) if isinstance(error, apsw.CantOpenError) else path
        translated = DurableError(f"{named}: {_error_text(error)}")
    translated.__cause__ = error
    return translated


@contextlib.contextmanager
def _driver_errors(path: str) -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        raise _translated(error, path) from error


class _Patience:
    """Busy handler: tries again with sleeps from 50 us to 2 ms, for `_LOCK_TIMEOUT_S` in all.

    SQLite's own handler starts at whole milliseconds, which is longer than most transactions here last.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._deadline = self._tells_at = 0.0
        self.tell: Callable[[str], None] = _log.warning
        """Hears of a long wait, once, while it lasts: the text is a line for the log."""

    def __call__(self, calls: int) -> bool:
        now = _Ticks.monotonic()
        if calls == 0:
            self._deadline, self._tells_at = now + _LOCK_TIMEOUT_S, now + _LONG_WAIT_S
        if now >= self._tells_at:
            self._tells_at = math.inf
            self.tell(f"{self._path}: another connection has had the lock for {_LONG_WAIT_S:g} s: it is waited for")
        time.sleep(min(0.002, 0.00005 * 2 ** min(calls, 6)))
        return now < self._deadline


def _connect(
    path: str, flags: int = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE, patience: _Patience | None = None
) -> apsw.Connection:
    # apsw puts a statement back after each use, of `executemany` after each row, and the oldest goes for it: with room
    # for 128 a beat of a hundred rows threw out all the others, which cost 4 us a job. And it looks through all the
    # room for each use: for 1,024 that cost 1 us a job.
    connection = apsw.Connection(path, flags=flags, statementcachesize=256)
    connection.set_busy_handler(patience or _Patience(path))
    # Without it SQLite prepares a statement anew when bound values change that could have swayed its plan: 62 us in
    # place of 2 for the candidates of a claim.
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    return connection


_LOG_PAGES = 1000
"""Size of the write-ahead log at which it is copied into the database, SQLite's own default."""


def _configure(connection: apsw.Connection, synchronous: str) -> apsw.Connection:
    connection.execute(f"PRAGMA synchronous = {synchronous}; PRAGMA foreign_keys = ON")
    # To this a longer log is cut, once it has been copied and nobody reads in it any more. Usually it is a tenth over
    # its pages, so that it is cut only after somebody has held it up.
    connection.pragma("journal_size_limit", 2 * _LOG_PAGES * connection.pragma("page_size"))
    if synchronous in ("full", "extra"):  # on macOS only these reach the platter; elsewhere they change nothing
        connection.execute("PRAGMA fullfsync = ON; PRAGMA checkpoint_fullfsync = ON")
    return connection


def _database_path(database: str | os.PathLike[str]) -> str:
    path: object = os.fspath(database) if isinstance(cast(object, database), str | os.PathLike) else None
    if not isinstance(path, str) or path in ("", ":memory:"):
        raise ValueError(f"database must be the path of a file, not {_brief(database)}")
    try:
        path = os.path.realpath(path)
        path.encode()
    except ValueError as error:  # of both
        raise ValueError(f"database must be a path without null bytes that UTF-8 can write, not {path!r}") from error
    except OSError as error:
        raise DurableError(f"{path}: the current folder is gone ({error}): give an absolute path") from error
    return path


def _schema_of(connection: apsw.Connection) -> dict[str, str]:
    """Read the definitions of durable's tables and indexes."""
    rows = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type IN ('table', 'index') AND name GLOB 'durable_*'"
    )
    return dict(cast(Iterable[tuple[str, str]], rows))


@functools.cache
def _expected_schema(version: int) -> dict[str, str]:
    with contextlib.closing(apsw.Connection(":memory:")) as blank:
        for script in _MIGRATIONS[:version]:
            blank.execute(script)
        return _schema_of(blank)


def _clauses(sql: str) -> list[str]:
    """Split a definition into clauses, for comparison: without comments, quotes of names, white space and case.

    The first is what stands before a table's columns, the last what stands after them.
    """
    import re  # only a schema that somebody has edited pays for it

    words = re.findall(r"""'(?:[^']|'')*'|"[^"]*"|\[[^]]*]|`[^`]*`|--[^\n]*|/\*.*?\*/|\w+|[^\w\s]""", sql, re.DOTALL)
    clauses, depth = [""], 0
    for word in (one if one[0] == "'" else one.strip('"[]`').lower() for one in words if one[:2] not in ("--", "/*")):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if (word in ("(", ",") and depth == 1) or (word == ")" and depth == 0):
            clauses.append("")
        elif word != "asc":
            clauses[-1] += f" {word}"
    return [clause.strip() for clause in clauses]


def _table_parts(sql: str) -> dict[str, str]:
    """Describe what statements and the soundness of rows rely on: a table's columns, its constraints, its kind."""
    _, *clauses, kind = _clauses(sql)
    parts = {"the table's kind": " ".join(["plain", *sorted(kind.replace(",", "").split())])}
    for clause in clauses:
        name, _, rest = clause.partition(" ")
        if name == "primary" and rest.startswith("key ( ") and "," not in rest:  # one column's, said apart from it
            column, *more = rest.split()[2:-1]
            parts[f"column {column}"] = " ".join([parts[f"column {column}"], "primary key", *more])
        else:
            is_column = name not in ("check", "constraint", "foreign", "primary", "unique")
            parts[f"column {name}" if is_column else clause] = rest if is_column else ""
    return parts


def _table_problems(table: str, found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[str]:
    """Say what of a table is missing, or not as durable made it. A column that others have added must take no value."""
    for name, kind in expected.items():
        if name not in found:
            yield f"table {table}: {name}{kind and f' ({kind.upper()})'} is missing"
        elif found[name] != kind:
            yield f"table {table}: {name} is {found[name].upper()}, not {kind.upper()}"
    for name in found.keys() - expected.keys():
        kind = found[name].partition(" check ")[0]
        if "not null" in kind and not {"default", "as"} & set(kind.split()):
            yield f"table {table}: {name} was added as NOT NULL without a default, so that no row can be written"


def _schema_problems(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[str]:
    """Say what of durable's tables and indexes is missing, or not as it was made; what others have added is theirs."""
    for name, made in expected.items():
        sql, is_table = " ".join(made.split()), made.startswith("CREATE TABLE")
        if name not in found:
            kind, how = ("table", ", without what was in it,") if is_table else ("index", "")
            yield f"{kind} {name} is missing. Make it{how} by: {sql}"
        elif " ".join(found[name].split()) != sql:
            if is_table:
                yield from _table_problems(name, _table_parts(found[name]), _table_parts(made))
            elif _clauses(found[name]) != _clauses(made):
                yield f"index {name} is not as it was made. Drop it, and make it by: {sql}"


def _roll_back(connection: apsw.Connection) -> None:
    if connection.in_transaction:  # SQLite itself has rolled back on some errors
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def _one_view(connection: apsw.Connection) -> Iterator[None]:
    """See a file as it is at one instant, whatever others commit meanwhile."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        _roll_back(connection)


def _read_version(rows: Sequence[Any]) -> int:
    """Return the schema version that was found in `durable_meta`, else raise a ValueError that says what is there."""
    if not rows:
        raise ValueError("durable_meta has no schema_version")
    try:
        return int(rows[0][0])
    except ValueError:
        raise ValueError(f"schema_version in durable_meta is {rows[0][0]!r}") from None


def _file_version(connection: apsw.Connection, path: str) -> int:
    """Return the file's schema version, 0 for one without durable's tables; refuse what is damaged or newer."""
    try:
        with _one_view(connection):  # another process may be migrating it
            schema = _schema_of(connection)
            if not schema:
                return 0
            rows = list(connection.execute("SELECT value FROM durable_meta WHERE key = 'schema_version'"))
        version = _read_version(rows)
    except (apsw.SQLError, ValueError) as error:
        raise SchemaError(f"{path} is damaged, or no database of durable's: {error}") from error
    if version > _SCHEMA_VERSION:
        raise SchemaError(f"{path} has schema version {version}, this durable knows up to {_SCHEMA_VERSION}: update it")
    if problems := list(_schema_problems(schema, _expected_schema(version))):
        advice = "Bring it back as it was, or restore a copy of the file"
        raise SchemaError(f"{path} is damaged: {'; '.join(problems[:20])}. {advice}")
    return version


def _enter_wal_mode(connection: apsw.Connection, path: str, patience: _Patience) -> None:
    """Switch the file to WAL; SQLite does not ask the busy handler when another process is doing the same."""
    for calls in itertools.count():
        try:
            mode = connection.pragma("journal_mode", "wal")
        except apsw.BusyError:
            if not patience(calls):
                raise
        else:
            if mode != "wal":
                raise DurableError(f"{path}: this file system can't do WAL mode, which durable needs")
            return


def _refuse_under_engines(connection: apsw.Connection, path: str, version: int) -> None:
    """Refuse to migrate a file on which engines run: those of the version that it has would go on writing it."""
    workers = connection.execute("SELECT id, name, pid, host FROM durable_workers")
    running = [
        f"{name} (pid {pid} on {host})"
        for worker, name, pid, host in cast(Iterable[tuple[str, str, int, str]], workers)
        if _LockFile.is_held(_LockFile.path_of(path, worker))
    ]
    if running:
        what = f"{path} has schema version {version}, and engines that know no later one run on it"
        raise DurableError(f"{what}: {', '.join(running)}. Stop them: then opening it migrates it to {_SCHEMA_VERSION}")


def _migrate(connection: apsw.Connection, path: str) -> None:
    if _file_version(connection, path) == _SCHEMA_VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:  # looked at again: another process may have been first
        version = _file_version(connection, path)
        if 0 < version < _SCHEMA_VERSION:
            _refuse_under_engines(connection, path, version)
        for script in _MIGRATIONS[version:]:
            connection.execute(script)
        connection.execute(
            "INSERT OR REPLACE INTO durable_meta (key, value) VALUES ('schema_version', ?)", (str(_SCHEMA_VERSION),)
        )
        _file_version(connection, path)  # what was damaged before is no whole file of this version now
        connection.execute("COMMIT")
    except BaseException as error:
        _roll_back(connection)
        if isinstance(error, apsw.SQLError):
            raise SchemaError(f"{path} is damaged: it could not be migrated: {error}") from error
        raise


def _open_database(path: str, synchronous: str, patience: _Patience) -> apsw.Connection:
    """Open a file for writing: look at it, and only then create or migrate; a refused file stays as it is."""
    with _driver_errors(path):
        connection = _connect(path, patience=patience)
        try:
            # Closing the last connection copies the WAL into the file: not into one that may be refused.
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            _file_version(connection, path)
            if connection.readonly("main"):
                raise DurableError(_READ_ONLY.format(path=path))
            if connection.pragma("page_count") == 0:  # else it is too late, or the application's to say
                connection.pragma("auto_vacuum", "incremental")
            _configure(connection, synchronous)
            _enter_wal_mode(connection, path, patience)
            _migrate(connection, path)
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        except BaseException:
            connection.close()
            raise
    return connection


_Method = typing.TypeVar("_Method", bound=Callable[..., Any])
_only = operator.itemgetter(0)


def _stands_for(sql: str, run: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Put into a method's place what runs its statement; its parameters are what that binds, in their order."""

    def stand(signature: _Method) -> _Method:
        run.sql = sql  # type: ignore[attr-defined] # for who asks how SQLite runs it
        return cast(_Method, functools.update_wrapper(run, signature))

    return stand


def _reads(
    sql: str, make: Callable[[Any], Any] = tuple, into: Callable[[Iterable[Any]], Iterable[Any]] = list
) -> Callable[[_Method], _Method]:
    """Have a method return what the first function makes of each row, in a list or another collection.

    With `iter` it yields them as they are read: where most of them are never looked at.
    """
    return _stands_for(sql, lambda self, *bindings: into(map(make, self._select(sql, bindings))))


def _reads_one(sql: str, make: Callable[[Any], Any] = tuple) -> Callable[[_Method], _Method]:
    """Have a method return what that function makes of the first row, or None."""

    def run(self: _Statements, *bindings: Any) -> Any:
        for row in self._select(sql, bindings):
            return make(row)
        return None

    return _stands_for(sql, run)


def _reads_value(sql: str) -> Callable[[_Method], _Method]:
    """Have a method return the only column of the first row, or None."""
    return _reads_one(sql, _only)


def _asks(sql: str) -> Callable[[_Method], _Method]:
    """Have a method say whether there is a row."""
    return _stands_for(sql, lambda self, *bindings: next(iter(self._select(sql, bindings)), None) is not None)


def _writes(sql: str, answer: Callable[[int], Any] = bool) -> Callable[[_Method], _Method]:
    """Have a method say whether it changed a row, or (`int`) how many."""

    def run(self: _Table, *bindings: Any) -> Any:
        self.db.execute(sql, bindings)
        return answer(self.db.changes())

    return _stands_for(sql, run)


def _writes_all(sql: str) -> Callable[[_Method], _Method]:
    """Have a method run a statement for each of the rows that it is given."""
    return _stands_for(sql, lambda self, rows: self.db.executemany(sql, rows))


class _Statements:
    """Methods that run a statement each, which stands above them as static text."""

    _select: Callable[[str, Sequence[Any]], Iterable[Any]]
    """Runs a statement and returns its rows."""


_ROW = ", ".join(f"i.{name}" for name in _Row._fields).replace(
    "i.has_inbox", "EXISTS (SELECT 1 FROM durable_signals WHERE target = i.id AND consumed = 0)"
)
_ROW_TO_CLAIM = _ROW.replace("i.claim,", "i.claim + 1,")
"""The row as it will be under the claim that is about to be made."""
_INSTANCE = _columns(Instance)
_SCHEDULE_ROW = f"SELECT {_columns(_ScheduleRow)} FROM durable_schedules"
_LIVE_STATUSES = "status IN ('runnable', 'executing', 'awaiting_signal', 'awaiting_children')"

# What a clock has written that was ahead of now (?1) by more than is waited for, at most so many rows (?2).
# As `_brought_back` rules for each; those that were due when they were written become due in the order that they had.
_WAITED_FOR = f"?1 + {_SET_BACK_MS}"
_AHEAD = f"eligible_at > ?1 AND updated_at > {_WAITED_FOR} AND eligible_at < 2 * updated_at - ?1"
_AHEAD_RUNNABLE = f"""
    SELECT id, eligible_at, max(0, eligible_at - updated_at) AS delay FROM durable_instances INDEXED BY durable_pick
    WHERE status = 'runnable' AND parked_on IS NULL AND {_AHEAD}
    UNION ALL
    SELECT id, eligible_at, max(0, eligible_at - updated_at) AS delay FROM durable_instances INDEXED BY durable_parked
    WHERE parked_on IS NOT NULL AND {_AHEAD}"""
_AHEAD_AWAITING = f"""
    SELECT id FROM durable_instances INDEXED BY durable_deadlines
    WHERE await_deadline > ?1 AND updated_at > {_WAITED_FOR} AND await_deadline < 2 * updated_at - ?1"""
_AHEAD_EXECUTING = """
    SELECT id FROM durable_instances INDEXED BY durable_executing
    WHERE status = 'executing' AND eligible_at > ?1 AND eligible_at <= updated_at"""
_AHEAD_ENDED = f"""
    SELECT id FROM durable_instances
    WHERE (status = 'done' OR status = 'failed') AND retention IS ?3 AND updated_at > {_WAITED_FOR}"""


class _SharedReads(_Statements):
    """What both a beat and who only looks ask for."""

    @_reads_value("SELECT value FROM durable_meta WHERE key = 'schema_version'")
    def schema_version(self) -> str | None: ...

    # The guard column's index decides on duplicates, so no look-up goes before an insert.
    @_reads_one("SELECT id, status FROM durable_instances WHERE correlation_guard = ?")
    def occupant(self, key: str) -> tuple[int, str] | None:
        """Return (id, status) of the instance that occupies a key."""

    @_reads_one("SELECT id, status FROM durable_instances WHERE correlation_key = ? ORDER BY id DESC LIMIT 1")
    def last_carrier(self, key: str) -> tuple[int, str] | None:
        """Return (id, status) of the newest instance that carries a key."""

    @_reads_value("SELECT status FROM durable_instances WHERE id = ?")
    def status(self, instance: int) -> str | None: ...
    @_reads_one(f"SELECT {_columns(_Policy)} FROM durable_limits WHERE name = ?", _Policy._make)
    def policy(self, name: str) -> _Policy | None:
        """Return a rate limit of the file."""

    @_reads(
        f"SELECT {_columns(Signal)} FROM durable_signals WHERE target = ? AND consumed = 0 ORDER BY id",
        _maker_of(Signal),
        tuple,
    )
    def signals(self, target: int) -> tuple[Signal, ...]:
        """Return an instance's inbox."""

    @_reads(f"SELECT {_columns(Worker)} FROM durable_workers ORDER BY started_at, id", _maker_of(Worker))
    def workers(self) -> list[Worker]: ...


_BULK = 16
"""So many rows are one statement, where one will do."""
_FEW = 3
"""Fewer rows are quicker written one by one than by a statement for `_BULK`."""


class _Table(_Statements):
    """Statements of a beat, on the write connection."""

    db: apsw.Connection

    def _write_in_bulk(self, one: str, many: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement for rows, `_BULK` at once where it goes.

        That opens the indexes once for all: 2 us a row in place of 3.5.
        """
        whole = len(rows) - len(rows) % _BULK
        for start in range(0, whole, _BULK):
            self.db.execute(many, tuple(itertools.chain.from_iterable(rows[start : start + _BULK])))
        self.db.executemany(one, rows[whole:])

    def _change_alike(self, sql: str, ids: list[int], before: Sequence[Any], after: Sequence[Any] = ()) -> bool:
        """Run a statement for the rows of these ids, `_BULK` at once likewise; False if it has missed one."""
        changed = 0
        for start in range(0, len(ids), _BULK):
            lot = ids[start : start + _BULK]
            self.db.execute(sql, (*before, *lot, *lot[-1:] * (_BULK - len(lot)), *after))
            changed += self.db.changes()
        return changed == len(ids)

    def _change_all(self, one: str, many: str, ids: list[int], before: Sequence[Any]) -> None:
        """Run a statement for the rows of these ids, one by one if they are few, without a look at what it changes."""
        if len(ids) < _FEW:
            self.db.executemany(one, [(*before, instance) for instance in ids])
        else:
            self._change_alike(many, ids, before)


def _for_many(sql: str) -> str:
    """Have a statement for one row change `_BULK` of them."""
    return sql.replace(" id = ?", f" id IN ({', '.join('?' * _BULK)})")


def _values(record: Any) -> str:
    return f"({', '.join('?' * len(record._fields))})"


_INSERT = f"INSERT INTO durable_instances ({_columns(_NewRow)}) VALUES {_values(_NewRow)}"
_INSERT_MANY = _INSERT + f", {_values(_NewRow)}" * (_BULK - 1)
_INSERT_UNIQUE = f"{_INSERT} ON CONFLICT (correlation_guard) WHERE correlation_guard IS NOT NULL DO NOTHING"


class _InstanceTable(_Table):
    """Instances, but for their claims and outcomes."""

    def insert(self, row: _NewRow) -> int | None:
        """Insert an instance; None if its correlation key is taken."""
        self.db.execute(_INSERT_UNIQUE, row)
        return self.db.last_insert_rowid() if self.db.changes() else None

    def insert_many(self, rows: Sequence[_NewRow]) -> range:
        """Insert instances without correlation keys; one writer and AUTOINCREMENT give them ids in a row."""
        self._write_in_bulk(_INSERT, _INSERT_MANY, rows)
        last = self.db.last_insert_rowid()
        return range(last - len(rows) + 1, last + 1)

    @_reads_one(
        f"SELECT {_ROW}, i.status FROM durable_instances i WHERE id = ?", lambda row: (_Row(*row[:-1]), row[-1])
    )
    def row(self, instance: int) -> tuple[_Row, str] | None:
        """Return a row with its status."""

    @_reads_one("SELECT correlation_key, correlation_scope FROM durable_instances WHERE id = ?")
    def carried_key(self, instance: int) -> tuple[str | None, int]: ...
    @_reads_value("SELECT retention FROM durable_instances WHERE id = ?")
    def retention(self, instance: int) -> int | None: ...
    @_reads("SELECT id FROM durable_instances WHERE parent_id = ? ORDER BY id", _only)
    def children_ids(self, parent: int) -> list[int]: ...
    @_asks(f"SELECT 1 FROM durable_instances WHERE parent_id = ? AND {_LIVE_STATUSES} LIMIT 1")
    def has_live_child(self, parent: int) -> bool: ...
    @_writes("""
UPDATE durable_instances SET status = 'runnable', eligible_at = ?2, updated_at = ?2
WHERE id = ?1 AND status = 'awaiting_children'
""")
    def wake_parent(self, parent: int, now: int) -> bool: ...
    @_writes("UPDATE durable_instances SET parent_id = NULL WHERE parent_id = ? AND id >= ?")
    def detach(self, parent: int, first_child: int) -> bool: ...
    @_writes("""
UPDATE durable_instances SET
    status = 'failed', last_error = ?2, traceback = NULL, crashes = 0, parked_on = NULL, progress = NULL,
    failed_from = iif(status = 'awaiting_signal', status, NULL), kept_deadline = await_deadline, await_deadline = NULL,
    updated_at = ?3, claim = claim + 1
WHERE id = ?1 AND status IN ('runnable', 'awaiting_signal', 'awaiting_children')
""")
    def end(self, instance: int, reason: str, now: int) -> bool:
        """Fail an instance that does not execute."""

    @_writes("""
UPDATE durable_instances SET cancel_reason = coalesce(cancel_reason, ?2) WHERE id = ?1 AND status = 'executing'
""")
    def request_cancel(self, instance: int, reason: str) -> bool: ...
    @_writes(f"""
UPDATE durable_instances SET
    status = CASE
        WHEN failed_from IS NOT NULL THEN failed_from
        WHEN joining AND EXISTS (SELECT 1 FROM durable_instances WHERE parent_id = ?1 AND {_LIVE_STATUSES})
            THEN 'awaiting_children'
        ELSE 'runnable' END,
    await_deadline = kept_deadline, failed_from = NULL, kept_deadline = NULL,
    attempt = 0, crashes = 0, eligible_at = ?2, updated_at = ?2
WHERE id = ?1 AND status = 'failed'
""")
    def revive(self, instance: int, now: int) -> bool: ...

    # What stood is the history's; the row goes on under a claim number of its own, which a late outcome doesn't have.
    _REWIND = """
UPDATE durable_instances SET
    status = 'runnable', step = ?2, state = ?3, awaits = ?4, joining = ?5, eligible_at = ?6, updated_at = ?6,
    attempt = 0, crashes = 0, result = NULL, last_error = NULL, traceback = NULL, await_deadline = NULL,
    failed_from = NULL, kept_deadline = NULL, parked_on = NULL, claim = claim + 1, progress = NULL, has_calls = 0,
    version = ?7, max_attempts = ?8
WHERE id = ?1 AND status <> 'executing'
"""

    def rewind(self, entry: _Entry, max_attempts: int | None, now: int) -> None:
        past = (entry.instance, entry.step, entry.state, entry.awaits, entry.joining)
        self.db.execute(self._REWIND, (*past, now, entry.version, max_attempts))


def _settings(change: type[_Change], *left_out: str) -> str:
    """Set the columns of a change to the values that it binds."""
    return ", ".join(f"{name} = ?" for name in change._fields if name not in left_out)


# The guard: only the claim that produced an outcome may write it, and not if the instance was cancelled meanwhile.
_HELD_CLAIM = "id = ? AND status = 'executing' AND claim = ?"
_UNDER_CLAIM = f"WHERE {_HELD_CLAIM} AND cancel_reason IS ?"
# A failed row, ?1 being the status, keeps what it waited for: `retry` goes back to it.
_FINISH = f"""
UPDATE durable_instances SET {_settings(_End)}, updated_at = ?,
    awaits = iif(?1 = 'failed', awaits, NULL), joining = iif(?1 = 'failed', joining, 0),
    worker = NULL, cancel_reason = NULL, progress = NULL
{_UNDER_CLAIM}"""
_FINISH_MANY = _for_many(_FINISH)
_AGAIN = f"""
UPDATE durable_instances SET status = 'runnable', {_settings(_Again)}, updated_at = ?,
    worker = NULL, cancel_reason = NULL
{_UNDER_CLAIM}"""
_SET_CLEAN_SLATE = ", ".join(f"{name} = {'NULL' if value is None else value}" for name, value in _CLEAN_SLATE.items())
_PROGRESS = f"""
UPDATE durable_instances SET
    {_settings(_Advance)}, updated_at = ?, {_SET_CLEAN_SLATE}, worker = NULL, cancel_reason = NULL
{_UNDER_CLAIM}"""
# An inline step goes on under the next claim number, so that a late outcome of the step before it is stale. Its status
# is not written, not even as it is: that would have every index that depends on it looked at.
_ADVANCE = f"""
UPDATE durable_instances SET {_settings(_Advance, "status", "awaits", "await_deadline", "joining")}, updated_at = ?,
    {_SET_CLEAN_SLATE}, awaits = NULL, joining = 0, claim = claim + 1
{_UNDER_CLAIM}"""


def _settling(kind: type[_Change]) -> str:
    """Return the statement that writes a change of that kind."""
    return _FINISH if kind is _End else _PROGRESS if kind is _Advance else _AGAIN


class _OutcomeTable(_Table):
    """What steps have come to, and what is kept of them while they run: only under the claim that produced it."""

    def settle(self, row: _Row, change: _Change, now: int, cancel_reason: str | None = None) -> bool:
        """Write an outcome under the claim that produced it; False if that claim holds no more."""
        self.db.execute(_settling(type(change)), (*change, now, row.id, row.claim, cancel_reason))
        return bool(self.db.changes())

    def settle_many(self, commits: Sequence[_Commit], now: int) -> bool:
        """Write outcomes, each under its claim; False if one of these claims holds no more, or was cancelled.

        Rows that end alike, as jobs without a result do, are one statement.
        """
        rows: collections.defaultdict[type[_Change], list[tuple[Any, ...]]] = collections.defaultdict(list)
        alike: dict[tuple[_Change, int], list[int]] = {}
        for one in commits:
            row = one.claim.row
            if isinstance(one.change, _End):
                alike.setdefault((one.change, row.claim), []).append(row.id)
            else:
                rows[type(one.change)].append((*one.change, now, row.id, row.claim, None))
        for (change, claim), ids in alike.items():
            if len(ids) < _FEW:
                rows[_End] += [(*change, now, instance, claim, None) for instance in ids]
            elif not self._change_alike(_FINISH_MANY, ids, (*change, now), (claim, None)):
                return False
        return all(self._change_each(_settling(kind), lot) for kind, lot in rows.items())

    def advance_many(self, commits: Sequence[_Commit], now: int) -> bool:
        """Go on with the next steps under the same hold of their rows; False if one of these claims holds no more."""
        first, end = _Advance._fields.index("step"), _Advance._fields.index("awaits")
        rows = []
        for one in commits:
            row = one.claim.row
            rows.append((*one.change[first:end], now, row.id, row.claim, None))
        return self._change_each(_ADVANCE, rows)

    def _change_each(self, sql: str, rows: Sequence[Sequence[Any]]) -> bool:
        """Run a statement for each of the rows; False if it has changed nothing for one.

        Counted one by one, since the connection's total holds what the application's triggers change, too.
        """
        changes: list[int] = []

        def bindings() -> Iterator[Sequence[Any]]:
            for row in rows:
                yield row
                changes.append(self.db.changes())

        self.db.executemany(sql, bindings())
        return all(changes)

    _CANCEL_REASON = f"SELECT cancel_reason FROM durable_instances WHERE {_HELD_CLAIM} AND cancel_reason IS NOT NULL"

    def cancel_reason(self, row: _Row) -> str | None:
        """Why the row was cancelled, if it is still held by that claim."""
        return cast("str | None", self.db.execute(self._CANCEL_REASON, (row.id, row.claim)).get)

    _MIGRATE = f"""
UPDATE durable_instances SET version = ?, step = ?, state = ?, max_attempts = ? WHERE {_HELD_CLAIM}
"""

    def migrate(self, row: _Row) -> None:
        """Write the version that a row was brought to, with what goes with it, ahead of its outcome."""
        self.db.execute(self._MIGRATE, (row.version, row.step, row.state, row.max_attempts, row.id, row.claim))

    _NOTE_CALLS = f"UPDATE durable_instances SET has_calls = 1 WHERE {_HELD_CLAIM}"
    _KEEP_CALL = "INSERT OR REPLACE INTO durable_calls (instance, name, value, is_awaited) VALUES (?, ?, ?, ?)"

    def keep_call(self, row: _Row, call: _Kept) -> bool:
        """Keep what a call returned; False if the claim under which it was made holds no more."""
        self.db.execute(self._NOTE_CALLS, (row.id, row.claim))
        if not self.db.changes():
            return False
        self.db.execute(self._KEEP_CALL, (row.id, *call))
        return True

    @_writes("DELETE FROM durable_calls WHERE instance = ?")
    def drop_calls(self, instance: int) -> bool: ...
    @_writes_all(f"UPDATE durable_instances SET progress = ? WHERE {_HELD_CLAIM}")
    def show_progress(self, shown: Iterable[tuple[str, int, int]]) -> None:
        """Write (progress, id, claim) of steps that run."""

    _LAST_PROGRESS = "UPDATE durable_instances SET progress = ? WHERE id = ? AND claim = ? AND status = 'runnable'"

    def show_last_progress(self, row: _Row, progress: str) -> None:
        """Write how far a step had come that is to run again."""
        self.db.execute(self._LAST_PROGRESS, (progress, row.id, row.claim))


_CLAIM = """
UPDATE durable_instances SET status = 'executing', worker = ?, claim = claim + 1, updated_at = ?
WHERE id = ? AND status = 'runnable'
"""
_CLAIM_MANY = _for_many(_CLAIM)


class _ClaimTable(_Table):
    """Rows that can run now, and the claims on them."""

    # One seek a priority: a date in the future on an urgent priority must not hide live work on a less urgent one.
    @_reads_one("""
SELECT priority, eligible_at FROM durable_instances
WHERE queue = ? AND priority > ? AND status = 'runnable' AND parked_on IS NULL
    AND NOT EXISTS (SELECT 1 FROM durable_paused WHERE queue = durable_instances.queue)
ORDER BY priority, eligible_at LIMIT 1
""")
    def next_priority(self, queue: str, priority: int) -> tuple[int, int] | None:
        """Return the first priority after that one with work, and when its first row is due; None if paused."""

    @_reads(
        f"""
SELECT {_ROW_TO_CLAIM} FROM durable_instances i
WHERE queue = ? AND priority = ? AND eligible_at <= ? AND status = 'runnable' AND parked_on IS NULL
ORDER BY eligible_at, id
""",
        _Row._make,
        iter,
    )
    def candidates(self, queue: str, priority: int, horizon: int) -> Iterator[_Row]: ...

    # Used where rows of unknown classes stand in front: they are told apart within the index.
    @_reads(
        f"""
SELECT {_ROW_TO_CLAIM} FROM durable_instances i
WHERE queue = ? AND priority = ? AND eligible_at <= ? AND status = 'runnable' AND parked_on IS NULL
    AND EXISTS (SELECT 1 FROM json_each(?) WHERE value ->> 0 = fsm AND version BETWEEN value ->> 1 AND value ->> 2)
ORDER BY eligible_at, id
""",
        _Row._make,
        iter,
    )
    def known_candidates(self, queue: str, priority: int, horizon: int, known: str) -> Iterator[_Row]: ...
    @_reads_value("""
SELECT min(eligible_at) FROM durable_instances
WHERE queue = ? AND priority = ? AND eligible_at > ? AND status = 'runnable' AND parked_on IS NULL
""")
    def next_due(self, queue: str, priority: int, horizon: int) -> int | None: ...

    def claim_many(self, worker: str, claims: Sequence[_Claim], now: int) -> None:
        self._change_all(_CLAIM, _CLAIM_MANY, [claim.row.id for claim in claims], (worker, now))

    @_reads_value("""
SELECT min(queue) FROM durable_instances WHERE queue > ? AND status = 'runnable' AND parked_on IS NULL
""")
    def next_queue(self, queue: str) -> str | None: ...
    @_reads(f"SELECT {_ROW} FROM durable_instances i WHERE worker = ? AND status = 'executing' ORDER BY id", _Row._make)
    def claimed_by(self, worker: str) -> list[_Row]: ...

    # What was due when it was claimed is due now, whatever the clock says by now; a drain claims what is dated, too.
    _GIVE_BACK = f"""
UPDATE durable_instances SET
    status = 'runnable', worker = NULL, updated_at = ?1,
    eligible_at = iif(eligible_at <= updated_at, min(eligible_at, ?1), eligible_at)
WHERE {_HELD_CLAIM} AND cancel_reason IS NULL
"""

    def give_back(self, row: _Row, now: int) -> bool:
        self.db.execute(self._GIVE_BACK, (now, row.id, row.claim))
        return bool(self.db.changes())


_PARK = "UPDATE durable_instances SET parked_on = ? WHERE id = ? AND status = 'runnable' AND parked_on IS NULL"
_PARK_MANY = _for_many(_PARK)


class _LineTable(_Table):
    """The lines of concurrency keys and buckets: rows that are parked on them, in the order in which they go on."""

    @_reads_value("SELECT count(*) FROM durable_instances WHERE concurrency_key = ? AND status = 'executing'")
    def executing(self, key: str) -> int: ...
    @_reads(
        """
SELECT concurrency_key, count(*) FROM (
    SELECT concurrency_key FROM durable_instances WHERE status = 'executing' AND concurrency_key IS NOT NULL LIMIT ?)
GROUP BY concurrency_key
""",
        into=dict,
    )
    def executing_by_key(self, count: int) -> dict[str, int]:
        """Count the first so many executing rows that have a key, by key."""

    def park_many(self, parked: Iterable[tuple[str, int]]) -> None:
        """Park rows on something, (parked_on, id) each; those that come one after the other on the same together."""
        for parked_on, run in itertools.groupby(parked, _only):
            self._change_all(_PARK, _PARK_MANY, [instance for _, instance in run], (parked_on,))

    @_reads(
        f"""
SELECT {_columns(_Waiting)} FROM durable_instances
WHERE parked_on = ? AND queue = ? ORDER BY priority, eligible_at, id
""",
        _Waiting._make,
        iter,
    )
    def line(self, parked_on: str, queue: str) -> Iterator[_Waiting]: ...
    # Of many lines at once, as a statement for each would cost more than all else that a key does.
    @_reads(f"""
SELECT {", ".join(f"i.{name}" for name in _Waiting._fields)}, json_each.value,
    (SELECT max(queue) FROM durable_instances WHERE parked_on = json_each.value)
FROM json_each(?1) CROSS JOIN durable_instances i ON i.id = (
    SELECT id FROM durable_instances WHERE parked_on = json_each.value AND queue > ?2
    ORDER BY queue, priority, eligible_at, id LIMIT 1)
""")
    def next_heads(self, lines: str, after_queue: str) -> list[tuple[Any, ...]]:
        """Return the first row of each of these lines (JSON) in its next queue, the line, and its last queue."""

    def line_heads(self, parked_on: str) -> list[_Waiting]:
        """Return the first row parked on something in each queue that has some."""
        return self.heads_of([parked_on]).get(parked_on, [])

    def heads_of(self, lines: Collection[str]) -> dict[str, list[_Waiting]]:
        """Return, for each of these lines that has any, its first row in each queue, by a seek each."""
        heads: dict[str, list[_Waiting]] = {}
        found = self.next_heads(_encode(list(lines)), "") if lines else []
        while found:
            *row, line, last_queue = found.pop()
            head = _Waiting._make(row)
            heads.setdefault(line, []).append(head)
            if head.queue != last_queue:
                found += self.next_heads(_encode([line]), head.queue)
        return heads

    @_reads("""
SELECT priority, eligible_at, id, queue FROM durable_instances
WHERE parked_on = ? AND queue = ? ORDER BY priority, eligible_at, id LIMIT ?
""")
    def line_start(self, parked_on: str, queue: str, count: int) -> list[tuple[int, int, int, str]]:
        """Return (priority, eligible_at, id, queue) of the first rows parked on something in a queue."""

    def line_queues(self, parked_on: str) -> list[str]:
        """Return the queues in which rows are parked on something."""
        return [head.queue for head in self.line_heads(parked_on)]

    @_asks("SELECT 1 FROM durable_instances WHERE parked_on = ? LIMIT 1")
    def is_line(self, parked_on: str) -> bool: ...
    @_reads_value("SELECT min(parked_on) FROM durable_instances WHERE parked_on > ?")
    def next_line(self, parked_on: str) -> str | None: ...
    @_reads(
        """
WITH RECURSIVE line (parked_on) AS (
    SELECT min(parked_on) FROM durable_instances WHERE parked_on > ''
    UNION ALL
    SELECT (SELECT min(parked_on) FROM durable_instances WHERE parked_on > line.parked_on) FROM line
    WHERE parked_on IS NOT NULL
)
SELECT parked_on FROM line WHERE parked_on IS NOT NULL LIMIT ?
""",
        _only,
        set,
    )
    def lines(self, count: int) -> set[str]:
        """Return what rows are parked on, up to so many, by a seek each."""

    @_writes(
        """
UPDATE durable_instances SET parked_on = NULL WHERE id IN (
    SELECT id FROM durable_instances WHERE parked_on = ? AND queue = ?
    ORDER BY priority, eligible_at, id LIMIT ?)
""",
        int,
    )
    def unpark(self, parked_on: str, queue: str, count: int) -> int: ...
    @_writes("""
UPDATE durable_instances SET parked_on = NULL WHERE id IN (
    SELECT (SELECT id FROM durable_instances WHERE parked_on = json_each.value ->> 0 AND queue = json_each.value ->> 1
        ORDER BY priority, eligible_at, id LIMIT 1) FROM json_each(?))
""")
    def unpark_first(self, lines: str) -> bool:
        """Let the first row go of each (parked_on, queue) of these, as JSON."""

    @_writes("""
UPDATE durable_instances SET parked_on = NULL WHERE id IN (
    SELECT id FROM (
        SELECT id, rate_limit FROM durable_instances WHERE parked_on = ? AND queue = ?
        ORDER BY priority, eligible_at, id LIMIT 100)
    WHERE rate_limit IS NOT ? LIMIT 1)
""")
    def unpark_other(self, parked_on: str, queue: str, rate: str) -> bool:
        """Let the first of the next hundred rows go that waits for another bucket than that, or for none."""

    # One seek a priority, as for candidates. A bucket's unparked rows in queues that are claimed from need no look-up:
    # they are met in their order.
    @_reads_one(
        f"""
SELECT {_columns(_Waiting)} FROM durable_instances
WHERE rate_limit = ? AND queue = ? AND priority > ? AND status = 'runnable' AND parked_on IS NULL
ORDER BY priority, eligible_at, id LIMIT 1
""",
        _Waiting._make,
    )
    def next_at_bucket(self, key: str, queue: str, priority: int) -> _Waiting | None: ...

    def first_at_bucket(self, key: str, queue: str, now: int) -> _Waiting | None:
        """Return the first row of a bucket that is due in a queue and in no line."""
        row = self.next_at_bucket(key, queue, -_MAX_INTEGER - 1)
        while row is not None and row.eligible_at > now:
            row = self.next_at_bucket(key, queue, row.priority)
        return row


class _BucketTable(_SharedReads, _Table):
    """Rate limits and their buckets."""

    _SAVE_POLICY = f"INSERT OR REPLACE INTO durable_limits ({_columns(_Policy)}) VALUES {_values(_Policy)}"

    def save_policy(self, policy: _Policy, now: int) -> None:
        """Keep a rate limit; the levels of its buckets are put into its units."""
        old = self.policy(policy.name)
        if old == policy:
            return
        self.db.execute(self._SAVE_POLICY, policy)
        if old is None:
            return
        for key, level, refilled_at in self.buckets_of(policy.name):
            level = old.level(level, refilled_at, now) * policy.per_ms // old.per_ms
            self.save_bucket(policy, key, min(level, policy.capacity), now, now)

    @_reads(
        "SELECT key, level, refilled_at FROM durable_buckets WHERE key = ?1 OR key >= ?1 || ':' AND key < ?1 || ';'"
    )
    def buckets_of(self, name: str) -> list[tuple[str, int, int]]: ...
    @_reads_one("SELECT level, refilled_at FROM durable_buckets WHERE key = ?")
    def bucket(self, key: str) -> tuple[int, int] | None:
        """Return (level, refilled_at)."""

    _SAVE_BUCKET = """
INSERT INTO durable_buckets (key, level, refilled_at, full_at, ready_at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET
    level = excluded.level, refilled_at = excluded.refilled_at, full_at = excluded.full_at, ready_at = excluded.ready_at
"""

    def save_bucket(self, policy: _Policy, key: str, level: int, refilled_at: int, ready_at: int | None) -> None:
        self.save_buckets([(policy, key, level, refilled_at, ready_at)])

    def save_buckets(self, buckets: Iterable[tuple[_Policy, str, int, int, int | None]]) -> None:
        """Write (policy, key, level, refilled_at, ready_at) of buckets."""
        rows = [
            (key, level, refilled_at, policy.instant_of(policy.capacity, level, refilled_at), ready_at)
            for policy, key, level, refilled_at, ready_at in buckets
        ]
        self.db.executemany(self._SAVE_BUCKET, rows)

    @_reads_value("SELECT min(ready_at) FROM durable_buckets WHERE ready_at > ?")
    def next_ready(self, now: int) -> int | None:
        """Return the next instant after now at which a bucket is ready for its line."""

    @_reads("SELECT key FROM durable_buckets WHERE ready_at <= ?", _only)
    def ready_buckets(self, now: int) -> list[str]: ...
    @_writes(
        """
DELETE FROM durable_buckets WHERE key IN (
    SELECT key FROM durable_buckets AS bucket WHERE full_at <= ? AND ready_at IS NULL AND NOT EXISTS (
        SELECT 1 FROM durable_instances
        WHERE rate_limit = bucket.key AND status = 'runnable' AND parked_on IS NULL)
    LIMIT ?)
""",
        int,
    )
    def collect_buckets(self, now: int, count: int) -> int:
        """Drop full buckets that nobody waits for: a cold one is full.

        What has overflowed counts for who passes a waiting row, and it goes with the bucket.
        """


class _InboxTable(_Table):
    """Signals, but for the look at them."""

    _DELIVER = """
INSERT INTO durable_signals (target, name, payload, dedup_key, sent_at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (target, name, dedup_key) WHERE dedup_key IS NOT NULL DO NOTHING
"""

    def deliver(self, target: int, message: _Message, now: int) -> bool:
        self.db.execute(self._DELIVER, (target, message.name, message.payload, message.dedup_key, now))
        return bool(self.db.changes())

    @_writes("""
UPDATE durable_instances SET status = 'runnable', eligible_at = ?3, await_deadline = NULL, updated_at = ?3
WHERE id = ?1 AND status = 'awaiting_signal' AND EXISTS (SELECT 1 FROM json_each(awaits) WHERE value = ?2)
""")
    def wake(self, target: int, name: str, now: int) -> bool: ...

    _UNSEEN = """
SELECT 1 FROM durable_signals
WHERE target = ? AND consumed = 0 AND name IN (SELECT value FROM json_each(?))
    AND id NOT IN (SELECT value FROM json_each(?)) LIMIT 1
"""

    def has_unseen(self, target: int, names: str, seen: Iterable[int]) -> bool:
        return self.db.execute(self._UNSEEN, (target, names, _encode(list(seen)))).get is not None

    # A consumed signal that has a dedup_key leaves it behind, so that a redelivery stays a no-op while the instance
    # lives. With a history each stays, marked with the number of the claim that consumed it, so that it can come back;
    # without one it has no payload any more, and a mark that is below all of these.
    _CONSUME = "DELETE FROM durable_signals WHERE id = ? AND dedup_key IS NULL"
    _CONSUME_KEYED = "UPDATE durable_signals SET consumed = -1, payload = NULL WHERE id = ? AND dedup_key IS NOT NULL"
    _KEEP_CONSUMED = "UPDATE durable_signals SET consumed = ? WHERE id = ? AND consumed = 0"

    def consume(self, ids: Iterable[int], kept_by: int | None) -> None:
        """Take signals out of the inbox; with a history they stay in the file, marked by the claim."""
        if kept_by is not None:
            self.db.executemany(self._KEEP_CONSUMED, [(kept_by, one) for one in ids])
            return
        bindings = [(one,) for one in ids]
        self.db.executemany(self._CONSUME, bindings)
        self.db.executemany(self._CONSUME_KEYED, bindings)

    @_asks("SELECT 1 FROM durable_signals LIMIT 1")
    def has_signals(self) -> bool: ...

    _EMPTY_INBOX = "DELETE FROM durable_signals WHERE target = ? RETURNING id, name, consumed"
    _KEEP_INBOX = "UPDATE durable_signals SET consumed = ? WHERE target = ? AND consumed = 0 RETURNING id, name, 0"

    def empty_inbox(self, target: int, kept_by: int | None = None) -> list[tuple[int, str]]:
        """Take all of an instance's signals out of its inbox; return (id, name) of those that were not consumed."""
        sql, bindings = (self._EMPTY_INBOX, (target,)) if kept_by is None else (self._KEEP_INBOX, (kept_by, target))
        taken = cast("Iterable[tuple[int, str, int]]", self.db.execute(sql, bindings))
        return [(signal, name) for signal, name, is_consumed in taken if not is_consumed]

    @_writes("UPDATE durable_signals SET consumed = 0 WHERE target = ? AND consumed >= ?")
    def bring_back(self, target: int, seq: int) -> bool:
        """Put back into the inbox what that run and later ones have consumed."""


class _TimerTable(_Table):
    """What is due at an instant, and instants that a clock was wrong about."""

    @_reads_one("""
SELECT (SELECT min(await_deadline) FROM durable_instances WHERE await_deadline IS NOT NULL),
    (SELECT min(ready_at) FROM durable_buckets WHERE ready_at IS NOT NULL),
    (SELECT min(fires_at) FROM durable_schedules WHERE fires_at > ?)
""")
    def timers(self, schedules_after: int) -> tuple[int | None, int | None, int | None]:
        """Return the next await deadline, when the next bucket is ready for its line, and the next schedule fires."""

    @_reads("""
UPDATE durable_instances SET status = 'runnable', eligible_at = ?1, await_deadline = NULL, updated_at = ?1
WHERE id IN (
    SELECT id FROM durable_instances WHERE await_deadline <= ?2 ORDER BY await_deadline LIMIT 1000)
RETURNING id, fsm, step
""")
    def fire(self, now: int, until: int) -> list[tuple[int, str, str]]:
        """Wake instances whose deadline is over; return (id, fsm, step) of each."""

    _SET_RIGHT_RUNNABLE = f"""
WITH ahead AS ({_AHEAD_RUNNABLE}), placed AS (
    SELECT id, delay, row_number() OVER same AS place, count(*) OVER (PARTITION BY delay > 0) AS count FROM ahead
    WINDOW same AS (PARTITION BY delay > 0 ORDER BY eligible_at, id))
UPDATE durable_instances SET updated_at = ?1, eligible_at = ?1 + iif(delay > 0, delay, place - count)
FROM placed WHERE durable_instances.id = placed.id AND place <= ?2
"""
    _SET_RIGHT_AWAITING = f"""
UPDATE durable_instances SET await_deadline = ?1 + max(0, await_deadline - updated_at), updated_at = ?1
WHERE id IN ({_AHEAD_AWAITING} LIMIT ?2)
"""
    _SET_RIGHT_EXECUTING = f"UPDATE durable_instances SET eligible_at = ?1 WHERE id IN ({_AHEAD_EXECUTING} LIMIT ?2)"
    _SET_RIGHT_BUCKETS = f"""
UPDATE durable_buckets SET
    full_at = full_at - refilled_at + ?1, ready_at = ready_at - refilled_at + ?1, refilled_at = ?1
WHERE key IN (SELECT key FROM durable_buckets WHERE full_at > {_WAITED_FOR} AND refilled_at > {_WAITED_FOR} LIMIT ?2)
"""
    _SET_RIGHT_ENDED = f"""
UPDATE durable_instances SET updated_at = ?1, kept_deadline = iif(
    kept_deadline > ?1 AND kept_deadline < 2 * updated_at - ?1, ?1 + max(0, kept_deadline - updated_at), kept_deadline)
WHERE id IN ({_AHEAD_ENDED} LIMIT ?2)
"""
    _SET_RIGHT_LEASES = f"""
UPDATE durable_workers SET lease_expires_at = lease_expires_at - heartbeat_at + ?1, heartbeat_at = ?1
WHERE heartbeat_at > {_WAITED_FOR}
"""

    def set_right(self, now: int, count: int) -> tuple[int, bool]:
        """Set right what a clock that was ahead has written, so many rows of a kind.

        Return how many instances were to run and are brought back, and whether there may be more.
        """
        self.db.execute(self._SET_RIGHT_LEASES, (now,))
        changes, first = [], (self._SET_RIGHT_RUNNABLE, self._SET_RIGHT_AWAITING)
        for sql in (*first, self._SET_RIGHT_EXECUTING, self._SET_RIGHT_BUCKETS):
            self.db.execute(sql, (now, count))
            changes.append(self.db.changes())
        retention: int | None = None
        while True:
            self.db.execute(self._SET_RIGHT_ENDED, (now, count, retention))
            changes.append(self.db.changes())
            retention = self.next_retention(retention)
            if retention is None:
                return changes[0] + changes[1], max(changes) >= count

    # A finished child waits for its parent's join, of which `joining` says that it is still to make progress; and a
    # failed parent keeps its children as long as itself, for it may be retried.
    _SWEEP = """
SELECT id, updated_at, status = 'failed' FROM durable_instances c
WHERE (status = 'done' OR status = 'failed') AND retention IS ? AND (updated_at, id) > (?, ?) AND updated_at < ?
    AND NOT EXISTS (
        SELECT 1 FROM durable_instances p WHERE p.id = c.parent_id AND (p.joining OR p.status = 'failed'))
ORDER BY updated_at, id LIMIT ?
"""

    def sweep(self, after: _SweepPosition, before: int, count: int) -> list[tuple[int, int, int]]:
        """Return (id, updated_at, whether it failed) of due ended rows of one retention, oldest first."""
        bindings = after.retention, after.updated_at, after.id, before, count
        return cast(list[tuple[int, int, int]], list(self.db.execute(self._SWEEP, bindings)))

    @_reads_value("""
SELECT min(retention) FROM durable_instances
WHERE (status = 'done' OR status = 'failed') AND retention > coalesce(?, -1)
""")
    def next_retention(self, retention: int | None) -> int | None:
        """Return the next longer retention that ended rows have of their own."""

    _COLLECT = (
        "DELETE FROM durable_instances WHERE id = ? AND status IN ('done', 'failed')",
        "DELETE FROM durable_signals WHERE target = ?",
        "DELETE FROM durable_transitions WHERE instance = ?",
        "DELETE FROM durable_calls WHERE instance = ?",
    )

    def collect(self, ids: Iterable[int]) -> None:
        """Delete ended instances, with all that belongs to them."""
        bindings = [(one,) for one in ids]
        for statement in self._COLLECT:
            self.db.executemany(statement, bindings)


class _WorkerTable(_Table):
    """Running engines, and queues."""

    _REGISTER = f"""
INSERT INTO durable_workers ({_columns(Worker)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, lease_expires_at = excluded.lease_expires_at
"""

    def register(self, worker: Sequence[Any]) -> None:
        self.db.execute(self._REGISTER, worker)

    @_writes("UPDATE durable_workers SET heartbeat_at = ?2, lease_expires_at = ?3 WHERE id = ?1")
    def renew(self, worker: str, now: int, lease_expires_at: int) -> bool: ...
    @_writes("DELETE FROM durable_workers WHERE id = ?")
    def unregister(self, worker: str) -> bool: ...

    _FORGET_TAKEN = "DELETE FROM durable_meta WHERE key GLOB 'taken:*' AND CAST(value AS INTEGER) < ?"
    _NOTE_TAKEN = "INSERT OR REPLACE INTO durable_meta (key, value) VALUES ('taken:' || ?, ?)"

    def note_taken(self, worker: str, now: int) -> None:
        """Leave word, for a day, that a worker's lock was found free: should it live, it can tell what that means."""
        self.db.execute(self._FORGET_TAKEN, (now - 86_400_000,))
        self.db.execute(self._NOTE_TAKEN, (worker, now))

    @_asks("SELECT 1 FROM durable_meta WHERE key = 'taken:' || ?")
    def was_taken(self, worker: str) -> bool:
        """Whether somebody has found a worker's lock free."""

    @_reads(
        "SELECT queues FROM durable_workers WHERE id IS NOT ?",
        lambda row: _decode(row[0]),
        lambda lists: frozenset(itertools.chain.from_iterable(lists)),
    )
    def served_elsewhere(self, worker: str) -> frozenset[str]:
        """Return the queues that other workers serve."""

    @_writes("INSERT INTO durable_paused (queue) VALUES (?) ON CONFLICT DO NOTHING")
    def pause(self, queue: str) -> bool: ...
    @_writes("DELETE FROM durable_paused WHERE queue = ?")
    def resume(self, queue: str) -> bool: ...
    @_asks("SELECT 1 FROM durable_paused WHERE queue = ?")
    def is_paused(self, queue: str) -> bool: ...


class _ScheduleTable(_Table):
    """Schedules."""

    @_reads_value("SELECT value FROM durable_meta WHERE key = 'file_id'")
    def file_id(self) -> str: ...
    @_reads_one(f"{_SCHEDULE_ROW} WHERE name = ?", _ScheduleRow._make)
    def schedule(self, name: str) -> _ScheduleRow | None: ...
    @_reads(f"{_SCHEDULE_ROW} WHERE is_declared ORDER BY name", _ScheduleRow._make)
    def declared_schedules(self) -> list[_ScheduleRow]: ...
    @_reads(f"{_SCHEDULE_ROW} WHERE next_at > ? ORDER BY name", _ScheduleRow._make)
    def schedules_ahead(self, now: int) -> list[_ScheduleRow]:
        """Return the schedules whose next instant is still to come."""

    @_reads(f"{_SCHEDULE_ROW} WHERE fires_at > ? AND fires_at <= ? ORDER BY fires_at, name", _ScheduleRow._make)
    def due_schedules(self, after: int, until: int) -> list[_ScheduleRow]:
        """Return the schedules that fire in a span of time."""

    @_asks("SELECT 1 FROM durable_instances WHERE schedule = ? AND scheduled_at = ? LIMIT 1")
    def has_occurrence(self, name: str, nominal: int) -> bool:
        """Whether an instance in the file stands for that instant of a schedule."""

    _SAVE = f"INSERT OR REPLACE INTO durable_schedules ({_columns(_ScheduleRow)}) VALUES {_values(_ScheduleRow)}"

    def save_schedule(self, row: _ScheduleRow) -> None:
        self.db.execute(self._SAVE, row)

    _RENAME = (
        "UPDATE durable_schedules SET name = ? WHERE name = ?",
        "UPDATE durable_instances SET schedule = ? WHERE schedule = ?",
    )

    def rename_schedule(self, old: str, new: str) -> None:
        for statement in self._RENAME:
            self.db.execute(statement, (new, old))

    @_writes("DELETE FROM durable_schedules WHERE name = ?")
    def unschedule(self, name: str) -> bool: ...
    @_writes("UPDATE durable_schedules SET is_paused = 1, next_at = NULL, fires_at = NULL")
    def pause_schedules(self) -> bool: ...


_RECORD = f"INSERT INTO durable_transitions ({_columns(_Entry)}) VALUES {_values(_Entry)}"
_RECORD_MANY = _RECORD + f", {_values(_Entry)}" * (_BULK - 1)


class _HistoryTable(_Table):
    """The runs that are over."""

    def record(self, entries: Sequence[_Entry]) -> None:
        self._write_in_bulk(_RECORD, _RECORD_MANY, entries)

    @_reads(
        f"SELECT {_columns(_Entry)} FROM durable_transitions WHERE instance = ? AND seq >= ? ORDER BY seq", _Entry._make
    )
    def entries_from(self, instance: int, seq: int) -> list[_Entry]: ...


def _keep_for_ever(connections: Iterable[apsw.Connection]) -> None:
    """Keep connections from being closed, even by the interpreter's end.

    A fork's child shares its parent's open files: closing SQLite's in the child may truncate the WAL under the
    parent. What a reference is held to that nobody will drop is never closed.
    """
    import ctypes  # only the child of a fork pays for it

    for connection in connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


class _Ending(NamedTuple):
    """How an instance ended, if its status says that it has."""

    id: int
    status: str
    result: str | None
    last_error: str | None


class _Looks(_SharedReads):
    """What only those ask for who look."""

    @_reads_one(f"SELECT {_INSTANCE} FROM durable_instances WHERE id = ?", _make_instance)
    def instance(self, instance: int) -> Instance | None: ...
    @_reads(f"SELECT {_INSTANCE} FROM durable_instances WHERE parent_id = ? ORDER BY id", _make_instance, tuple)
    def children(self, parent: int) -> tuple[Instance, ...]: ...
    @_reads_one(f"SELECT {_columns(_Ending)} FROM durable_instances WHERE id = ?", _Ending._make)
    def find_ending(self, instance: int) -> _Ending | None: ...
    @_reads("SELECT id, status FROM durable_instances WHERE id IN (SELECT value FROM json_each(?))", tuple, dict)
    def statuses_of(self, ids: str) -> dict[int, str]:
        """Return the status of each of the ids in a JSON array."""

    # Each line reads one partial index.
    @_reads("""
SELECT queue, status, count(*) FROM durable_instances WHERE status = 'runnable' AND parked_on IS NULL
    GROUP BY queue
UNION ALL SELECT queue, status, count(*) FROM durable_instances WHERE parked_on IS NOT NULL GROUP BY queue
UNION ALL SELECT queue, status, count(*) FROM durable_instances WHERE status = 'executing' GROUP BY queue
UNION ALL SELECT queue, status, count(*) FROM durable_instances
    WHERE status = 'awaiting_signal' OR status = 'awaiting_children' GROUP BY queue, status
UNION ALL SELECT queue, status, count(*) FROM durable_instances
    WHERE status = 'done' OR status = 'failed' GROUP BY queue, status
""")
    def tally(self) -> list[tuple[str, str, int]]:
        """Return (queue, status, count), the runnable ones in two parts."""

    # Likewise, and of what is in no line it seeks one row a queue: whoever waits for idleness asks ten times a second.
    @_reads(
        """
WITH RECURSIVE queues (queue) AS (
    SELECT min(queue) FROM durable_instances WHERE status = 'runnable' AND parked_on IS NULL
    UNION ALL
    SELECT (SELECT min(queue) FROM durable_instances
        WHERE queue > queues.queue AND status = 'runnable' AND parked_on IS NULL)
    FROM queues WHERE queue IS NOT NULL
), busy (queue) AS (
    SELECT queue FROM queues WHERE EXISTS (SELECT 1 FROM durable_instances i
        WHERE i.queue = queues.queue AND status = 'runnable' AND parked_on IS NULL AND eligible_at <= ?1)
    UNION SELECT queue FROM durable_instances WHERE parked_on IS NOT NULL AND eligible_at <= ?1
    UNION SELECT queue FROM durable_instances WHERE status = 'executing'
)
SELECT queue FROM busy WHERE queue NOT IN (SELECT queue FROM durable_paused)
""",
        _only,
        set,
    )
    def busy(self, now: int) -> set[str]:
        """Return the queues in which something is to be done now, or runs, but for paused ones."""

    @_reads("SELECT DISTINCT queue FROM durable_instances", _only)
    def queues(self) -> list[str]: ...
    @_reads("SELECT queue FROM durable_paused ORDER BY queue", _only)
    def paused(self) -> list[str]: ...
    @_reads(
        "SELECT name, value, is_awaited FROM durable_calls WHERE instance = ?",
        lambda row: (row[0], (row[1], bool(row[2]))),
        dict,
    )
    def calls(self, instance: int) -> dict[str, tuple[str | None, bool]]:
        """Return the calls that are kept of an instance's step: (value as JSON, whether it was awaited) by name."""

    @_reads(
        f"SELECT {_columns(Transition)} FROM durable_transitions WHERE instance = ? ORDER BY seq", _maker_of(Transition)
    )
    def history(self, instance: int) -> list[Transition]: ...
    @_reads_one(f"SELECT {_columns(_Run)} FROM durable_transitions WHERE instance = ? AND seq = ?", _Run._make)
    def run(self, instance: int, seq: int) -> _Run | None:
        """Return the run of that number, if it is in the history."""

    @_reads_one(
        f"""
SELECT {_columns(_Run)} FROM durable_transitions
WHERE instance = ? AND step = ? AND kind <> 'rewind' AND (kind <> 'cancel' OR worker IS NOT NULL)
ORDER BY seq DESC LIMIT 1
""",
        _Run._make,
    )
    def latest_run(self, instance: int, step_name: str) -> _Run | None:
        """Return the latest run of a step, if there is one in the history.

        One that was cancelled while it ran has its worker; to cancel an instance that waits is no run.
        """

    @_reads(f"SELECT {_columns(Schedule)} FROM durable_schedules ORDER BY name", _maker_of(Schedule))
    def schedules(self) -> list[Schedule]: ...
    @_reads(f"{_SCHEDULE_ROW} ORDER BY name", _ScheduleRow._make)
    def schedule_rows(self) -> list[_ScheduleRow]: ...
    @_asks("SELECT 1 FROM durable_instances WHERE id = ? AND status = 'executing' AND cancel_reason IS NOT NULL")
    def is_cancelled(self, instance: int) -> bool: ...
    @_asks(f"""
SELECT 1 WHERE EXISTS ({_AHEAD_RUNNABLE}) OR EXISTS ({_AHEAD_AWAITING}) OR EXISTS ({_AHEAD_EXECUTING})
    OR EXISTS (SELECT 1 FROM durable_buckets WHERE full_at > {_WAITED_FOR} AND refilled_at > {_WAITED_FOR})
    OR EXISTS (SELECT 1 FROM durable_workers WHERE heartbeat_at > {_WAITED_FOR})
""")
    def is_ahead(self, now: int) -> bool:
        """Whether something was written by a clock that was ahead of now, and waits for it."""


_FIND_BY = {
    "status": "status IN (SELECT value FROM json_each(?))",
    "fsm": "fsm IN (SELECT value FROM json_each(?))",
    "queue": "queue = ?",
    "parent_id": "parent_id = ?",
    "correlation_key": "correlation_key = ?",
    "schedule": "schedule = ?",
    "since": "updated_at >= ?",
    "before": "id < ?",
}
_FIND_FAILED = "status = 'failed'"  # a literal, for the index of the failed rows

_AUDITS = {
    "executing rows of a worker that is not registered": """
        SELECT id FROM durable_instances
        WHERE status = 'executing' AND worker NOT IN (SELECT id FROM durable_workers)""",
    "rows waiting for a signal without saying which": """
        SELECT id FROM durable_instances i WHERE status = 'awaiting_signal' AND awaits IS NULL""",
    "rows waiting for children of which none is live": """
        SELECT id FROM durable_instances p WHERE status = 'awaiting_children' AND NOT EXISTS (
            SELECT 1 FROM durable_instances c WHERE c.parent_id = p.id AND c.status NOT IN ('done', 'failed'))""",
    "done rows with an inbox": """
        SELECT DISTINCT target FROM durable_signals JOIN durable_instances i ON i.id = target
        WHERE i.status = 'done' AND NOT consumed""",
    "done rows that wait for something": """
        SELECT id FROM durable_instances WHERE status = 'done' AND (awaits IS NOT NULL OR joining)""",
    "signals without an instance": """
        SELECT DISTINCT target FROM durable_signals WHERE target NOT IN (SELECT id FROM durable_instances)""",
    "rows whose state, result or awaits is no JSON": """
        SELECT id FROM durable_instances WHERE NOT json_valid(state)
            OR NOT coalesce(json_valid(result), 1) OR NOT coalesce(json_valid(awaits), 1)""",
    "signals whose payload is no JSON (by target)": """
        SELECT target FROM durable_signals WHERE NOT json_valid(payload)""",
    "rows of a rate limit that is not in the file": """
        SELECT id FROM durable_instances WHERE rate_limit IS NOT NULL AND status NOT IN ('done', 'failed')
            AND substr(rate_limit, 1, instr(rate_limit || ':', ':') - 1) NOT IN (SELECT name FROM durable_limits)""",
    "rows parked on something that is not theirs": """
        SELECT id FROM durable_instances WHERE parked_on IS NOT NULL
            AND parked_on IS NOT 'key:' || concurrency_key AND parked_on IS NOT 'rate:' || rate_limit""",
    "rows parked on a bucket that will never wake them": """
        SELECT id FROM durable_instances WHERE parked_on LIKE 'rate:%' AND NOT EXISTS (
            SELECT 1 FROM durable_buckets WHERE 'rate:' || key = parked_on AND ready_at IS NOT NULL)""",
    "rows parked on a key that nobody holds or is about to take": """
        SELECT id FROM durable_instances i WHERE parked_on = 'key:' || concurrency_key AND NOT EXISTS (
            SELECT 1 FROM durable_instances o WHERE o.concurrency_key = i.concurrency_key AND (o.status = 'executing'
                OR o.status = 'runnable' AND (o.parked_on IS NULL OR o.parked_on LIKE 'rate:%')))""",
    "schedules that would fire before their instant (by name)": """
        SELECT name FROM durable_schedules WHERE fires_at < next_at OR fires_at > next_at + jitter""",
    "schedules whose grid or instance is no JSON (by name)": """
        SELECT name FROM durable_schedules WHERE NOT json_valid("when") OR NOT json_valid(template)""",
    "schedules whose latest instance is another's (by name)": """
        SELECT s.name FROM durable_schedules s JOIN durable_instances i ON i.id = s.last_id
        WHERE i.schedule IS NOT s.name""",
    "runs of an instance that is not in the file (by its id)": """
        SELECT DISTINCT instance FROM durable_transitions WHERE instance NOT IN (SELECT id FROM durable_instances)""",
    "counters below zero": """
        SELECT id FROM durable_instances WHERE min(attempt, crashes, claim) < 0 OR weight < 1""",
}


_LIVE_ROWS = f"SELECT id, fsm, version, step, state FROM durable_instances WHERE {_LIVE_STATUSES}"
_One = typing.TypeVar("_One")


class _Reader(_Looks):
    """Reads what is committed, on connections of its own that can't write and never block a beat."""

    def __init__(self, path: str, files: _OpenFiles | None = None) -> None:
        self.path = path
        self._files = files
        self._idle: list[apsw.Connection] = []
        self._all: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._is_closed = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[apsw.Connection]:
        """Lend a connection to one thread at a time."""
        if self._is_closed:
            raise EngineClosedError(f"the engine on {self.path} is closed")
        if self._files is not None:
            self._files.check()
        connection = self._take()
        try:
            yield connection
        except BaseException as error:
            self._close(connection)  # what was raised may keep a statement of it half read, and so an old view
            if isinstance(error, apsw.Error):
                raise _translated(error, self.path) from error
            raise
        self._put_back(connection)

    def _take(self) -> apsw.Connection:
        try:
            return self._idle.pop()
        except IndexError:
            pass
        with _driver_errors(self.path):
            connection = self._open()
            connection.execute("PRAGMA query_only = ON")
            self._all.add(connection)
        return connection

    def _open(self) -> apsw.Connection:
        return _connect(self.path, apsw.SQLITE_OPEN_READWRITE)

    def _put_back(self, connection: apsw.Connection) -> None:
        if self._is_closed:
            self._close(connection)
        else:
            self._idle.append(connection)

    def _close(self, connection: apsw.Connection) -> None:
        if self._files is not None:
            self._files.release(connection)
        with contextlib.suppress(apsw.Error):  # a reader has nothing to lose
            connection.close(True)

    def _select(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self.reading() as connection:
            return list(connection.execute(sql, bindings))

    def locate(self, target: int | str) -> int:
        """Return the id that a target means: by key, the occupant's, else that of the newest that carries the key."""
        if isinstance(_target(target), int):
            if abs(cast(int, target)) > _MAX_INTEGER:
                raise NotFoundError(f"no instance has the id {_brief(target)}")
            return cast(int, target)
        carrier = self.occupant(cast(str, target)) or self.last_carrier(cast(str, target))
        if carrier is None:
            raise NotFoundError(f"no instance carries the key {_brief(target)}")
        return carrier[0]

    def identify(self, target: int | str) -> int:
        """Return the id of an instance that exists."""
        identity = self.locate(target)
        self._found(self.status(identity), target)
        return identity

    def get(self, target: int | str) -> Instance:
        return self._found(self.instance(self.locate(target)), target)

    def ending(self, instance: int) -> _Ending:
        """Return only what a result needs: half the time of the whole instance."""
        return self._found(self.find_ending(instance), instance)

    def _found(self, found: _One | None, target: int | str) -> _One:
        if found is None:
            raise NotFoundError(f"no instance has the id {_brief(target)}")
        return found

    def find(self, filters: Mapping[str, Any], limit: int) -> list[Instance]:
        """Return the newest instances that pass all filters, which are columns or `before`."""
        clauses = [_FIND_BY[name] for name in filters]
        if filters.get("status") == _encode([Status.FAILED]):
            clauses.append(_FIND_FAILED)
        where = " AND ".join(clauses) or "TRUE"
        sql = f"SELECT {_INSTANCE} FROM durable_instances WHERE {where} ORDER BY id DESC LIMIT ?"
        return [_make_instance(row) for row in self._select(sql, (*filters.values(), limit))]

    def counts(self) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for queue, status, count in sorted(self.tally(), key=_only):
            of_queue = counts.setdefault(queue, {})
            of_queue[status] = of_queue.get(status, 0) + count
        return counts

    def live(self) -> Iterator[tuple[Any, ...]]:
        """Yield (id, fsm, version, step, state) of the instances that have not ended, as they are read."""
        with self.reading() as connection:
            yield from connection.execute(_LIVE_ROWS)

    def statuses(self, ids: Iterable[int]) -> dict[int, str]:
        return self.statuses_of(_encode(list(ids)))

    def data_version(self) -> int:
        """Return a number that changes when another connection than the one which is asked has committed."""
        with self.reading() as connection:
            return hash((id(connection), connection.execute("PRAGMA data_version").get))

    def check(self) -> list[str]:
        """Hold the file against SQLite's own integrity check and the engine's invariants, in one view of it."""
        with self.reading() as connection, _one_view(connection):
            found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
            problems = [] if found == ["ok"] else [f"SQLite: {text}" for text in found]
            for title, sql in () if problems else _AUDITS.items():
                ids = [str(row[0]) for row in connection.execute(sql)]
                if ids:
                    problems.append(f"{title}: {', '.join(ids[:10])}{' ...' if len(ids) > 10 else ''}")
            return problems

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._close(self._idle.pop())

    def abandon(self) -> None:
        """Forget the connections, unclosed: this is the child of a fork."""
        self._is_closed = True
        _keep_for_ever(self._all)


# They would outlive the step, on the engine's own connection, and hide other tables from it.
_NO_TEMPORARIES = "create temporary objects"
_FORBIDDEN_ACTIONS = {
    apsw.SQLITE_TRANSACTION: "control the transaction",
    apsw.SQLITE_SAVEPOINT: "control the transaction",
    apsw.SQLITE_ATTACH: "attach databases",
    apsw.SQLITE_DETACH: "detach databases",
    apsw.SQLITE_CREATE_TEMP_INDEX: _NO_TEMPORARIES,
    apsw.SQLITE_CREATE_TEMP_TABLE: _NO_TEMPORARIES,
    apsw.SQLITE_CREATE_TEMP_TRIGGER: _NO_TEMPORARIES,
    apsw.SQLITE_CREATE_TEMP_VIEW: _NO_TEMPORARIES,
}
_WRITE_ACTIONS = frozenset(
    {apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE, apsw.SQLITE_ALTER_TABLE, apsw.SQLITE_REINDEX}
    | {apsw.SQLITE_CREATE_INDEX, apsw.SQLITE_CREATE_TABLE, apsw.SQLITE_CREATE_TRIGGER, apsw.SQLITE_CREATE_VIEW}
    | {apsw.SQLITE_DROP_INDEX, apsw.SQLITE_DROP_TABLE, apsw.SQLITE_DROP_TRIGGER, apsw.SQLITE_DROP_VIEW}
    | {apsw.SQLITE_CREATE_VTABLE, apsw.SQLITE_DROP_VTABLE}
)
# data_version and page_size are asked by SQLite's own full-text and R-tree modules.
_HARMLESS_PRAGMAS = frozenset(
    ["application_id", "data_version", "foreign_key_list", "index_list", "page_size", "table_info", "user_version"]
)


def _is_owned(table: str | None) -> bool:
    """Whether a table is durable's, or SQLite's own with the ids that were given out."""
    return table is not None and (table.lower().startswith("durable_") or table.lower() == "sqlite_sequence")


class _UserStatements(_Table):
    """Statements of the user's own, which may do in the transaction of a beat what is no business of durable's."""

    def __init__(self) -> None:
        self._users_sql: str | None = None
        """What the user's statement that runs says, in lower case."""
        self._refusal: str | None = None
        # Asked when a statement is prepared, not when it runs; set once, for setting it prepares everything anew.
        self.db.authorizer = self._authorize

    def run(self, statement: _Statement) -> None:
        """Run the user's SQL; what it may not do is a DurableError."""
        sql = statement.sql.lower()
        names = self._owned_names() if "rename" in sql else None
        self._users_sql, self._refusal = sql, None
        try:
            # The flag keeps it out of the cached statements of our own, which were let pass.
            for _ in self.db.execute(statement.sql, statement.bindings, prepare_flags=apsw.SQLITE_PREPARE_PERSISTENT):
                pass
        except apsw.AuthError as error:
            raise DurableError(f"ctx.execute may not {self._refusal}: {statement.sql}") from error
        finally:
            self._users_sql = None
        if names is not None and not names >= self._owned_names():  # a rename's new name is not told when it is asked
            raise DurableError(f"ctx.execute may not give a name that begins with durable_: {statement.sql}")

    def _owned_names(self) -> set[str]:
        return {name for (name,) in self.db.execute("SELECT name FROM sqlite_schema") if _is_owned(name)}

    def check_foreign_keys(self) -> None:
        """Refuse what deferred foreign keys would refuse at the commit, where it would fail the whole beat."""
        if self.db.status(apsw.SQLITE_DBSTATUS_DEFERRED_FKS)[0]:
            raise DurableError("a foreign key constraint would fail at the commit")

    def _authorize(
        self, action: int, one: str | None, two: str | None, database: str | None, trigger: str | None
    ) -> int:
        if self._users_sql is None:
            return apsw.SQLITE_OK
        self._refusal = self._refusal or _FORBIDDEN_ACTIONS.get(action)
        if action == apsw.SQLITE_PRAGMA and one not in _HARMLESS_PRAGMAS:
            self._refusal = f"set PRAGMA {one}"
        if action in _WRITE_ACTIONS and not self._is_sqlites_own(action, one, trigger):
            if database == "temp":
                self._refusal = self._refusal or _NO_TEMPORARIES
            names = (one,) if action == apsw.SQLITE_UPDATE else (one, two)  # of an update, two is a column
            owned = next(filter(_is_owned, names), None)
            self._refusal = self._refusal or (owned and f"write to {owned}")
        return apsw.SQLITE_DENY if self._refusal else apsw.SQLITE_OK

    def _is_sqlites_own(self, action: int, table: str | None, trigger: str | None) -> bool:
        """Whether it is only how SQLite drops or renames a table of the application's.

        It then writes to its record of ids, which nobody else can without naming it, and updates the temporary
        schema, which nobody else can at all.
        """
        if table == "sqlite_sequence":
            return trigger is None and "sqlite_sequence" not in cast(str, self._users_sql)
        return table == "sqlite_temp_master" and action == apsw.SQLITE_UPDATE


_INCREMENTAL = 2
"""What `PRAGMA auto_vacuum` says of a file that can give space back."""
_SHRUNK_AT_ONCE = 64
"""Pages; it takes 1 to 4 ms."""


class _Space(_Table):
    """The write-ahead log, and free pages of the file."""

    LONG_LOG_PAGES = 4 * _LOG_PAGES
    SPARE_PAGES = 256
    """So many free pages are kept for what is written next."""

    _files: _OpenFiles

    def __init__(self) -> None:
        self._can_shrink = self.db.pragma("auto_vacuum") == _INCREMENTAL
        self._log_pages = 0
        self.copied_pages = 0
        """How much of the log is in the database already."""
        self._is_copy_due = False
        # In place of SQLite's own checkpoint, which is part of the commit that meets it: callers would wait for it,
        # and its failure would look like the commit's.
        self.db.set_wal_hook(self._note_log)

    def _note_log(self, _: apsw.Connection, name: str, pages: int) -> int:
        if name == "main":
            if pages < self.copied_pages:  # it was begun anew
                self.copied_pages = 0
            self._log_pages = pages
        return apsw.SQLITE_OK

    def checkpoint(self) -> apsw.Error | None:
        """Copy the write-ahead log into the database once it is large; an error means only that it is copied later."""
        if self._log_pages < _LOG_PAGES and not self._is_copy_due:
            return None
        pages, is_due = self._log_pages, self._is_copy_due
        self._log_pages, self._is_copy_due = 0, False
        refusal = self.copy_log(self.db)
        self._is_copy_due = is_due and self.copied_pages < pages  # who still read in it has held it up
        return refusal

    @property
    def is_log_long(self) -> bool:
        """Whether there is so much to copy that nobody should wait for it: who read for long has held it up."""
        return self._log_pages - self.copied_pages > self.LONG_LOG_PAGES

    def copy_log(self, connection: apsw.Connection) -> apsw.Error | None:
        """Copy into the database what nobody reads in the log; an error means only that it is copied later."""
        self._files.look()
        if self._files.loss is not None:
            return None
        try:
            _, self.copied_pages = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:
            pass  # another process is at it
        except apsw.Error as error:
            return error
        return None

    def copy_log_soon(self) -> None:
        """Have the log copied after this transaction, however short it is: only then the file becomes smaller."""
        self._is_copy_due = True

    @_reads_value("PRAGMA freelist_count")
    def free_pages(self) -> int: ...

    def spare_pages(self) -> int:
        """Count the free pages that can be given back to the file system."""
        return max(0, self.free_pages() - self.SPARE_PAGES) if self._can_shrink else 0

    @_reads(f"PRAGMA incremental_vacuum({_SHRUNK_AT_ONCE})")
    def shrink(self) -> list[Any]:
        """Give back `_SHRUNK_AT_ONCE` free pages; pages from the end of the file are moved to where they were."""


class _SweepPosition(NamedTuple):
    """Where a sweep of ended rows goes on: within those of one retention, in the order of their ends."""

    retention: int | None = None
    updated_at: int = 0
    id: int = 0
    has_freed: bool = False
    """Whether a failed row was among them: then it begins anew, for its children were kept with it."""


class _Store(
    _InstanceTable,
    _OutcomeTable,
    _ClaimTable,
    _LineTable,
    _BucketTable,
    _InboxTable,
    _TimerTable,
    _WorkerTable,
    _ScheduleTable,
    _HistoryTable,
    _Space,
    _UserStatements,
):
    """The write connection: transactions, and every statement of a beat, a method each, no logic."""

    def __init__(self, path: str, synchronous: str, files: _OpenFiles) -> None:
        self.path = path
        self._files = files
        self.patience = _Patience(path)
        self.db = _open_database(path, synchronous, self.patience)
        self._select = self.db.execute
        _Space.__init__(self)
        _UserStatements.__init__(self)

    def begin(self) -> None:
        self._files.check()
        self.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._files.check()  # again: it may have been long
        self.db.execute("COMMIT")

    def rollback(self) -> None:
        _roll_back(self.db)

    def savepoint(self) -> None:
        self.db.execute("SAVEPOINT durable")

    def release(self) -> None:
        self.db.execute("RELEASE durable")

    def undo(self) -> None:
        self.db.execute("ROLLBACK TO durable; RELEASE durable")

    @_reads_value("PRAGMA data_version")
    def data_version(self) -> int:
        """A number that changes when another connection has committed."""

    def close(self) -> None:
        """Close the connection; if the last copying of the log fails, the log stays and loses nothing."""
        self._files.release(self.db)
        try:
            self.db.close()
        except apsw.Error as error:
            _log.warning("%s: its write-ahead log stays as it is: %s", self.path, _error_text(error))


# ==================================================================================================
# Execution
# ==================================================================================================


def _new_row(insert: Insert, now: int, policy_of: Callable[[str], _Policy | None]) -> _NewRow:
    """Make the row of an instance to insert, of a class that is known here."""
    return _resolve(insert.fsm).new_row(insert, now, policy_of)


def _forked_row(old: Instance, insert: Insert, services: _Services) -> _NewRow:
    """Make the row of a fork: the options that are given, and for the rest what the old instance has."""
    insert._check_attempts(old.fsm, is_job=old.max_attempts is not None)
    now = services.now()
    rate_limit = _limit_key(insert.rate_limit, "rate_limit")
    if rate_limit is not None:
        _check_rate(rate_limit, insert.weight, services.policy(_limit_name(rate_limit)))
    key = insert.correlation_key
    return _NewRow(
        fsm=old.fsm,
        version=old.version,
        step=old.step,
        state="{}",
        max_attempts=old.max_attempts if insert.max_attempts is None else insert.max_attempts,
        max_crashes=0,
        queue=old.queue if insert.queue is None else _text(insert.queue, "queue"),
        priority=insert.priority,
        eligible_at=insert._eligible_at(now),
        concurrency_key=_limit_key(insert.concurrency_key, "concurrency_key"),
        rate_limit=rate_limit,
        weight=insert.weight,
        parent_id=None,
        correlation_key=None if key is None else _text(key, "correlation_key"),
        correlation_scope=_scope_bits(insert.correlation_scope),
        inserted_at=now,
        updated_at=now,
    )


class _ForkGuard:
    """Stands around the user's code in threads of the engine's: they leave a process that was forked off there.

    That code goes on in the parent, with all that is claimed: nothing of the engine's may run in the child as well.
    """

    is_forked = False

    def __enter__(self) -> None:
        if self.is_forked:
            self.leave(None)

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self.is_forked:
            self.leave(error)

    def leave(self, error: BaseException | None) -> typing.NoReturn:
        """Leave with the status that Python would; the standard streams are flushed, and no more is done."""
        status = 1
        try:
            if error is None or isinstance(error, StopIteration):
                status = 0
            elif isinstance(error, SystemExit) and isinstance(error.code, int | None):
                status = (error.code or 0) & 0xFF
            elif isinstance(error, SystemExit):
                print(error.code, file=sys.stderr)
            else:
                traceback.print_exception(error)
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
        finally:
            os._exit(status)


_Reported = tuple[float, float | None, str | None, int]


class _Services:
    """What running steps may ask for: the time, and what is committed. They never touch the write connection."""

    _POLICY_AGE_S = 1.0
    waits_out_failures = False
    """Whether what a step has done is to be kept in memory until the storage is back; an engine that runs does so."""

    def __init__(self, reader: _Reader, clock: Callable[[], float]) -> None:
        self._reader = reader
        self.clock = clock
        """Seconds since the epoch."""
        self._policies: dict[str, tuple[float, _Policy]] = {}
        self.fork_guard = _ForkGuard()
        self.children = reader.children
        self.calls = reader.calls
        self.is_cancelled = reader.is_cancelled
        self.progress: dict[tuple[int, int], _Reported] = {}
        """The latest progress of running steps that is not written yet, by the id and the claim of their rows."""

    def now(self) -> int:
        """Milliseconds since the epoch, by the engine's clock."""
        return int(self.clock() * 1000)

    def new_row(self, insert: Insert) -> _NewRow:
        return _new_row(insert, self.now(), self.policy)

    def new_rows(self, inserts: object) -> list[_NewRow]:
        """Make the rows of many instances, inserted at one instant; an error has a note which of them it is about."""
        if not isinstance(inserts, Iterable):
            raise ValueError(f"inserts must be several Insert(...)s, not {_brief(inserts)}")
        given = tuple(inserts)  # which may take its time
        now = self.now()
        rows = []
        for index, one in enumerate(given):
            if not isinstance(one, Insert):
                raise ValueError(f"inserts must be Insert(...)s, not {_brief(one)}")
            try:
                rows.append(_new_row(one, now, self.policy))
            except Exception as error:
                error.add_note(f"in inserts[{index}], {_brief(one)}")
                raise
        return rows

    def open(
        self,
        perform: Callable[[Callable[[Any], Any]], Any],
        perform_soon: Callable[[Callable[[Any], Any]], concurrent.futures.Future[Any]],
        progress_noted: Callable[[_Claim], None],
    ) -> Self:
        """Take how to have something done in a beat, and wait for it or not, and whom to tell of progress."""
        self.perform, self.perform_soon, self._progress_noted = perform, perform_soon, progress_noted
        return self

    def report_progress(self, claim: _Claim, progress: tuple[float, float | None, str | None]) -> None:
        self.progress[claim.row.id, claim.row.claim] = (*progress, self.now())
        self._progress_noted(claim)

    def policy(self, name: str) -> _Policy | None:
        """Return a rate limit; one that was found is believed for a second."""
        read_at, policy = self._policies.get(name, (-math.inf, None))
        if _Ticks.monotonic() - read_at > self._POLICY_AGE_S:
            policy = self._reader.policy(name)
            if policy is not None:
                self._policies[name] = _Ticks.monotonic(), policy
        return policy


def _is_of_storage(error: BaseException) -> bool:
    """Whether the engine's storage has failed, and not the step which asked it for something."""
    return isinstance(error, DurableError) and isinstance(error.__cause__, _STORE_FAILURES)


def _is_of_step(error: BaseException) -> bool:
    """Whether what came out of the user's code is an error of it, for `handle`; else it is a crash.

    asyncio's CancelledError, which is no Exception, is one.
    """
    asyncio_errors = sys.modules.get("asyncio.exceptions")
    is_cancelled = asyncio_errors is not None and isinstance(error, getattr(asyncio_errors, "CancelledError", ()))
    return is_cancelled or (isinstance(error, Exception) and not _is_of_storage(error))


class _Claim:
    """A row in this engine's hands, from its claim to the commit of its outcome."""

    started_at = 0.0
    began_s = 0.0
    """When it started, in seconds since the epoch."""
    ruled_at = 0
    """When it was said what becomes of the row, in milliseconds since the epoch."""
    inline_since: float | None = None
    """Since when it has gone on inline, or was last seen to keep nobody waiting; None for a first step."""
    is_finished = False
    is_disowned = False
    is_timed_out = False
    is_lost = False
    """Whether it was seen that another engine has the row by now."""
    is_cancelled = False
    """Whether its coroutine was told that the instance is cancelled."""
    is_migrated = False
    """Whether the row, of an earlier version, is brought to this: by `migrate`, or by what `handle` answers for it."""

    def __init__(
        self,
        row: _Row,
        spec: _Spec,
        behaviour: object,
        services: _Services,
        inbox: tuple[Signal, ...],
        error: BaseException | None = None,
    ) -> None:
        self.row = row
        self.spec = spec
        self.behaviour = behaviour
        self.services = services
        self.inbox = inbox
        self.seen = inbox
        """What the step was shown, also while it is `handle`'s turn."""
        self.error = error
        """What the step failed with; then it is `handle`'s turn, which is shown no signals and no children."""
        self.has_calls = bool(row.has_calls)

    @property
    def awaited_ids(self) -> tuple[int, ...]:
        """The signals that the step was shown as those which it awaited."""
        names = self.row.awaited_names if self.seen else ()
        return tuple(signal.id for signal in self.seen if signal.name in names)

    @property
    def is_async(self) -> bool:
        """Whether its next turn is the event loop's; `handle` is always a thread's."""
        if not self.spec.has_async or self.error is not None:
            return False
        code = self.spec.find(self.row.step)
        return code is not None and code.is_async

    def failed_with(self, error: BaseException) -> _Claim:
        failed = _Claim(self.row, self.spec, self.behaviour, self.services, (), error)
        failed.seen = self.seen
        failed.started_at, failed.began_s = self.started_at, self.began_s
        failed.inline_since = self.inline_since
        failed.is_timed_out, failed.has_calls = self.is_timed_out, self.has_calls
        failed.is_migrated = self.is_migrated
        return failed

    @property
    def timeout_s(self) -> float | None:
        """Seconds that the step may take."""
        code = self.spec.find(self.row.step) if self.spec.has_timeouts else None
        return None if code is None else code.timeout_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step was begun."""
        return _Ticks.perf_counter() - self.started_at

    @property
    def is_late(self) -> bool:
        """Whether the step is over its timeout, also where nobody has noticed; `handle` has none."""
        timeout_s = self.timeout_s if self.error is None else None
        return timeout_s is not None and self.elapsed_s > timeout_s

    @property
    def needs_migration(self) -> bool:
        """Whether its row is one of an earlier version."""
        return self.row.version != self.spec.version and self.error is None

    def prepare(self, make: Callable[[type[FSM]], object | None]) -> bool:
        """Have the object made that the class has none of yet, and a row of an earlier version brought to this.

        False if the object can't be had: then nothing here runs the row.
        """
        if self.behaviour is None:
            with self.services.fork_guard:
                self.behaviour = make(self.spec.cls)
        if self.behaviour is not None and self.needs_migration:
            self.migrate()
        return self.behaviour is not None

    def migrate(self) -> None:
        """Bring a row of an earlier version to this; what is wrong with that is the step's error."""
        self.started_at, self.began_s = _Ticks.perf_counter(), self.services.clock()
        try:
            with self.services.fork_guard:
                step_name, text = self._migrated()
        except BaseException as error:
            if not _is_of_step(error):
                raise
            self.error = error
        else:
            self.row = self.in_version(step_name, text)
            self.is_migrated = True

    def _migrated(self) -> tuple[str, str]:
        """Return the step and the state, as text, that `migrate` makes of the row."""
        returned = cast(Any, self.behaviour).migrate(self.row.step, _decode(self.row.state), self.row.version)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise OutcomeError(f"migrate must return (step, state), not {_brief(returned)}")
        step_name = _step_name(returned[0])
        self.spec.code(step_name)
        return step_name, _dump_state(self.spec.state, returned[1])

    def in_version(self, step_name: str, state: str) -> _Row:
        """Return the row as it stands in the version of its class, at that step and with that state."""
        version, max_attempts = self.spec.version, self.spec.attempts_of(self.row.max_attempts)
        return self.row._replace(version=version, step=step_name, state=state, max_attempts=max_attempts)

    def check_held(self) -> None:
        """Raise if the step no longer counts, as far as that is known."""
        if self.is_disowned or self.is_lost:
            raise DurableError(
                f"step {self.row.step!r} of instance {self.row.id} no longer counts: it was taken from here"
            )

    _STORE_PAUSE_S = 0.2
    """After so long a call that storage did not keep is kept again."""

    def keep(self, call: _Kept) -> None:
        """Commit what a call returned; where storage fails, once it is back, like an outcome: its effect is done."""
        while True:
            try:
                return self._note_kept(self.services.perform(lambda beat: self._keep_in(beat, call)))
            except DurableError as error:
                self._wait_out(error)
                time.sleep(self._STORE_PAUSE_S)

    async def keep_soon(self, call: _Kept) -> None:
        """Do so without blocking the event loop; many share a commit."""
        import asyncio

        while True:
            try:
                kept = self.services.perform_soon(lambda beat: self._keep_in(beat, call))
                return self._note_kept(await asyncio.wrap_future(kept))
            except DurableError as error:
                self._wait_out(error)
                await asyncio.sleep(self._STORE_PAUSE_S)

    def _wait_out(self, error: DurableError) -> None:
        """Raise what another try can't mend, and in a drain, whose caller is told of the storage's failure."""
        self.check_held()
        if not (self.services.waits_out_failures and _is_of_storage(error)):
            raise error

    def _keep_in(self, beat: Any, call: _Kept) -> bool:
        return not self.is_disowned and beat.store.keep_call(self.row, call)

    def _note_kept(self, is_kept: bool) -> None:
        self.has_calls = True
        if not is_kept:
            self.is_lost = True
            self.check_held()

    def open(self) -> Context[Any]:
        return Context(self, *_load_state(self.spec.state, self.row.state))

    def open_for_handle(self) -> Context[Any]:
        """Open a Context with the plain dict where the state no longer loads."""
        try:
            return self.open()
        except StateError:
            return Context(self, _decode(self.row.state))

    @property
    def signal_names(self) -> str | None:
        """The names of the signals that it was shown as awaited, as JSON."""
        names = self.row.awaited_names if self.seen else ()
        return _encode([signal.name for signal in self.seen if signal.name in names]) if names else None


_queue_of = operator.attrgetter("row.queue")


class _Commit(NamedTuple):
    """What a step leaves to be committed."""

    claim: _Claim
    kind: str
    change: _Change
    effects: tuple[_Effect, ...] = ()
    shown: tuple[int, ...] = ()
    children: tuple[_NewRow, ...] = ()
    is_inline: bool = False
    duration: float = 0.0
    error: tuple[str, str | None] | None = None
    """What the step failed with, for the history: its text and traceback, as they were then."""

    def brought_back(self, now: int) -> _Commit:
        """Return it as ruled on now: the clock was set back since then."""
        change, ruled_at = self.change, self.claim.ruled_at
        if isinstance(change, _End):
            return self
        change = change._replace(eligible_at=_brought_back(change.eligible_at, ruled_at, now))
        if isinstance(change, _Advance) and change.await_deadline is not None:
            change = change._replace(await_deadline=_brought_back(change.await_deadline, ruled_at, now))
        return self._replace(change=change)

    @property
    def is_simple(self) -> bool:
        """Whether one statement writes it, which asks nothing and is followed by nothing."""
        is_alone = not (self.effects or self.shown or self.claim.has_calls or self.claim.is_migrated)
        return is_alone and self.change.status not in _PARKED and not (self.is_inline and self.is_asking)

    @property
    def migrated_row(self) -> _Row:
        """The row as the outcome finds it: in the version of its class also where `handle` has answered for `migrate`.

        What ends such a row leaves it in the version that it had, so that `retry` has it migrated.
        """
        claim, row, change = self.claim, self.claim.row, self.change
        if not claim.is_migrated or row.version == claim.spec.version or isinstance(change, _End):
            return row
        return claim.in_version(row.step, change.state)

    @property
    def is_asking(self) -> bool:
        """Whether it would go on inline with limits that it does not hold yet."""
        change = cast(_Advance, self.change)
        is_new_key = change.concurrency_key is not None and change.concurrency_key != self.claim.row.concurrency_key
        return is_new_key or change.rate_limit is not None

    @property
    def is_kept(self) -> bool:
        """Whether the history keeps it: all of a machine, of a job, whose row says the rest, only failed attempts."""
        claim = self.claim
        if not claim.spec.history:
            return False
        return not claim.spec.is_job or (
            self.kind != "done" and (self.kind != "retry" or cast(_Again, self.change).attempt > claim.row.attempt)
        )


_CRASH = "crash"


def _reason_of(error: str | BaseException) -> str | BaseException:
    return error.reason if isinstance(error, Fail | Cancel) else error


def _entry(commit: _Commit, worker: str, first_child: int | None) -> _Entry:
    """Say how a run stands in the history of its instance."""
    claim, row, change, error = commit.claim, commit.claim.row, commit.change, commit.error
    to = change.step if isinstance(change, _Advance) else row.step if isinstance(change, _Again) else None
    text, traceback = None, None
    if error is not None:
        text, traceback = error
    elif isinstance(change, _End) or (isinstance(change, _Again) and commit.kind == _CRASH):
        text, traceback = change.last_error, change.traceback
    kind = "timeout" if claim.is_timed_out and commit.kind != "cancel" else commit.kind
    return _Entry(
        row.id,
        row.claim,
        row.version,
        row.step,
        row.attempt,
        kind,
        int(claim.began_s * 1000),
        commit.duration * 1000,
        worker,
        text,
        traceback,
        row.state,
        claim.signal_names,
        to,
        row.awaits,
        row.joining,
        first_child,
    )


_PLAIN_TYPES = frozenset({type(None), str, int, float, bool, dict, list})
"""What most jobs return; the rest of what they may is looked at more closely."""


def _log_details(row: _Row) -> dict[str, Any]:
    return {"id": row.id, "fsm": row.fsm, "step": row.step, "attempt": row.attempt}


def _log_attempt(row: _Row, what: str, error: BaseException) -> None:
    message = "instance %d (%s) failed in step %r, attempt %d: %s"
    details = _log_details(row)
    shown = None if isinstance(error, Fail) else (type(error), error, _own_traceback(error))  # a Fail is no surprise
    try:
        _log.warning(message, row.id, row.fsm, row.step, row.attempt, what, exc_info=shown, extra=details)
    except Exception as refusal:  # noqa: BLE001 - a handler's or a filter's; the step's outcome is not to be lost for it
        threading.excepthook(threading.ExceptHookArgs((type(refusal), refusal, refusal.__traceback__, None)))


def _log_late(row: _Row, verdict: _Commit | BaseException) -> None:
    """Tell of an error that a disowned step has come to; an outcome is told of where it is dropped."""
    if isinstance(verdict, BaseException):
        message = "instance %d (%s): step %r, over its timeout, has come to an error, which counts no more: %s"
        _log.info(message, row.id, row.fsm, row.step, _error_text(verdict), exc_info=verdict, extra=_log_details(row))


def _describe(error: BaseException) -> tuple[str, str | None]:
    """Say what a step failed with. Once, and not in the commit: that takes half a millisecond, and runs user code."""
    return _error_text(_reason_of(error)), _traceback_text(error)


def _describe_stop(reason: str | BaseException, failure: tuple[str, str | None] | None) -> tuple[str, str | None]:
    if isinstance(reason, BaseException) and reason.__traceback__ is not None:
        return _describe(reason)
    return _error_text(_reason_of(reason)), None if failure is None else failure[1]


def _timeout_error(claim: _Claim) -> TimeoutError:
    claim.is_timed_out = True
    return TimeoutError(f"step {claim.row.step!r} took over {claim.timeout_s:g} s")


def _on_time(claim: _Claim, verdict: _Commit | BaseException) -> _Commit | BaseException:
    """Hold a step against its timeout, where nobody has noticed before it returned that it is over it."""
    return _timeout_error(claim) if claim.is_late else verdict


def _answered_state(claim: _Claim, ctx: Context[Any], given: Any) -> str:
    """Write the state that `handle` answers with where `migrate` has failed: one of the version of the class.

    One that it neither gives nor changes stays as it is stored, in the version that it is of.
    """
    cls, known = claim.spec.state, claim.row.state
    if given is None:
        left, stored = (_dump_state(cls, one.state, known, one._loaded) for one in (ctx, claim.open_for_handle()))
        if left == stored:
            return known
    text = _dump_state(cls, ctx.state if given is None else given)
    claim.is_migrated = True
    return text


def _move(claim: _Claim, ctx: Context[Any], outcome: Next | Retry | Await | ScheduleChildren) -> _Advance | _Again:
    """Apply an outcome that goes on, with the state as the step leaves it."""
    if claim.row.version == claim.spec.version:
        state = ctx.state if outcome.state is None else outcome.state
        text = _dump_state(claim.spec.state, state, claim.row.state, ctx._loaded)
    else:
        text = _answered_state(claim, ctx, outcome.state)
    claim.ruled_at = claim.services.now()
    return _transition(claim.row, outcome, text, claim.ruled_at)


def _check_next(claim: _Claim, outcome: Next) -> None:
    claim.spec.code(outcome.step)
    if outcome.rate_limit is not None:
        key = cast(str, _limit_key(outcome.rate_limit, "rate_limit"))
        _check_rate(key, outcome.weight, claim.services.policy(_limit_name(key)))


def _shown(ctx: Context[Any]) -> tuple[int, ...]:
    """List the awaited signals that a step was shown: progress consumes these."""
    return ctx._claim.awaited_ids if ctx._claim.inbox else ()


def _rule(claim: _Claim, ctx: Context[Any], outcome: _Outcome, error: BaseException | None = None) -> _Commit:
    """Hold an outcome against the class and its limits and apply it to the row; `error` is what it answers."""
    row, spec = claim.row, claim.spec
    effects, shown = ctx._close(), _shown(ctx)
    failure = None if error is None else _describe(error)
    change: _Change
    children: tuple[_NewRow, ...] = ()
    is_inline = False
    match outcome:
        case Next():
            kind = "next"
            _check_next(claim, outcome)
            change = _move(claim, ctx, outcome)
            is_inline = spec.inline if outcome.inline is None else outcome.inline
        case Done():
            kind = "done"
            change = _done(row, _dump_value(outcome.result, "result"))
        case Retry():
            kind = "retry"
            change = _move(claim, ctx, outcome)
            if failure is not None:
                change = cast(_Again, change)._replace(last_error=failure[0], traceback=failure[1])
        case Await():
            kind = "await"
            spec.code(outcome.then)
            change = _move(claim, ctx, outcome)
            shown = claim.awaited_ids  # where it is `handle` that awaits, too, or it would be woken for them for ever
        case ScheduleChildren():
            kind = "children"
            spec.code(outcome.then)
            children = tuple(claim.services.new_row(child)._replace(parent_id=row.id) for child in outcome.children)
            change = _move(claim, ctx, outcome)
        case Stop():
            kind = "stop"
            said = failure if outcome.reason is error else None
            change = _failed(row, *(said or _describe_stop(outcome.reason, failure)))
    if claim.error is not None and error is not claim.error:  # `handle` has answered it by another
        failure = _describe(claim.error)
    return _Commit(claim, kind, change, effects, shown, children, is_inline, claim.elapsed_s, failure)


def _refuse_outcome(claim: _Claim, ctx: Context[Any], outcome: _Outcome) -> _Commit:
    """Stop a job that returned what only a machine may; what it added to the commit is dropped."""
    ctx._close()
    reason = f"a job may not return {type(outcome).__name__}: only Done, Stop, Retry, Fail, Cancel or a value"
    return _rule(claim, ctx, Stop(reason))


def _rule_of_job(claim: _Claim, ctx: Context[Any], error: Fail | Cancel) -> Retry | Stop:
    if isinstance(error, Cancel):
        return Stop(error.reason)
    return cast(FSM, claim.behaviour)._retry(error.reason, ctx) or Stop(error.reason)


def _is_shortage(error: BaseException) -> bool:
    """Whether something is lacking, where no code of the user's was called: no fault of what a step has returned."""
    return isinstance(error, OSError | ImportError | MemoryError | apsw.Error) or _is_of_storage(error)


def _stop(claim: _Claim, error: BaseException) -> _Commit:
    """End an instance as failed for an error that nobody is left to ask about."""
    change = _failed(claim.row, *_describe(error))
    return _Commit(claim, "stop", change, duration=claim.elapsed_s)


def _ask_handle(claim: _Claim, ctx: Context[Any], error: BaseException) -> Any:
    """Return what the user's `handle` answers, or the `_Commit` that ends the instance for what it raises."""
    _current.set(ctx)
    try:
        with claim.services.fork_guard:
            return cast(FSM, claim.behaviour).handle(cast(Exception, error), ctx)
    except BaseException as second:
        if not _is_of_step(second):
            raise
        return second if claim.spec.is_job and isinstance(second, Fail | Cancel) else _stop(claim, second)


def _handled(claim: _Claim, ctx: Context[Any], error: BaseException) -> _Commit:
    is_job = claim.spec.is_job
    returned = _ask_handle(claim, ctx, error)
    if isinstance(returned, _Commit):
        return returned
    if is_job and isinstance(returned, Fail | Cancel):
        ctx._close()
        return _rule(claim, ctx, _rule_of_job(claim, ctx, returned), returned)
    if is_job and isinstance(returned, _OUTCOMES) and not isinstance(returned, _JOB_OUTCOMES):
        return _refuse_outcome(claim, ctx, returned)
    if not isinstance(returned, _OUTCOMES):
        raise OutcomeError(f"handle returned {_brief(returned)}, which is no outcome") from error
    return _rule(claim, ctx, returned, error)


def _answer(claim: _Claim, ctx: Context[Any], error: BaseException) -> _Commit:
    """Rule on an error: by a retry rule, else by `handle`."""
    if claim.spec.is_job and isinstance(error, Fail | Cancel):
        return _rule(claim, ctx, _rule_of_job(claim, ctx, error), error)
    retry = None if claim.spec.is_job else cast(FSM, claim.behaviour)._retry(error, ctx)
    return _handled(claim, ctx, error) if retry is None else _rule(claim, ctx, retry, error)


def _recover(claim: _Claim, error: BaseException) -> _Commit:
    """Turn a failed attempt into an outcome."""
    if claim.is_lost or claim.services.is_cancelled(claim.row.id):
        return _stop(claim, error)  # which is stale, or ends it as cancelled: `handle` hears nothing of it
    claim = claim.failed_with(error)  # so that a commit that is refused does not come back to `handle`
    if not isinstance(error, Cancel):
        _log_attempt(claim.row, _error_text(_reason_of(error)), error)
    try:
        with claim.services.fork_guard:
            return _answer(claim, claim.open_for_handle(), error)
    except Exception as second:
        if _is_shortage(second):
            raise
        return _stop(claim, second)


def _commit_of(claim: _Claim, verdict: _Commit | BaseException) -> _Commit:
    """Hold what a step has come to against its timeout, and ask `handle` about an error."""
    verdict = _on_time(claim, verdict)
    return verdict if isinstance(verdict, _Commit) else _recover(claim, verdict)


def _read_returned(claim: _Claim, ctx: Context[Any], returned: Any) -> _Commit | BaseException:
    is_job = claim.spec.is_job
    if isinstance(returned, _OUTCOMES):
        is_allowed = not is_job or isinstance(returned, _JOB_OUTCOMES)
        return _rule(claim, ctx, returned) if is_allowed else _refuse_outcome(claim, ctx, returned)
    message = f"step {claim.row.step!r} returned an awaitable: define it with `async def`"
    _refuse_awaitable(returned, message, OutcomeError)
    if not is_job:
        names = ", ".join(one.__name__ for one in _OUTCOMES)
        raise OutcomeError(f"step {claim.row.step!r} returned {_brief(returned)}, which is none of {names}")
    return returned if isinstance(returned, Fail | Cancel) else _rule(claim, ctx, Done(returned))


def _verdict(claim: _Claim, ctx: Context[Any], returned: Any) -> _Commit | BaseException:
    """Read what a step returned; what can't be written, or is an error, is returned for `handle`."""
    try:
        if type(returned) in _PLAIN_TYPES and claim.spec.is_job:  # most jobs: as `_rule` would for Done, in less time
            effects = ctx._close()
            change = _done(claim.row, _dump_value(returned, "result"))
            return _Commit(claim, "done", change, effects, _shown(ctx), (), False, claim.elapsed_s)
        return _read_returned(claim, ctx, returned)
    except Exception as error:
        if _is_shortage(error):
            raise
        return error


def _run_step(claim: _Claim, guard: _ForkGuard) -> _Commit | BaseException:
    """Open a state, run the step, and write what comes of it: the user's code each time, which may fork."""
    claim.started_at, claim.began_s = _Ticks.perf_counter(), claim.services.clock()
    try:
        code = claim.spec.code(claim.row.step)
        ctx = claim.open()
    except Exception as error:
        if _is_shortage(error):
            raise
        return error
    if guard.is_forked:
        guard.leave(None)
    _current.set(ctx)
    try:
        returned = code.call(claim.behaviour, ctx)
    except BaseException as error:
        if not _is_of_step(error):
            raise
        return error
    if guard.is_forked:
        guard.leave(None)
    return _verdict(claim, ctx, returned)


def _execute(claim: _Claim) -> _Commit | BaseException:
    """Run a claimed row's step to the record of its commit, or to an error for `_recover`.

    User code runs here, in `_execute_async` and in `_recover`; what else is raised is the engine's own, and a crash.
    The caller gives each step a copy of its context variables, so what is set in them needs no undoing.
    """
    if claim.error is not None:
        return _recover(claim, claim.error)
    guard = claim.services.fork_guard  # asked, and not entered: that would be two calls more
    verdict = None
    try:
        verdict = _run_step(claim, guard)
        return verdict
    finally:
        if guard.is_forked:
            guard.leave(verdict if isinstance(verdict, BaseException) else sys.exception())


@types.coroutine
def _await_step(step: Awaitable[Any], guard: _ForkGuard) -> Generator[Any, Any, Any]:
    """Await a step; in a child that was forked there, nothing else of the event loop may run while it waits."""
    iterator: Any = step.__await__()
    resume, value = iterator.send, None
    while True:
        try:
            with guard:
                waits_for = resume(value)
        except StopIteration as end:
            return end.value
        try:
            resume, value = iterator.send, (yield waits_for)
        except BaseException as error:  # noqa: BLE001 - thrown in, it is the step's: cancelled, or closed
            resume, value = iterator.throw, error


async def _execute_async(claim: _Claim) -> _Commit | BaseException:
    """Run an `async def` step likewise; a CancelledError is raised, for only the caller knows who has cancelled it."""
    guard = claim.services.fork_guard
    claim.started_at, claim.began_s = _Ticks.perf_counter(), claim.services.clock()
    try:
        with guard:
            code = claim.spec.code(claim.row.step)
            ctx = claim.open()
    except Exception as error:
        if _is_shortage(error):
            raise
        return error
    _current.set(ctx)
    try:
        returned = await _await_step(code.call(claim.behaviour, ctx), guard)
    except Exception as error:
        if _is_of_storage(error):
            raise
        return error
    with guard:
        return _verdict(claim, ctx, returned)


_PAUSE_MS = 1000
"""After so long a step is tried again that the engine itself could not run."""


def _crash(claim: _Claim, error: BaseException) -> _Commit:
    """Record that a step crashed: SystemExit and the like are not for `handle`.

    An error of the engine's own around it, for want of files or memory, or of storage, is nobody's attempt: the step
    runs again a little later, and no limit counts that.
    """
    row, now = claim.row, claim.services.now()
    claim.ruled_at = now
    is_own = isinstance(error, Exception)
    cause = f"crash: {_error_text(error)} {'around' if is_own else 'out of'} step {row.step!r}"
    _log_attempt(row, cause, error)
    trace = None
    with contextlib.suppress(OSError, ImportError, MemoryError):  # it may be these that are wanting
        trace = _traceback_text(error)
    change: _Change
    if is_own and row.cancel_reason is None:
        change = _Again(row.state, row.attempt, row.crashes, now + _PAUSE_MS, cause, trace)
    else:
        change = _crashed(row, cause, now, trace)
    return _Commit(claim, _CRASH, change, duration=claim.elapsed_s)


def _enter(lock: Any) -> Any:
    """Take a lock, as its `__enter__`, and let go of it where an interrupt comes when it has just been taken.

    CPython lets one in between an `__enter__` that is a function in C and what `with` guards, from 3.14 on; behind one
    in Python it does not.
    """
    try:
        return lock.acquire()
    except BaseException:
        try:  # noqa: SIM105 - by one call, for a context manager would let the next interrupt in before it
            lock.release()
        except RuntimeError:
            pass  # it was not taken yet
        raise


class _GuardedLock(_thread.RLock):  # type: ignore[misc]  # final for type checkers alone
    """A reentrant lock, for that knows whether it is this thread which holds it."""

    __enter__: Any = _enter


_is_with_guarded = sys.version_info < (3, 14)
"""Whether nothing comes between the taking of a lock by `with` and its guard."""
_Lock: Callable[[], threading.Lock] = threading.Lock if _is_with_guarded else cast(Any, _GuardedLock)
_ReentrantLock: Callable[[], threading.Lock] = cast(Any, threading.RLock if _is_with_guarded else _GuardedLock)


class _Behaviours:
    """The classes that this engine can run, and the one object of each: as given, or made without arguments."""

    def __init__(self, given: Iterable[object]) -> None:
        self._objects: dict[type, object] = {}
        if not isinstance(given, Iterable):
            raise ValueError(f"fsms must hold FSM classes or objects of them, not be {given!r}")
        for one in given:
            if isinstance(one, FSM):
                if self._objects.setdefault(type(one), one) is not one:
                    raise ValueError(f"fsms must hold one object of a class, not two of {type(one)!r}")
                continue
            cls = one if isinstance(one, type) else getattr(one, "fsm", None)
            if not isinstance(cls, type) or not issubclass(cls, FSM):
                raise ValueError(f"fsms must hold FSM classes or objects of them, not {_brief(one)}")
            if cls is not one:
                _refuse_decorated(one, cls, ValueError)
        self._unusable: set[type] = set()
        self._makers: dict[type, threading.Lock] = {}

    def find(self, name: str, version: int) -> tuple[_Spec, object | None] | None:
        """Return a class's description, and its object if that is made already; None if it can't be run here."""
        spec = self.spec_for(name, version)
        return None if spec is None or spec.cls in self._unusable else (spec, self._objects.get(spec.cls))

    def make(self, cls: type[FSM]) -> object | None:
        """Return the object of a class, made by whoever asks first; None if it can't be: then nothing runs it here."""
        with self._makers.setdefault(cls, _Lock()):
            if cls not in self._objects and cls not in self._unusable:
                try:
                    self._objects[cls] = cls()
                except (Exception, SystemExit):  # noqa: BLE001 - the user's constructor
                    self._unusable.add(cls)
                    message = "%s can't be made without arguments: pass an object of it in Engine(fsms=...)"
                    _log.exception(message, cls)
        return self._objects.get(cls)

    def highest(self, name: str) -> _Spec | None:
        """Return the highest version of a class that can be run here."""
        return self.highest_by_name().get(name)

    def highest_by_name(self) -> dict[str, _Spec]:
        """Return the highest version of each class that can be run here."""
        highest: dict[str, _Spec] = {}
        for (name, version), spec in list(_registry.items()):
            if spec.cls not in self._unusable and (name not in highest or version > highest[name].version):
                highest[name] = spec
        return highest

    def known(self) -> str:
        """List what can be run, as JSON for a statement."""
        specs = list(_registry.items())
        usable = [(name, version, spec) for (name, version), spec in specs if spec.cls not in self._unusable]
        return _encode([(name, 0 if spec.migrates else version, version) for name, version, spec in usable])

    def spec_for(self, name: str, version: int) -> _Spec | None:
        """Return the class of a version, or the highest, if none is registered for that one and it migrates."""
        exact = _registry.get((name, version))
        if exact is not None:
            return exact
        highest = self.highest(name)
        return highest if highest is not None and highest.migrates and version < highest.version else None


def _died(claim: _Claim) -> _Commit:
    """Record the crash of a step whose thread has ended without saying what the step has come to."""
    row, now = claim.row, claim.services.now()
    claim.ruled_at = now
    change = _crashed(row, f"crash: the thread that ran step {row.step!r} has died", now, None)
    return _Commit(claim, _CRASH, change)


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Say in words that a module of Python's own can't be loaded: no descriptor is free, or there is no right to."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise DurableError(f"an engine can't load what it needs of Python's library: {error}") from error


def _load_what_steps_need() -> None:
    """Load now what a step would be the first to need: by then there may be no file, or no right, to load it with."""
    with _loading():
        _lenient()
        traceback.format_list([("", 1, "", "")])  # which loads what it shows a frame with, from Python 3.15 on
        if any(spec.has_async for spec in list(_registry.values())):
            import asyncio  # noqa: F401 - it takes 30 ms, so only where there is a use for it


# ==================================================================================================
# Threads
# ==================================================================================================


def _hand_over(take: Callable[[], _One], count: int, put: Callable[[Iterable[_One]], object]) -> None:
    """Move so many things from one container to another.

    By one call of the interpreter's own: what is raised in a thread from outside, by a signal's handler or by another
    thread, comes before or after it, and finds each of them in one of the two.
    """
    put(map(operator.call, itertools.repeat(take, count)))


class _WakeUp:
    """Wakes one sleeping thread; set while nobody sleeps, it cuts the next sleep short.

    A bare lock: 16 us from set to wake-up, where `threading.Event` takes 30.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        if not self._is_set:  # the lock itself does not tell: it is taken again as soon as the sleeper is woken
            self._is_set = True
            try:  # noqa: SIM105 - a context manager takes longer than the rest
                self._lock.release()
            except RuntimeError:
                pass  # somebody else set it in between

    def wait(self, timeout: float = -1) -> bool:
        """Sleep until it is set; False if the timeout, in seconds, was first."""
        timeout = min(timeout, threading.TIMEOUT_MAX)
        try:
            return self._lock.acquire(timeout=timeout)
        finally:  # also after an interrupt: nobody would set it any more
            self._is_set = False


class _Worker:
    """A thread of a pool, and what it runs."""

    __slots__ = ("claim", "made_at", "thread", "wake_up")

    START_S = 1.0
    """After so long a thread that has not started won't: whoever was to start it was interrupted."""

    def __init__(self, serve: Callable[[_Worker], None], context: contextvars.Context) -> None:
        self.wake_up = _WakeUp()
        self.claim: _Claim | None = None
        """What it has taken last: that has crashed if the thread ends before it does."""
        self.made_at = _Ticks.monotonic()
        self.thread = threading.Thread(target=context.run, args=(serve, self), name="durable-worker", daemon=True)

    @property
    def is_dead(self) -> bool:
        """Whether its thread has ended, or does not come to start."""
        has_run = self.thread.ident is not None
        return not self.thread.is_alive() and (has_run or _Ticks.monotonic() - self.made_at > self.START_S)


class _Pool:
    """The worker threads of one queue, and the claimed rows that wait for one.

    A thread that takes a row rouses the next if there is more to take, and one at a time is on its way: steps that
    block start one after the other at once. A thread that finds nothing more to take runs the beat that commits what
    is finished, and goes on with what that beat claims.

    After a run of quick steps no other thread is roused, since waking one costs more than several such steps; if one
    blocks after all, the scheduler notices within `LOOK_S`.

    Who runs what is kept as sets: so nothing is counted twice or not at all, wherever a thread is interrupted or dies.
    """

    QUICK_S = 0.0001
    """A step that takes no longer is not worth a second thread."""
    QUICK_STEPS = 8
    """After so many more quick than slow ones the next is taken for a quick one, too."""
    BLOCKED_S = 0.001
    """After so long a step that was taken for a quick one is known for none."""

    def __init__(self, width: int, shared: _Shared) -> None:
        self.width = width
        self._shared = shared
        self._outcomes = shared.outcomes
        self._lock = _Lock()
        self._ready: collections.deque[_Claim] = collections.deque()
        self._withheld: list[_Claim] = []
        """What a beat under way has taken back."""
        self._running: set[_Claim] = set()
        self._workers: set[_Worker] = set()
        self._idle: dict[_Worker, None] = {}
        self._arriving: set[_Worker] = set()
        """Threads that will look for work in a moment: roused, or in a beat. What is finished is left to them."""
        self._quick_steps = 0
        self._is_quick = False
        self._taken_at = 0.0
        self._is_closed = False

    # What others hand in and take back

    def submit(self, claims: collections.deque[_Claim], *, first: bool = False) -> None:
        """Take over claimed rows, each of them once, wherever that is interrupted."""
        with self._lock:
            if first:
                _hand_over(claims.pop, len(claims), self._ready.extendleft)
            else:
                _hand_over(claims.popleft, len(claims), self._ready.extend)
        self.rouse()

    def withhold(self, instance: int | None = None) -> list[_Claim]:
        """Keep what has not started, or one row of it, from starting, until it is put back or released.

        An attempt that waits for `handle` has started.
        """
        with self._lock:
            found = [one for one in self._ready if one.error is None and instance in (None, one.row.id)]
            if found:
                left = collections.deque(claim for claim in self._ready if claim not in found)
                self._ready, self._withheld = left, self._withheld + found  # at once: nothing comes in between
        return found

    def put_back(self) -> None:
        """Let what was withheld start after all."""
        if self._withheld:
            with self._lock:
                self._ready, self._withheld = collections.deque([*self._withheld, *self._ready]), []
            self.rouse()

    def release(self) -> None:
        """Forget what was withheld: others have it."""
        self._withheld = []

    def unstarted(self) -> list[_Row]:
        with self._lock:
            return [claim.row for claim in self._ready if claim.error is None]

    def disown(self, claim: _Claim, error: BaseException) -> bool:
        """Let a step that is over its timeout go: its thread is replaced, its late outcome dropped."""
        with self._lock:
            if claim.is_finished or claim not in self._running:
                return False
            self._ready.appendleft(claim.failed_with(error))
            claim.is_disowned = True
            self._running.discard(claim)
            self._workers = {worker for worker in self._workers if worker.claim is not claim}
        self.rouse()
        return True

    def finish(self, worker: _Worker, claim: _Claim, commit: _Commit | None) -> bool:
        """Take what a step in one of these threads has come to. False if the step was disowned."""
        with self._lock:
            if commit is None or claim not in self._running:
                return False
            self._outcomes.append(commit)  # first: from here on, a thread that dies leaves an outcome and no crash
            self._end(claim)
            was_quick = self._is_quick
            if claim.error is None:  # else the step ran elsewhere, and only `handle` here
                self._count_step(commit.duration)
            is_last = not self._ready
            # The scheduler looks at a pool that it has seen quick: one that turns so has to be shown to it.
            is_minded = bool(self._arriving) or (was_quick and self._is_quick)
            if is_last:
                self._arriving.add(worker)
        if is_last:
            self._shared.commit()
            self._arrive(worker)
        elif not is_minded:
            self._shared.wake_up.set()
        return True

    def finish_async(self, claim: _Claim, result: _Commit | BaseException) -> bool:
        """Take the result of a step on the event loop: a commit, or an error for `handle`. False if disowned."""
        with self._lock:
            if claim not in self._running:
                return False
            if isinstance(result, BaseException):
                self._ready.appendleft(claim.failed_with(result))
            else:
                self._outcomes.append(result)
            self._end(claim)
        self._shared.wake_up.set()
        self.rouse()
        return True

    def _end(self, claim: _Claim) -> None:
        claim.is_finished = True
        self._running.discard(claim)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle = list(self._idle)
        for worker in idle:
            worker.wake_up.set()

    # What the scheduler looks after

    @property
    def will_beat(self) -> bool:
        """Whether one of these threads is about to run a beat, unless its step blocks."""
        return bool(self._arriving) or (self._is_quick and bool(self._running))

    @property
    def may_be_blocked(self) -> bool:
        """Whether rows, or outcomes, may come to wait behind a step that blocks after quick ones."""
        running = len(self._running)
        is_behind = running > 1 or bool(self._ready) or (running > 0 and bool(self._outcomes))
        return self._is_quick and (is_behind or bool(self._arriving))

    def look(self) -> None:
        """See whether a thread that was to take one row after the other has come to a step that blocks."""
        if self._is_quick and _Ticks.perf_counter() - self._taken_at > self.BLOCKED_S:
            self._quick_steps, self._is_quick = 0, False
        self.rouse()

    def replace_dead(self) -> None:
        """Have threads replaced that died without saying so, and those woken whose wake-up was interrupted."""
        for worker in [worker for worker in list(self._workers) if worker.is_dead]:
            self._retire(worker)
        for worker in list(self._arriving):
            worker.wake_up.set()

    def _retire(self, worker: _Worker) -> None:
        """Count a thread out that ends. What it had taken and has not finished has crashed; it may be done twice."""
        claim = worker.claim
        with self._lock:
            if claim in self._running:
                if claim not in self._ready:
                    self._outcomes.append(_died(claim))
                self._end(claim)
            self._workers.discard(worker)
            self._idle.pop(worker, None)
            self._arriving.discard(worker)
        if not self._is_closed:
            self._shared.wake_up.set()
            self.rouse()

    def _count_step(self, duration_s: float) -> None:
        """Once slow is chance, a thread has to wait for the interpreter now and then; twice is not."""
        if duration_s > self.QUICK_S:
            self._quick_steps //= 2
        elif self._quick_steps < 2 * self.QUICK_STEPS:
            self._quick_steps += 1
        self._is_quick = self._quick_steps >= self.QUICK_STEPS

    def rouse(self) -> None:
        """Wake a thread, or start one, if there is something that may start and nobody about to take it."""
        with self._lock:
            is_coming = self._arriving or (self._running and self._is_quick)
            if is_coming or self._is_closed or not self._ready or len(self._running) >= self.width:
                return
            if self._idle:
                worker = next(reversed(self._idle))
                is_new = False
            elif len(self._workers) < self.width:
                worker = _Worker(self._serve, self._shared.context.copy())
                self._workers.add(worker)
                is_new = True
            else:
                return
            self._arriving.add(worker)
            self._idle.pop(worker, None)
        if is_new:
            self._start(worker)
        else:
            worker.wake_up.set()

    def _start(self, worker: _Worker) -> None:
        try:
            worker.thread.start()
        except RuntimeError as error:  # the system has no more; the scheduler rouses the pool again now and then
            self._shared.log_soon("no worker thread could be started", error)
            with self._lock:
                self._workers.discard(worker)
                self._arriving.discard(worker)

    # What the threads do

    def _serve(self, worker: _Worker) -> None:
        try:
            self._work(worker)
        except BaseException as error:  # noqa: BLE001 - from outside, in the engine's own code: it is told and replaced
            self._shared.log_soon("a worker thread has died, and is replaced", error, exc_info=error)
        finally:
            self._retire(worker)

    def _work(self, worker: _Worker) -> None:
        """Run rows until the pool closes; a thread whose step was disowned has been replaced and leaves."""
        self._arrive(worker)
        while not self._is_closed:
            claim = self._take(worker)
            if claim is None:
                worker.wake_up.wait()
                self._arrive(worker)
            elif (claim.behaviour is None or claim.row.version != claim.spec.version) and not self._prepare(
                worker, claim
            ):
                continue
            elif claim.is_async:
                self._shared.run_async(claim, self)
                worker.claim = None  # it is the event loop's
            elif not self.finish(worker, claim, contextvars.copy_context().run(self._run, claim)):
                self._shared.drop(claim)
                return

    def _prepare(self, worker: _Worker, claim: _Claim) -> bool:
        """Get a claim ready, which decides whose turn it is; False if there is nothing to run."""
        try:
            is_ready = contextvars.copy_context().run(claim.prepare, self._shared.behaviours.make)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like, as out of a step
            self.finish(worker, claim, _crash(claim, error))
            return False
        if not is_ready:
            self._shared.give_back(claim)
            with self._lock:
                self._end(claim)
        return is_ready

    def _arrive(self, worker: _Worker) -> None:
        """Be there to take rows. First commit what was finished by then, in the trust that this thread would."""
        with self._lock:
            self._arriving.discard(worker)
            self._idle.pop(worker, None)  # it may have been woken without being told so
        if self._outcomes and not self._shared.commit():
            self._shared.wake_up.set()  # whoever is in a beat may have counted on this thread

    def _take(self, worker: _Worker) -> _Claim | None:
        """Take the next row, or line up for being roused."""
        with self._lock:
            if not self._ready or len(self._running) >= self.width:
                if not self._is_closed:
                    self._idle[worker] = None
                else:
                    worker.wake_up.set()
                return None
            claim = worker.claim = self._ready[0]
            self._running.add(claim)  # before it leaves: whoever looks without the lock must not find neither
            self._ready.popleft()
            self._taken_at = _Ticks.perf_counter()
            has_more = bool(self._ready) and not self._is_quick and not claim.is_async
        if has_more:
            self.rouse()
        return claim

    def _run(self, claim: _Claim) -> _Commit | None:
        """Run a step; None if it was disowned: whatever it has come to, an error too, is nothing to `handle`."""
        try:
            is_timed = claim.spec.has_timeouts and claim.timeout_s is not None and claim.error is None
            if is_timed:
                self._shared.timeouts.add(claim, self)
            verdict = _execute(claim)
            if isinstance(verdict, _Commit) and not is_timed:
                return verdict
            if not self._has_ended_in_time(claim):
                _log_late(claim.row, verdict)
                return None
            return _commit_of(claim, verdict)
        except BaseException as error:  # noqa: BLE001 - SystemExit and the like: the thread survives
            return _crash(claim, error)

    def _has_ended_in_time(self, claim: _Claim) -> bool:
        """Whether a step was not disowned; from now on it can't be: `handle` is no part of its `timeout`."""
        with self._lock:
            claim.is_finished = not claim.is_disowned
            return claim.is_finished


class _LogCopier:
    """Copies a log that has become long, in a thread of its own: it takes a second for 300 MB.

    While somebody reads for long the log can't be copied; when he is through, no beat should have to wait for it.
    """

    PAUSE_S = 1.0
    """How often it is tried, at most."""

    def __init__(
        self, store: _Store, reader: _Reader, synchronous: str, log: Callable[[str, BaseException], None]
    ) -> None:
        self._store = store
        self._reader = reader
        self._synchronous = synchronous
        self._log = log
        self._thread: threading.Thread | None = None
        self._next_at = -math.inf

    def look(self, *, is_aside: bool) -> None:
        """Have the log copied once it is large: here, or in a thread if that takes long and there may be one."""
        if self._store.is_log_long and is_aside:
            self._start()
            return
        refusal = self._store.checkpoint()
        if refusal is not None:
            self._log("its write-ahead log could not be copied yet", refusal)

    def _start(self) -> None:
        """Have a thread copy it, unless one does or has just tried."""
        if _Ticks.monotonic() < self._next_at or (self._thread is not None and self._thread.is_alive()):
            return
        self._next_at = _Ticks.monotonic() + self.PAUSE_S
        thread = threading.Thread(target=self._copy, name="durable-checkpoint", daemon=True)
        with contextlib.suppress(RuntimeError):  # the system has no more; it is tried again
            thread.start()
            self._thread = thread

    def wait(self) -> None:
        """Wait for the end of a copying that is under way."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> None:
        store, copied, error = self._store, -1, None
        try:
            with self._reader.reading() as connection:
                _configure(connection, self._synchronous)
                while store.is_log_long and store.copied_pages > copied and error is None:
                    copied, error = store.copied_pages, store.copy_log(connection)
        except DurableError as refusal:
            _log.warning("%s: its write-ahead log could not be copied yet: %s", store.path, refusal)
        if error is not None:
            _log.warning("%s: its write-ahead log could not be copied yet: %s", store.path, _error_text(error))


def _end_tasks(loop: asyncio.AbstractEventLoop, tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks of a loop that is not running, and run it until they are gone."""
    import asyncio

    for task in tasks:
        task.cancel()
    ends = loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True)) if tasks else ()
    for task, end in zip(tasks, ends, strict=True):
        if isinstance(end, Exception):
            _log.error("a task on the event loop failed while it ended: %r", task, exc_info=end)


class _EventLoop:
    """A thread with an asyncio loop for `async def` steps, started when the first one is claimed."""

    def __init__(self, shared: _Shared) -> None:
        import asyncio  # 30 ms that only users of async steps pay

        self._shared = shared
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[_Claim, asyncio.Task[None]] = {}
        self._incoming: collections.deque[tuple[_Claim, _Pool]] = collections.deque()
        self._is_roused = False
        self._is_closing = False
        context = shared.context.copy()
        self._thread = threading.Thread(target=context.run, args=(self._serve,), name="durable-asyncio", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._loop.close()
            raise

    def submit(self, claim: _Claim, pool: _Pool) -> None:
        self._incoming.append((claim, pool))
        if not self._is_roused:
            self._is_roused = True
            self._loop.call_soon_threadsafe(self._accept)

    def cancel(self, claim: _Claim) -> None:
        self._loop.call_soon_threadsafe(lambda: claim in self._tasks and self._tasks[claim].cancel())

    def running(self) -> list[_Claim]:
        """List the claims whose steps run."""
        return list(self._tasks)

    @property
    def is_dead(self) -> bool:
        """Whether its thread has ended, which nobody has told to."""
        return not (self._thread.is_alive() or self._is_closing)

    def unfinished(self) -> list[_Claim]:
        """List the claims whose steps run, or are to be started."""
        return [*self._tasks, *(claim for claim, _ in list(self._incoming))]

    def rouse(self) -> None:
        """Have steps started whose wake-up was interrupted."""
        if self._incoming:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._accept)

    def close(self, timeout_s: float = 2.0) -> None:
        """Cancel what still runs, wait for it to be gone, and stop."""
        self._is_closing = True
        with contextlib.suppress(RuntimeError):  # its thread has died
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.warning("an async step does not let itself be cancelled: it is left behind")

    def _serve(self) -> None:
        import asyncio

        asyncio.set_event_loop(self._loop)
        try:
            self._run_until_closing()
            _end_tasks(self._loop, list(self._tasks.values()))
            _end_tasks(self._loop, asyncio.all_tasks(self._loop))  # what steps have left behind
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _run_until_closing(self) -> None:
        while not self._is_closing:
            try:
                self._loop.run_forever()
            except BaseException:  # noqa: BLE001 - SystemExit out of a task of the user's own: other steps go on
                _log.exception("the event loop was interrupted; it goes on")

    def _accept(self) -> None:
        self._is_roused = False  # first: what is added from now on rouses again
        try:
            while self._incoming:
                claim, pool = self._incoming[0]
                if claim not in self._tasks and not claim.is_finished:
                    self._start_task(claim, pool)
                self._incoming.popleft()
        except BaseException:
            self._loop.call_soon(self._accept)
            raise

    def _start_task(self, claim: _Claim, pool: _Pool) -> None:
        if claim.timeout_s is not None:
            self._shared.timeouts.add(claim, pool)
        task = self._loop.create_task(self._run(claim, pool), context=self._shared.context.copy())
        self._tasks[claim] = task
        task.add_done_callback(lambda _: self._end(claim, pool))

    def _end(self, claim: _Claim, pool: _Pool) -> None:
        """See whether a task that has ended has said what its step has come to; else that has crashed."""
        self._tasks.pop(claim, None)
        if not (claim.is_finished or claim.is_disowned or self._is_closing):
            pool.finish_async(claim, _died(claim))

    async def _run(self, claim: _Claim, pool: _Pool) -> None:
        import asyncio

        task = cast("asyncio.Task[None]", asyncio.current_task())
        if self._tasks.setdefault(claim, task) is not task:  # not there yet: an eager task, which is being made
            return  # whoever started it was interrupted, and has started another
        result: _Commit | BaseException
        try:
            result = _on_time(claim, await _execute_async(claim))
        except BaseException as error:
            if self._is_closing:
                raise  # the row is given back, its step was cancelled and not abandoned
            # One that was cancelled for its timeout is disowned: what it comes to is dropped.
            is_its_own = isinstance(error, asyncio.CancelledError) and not self._is_interrupted(claim, task)
            result = error if is_its_own else _crash(claim, error)
        finally:
            self._tasks.pop(claim, None)
        if not pool.finish_async(claim, result):
            self._shared.drop(claim)

    def _is_interrupted(self, claim: _Claim, task: asyncio.Task[None]) -> bool:
        """Whether somebody has cancelled a step's task who is neither this engine nor the step."""
        return False


class _CallersLoop(_EventLoop):
    """The running loop of whoever started the engine, so that its clients and locks work in steps."""

    def __init__(self, shared: _Shared, loop: asyncio.AbstractEventLoop) -> None:
        self._shared = shared
        self._loop = loop
        self._tasks = {}
        self._incoming = collections.deque()
        self._is_roused = self._is_closing = False
        self._gone = threading.Event()

    @property
    def is_dead(self) -> bool:
        return False  # it is its owner's to look after

    def close(self, timeout_s: float = 2.0) -> None:
        """Cancel what still runs, and wait for it to be gone, unless this is the loop's own thread."""
        self._is_closing = True
        try:
            self._loop.call_soon_threadsafe(self._cancel_all)
        except RuntimeError:  # it is closed, and its tasks with it
            return
        if not self._is_current() and not self._gone.wait(timeout_s):
            _log.warning("an async step does not let itself be cancelled: it is left behind")

    def _is_current(self) -> bool:
        import asyncio

        return asyncio._get_running_loop() is self._loop

    def _cancel_all(self) -> None:
        import asyncio

        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        gone = asyncio.ensure_future(asyncio.gather(*tasks, return_exceptions=True))
        gone.add_done_callback(lambda _: self._gone.set())

    def _is_interrupted(self, claim: _Claim, task: asyncio.Task[None]) -> bool:
        """As `asyncio.run` cancels all tasks at its end: that is none of the step's errors, it runs again."""
        return not claim.is_cancelled and task.cancelling() > 0


class _Waiter:
    """A thread that waits for an instance to get into one of some statuses."""

    __slots__ = ("done", "instance", "until", "wake_up")

    def __init__(self, instance: int, until: tuple[Status, ...]) -> None:
        self.instance = instance
        self.until = until
        self.wake_up = _WakeUp()
        self.done: _End | None = None
        """How it is done, if this engine's commit did it: nobody has to read that. One that failed may run again."""


class _ResultWaiter:
    """A future of an instance's result, which waits like a thread; nothing keeps it once nobody refers to it."""

    __slots__ = ("_look", "done", "future", "instance", "until", "wake_up")

    def __init__(self, instance: int, future: Any, look: Callable[[_ResultWaiter], object], forget: Any) -> None:
        self.instance = instance
        self.until = _TERMINAL
        self.wake_up = self
        self.done: _End | None = None
        self.future = weakref.ref(future, lambda _: forget(self))
        self._look = look

    def set(self) -> None:
        """See how it has ended: not here, which may be within a beat."""
        future = self.future()
        if future is not None:
            future._dispatcher.post_apart(functools.partial(self._look, self))


class _Waiters:
    """Threads that wait for instances to get somewhere; they are woken by the commit that brings them there."""

    def __init__(self) -> None:
        self._lock = _ReentrantLock()  # a future may be collected, and so removed, while it is held
        self._of: dict[int, list[_Waiter | _ResultWaiter]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    @contextlib.contextmanager
    def waiting(self, instance: int, until: tuple[Status, ...]) -> Iterator[_Waiter]:
        waiter = _Waiter(instance, until)
        try:
            self.add(waiter)
            yield waiter
        finally:
            self.remove(waiter)

    def add(self, waiter: _Waiter | _ResultWaiter) -> None:
        with self._lock:
            self._of.setdefault(waiter.instance, []).append(waiter)

    def remove(self, waiter: _Waiter | _ResultWaiter) -> None:
        with self._lock:
            others = [one for one in self._of.pop(waiter.instance, ()) if one is not waiter]
            if others:
                self._of[waiter.instance] = others

    def futures(self) -> list[_ResultWaiter]:
        with self._lock:
            return [one for waiters in self._of.values() for one in waiters if isinstance(one, _ResultWaiter)]

    def ids(self) -> list[int]:
        with self._lock:
            return list(self._of)

    def notify(self, settled: Iterable[tuple[int, str, _End | None]]) -> None:
        for instance, status, done in settled:
            for waiter in tuple(self._of.get(instance, ())):  # who wakes leaves the list
                if status in waiter.until:
                    waiter.done = done
                    waiter.wake_up.set()

    def wake_all(self) -> None:
        with self._lock:
            waiting = [one for waiters in self._of.values() for one in waiters if isinstance(one, _Waiter)]
        for waiter in waiting:
            waiter.wake_up.set()


class _Dispatcher:
    """Calls subscribers, callbacks of futures and handlers of the log, one after the other; what they raise is logged.

    It has a thread of its own, so that one which waits or takes long holds up no work.
    """

    def __init__(self, guard: _ForkGuard) -> None:
        self._guard = guard
        self._subscribers: dict[object, tuple[Callable[[Event], object], frozenset[str]]] = {}
        self.wanted: frozenset[str] = frozenset()
        """The events that somebody has subscribed to."""
        self._calls: collections.deque[Callable[[], object]] = collections.deque()
        self.pinned: set[concurrent.futures.Future[Any]] = set()
        """Futures that callbacks wait for."""
        self._wake_up = _WakeUp()
        self._lock = _Lock()
        self._thread: threading.Thread | None = None
        self._is_running = self._is_short = False

    def subscribe(self, callback: Callable[[Event], object], names: tuple[str, ...]) -> Callable[[], None]:
        for name in names:
            if name not in sorted(_EVENT_NAMES):  # looked through: what can't be hashed is none, either
                raise ValueError(f"unknown event {name!r}; known are {', '.join(sorted(_EVENT_NAMES))}")
        _check_callback(callback, "callback")
        token = object()
        self._subscribers[token] = callback, frozenset(names) or _EVENT_NAMES
        self._update()

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)
            self._update()

        return unsubscribe

    def wants(self, name: str) -> bool:
        return name in self.wanted

    def publish(self, events: Iterable[Event]) -> None:
        """Tell the subscribers, soon."""
        for event in events:
            self.post(self.call_for(event))

    def call_for(self, event: Event) -> Callable[[], None]:
        """Make what tells the subscribers of an event."""
        return functools.partial(self._tell, event)

    def post(self, call: Callable[[], object]) -> None:
        """Have something called: by the thread while the engine runs, else by the next `flush`."""
        self._calls.append(call)
        if self._is_running:
            self._rouse()

    def take_over(self, calls: collections.deque[Callable[[], object]], *, is_apart: bool = False) -> None:
        """Have all of these called, and none twice, wherever the handing over is interrupted."""
        _hand_over(calls.popleft, len(calls), self._calls.extend)
        if self._is_running or is_apart:
            self._rouse()

    def post_apart(self, call: Callable[[], object]) -> None:
        """Have something called by the thread, also of an engine that does not run."""
        self._calls.append(call)
        self._rouse()

    def flush(self) -> None:
        """Call here and now what waits for it, unless there is a thread that will, or one can be had."""
        if self._calls:
            if self._is_running and not self._has_thread():
                self._rouse()
            with self._lock:
                is_minded = self._has_thread()
            if not is_minded:
                self._call_all()

    def _has_thread(self) -> bool:
        """Whether there is a thread which has not died of an interrupt."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether this is the thread that calls them."""
        return self._thread is threading.current_thread()

    def start(self) -> None:
        self._is_running = True

    def stop(self, timeout_s: float = 5.0) -> None:
        """Call what is left, and end the thread."""
        self._is_running = False
        thread = self._thread
        if thread is not None and not self.is_current:
            self._wake_up.set()
            thread.join(timeout_s)
            if thread.is_alive():
                _log.warning("a callback does not come to its end: it is left behind")
        self._call_all()

    def _rouse(self) -> None:
        with self._lock:
            if not self._has_thread():
                self._start_thread()
        self._wake_up.set()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="durable-events", daemon=True)
        try:
            self._thread.start()
            self._is_short = False
        except BaseException as error:
            self._thread = None  # if it has started nevertheless, it finds out
            if not isinstance(error, RuntimeError):
                raise
            if not self._is_short:  # said once: a handler of the log may make the next call, which tries again
                self._is_short = True
                self._calls.append(functools.partial(_log.error, "no thread for callbacks: %s", error))

    def _update(self) -> None:
        self.wanted = frozenset().union(*(names for _, names in list(self._subscribers.values())))

    def _serve(self) -> None:
        with self._lock:
            is_wanted = self.is_current
        while is_wanted:  # an interrupt may end it: the next call starts another
            self._call_all()
            with self._lock:
                if self._calls:
                    continue
                if not self._is_running:
                    self._thread = None
                    return
            self._wake_up.wait()

    def _call_all(self) -> None:
        while self._calls:
            try:
                call = self._calls.popleft()
            except IndexError:
                return
            self._call("%s failed", getattr(call, "func", call), call)

    def _tell(self, event: Event) -> None:
        for callback, names in list(self._subscribers.values()):
            if event.name in names:
                self._call("a subscriber to %r failed", event.name, functools.partial(callback, event))

    def _call(self, message: str, what: object, call: Callable[[], object]) -> None:
        """Call the user's code and log whatever it raises, but for an interrupt of a thread that is not for this."""
        try:
            with self._guard if self.is_current else contextlib.nullcontext():
                call()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not self.is_current:
                raise
            _log.exception(message, what)


if TYPE_CHECKING:
    _Settled = typing.TypeVar("_Settled")

    class _Future(concurrent.futures.Future[_Settled]):
        """The engine's futures: those of `concurrent.futures`, which can also be awaited."""

        def settle(self, value: _Settled, error: BaseException | None) -> None: ...
        def __await__(self) -> Generator[Any, None, _Settled]: ...


class _Condition(threading.Condition):
    """A condition that no interrupt leaves locked: as functions in Python these would let one in between."""

    __enter__ = property(operator.attrgetter("_lock.__enter__")) if _is_with_guarded else _enter
    __exit__ = property(operator.attrgetter("_lock.__exit__"))


def _go_on(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _tell_waiting(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None], _: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
        loop.call_soon_threadsafe(_go_on, waiting)


def _forget_waiting(future: Any, tell: Callable[[concurrent.futures.Future[Any]], object]) -> None:
    """Take a callback back, or a future that is awaited with a time-out, again and again, would grow."""
    with future._condition:
        if not future.done():  # else they are being called, and no list to take one out of
            future._done_callbacks.remove(tell)


def _await_future(future: concurrent.futures.Future[Any]) -> Generator[Any, None, Any]:
    """Wait for one in the running loop; who is cancelled while he waits leaves it to the others."""
    import asyncio
    import concurrent.futures

    loop = asyncio.get_running_loop()
    waiting = loop.create_future()
    tell = functools.partial(_tell_waiting, loop, waiting)
    concurrent.futures.Future.add_done_callback(future, tell)
    try:
        yield from waiting
    except BaseException:
        _forget_waiting(future, tell)
        raise
    if future.cancelled():
        raise asyncio.CancelledError  # that of `concurrent.futures` is an error to asyncio
    return future.result()


@functools.cache
def _future_type() -> Any:
    """Make the class of the engine's futures: their done-callbacks are the dispatcher's to run, not the beat's."""
    import concurrent.futures  # only users of futures pay for it

    class Future(concurrent.futures.Future[Any]):
        def __init__(self, dispatcher: _Dispatcher) -> None:
            super().__init__()
            made, self._condition = self._condition, _Condition.__new__(_Condition)
            self._condition.__dict__ = made.__dict__  # to make a second one would take as long as all the rest
            self._dispatcher = dispatcher

        def add_done_callback(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
            """Have it called with the future when it is done; at once if it is."""
            if self.done():
                super().add_done_callback(fn)
            else:
                self._dispatcher.pinned.add(self)  # until it is called: nobody else may refer to it
                call: collections.deque[Callable[[], object]] = collections.deque([functools.partial(self._call, fn)])
                super().add_done_callback(lambda _: self._dispatcher.take_over(call, is_apart=True))

        def settle(self, value: Any, error: BaseException | None) -> None:
            """Tell whoever waits how it has ended. May be done twice."""
            try:
                if error is None:
                    self.set_result(value)
                else:
                    self.set_exception(error)
            except concurrent.futures.InvalidStateError:
                # By somebody whom it does not belong to, or here, where an interrupt came before all were told: no
                # public call does that for a future that is settled.
                with self._condition:
                    self._condition.notify_all()
                cast(Any, self)._invoke_callbacks()

        def _call(self, fn: Callable[[concurrent.futures.Future[Any]], object]) -> None:
            self._dispatcher.pinned.discard(self)
            fn(self)

        __await__ = _await_future

    return Future


class _Timeouts:
    """The running steps that have a timeout, by the instant at which it is over."""

    def __init__(self, wake_up: _WakeUp) -> None:
        self._wake_up = wake_up
        self._lock = _Lock()
        self._heap: list[tuple[float, int, _Claim, _Pool]] = []
        self._room = 64
        self.next_at = math.inf
        """Monotonic seconds."""

    def add(self, claim: _Claim, pool: _Pool) -> None:
        """Mind a step from now on."""
        deadline = _Ticks.monotonic() + cast(float, claim.timeout_s)
        with self._lock:
            if len(self._heap) >= self._room:  # steps that ended long before their deadline must not pile up
                self._heap = [entry for entry in self._heap if not entry[2].is_finished]
                heapq.heapify(self._heap)
                self._room = 64 + 2 * len(self._heap)
            heapq.heappush(self._heap, (deadline, id(claim), claim, pool))
            self.next_at = self._heap[0][0]
        if deadline == self.next_at:
            self._wake_up.set()

    def take_expired(self, monotonic: float) -> list[tuple[_Claim, _Pool]]:
        expired = []
        with self._lock:
            while self._heap and self._heap[0][0] <= monotonic:
                expired.append(heapq.heappop(self._heap)[2:])
            self.next_at = self._heap[0][0] if self._heap else math.inf
        return expired


class _Shared:
    """What the runners of an engine have in common: what they run steps with, and where they put the outcomes."""

    commit: Callable[[], bool]
    """Commits the outcomes, and claims, in the calling thread; False if somebody else is at it, or it failed."""
    give_back: Callable[[_Claim], None]
    """Lets others have a row whose class turns out not to be runnable here."""
    run_async: Callable[[_Claim, _Pool], None]
    """Runs a step on the event loop."""

    def __init__(self, path: str, services: _Services, behaviours: _Behaviours, dispatcher: _Dispatcher) -> None:
        self.path = path
        self.services = services
        self.behaviours = behaviours
        self.dispatcher = dispatcher
        self.context = contextvars.copy_context()
        """That of whoever started the engine: threads and tasks have copies of it."""
        self.outcomes: collections.deque[_Commit] = collections.deque()
        """What steps have come to, to be committed."""
        self.wake_up = _WakeUp()
        """Wakes the thread that looks after everything."""
        self.wakes_at = 0.0
        """Until when that thread sleeps, unless it is woken; while it does not, for ever: so whoever beats wakes it."""
        self.timeouts = _Timeouts(self.wake_up)
        self.is_stopping = self.is_closed = False

    def log_soon(self, what: str, error: BaseException, exc_info: BaseException | None = None) -> None:
        """Log an error, but not under a lock: what handlers of the log do is not for a beat's time."""
        text = _error_text(error)
        self.dispatcher.post(functools.partial(_log.error, "%s: %s: %s", self.path, what, text, exc_info=exc_info))

    def drop(self, claim: _Claim) -> None:
        """Tell that a step which was disowned has ended after all: its outcome is stale."""
        row = claim.row
        if self.dispatcher.wants("outcome.stale"):
            self.dispatcher.publish([Event("outcome.stale", {}, {"id": row.id, "fsm": row.fsm, "step": row.step})])


# ==================================================================================================
# Beat
# ==================================================================================================


class _Request:
    """Something that a caller wants done in the next beat, and the answer to it."""

    __slots__ = ("_wake_up", "action", "error", "future", "is_cancelled", "is_settled", "is_taken_up", "row", "value")

    def __init__(
        self,
        action: Callable[[_Beat], Any] | None,
        row: _NewRow | None = None,
        future: _Future[Any] | None = None,
    ) -> None:
        self.action = action
        self.row = row
        """An instance to insert, in place of an action: many requests are one statement."""
        self.future = future
        self.value: Any = None
        self.error: BaseException | None = None
        self.is_taken_up = self.is_settled = self.is_cancelled = False
        self._wake_up: _WakeUp | None = None
        """Of a caller that sleeps until another thread has done it: most callers run the beat themselves."""

    def settle(self) -> None:
        """Tell the caller: what it asked for is committed, or has failed. It may be told twice."""
        self.is_settled = True
        if self.future is not None:
            self.future.settle(self.value, self.error)
        elif self._wake_up is not None:  # looked at last: who is about to sleep makes it first
            self._wake_up.set()

    def is_wanted(self) -> bool:
        """Take the request up; False if its caller was interrupted, or its future cancelled, before that."""
        future = self.future
        if future is None or self.is_cancelled:
            return not self.is_cancelled
        is_again, self.is_taken_up = self.is_taken_up, True
        if is_again and future.running():
            return True
        self.is_cancelled = future.cancelled()  # first: those who wait for it can be told only once
        return future.set_running_or_notify_cancel()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is done, for so long at most; whether it is."""
        self._wake_up = self._wake_up or _WakeUp()
        return self.is_settled or self._wake_up.wait(timeout_s)


class _StaleError(Exception):
    """One of several outcomes written at once may not be written: each must be looked at by itself."""


class _RolledBackError(Exception):
    """A statement of the user's rolled the whole transaction back; it must run again without that commit."""

    def __init__(self, commit: _Commit, error: Exception) -> None:
        super().__init__(str(error))
        self.commit = commit
        self.error = error


def _order(row: _Row) -> tuple[int, int, int]:
    """The order of rows within a queue and within a key."""
    return row.priority, row.eligible_at, row.id


class _Demand(NamedTuple):
    """What an engine takes, in one beat, of the queues that it serves."""

    slots: Mapping[str, int] | None
    """How many more rows of each it can run, before this beat's outcomes; None: of all queues, for a drain."""
    at_most: int = _MAX_INTEGER
    """How many rows it takes in all."""
    horizon: int | None = None
    """Rows that are due by then are taken; None: by now."""
    is_drain: bool = False
    """Whether it runs one row at a time, and so has always room for one."""


_NO_DEMAND = _Demand({})


class _Setup(NamedTuple):
    """What all beats of an engine have in common."""

    store: _Store
    services: _Services
    """For the steps of what is claimed."""
    behaviours: _Behaviours
    worker_id: str
    concurrency_limits: Mapping[str, int]
    keeps_history: bool
    retention_ms: int
    take_back: Callable[[str, int | None], list[_Claim]]
    """Takes back what this engine has claimed of a queue and not started: all, or that instance if it is among it."""


class _Given(NamedTuple):
    """What a beat is to do, and what it has to know of its engine at that instant."""

    now: int
    commits: Sequence[_Commit]
    requests: Sequence[_Request]
    demand: _Demand
    wanted: Container[str] = frozenset()
    """The events that somebody has subscribed to."""
    has_timers: bool = True
    """Whether it fires what is due: a client leaves that to those who run something."""
    is_stopping: bool = False
    fired_until: int = _LONG_AGO
    """Up to when the schedules were looked at: what is left before that can't be fired by this engine."""
    has_fired: Container[str] = frozenset()
    """Schedules that fire no more in this drain, so that none makes it endless."""
    offered: Set[str] = frozenset()
    """Keys of whose line the beat before has let somebody out."""
    inline_s: float = 0.1
    """For how long an instance may go on inline before it is looked whether it keeps others waiting."""
    is_careful: bool = False
    """Whether each outcome and request is tried by itself, since one of them has spoilt the whole."""


class _Report:
    """What a beat has come to: what follows from it, and who has to hear of it, once it is committed."""

    next_at: int | None = None
    """The next instant at which a timer of the file is due."""
    is_unfinished = False
    """Whether there is more to do at once."""
    inserted = 0

    def __init__(self, wanted: Container[str], fired_until: int) -> None:
        self.wanted = wanted
        """The events that somebody has subscribed to."""
        self.claims: list[_Claim] = []
        self.left: list[_Claim] = []
        """Claims of this engine that are over."""
        self.kinds: list[str] = []
        """How they have ended, for a drain's tally."""
        self.refused: list[tuple[_Commit, Exception]] = []
        self.withdrawn: list[_Claim] = []
        """Claims that were taken back unstarted: they are to be put back if the beat comes to nothing."""
        self.cancelled: list[int] = []
        """Instances that are to end, and whose step runs, here or elsewhere."""
        self.settled: list[tuple[int, str, _End | None]] = []
        """Rows that a waiter may wait for, and how they are done."""
        self.after: list[Callable[[], None]] = []
        """What those who have asked for something do after the commit."""
        self.events: list[Event] = []
        self.logs: list[Callable[[], None]] = []
        self.failures: list[tuple[_Row, _End]] = []
        self.unknown: dict[tuple[str, int], str] = {}
        """Classes, with their versions, that nothing here can run, and a queue in which one was met."""
        self.left_schedules: set[tuple[str, str]] = set()
        """Schedules that are left to other engines, and why."""
        self.saturated: list[str] = []
        """Queues that had no room to claim from them."""
        self.fired: list[str] = []
        """Schedules that have fired."""
        self.fired_until = fired_until
        """Up to when the schedules have been looked at."""
        self.passed_on: set[str] = set()
        """Keys of whose line somebody was let out, to be looked at again in the next beat."""

    @property
    def has_news(self) -> bool:
        """Whether there is something to tell the log or the subscribers."""
        is_told = self.events or self.logs or self.failures
        return bool(is_told or self.unknown or self.left_schedules or self.saturated)

    def tell(self, name: str, measurements: dict[str, Any], metadata: dict[str, Any]) -> None:
        if name in self.wanted:
            self.events.append(Event(name, measurements, metadata))

    def log(
        self, log: Callable[..., None], message: str, *arguments: object, extra: dict[str, Any] | None = None
    ) -> None:
        """Have something logged once the beat is committed; what handlers of the log do is not for its time."""
        self.logs.append(functools.partial(log, message, *arguments, extra=extra))

    def note_due(self, *instants: int | None) -> None:
        for instant in instants:
            if instant is not None and (self.next_at is None or instant < self.next_at):
                self.next_at = instant


_Found = tuple[_Spec, object]
"""A class, and the object of it that runs here."""


class _Pick:
    """What a claim has found so far in a queue."""

    __slots__ = ("horizon", "is_written", "parked", "queue", "rows", "slots", "taken")

    def __init__(self, queue: str, slots: int, horizon: int) -> None:
        self.queue = queue
        self.slots = slots
        self.horizon = horizon
        self.rows: Generator[_Met, None, None] | None = None
        """Those that are to be met in their order."""
        self.taken: list[_Claim] = []
        self.parked: list[tuple[str, int]] = []
        self.is_written = False

    @property
    def room(self) -> int:
        return self.slots - len(self.taken)

    def stop_reading(self) -> None:
        """Let go of a statement that is half read: none may outlast the transaction."""
        if self.rows is not None:
            self.rows.close()


class _Transaction:
    """What the parts of a beat share: what was given, the report, what was set free, and who serves which queue."""

    def __init__(self, setup: _Setup, given: _Given) -> None:
        self.setup = setup
        self.given = given
        self.store = setup.store
        self.now = given.now
        self.ahead_from = given.now + _SET_BACK_MS
        """From when on an instant tells of a clock that was ahead."""
        self.report = _Report(given.wanted, given.fired_until)
        self.picks: dict[str, _Pick] = {}
        """What the claim that is under way has found, by queue."""
        self.freed_keys: set[str] = set()
        self.poked_buckets: set[str] = set()
        """Buckets whose line is to be looked at: their instant has come, or somebody has left it."""
        self.parents: set[int] = set()
        """Whose children have ended."""
        self._paused: dict[str, bool] = {}
        self._elsewhere: frozenset[str] | None = None
        self._runnable: dict[tuple[str, int], bool] = {}
        """Whether classes can run here."""

    def departed(self, row: _Row, change: _Change | None) -> None:
        """Note what a row sets free that has left `executing`, or has ended, and who waits for it.

        None stands for one that is given back.
        """
        if row.concurrency_key is not None:
            self.freed_keys.add(row.concurrency_key)
        if change is None or change.status == Status.RUNNABLE:
            return
        done = None
        if isinstance(change, _End):
            if row.parent_id is not None:
                self.parents.add(row.parent_id)
            if change.status == Status.DONE:
                done = change
            else:
                self.report.failures.append((row, change))
        self.report.settled.append((row.id, change.status, done))

    # Who serves what

    def is_paused(self, queue: str) -> bool:
        """Whether a queue was paused when the beat began, or is since."""
        if queue not in self._paused:
            self._paused[queue] = self.store.is_paused(queue)
        return self._paused[queue]

    def forget_paused(self) -> None:
        self._paused.clear()

    def room(self, queue: str) -> int:
        """How many more rows of a queue this engine can claim now."""
        if self.is_paused(queue):
            return 0
        if self.picks:
            return self.picks[queue].room if queue in self.picks else 0
        return self.free_slots(queue)

    def free_slots(self, queue: str) -> int:
        """How many more rows of a queue this engine can run, with those counted that this beat has seen come and go."""
        slots, is_drain = self.given.demand.slots, self.given.demand.is_drain
        if slots is None or is_drain or queue not in slots:
            return 1 if slots is None else slots.get(queue, 0)
        leaving = operator.countOf(map(_queue_of, self.report.left), queue)
        coming = operator.countOf(map(_queue_of, self.report.claims), queue)
        return max(0, slots[queue] + leaving - coming)

    def has_due(self, queue: str) -> bool:
        """Whether a row of the queue could run if there were room for it."""
        head = self.store.next_priority(queue, -_MAX_INTEGER - 1)
        while head is not None and head[1] > self.now:
            head = self.store.next_priority(queue, head[0])
        return head is not None

    @property
    def elsewhere(self) -> frozenset[str]:
        """The queues that other engines serve."""
        if self._elsewhere is None:
            self._elsewhere = self.store.served_elsewhere(self.setup.worker_id)
        return self._elsewhere

    def is_live(self, queue: str) -> bool:
        """Whether this or another engine serves a queue, which is not paused."""
        slots = self.given.demand.slots
        return not self.is_paused(queue) and (slots is None or queue in slots or queue in self.elsewhere)

    def closed_queues(self) -> list[str]:
        """List the live queues in which this engine has no room: they are full, or others'."""
        queues = self.elsewhere.union(self.given.demand.slots or ())
        return [queue for queue in queues if self.room(queue) <= 0 and self.is_live(queue)]

    def is_lost(self, row: _Waiting) -> bool:
        """Whether no engine that serves a row's queue can run its class."""
        name = row.fsm, row.version
        if name not in self._runnable:
            self._runnable[name] = self.setup.behaviours.find(*name) is not None
        return not self._runnable[name] and row.queue not in self.elsewhere


class _Bucket:
    """A token bucket within one transaction. Levels are units of its policy."""

    __slots__ = ("let_out", "level", "policy", "spare", "stored")

    def __init__(self, policy: _Policy, level: int, refilled_at: int, now: int) -> None:
        self.policy = policy
        self.stored = level, min(refilled_at, now)  # later, if the clock was set back: it fills from now on
        """Its level when it was last charged, and when that was."""
        self.level = policy.level(level, refilled_at, now)
        self.spare = level + max(0, now - refilled_at) * policy.allowed
        """What it would hold if there were no burst."""
        self.let_out: list[_Waiting] = []
        """Rows let out of its line in this transaction that no claim has met yet."""

    def charge(self, price: int, now: int) -> None:
        self.level -= price
        self.spare = self.level
        self.stored = self.level, now

    def meet(self, instance: int) -> None:
        """A claim has come to a row."""
        self.let_out = [row for row in self.let_out if row.id != instance]


_BEYOND = _Waiting(_MAX_INTEGER + 1, 0, 0, "", 0, "", 0)
"""Sorts behind all rows."""


class _Line(NamedTuple):
    """Who stands at a bucket, over all live queues."""

    heads: list[_Waiting]
    """The first row that is parked in each queue: nobody overtakes one of them."""
    absent: _Waiting | None
    """The first of those that are not parked and can't be claimed now, for their queue is closed."""
    has_more: bool
    """Whether rows are parked behind an absent one of their queue."""
    has_dead: bool
    """Whether rows are parked in queues that are not live."""


_NOBODY = _Line([], None, has_more=False, has_dead=False)


class _Admission:
    """Which rows the limits let in, within one transaction. The executing rows are the semaphore.

    A bucket has one line over all live queues, in the order of rows. In the queues that are claimed from, rows are met
    in that order, and whoever is refused is parked: nobody behind it goes before it has its tokens. Of a closed queue
    only the first row counts. Once its tokens are there it is let out, to be claimed when its queue has room or by the
    engine whose it is; whoever passes it until then leaves it its price, out of all that the bucket was given since it
    was last charged. What overflows counts for that, too: so a row that is not claimed for long halves the rate of
    others at worst, and finds its tokens half of the time at least.
    """

    LOT = 1000
    """So many rows that nobody takes leave a line at once."""
    LOOK_AGAIN_MS = 1000
    FEW_KEYS = 3
    """After counting the rows of so many keys one by one, all that execute are counted at once."""
    MANY_ROWS = 128
    """Unless they are so many."""
    MANY_LINES = 16
    """So many lines are known by one look, where there are no more."""

    def __init__(self, transaction: _Transaction, limits: Mapping[str, int]) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._limits = limits
        self._now = transaction.now
        self._slots: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._touched: set[str] = set()
        """Buckets that were charged, or whose line has changed."""
        self._key_heads: dict[str, list[_Waiting]] = {}
        self._lines: dict[str, _Line] = {}
        self._closed: list[str] | None = None
        """The live queues in which this engine has no room now."""
        self._refused: dict[str, tuple[int, int, int]] = {}
        """The first row that each bucket has refused in this claim, and that is not parked yet."""
        self._policies: dict[str, _Policy] = {}
        self._parked: set[str] | None = None
        """What rows are parked on, or were in this transaction: all, or the first of many."""
        self._executing: dict[str, int] | None = None
        """How many rows of each key execute, once counted at once; of the first of them, if there are many."""
        self._has_many_rows = False

    def refusal(self, row: _Row, order: tuple[int, int, int]) -> str | None:
        """Charge a row's key and bucket and return None; or charge neither and return what it has to wait for."""
        key, rate = row.concurrency_key, row.rate_limit
        bucket = None if rate is None else self._buckets.get(rate) or self.bucket(rate)
        if bucket is not None and bucket.let_out:
            bucket.meet(row.id)
        if key is not None and (self.slots(key) <= 0 or self._is_behind(key, row.queue, order)):
            return f"key:{key}"
        if bucket is not None and rate is not None:
            self._touched.add(rate)
            price = bucket.policy.price(row.weight)
            if not self._is_first(rate, bucket, order, price):
                self._refused.setdefault(rate, order)
                return f"rate:{rate}"
            bucket.charge(price, self._now)
        if key is not None:
            self._slots[key] -= 1
        return None

    # Keys

    def slots(self, key: str) -> int:
        """How many more rows of that key may execute."""
        if key not in self._slots:
            self._slots[key] = self._limits.get(_limit_name(key), 1) - self._count_executing(key)
        return self._slots[key]

    def _count_executing(self, key: str) -> int:
        if self._executing is None and len(self._slots) >= self.FEW_KEYS:
            self._executing = self._store.executing_by_key(self.MANY_ROWS)
            self._has_many_rows = sum(self._executing.values()) >= self.MANY_ROWS
        is_known = self._executing is not None and not self._has_many_rows
        return cast(dict[str, int], self._executing).get(key, 0) if is_known else self._store.executing(key)

    def forget(self, key: str) -> None:
        """Count a key's rows anew: one has left."""
        self._slots.pop(key, None)
        self._executing = None

    def _is_behind(self, key: str, queue: str, order: tuple[int, int, int]) -> bool:
        """Whether somebody who could go is in the key's line before a row: it must not overtake."""
        parked_on = f"key:{key}"
        if not self.has_line(parked_on):
            return False
        if key not in self._key_heads:
            self._key_heads[key] = self._store.line_heads(parked_on)
        before = (head.queue for head in self._key_heads[key] if head.order < order)
        return any(other == queue or self._transaction.room(other) > 0 for other in before)

    # Lines

    def look_at_lines(self, keys: Iterable[str]) -> None:
        """Learn at once who heads the lines of keys that rows are about to be met of."""
        lines = [f"key:{key}" for key in keys if self.has_line(f"key:{key}")]
        found = self._store.heads_of(lines)
        self._key_heads.update((line.partition(":")[2], found.get(line, [])) for line in lines)

    def has_line(self, parked_on: str) -> bool:
        """Whether rows may be parked on something: one look tells it of all, where there are few such lines."""
        if self._parked is None:
            self._parked = self._store.lines(self.MANY_LINES)
        is_known = parked_on in self._parked or len(self._parked) < self.MANY_LINES
        return parked_on in self._parked if is_known else self._store.is_line(parked_on)

    def note_parked(self, parked_on: Iterable[str]) -> None:
        """Rows are about to be parked on these."""
        if self._parked is not None:
            self._parked.update(parked_on)

    # Buckets

    def bucket(self, rate: str) -> _Bucket:
        """Return a bucket as it is now. One that is not in the file is full."""
        if rate not in self._buckets:
            name = _limit_name(rate)
            policy = (
                self._policies.get(name) or self._store.policy(name) or _Policy(rate, _MAX_INTEGER, 1, _MAX_INTEGER)
            )
            self._policies[name] = policy
            level, refilled_at = self._store.bucket(rate) or (policy.capacity, self._now)
            self._buckets[rate] = _Bucket(policy, level, refilled_at, self._now)
        return self._buckets[rate]

    def _is_first(self, rate: str, bucket: _Bucket, order: tuple[int, int, int], price: int) -> bool:
        """Whether the bucket affords a row, and nobody is in its line before it."""
        if bucket.level < price or (rate in self._refused and self._refused[rate] < order):
            return False
        line = self._lines.get(rate) or self._line(rate)
        if not line.heads and line.absent is None and not bucket.let_out:
            return True
        is_behind = line.heads and min(line.heads).order < order
        return not is_behind and self._earliest(rate, order, price) <= self._now

    def _earliest(self, rate: str, order: tuple[int, int, int], units: int) -> int:
        """First instant at which the bucket affords a row that, with those ahead of it, takes so many units."""
        bucket, absent = self.bucket(rate), self._line(rate).absent
        policy = bucket.policy
        passed = min([*bucket.let_out[:1], *([absent] if absent is not None else [])], default=None)
        reserve = policy.price(passed.weight) if passed is not None and passed.order < order else 0
        return max(
            policy.instant_of(units, bucket.level, self._now),
            policy.instant_of(reserve + units, bucket.spare, self._now),
        )

    def _line(self, rate: str) -> _Line:
        if rate not in self._lines:
            parked_on = f"rate:{rate}"
            parked = self._store.line_heads(parked_on) if self.has_line(parked_on) else []
            if self._closed is None:
                self._closed = self._transaction.closed_queues()
            self._lines[rate] = self._form_line(rate, parked, self._closed) if parked or self._closed else _NOBODY
        return self._lines[rate]

    def _form_line(self, rate: str, parked: Sequence[_Waiting], closed: Iterable[str]) -> _Line:
        live = {row.queue: row for row in parked if self._transaction.is_live(row.queue)}
        heads, absent = live.copy(), []
        for queue in closed:
            first = self._store.first_at_bucket(rate, queue, self._now)
            if first is not None and not self._transaction.is_lost(first) and first < live.get(queue, _BEYOND):
                absent.append(first)
                heads.pop(queue, None)
        has_more, has_dead = len(heads) < len(live), len(live) < len(parked)
        return _Line(list(heads.values()), min(absent, default=None), has_more, has_dead)

    def release_line(self, rate: str) -> None:
        """Let out of a bucket's line what its tokens afford and there is room for, and what nobody takes."""
        parked_on, bucket = f"rate:{rate}", self.bucket(rate)
        self._touched.add(rate)
        self._lines.pop(rate, None)
        line = self._line(rate)
        counts: collections.Counter[str] = collections.Counter()
        let_out: list[_Waiting] = []
        units = 0
        for row in heapq.merge(*(self._next_of(parked_on, head.queue) for head in line.heads)):
            if not self._transaction.is_lost(row):
                units += bucket.policy.price(row.weight)
                if self._earliest(rate, row.order, units) > self._now:
                    break
                let_out.append(row)
            counts[row.queue] += 1
        for queue in self._store.line_queues(parked_on) if line.has_dead else counts:
            count = counts[queue] if self._transaction.is_live(queue) else self.LOT
            if count:
                self._store.unpark(parked_on, queue, count)
        bucket.let_out = sorted(bucket.let_out + let_out)
        self._lines.pop(rate, None)

    def _next_of(self, parked_on: str, queue: str) -> Iterator[_Waiting]:
        """Yield those in a queue's part of a line for whom it has room, the first in any case, and who is lost."""
        room = max(1, self._transaction.room(queue))
        for row in self._store.line(parked_on, queue):
            yield row
            room -= not self._transaction.is_lost(row)
            if room == 0:
                return

    def save(self) -> int | None:
        """Write what has become of the buckets; return when the first of them is ready for its line."""
        if not self._touched:
            return None
        self.forget_lines()
        touched = [(rate, self.bucket(rate), self._ready_at(rate)) for rate in self._touched]
        self._store.save_buckets((bucket.policy, rate, *bucket.stored, ready_at) for rate, bucket, ready_at in touched)
        self._touched.clear()
        return min((ready_at for *_, ready_at in touched if ready_at is not None), default=None)

    def _ready_at(self, rate: str) -> int | None:
        """When the first in the bucket's line can go; at once if there is something to clear away.

        Rows behind an absent one are let out when that is claimed, unless its engine does not know its class.
        """
        if not self.has_line(f"rate:{rate}"):
            return None
        line = self._line(rate)
        look_again_at = self._now + self.LOOK_AGAIN_MS if line.has_more else None
        if not line.heads:
            return self._now if line.has_dead else look_again_at
        first = min(line.heads)
        price = self.bucket(rate).policy.price(first.weight)
        ready_at = self._now if self._transaction.is_lost(first) else self._earliest(rate, first.order, price)
        return ready_at if look_again_at is None else min(ready_at, look_again_at)

    # What is known of the file

    def forget_closed(self) -> None:
        """A queue has been filled: what it has to give way to has changed."""
        self._closed = None
        self._lines.clear()

    def forget_lines(self) -> None:
        """Rows have been parked or let out."""
        self._closed = None
        self._key_heads.clear()
        self._lines.clear()
        self._refused.clear()

    def forget_everything(self) -> None:
        """Read all anew: statements were undone. Whatever was charged and not undone has been saved."""
        self._slots.clear()
        self._buckets.clear()
        self._parked = self._executing = None
        self.forget_lines()


class _Lines:
    """Lets rows out of the lines of keys and buckets, when what they wait for is set free."""

    def __init__(self, transaction: _Transaction, admission: _Admission) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._report = transaction.report
        self._admission = admission
        self._offered: Set[str] = transaction.given.offered
        """Keys of whose line somebody was let out, in this beat or the one before."""
        self._rate_refused: set[tuple[str, str, str]] = set()
        """(key, queue, bucket) of rows that have to wait for their bucket, so that others may have their key."""

    def release(self) -> None:
        """Let out of the lines what was set free."""
        transaction = self._transaction
        freed, transaction.freed_keys = transaction.freed_keys, set()
        poked, transaction.poked_buckets = transaction.poked_buckets, set()
        for key in freed:
            self._admission.forget(key)
        self._unpark(freed)
        self._offered = self._offered | freed
        for rate in poked:
            self._admission.release_line(rate)
        if freed or poked:
            self._admission.forget_lines()
            self._admission.look_at_lines(freed)

    def _unpark(self, keys: Iterable[str]) -> None:
        """Let as many of each key's line go as it has slots; one at least, for engines may differ in their limits.

        Among the queues that this engine claims from now, in the order of the key; in every other queue too, whoever
        serves it: a row that nobody claims must not keep the slot.
        """
        lines = {f"key:{key}": key for key in keys if self._admission.has_line(f"key:{key}")}
        first: list[tuple[str, str]] = []
        for parked_on, heads in self._store.heads_of(lines).items():
            queues = [head.queue for head in heads]
            count = max(1, self._admission.slots(lines[parked_on]))
            shares = dict.fromkeys(queues, count)
            if len(queues) > 1:
                shares.update(self._shares(parked_on, queues, count))
            for queue, share in shares.items():
                if share == 1:  # of most keys
                    first.append((parked_on, queue))
                else:
                    self._store.unpark(parked_on, queue, share)
        if first:
            self._store.unpark_first(_encode(first))

    def _shares(self, parked_on: str, queues: Iterable[str], count: int) -> dict[str, int]:
        """Say how many of the first so many in a key's line stand in each of the queues that are claimed from now."""
        served = [queue for queue in queues if self._transaction.room(queue) > 0]
        heads = heapq.merge(*(self._store.line_start(parked_on, queue, count) for queue in served))
        first = collections.Counter(queue for *_, queue in itertools.islice(heads, count))
        return {queue: first[queue] for queue in served}

    def note_refused(self, row: _Row, parked_on: str) -> None:
        """A row that one limit refused leaves what the other had kept for it to those behind it."""
        if parked_on.startswith("key:"):
            metadata = {"id": row.id, "key": row.concurrency_key, "queue": row.queue}
            self._report.tell("concurrency.throttled", {}, metadata)
            if row.rate_limit is not None:
                self._transaction.poked_buckets.add(row.rate_limit)
            return
        self._report.tell("rate_limit.throttled", {}, {"id": row.id, "key": row.rate_limit, "queue": row.queue})
        if row.concurrency_key is not None:
            self._rate_refused.add((row.concurrency_key, row.queue, cast(str, row.rate_limit)))

    def pass_on(self) -> None:
        """Offer what nobody has taken to those who come next in line, where this engine could run them now.

        Whoever was let out first may be of a class unknown here, may find its queue full, or have to wait for its
        bucket; in the last case it is passed by rows of other buckets, near the head of the line, and no others: they
        would only follow it into the bucket's line.
        """
        if not (self._offered or self._rate_refused):
            return
        passed_on = {key for key in self._offered if self._offer_again(key)}
        for key, queue, rate in self._rate_refused:
            if self._store.unpark_other(f"key:{key}", queue, rate):
                passed_on.add(key)
        self._report.passed_on = passed_on
        self._report.is_unfinished |= bool(passed_on)

    def _offer_again(self, key: str) -> bool:
        """Let the next rows of a key's line go, in queues that this engine serves; False if there are none."""
        line, count = f"key:{key}", 0
        free = self._admission.slots(key) if self._admission.has_line(line) else 0
        for queue in self._store.line_queues(line) if free > 0 else ():
            is_refused = any((key, queue) == refused[:2] for refused in self._rate_refused)
            if self._transaction.room(queue) > 0 and not is_refused:
                count += self._store.unpark(line, queue, free)
        return count > 0

    def sweep(self) -> None:
        """Let everything out of line that the limits admit: they may have changed since it was parked."""
        parked_on = self._store.next_line("")
        while parked_on is not None:
            kind, _, limit = parked_on.partition(":")
            (self._transaction.freed_keys if kind == "key" else self._transaction.poked_buckets).add(limit)
            parked_on = self._store.next_line(parked_on)


_correlation_key_of = operator.attrgetter("correlation_key")


class _Inserts:
    """The one way in for new instances: of callers, steps, schedules; children, forks."""

    def __init__(self, transaction: _Transaction) -> None:
        self._transaction = transaction
        self._store = transaction.store

    def write(self, rows: Sequence[_NewRow]) -> list[int | None]:
        """Insert in the order given; None for a duplicate. Runs without correlation keys are one statement each."""
        transaction = self._transaction
        if max(map(_inserted_at, rows), default=0) > transaction.ahead_from:
            rows = [row.brought_back(transaction.now) for row in rows]
        ids: list[int | None] = []
        if len(rows) == 1:
            ids.append(self._store.insert(rows[0]))
        else:
            for key, run in itertools.groupby(rows, _correlation_key_of):
                lot = list(run)
                ids.extend(self._store.insert_many(lot) if key is None else map(self._store.insert, lot))
        transaction.report.inserted += len(ids) - ids.count(None)
        return ids

    def write_one(self, row: _NewRow) -> int:
        """Insert an instance; `DuplicateError` if its correlation key is taken."""
        (instance,) = self.write((row,))
        if instance is None:
            raise self.duplicate(row)
        return instance

    def duplicate(self, row: _NewRow) -> DuplicateError:
        """Say who occupies a row's correlation key."""
        key = cast(str, row.correlation_key)
        occupant = self._store.occupant(key)
        return DuplicateError(key, occupant[0] if occupant else 0)

    def refuse_taken_key(self, instance: int) -> None:
        """Refuse to bring back an instance whose correlation key another occupies by now."""
        key, scope = self._store.carried_key(instance)
        occupant = self._store.occupant(key) if key is not None and scope else None
        if occupant is not None and occupant[0] != instance:
            raise DuplicateError(cast(str, key), occupant[0])


def _row_of(store: _Store, instance: int) -> tuple[_Row, str]:
    """Return an instance's row, with its status; `NotFoundError`."""
    found = store.row(instance)
    if found is None:
        raise NotFoundError(f"no instance has the id {instance}")
    return found


_NO_SIGNALS: tuple[Signal, ...] = ()


class _Inboxes:
    """Signals: delivered to instances, shown to their steps, dropped with their end."""

    def __init__(self, transaction: _Transaction) -> None:
        self._store = transaction.store
        self._now = transaction.now
        self._report = transaction.report
        self._has_signals: bool | None = None

    def deliver(self, message: _Message) -> None:
        """Put a signal into the inbox of a live instance, and wake it if it waits for it; `NoTargetError`."""
        instance, status = self._addressed(message.target)
        if status is None or status in _TERMINAL:
            place = "has the id" if isinstance(message.target, int) else "occupies the key"
            what = "no live instance" if status is None else f"instance {instance} has ended ({status}), so none"
            raise NoTargetError(f"{what} {place} {message.target!r}", None if status is None else Status(status))
        self._has_signals = True
        if self._store.deliver(instance, message, self._now):
            self._store.wake(instance, message.name, self._now)

    def _addressed(self, target: int | str) -> tuple[int, str | None]:
        """Return whom a signal means, and its status: by key the occupant, else the last that carried it and ended."""
        if isinstance(target, int):
            return target, self._store.status(target) if abs(target) <= _MAX_INTEGER else None
        occupant = self._store.occupant(target)
        if occupant is not None and occupant[1] not in _TERMINAL:
            return occupant
        carrier = self._store.last_carrier(target)
        return carrier if carrier is not None and carrier[1] in _TERMINAL else (0, None)

    def may_hold_any(self) -> bool:
        """Whether there is any signal in the file: most files have none, so one look saves one for each row."""
        if self._has_signals is None:
            self._has_signals = self._store.has_signals()
        return self._has_signals

    def of(self, instance: int) -> tuple[Signal, ...]:
        return self._store.signals(instance) if self.may_hold_any() else _NO_SIGNALS

    def empty(self, claim: _Claim, kept_by: int | None) -> None:
        """Drop what an instance that is done has in its inbox, and tell of what its last step was not shown."""
        row, seen = claim.row, {signal.id for signal in claim.seen}
        for signal, name in self._store.empty_inbox(row.id, kept_by):
            if signal not in seen:
                message = "instance %d is done: the signal %r, which came while its last step ran, is dropped unseen"
                self._report.log(_log.warning, message, row.id, name, extra=_log_details(row))
                self._report.tell("signal.dropped", {}, {"id": row.id, "name": name})


class _Past(NamedTuple):
    """A run to go back to, and a state to put in the place of what it had; a step without a run has one."""

    run: _Run
    """Its version is the one that the state is of."""
    state: str | None


def _max_attempts_of(fsm: str, version: int, kept: int | None) -> int | None:
    """Return how many attempts a row has that had so many, by the rule of its class, if that is known here."""
    spec = _registry.get((fsm, version))
    return kept if spec is None else spec.attempts_of(kept)


class _History:
    """What was run of instances: entered in the transaction of each outcome, and gone back to on request."""

    def __init__(self, transaction: _Transaction, inserts: _Inserts) -> None:
        self._store = transaction.store
        self._now = transaction.now
        self._worker_id = transaction.setup.worker_id
        self._is_kept = transaction.setup.keeps_history
        self._inserts = inserts

    # Entries

    def record_all(self, commits: Iterable[_Commit], first_child: int | None = None) -> None:
        """Enter the runs that these outcomes end."""
        kept = [one for one in commits if one.kind != "done" or not one.claim.spec.is_job] if self._is_kept else None
        kept = kept and [commit for commit in kept if commit.is_kept]
        if kept:
            self._store.record([_entry(commit, self._worker_id, first_child) for commit in kept])

    def record(
        self,
        row: _Row,
        kind: str,
        *,
        seq: int | None = None,
        worker: str | None = None,
        error: str | None = None,
        to: str | None = None,
    ) -> None:
        """Enter what was done to a row by another than its step."""
        spec = _registry.get((row.fsm, row.version))
        if self._is_kept and (spec is None or spec.history):
            number = row.claim if seq is None else seq
            past = (row.step, row.attempt, kind, self._now, 0.0, worker, error, None, row.state)
            self._store.record([_Entry(row.id, number, row.version, *past, None, to, row.awaits, row.joining, None)])

    def kept_by(self, claim: _Claim) -> int | None:
        """Return the number by which what that run consumes is marked; None where no history is kept."""
        return claim.row.claim if self._is_kept and claim.spec.history else None

    # Going back

    def rewind(self, instance: int, past: _Past) -> None:
        """Have an instance stand again before one of its runs."""
        row, status = _row_of(self._store, instance)
        if status == Status.EXECUTING:
            raise DurableError(f"instance {instance} is executing: wait for its step, or cancel it, to rewind it")
        entry, later = self._find(row, past)
        self._inserts.refuse_taken_key(instance)
        children = [one.first_child for one in later if one.first_child is not None]
        if children:
            self._store.detach(instance, min(children))
        self._store.bring_back(instance, entry.seq)
        self._store.drop_calls(instance)
        self._store.rewind(entry, _max_attempts_of(row.fsm, entry.version, row.max_attempts), self._now)
        self.record(row, "rewind", seq=row.claim + 1, to=entry.step)

    def fork(self, instance: int, past: _Past, template: _NewRow) -> int:
        """Insert a new instance that goes on from before a run of another."""
        row, _ = _row_of(self._store, instance)
        entry, _ = self._find(row, past)
        new = template._replace(max_crashes=row.max_crashes, retention=self._store.retention(instance))
        new = new._replace(max_attempts=_max_attempts_of(row.fsm, entry.version, new.max_attempts))
        return self._inserts.write_one(new._replace(version=entry.version, step=entry.step, state=entry.state))

    def _find(self, row: _Row, past: _Past) -> tuple[_Entry, list[_Entry]]:
        """Find the run that is meant, as it is gone back to, and those from it on; a step that never ran has none."""
        seq, version, step_name = past.run
        if seq is None:
            before = (version, step_name, 0, "rewind", self._now, 0.0, None, None, None, cast(str, past.state))
            return _Entry(row.id, row.claim + 1, *before, None, None, None, 0, None), []
        entries = self._store.entries_from(row.id, seq)
        if not entries:
            raise NotFoundError(f"the run {seq} of instance {row.id} has been collected")
        entry = entries[0]._replace(version=version)
        return entry if past.state is None else entry._replace(state=past.state), entries


class _Inline:
    """Whether a step may go on with the next at once, on the claim that it holds."""

    def __init__(self, transaction: _Transaction, admission: _Admission) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._admission = admission

    def may_go_on(self, commit: _Commit) -> bool:
        transaction, row = self._transaction, commit.claim.row
        is_held_up = transaction.given.is_stopping or transaction.is_paused(row.queue) or self._keeps_waiting(commit)
        if not is_held_up and (not commit.is_asking or self._admits(commit)):
            return True
        metadata = {"id": row.id, "fsm": row.fsm, "step": cast(_Advance, commit.change).step}
        transaction.report.tell("inline.yield", {}, metadata)
        return False

    def _keeps_waiting(self, commit: _Commit) -> bool:
        """Whether somebody waits for the slot, or the key, that an inline run has held for long enough.

        Looked for only then, and again only after as long: most runs never pay for it.
        """
        claim, instant = commit.claim, _Ticks.perf_counter()
        since = claim.started_at if claim.inline_since is None else claim.inline_since
        if instant - since < self._transaction.given.inline_s:
            return False
        key, kept = claim.row.concurrency_key, cast(_Advance, commit.change).concurrency_key
        is_same_key = key is not None and key == kept
        if self._transaction.has_due(claim.row.queue) or (is_same_key and self._store.line_queues(f"key:{key}")):
            return True
        claim.inline_since = instant
        return False

    def _admits(self, commit: _Commit) -> bool:
        """Ask the limits that an inline step names; a key that it keeps is held already."""
        row, change = commit.claim.row, cast(_Advance, commit.change)
        is_kept = change.concurrency_key == row.concurrency_key
        asking = row._replace(
            concurrency_key=None if is_kept else change.concurrency_key,
            rate_limit=change.rate_limit,
            weight=change.weight,
            eligible_at=self._transaction.now,
        )
        if self._admission.refusal(asking, _order(asking)) is not None:
            self._admission.forget_lines()
            return False
        self._admission.save()
        return True


class _Settlement:
    """Commits outcomes, each under the claim that has produced it, and notes what follows from them."""

    def __init__(
        self, transaction: _Transaction, admission: _Admission, inserts: _Inserts, inboxes: _Inboxes, history: _History
    ) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._now = transaction.now
        self._report = transaction.report
        self._is_careful = transaction.given.is_careful
        self._admission = admission
        self._inserts = inserts
        self._inboxes = inboxes
        self._history = history
        self._wants_steps = "step.stop" in transaction.report.wanted

    def settle_all(self, commits: Iterable[_Commit]) -> None:
        """Commit outcomes in the order in which they came, runs of simple ones together."""
        run: list[_Commit] = []
        for commit in commits:
            if commit.claim.ruled_at > self._transaction.ahead_from:
                commit = commit.brought_back(self._now)
            if commit.is_simple and not self._is_careful:
                run.append(commit)
            else:
                self._settle_simple(run)
                run = []
                self._settle(commit)
        self._settle_simple(run)

    def _settle_simple(self, run: Sequence[_Commit]) -> None:
        """Commit simple outcomes, those of each kind by one statement."""
        if not run:
            return
        leaving: list[_Commit] = []
        staying: list[_Commit] = []
        for commit in run:
            (staying if commit.is_inline and self._may_go_on(commit) else leaving).append(commit)
        is_held = self._store.settle_many(leaving, self._now)
        if not is_held or (staying and not self._store.advance_many(staying, self._now)):
            raise _StaleError
        self._history.record_all(run)
        for commit in leaving:
            self._let_go(commit, commit.change)
        for commit in staying:
            self._go_on(commit, cast(_Advance, commit.change))

    def _may_go_on(self, commit: _Commit) -> bool:
        return _Inline(self._transaction, self._admission).may_go_on(commit)

    def _settle(self, commit: _Commit) -> None:
        """Commit an outcome, whole or not at all."""
        is_compound = commit.effects or commit.children or self._is_careful
        if is_compound or commit.is_inline:  # what limits were charged for has to be undone with the rest
            self._settle_compound(commit)
        else:
            self._conclude(commit, self._write(commit))

    def _settle_compound(self, commit: _Commit) -> None:
        """Commit an outcome of several statements, under a savepoint."""
        self._store.savepoint()
        try:
            change = self._write(commit)
            for effect in commit.effects if change is not None else ():
                self._apply(commit.claim.row, effect)
            self._store.check_foreign_keys()
        except _STORE_FAILURES:
            raise
        except Exception as error:
            if not self._store.db.in_transaction:
                raise _RolledBackError(commit, error) from error
            self._undo()
            self._report.refused.append((commit, error))
            return
        if change is None:
            self._undo()
        else:
            self._store.release()
        self._conclude(commit, change)

    def _undo(self) -> None:
        self._store.undo()
        self._admission.forget_everything()

    def _write(self, commit: _Commit) -> _Change | None:
        """Write an outcome; return what became of the row, None if it was stale or its instance cancelled."""
        row, change, first_child = commit.claim.row, commit.change, None
        if commit.claim.is_migrated:
            self._store.migrate(commit.migrated_row)
        if commit.is_inline and self._may_go_on(commit):
            if not self._store.advance_many([commit], self._now):
                return None
            change = cast(_Advance, change)._replace(status=Status.EXECUTING)
        else:
            if commit.children:
                first_child = next(filter(None, self._inserts.write(commit.children)), None)
            change = self._parked(commit, first_child)
            if not self._store.settle(row, change, self._now):
                return None
        self._history.record_all((commit,), first_child)
        if isinstance(change, _Advance):
            if commit.claim.has_calls:
                self._store.drop_calls(row.id)
            if commit.shown and commit.change.status != Status.AWAITING_SIGNAL:
                self._store.consume(commit.shown, self._history.kept_by(commit.claim))
        return change

    def _parked(self, commit: _Commit, first_child: int | None) -> _Change:
        """Look whether there is anything to park for."""
        change = commit.change
        if not isinstance(change, _Advance):
            return change
        if change.status == Status.AWAITING_CHILDREN and first_child is None:
            return change._replace(status=Status.RUNNABLE)
        if change.status == Status.AWAITING_SIGNAL:
            if self._store.has_unseen(commit.claim.row.id, cast(str, change.awaits), commit.shown):
                return change._replace(status=Status.RUNNABLE, await_deadline=None)
            self._report.note_due(change.await_deadline)
        return change

    def _apply(self, row: _Row, effect: _Effect) -> None:
        """Do what a step has added to its commit; what is dropped is said in the log."""
        match effect:
            case _Statement():
                self._store.run(effect)
            case _NewRow():
                if self._inserts.write((effect,)) == [None]:
                    message = "instance %d: its insert of %s is dropped, the correlation key %r is taken"
                    dropped = effect.fsm, effect.correlation_key
                    self._report.log(_log.info, message, row.id, *dropped, extra=_log_details(row))
            case _Message():
                try:
                    self._inboxes.deliver(effect)
                except NoTargetError as error:
                    message = "instance %d: its signal is dropped: %s"
                    self._report.log(_log.info, message, row.id, error, extra=_log_details(row))

    def _conclude(self, commit: _Commit, change: _Change | None) -> None:
        """Note what follows from a written outcome, for the rest of the beat and for after its commit."""
        if change is None:
            self._lose(commit)
        elif change.status == Status.EXECUTING:
            self._go_on(commit, cast(_Advance, change))
        else:
            self._let_go(commit, change)

    def _go_on(self, commit: _Commit, change: _Advance) -> None:
        """Claim a row anew, at its next step, for whoever has run this one."""
        claim, row = commit.claim, commit.claim.row
        if row.concurrency_key is not None and row.concurrency_key != change.concurrency_key:
            self._transaction.freed_keys.add(row.concurrency_key)
        self._report.left.append(claim)
        self._report.kinds.append(commit.kind)
        if self._wants_steps:
            self._tell_step(commit)
        following = _Claim(
            _advanced(commit.migrated_row, change),
            claim.spec,
            claim.behaviour,
            claim.services,
            self._inboxes.of(row.id),
        )
        following.inline_since = claim.started_at if claim.inline_since is None else claim.inline_since
        self._report.claims.append(following)
        if "inline.continue" in self._report.wanted:
            self._report.tell("inline.continue", {}, {"id": row.id, "fsm": row.fsm, "step": change.step})

    def _let_go(self, commit: _Commit, change: _Change) -> None:
        """Note what a row that has left `executing` sets free, and who waits for it."""
        claim, row = commit.claim, commit.claim.row
        self._report.left.append(claim)
        self._report.kinds.append(commit.kind)
        if self._wants_steps:
            self._tell_step(commit)
        if isinstance(change, _Again):
            if reported := claim.services.progress.get((row.id, row.claim)):
                self._store.show_last_progress(row, _json(reported))
        elif change.status == Status.DONE and self._inboxes.may_hold_any():
            self._inboxes.empty(claim, self._history.kept_by(claim))
        self._transaction.departed(row, change)

    def _tell_step(self, commit: _Commit) -> None:
        row = commit.claim.row
        metadata = {"id": row.id, "fsm": row.fsm, "step": row.step, "kind": commit.kind}
        self._report.tell("step.stop", {"duration": commit.duration}, metadata)

    def _lose(self, commit: _Commit) -> None:
        """An outcome that nothing was written of: the instance was cancelled, or the claim is no longer ours."""
        row = commit.claim.row
        reason = self._store.cancel_reason(row)
        if reason is not None:
            change = _failed(row, reason)
            if commit.claim.is_migrated:  # what was written of it may be undone, or what `handle` has answered
                self._store.migrate(row)
            self._store.settle(row, change, self._now, reason)
            self._history.record_all((commit._replace(kind="cancel", change=change, error=None),))
            self._let_go(commit._replace(kind="stop"), change)
            return
        self._report.left.append(commit.claim)
        self._report.tell("outcome.stale", {}, {"id": row.id, "fsm": row.fsm, "step": row.step})


class _Withdrawals:
    """Takes claimed rows from who has them: a worker that died or leaves, a queue that is paused, a cancel."""

    def __init__(self, transaction: _Transaction, history: _History) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._now = transaction.now
        self._report = transaction.report
        self._history = history

    def reap(self, worker: str, cause: str) -> int:
        """Take a dead worker's claims from it: its rows have crashed."""
        rows = self._store.claimed_by(worker)
        for row in rows:
            self._rule(row, _crashed(row, cause, self._now), row.cancel_reason, worker)
        self._store.unregister(worker)
        self._report.tell("reaper.reaped", {"count": len(rows)}, {"worker": worker})
        return len(rows)

    def cancel_unstarted(self, row: _Row, reason: str) -> bool:
        """Fail a claimed row, as far as this engine has it and its step has not started; False if not."""
        claims = self._take_back(row.queue, row.id)
        self._report.left.extend(claims)
        for _ in claims:
            self._rule(row, _failed(row, row.cancel_reason or reason), row.cancel_reason)
        return bool(claims)

    def give_back(self, claims: Iterable[_Claim]) -> None:
        """Let others have what this engine has claimed and not run, or not to its end."""
        for claim in claims:
            self._give_back(claim.row)
            self._report.left.append(claim)

    def give_back_unstarted(self, queue: str) -> None:
        """Give back what is claimed ahead in a queue that was paused, also by this very beat."""
        self.give_back(self._take_back(queue))
        for claim in [one for one in self._report.claims if one.row.queue == queue]:
            self._report.claims.remove(claim)
            self._give_back(claim.row)

    def sign_off(self, claims: Iterable[_Claim]) -> None:
        """Give back all that this engine holds, also what it has lost sight of, and end its registration."""
        self.give_back(claims)
        self._retire(self._transaction.setup.worker_id)

    def disband(self, queues: Iterable[str]) -> None:
        """Pause all, give back every claim and forget the workers: this file is a copy that none works on."""
        self._store.pause_schedules()
        for queue in queues:
            self._store.pause(queue)
        for worker in self._store.workers():
            self._retire(worker.id)

    def _retire(self, worker: str) -> None:
        for row in self._store.claimed_by(worker):
            self._give_back(row)
        self._store.unregister(worker)

    def _take_back(self, queue: str, instance: int | None = None) -> list[_Claim]:
        """Take claims of a queue from those who are to run them, as far as they have not started."""
        claims = self._transaction.setup.take_back(queue, instance)
        self._report.withdrawn.extend(claims)
        return claims

    def _give_back(self, row: _Row) -> None:
        if self._store.give_back(row, self._now):
            self._transaction.departed(row, None)
        elif (reason := self._store.cancel_reason(row)) is not None:
            self._rule(row, _failed(row, reason), reason)

    def _rule(self, row: _Row, change: _Again | _End, cancel_reason: str | None, worker: str | None = None) -> None:
        """Write what becomes of a claimed row whose step has no say in it: it has crashed, or was cancelled."""
        self._store.settle(row, change, self._now, cancel_reason)
        kind = "crash" if worker is not None and cancel_reason is None else "cancel"
        to = row.step if isinstance(change, _Again) else None
        self._history.record(row, kind, worker=worker, error=change.last_error, to=to)
        self._transaction.departed(row, change)


class _Instances:
    """What callers ask for of single instances: to end them, and to go on with those that failed."""

    def __init__(
        self, transaction: _Transaction, inserts: _Inserts, history: _History, withdrawals: _Withdrawals
    ) -> None:
        self._transaction = transaction
        self._store = transaction.store
        self._now = transaction.now
        self._inserts = inserts
        self._history = history
        self._withdrawals = withdrawals

    def cancel_tree(self, instance: int, reason: str) -> bool:
        """Cancel an instance and all its live descendants, those of an ended one, too."""
        is_cancelled = self.cancel(instance, reason)
        below = self._store.children_ids(instance)
        while below:
            child = below.pop()
            self.cancel(child, reason)
            below.extend(self._store.children_ids(child))
        return is_cancelled

    def cancel(self, instance: int, reason: str) -> bool:
        """Fail an instance, or have it fail when its step has ended; False if it had ended."""
        row, status = _row_of(self._store, instance)
        if status in _TERMINAL:
            return False
        if status == Status.EXECUTING:
            if self._withdrawals.cancel_unstarted(row, reason):
                return True
            self._transaction.report.cancelled.append(instance)
            return self._store.request_cancel(instance, reason)
        self._store.end(instance, reason, self._now)
        self._history.record(row, "cancel", seq=row.claim + 1, error=reason)
        self._transaction.departed(row, _failed(row, reason))
        if row.rate_limit is not None and status == Status.RUNNABLE:
            self._transaction.poked_buckets.add(row.rate_limit)
        return True

    def retry(self, instance: int) -> None:
        """Have a failed instance go on from where it stood."""
        _, status = _row_of(self._store, instance)
        if status != Status.FAILED:
            raise DurableError(f"instance {instance} has not failed, it is {status}: only a failed one can be retried")
        self._inserts.refuse_taken_key(instance)
        self._store.revive(instance, self._now)


class _Cleaning:
    """Deletes what has ended long ago, and gives back the space."""

    def __init__(self, transaction: _Transaction) -> None:
        self._transaction = transaction
        self._store = transaction.store

    def collect(self, after: _SweepPosition, count: int) -> tuple[int, _SweepPosition | None]:
        """Delete up to so many ended rows older than their retention; return how many, and where to go on."""
        transaction = self._transaction
        retention = transaction.setup.retention_ms if after.retention is None else after.retention
        rows = self._store.sweep(after, transaction.now - retention, count)
        self._store.collect(instance for instance, *_ in rows)
        deleted = len(rows) + self._store.collect_buckets(transaction.now, count)
        if deleted:
            transaction.report.tell("gc.swept", {"count": deleted}, {})
        return deleted, self._sweep_on(after, rows, count)

    def _sweep_on(
        self, after: _SweepPosition, rows: Sequence[tuple[int, int, int]], count: int
    ) -> _SweepPosition | None:
        """Say where a sweep goes on that has found these rows, asked for so many; None at its end."""
        has_freed = after.has_freed or any(has_failed for *_, has_failed in rows)
        if len(rows) == count:
            instance, updated_at, _ = rows[-1]
            return after._replace(updated_at=updated_at, id=instance, has_freed=has_freed)
        following = self._store.next_retention(after.retention)
        if following is not None:
            return _SweepPosition(following, has_freed=has_freed)
        return _SweepPosition() if has_freed else None

    def shrink(self, spare: int) -> int:
        """Give some of so many free pages back to the file system; return how many are left to give back."""
        spare = min(spare, self._store.spare_pages())
        if spare > 0:
            self._store.shrink()
            spare = max(0, spare - _SHRUNK_AT_ONCE)
            if spare == 0:
                self._store.copy_log_soon()
        return spare


_OPTIONS_OF_CLASS = {"step": "initial", "queue": "queue", "max_attempts": "max_attempts"}
"""Options of an insert that its class has, by the class's name for them, unless they are given."""


def _describe_schedule(name: str, spec: _Spec, plan: _Plan, row: _NewRow, *, is_from_code: bool) -> _ScheduleRow:
    """Make the row of a schedule that starts now."""
    template = row._replace(eligible_at=0, inserted_at=0, updated_at=0, schedule=name)._asdict()
    given = [option for option in _OPTIONS_OF_CLASS if cast(dict[str, Any], plan.insert).get(option) is not None]
    return _ScheduleRow(
        name=name,
        fsm=spec.name,
        when=_json(plan.when._stored()),
        template=_json({**template, "given": given}),
        catch_up=plan.catch_up,
        window=plan.window_ms,
        overlap=plan.overlap,
        jitter=plan.jitter_ms,
        is_declared=is_from_code,
        is_from_code=is_from_code,
        written_at=row.inserted_at,
    )


def _occurrence(schedule: _ScheduleRow, spec: _Spec | None, now: int) -> _NewRow:
    """Make the instance of an occurrence; of the highest version known here, where the class is.

    One with a state of an earlier version that this one migrates is of that, for its `migrate`.
    """
    template = _decode(schedule.template)
    given = template.pop("given")
    new = _NewRow(**template)._replace(eligible_at=now, inserted_at=now, updated_at=now)
    if spec is None:
        return new
    of_class = {option: getattr(spec, name) for option, name in _OPTIONS_OF_CLASS.items() if option not in given}
    of_class["version"] = spec.version
    is_earlier = new.version < spec.version and (spec.name, new.version) not in _registry
    if spec.migrates and is_earlier and new.state != "{}":
        of_class |= {"version": new.version, "step": new.step}
    return new._replace(fsm=spec.name, max_crashes=spec.max_crashes, retention=spec.retention, **of_class)


_Answer = typing.TypeVar("_Answer")


class _Schedules:
    """The schedules of the file, within one transaction: rows that say when to insert which instance.

    An occurrence is inserted and its schedule moved on in one commit, so it exists once over all processes.
    """

    def __init__(self, transaction: _Transaction, inserts: _Inserts) -> None:
        self._store = transaction.store
        self._now = transaction.now
        self._report = transaction.report
        self._behaviours = transaction.setup.behaviours
        self._has_fired = transaction.given.has_fired
        self._inserts = inserts
        self._salt = self._store.file_id()
        self._zone_of = functools.cache(_zone)  # the local one is looked up anew, once for all

    # What callers ask for

    def write(self, new: _ScheduleRow) -> None:
        """Write a schedule, or replace that of its name; the same again changes nothing, a change holds from now on."""
        old = self._store.schedule(new.name)
        if old is None:
            self._go_on_from_now(new)
        elif not old.says_the_same(new):
            kept = _ScheduleRow._fields[_ScheduleRow._fields.index("written_at") :]
            new = new._replace(**{column: getattr(old, column) for column in kept})
            is_firing = old.is_declared or not old.is_from_code
            if is_firing and (old.when, old.jitter) == (new.when, new.jitter):
                self._store.save_schedule(new)
            else:
                self._go_on_from_now(new)

    def declare(self, declared: Iterable[tuple[_ScheduleRow, Iterable[str]]], known: Container[str]) -> None:
        """Write what the known classes, with these aliases, declare, and note which of them have ceased to."""
        names = set()
        for new, aliases in declared:
            self._adopt(new.name, aliases)
            self.write(new)
            names.add(new.name)
        for row in self._store.declared_schedules():
            if row.fsm in known and row.name not in names:
                self._store.save_schedule(row._replace(is_declared=0))

    def _adopt(self, name: str, aliases: Iterable[str]) -> None:
        """Go on with what a class has declared under a name that it had before."""
        for alias in aliases:
            old = self._store.schedule(alias)
            if old is not None and old.is_from_code and self._store.schedule(name) is None:
                self._store.rename_schedule(alias, name)

    def remove(self, name: str) -> bool:
        return self._store.unschedule(name)

    def trigger(self, name: str) -> int:
        """Insert an instance now, beside the grid."""
        row = self._find(name)
        new = _occurrence(row, self._behaviours.highest(row.fsm), self._now)
        instance = self._inserts.write_one(new._replace(scheduled_at=self._now))
        self._store.save_schedule(row._replace(last_id=instance, last_at=self._now))
        return instance

    def pause(self, name: str) -> None:
        self._store.save_schedule(self._find(name)._replace(is_paused=1, next_at=None, fires_at=None))

    def resume(self, name: str) -> None:
        row = self._find(name)
        if row.is_paused:
            try:
                self._go_on_from_now(row._replace(is_paused=0))
            except (ImportError, ValueError) as error:
                raise DurableError(f"the schedule {name!r} can't be resumed here: {error}") from error

    def _find(self, name: str) -> _ScheduleRow:
        row = self._store.schedule(name)
        if row is None:
            raise NotFoundError(f"no schedule is called {name!r}")
        return row

    # What the clock asks for

    def fire(self, after: int) -> None:
        """Insert what is due by now, of the classes known here; the others are left to other engines."""
        for row in self._store.due_schedules(after, self._now):
            spec = self._behaviours.highest(row.fsm)
            if spec is None:
                self._report.left_schedules.add((row.name, f"nothing here can run {row.fsm}"))
            elif row.name not in self._has_fired and not spec.has_ceased_to_declare(row):
                self._fire(row, spec)

    def look_again(self) -> None:
        """Forget up to when the schedules were looked at."""
        self._report.fired_until = _LONG_AGO

    def realign(self) -> None:
        """Set right what a clock that was ahead has left: a next instant beyond the grid's next from now."""
        self.look_again()
        for row in self._store.schedules_ahead(self._now):
            realigned = self._ask(row, functools.partial(self._from_now, row))
            if realigned is not None and cast(int, realigned.next_at) < cast(int, row.next_at):
                self._store.save_schedule(realigned)

    def _go_on_from_now(self, row: _ScheduleRow) -> None:
        self._store.save_schedule(self._from_now(row, row.timetable(self._salt, self._zone_of)))

    def _from_now(self, row: _ScheduleRow, timetable: _Timetable) -> _ScheduleRow:
        return row.going_on_at(timetable.grid.after(self._now), timetable)

    def _ask(self, row: _ScheduleRow, question: Callable[[_Timetable], _Answer]) -> _Answer | None:
        """Ask about a schedule; one that can't be read here, without the extra or its zone, is left to others."""
        try:
            return question(row.timetable(self._salt, self._zone_of))
        except Exception as error:  # noqa: BLE001 - of cron's library, of the zone's data: it must not stop the beat
            self._report.left_schedules.add((row.name, _error_text(error)))
            return None

    def _fire(self, row: _ScheduleRow, spec: _Spec) -> None:
        """Insert what has become due of a schedule, and move it on."""

        def read(timetable: _Timetable) -> tuple[_Timetable, _Due, _NewRow]:
            return timetable, timetable.due(cast(int, row.next_at), self._now), _occurrence(row, spec, self._now)

        answer = self._ask(row, read)
        if answer is None:
            return
        timetable, due, new = answer
        moved = row
        for nominal in due.fires:
            late_ms = self._now - timetable.fires_at(nominal)
            moved = self._insert(moved, new._replace(scheduled_at=nominal), nominal, late_ms)
        if due.missed:
            self._report.tell("schedule.missed", {"count": due.missed}, {"name": row.name})
        moved = moved.going_on_at(due.next_at, timetable)
        self._store.save_schedule(moved._replace(missed=row.missed + due.missed))
        self._report.fired.append(row.name)

    def _insert(self, row: _ScheduleRow, new: _NewRow, nominal: int, late_ms: int) -> _ScheduleRow:
        """Insert an occurrence, unless it is skipped, or was inserted before the clock was set back."""
        fired_until = _LONG_AGO if row.fired_until is None else row.fired_until
        if nominal <= fired_until and self._store.has_occurrence(row.name, nominal):
            return row
        live = self._live_instance(row)
        if live is not None:
            self._skip(row, live)
            return row
        try:
            instance = self._inserts.write_one(new)
        except DuplicateError as error:
            self._skip(row, error.id)
            return row
        self._report.tell("schedule.fired", {"late": late_ms / 1000}, {"name": row.name, "id": instance})
        return row._replace(last_at=nominal, last_id=instance, fired_until=max(nominal, fired_until))

    def _live_instance(self, row: _ScheduleRow) -> int | None:
        """Return the latest instance, if it is live and must not be overlapped."""
        is_live = not row.overlap and row.last_id is not None and self._store.status(row.last_id) in LIVE
        return row.last_id if is_live else None

    def _skip(self, row: _ScheduleRow, instance: int) -> None:
        self._report.tell("schedule.skipped", {}, {"name": row.name, "id": instance})


_Met = tuple[tuple[int, int, int], _Pick, _Row, _Found]
"""A row that is to be met in its order, with its class and the object of it."""


class _Picker:
    """Finds what is due in the queues, in its order, and claims what the limits admit."""

    PARKED_AT_ONCE = 2000
    """With so many rows parked, the beat ends; the next goes on at once."""

    def __init__(self, transaction: _Transaction, admission: _Admission, lines: _Lines) -> None:
        self._transaction = transaction
        self._setup = transaction.setup
        self._store = transaction.store
        self._report = transaction.report
        self._admission = admission
        self._lines = lines
        self._known: dict[tuple[str, int], _Found] = {}

    def claim_wanted(self) -> None:
        """Claim what the engine wants; a drain, whose step has gone on inline, wants no other."""
        demand = self._transaction.given.demand
        at_most = demand.at_most - (len(self._report.claims) if demand.is_drain else 0)
        queues = self._runnable_queues() if demand.slots is None else demand.slots
        if at_most <= 0:
            return
        slots = {queue: self._transaction.free_slots(queue) for queue in queues}
        horizon = self._transaction.now if demand.horizon is None else demand.horizon
        self._claim({queue: count for queue, count in slots.items() if count}, horizon, at_most)
        if "scheduler.saturation" in self._report.wanted:
            full = [queue for queue in slots if not self._transaction.free_slots(queue)]
            self._report.saturated = [queue for queue in full if self._transaction.has_due(queue)]

    def _runnable_queues(self) -> Iterator[str]:
        queue = self._store.next_queue("")
        while queue is not None:
            yield queue
            queue = self._store.next_queue(queue)

    def _claim(self, room: Mapping[str, int], horizon: int, at_most: int) -> None:
        """Claim up to so many rows of each queue, and at most so many in all; note when the next is due.

        Within a queue by priority, time and id. Rows with limits are met in that order over all the queues, since a
        limit has one line; others are taken as they come, unless no more than some are wanted in all.
        """
        picks = {queue: _Pick(queue, slots, horizon) for queue, slots in room.items()}
        self._transaction.picks = picks
        for pick in picks.values():
            pick.rows = self._go_through(pick, takes_any=at_most == _MAX_INTEGER)
        count = parked = 0
        met = [pick.rows for pick in picks.values() if pick.rows is not None]
        for one in met[0] if len(met) == 1 else heapq.merge(*met):
            if self._take_or_park(*one):
                count += 1
            else:
                parked += 1
            if count >= at_most or parked >= self.PARKED_AT_ONCE:
                break
        self._report.is_unfinished |= parked >= self.PARKED_AT_ONCE
        for pick in picks.values():
            pick.stop_reading()
            self._write(pick)
            if "pick.stop" in self._report.wanted:
                measurements = {"count": len(pick.taken), "demand": pick.slots}
                self._report.tell("pick.stop", measurements, {"queue": pick.queue})
        self._transaction.picks = {}
        self._admission.forget_lines()

    def _go_through(self, pick: _Pick, *, takes_any: bool) -> Generator[_Met, None, None]:
        """Go through what can run here of a queue, and write what was found when there is no more, or no more room."""
        yield from self._go_through_due(pick, takes_any=takes_any)
        self._write(pick)
        self._admission.forget_closed()

    def _go_through_due(self, pick: _Pick, *, takes_any: bool) -> Iterator[_Met]:
        """Go through what is due in a queue and can run here: take what has no limits, yield what is to be met."""
        known, taken, slots, services = self._known, pick.taken, pick.slots, self._setup.services
        priority = -_MAX_INTEGER - 1
        while (head := self._store.next_priority(pick.queue, priority)) is not None:
            priority, eligible_at = head
            if eligible_at > pick.horizon:
                self._report.note_due(eligible_at)
                continue
            rows = self._store.candidates(pick.queue, priority, pick.horizon)
            try:
                while (row := next(rows, None)) is not None:
                    found = known.get((row.fsm, row.version)) or self._find(row)
                    if found is None:
                        rows = self._known_rows(pick, priority)
                        continue
                    if row.concurrency_key is not None or row.rate_limit is not None or not takes_any:
                        yield _order(row), pick, row, found
                    else:
                        inbox = self._store.signals(row.id) if row.has_inbox else _NO_SIGNALS
                        taken.append(_Claim(row, *found, services, inbox))
                    if len(taken) >= slots:
                        return
            finally:  # or the traceback of an interrupt would keep it, and with it an old view of the file
                rows = iter(())
            self._report.note_due(self._store.next_due(pick.queue, priority, pick.horizon))

    def _take_or_park(self, order: tuple[int, int, int], pick: _Pick, row: _Row, found: _Found) -> bool:
        """Take a row if its limits admit it; else it waits for the one that does not."""
        refusal = self._admission.refusal(row, order)
        if refusal is None:
            inbox = self._store.signals(row.id) if row.has_inbox else _NO_SIGNALS
            pick.taken.append(_Claim(row, *found, self._setup.services, inbox))
            return True
        pick.parked.append((refusal, row.id))
        self._lines.note_refused(row, refusal)
        return False

    def _write(self, pick: _Pick) -> None:
        """Write what was found in a queue, once; from then on it is not gone through."""
        if pick.is_written:
            return
        pick.is_written = True
        if pick.parked:
            self._store.park_many(pick.parked)
            self._admission.note_parked(parked_on for parked_on, _ in pick.parked)
        if pick.taken:
            self._store.claim_many(self._setup.worker_id, pick.taken, self._transaction.now)
            self._report.claims.extend(pick.taken)

    def _find(self, row: _Row) -> _Found | None:
        """Find a row's class and the object of it, asked for once in a beat; None if it can't run here, or not yet."""
        behaviours, name = self._setup.behaviours, (row.fsm, row.version)
        found = behaviours.find(*name)
        if found is not None:
            self._known[name] = found
        else:
            self._report.unknown[name] = row.queue
        return found

    def _known_rows(self, pick: _Pick, priority: int) -> Iterator[_Row]:
        """Go on without the rows of classes that can't run, which are skipped within the index."""
        seen = {claim.row.id for claim in pick.taken} | {instance for _, instance in pick.parked}
        rows = self._store.known_candidates(pick.queue, priority, pick.horizon, self._setup.behaviours.known())
        return (row for row in rows if row.id not in seen)


class _Beat:
    """One transaction: outcomes, requests, timers, claims; and the report of who has to hear of it."""

    SET_RIGHT_AT_ONCE = 5000
    """So many rows are dated anew in one transaction, where the clock was set back."""

    def __init__(self, setup: _Setup, given: _Given) -> None:
        self.store = setup.store
        self.now = given.now
        self._given = given
        self._transaction = transaction = _Transaction(setup, given)
        self.report = transaction.report
        self._admission = admission = _Admission(transaction, setup.concurrency_limits)
        self.lines = _Lines(transaction, admission)
        self.inserts = _Inserts(transaction)

    def run(self) -> _Report:
        """Do the work of a beat, in this order, and report."""
        given, transaction = self._given, self._transaction
        if given.commits:
            parts = self._admission, self.inserts, self.inboxes, self.history
            _Settlement(transaction, *parts).settle_all(given.commits)
        if given.requests:
            self._serve(given.requests)
        if given.has_timers:
            self._fire()
        self._release()
        if given.demand.slots != {}:
            _Picker(transaction, self._admission, self.lines).claim_wanted()
        self.lines.pass_on()
        if transaction.freed_keys or transaction.poked_buckets:
            self._release()
            self.report.is_unfinished = True
        self.report.note_due(self._admission.save())
        return self.report

    def stop_reading(self) -> None:
        """Let go of statements that are half read: the transaction is undone."""
        for pick in self._transaction.picks.values():
            pick.stop_reading()

    # What outcomes and requests ask for

    @property
    def inboxes(self) -> _Inboxes:
        return _Inboxes(self._transaction)

    @property
    def history(self) -> _History:
        return _History(self._transaction, self.inserts)

    @property
    def withdrawals(self) -> _Withdrawals:
        return _Withdrawals(self._transaction, self.history)

    @property
    def instances(self) -> _Instances:
        return _Instances(self._transaction, self.inserts, self.history, self.withdrawals)

    @property
    def schedules(self) -> _Schedules:
        return _Schedules(self._transaction, self.inserts)

    @property
    def cleaning(self) -> _Cleaning:
        return _Cleaning(self._transaction)

    def pause(self, queue: str) -> None:
        self.store.pause(queue)
        self._transaction.forget_paused()
        self.withdrawals.give_back_unstarted(queue)
        self.lines.sweep()  # a row of that queue may have been about to take a slot that others wait for

    def resume(self, queue: str) -> None:
        self.store.resume(queue)
        self._transaction.forget_paused()

    def save_policies(self, policies: Iterable[_Policy]) -> None:
        for policy in policies:
            self.store.save_policy(policy, self.now)

    def set_right(self) -> bool:
        """Set right what was written by a clock that was ahead; False if there may be more to do."""
        count, is_more = self.store.set_right(self.now, self.SET_RIGHT_AT_ONCE)
        if count:
            message = (
                "the clock is behind what it has written: %d instances wait from now on for what they were to wait"
            )
            self.report.log(_log.warning, message, count)
        self.report.is_unfinished |= is_more
        self.schedules.realign()
        self.lines.sweep()
        return not is_more

    def fire_timeouts(self) -> int:
        """Let every armed await deadline fire, whatever the clock says."""
        return self._fire_awaits(_END_OF_TIME)

    # Requests

    def _serve(self, requests: Iterable[_Request]) -> None:
        """Do what callers ask for, in their order; rows to insert that come one after the other are written at once."""
        pending: list[_Request] = []
        for request in requests:
            if request.row is not None and not self._given.is_careful:
                pending.append(request)
            else:
                self._insert(pending)
                pending = []
                self._answer(request)
        self._insert(pending)

    def _insert(self, requests: Sequence[_Request]) -> None:
        """Insert the rows of many requests."""
        if not requests:
            return
        rows = [request.row for request in requests if request.row is not None]
        for request, row, instance in zip(requests, rows, self.inserts.write(rows), strict=True):
            request.value = instance
            request.error = None if instance is not None else self.inserts.duplicate(row)

    def _answer(self, request: _Request) -> None:
        request.error = None  # of a first try
        is_careful = self._given.is_careful
        if is_careful:
            self.store.savepoint()
        try:
            if request.row is not None:
                request.value = self.inserts.write_one(request.row)
            elif request.action is not None:
                request.value = request.action(self)
        except DurableError as error:
            request.error = error
        except Exception as error:
            if not is_careful or isinstance(error, _STORE_FAILURES):
                raise
            self.store.undo()
            self._admission.forget_everything()
            request.error = _translated(error, self.store.path) if isinstance(error, apsw.Error) else error
            return
        if is_careful:
            self.store.release()

    # Timers

    def _fire(self) -> None:
        """Do what the clock asks for, and note when it does so next."""
        now, report = self.now, self.report
        deadline, ready_at, fires_at = self.store.timers(report.fired_until)
        if fires_at is not None and fires_at <= now:
            self.schedules.fire(report.fired_until)
            report.fired_until = now  # it is not asked again and again for those that it has left
            _, _, fires_at = self.store.timers(now)
        if deadline is not None and deadline <= now:
            self._fire_awaits(now)
            deadline, _, _ = self.store.timers(now)
        if ready_at is not None and ready_at <= now:
            self._transaction.poked_buckets.update(self.store.ready_buckets(now))
            ready_at = self.store.next_ready(now)
        report.note_due(deadline, ready_at, fires_at)

    def _fire_awaits(self, until: int) -> int:
        count = 0
        while fired := self.store.fire(self.now, until):
            for instance, fsm, step_name in fired:
                self.report.tell("await.timeout", {}, {"id": instance, "fsm": fsm, "step": step_name})
            count += len(fired)
        return count

    # What was set free

    def _release(self) -> None:
        """Wake parents whose children have ended, and let out of the lines what was set free."""
        transaction = self._transaction
        for parent in transaction.parents:
            if not self.store.has_live_child(parent):
                self.store.wake_parent(parent, self.now)
        transaction.parents.clear()
        if transaction.freed_keys or transaction.poked_buckets:
            self.lines.release()


def _log_failure(row: _Row, change: _End) -> None:
    _log.error(
        "instance %d (%s) failed in step %r: %s", row.id, row.fsm, row.step, change.last_error, extra=_log_details(row)
    )


# ==================================================================================================
# Scheduler
# ==================================================================================================


def _at_least_1(value: object, name: str) -> int:
    return _integer(value, name, 1)


def _by_name(value: object, option: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Check an option that is a dict by name."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{option} must be a dict, not {_brief(value)}")
    for name, one in value.items():
        check(one, f"{option}[{_text(name, f'a name in {option}')!r}]")
    return dict(value)


def _by_limit_name(value: object, option: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Check an option that is a dict by a limit's name, which holds no colon: that parts it from its partitions."""
    checked = _by_name(value, option, check)
    for name in checked:
        if ":" in name:
            raise ValueError(f"{option} are by name, the part of a key before the first ':', not {_brief(name)}")
    return checked


def _check_rate_limit(value: object, name: str) -> None:
    if not isinstance(value, RateLimit):
        raise ValueError(f"{name} must be a RateLimit, not {_brief(value)}")


def _check_synchronous(value: object, _: str) -> str:
    if value not in ("full", "normal", "extra", "off"):
        raise ValueError(f"synchronous must be one of full, normal, extra, off, not {_brief(value)}")
    return str(value)


def _check_clock(clock: Any, _: str) -> Callable[[], float]:
    try:
        now = clock()
    except TypeError:
        now = None
    if not isinstance(now, int | float) or not _START_OF_TIME <= now * 1000 <= _END_OF_TIME:
        raise ValueError(
            f"clock must be a function that returns seconds since the epoch, not {_brief(clock)} ({now!r})"
        )
    return cast(Callable[[], float], clock)


def _option(default: object, check: Callable[..., Any], *arguments: Any, alias: str | None = None) -> Any:
    """Make the field of an option that is read by that function, which gets its name as users know it."""

    def convert(value: Any, field: attrs.Attribute[Any]) -> Any:
        return check(value, field.alias, *arguments)

    return attrs.field(default=default, converter=attrs.Converter(convert, takes_field=True), alias=alias)


def _seconds(value: object, name: str) -> float:
    return _duration_ms(value, name) / 1000


def _positive_seconds(value: object, name: str) -> float:
    return _positive_ms(value, name) / 1000


@attrs.frozen(kw_only=True)
class _Options:
    """The options of an engine, checked; durations in the unit that the name says."""

    name: str = _option("durable", _text)
    queues: dict[str, int] = _option({"default": 10}, _by_name, _at_least_1)
    fsms: Iterable[object] = ()
    rate_limits: dict[str, RateLimit] = _option({}, _by_limit_name, _check_rate_limit)
    concurrency_limits: dict[str, int] = _option({}, _by_limit_name, _at_least_1)
    prefetch: int = _option(0, _integer, 0)
    lease_ms: int = _option(60, _positive_ms, alias="lease_ttl")
    heartbeat_ms: int = _option(20, _positive_ms, alias="heartbeat_interval")
    poll_s: float = _option(0.05, _positive_seconds, alias="poll_interval")
    drain_s: float = _option(5, _seconds, alias="drain_timeout")
    retention_ms: int = _option(dt.timedelta(days=1), _retention_ms, ValueError, alias="retention")
    gc_ms: int = _option(60, _positive_ms, alias="gc_interval")
    history: bool = _option(True, _boolean)
    synchronous: str = _option("full", _check_synchronous)
    clock: Callable[[], float] = _option(time.time, _check_clock)

    def __attrs_post_init__(self) -> None:
        if self.heartbeat_ms >= self.lease_ms:
            lease_s, heartbeat_s = self.lease_ms / 1000, self.heartbeat_ms / 1000
            raise ValueError(
                f"heartbeat_interval must be less than lease_ttl, {lease_s:g} seconds, not {heartbeat_s:g}"
            )


def _call_in_thread(call: Callable[[], Any], cancel: Callable[[], None]) -> Any:
    """Call something in a thread with this one's context variables, and return what it returns or raise.

    An interrupt cancels it, and is raised on when it has ended.
    """
    outcome: list[Any] = []
    has_ended = threading.Event()  # `Thread.join` that was interrupted takes the thread for ended, up to CPython 3.12

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001 - raised on in the caller's thread
            outcome.append((None, error))
        finally:
            has_ended.set()

    threading.Thread(target=contextvars.copy_context().run, args=(run,)).start()
    try:
        has_ended.wait()
    except BaseException:
        cancel()
        has_ended.wait()
        raise
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _run_outside_loop(call: Callable[[], Any], cancel: Callable[[], None] = lambda: None) -> Any:
    """Call something that runs an event loop: here, or in a thread where one runs, since none can run in another."""
    import asyncio

    return call() if asyncio._get_running_loop() is None else _call_in_thread(call, cancel)


async def _call_beside_loop(call: Callable[[], None]) -> None:
    """Call something that blocks in a thread; who is cancelled meanwhile waits for the end of it all the same."""
    with _loading():
        import asyncio
        import concurrent.futures.thread  # noqa: F401 - asyncio would, in the task

    calling = asyncio.ensure_future(asyncio.to_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not calling.done():
        try:
            await asyncio.shield(calling)
        except asyncio.CancelledError as error:
            cancelled = error
    calling.result()
    if cancelled is not None:
        raise cancelled


_FORK_ADVICE = (
    "SQLite's record of its locks is copied by a fork and wrong from then on, so that nothing in this process may open"
    " the file: fork before there is an engine, or start processes by spawn"
)


def _refuse_inherited(path: str) -> None:
    identity = _file_id(path)
    if identity is not None and identity in _process.inherited_files:
        raise EngineClosedError(f"an engine on {path} was open when this process was forked off. {_FORK_ADVICE}")


class _Held:
    """What this engine has claimed and not let go of.

    By id and claim number: what it has lost may be claimed again while it still runs.
    """

    def __init__(self) -> None:
        self._of: dict[str, dict[tuple[int, int], _Claim]] = collections.defaultdict(dict)
        self._ids: set[int] = set()

    def add(self, claims: Iterable[_Claim]) -> None:
        for claim in claims:
            row = claim.row
            self._of[row.queue][row.id, row.claim] = claim
            self._ids.add(row.id)

    def remove(self, claims: Iterable[_Claim]) -> None:
        for claim in claims:
            row = claim.row
            if self._of[row.queue].pop((row.id, row.claim), None) is not None:
                self._ids.discard(row.id)

    def count(self, queue: str) -> int:
        """How many of a queue there are."""
        return len(self._of[queue])

    def __contains__(self, instance: int) -> bool:
        """Whether an outcome is still to come for an instance. Of what was claimed twice that may not be known."""
        return instance in self._ids

    def __iter__(self) -> Iterator[_Claim]:
        return iter([claim for claims in list(self._of.values()) for claim in list(claims.values())])

    def __bool__(self) -> bool:
        return any(self._of.values())


class _Runners:
    """Those who run what is claimed: pools of threads and an event loop, or a thread that drains."""

    LOOK_S = 0.005
    """How often to look for rows that wait behind a step that takes long: as often as threads take turns anyway."""

    def __init__(self, shared: _Shared, prefetch: int) -> None:
        self.pools: dict[str, _Pool] = {}
        self.drain: _Drain | None = None
        self.held = _Held()
        self.is_empty = _WakeUp()
        """Set when nothing is held any more by an engine that stops."""
        self._shared = shared
        self._prefetch = prefetch
        self._loop: _EventLoop | None = None
        self._callers_loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = _Lock()
        shared.run_async = self._run_async

    def start(self, widths: Mapping[str, int], loop: asyncio.AbstractEventLoop | None) -> None:
        """Take rows from now on; `async def` steps run on that loop, if one is given."""
        self._callers_loop = loop
        self.pools = {queue: _Pool(width, self._shared) for queue, width in widths.items()}

    def close(self) -> None:
        """End the threads that have nothing to run, and cancel what runs on the event loop."""
        for pool in self.pools.values():
            pool.close()
        if self._loop is not None:
            self._loop.close()

    # What is claimed

    @property
    def are_running(self) -> bool:
        """Whether rows are taken at all."""
        return bool(self.pools) or self.drain is not None

    def demand(self) -> _Demand:
        """Say what is to be claimed: what the pools have room for; a drain claims in beats of its own."""
        if self.drain is not None:
            return self.drain.demand()
        if self._shared.is_stopping or not self.pools:
            return _NO_DEMAND
        prefetch, held = self._prefetch, self.held
        return _Demand({queue: pool.width + prefetch - held.count(queue) for queue, pool in self.pools.items()})

    def submit(self, queue: str, claims: collections.deque[_Claim], *, first: bool = False) -> None:
        """Hand over claimed rows, each of them once, wherever that is interrupted."""
        (self.drain or self.pools[queue]).submit(claims, first=first)

    def let_go(self, claims: Sequence[_Claim]) -> None:
        """Forget claims that are over."""
        progress = self._shared.services.progress
        if progress:
            for claim in claims:
                progress.pop((claim.row.id, claim.row.claim), None)
        self.held.remove(claims)
        if self._shared.is_stopping and not self.held:
            self.is_empty.set()

    def take_back(self, queue: str, instance: int | None) -> list[_Claim]:
        """Take claimed rows of a queue that have not started from its pool: all, or only that one."""
        pool = self.pools.get(queue)
        return pool.withhold(instance) if pool is not None else []

    def release(self) -> None:
        """Forget what was taken back: that is committed."""
        for pool in self.pools.values():
            pool.release()

    def put_back(self) -> None:
        """Let what was taken back start after all: the beat has come to nothing."""
        for pool in self.pools.values():
            pool.put_back()

    def withdraw(self) -> list[_Claim]:
        """Take back for good all that has not started."""
        claims = [claim for pool in self.pools.values() for claim in pool.withhold()]
        self.release()
        return claims

    # What is to be looked after

    @property
    def will_commit(self) -> bool:
        """Whether a thread is about to run a beat, unless its step blocks."""
        return any(pool.will_beat for pool in self.pools.values())

    def look(self, monotonic: float) -> float:
        """See whether threads have come to steps that block; return when to look again."""
        for pool in self.pools.values():
            pool.look()
        return self.next_look_at(monotonic)

    def next_look_at(self, monotonic: float) -> float:
        """When to look at the pools again."""
        for pool in self.pools.values():
            if pool.may_be_blocked:
                return monotonic + self.LOOK_S
        return math.inf

    def expire(self, monotonic: float) -> float:
        """Disown the steps that are over their timeouts; return when the next is."""
        timeouts = self._shared.timeouts
        if timeouts.next_at <= monotonic:
            for claim, pool in timeouts.take_expired(monotonic):
                if pool.disown(claim, _timeout_error(claim)) and claim.is_async and self._loop is not None:
                    self._loop.cancel(claim)
        return timeouts.next_at

    def replace_dead(self) -> None:
        """Have threads replaced that have died; the steps of an event loop that is gone have crashed."""
        for pool in self.pools.values():
            pool.replace_dead()
        loop = self._loop
        if loop is None:
            return
        loop.rouse()
        if loop.is_dead:
            with self._loop_lock:
                self._loop = None
            for claim in loop.unfinished():
                self.pools[claim.row.queue].finish_async(claim, _died(claim))

    def unstarted(self) -> Iterator[_Row]:
        """Yield the claimed rows that have not started."""
        for pool in self.pools.values():
            yield from pool.unstarted()

    def cancel_async(self, is_cancelled: Callable[[_Claim], bool]) -> None:
        """Have `async def` steps end whose instance was cancelled; what they come to is dropped."""
        loop = self._loop
        if loop is not None:
            for claim in loop.running():
                if not claim.is_cancelled and is_cancelled(claim):
                    claim.is_cancelled = True  # once: what it awaits to clean up is not to be cancelled in its turn
                    loop.cancel(claim)

    # The event loop

    def _run_async(self, claim: _Claim, pool: _Pool) -> None:
        loop = self._have_loop()
        if loop is None:
            return
        try:
            loop.submit(claim, pool)
        except RuntimeError as error:  # the caller's loop, closed before the engine: the row waits for better times
            pool.finish_async(claim, _crash(claim, error))

    def _have_loop(self) -> _EventLoop | None:
        """Return the event loop; a system that has no more threads or files is asked again, until this is closed."""
        while not self._shared.is_closed:
            try:
                with self._loop_lock:
                    if self._loop is None:
                        own = self._callers_loop
                        self._loop = _EventLoop(self._shared) if own is None else _CallersLoop(self._shared, own)
                    return self._loop
            except (RuntimeError, OSError, ImportError) as error:
                self._shared.log_soon("the event loop could not be started", error)
            time.sleep(0.5)
        return None


class _Batch:
    """What a beat has taken up, until all of it is told or put back.

    It is the scheduler's and not the thread's: what an interrupt has kept one thread from, the next does.
    """

    is_open = is_committing = False
    error: BaseException | None = None
    """What was raised in its transaction, or right behind it."""
    beat: _Beat | None = None
    """The latest try of its transaction."""
    failure: Exception | None = None
    """Why nothing of it was kept."""
    doubt: Exception | None = None
    """An error that did not come again, and so came from outside: it is raised on, behind the commit."""
    claims: dict[str, collections.deque[_Claim]] | None = None
    """What is to be handed to the runners, as far as it was not, by queue; None until it is sorted."""
    news: collections.deque[Callable[[], object]] | None = None
    """What the log and the subscribers are to be told, as far as it was not handed over."""
    kinds: collections.deque[str] | None = None

    def __init__(self) -> None:
        self.commits: list[_Commit] = []
        self.requests: list[_Request] = []
        self.failed: list[collections.deque[_Claim]] = []
        self.stopped: collections.deque[_Commit] = collections.deque()

    def sort_claims(self, report: _Report) -> dict[str, collections.deque[_Claim]]:
        """Say, once, who gets what; a refused outcome goes to `handle`, and if it is that of `handle`, ends."""
        if self.claims is None:
            claims: dict[str, collections.deque[_Claim]] = {}
            for claim in report.claims:
                claims.setdefault(claim.row.queue, collections.deque()).append(claim)
            for commit, error in report.refused:
                if commit.claim.error is not None or commit.kind == _CRASH:
                    self.stopped.append(_stop(commit.claim, error))
                else:
                    self.failed.append(collections.deque([commit.claim.failed_with(error)]))
            self.claims = claims
        return self.claims


class _Reporter:
    """Tells waiters, the log and subscribers what beats have brought, and why one has failed."""

    def __init__(self, shared: _Shared, held: _Held, files: _OpenFiles) -> None:
        self.waiters = _Waiters()
        self._shared = shared
        self._dispatcher = shared.dispatcher
        self._held = held
        self._files = files
        self._told: set[tuple[str, int | str]] = set()  # unknown classes with versions, schedules left with reasons
        self._is_loss_told = False

    def tell(self, batch: _Batch, report: _Report) -> None:
        """Have the log and the subscribers told of what a beat has brought; once, wherever that is interrupted."""
        if batch.news is None:
            self._add_unknown(report)
            for queue in report.saturated:
                report.tell("scheduler.saturation", {"in_flight": self._held.count(queue)}, {"queue": queue})
            failures = (functools.partial(_log_failure, row, change) for row, change in report.failures)
            batch.news = collections.deque([*failures, *report.logs, *map(self._dispatcher.call_for, report.events)])
        self._dispatcher.take_over(batch.news)

    def _add_unknown(self, report: _Report) -> None:
        """Say, once, which classes nothing here can run, and why a schedule is left to other engines."""
        for name, version in report.unknown.keys() - self._told:
            report.log(_log.warning, "nothing here can run %s version %d: its instances wait", name, version)
            metadata = {"fsm": name, "version": version, "queue": report.unknown[name, version]}
            report.tell("fsm.unknown", {}, metadata)
        for schedule, reason in report.left_schedules - self._told:
            report.log(_log.warning, "the schedule %s is left to other engines: %s", schedule, reason)
        self._told.update(report.unknown, report.left_schedules)

    def tell_failure(self, error: Exception) -> None:
        if self._files.loss is None:
            self._shared.log_soon("a commit failed and nothing of it was kept", error)
        elif not self._is_loss_told:  # it is for good: told once
            self._is_loss_told = True
            self._dispatcher.post(functools.partial(_log.error, "%s", self._files.loss))
            self.waiters.wake_all()
            for waiter in self.waiters.futures():
                waiter.set()
        else:
            return
        if self._dispatcher.wants("store.error"):
            self._dispatcher.publish([Event("store.error", {}, {"error": _error_text(error)})])


class _StandingDuty(NamedTuple):
    """Something to be done in a beat when it is due, until a commit has done it: by the thread that wakes up for it."""

    next_at: Callable[[float], float]
    """Says when it is due, at that instant; monotonic seconds both."""
    action: Callable[[_Beat], Any]


class _Committer:
    """Runs beats, one at a time, in whichever thread needs one, and tells everybody what they have committed.

    Only a beat uses the write connection, under `lock`. Everything else reaches it through `requests`, what callers
    want, and the outcomes, what steps have come to.
    """

    SLACK_S = 0.0005
    """By how much less sleep the scheduler's thread is not woken for."""
    REQUESTS_AT_ONCE = 5000
    INLINE_S = 0.1
    """For how long an instance may go on inline before it is looked whether it keeps others waiting."""

    def __init__(
        self,
        setup: _Setup,
        shared: _Shared,
        runners: _Runners,
        reporter: _Reporter,
        files: _OpenFiles,
        copier: _LogCopier,
    ) -> None:
        self.lock = _Lock()
        self.requests: collections.deque[_Request] = collections.deque()
        self.requests_lock = _Lock()
        self.standing: tuple[_StandingDuty, ...] = ()
        self.beat_at = -math.inf
        """When the last beat ended, by the monotonic clock."""
        self.due_at: int | None = None
        """The next instant at which something in the file is due."""
        self.failure: Exception | None = None
        """What storage said last, until it works again."""
        self.retry_at = 0.0
        """When storage that failed is tried again, by the monotonic clock."""
        self.fired_until = _END_OF_TIME
        """Up to when the schedules were looked at: all time, until what the classes declare is written."""
        self.thread: threading.Thread | None = None
        """The scheduler's, of a started engine."""
        self._passed_on: Set[str] = frozenset()
        self._failures_in_a_row = 0
        self._batch = _Batch()
        self._setup = setup
        self._store = setup.store
        self._services = setup.services
        self._shared = shared
        self._outcomes = shared.outcomes
        self._dispatcher = shared.dispatcher
        self._runners = runners
        self._reporter = reporter
        self._waiters = reporter.waiters
        self._files = files
        self._copier = copier
        shared.commit = self.commit_outcomes

    # When one is needed

    def is_asked(self) -> bool:
        """Whether callers wait for what no beat is at: it is to come, or was left by one that was interrupted."""
        return bool(self.requests) or (self._batch.is_open and not self.lock.locked())

    def next_at(self, monotonic: float) -> float:
        """When a beat is next needed; what storage refused waits for its next try, callers do not."""
        if self.is_asked():
            return monotonic
        due_at = self._due_at(monotonic)
        for duty in self.standing:
            due_at = min(due_at, duty.next_at(monotonic))
        return max(self.retry_at, due_at)

    def _due_at(self, monotonic: float) -> float:
        """When there are outcomes to commit that no worker is about to, or something in the file is due."""
        due_at = math.inf if self.due_at is None else monotonic + (self.due_at - self._services.now()) / 1000
        if not self._outcomes:
            return due_at
        if self.failure is not None or not self._runners.will_commit:
            return monotonic
        return min(due_at, self.beat_at + self._runners.LOOK_S)  # who was counted on may be held up

    def _wake_if_needed(self) -> None:
        """Wake the scheduler's thread if a beat in another has brought on what it must wake up for earlier."""
        monotonic = _Ticks.monotonic()
        needed_at = monotonic if self.requests else self._runners.next_look_at(monotonic)
        if self._outcomes or self.due_at is not None:
            needed_at = min(needed_at, max(self.retry_at, self._due_at(monotonic)))
        if needed_at < self._shared.wakes_at - self.SLACK_S:
            self._shared.wake_up.set()

    def is_due(self) -> bool:
        """Whether something in the file is due."""
        return self.due_at is not None and self.due_at <= self._services.now()

    # Who runs one

    def commit_due(self, monotonic: float) -> float:
        """Run a beat if one is needed, in the scheduler's thread; return when the next is."""
        if self.next_at(monotonic) <= monotonic:
            with self.lock:
                if self._shared.is_closed:
                    return math.inf
                self.beat()
        self._dispatcher.flush()  # also what no thread could be had for, whoever has asked for it
        return self.next_at(_Ticks.monotonic())

    def commit_outcomes(self) -> bool:
        """Commit what is finished, and claim, in a worker's thread; False if a beat is under way, or failed."""
        try:
            return self.commit_in_place()
        except Exception:  # noqa: BLE001 - the engine's own fault; the scheduler's thread tries again
            _log.exception("%s: a beat failed; it is tried again", self._shared.path)
            return False

    def commit_in_place(self) -> bool:
        """Run the beat of a started engine in this thread, unless one is under way: it saves two switches.

        Whoever runs one looks for what came meanwhile when it has let go of the lock, so nothing is left lying.
        """
        if self.lock.locked():  # and not acquire(blocking=False): an interrupt behind it would leave it locked
            return False
        try:
            with self.lock:
                if self.failure is None and not self._shared.is_closed:
                    self.beat(minds_clock=False)
            self._wake_if_needed()
        except BaseException:
            self._shared.wake_up.set()  # for what came meanwhile, and what was put back
            raise
        self._dispatcher.flush()
        return True

    def commit_for_callers(self) -> None:
        """Run a beat for those who wait, on an engine that no thread beats for."""
        with self.lock:
            if (self.requests or self._batch.is_open) and not self._shared.is_closed:
                self.beat()
        self._dispatcher.flush()

    def commit_once(self, demand: _Demand | None = None) -> bool:
        """Run one beat, which claims what is demanded; True if it has left something for the next.

        `failure` says whether storage refused it.
        """
        with self.lock:
            is_unfinished = not self._shared.is_closed and self.beat(demand)
        self._dispatcher.flush()
        return is_unfinished

    # The beat

    def beat(self, demand: _Demand | None = None, *, minds_clock: bool = True) -> bool:
        """Run one transaction and tell everybody who waits for it; True if it has left something for the next.

        It does the standing duties that are due, unless that is left to the scheduler's thread.

        The caller holds the lock. What is raised from outside, at whatever point, is raised on when what is committed
        has been told, and what is not has been put back.
        """
        if self._batch.is_open:  # of a thread that was interrupted again and again
            self.conclude()
        batch = self._batch
        try:
            self._take_up(batch)
            self._transact(batch, demand or self._runners.demand(), self._due_duties() if minds_clock else [])
        finally:
            self.conclude()
        if batch.failure is not None:
            return False
        self._copier.look(is_aside=self.thread is not None)
        if batch.doubt is not None:
            raise batch.doubt
        return batch.beat is not None and batch.beat.report.is_unfinished

    def _take_up(self, batch: _Batch) -> None:
        batch.is_open = True
        if self._outcomes:
            _hand_over(self._outcomes.popleft, len(self._outcomes), batch.commits.extend)
        if self.requests:
            count = min(len(self.requests), self.REQUESTS_AT_ONCE)
            _hand_over(self.requests.popleft, count, batch.requests.extend)
            batch.requests = [request for request in batch.requests if request.is_wanted()]

    def _due_duties(self) -> list[_Request]:
        monotonic = _Ticks.monotonic()
        return [_Request(one.action) for one in self.standing if one.next_at(monotonic) <= monotonic]

    def _transact(self, batch: _Batch, demand: _Demand, duties: list[_Request]) -> None:
        """Run the beat's transaction; what spoils it alone is set apart and the rest tried again."""
        commits, requests = list(batch.commits), batch.requests + duties
        refused: list[tuple[_Commit, Exception]] = []
        is_careful, doubt = False, None
        while True:
            batch.is_committing, batch.error = False, None
            beat = batch.beat = _Beat(self._setup, self._given(commits, requests, demand, is_careful=is_careful))
            error = self._attempt(batch, beat)
            if error is None:
                break
            if isinstance(error, _RolledBackError):
                commits.remove(error.commit)
                refused.append((error.commit, error.error))
            elif isinstance(error, _StaleError):
                is_careful = True
            elif is_careful or isinstance(error, _STORE_FAILURES):
                batch.failure = error
                return
            else:
                self._shared.log_soon("a beat failed, it is tried again piece by piece", error, exc_info=error)
                is_careful, doubt = True, error
        beat.report.refused.extend(refused)
        if doubt is not None and not (beat.report.refused or any(request.error for request in requests)):
            batch.doubt = doubt

    def _given(self, commits: list[_Commit], requests: list[_Request], demand: _Demand, *, is_careful: bool) -> _Given:
        return _Given(
            now=self._services.now(),
            commits=commits,
            requests=requests,
            demand=demand,
            wanted=self._dispatcher.wanted,
            has_timers=self._runners.are_running,
            is_stopping=self._shared.is_stopping,
            fired_until=self.fired_until,
            has_fired=frozenset() if self._runners.drain is None else self._runners.drain.fired,
            offered=self._passed_on,
            inline_s=self.INLINE_S,
            is_careful=is_careful,
        )

    def _attempt(self, batch: _Batch, beat: _Beat) -> Exception | None:
        """Try a transaction; return what it failed with, when it is undone."""
        started = _Ticks.perf_counter()
        try:
            self._store.begin()
            report = beat.run()
            batch.is_committing = True
            self._store.commit()
        except BaseException as error:
            batch.error = error  # first: it tells whether that is committed
            if self._is_committed(batch):
                raise
            self._undo(batch)
            if not isinstance(error, Exception):
                raise
            return error
        if (batch.commits or report.inserted) and "commit.stop" in report.wanted:
            duration = _Ticks.perf_counter() - started
            measurements = {"outcomes": len(batch.commits), "inserts": report.inserted, "duration": duration}
            report.tell("commit.stop", measurements, {})
        return None

    def _is_committed(self, batch: _Batch) -> bool:
        """Whether the latest try has come through its COMMIT, whatever was raised behind it."""
        is_through = batch.is_committing and not isinstance(batch.error, apsw.Error)
        return is_through and not self._store.db.in_transaction

    # What follows

    def conclude(self) -> None:
        """Tell what the last beat has committed, or undo it and put back what it has taken up; if that is not done.

        The one place for that: each part may be done twice, so after an interrupt all is simply done again, at once,
        or by whoever holds the lock next.
        """
        if not self._batch.is_open:
            return
        try:
            self._end_batch()
        except BaseException:
            self._end_batch()
            raise

    def _end_batch(self) -> None:
        batch = self._batch
        if batch.beat is not None and self._is_committed(batch):
            self._publish(batch, batch.beat.report)
        elif batch.is_open:
            self._put_back(batch)
        self._batch = _Batch()

    def _put_back(self, batch: _Batch) -> None:
        self._undo(batch)
        _hand_over(batch.commits.pop, len(batch.commits), self._outcomes.extendleft)
        if batch.failure is not None:
            self._report_failure(batch.failure, batch.requests)
        else:
            # In a storm of interrupts those of callers that are gone would be looked through by each beat.
            batch.requests = [request for request in batch.requests if not request.is_cancelled]
            for request in batch.requests:
                request.error = None  # of this try
            _hand_over(batch.requests.pop, len(batch.requests), self.requests.extendleft)

    def _undo(self, batch: _Batch) -> None:
        batch.is_committing = False  # first: without a transaction it would look committed
        if batch.beat is not None:
            batch.beat.stop_reading()
        self._store.rollback()
        self._runners.put_back()

    def _publish(self, batch: _Batch, report: _Report) -> None:
        """After the commit, and only then: answer callers, wake waiters, hand out claims.

        All of it may be done twice, and nothing happens twice for it.
        """
        self.beat_at = _Ticks.monotonic()
        self._failures_in_a_row = 0
        self.failure = None
        self.due_at = self._services.now() if report.is_unfinished else report.next_at
        self._passed_on = report.passed_on
        self.fired_until = report.fired_until
        if report.withdrawn:
            self._runners.release()
        if report.left:
            self._runners.let_go(report.left)
        if report.claims or report.refused:
            self._dispatch(batch, report)
        for request in batch.requests:
            request.settle()
        for act in report.after:
            act()
        if report.cancelled:
            self._runners.cancel_async(lambda claim: claim.row.id in report.cancelled)
        if self._runners.drain is not None:
            batch.kinds = collections.deque(report.kinds) if batch.kinds is None else batch.kinds
            self._runners.drain.note(batch.kinds, report.fired)
        if report.settled and self._waiters:
            self._waiters.notify(report.settled)
        if batch.news or report.has_news:
            self._reporter.tell(batch, report)

    def _dispatch(self, batch: _Batch, report: _Report) -> None:
        """Hand claimed rows to their runners; what a commit refused goes to `handle`, or ends."""
        by_queue = batch.sort_claims(report)
        self._runners.held.add(report.claims)
        for queue, claims in by_queue.items():
            self._runners.submit(queue, claims)
        for failed in filter(None, batch.failed):
            self._runners.submit(failed[0].row.queue, failed, first=True)
        if batch.stopped:
            _hand_over(batch.stopped.popleft, len(batch.stopped), self._outcomes.extend)
            self._shared.wake_up.set()

    # Where storage fails

    def _report_failure(self, error: Exception, requests: list[_Request]) -> None:
        """Nothing of the beat was kept: outcomes are tried again with backoff, callers get the error."""
        if isinstance(error, apsw.Error):
            self._files.look()  # what looks like damage may be another file
        if self._files.loss is not None:
            error = _LostFileError(self._files.loss)
        translated = _translated(error, self._shared.path) if isinstance(error, apsw.Error) else error
        self._failures_in_a_row += 1
        self.failure = translated
        self.retry_at = _Ticks.monotonic() + min(1.0, 0.005 * 2 ** min(self._failures_in_a_row, 8))
        self._reporter.tell_failure(translated if isinstance(error, _DAMAGE_ERRORS) else error)
        for request in requests:
            request.error = translated
            request.settle()

    def look_after_files(self) -> bool:
        """See whether the files are still those that were opened; False, and nothing more is done, if they are not."""
        self._files.look()
        if self._files.loss is not None:
            self._report_failure(_LostFileError(self._files.loss), [])
        return self._files.loss is None


_Value = typing.TypeVar("_Value")


class _Callers:
    """What callers want done: they wait for the beat that does it, run one themselves, or have a future of it."""

    PATIENCE_S = 0.1
    """For how long a caller leaves it to the thread that is at it, before it looks again."""
    _flusher: threading.Thread | None = None
    """The thread that commits what was asked for without waiting, on an engine that no thread beats for."""

    def __init__(self, committer: _Committer, shared: _Shared, files: _OpenFiles) -> None:
        self._committer = committer
        self._shared = shared
        self._files = files
        self._pid = os.getpid()

    def check_open(self) -> None:
        """Refuse what an engine can't do any more."""
        if self._shared.services.fork_guard.is_forked:
            raise EngineClosedError(
                f"this engine on {self._shared.path} was opened in process {self._pid}, before the fork. {_FORK_ADVICE}"
            )
        if self._shared.is_closed:
            why = "" if self._files.loss is None else f" ({self._files.loss})"
            raise EngineClosedError(f"the engine on {self._shared.path} is stopped{why}")
        if self._files.loss is not None:
            raise _LostFileError(self._files.loss)

    def perform(self, action: Callable[[_Beat], _Value]) -> _Value:
        """Do something in the next beat and return its value; errors are raised here."""
        value: _Value = self._await(_Request(action))
        return value

    def insert(self, row: _NewRow) -> int:
        """Insert an instance in the next beat; `DuplicateError`."""
        instance: int = self._await(_Request(None, row))
        return instance

    def insert_later(self, row: _NewRow) -> _Future[int]:
        """Insert an instance in one of the next beats, together with whatever else is asked for by then."""
        return self._later(None, row)

    def perform_later(self, action: Callable[[_Beat], _Value]) -> _Future[_Value]:
        """Do something likewise."""
        return self._later(action)

    def post(self, action: Callable[[_Beat], Any]) -> _Request:
        """Have something done in the next beat, which nobody waits for."""
        request = _Request(action)
        self._committer.requests.append(request)
        return request

    def refuse_all(self, error: Exception) -> None:
        """Tell whoever still waits that it is not done; the committer's lock is held."""
        requests = self._committer.requests
        while requests:
            requests[0].error = error
            requests[0].settle()
            requests.popleft()

    def _await(self, request: _Request) -> Any:
        try:
            self._enqueue(request)
            if self._has_committer():
                self._committer.commit_in_place()
                # Whoever was to do it may wait for what this thread holds: a lock of the user's log handler.
                while not (request.is_settled or request.wait(self.PATIENCE_S)):
                    self._committer.commit_in_place()
            else:
                while not request.is_settled:
                    self._committer.commit_for_callers()
        except BaseException:
            request.is_cancelled = True
            raise
        if request.error is not None:
            raise request.error
        return request.value

    def _later(self, action: Callable[[_Beat], Any] | None, row: _NewRow | None = None) -> _Future[Any]:
        future: _Future[Any] = _future_type()(self._shared.dispatcher)
        request = _Request(action, row, future)
        try:
            self._enqueue(request)
            if self._has_committer():
                self._shared.wake_up.set()
            elif self._flusher is None or not self._flusher.is_alive():
                self._start_flush()
        except BaseException:
            request.is_cancelled = True
            raise
        return future

    def _has_committer(self) -> bool:
        """Whether a thread of the scheduler's own runs the beats, and it is another than this."""
        thread = self._committer.thread
        return thread is not None and thread is not threading.current_thread()

    def _enqueue(self, request: _Request) -> None:
        self.check_open()  # first without the lock: a fork may have copied it while it was held
        with self._committer.requests_lock:
            if self._shared.is_closed:
                self.check_open()
            self._committer.requests.append(request)

    def _start_flush(self) -> None:
        thread = self._flusher = threading.Thread(target=self._flush, name="durable-flush", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more
            self._flush()

    def _flush(self) -> None:
        """Commit what was asked for without waiting, on an engine that no thread beats for."""
        while self._committer.is_asked():
            self._committer.commit_for_callers()
        self._flusher = None
        if self._committer.is_asked():  # added between the last look and the line above
            self._committer.commit_for_callers()


class _Results:
    """Futures of instances' results: settled by the commits that end these, here or in another process."""

    def __init__(
        self, committer: _Committer, shared: _Shared, reader: _Reader, waiters: _Waiters, poll_s: float
    ) -> None:
        self._committer = committer
        self._shared = shared
        self._reader = reader
        self._waiters = waiters
        self._poll_s = poll_s
        self._lock = _Lock()
        self._thread: threading.Thread | None = None

    def future_of(self, instance: int) -> _Future[Any]:
        """Return a future of an instance's result."""
        future: _Future[Any] = _future_type()(self._shared.dispatcher)
        waiter = _ResultWaiter(instance, future, self._look, self._waiters.remove)
        self._waiters.add(waiter)
        self._look(waiter)  # it may have ended before
        if self._shared.is_closed:
            self._settle(waiter, error=EngineClosedError(f"the engine on {self._shared.path} is stopped"))
        elif self._committer.thread is None and not future.done():
            try:
                self._look_for_others()
            except RuntimeError as error:
                raise DurableError(f"no thread can be had to wait for instance {instance}: {error}") from error
        return future

    def notify(self) -> None:
        """Wake those who wait for what another process has committed."""
        if self._waiters:
            ids = self._waiters.ids()
            gone = dict.fromkeys(ids, Status.DONE.value)  # who waits for a collected row is to find out
            found = {**gone, **self._reader.statuses(ids)}
            self._waiters.notify((instance, status, None) for instance, status in found.items())

    def close(self) -> None:
        """Settle what is still to come."""
        for waiter in self._waiters.futures():
            self._settle(waiter, error=EngineClosedError(f"the engine on {self._shared.path} was stopped"))

    def _look(self, waiter: _ResultWaiter) -> None:
        """Settle a future if its instance has ended."""
        try:
            done = waiter.done
            ending = self._reader.ending(waiter.instance) if done is None else None
        except DurableError as error:
            self._settle(waiter, error=error)
            return
        if done is not None:
            self._settle(waiter, _load_value(done.result))
        elif ending is not None and ending.status == Status.DONE:
            self._settle(waiter, _load_value(ending.result))
        elif ending is not None and ending.status == Status.FAILED:
            self._settle(waiter, error=FailedError(ending.id, ending.last_error))

    def _settle(self, waiter: _ResultWaiter, result: Any = None, error: BaseException | None = None) -> None:
        self._waiters.remove(waiter)
        future = waiter.future()
        if future is None or future.done() or not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _look_for_others(self) -> None:
        """Have a thread look for the instances, on an engine whose scheduler's thread does not run."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._serve, name="durable-futures", daemon=True)
                thread.start()
                self._thread = thread  # only now: it waits for this lock before it ends

    def _is_needed(self) -> bool:
        return not self._shared.is_closed and self._committer.thread is None and bool(self._waiters.futures())

    def _serve(self) -> None:
        seen = None
        try:
            while self._is_needed():
                seen = self._look_at_all(seen)
                time.sleep(self._poll_s)
        finally:
            with self._lock:
                self._thread = None
            if self._is_needed():  # added meanwhile, or this thread was interrupted
                self._look_for_others()

    def _look_at_all(self, seen: int | None) -> int | None:
        """Settle what has ended, if another process has committed since; and all, if that can't be seen any more."""
        try:
            version = self._reader.data_version()
            if version != seen:
                self.notify()
        except DurableError as error:
            for waiter in self._waiters.futures():
                self._settle(waiter, error=error)
            return None
        return version


class _File(NamedTuple):
    """An open database, and this engine's ways to it."""

    path: str
    worker_id: str
    files: _OpenFiles
    store: _Store
    reader: _Reader


class _Peers:
    """This engine among the others on its file: its registration and lease, their commits, leases and deaths."""

    LOOK_S = 0.005
    """How often to look for other processes' commits while they are active."""
    ACTIVE_S = 1.0
    """How long after its last commit another process counts as active."""
    DEAD_LOOK_S = 0.5
    """How often to look for workers that died."""
    GONE_S = 1.2
    """After how long without a lock file a worker is taken for dead: longer than between two looks of its own."""

    def __init__(
        self,
        file: _File,
        committer: _Committer,
        callers: _Callers,
        shared: _Shared,
        options: _Options,
        notice_others: Callable[[], None],
    ) -> None:
        self.heartbeat_at: float = math.inf
        """When the lease is to be renewed; never, unless the engine is started."""
        self.worker_id = file.worker_id
        self._file = file
        self._committer = committer
        self._callers = callers
        self._shared = shared
        self._now = shared.services.now
        self._options = options
        self._notice_others = notice_others
        """Called when another process has committed."""
        self._lock_file: _LockFile | None = None
        self._watch: _LogWatch | None = None
        self._armed_at: float | None = None
        """Since when the log is watched."""
        self._others: list[Worker] = []
        self._data_version: int | None = None
        self._looked_at = self._looked_for_dead_at = -math.inf
        self._changed_at = -math.inf
        """When another process was last seen to have committed."""
        self._renewed_at = 0
        self._judge_from = 0
        """From when on other workers' leases are judged."""
        self._missing_since: dict[str, float] = {}
        """Since when other workers' lock files are not there."""
        self._reapings: dict[str, tuple[_Request | None, _LockFile | None]] = {}
        """What was asked for at the last looks, by worker, and the locks taken from them; first, that one is looked at.

        So an interrupted look leaves its lock to the next.
        """
        self._faults: dict[str, str] = {}
        """What is wrong with which part of a look, and has been said."""

    # Coming and going

    def join_and_watch(self, join: Callable[[int], None]) -> None:
        """Join with a lease that is renewed, and have the log watched if that is heard of."""
        now = self._now()
        self._watch = _LogWatch.open(f"{self._file.path}-wal", self._hear_of_write)
        join(self._options.lease_ms)
        if self._watch is not None and not self._watch.start():
            self.unwatch()
        self._note_renewed(now)

    @property
    def has_joined(self) -> bool:
        """Whether this engine is known in the file, or may be."""
        return self._lock_file is not None

    @contextlib.contextmanager
    def joining(self, lease_ms: int, *, is_patient: bool = True) -> Iterator[None]:
        """Make this engine known in the file, and reclaim what dead ones held; undone if what follows fails.

        One that is not patient waits until it is known of each other worker whether it is dead.
        """
        path = self._file.path
        self._drop_lock()
        self._lock_file = _LockFile(_LockFile.path_of(path, self.worker_id))
        self._lock_file.create(path)  # an interrupt leaves it to the next `_drop_lock`, or to `leave`
        self._judge_from = 0
        try:
            self._callers.perform(lambda beat: beat.store.register(self._row(beat.now, lease_ms)))
            self.look_for_dead()
            while not is_patient and self.look_for_dead():  # again: who looks at a dead one's lock holds it meanwhile
                time.sleep(0.05)
            yield
            _LockFile.remove_stale(path, [worker.id for worker in self._file.reader.workers()])
        except BaseException:
            self._callers.post(lambda beat: beat.store.unregister(self.worker_id))  # if it came so far
            self._drop_lock()
            raise

    def _drop_lock(self) -> None:
        """Remove the lock file, if there is one: also that of a start or drain that was interrupted."""
        if self._lock_file is not None:
            self._lock_file.remove()
            self._lock_file = None  # last: an interrupt leaves the rest to the next

    def leave(self, *, is_signed_off: bool) -> None:
        """Let the lock go; its file only if nothing is left in the database: unlocked, it tells of a dead worker."""
        for _, taken in self._reapings.values():
            if taken is not None:
                taken.close()
        self._reapings.clear()
        if self._lock_file is not None and is_signed_off:
            self._lock_file.remove()
        elif self._lock_file is not None:
            self._lock_file.close()
        self._lock_file = None

    def unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None  # last: an interrupt leaves the rest to the next

    def _row(self, now: int, lease_ms: int) -> tuple[Any, ...]:
        with _loading():
            import socket  # 3 ms that a mere import does not need

        name, queues = self._options.name, _encode(self._options.queues)
        return self.worker_id, name, socket.gethostname(), os.getpid(), queues, now, now, now + lease_ms

    # The lease

    def renewal_at(self, monotonic: float) -> float:
        """When the lease is to be renewed, by the monotonic clock."""
        return monotonic + (self.heartbeat_at - self._now()) / 1000 if self.heartbeat_at < math.inf else math.inf

    def renew(self, beat: _Beat) -> None:
        """Renew the lease, and judge those of the others."""
        now, lease_ms, worker_id = beat.now, self._options.lease_ms, self.worker_id
        beat.report.after.append(functools.partial(self._note_renewed, now))
        if self._shared.is_stopping:  # it may have signed off
            return
        if now - self._renewed_at >= lease_ms - self._options.heartbeat_ms:
            self._judge_from = now + lease_ms  # storage kept this engine from renewing, and so the others
        if not beat.store.renew(worker_id, now, now + lease_ms):
            if beat.store.was_taken(worker_id):
                self._file.files.lose(_LOCKS_NOT_SHARED)
                return
            message = "engine %s was taken for dead; what it had claimed runs elsewhere"
            beat.report.log(_log.warning, message, self._options.name)
            beat.store.register(self._row(now, lease_ms))
        if now >= self._judge_from:
            for worker in beat.store.workers():
                if worker.id != worker_id and _instant(now) >= worker.lease_expires_at:
                    self._reap(beat, worker, "its lease ran out")

    def renew_before_judging(self, now: int) -> None:
        """Give everybody time to renew, after a gap in which nobody could."""
        self._judge_from = now + self._options.lease_ms
        self.heartbeat_at = now

    def _note_renewed(self, now: int) -> None:
        self._renewed_at = now
        self.heartbeat_at = now + self._options.heartbeat_ms

    # Looking at the others

    def next_look_at(self, monotonic: float) -> float:
        """When to look again, by the monotonic clock."""
        return self._looked_at + self._look_interval_s(monotonic)

    def _look_interval_s(self, monotonic: float) -> float:
        """How often to look: often while another process is active, seldom while the log is watched.

        A write is heard of before its commit can be seen. So the first second of a watch is one of looking, too.
        """
        if monotonic - self._changed_at < self.ACTIVE_S:
            return min(self.LOOK_S, self._options.poll_s)
        armed_at = self._armed_at
        if armed_at is not None and monotonic - armed_at > self.ACTIVE_S:
            return self.DEAD_LOOK_S
        return min(self._options.poll_s, self.DEAD_LOOK_S)

    def look(self, monotonic: float) -> None:
        """See whether another process has committed, or died."""
        self._looked_at = monotonic
        if not self._committer.look_after_files():
            return
        self._try(self._see_commits, monotonic)
        self._try(self._watch_log, monotonic)
        if monotonic - self._looked_for_dead_at >= self.DEAD_LOOK_S:
            self._looked_for_dead_at = monotonic
            self._try(self._restore_lock, monotonic)
            self._try(self._see_deaths, monotonic)

    def _try(self, look: Callable[[float], None], monotonic: float) -> None:
        """Do one part of a look; its failure is no matter of the others, and is told once, until it works again."""
        name = look.__name__
        try:
            look(monotonic)
        except (apsw.Error, DurableError, OSError) as error:
            text = _error_text(error)
            if self._faults.get(name) != text:
                self._faults[name] = text
                self._shared.log_soon("looking for other processes' work failed", error)
        else:
            self._faults.pop(name, None)

    def _see_commits(self, monotonic: float) -> None:
        store = self._file.store
        version = store.data_version()
        if version == self._data_version:
            return
        if self._data_version is not None:
            self._changed_at = monotonic
        found = int(store.schema_version() or 0)
        if found > _SCHEMA_VERSION:
            self._file.files.lose(_MIGRATED.format(found=found, known=_SCHEMA_VERSION))
            return
        workers = store.workers()
        self._others = [worker for worker in workers if worker.id != self.worker_id]
        if len(self._others) == len(workers) and self._lock_file is not None:
            self.heartbeat_at = min(
                self.heartbeat_at, self._now()
            )  # it was taken for dead: it renews, and finds out why
        self._notice_others()
        self._data_version = version  # last: if one of these fails, the next look finds the change again

    def _watch_log(self, monotonic: float) -> None:
        """Have the log watched once neither this engine nor another has written to it for a while."""
        watch = self._watch
        if watch is None or not watch.is_alive:  # whatever was raised in its thread from outside
            self._armed_at = None
            return
        is_quiet = monotonic - max(self._committer.beat_at, self._changed_at) > self.ACTIVE_S
        if is_quiet and self._armed_at is None and watch.arm():
            self._armed_at = monotonic

    def _hear_of_write(self) -> None:
        """Look again: often, unless it was this engine itself that wrote."""
        monotonic = _Ticks.monotonic()
        self._armed_at = None
        if not self._committer.lock.locked() and monotonic - self._committer.beat_at > self.LOOK_S:
            self._changed_at = monotonic
        self._shared.wake_up.set()

    def _restore_lock(self, _: float) -> None:
        if self._lock_file is not None:
            self._lock_file.restore(self._file.path)

    def _see_deaths(self, _: float) -> None:
        if self._others:
            self.look_for_dead()

    def look_for_dead(self) -> bool:
        """Have workers reaped whose lock the kernel has dropped; return whether some are still to be judged.

        A lock file that is not there is put back by a worker that lives; one that stays away is its worker's end.
        """
        for worker_id, (reaping, lock) in list(self._reapings.items()):
            if reaping is None or reaping.is_settled:  # done, or refused by storage: then its worker is looked at again
                if lock is not None:
                    lock.close()
                del self._reapings[worker_id]
        is_unsure = False
        for worker in self._file.reader.workers():
            if worker.id != self.worker_id and worker.id not in self._reapings:
                is_unsure |= self._judge(worker)
        return is_unsure

    def _judge(self, worker: Worker) -> bool:
        """Have a worker reaped that is dead; return whether that can't be said yet."""
        path = _LockFile.path_of(self._file.path, worker.id)
        lock = _LockFile(path)
        self._reapings[worker.id] = None, lock
        if lock.take_from_dead():
            self._reap_soon(worker, lock)
            return False
        del self._reapings[worker.id]
        if not self._is_gone(path):
            self._missing_since.pop(worker.id, None)
            return False
        if _Ticks.monotonic() - self._missing_since.setdefault(worker.id, _Ticks.monotonic()) < self.GONE_S:
            return True
        self._reap_soon(worker, None)
        return False

    def _reap_soon(self, worker: Worker, lock: _LockFile | None) -> None:
        reaping = self._callers.post(functools.partial(self._reap_dead, worker=worker, lock=lock))
        self._reapings[worker.id] = reaping, lock

    def _is_gone(self, path: str) -> bool:
        """Whether a lock file is not there: of a folder in which one's own is not to be seen, nobody can say."""
        try:
            os.stat(path)
        except FileNotFoundError:
            return self._lock_file is not None and self._lock_file.is_in_place()
        except OSError:
            pass
        return False

    def _reap_dead(self, beat: _Beat, worker: Worker, lock: _LockFile | None) -> None:
        self._reap(beat, worker, "its process died")
        if lock is not None:
            beat.store.note_taken(worker.id, beat.now)
            beat.report.after.append(lock.remove)

    def _reap(self, beat: _Beat, worker: Worker, how: str) -> None:
        cause = f"crash: {how} (worker {worker.name}, pid {worker.pid} on {worker.host})"
        count = beat.withdrawals.reap(worker.id, cause)
        message = "reclaimed %d instances of worker %s, pid %d: %s"
        beat.report.log(_log.info, message, count, worker.name, worker.pid, how)
        beat.report.tell("scheduler.reclaimed", {"count": count}, {"worker": worker.id})


@contextlib.contextmanager
def _cancelling(task: asyncio.Task[Any], is_cancelled: Callable[[], bool], every_s: float) -> Iterator[None]:
    """Cancel a task, from its own loop, once that is so: what it runs meanwhile has nobody else to look."""
    loop = task.get_loop()
    timers: list[asyncio.TimerHandle] = []

    def look() -> None:
        if is_cancelled():
            task.cancel()
        else:
            timers[:] = [loop.call_later(every_s, look)]

    timers.append(loop.call_later(every_s, look))
    try:
        yield
    finally:
        timers.pop().cancel()


class _Drain:
    """Runs what is runnable in the calling thread, in place of pools: claims a row, runs it, commits with the next."""

    LEASE_MS = 10 * 365 * 86_400_000
    """It can't renew while a step runs; its lock file tells whether it lives."""

    def __init__(
        self,
        committer: _Committer,
        callers: _Callers,
        shared: _Shared,
        queue: str | None,
        *,
        with_scheduled: bool,
        poll_s: float,
    ) -> None:
        self.steps = 0
        self.kinds: list[str] = []
        """What they have come to."""
        self.fired: set[str] = set()
        """Schedules that have fired."""
        self._committer = committer
        self._callers = callers
        self._shared = shared
        self._queue = queue
        self._with_scheduled = with_scheduled
        self._poll_s = poll_s
        self._ready: collections.deque[_Claim] = collections.deque()
        self._runner: asyncio.Runner | None = None
        self._is_over = False

    @property
    def tally(self) -> collections.Counter[str]:
        """How many steps were run, and how many have come to what."""
        return collections.Counter([*itertools.repeat("steps", self.steps), *self.kinds])

    def submit(self, claims: collections.deque[_Claim], *, first: bool = False) -> None:
        """Take over claimed rows, each of them once, wherever that is interrupted."""
        if first:
            _hand_over(claims.pop, len(claims), self._ready.extendleft)
        else:
            _hand_over(claims.popleft, len(claims), self._ready.extend)

    def note(self, kinds: collections.deque[str], fired: Iterable[str]) -> None:
        """Take over what steps have come to, and remember which schedules have fired: each does once."""
        _hand_over(kinds.popleft, len(kinds), self.kinds.extend)
        self.fired.update(fired)

    def demand(self, at_most: int = 0) -> _Demand:
        """Say what it takes: at most so many rows, of its queue or of all."""
        slots = {} if self._is_over else None if self._queue is None else {self._queue: 1}
        return _Demand(slots, at_most, _END_OF_TIME if self._with_scheduled else None, is_drain=True)

    def run(self, max_steps: int, look_at_clock: Callable[[], object]) -> None:
        """Run one row after the other until none is left that is due."""
        committer = self._committer
        while True:
            look_at_clock()
            is_unfinished = self._commit(self.demand(0 if self._ready else 1))
            if committer.failure is not None:
                raise committer.failure
            if self._ready:
                self._check(self._ready[0], max_steps)
                self._run(self._ready.popleft())
            elif not (is_unfinished or self._shared.outcomes or committer.is_due()):
                return

    def _commit(self, demand: _Demand | None = None) -> bool:
        self._callers.check_open()
        return self._committer.commit_once(demand)

    def withdraw(self) -> list[_Claim]:
        """Take back what has not been run."""
        left, self._ready = list(self._ready), collections.deque()
        return left

    def close(self) -> None:
        self._is_over = True
        if self._runner is not None:
            _run_outside_loop(self._runner.close)

    def _check(self, claim: _Claim, max_steps: int) -> None:
        """Refuse to go on with too many steps, or for an engine that was stopped."""
        if self.steps >= max_steps and claim.error is None:
            raise DurableError(
                f"drain ran {max_steps} steps, and instance {claim.row.id} ({claim.row.fsm}, step"
                f" {claim.row.step!r}) is still running: raise max_steps if that is meant"
            )
        if self._shared.is_stopping:
            raise EngineClosedError(f"the engine on {self._shared.path} was stopped while it was drained")

    def _run(self, claim: _Claim) -> None:
        """Run a step in this thread; SystemExit and the like are raised on after the crash is committed."""
        context = contextvars.copy_context()
        try:
            if not context.run(claim.prepare, self._shared.behaviours.make):
                self._shared.give_back(claim)
                return
            self.steps += claim.error is None
            run = self._run_async if claim.is_async else self._run_plain
            self._shared.outcomes.append(context.run(_commit_of, claim, run(claim, context)))
        except BaseException as error:
            self._shared.outcomes.append(_crash(claim, error))
            self._commit()
            raise

    def _run_plain(self, claim: _Claim, context: contextvars.Context) -> _Commit | BaseException:
        return context.run(_execute, claim)

    def _run_async(self, claim: _Claim, context: contextvars.Context) -> _Commit | BaseException:
        import asyncio

        running: list[asyncio.Task[Any] | None] = []

        async def run() -> _Commit | BaseException:
            task = cast("asyncio.Task[Any]", asyncio.current_task())
            running.append(task)
            try:
                with _cancelling(task, lambda: claim.services.is_cancelled(claim.row.id), self._poll_s):
                    return await asyncio.wait_for(_execute_async(claim), claim.timeout_s)
            except TimeoutError:
                return _timeout_error(claim)

        def cancel() -> None:
            for task in filter(None, running):
                task.get_loop().call_soon_threadsafe(task.cancel)

        runner = self._runner = self._runner or asyncio.Runner()
        try:
            result = _run_outside_loop(lambda: runner.run(run(), context=context), cancel)
        except asyncio.CancelledError as error:  # its own, or its instance was cancelled; an interrupt is no such
            return error
        return cast("_Commit | BaseException", result)


def _cancelling_unstarted(row: _Row, reason: str) -> Callable[[_Beat], bool]:
    row = row._replace(cancel_reason=reason)
    return lambda beat: beat.withdrawals.cancel_unstarted(row, reason)


def _giving_back_unstarted(queue: str) -> Callable[[_Beat], None]:
    return lambda beat: beat.withdrawals.give_back_unstarted(queue)


class _Duties:
    """What is to be done by the clock: each duty does what is due and returns when it is next needed.

    One that raises is logged and left alone for a while, longer each time in a row.
    """

    PAUSE_S = 0.1
    LONGEST_PAUSE_S = 30.0

    def __init__(self, duties: Iterable[Callable[[float], float]], log: Callable[..., None]) -> None:
        self._duties = tuple(duties)
        self._log = log
        self._failed: dict[Callable[[float], float], tuple[int, float]] = {}
        """How often in a row each has raised, and until when it is left alone."""

    def do_due(self, monotonic: float) -> float:
        """Do what is due, in order; return when there is more to do."""
        return min([self._do(duty, monotonic) for duty in self._duties])

    def _do(self, duty: Callable[[float], float], monotonic: float) -> float:
        count, until = self._failed.get(duty, (0, -math.inf))
        if monotonic < until:
            return until
        try:
            next_at = duty(monotonic)
        except Exception as error:  # noqa: BLE001 - the engine's own fault; the other duties are done nevertheless
            until = monotonic + min(self.LONGEST_PAUSE_S, self.PAUSE_S * 2.0**count)
            self._failed[duty] = count + 1, until
            self._log(f"{duty.__qualname__} failed, it is tried again", error, exc_info=error)
            return until
        if count:
            del self._failed[duty]
        return next_at


class _ClockWatch:
    """Notices a suspended machine, and a clock that was set, and has the file's lines and dates set right."""

    def __init__(self, committer: _Committer, callers: _Callers, services: _Services, reader: _Reader) -> None:
        self._committer = committer
        self._callers = callers
        self._services = services
        self._reader = reader
        self.seen_at = services.now()
        """When the clock was last read."""
        self.mending: Callable[[_Beat], object] | None = None
        """How the lines of limits, and dates, are to be set right; None once that is committed."""

    def look(self, now: int) -> bool:
        """Read the clock; True if it was set back, so that what is dated by what it said before is to be set right."""
        is_set_back = now < self.seen_at - _SET_BACK_MS
        if is_set_back:
            self._committer.due_at = now
            self.mending = _Beat.set_right
        elif now < self.seen_at:
            self._callers.post(lambda beat: beat.schedules.look_again())
        self.seen_at = now
        return is_set_back

    def mend_lines(self) -> None:
        """Have all lines of limits looked at, which may have changed, and what a clock that was ahead has written."""
        is_ahead = self._reader.is_ahead(self._services.now())
        self.mending = _Beat.set_right if is_ahead else (lambda beat: beat.lines.sweep())

    def next_at(self, _: float) -> float:
        return math.inf if self.mending is None else -math.inf

    def mend(self, beat: _Beat) -> None:
        mending = self.mending
        if mending is not None and mending(beat) is not False:  # else there is more of it for the next beat
            beat.report.after.append(functools.partial(self._note_mended, mending))

    def _note_mended(self, mending: Callable[[_Beat], object]) -> None:
        if self.mending is mending:  # else it was asked for again, by the thread that reads the clock
            self.mending = None


class _ProgressWriter:
    """Tells of the progress of steps, and has it written: at most five times a second, for all steps at once."""

    PAUSE_S = 0.2

    def __init__(self, shared: _Shared, runners: _Runners) -> None:
        self._shared = shared
        self._services = shared.services
        self._runners = runners
        self.written_from = 0.0
        """When it may be written again, by the monotonic clock."""

    def note(self, claim: _Claim) -> None:
        row = claim.row
        if self._shared.dispatcher.wants("step.progress"):
            done, total, note, _ = self._services.progress[row.id, row.claim]
            metadata = {"id": row.id, "fsm": row.fsm, "step": row.step, "note": note}
            self._shared.dispatcher.publish([Event("step.progress", {"done": done, "total": total}, metadata)])
        if self._runners.drain is not None:
            if _Ticks.monotonic() >= self.written_from:
                self._services.perform(lambda beat: None)
        elif len(self._services.progress) == 1:  # else the thread knows
            self._shared.wake_up.set()

    def next_at(self, _: float) -> float:
        return self.written_from if self._services.progress else math.inf

    def write(self, beat: _Beat) -> None:
        taken = dict(self._services.progress)
        beat.store.show_progress((_json(reported), *key) for key, reported in taken.items())
        beat.report.after.append(functools.partial(self._note_written, taken))

    def _note_written(self, taken: dict[tuple[int, int], _Reported]) -> None:
        self.written_from = _Ticks.monotonic() + self.PAUSE_S
        for key, reported in taken.items():
            if self._services.progress.get(key) is reported:
                self._services.progress.pop(key, None)


class _Collection:
    """Sweeps of ended rows, in steps; after each, what was free before it and is not needed is given back."""

    SWEPT_AT_ONCE = 500
    PAUSE_S = 0.01
    """How long to leave others the file between two steps, each of which takes some milliseconds."""

    def __init__(self, committer: _Committer, callers: _Callers, services: _Services, interval_ms: int) -> None:
        self.starts_at = 0
        """When the next sweep begins, by the engine's clock."""
        self._committer = committer
        self._callers = callers
        self._services = services
        self._interval_ms = interval_ms
        self._step: _Request | None = None
        self._sweep_from: _SweepPosition | None = None
        self._spare_pages: int | None = 0
        """Free pages to give back: those that nobody has needed since the last sweep; None: to be counted."""

    @property
    def is_under_way(self) -> bool:
        return self._sweep_from is not None or bool(self._spare_pages)

    def go_on(self, monotonic: float) -> float:
        """Begin a sweep, or take the next step of one, if that is due; return when the next is."""
        now = self._services.now()
        if now >= self.starts_at:
            self.starts_at = now + self._interval_ms
            self._sweep_from, self._spare_pages = _SweepPosition(), None
        if not self.is_under_way:
            return monotonic + (self.starts_at - now) / 1000
        if monotonic >= self._committer.retry_at and (self._step is None or self._step.is_settled):
            self._step = self._callers.post(self._take_step)
        return max(monotonic + self.PAUSE_S, self._committer.retry_at)

    def _take_step(self, beat: _Beat) -> None:
        if self._spare_pages is None:
            self._spare_pages = beat.store.spare_pages()
        if self._sweep_from is not None:
            _, self._sweep_from = beat.cleaning.collect(self._sweep_from, self.SWEPT_AT_ONCE)
        else:
            self._spare_pages = beat.cleaning.shrink(self._spare_pages)


class _Declarations:
    """The schedules that the known classes declare."""

    def __init__(self, committer: _Committer, callers: _Callers, shared: _Shared) -> None:
        self._committer = committer
        self._callers = callers
        self._shared = shared
        self._registrations = 0
        """How many classes had been registered at the last look."""

    def write(self) -> None:
        """Write them, and set right what a clock that was ahead has left."""
        self._callers.perform(self._writing())

    def look(self, _: float) -> float:
        """Have them written in the next beat if classes were defined since the last look."""
        if self._registrations != _registry.changes:
            self._registrations = _registry.changes
            self._committer.due_at = self._shared.services.now()
            try:
                self._callers.post(self._writing())
            except (DurableError, ValueError, TypeError) as error:
                self._shared.log_soon("a declared schedule could not be written", error)
        return math.inf

    def describe(self, name: str, spec: _Spec, plan: _Plan, *, is_from_code: bool = False) -> _ScheduleRow:
        try:
            row = self._shared.services.new_row(_make_insert(spec.cls, plan.insert))
        except Exception as error:
            error.add_note(f"in the schedule {name!r}")
            raise
        return _describe_schedule(name, spec, plan, row, is_from_code=is_from_code)

    def _writing(self) -> Callable[[_Beat], None]:
        known = self._shared.behaviours.highest_by_name()
        declared = [
            (self.describe(spec.name, spec, spec.plan, is_from_code=True), spec.aliases)
            for name, spec in known.items()
            if spec.plan is not None and name == spec.name
        ]

        def declare(beat: _Beat) -> None:
            schedules = beat.schedules
            schedules.declare(declared, known)
            schedules.realign()

        return declare


def _open_store(path: str, synchronous: str, files: _OpenFiles) -> _Store:
    """Open the file, and keep others in this process from it, already while it is being opened."""
    try:
        store = _Store(path, synchronous, files)
    except BaseException:
        files.close()
        raise
    files.look_after()
    return store


def _drain_events(unstarted: Iterable[_Claim], runners: _Runners) -> Iterator[Event]:
    """What an engine that stops has given back, and has not, of each queue."""
    released = collections.Counter(claim.row.queue for claim in unstarted)
    for queue in runners.pools:
        measurements = {"released": released[queue], "in_flight": runners.held.count(queue)}
        yield Event("scheduler.drain", measurements, {"queue": queue})


class _Scheduler:
    """An engine's parts, put together: starts and stops them, and runs their duties in a thread of its own."""

    _life_owner: int | None = None
    """The thread that starts or drains."""
    _is_at_end = False
    """Whether it is closed to the end."""

    def __init__(self, path: str, options: _Options, behaviours: _Behaviours) -> None:
        self.options = options
        self.path = path
        self.worker_id = os.urandom(8).hex()
        self.files = _OpenFiles(path)
        self.store = _open_store(path, options.synchronous, self.files)
        self.reader = _Reader(path, files=self.files)
        self.services = _Services(self.reader, options.clock)
        self.dispatcher = _Dispatcher(self.services.fork_guard)
        self.behaviours = behaviours
        self.shared = _Shared(path, self.services, behaviours, self.dispatcher)
        self.shared.give_back = self._give_back
        # Told while it lasts, but not by the thread that waits, which holds a lock of ours.
        self.store.patience.tell = lambda text: self.dispatcher.post_apart(functools.partial(_log.warning, "%s", text))
        self._life_lock = _Lock()
        self._stop_lock = _ReentrantLock()
        self._build_committer()
        self._build_duties()
        _process.schedulers.add(self)

    def _build_committer(self) -> None:
        """Make who runs what is claimed, who commits, and who asks for it."""
        self._copier = _LogCopier(self.store, self.reader, self.options.synchronous, self.shared.log_soon)
        self.runners = _Runners(self.shared, self.options.prefetch)
        reporter = _Reporter(self.shared, self.runners.held, self.files)
        self.waiters = reporter.waiters
        setup = _Setup(
            store=self.store,
            services=self.services,
            behaviours=self.behaviours,
            worker_id=self.worker_id,
            concurrency_limits=self.options.concurrency_limits,
            keeps_history=self.options.history,
            retention_ms=self.options.retention_ms,
            take_back=self.runners.take_back,
        )
        self.committer = _Committer(setup, self.shared, self.runners, reporter, self.files, self._copier)
        self.callers = _Callers(self.committer, self.shared, self.files)
        self.results = _Results(self.committer, self.shared, self.reader, self.waiters, self.options.poll_s)

    def _build_duties(self) -> None:
        """Make what there is to do by the clock, in beats and beside them."""
        file = _File(self.path, self.worker_id, self.files, self.store, self.reader)
        self.peers = _Peers(file, self.committer, self.callers, self.shared, self.options, self._notice_others)
        self.clock = _ClockWatch(self.committer, self.callers, self.services, self.reader)
        self.collection = _Collection(self.committer, self.callers, self.services, self.options.gc_ms)
        self.declarations = _Declarations(self.committer, self.callers, self.shared)
        self.progress = _ProgressWriter(self.shared, self.runners)
        self.services.open(self.callers.perform, self.callers.perform_later, self.progress.note)
        self.committer.standing = (
            _StandingDuty(self.peers.renewal_at, self.peers.renew),
            _StandingDuty(self.clock.next_at, self.clock.mend),
            _StandingDuty(self.progress.next_at, self.progress.write),
        )
        duties = (
            self.runners.expire,
            self._look_at_clock,
            self.declarations.look,
            self._look_at_others,
            self.collection.go_on,
            self.committer.commit_due,
            self.runners.look,  # last: what a beat has claimed is to be looked at
        )
        self._duties = _Duties(duties, self.shared.log_soon)

    def _give_back(self, claim: _Claim) -> None:
        self.callers.post(lambda beat: beat.withdrawals.give_back([claim]))
        self.shared.wake_up.set()

    @property
    def is_started(self) -> bool:
        return self.committer.thread is not None

    @property
    def is_closed(self) -> bool:
        return self.shared.is_closed

    def is_within(self) -> bool:
        """Whether this is a step of the engine's or a callback, which whoever stops it waits for."""
        ctx = _current.get()
        return self.dispatcher.is_current or (ctx is not None and ctx._claim.services is self.services)

    # Starting

    def start(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Run the queues; `async def` steps on that loop, if one is given, which some other thread runs."""
        self.callers.check_open()
        self._alone(functools.partial(self._start, loop))

    def _alone(self, act: Callable[[], None]) -> None:
        """Keep starting and draining apart: each needs that nobody else runs this engine's claims."""
        if self._life_lock.locked():
            raise DurableError("the engine is being started or drained, by another thread or by this step's caller")
        with self._life_lock:
            try:
                self._life_owner = threading.get_ident()
                self._end_drain()  # one that was interrupted before its end
                if self.is_started:
                    raise DurableError("the engine is started already: it runs its queues itself")
                if self.shared.is_stopping:
                    self.callers.check_open()
                    raise EngineClosedError(f"the engine on {self.path} is being stopped")
                act()
            finally:
                self._life_owner = None
                self.runners.is_empty.set()

    def _start(self, loop: asyncio.AbstractEventLoop | None) -> None:
        _load_what_steps_need()
        self.services.waits_out_failures = True
        self.shared.context = contextvars.copy_context()
        try:
            self.peers.join_and_watch(self._join)
            self.runners.start(self.options.queues, loop)
            self.dispatcher.start()
            self._start_thread()
        except BaseException as error:
            self.committer.thread = None  # if it has started nevertheless, it finds out
            self.runners.pools = {}
            self.dispatcher.stop()
            self.peers.unwatch()
            if self.peers.has_joined:
                self._sign_off()
            if not isinstance(error, RuntimeError):
                raise
            raise DurableError(f"the engine on {self.path} can't start: {error}") from error
        self.committer.due_at = self.services.now()
        _log.info("engine %s started on %s, queues %s", self.options.name, self.path, self.options.queues)

    def _join(self, lease_ms: int, *, is_patient: bool = True) -> None:
        """Make this engine known in the file, and have declared schedules written and the lines looked at anew."""
        with self.peers.joining(lease_ms, is_patient=is_patient):
            self.declarations.write()
            self.clock.mend_lines()  # last: by a beat that claims

    def _start_thread(self) -> None:
        run = self.shared.context.copy().run
        thread = threading.Thread(target=run, args=(self._serve,), name="durable-scheduler", daemon=True)
        self.committer.thread = thread
        thread.start()

    # The thread

    def _serve(self) -> None:
        try:
            self._do_what_is_due()
        except BaseException as error:  # noqa: BLE001 - from outside, where it dealt with another: it is replaced
            self.shared.log_soon("the scheduler's thread has died, and is replaced", error, exc_info=error)
        finally:
            if self._is_in_charge():
                self._start_thread()

    def _is_in_charge(self) -> bool:
        return self.committer.thread is threading.current_thread() and not self.shared.is_closed

    def _do_what_is_due(self) -> None:
        shared = self.shared
        while self._is_in_charge():
            try:
                shared.wakes_at = math.inf
                next_at = self._duties.do_due(_Ticks.monotonic())
                shared.wakes_at = next_at
                shared.wake_up.wait(max(0.0, next_at - _Ticks.monotonic()))
            except BaseException as error:  # noqa: BLE001 - without it callers would wait for ever
                shared.log_soon("the scheduler failed; it goes on", error, exc_info=error)
                shared.wake_up.wait(0.1)

    def _look_at_clock(self, _: float) -> float:
        """Notice a suspended machine, or a clock that was set: nobody's lease is judged before all could renew."""
        now = self.services.now()
        gap = now - self.clock.seen_at
        if gap > (self.options.lease_ms - self.options.heartbeat_ms) / 2:  # shorter, it has cost nobody the lease
            self.peers.renew_before_judging(now)
        if self.clock.look(now):
            self.peers.renew_before_judging(now)
            self.collection.starts_at = now
        return math.inf

    def _look_at_others(self, monotonic: float) -> float:
        """See whether another process has committed, or died; and, as often, whether a thread here has."""
        if monotonic >= self.peers.next_look_at(monotonic):
            with self.committer.lock:
                if self._is_in_charge():  # else this start has failed: it would find itself signed off, and register
                    self.peers.look(monotonic)
            self.runners.replace_dead()
        return self.peers.next_look_at(monotonic)

    def _notice_others(self) -> None:
        """Look for what other processes have committed."""
        self.committer.due_at = self.services.now()
        self.committer.fired_until = _LONG_AGO
        self.results.notify()
        paused = {queue: self.store.is_paused(queue) for queue in self.runners.pools}
        for row in list(self.runners.unstarted()):
            reason = self.store.cancel_reason(row)
            if reason is not None:
                self.callers.post(_cancelling_unstarted(row, reason))
            if paused.pop(row.queue, False):
                self.callers.post(_giving_back_unstarted(row.queue))
        self.runners.cancel_async(lambda claim: self.store.cancel_reason(claim.row) is not None)

    # Stopping

    def stop(self, timeout_s: float | None) -> None:
        """Stop claiming, give back what has not started, let the rest commit, give back what is left, close."""
        if self.services.fork_guard.is_forked:
            return
        drain_s = min(self.options.drain_s if timeout_s is None else timeout_s, threading.TIMEOUT_MAX)
        if self._is_at_end or (self.shared.is_stopping and self.is_within()):
            return
        with self._stop_lock:  # a stop that was interrupted is gone on with by the next
            if not self.is_started:
                self._stop_unstarted(drain_s)
            elif not self.is_closed:
                self._stop_started(drain_s)
            if self.is_closed:
                self.close()

    def _stop_started(self, drain_s: float) -> None:
        with self.committer.lock:  # what a beat under way claims is in the pools before they are emptied
            self.shared.is_stopping = True
            unstarted = self.runners.withdraw()  # nor may one come to nothing meanwhile, and put them back
        self.shared.wake_up.set()
        if unstarted:
            self._try(lambda beat: beat.withdrawals.give_back(unstarted))
        deadline = _Ticks.monotonic() + drain_s
        while self.runners.held and (left_s := deadline - _Ticks.monotonic()) > 0:
            self.runners.is_empty.wait(left_s)
        self.runners.close()
        self.dispatcher.publish(_drain_events(unstarted, self.runners))
        self._sign_off()
        _log.info("engine %s stopped on %s", self.options.name, self.path)
        self.close()

    def _stop_unstarted(self, drain_s: float) -> None:
        """Stop an engine that beats for its callers, or drains: then the step that runs may end first."""
        self.shared.is_stopping = True
        if self._life_lock.locked() and self._life_owner == threading.get_ident():
            return  # called by the very step that is drained: `drain` closes behind it
        deadline = _Ticks.monotonic() + drain_s
        while self._life_lock.locked() and (left_s := deadline - _Ticks.monotonic()) > 0:
            self.runners.is_empty.wait(left_s)
        if self.is_started:  # it was being started
            self._stop_started(drain_s)
            return
        while self.committer.is_asked() and self.committer.failure is None and not self.is_closed:
            self.committer.commit_for_callers()
        if self._life_lock.locked() and not self.is_closed:
            self._sign_off()
        else:
            self._end_drain()  # if one was interrupted before its end
        self.close()

    def _sign_off(self) -> None:
        """Give everything back, and leave."""
        claims = list(self.runners.held)
        is_signed_off = self._try(lambda beat: beat.withdrawals.sign_off(claims))
        with self.committer.lock:  # else a look at the others might put the lock file back meanwhile
            self.peers.leave(is_signed_off=is_signed_off)

    def _try(self, action: Callable[[_Beat], Any]) -> bool:
        """Do one of the last things; if storage fails, the next start finds what is left to do."""
        try:
            self.callers.perform(action)
        except DurableError as error:
            _log.error("%s: stopping the engine: %s", self.path, error)
            return False
        return True

    def close(self) -> None:
        """Close, also where that was interrupted: each part may be done twice."""
        if self._is_at_end:
            return
        with self.committer.requests_lock:
            self.shared.is_closed = True
        self.shared.wake_up.set()
        thread = self.committer.thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()  # one that is only about to start will find this closed
        self.peers.unwatch()
        self.waiters.wake_all()
        self.results.close()
        with self.committer.lock:
            self.committer.conclude()
            self.callers.refuse_all(EngineClosedError(f"the engine on {self.path} was stopped"))
        self.dispatcher.flush()
        self.dispatcher.stop()  # after the requests: one of them may be a subscriber's
        self._copier.wait()
        with self.committer.lock:
            self.files.is_closing = True
            self.reader.close()
            self.store.close()
            self.files.close()
        self.peers.leave(is_signed_off=False)
        self._is_at_end = True

    def abandon(self) -> None:
        """Let go of everything, unclosed: this is the child of a fork."""
        self.services.fork_guard.is_forked = True
        if self.is_closed:  # it may have left a step behind
            return
        self.shared.is_closed = True
        _process.inherited_files.add(_file_id(self.path))
        self.reader.abandon()
        _keep_for_ever([self.store.db])
        self.files.close()
        self.peers.leave(is_signed_off=False)

    # Draining

    def drain(self, queue: str | None, with_scheduled: bool, max_steps: int) -> collections.Counter[str]:
        """Run what is runnable in this thread."""
        poll_s = self.options.poll_s
        drain = _Drain(self.committer, self.callers, self.shared, queue, with_scheduled=with_scheduled, poll_s=poll_s)

        def run() -> None:
            self.runners.drain = drain
            try:
                _load_what_steps_need()
                self._join(drain.LEASE_MS, is_patient=False)
                drain.run(max_steps, lambda: self.clock.look(self.services.now()))
            finally:
                self._end_drain()

        self._alone(run)
        return drain.tally

    def _end_drain(self) -> None:
        """End the drain that there is, if any."""
        drain = self.runners.drain
        if drain is None:
            return
        try:
            drain.close()
        finally:
            if not self.is_closed:
                self._sign_off()
            with self.committer.lock:  # what that beat was refused, or has gone on with inline, it has given back too
                self.runners.let_go(drain.withdraw())
            self.runners.drain = None
            self.committer.fired_until = _END_OF_TIME
            if self.shared.is_stopping:
                self.close()


def _abandon_all() -> None:
    for scheduler in list(_process.schedulers):
        scheduler.abandon()


def _stop_all() -> None:
    """Give back what engines left running hold, while their threads still can."""
    for scheduler in list(_process.schedulers):
        if not scheduler.is_closed and scheduler.is_started:
            try:
                warnings.warn(
                    f"engine {scheduler.options.name!r} on {scheduler.path} was not stopped", ResourceWarning, 1
                )
            finally:  # also where warnings are errors
                scheduler.stop(0)


atexit.register(_stop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)

# ==================================================================================================
# Engine
# ==================================================================================================

_Look = typing.TypeVar("_Look", Instance, _Ending)

_UNTIL = {"settled": _TERMINAL + _PARKED, "terminal": _TERMINAL}


class _EngineOptions(TypedDict, total=False):
    """The options of `Engine`."""

    name: str
    queues: Mapping[str, int]
    fsms: Iterable[object]
    rate_limits: Mapping[str, RateLimit]
    concurrency_limits: Mapping[str, int]
    prefetch: int
    lease_ttl: _Duration
    heartbeat_interval: _Duration
    poll_interval: _Duration
    drain_timeout: _Duration
    retention: _Duration
    gc_interval: _Duration
    history: bool
    synchronous: str
    clock: Callable[[], float]


class _Standing(NamedTuple):
    """A live instance, as far as the code is held against it."""

    id: int
    fsm: str
    version: int
    step: str
    state: str


def _is_migrated(fsm: str, version: int) -> bool:
    """Whether the highest class of a name that is known here makes rows of that version its own."""
    versions = _known_versions(fsm)
    return bool(versions) and version < versions[-1] and _registry[fsm, versions[-1]].migrates


def _code_problem(one: _Standing) -> tuple[str, str] | None:
    """Say what would keep an instance from running with the classes that are known here, and what would help.

    Return it with what is the same for all that have it: of states, the places of their problems and not the values.
    """
    spec, problem, places = _registry.get((one.fsm, one.version)), "", ""
    versions = _known_versions(one.fsm)
    if not versions:
        problem = f"no class of that name: import it, or give the one that it is now aliases=({one.fsm!r},)"
    elif spec is None:
        if _is_migrated(one.fsm, one.version):
            return None
        advice = "keep it, or write `migrate` in the highest" if one.version < versions[-1] else "update the code"
        problem = f"no class of version {one.version}, only {', '.join(map(str, versions))}: {advice}"
    elif spec.any_step is None and one.step not in spec.steps:
        problem = f"no step {one.step!r}: keep it, or make a new version with `migrate`"
    else:
        try:
            _load_state(spec.state, one.state)
        except StateError as error:
            problem = f"the state no longer loads ({'; '.join(error.problems)}): `handle` will be asked"
            places = "; ".join(text.partition(":")[0].partition("[")[0] for text in error.problems)
    version = "" if spec is None else f" version {one.version}"
    return (f"{one.fsm}{version}: {problem}", places and f"{one.fsm}{version}: {places}") if problem else None


def _check_instances(reader: _Reader) -> Iterator[str]:
    """Hold every live instance against the classes that are known here: a line for each problem, by the first."""
    found: dict[str, tuple[str, list[int]]] = {}
    counts: collections.Counter[str] = collections.Counter()
    for row in reader.live():
        one = _Standing(*row)
        if (problem := _code_problem(one)) is not None:
            text, same = problem
            counts[same or text] += 1
            ids = found.setdefault(same or text, (text, []))[1]
            ids += [one.id] * (len(ids) < 5)
    for same, (text, ids) in found.items():
        first, count = ", ".join(map(str, ids)), counts[same]
        yield f"{text} ({count} instance{'s' * (count > 1)}: {first}{', ...' if count > 5 else ''})"


def _check_schedules(reader: _Reader, behaviours: _Behaviours) -> Iterator[str]:
    """Hold every schedule, and the instance that it would insert, against the classes that are known here."""
    for row in reader.schedule_rows():
        spec = behaviours.highest(row.fsm)
        if spec is None:
            yield f"schedule {row.name}: no class {row.fsm} is known: it does not fire here"
        elif spec.has_ceased_to_declare(row):
            yield f"schedule {row.name}: {spec.name} declares it no more: it does not fire here"
        else:
            new = _occurrence(row, spec, 0)
            problem = _code_problem(_Standing(0, new.fsm, new.version, new.step, new.state))
            if problem is not None:
                yield f"schedule {row.name}: {problem[0]}"


def _check_code(reader: _Reader) -> list[str]:
    """Hold a file against the classes that are known here; nothing is run and nothing changed."""
    return [*_check_instances(reader), *_check_schedules(reader, _Behaviours(()))]


class _Filters(TypedDict, total=False):
    """What `find` can look for."""

    status: str | Iterable[str] | None
    fsm: Any
    queue: str | None
    parent_id: int | None
    correlation_key: str | None
    schedule: str | None
    since: dt.datetime | None
    before: int | None


def _id(value: object, name: str) -> int:
    """Check an id to look for; one beyond SQLite's integers is that of nobody."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-_MAX_INTEGER, min(value, _MAX_INTEGER))
    raise ValueError(f"{name} must be an id, not {_brief(value)}")


def _statuses(value: object, name: str) -> str:
    """Read one status, or several, as JSON for a statement."""
    given = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else value
    try:
        return _encode([Status(cast(str, one)) for one in given])
    except (ValueError, RecursionError):  # the latter: `Status` can't show it
        raise ValueError(f"{name} must be one or several of {', '.join(Status)}, not {_brief(value)}") from None


def _class_names(value: object, name: str) -> str:
    """Read a class, or a name, as the names under which its rows stand, likewise."""
    return _encode(_names_of(_text(value, name)) if isinstance(value, str) else _spec_of(value).names)


_FILTER_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "status": _statuses,
    "fsm": _class_names,
    "queue": _text,
    "parent_id": _id,
    "correlation_key": _text,
    "schedule": _text,
    "since": _instant_ms,
    "before": _id,
}


def _checked_filters(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Check what `find` is to look for; None looks for nothing."""
    _refuse_unknown(filters, _FILTER_CHECKS)
    return {name: _FILTER_CHECKS[name](value, name) for name, value in filters.items() if value is not None}


class _Runs(typing.Protocol):
    """Who finds runs in the history of an instance."""

    def run(self, instance: int, seq: int, /) -> _Run | None: ...
    def latest_run(self, instance: int, step_name: str, /) -> _Run | None: ...


def _find_run(runs: _Runs, old: Instance, to: Any) -> _Run:
    """Find the run in an instance's history that is meant; a step that never ran is one of the version it has now."""
    if isinstance(to, int) and not isinstance(to, bool):
        run = runs.run(old.id, _integer(to, "to (a run's seq)", 0))
        if run is None:
            raise ValueError(f"to must be a run in the history of instance {old.id}, or a step, not {_brief(to)}")
        return run
    step_name = _step_name(to)
    return runs.latest_run(old.id, step_name) or _Run(None, old.version, step_name)


def _check_run(run: _Run, old: Instance) -> None:
    """Refuse to go back to what no class would run, as far as the classes of that name are known here."""
    spec = _registry.get((old.fsm, run.version))
    if spec is not None:
        spec.code(run.step)
    elif run.version != old.version and _known_versions(old.fsm) and not _is_migrated(old.fsm, run.version):
        raise ValueError(
            f"the run {run.seq} of instance {old.id} is of version {run.version}, which no class here has or migrates:"
            f" give the state that it is to have in version {old.version}, too"
        )


def _find_past(runs: _Runs, old: Instance, to: Any, state: Any) -> _Past:
    """Find a run to go back to, and check the state to put in the place of its own: one of the version it has now."""
    spec = _registry.get((old.fsm, old.version))
    text = None if state is None else _dump_state(spec and spec.state, state)
    run = _find_run(runs, old, to)
    if text is not None:
        run = run._replace(version=old.version)
    _check_run(run, old)
    if run.seq is None and text is None:
        raise ValueError(f"step {run.step!r} is not in the history of instance {old.id}: give the state, too")
    return _Past(run, text)


def _fork_template(old: Instance, options: _InsertOptions, services: _Services) -> _NewRow:
    """Make the row of a fork, of what is given for it."""
    for name in ("args", "step"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is no option of a fork: `to` says where it starts, `state` with what")
    return _forked_row(old, _make_insert(old.fsm, options), services)


class _Client:
    """An engine as its methods see it."""

    _core: _Scheduler
    _path: str

    @property
    def _reader(self) -> _Reader:
        """What reads the file, of an engine that is open."""
        self._core.callers.check_open()
        return self._core.reader

    def workers(self) -> list[Worker]:
        """Return the engines that run on this file; one whose process has died is none of them."""
        return _living(self._path, self._reader.workers())


class _Sending(_Client):
    """Insert and signal."""

    def insert(self, fsm: Any, **options: Unpack[_InsertOptions]) -> int:
        """Insert an instance, with the options of `Insert`, and return its id once it is durable.

        Raises `DuplicateError`, `StateError`, `UnknownFSMError`, `UnknownLimitError`, `ValueError` or `TypeError`;
        then nothing was written.
        """
        self._core.callers.check_open()
        return self._core.callers.insert(self._core.services.new_row(_make_insert(fsm, options)))

    def insert_all(self, inserts: Iterable[Insert]) -> list[int | None]:
        """Insert many instances in one transaction; return their ids in order, None for a duplicate."""
        self._core.callers.check_open()
        rows = self._core.services.new_rows(inserts)
        return self._core.callers.perform(lambda beat: beat.inserts.write(rows))

    def insert_nowait(self, fsm: Any, **options: Unpack[_InsertOptions]) -> _Future[int]:
        """Insert an instance without waiting; the future has its id once it is durable. Many share a commit.

        What `insert` would raise at the file, the future has as its exception; what is wrong with the options is
        raised here. It can also be awaited, in any running loop. Its callbacks are called one after the other in a
        thread of the engine's.
        """
        self._core.callers.check_open()
        return self._core.callers.insert_later(self._core.services.new_row(_make_insert(fsm, options)))

    def signal_nowait(
        self, target: int | str, name: str, payload: Any = None, *, dedup_key: str | None = None
    ) -> _Future[None]:
        """Send a signal without waiting; the future is done once it is durable, or has what `signal` would raise."""
        message = _message(target, name, payload, dedup_key)
        return self._core.callers.perform_later(lambda beat: beat.inboxes.deliver(message))

    def result_nowait(self, target: int | str) -> _Future[Any]:
        """Return a future of an instance's result, which can also be awaited: no thread waits for it.

        It has `FailedError`, `NotFoundError` if the instance is collected, or `EngineClosedError` as its exception;
        another `DurableError` where the file can't be looked at any more. Raises `NotFoundError`, and `DurableError`
        where an engine that is not started can't have the one thread that looks for all of them.
        """
        return self._core.results.future_of(self._reader.identify(target))

    def signal(self, target: int | str, name: str, payload: Any = None, *, dedup_key: str | None = None) -> None:
        """Put a signal into the inbox of a live instance, by id or correlation key, and wake it if it waits for it.

        A `dedup_key` makes redelivery under the same name a no-op as long as the instance lives. Raises
        `NoTargetError`.
        """
        message = _message(target, name, payload, dedup_key)
        self._core.callers.perform(lambda beat: beat.inboxes.deliver(message))


class _Looking(_Client):
    """Look and wait."""

    _UNSEEN_S = 0.1
    """For how long to trust that an instance which this engine runs has not ended elsewhere."""
    _IDLE_LOOK_S = 0.1
    """How often `wait_idle` looks, and tells of changes."""
    _WARN_S = 5.0
    """After so long the log is told that somebody waits for what nobody is there to run."""

    def get(self, target: int | str) -> Instance:
        """Return an instance by id, or by correlation key: the occupant, else the newest that carries the key.

        Raises `NotFoundError`.
        """
        return self._reader.get(target)

    def find(self, *, limit: int = 100, **filters: Unpack[_Filters]) -> list[Instance]:
        """Return the newest instances that pass all filters, newest first; `before=id` pages.

        `status` may be several, `fsm` is a class or a name; `queue`, `parent_id`, `correlation_key` and `schedule` are
        those of the rows; `since` is an instant: those that have changed at it or after.
        """
        return self._reader.find(_checked_filters(filters), _at_least_1(limit, "limit"))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many instances each queue has in each status: `{queue: {status: n}}`."""
        return self._reader.counts()

    def wait(self, target: int | str, timeout: _Duration | None = 5, *, until: str = "settled") -> Instance:
        """Wait until an instance is done, failed or parked (`until="terminal"`: done or failed), and return it.

        A timeout, in seconds, is not an error: the instance is returned as it stands. Raises `NotFoundError`, and
        `EngineClosedError` if the engine is stopped meanwhile.
        """
        if until not in tuple(_UNTIL):  # looked through: what can't be hashed is none, either
            raise ValueError(f"until must be 'settled' or 'terminal', not {_brief(until)}")
        reader = self._core.reader
        return self._wait(target, lambda waiter: reader.get(waiter.instance), _UNTIL[until], timeout)

    def wait_idle(
        self,
        *,
        queue: str | None = None,
        timeout: _Duration | None = None,
        on_change: Callable[[dict[str, dict[str, int]]], object] | None = None,
    ) -> bool:
        """Wait until nothing is runnable or executing any more, in all queues or that one; False at the timeout.

        Rows that are dated in the future, wait for a signal, or are of a paused queue do not count. `on_change(counts)`
        is called in this thread whenever the counts have changed, at most ten times a second, and after the last
        change; what it raises is raised on. Work that no running engine serves is a `DurableError`, not a wait for
        ever.
        """
        if queue is not None:
            _text(queue, "queue")
        if on_change is not None:
            _check_callback(on_change, "on_change")
        deadline = _Ticks.monotonic() + (math.inf if timeout is None else _duration_ms(timeout, "timeout") / 1000)
        told: dict[str, dict[str, int]] | None = None
        while True:
            busy = self._reader.busy(self._core.services.now())
            busy = busy if queue is None else busy & {queue}
            if on_change is not None and (counts := self.counts()) != told:
                told = counts
                on_change(counts)
            left_s = deadline - _Ticks.monotonic()
            if not busy or left_s <= 0:
                return not busy
            self._refuse_unserved(busy)
            time.sleep(min(left_s, self._IDLE_LOOK_S))

    def result(self, target: int | str, timeout: _Duration | None = None) -> Any:
        """Wait for an instance to end and return its result.

        Raises `FailedError` with its `last_error`, `TimeoutError` after `timeout` seconds (None: never), and
        `NotFoundError`.
        """
        ending = self._wait(target, self._ending, _TERMINAL, timeout)
        if ending.status == Status.DONE:
            return _load_value(ending.result)
        if ending.status == Status.FAILED:
            raise FailedError(ending.id, ending.last_error)
        note = self._note_if_unserved(ending.id)
        raise TimeoutError(f"instance {ending.id} has not ended within {timeout!r} s, it is {ending.status}{note}")

    def _ending(self, waiter: _Waiter) -> _Ending:
        done = waiter.done
        if done is None:
            return self._core.reader.ending(waiter.instance)
        return _Ending(waiter.instance, done.status, done.result, None)

    def subscribe(self, callback: Callable[[Event], object], *names: str) -> Callable[[], None]:
        """Call back with every `Event` of those names, or all; return a function that unsubscribes.

        Events come from a thread of their own while the engine runs, else from the thread that made them. What a
        callback raises is logged.
        """
        self._core.callers.check_open()
        return self._core.dispatcher.subscribe(callback, names)

    def _wait(
        self, target: int | str, look: Callable[[_Waiter], _Look], until: tuple[Status, ...], timeout: _Duration | None
    ) -> _Look:
        """Look at an instance until it is in one of the statuses, or the timeout is over."""
        core = self._core
        core.callers.check_open()
        deadline = _Ticks.monotonic() + (math.inf if timeout is None else _duration_ms(timeout, "timeout") / 1000)
        instance = core.reader.locate(target)
        warn_at = _Ticks.monotonic() + self._WARN_S
        with core.waiters.waiting(instance, until) as waiter:
            if instance in core.runners.held:  # most likely there is nothing to see yet
                waiter.wake_up.wait(max(0.0, min(deadline - _Ticks.monotonic(), self._UNSEEN_S)))
                core.callers.check_open()
            while True:
                found, monotonic = look(waiter), _Ticks.monotonic()
                if found.status in until or deadline <= monotonic:
                    return found
                if warn_at <= monotonic:
                    warn_at = math.inf
                    self._warn_if_unserved(instance)
                # The engine's own thread wakes it for commits, also for those of other processes; without it, look.
                look_at = math.inf if core.is_started else monotonic + core.options.poll_s
                waiter.wake_up.wait(min(deadline, warn_at, look_at) - monotonic)
                core.callers.check_open()

    def _warn_if_unserved(self, instance: int) -> None:
        """Say in the log that somebody waits for what nobody is there to run."""
        if note := self._note_if_unserved(instance):
            _log.warning("instance %d is waited for: it is runnable%s", instance, note)

    def _refuse_unserved(self, queues: set[str]) -> None:
        """Refuse to wait for work that no engine is there to run, unless one was just about to end it."""
        served = {queue for worker in self.workers() for queue in worker.queues}
        unserved = queues - served and self._core.reader.busy(self._core.services.now()) & queues - served
        if unserved:
            raise DurableError(
                f"no running engine serves {', '.join(map(repr, sorted(unserved)))}, where there is work"
            )

    def _note_if_unserved(self, instance: int) -> str:
        """Say whether a runnable instance has nobody to run it, for the end of a sentence."""
        found = self._core.reader.get(instance)
        is_served = found.status != Status.RUNNABLE or any(found.queue in one.queues for one in self.workers())
        return "" if is_served else f", and no running engine serves its queue {found.queue!r}"


class _Steering(_Client):
    """Cancel, retry, pause; and the past of an instance."""

    def cancel(self, target: int | str, reason: str = "cancelled", *, children: bool = False) -> bool:
        """Fail an instance for a reason; True if it is failed now, or will be when its running step ends.

        The running step's outcome is dropped, `handle` hears nothing of it, and its `ctx.cancelled` is true; an `async
        def` step gets asyncio's CancelledError at once, one of another process within its `poll_interval`. False if
        it had ended. With `children` its live descendants, those of an ended instance too, are cancelled in the same
        transaction. Raises `NotFoundError`.
        """
        _text(reason, "reason")
        _boolean(children, "children")
        instance = self._reader.identify(target)
        cancel = _Instances.cancel_tree if children else _Instances.cancel
        return self._core.callers.perform(lambda beat: cancel(beat.instances, instance, reason))

    def retry(self, target: int | str) -> None:
        """Let a failed instance go on from where it stood, with attempt 0.

        Its step runs again, now, with the signals and children that it had been shown. One that was cancelled while
        it waited for a signal waits again, until the deadline that it had, if any, which fires at once if it is past;
        so does one at its join of which children live, by now or still. Raises `NotFoundError`, `DurableError` if it
        has not failed, `DuplicateError` if its key is taken by now.
        """
        instance = self._reader.identify(target)
        self._core.callers.perform(lambda beat: beat.instances.retry(instance))

    def pause(self, queue: str) -> None:
        """Keep every engine from claiming from a queue, until `resume`.

        What runs, ends; what is claimed ahead (`prefetch`) and has not started is given back, by this engine at once,
        by others within their `poll_interval`.
        """
        _text(queue, "queue")
        self._core.callers.perform(lambda beat: beat.pause(queue))

    def resume(self, queue: str) -> None:
        """Let a paused queue run again."""
        _text(queue, "queue")
        self._core.callers.perform(lambda beat: beat.resume(queue))

    def history(self, target: int | str) -> list[Transition]:
        """Return what was run of an instance, oldest first, as far as it is kept: see the class option `history`.

        Raises `NotFoundError`.
        """
        return self._reader.history(self._reader.identify(target))

    def rewind(self, target: int | str, to: Any, *, state: Any = None) -> None:
        """Have an instance stand again before the run `to` of its history: a `seq`, or a step, its latest run.

        A rewind has a `seq`, too, which leads back to where it was made.

        It is runnable now, at that step, with the state that it had then, unless another is given; with what it
        awaited, attempt and crashes 0, its inbox as it stood then, in the queue and under the key and rate limit that
        it has. Children that the run or later ones inserted go on without a parent. What was done outside the file
        stays done: whether it may be done again is the caller's to know.

        The state comes back with the class version under which it ran: `migrate` brings it to a later one again, where
        no class of its own is registered. A `state` that is given is one of the version that the row has now.

        Raises `NotFoundError`; `DurableError` if it is executing; `DuplicateError` if its correlation key is taken by
        now; `StateError`; `ValueError` for a run that its history does not have (a step that never ran will do if
        `state` is given), for one whose step its class does not have, and for one of another version which none of the
        classes known here has or migrates. Nothing is changed then.
        """
        old = self._reader.get(target)
        past = _find_past(self._core.reader, old, to, state)
        self._core.callers.perform(lambda beat: beat.history.rewind(old.id, past))

    def fork(self, target: int | str, to: Any, **options: Unpack[_InsertOptions]) -> int:
        """Insert a new instance that goes on from before the run `to` of another, and return its id.

        `to` is that of `rewind`, and so is `state` among the options, which are those of `Insert`. The new one has the
        class and the queue of the old one, which is left alone, and the version that a rewind would give it; no key
        and no parent, an empty inbox and a history of its own. Errors are those of `rewind` and `insert`.
        """
        old = self._reader.get(target)
        past = _find_past(self._core.reader, old, to, options.pop("state", None))
        template = _fork_template(old, options, self._core.services)
        return self._core.callers.perform(lambda beat: beat.history.fork(old.id, past, template))


class _Scheduling(_Client):
    """Schedules."""

    def schedule(
        self,
        name: str,
        fsm: Any,
        when: Cron | Every,
        *,
        catch_up: str = "last",
        window: _Duration = dt.timedelta(days=1),
        overlap: bool = False,
        jitter: _Duration = 0,
        **options: Unpack[_InsertOptions],
    ) -> None:
        """Insert instances of a class at the instants of `when`, until `unschedule`; each once over all processes.

        It replaces the schedule of that name: the same again changes nothing, and a change takes effect from now on.
        `options` are those of `Insert`, but for dates. The instances are ordinary ones, with `schedule` and
        `scheduled_at`, the instant that each stands for.

        * `catch_up`: what becomes of occurrences that no engine was there for: "last" inserts the latest if it is not
          older than `window` (seconds or a timedelta), "none" none, "all" each within it, the latest 1,000 at most
          (with `overlap=True` only). The others are counted in `missed`. A new schedule catches up nothing
        * `overlap`: insert also while the latest instance is live; otherwise that occurrence is skipped
        * `jitter`: seconds or a timedelta up to which each is inserted later, by a hash of the file, name and instant,
          but before the next

        Only engines that know the class fire it, as its highest version, which is given a state from an earlier one by
        its `migrate`, if it has that; what a state or arguments leave out has the defaults of now. A clock that is set
        back brings nothing a second time, as far as the instances are kept. Raises `ValueError`, `TypeError`,
        `StateError`, `UnknownFSMError` or `UnknownLimitError`; then nothing was written.
        """
        self._core.callers.check_open()
        _text(name, "name")
        plan = _plan(when, catch_up=catch_up, window=window, overlap=overlap, jitter=jitter, **options)
        row = self._core.declarations.describe(name, _resolve(fsm), plan)
        self._core.callers.perform(lambda beat: beat.schedules.write(row))

    def unschedule(self, name: str) -> bool:
        """Remove a schedule; True if there was one. One that a class declares is written again at the next start."""
        _text(name, "name")
        return self._core.callers.perform(lambda beat: beat.schedules.remove(name))

    def schedules(self) -> list[Schedule]:
        """Return the schedules of the file, by name."""
        return self._reader.schedules()

    def trigger(self, name: str) -> int:
        """Insert an instance of a schedule now, and return its id: beside its grid, also while it is paused.

        Its `scheduled_at` is now. Raises `NotFoundError`, and `DuplicateError` if its correlation key is taken.
        """
        _text(name, "name")
        return self._core.callers.perform(lambda beat: beat.schedules.trigger(name))

    def pause_schedule(self, name: str) -> None:
        """Keep a schedule from firing until `resume_schedule`. Raises `NotFoundError`."""
        _text(name, "name")
        self._core.callers.perform(lambda beat: beat.schedules.pause(name))

    def resume_schedule(self, name: str) -> None:
        """Let a paused schedule fire again, from now on: what it would have fired meanwhile is not caught up.

        Raises `NotFoundError`.
        """
        _text(name, "name")
        self._core.callers.perform(lambda beat: beat.schedules.resume(name))


class Engine(_Sending, _Looking, _Steering, _Scheduling):
    """Runs machines and jobs on one SQLite file, and lets anybody insert, signal, wait and look.

    Making one opens the file, and creates or migrates it; `start()` or `with` runs its queues. Every method is
    thread-safe; several engines, in one or in many processes of the machine, may share a file. Options:

    * `name` ("durable"): what `workers()` and the log show
    * `queues` ({"default": 10}): how many steps of each queue run at once; `{}` makes a client that runs nothing
    * `fsms` (): objects to run classes with that can't be made without arguments, one of a class
    * `rate_limits` ({}): `RateLimit` by name, kept in the file
    * `concurrency_limits` ({}): how many instances of one concurrency key execute at once, by the key's name; a step
      over its `timeout` is not counted, though a thread's code may run on
    * `prefetch` (0): rows to claim ahead for each queue
    * `lease_ttl` (60), `heartbeat_interval` (20): seconds after which a worker that does not beat loses its claims,
      and how often it beats
    * `poll_interval` (0.05): seconds within which another process's commit is seen
    * `drain_timeout` (5): seconds that `stop` waits for running steps
    * `retention` (1 day), `gc_interval` (60): seconds that ended rows are kept, unless their class says how long
      (`math.inf`: for ever), and how often they are collected
    * `history` (True): keep what this engine has run, for `history`, `rewind` and `fork`; False keeps none
    * `synchronous` ("full"): "full" survives a power cut, "normal" a crash of the process
    * `clock` (time.time): seconds since the epoch

    A bad value is a `ValueError`, a damaged, foreign or newer file a `SchemaError`, one that `sqlite3` or a plain
    `open` has open in this process a `SharedFileError`, one with a second name a `DurableError`.
    """

    def __init__(self, database: str | os.PathLike[str], **options: Unpack[_EngineOptions]) -> None:
        _refuse_unknown(options, _EngineOptions.__annotations__)
        checked = _Options(**cast(Any, options))
        behaviours = _Behaviours(checked.fsms)
        self._path = _database_path(database)
        _refuse_inherited(self._path)
        _refuse_shared(self._path)
        self._core = _Scheduler(self._path, checked, behaviours)
        try:
            self._save_rate_limits(checked.rate_limits)
        except BaseException:
            self._core.close()
            raise

    # Life cycle

    def start(self) -> None:
        """Run the queues, in threads, until `stop`."""
        self._core.start()

    def stop(self, timeout: _Duration | None = None) -> None:
        """Stop claiming, let running steps commit for up to `timeout` (`drain_timeout` unless given), and close.

        What was claimed and has not started is given back at once, what has not ended by then afterwards. A second
        call does nothing but wait for the first. Called in a step or a callback of its own, it returns at once, and
        the engine stops behind it.
        """
        timeout_s = None if timeout is None else _duration_ms(timeout, "timeout") / 1000
        if self._core.is_started and self._core.is_within():
            behind = contextvars.Context().run
            threading.Thread(target=behind, args=(self._core.stop, timeout_s), name="durable-stop").start()
        else:
            self._core.stop(timeout_s)

    def run(self) -> None:
        """Start, block until SIGINT or SIGTERM, then stop. A second signal during the stop has its usual effect."""
        import signal

        wake_up = _WakeUp()
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        previous = [(number, signal.signal(number, lambda *_: wake_up.set())) for number in numbers]
        try:
            if not self._is_running():
                self.start()
            while not self._core.is_closed and not wake_up.wait(0.5):
                self._core.files.check()
        finally:
            for number, handler in previous:
                signal.signal(number, handler)
            self.stop()

    async def __aenter__(self) -> Self:
        """Start without blocking the running loop, and run `async def` steps on that loop.

        A step whose task somebody cancels there, as `asyncio.run` does at its end, has crashed and runs again.
        """
        import asyncio

        if self._is_running():
            return self
        try:
            await _call_beside_loop(functools.partial(self._core.start, asyncio.get_running_loop()))
        except asyncio.CancelledError:
            await _call_beside_loop(self.stop)  # nobody else would: the block is not entered
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop without blocking the loop; who is cancelled meanwhile waits for the end of it all the same."""
        if not self._core.services.fork_guard.is_forked:  # a child has no thread of the loop's, and nothing to stop
            await _call_beside_loop(self.stop)

    def __enter__(self) -> Engine:
        if not self._is_running():
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_running(self) -> bool:
        """Whether it was started before; one that was stopped since is refused, as by all other verbs."""
        self._core.callers.check_open()
        return self._core.is_started

    # Drain

    def drain(
        self, *, queue: str | None = None, with_scheduled: bool = True, max_steps: int = 1000
    ) -> collections.Counter[str]:
        """Run everything that is runnable, in this thread, and return what it came to: `Counter(steps=3, done=1, ...)`.

        No engine may be started. The rows of all queues run in one order: by priority, when they are due, and id. Work
        dated in the future counts as due unless `with_scheduled=False`; await deadlines and buckets keep to the clock,
        and so do schedules, of which none fires a second time. More than `max_steps` steps are a `DurableError` that
        names the instance still running. A step over its `timeout` is noticed when it returns.
        """
        if queue is not None:
            _text(queue, "queue")
        _boolean(with_scheduled, "with_scheduled")
        _at_least_1(max_steps, "max_steps")
        self._core.callers.check_open()
        return self._core.drain(queue, with_scheduled, max_steps)

    def fire_timeouts(self) -> int:
        """Let every armed await deadline fire now, and return how many there were."""
        return self._core.callers.perform(_Beat.fire_timeouts)

    # Maintain

    def gc(self) -> int:
        """Collect what is older than `retention` now; return the number of rows deleted.

        Space that this sets free goes back to the file system, but for a megabyte; not from a file that the
        application made itself, or that an older version did: there SQLite can only use it again.
        """

        def collect(after: _SweepPosition) -> tuple[int, _SweepPosition | None]:
            return self._core.callers.perform(lambda beat: beat.cleaning.collect(after, 500))

        def shrink(spare: int) -> int:
            return self._core.callers.perform(lambda beat: beat.cleaning.shrink(spare))

        total, spare = 0, _MAX_INTEGER
        after: _SweepPosition | None = _SweepPosition()
        while after is not None:
            count, after = collect(after)
            total += count
        while spare > 0:
            spare = shrink(spare)
        return total

    def check(self, *, code: bool = False) -> list[str]:
        """Audit the file, SQLite's integrity check included; return the problems in words, none when it is sound.

        With `code` every live instance and every schedule is also held against the classes that are known here: a
        class, a version or a step that is missing, a state that no longer loads. Nothing is run and nothing changed.
        """
        _boolean(code, "code")
        problems = self._reader.check()
        return problems + _check_code(self._core.reader) if code else problems

    def connect(self) -> apsw.Connection:
        """Return a connection to the file for the application's own use, with the engine's settings.

        Close it before the engine is stopped: nothing guards the file for it from then on.
        """
        self._core.callers.check_open()
        with _driver_errors(self._path):
            return _configure(_connect(self._path), self._core.options.synchronous)

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Copy the file as it is at one instant, while workers run.

        In the copy every queue and schedule is paused, so that opening it repeats no side effect, no worker is
        registered, and what was executing is runnable. Raises `ValueError` if there is a file at `path`,
        `DurableError` if none can be made there.
        """
        self._core.callers.check_open()
        target = _database_path(path)
        if os.path.exists(target):
            raise ValueError(f"path must be that of a new file, and {target} exists")
        partial = f"{target}-partial-{os.urandom(4).hex()}"
        try:
            self._copy(partial)
            os.replace(partial, target)
        except OSError as error:
            raise DurableError(f"{target} can't be made: {error}") from error
        finally:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(OSError):  # most likely it could not be made, and that is being raised
                    os.unlink(partial + suffix)

    # Helpers

    def _save_rate_limits(self, limits: Mapping[str, RateLimit]) -> None:
        policies = [_Policy(name, one.allowed, _positive_ms(one.per, "per"), one.burst) for name, one in limits.items()]
        if any(self._core.reader.policy(policy.name) != policy for policy in policies):
            self._core.callers.perform(functools.partial(_Beat.save_policies, policies=policies))

    def _copy(self, path: str) -> None:
        closing = contextlib.closing
        with (
            _driver_errors(path),
            closing(_connect(self._path)) as source,
            closing(apsw.Connection(path)) as copy,
            copy.backup("main", source, "main") as backup,
        ):
            backup.step(-1)
        with contextlib.closing(_Scheduler(path, _Options(), _Behaviours(()))) as copied:
            workers = copied.reader.workers()
            queues = {*copied.reader.queues(), *self._core.options.queues, *(q for one in workers for q in one.queues)}
            copied.callers.perform(lambda beat: beat.withdrawals.disband(queues))

    def __repr__(self) -> str:
        return f"<Engine {self._core.options.name!r} on {self._path}>"

    def __reduce__(self) -> typing.NoReturn:
        raise TypeError(f"{self!r} can't be copied or pickled: open another on the file, in another process as in this")

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and not core.is_closed:
            try:
                warnings.warn(f"{self!r} was not stopped", ResourceWarning, source=self, stacklevel=2)
            finally:  # also where warnings are errors
                self._stop_forgotten()

    def _stop_forgotten(self) -> None:
        # A thread of its own may be collecting it under a lock, or while it starts, which "Dummy-" stands for.
        if threading.current_thread().name.startswith(("durable-", "Dummy-")):
            threading.Thread(target=self.stop, args=(0,), name="durable-stop", daemon=True).start()
        else:
            self.stop(0)


class _CursorReads(_SharedReads):
    """Reads on the application's own connection."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def _select(self, sql: str, bindings: Sequence[Any]) -> list[tuple[Any, ...]]:
        return list(self._cursor.execute(sql, bindings))  # to its end: a statement that is left open goes on reading


def _cursor_of(connection: Any) -> Any:
    """Return a cursor of the application's connection, if a transaction is open on it."""
    standard = sys.modules.get("sqlite3")
    is_standard = standard is not None and isinstance(connection, standard.Connection)
    if not is_standard and not isinstance(connection, apsw.Connection):
        raise ValueError(f"connection must be an apsw.Connection or a sqlite3.Connection, not {_brief(connection)}")
    if not connection.in_transaction:
        raise ValueError("connection has no transaction open: execute BEGIN IMMEDIATE on it first")
    cursor = connection.cursor()
    if is_standard:
        cursor.row_factory = None
    else:
        cursor.row_trace = lambda _, row: row  # not the connection's own
    return cursor


def _lock_and_check(cursor: Any) -> None:
    """Take the write lock, and refuse a file that has no tables of durable's, or those of a newer version.

    The lock first: SQLite waits for it only as long as the transaction has read nothing.
    """
    try:
        cursor.execute("DELETE FROM main.durable_meta WHERE key = ''")
    except Exception as error:
        if "no such table" not in str(error):
            raise
        raise ValueError("connection is to a file without durable's tables: open an Engine on it once") from error
    version = int(_CursorReads(cursor).schema_version() or 0)
    if version != _SCHEMA_VERSION:
        advice = "open an Engine on it once to migrate it" if version < _SCHEMA_VERSION else "update durable"
        raise SchemaError(f"the file has schema version {version}, this durable writes {_SCHEMA_VERSION}: {advice}")


def _is_too_big(error: Exception) -> bool:
    """Whether a driver says of a value that SQLite can't hold it."""
    is_refused = isinstance(error, apsw.TooBigError) or getattr(error, "sqlite_errorcode", 0) == apsw.SQLITE_TOOBIG
    return is_refused or isinstance(error, OverflowError)  # sqlite3's for more than two gigabytes


def _insert_by(connection: Any, cursor: Any, fsm: Any, options: _InsertOptions) -> int:
    if isinstance(connection, apsw.Connection):
        _check_open_files(connection.filename)
    _lock_and_check(cursor)

    reads = _CursorReads(cursor)
    row = _new_row(_make_insert(fsm, options), int(time.time() * 1000), reads.policy)
    try:
        cursor.execute(_INSERT_UNIQUE, row)
    except Exception as error:
        if not _is_too_big(error):
            raise
        raise DurableError(f"a value is too big for the file: {_error_text(error)}") from error
    inserted = connection.changes() if isinstance(connection, apsw.Connection) else cursor.rowcount
    if not inserted:
        key = cast(str, row.correlation_key)
        raise DuplicateError(key, cast(tuple[int, str], reads.occupant(key))[0])
    return connection.last_insert_rowid() if isinstance(connection, apsw.Connection) else cursor.lastrowid


def insert_into(connection: apsw.Connection | sqlite3.Connection, fsm: Any, **options: Unpack[_InsertOptions]) -> int:
    """Insert an instance in the transaction that is open on the application's own connection, and return its id.

    It exists if and only if the application commits. `connection` is an `apsw.Connection`, such as
    `engine.connect()` gives, or, in a process that has no engine on that file, a `sqlite3.Connection`. Options and
    errors are those of `Engine.insert`; a connection without an open transaction, or to a file without durable's
    tables, is a `ValueError`. How long it waits for the write lock is the connection's to say, and what comes of it,
    as of any other fault of storage, is the driver's own error (`apsw.BusyError`, `sqlite3.OperationalError`).
    """
    cursor = _cursor_of(connection)
    try:
        return _insert_by(connection, cursor, fsm, options)
    finally:
        cursor.close()  # who keeps an error keeps its frames, and a statement of theirs would keep its snapshot


# ==================================================================================================
# Tools
# ==================================================================================================


class tools:  # noqa: N801 - a namespace, named as a module is
    """What programs that stand around this module, as the command line does, may use of it beside `__all__`.

    It is for them and not for applications. All of it stands here, with its documentation:

    * `Reader`: a look at a file, without user code, that changes nothing
    * `registry`: what the classes known in this process define, by name and version
    * `is_stopped`: whether an engine was stopped
    * `next_instants`: the instants of a schedule that come next

    And for engines that keep the rows elsewhere than in a file, on which the run of a step is one thing with this one:

    * `Host`: what such an engine does for its steps
    * `Steps`: runs them, from a `Row` that was claimed to an `Outcome` to commit
    * `Claim`: a row in hand
    * `Row`: the columns of an instance by which it is run
    * `NewRow`: the columns of one to insert
    * `Statement`: the user's SQL in an outcome
    * `Message`: a signal to deliver
    * `Call`: what a call inside a step returned, to keep
    * `Limit`: a rate limit, with the arithmetic of its bucket
    * `Entry`: a run, as the history keeps it
    * `Run`: which one is meant, and of which version it is
    * `ScheduleRow`: the columns of a schedule
    * `Transaction`: one of such an engine's, in which `Steps` goes through schedules and the history
    * `Outcome`: what a run leaves to be committed
    * `crashed`: what a row becomes whose process died
    * `cancelled`: what one becomes that somebody has cancelled
    * `Options`: the options of an engine, checked
    * `check_code`: holds rows against the classes that are known here
    * `Ticks`: the clocks that measure waits, which no test that freezes time stops
    * `filters`: those of `find`, checked, as columns have them
    * `record`: makes an `Instance`, a `Signal` and the like of its columns
    * `Checks`: those of arguments, as the methods of `Engine` make them
    * `await_future`: the `__await__` of the engine's futures
    * `call_beside_loop`: calls in a thread what blocks, for `async with`
    * `end_tasks`: cancels what is left on an event loop, and waits for it to be gone
    """

    class Reader(_Reader):
        """A look at a file that can't write to it, makes none, and leaves nothing beside it; a context manager.

        `get`, `find`, `counts`, `workers` and `check` are those of `Engine`; `children` and `signals` of an instance,
        `paused` queues, and `is_cancelled`, whether an instance was asked to end, are for who tells its story. `rows`
        runs a SELECT of one's own on the tables, `reading` lends the connection for several in one transaction.
        Raises `DurableError` where there is no such file, `SchemaError` where it is no database of durable's.
        """

        def __init__(self, file: str | os.PathLike[str]) -> None:
            if not os.path.isfile(file):
                raise DurableError(f"{file}: {'that is no file' if os.path.exists(file) else 'no such file'}")
            super().__init__(_database_path(file))
            try:
                version = self._patiently(self._version)
                if version == 0:
                    raise SchemaError(f"{file} is no database of durable's{self._doubt()}")
                if version < _SCHEMA_VERSION:
                    raise SchemaError(f"{file} has schema version {version}: open an engine on it once to migrate it")
            except BaseException:
                self.close()
                raise

        def _doubt(self) -> str:
            """Say that what is looked for may stand in a log that another name of the file leads to, if it has one."""
            count = os.stat(self.path).st_nlink
            return f", as it looks by this name; but it has {count} names, and its log only one" if count > 1 else ""

        @contextlib.contextmanager
        def reading(self) -> Iterator[apsw.Connection]:
            """Lend a connection to one thread at a time."""
            seen = self._lies_still()
            if seen is None:
                with super().reading() as connection:
                    yield connection
                return
            uri, flags = f"{pathlib.Path(self.path).as_uri()}?immutable=1", apsw.SQLITE_OPEN_READONLY
            with (
                _driver_errors(self.path),
                contextlib.closing(_connect(uri, flags | apsw.SQLITE_OPEN_URI)) as connection,
            ):
                yield connection
            if self._lies_still() != seen:
                raise DurableError(f"{self.path} was written to while it was read: look again")

        def _patiently(self, look: Callable[[], _Value]) -> _Value:
            """Look again, a few times, where who may not write is refused: an engine may just be starting or ending."""
            for pause_s in () if self._may_write() else (0.01, 0.05, 0.25):
                try:
                    return look()
                except DurableError:  # even damage may be what was read of a page that was being written
                    time.sleep(pause_s)
            return look()

        def _version(self) -> int:
            with self.reading() as connection:
                return _file_version(connection, self.path)

        def _select(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
            return self._patiently(functools.partial(super()._select, sql, bindings))

        def _lies_still(self) -> tuple[int, int] | None:
            """By what to see whether a file changes that can't be read but as one that does not; None for others.

            To read, SQLite wants a log beside the file. Where there is none, and none can be made, nobody writes.
            """
            with contextlib.suppress(FileNotFoundError):
                if self._may_write() or os.path.getsize(f"{self.path}-wal"):
                    return None
            status = os.stat(self.path)
            return status.st_mtime_ns, status.st_size

        def _may_write(self) -> bool:
            return os.access(self.path, os.W_OK) and os.access(os.path.dirname(self.path), os.W_OK)

        def _open(self) -> apsw.Connection:
            # Without a log SQLite makes one, and only a connection that might write takes it away at the end.
            has_log = os.path.exists(f"{self.path}-wal")
            if has_log and not self._may_write() and not os.path.exists(f"{self.path}-shm"):
                raise DurableError(f"{self.path} can't be read with its log where neither can be written: copy both")
            return _connect(self.path, apsw.SQLITE_OPEN_READONLY if has_log else apsw.SQLITE_OPEN_READWRITE)

        def check(self, *, code: bool = False) -> list[str]:
            """Audit the file, and with `code` hold it against the classes that are known here, as `Engine.check`."""
            return super().check() + (_check_code(self) if code else [])

        def find(self, filters: Mapping[str, Any], limit: int) -> list[Instance]:
            """Return the newest instances that pass all filters, by the names that `Engine.find` has for them."""
            return super().find(_checked_filters(filters), _at_least_1(limit, "limit"))

        def workers(self) -> list[Worker]:
            """Return the engines that run on the file; one whose process has died is none of them."""
            return _living(self.path, super().workers())

        def rows(self, sql: str, bindings: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
            """Run one SELECT."""
            return self._select(sql, bindings)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    registry: ClassVar[Mapping[tuple[str, int], _Spec]] = types.MappingProxyType(_registry)

    @staticmethod
    def next_instants(schedule: Schedule, count: int) -> list[dt.datetime]:
        """Return so many nominal instants of a schedule that come next; none while it is paused.

        Only the next one where its grid can't be read here, without the extra or the zone's data.
        """
        instants = [] if schedule.next_at is None else [schedule.next_at]
        with contextlib.suppress(ImportError, ValueError):
            while instants and len(instants) < count:
                at = _instant_ms(instants[-1], "next_at")  # an instant of the grid, from which an interval goes on
                following = schedule.when._grid(at, _zone).after(at)
                if following >= _END_OF_TIME:
                    break
                instants.append(_instant(following))
        return instants

    @staticmethod
    def is_stopped(engine: Engine) -> bool:
        """Whether `stop` has closed the engine."""
        return engine._core.is_closed

    Claim: typing.TypeAlias = _Claim
    Row: typing.TypeAlias = _Row
    NewRow: typing.TypeAlias = _NewRow
    Statement: typing.TypeAlias = _Statement
    Message: typing.TypeAlias = _Message
    Call: typing.TypeAlias = _Kept
    Limit: typing.TypeAlias = _Policy
    Entry: typing.TypeAlias = _Entry
    Run: typing.TypeAlias = _Run
    ScheduleRow: typing.TypeAlias = _ScheduleRow
    Options: typing.TypeAlias = _Options
    Ticks: typing.TypeAlias = _Ticks

    class Host(typing.Protocol):
        """What an engine that keeps its rows elsewhere does for its steps; called from any of its threads.

        * `clock()`: seconds since the epoch
        * `policy(name)`: that rate limit, or None
        * `children(instance)`: all of them that are kept, oldest first
        * `calls(instance)`: what was kept of its step's calls, `(JSON, whether it was awaited)` by name
        * `is_cancelled(instance)`: whether somebody has asked to cancel it while it executes
        * `keep_call(row, call)`: commit what a call returned, if the row is still held under its claim; whether it was
        * `show_progress(row, progress)`: note how far its step is, JSON as the column has it
        * `later(call)`: call it in another thread, and return its future
        """

        def clock(self) -> float: ...
        def policy(self, name: str, /) -> _Policy | None: ...
        def children(self, instance: int, /) -> tuple[Instance, ...]: ...
        def calls(self, instance: int, /) -> dict[str, tuple[str | None, bool]]: ...
        def is_cancelled(self, instance: int, /) -> bool: ...
        def keep_call(self, row: _Row, call: _Kept, /) -> bool: ...
        def show_progress(self, row: _Row, progress: str, /) -> None: ...
        def later(self, call: Callable[[], Any], /) -> concurrent.futures.Future[Any]: ...

    class Transaction(typing.Protocol):
        """One transaction of a host's: what schedules and the history ask of it, and what they write.

        * `now`: milliseconds since the epoch; `worker`: id of the engine; `keeps_history`: its option
        * `insert(row)`: the id; raises `DuplicateError`. `refuse_taken_key(instance)` raises it as well, where the key
          of an instance that is to be brought back is another's by now
        * `has_fired`: names of the schedules that have fired and are not to fire again; `fired(name)`: one has
        * `file_id()`: a text of the database's own, which never changes
        * the others read and write the rows of tables that are as the file's: a `ScheduleRow` replaces the one of its
          name; `rewind` makes the row runnable under a new claim number, with the entry's version, step and state
        """

        now: int
        worker: str
        keeps_history: bool
        has_fired: Container[str]

        def insert(self, row: _NewRow, /) -> int: ...
        def refuse_taken_key(self, instance: int, /) -> None: ...
        def fired(self, name: str, /) -> None: ...
        def file_id(self) -> str: ...
        def status(self, instance: int, /) -> str | None: ...
        def schedule(self, name: str, /) -> _ScheduleRow | None: ...
        def save_schedule(self, row: _ScheduleRow, /) -> None: ...
        def rename_schedule(self, old: str, new: str, /) -> None: ...
        def unschedule(self, name: str, /) -> bool: ...
        def declared_schedules(self) -> list[_ScheduleRow]: ...
        def due_schedules(self, after: int, until: int, /) -> list[_ScheduleRow]: ...
        def schedules_ahead(self, now: int, /) -> list[_ScheduleRow]: ...
        def has_occurrence(self, name: str, nominal: int, /) -> bool: ...
        def row(self, instance: int, /) -> tuple[_Row, str] | None: ...
        def record(self, entries: Sequence[_Entry], /) -> None: ...
        def entries_from(self, instance: int, seq: int, /) -> list[_Entry]: ...
        def retention(self, instance: int, /) -> int | None: ...
        def detach(self, parent: int, first_child: int, /) -> None: ...
        def bring_back(self, target: int, seq: int, /) -> None: ...
        def drop_calls(self, instance: int, /) -> None: ...
        def rewind(self, entry: _Entry, max_attempts: int | None, now: int, /) -> None: ...

    @attrs.frozen
    class Outcome:
        """What one run of a step leaves: to be committed whole, if the row is still held under its claim, or dropped.

        * `kind`: that of `step.stop`, or "crash"
        * `columns`: what the row's columns become, by name; those that are not named are kept. A row that is to await
          becomes runnable in place of it where there is nothing to wait for: a signal of a name that it awaits and
          that is none of `shown`, or no child that was inserted
        * `effects`: statements, rows to insert and messages to deliver, in their order
        * `shown`: ids of the signals that it consumes, if it is a "next" or "children"; one that is done has no inbox
        * `children`: rows to insert for whom it waits
        * `is_inline`: whether the next step goes on under the claim, then the next number of it
        * `is_asking`: whether that one has limits that are not held yet
        * `interrupt`: the SystemExit or the like out of the step, of which this is the crash
        """

        claim: _Claim
        kind: str
        columns: dict[str, Any]
        effects: tuple[_Statement | _NewRow | _Message, ...]
        shown: tuple[int, ...]
        children: tuple[_NewRow, ...]
        is_inline: bool
        is_asking: bool
        interrupt: BaseException | None
        _commit: _Commit = attrs.field(repr=False)

        @property
        def row(self) -> _Row:
            """The row as it was claimed; under the version, and at the step, that `migrate` has brought it to."""
            return self.claim.row

        @property
        def advanced(self) -> _Row:
            """The row as it goes on inline, under the next claim."""
            return _advanced(self._commit.migrated_row, cast(_Advance, self._commit.change))

        def entry(
            self, worker: str, first_child: int | None = None, *, cancel_reason: str | None = None
        ) -> _Entry | None:
            """Say how the run stands in the history, unless its class keeps none; as cancelled, if for a reason."""
            commit = self._commit
            if cancel_reason is not None:
                commit = commit._replace(kind="cancel", change=_failed(self.row, cancel_reason), error=None)
            return _entry(commit, worker, first_child) if commit.is_kept else None

    class _Exit(NamedTuple):
        """What ends a coroutine, and is no error for `handle`."""

        error: BaseException

    class Steps:
        """Runs steps of rows that are kept elsewhere than in a file; thread-safe, with no threads of its own.

        `fsms` are those of `Engine`. Each run has a copy of its caller's context variables.
        """

        def __init__(self, host: tools.Host, fsms: Iterable[object] = ()) -> None:
            beat = types.SimpleNamespace(store=host)
            self._host = host
            self._behaviours = _Behaviours(fsms)
            self._lock = _Lock()
            self._reported: set[tuple[str, str]] = set()
            self._services = _Services(cast(Any, host), host.clock).open(
                lambda action: action(beat), lambda action: host.later(lambda: action(beat)), self._note_progress
            )

        def new_row(self, fsm: Any, options: Mapping[str, Any]) -> _NewRow:
            """Make the row of an instance to insert; raises what `Engine.insert` does."""
            return self._services.new_row(_make_insert(fsm, cast(Any, dict(options))))

        def new_rows(self, inserts: Iterable[Insert]) -> list[_NewRow]:
            """Make those of many."""
            return self._services.new_rows(inserts)

        def message(self, target: int | str, name: str, payload: Any, dedup_key: str | None) -> _Message:
            """Make a signal to deliver; raises what `Engine.signal` does."""
            return _message(target, name, payload, dedup_key)

        def knows(self, row: _Row) -> bool:
            """Whether its class is known here; no code of the user's is called for it."""
            return self._behaviours.spec_for(row.fsm, row.version) is not None

        def claim(self, row: _Row, inbox: Iterable[Signal] = ()) -> _Claim | None:
            """Take a row in hand that was claimed; None if its class can't be run here."""
            found = self._behaviours.find(row.fsm, row.version)
            behaviour = None if found is None else found[1] or self._behaviours.make(found[0].cls)
            if found is None or behaviour is None:
                return None
            return _Claim(row, found[0], behaviour, self._services, tuple(inbox))

        def run(self, claim: _Claim, await_on_loop: Callable[[Coroutine[Any, Any, Any]], Any]) -> tools.Outcome | None:
            """Run a step, and ask `handle` where it fails; None if it was over its timeout by then.

            A coroutine is given to `await_on_loop`, which returns what it returns; it keeps to the timeout by itself.
            """
            return contextvars.copy_context().run(self._run, claim, await_on_loop)

        def time_out(self, claim: _Claim) -> tools.Outcome | None:
            """Disown a step whose time is over, and ask `handle`; None if it has just ended."""
            with self._lock:
                if claim.is_finished:
                    return None
                claim.is_disowned = True
            return self._outcome(contextvars.copy_context().run(self._recover, claim, _timeout_error(claim)))

        def drop(self, claim: _Claim) -> None:
            """Disown a step and ask nobody: its row is given back."""
            with self._lock:
                claim.is_disowned = not claim.is_finished

        def refused(self, outcome: tools.Outcome, error: Exception) -> tools.Outcome:
            """Say what becomes of a step whose outcome could not be committed, for an error of its own statements."""
            claim = outcome.claim
            if claim.error is not None or outcome.kind == _CRASH:
                return self._outcome(_stop(claim, error))
            return self._outcome(contextvars.copy_context().run(self._recover, claim, error))

        def go_on(self, outcome: tools.Outcome, inbox: Iterable[Signal]) -> _Claim:
            """Take the row of an outcome in hand that goes on inline."""
            claim = outcome.claim
            following = _Claim(outcome.advanced, claim.spec, claim.behaviour, claim.services, tuple(inbox))
            following.inline_since = claim.started_at if claim.inline_since is None else claim.inline_since
            return following

        def history(self, transaction: tools.Transaction) -> _History:
            """Go through the history in a transaction: `record`, `rewind`, `fork`."""
            return _History(*self._parts_of(transaction))

        def past(self, runs: _Runs, old: Instance, to: Any, state: Any) -> _Past:
            """Find the run that `Engine.rewind` means; raises what that does."""
            return _find_past(runs, old, to, state)

        def fork_row(self, old: Instance, options: Mapping[str, Any]) -> _NewRow:
            """Make the row of a fork, but for its step and state; raises what `Engine.fork` does."""
            return _fork_template(old, cast(Any, dict(options)), self._services)

        def schedules(self, transaction: tools.Transaction) -> _Schedules:
            """Go through the schedules in a transaction.

            `write`, `declare`, `remove`, `trigger`, `pause`, `resume`, `realign`, and `fire(after)` for what is due
            and was not there to be fired at that instant.
            """
            return _Schedules(*self._parts_of(transaction))

        def schedule_row(self, name: str, fsm: Any, when: Any, options: Mapping[str, Any]) -> _ScheduleRow:
            """Make the row of a schedule; raises what `Engine.schedule` does."""
            return self._describe(_text(name, "name"), _resolve(fsm), _plan(when, **options), is_from_code=False)

        def declared(self) -> tuple[list[tuple[_ScheduleRow, tuple[str, ...]]], Container[str]]:
            """List the schedules that the known classes declare, with these classes' aliases; and the known names."""
            known = self._behaviours.highest_by_name()
            rows = [
                (self._describe(spec.name, spec, spec.plan, is_from_code=True), spec.aliases)
                for name, spec in known.items()
                if spec.plan is not None and name == spec.name
            ]
            return rows, known

        def _describe(self, name: str, spec: _Spec, plan: _Plan, *, is_from_code: bool) -> _ScheduleRow:
            row = self._services.new_row(_make_insert(spec.cls, plan.insert))
            return _describe_schedule(name, spec, plan, row, is_from_code=is_from_code)

        def _parts_of(self, transaction: tools.Transaction) -> tuple[Any, Any]:
            """Make what a transaction, and its inserts, are to schedules and the history."""
            setup = types.SimpleNamespace(
                keeps_history=transaction.keeps_history, worker_id=transaction.worker, behaviours=self._behaviours
            )
            report = types.SimpleNamespace(
                left_schedules=types.SimpleNamespace(add=self._report_left),
                fired=types.SimpleNamespace(append=transaction.fired),
                tell=lambda name, measurements, metadata: None,
            )
            inserts = types.SimpleNamespace(write_one=transaction.insert, refuse_taken_key=transaction.refuse_taken_key)
            given = types.SimpleNamespace(has_fired=transaction.has_fired)
            parts = types.SimpleNamespace(
                setup=setup, report=report, given=given, store=transaction, now=transaction.now
            )
            return parts, inserts

        def _report_left(self, left: tuple[str, str]) -> None:
            if left not in self._reported:
                self._reported.add(left)
                _log.warning("the schedule %s is left to other engines: %s", *left)

        def _run(self, claim: _Claim, await_on_loop: Callable[[Coroutine[Any, Any, Any]], Any]) -> tools.Outcome | None:
            try:
                if claim.needs_migration:
                    claim.migrate()
                verdict = await_on_loop(self._run_async(claim)) if claim.is_async else _execute(claim)
                if isinstance(verdict, tools._Exit):
                    raise verdict.error
                with self._lock:
                    claim.is_finished = not claim.is_disowned
                if claim.is_disowned:
                    _log_late(claim.row, verdict)
                    return None
                return self._outcome(_commit_of(claim, verdict))
            except BaseException as error:  # noqa: BLE001 - SystemExit and the like out of a step: a crash of it
                return self._outcome(_crash(claim, error), None if isinstance(error, Exception) else error)

        async def _run_async(self, claim: _Claim) -> _Commit | BaseException | tools._Exit:
            import asyncio

            try:
                return await asyncio.wait_for(_execute_async(claim), claim.timeout_s)
            except TimeoutError:  # the step's own is returned
                return _timeout_error(claim)
            except asyncio.CancelledError as error:
                return error
            except BaseException as error:  # noqa: BLE001 - raised here it would end the loop, and not the step alone
                return tools._Exit(error)

        def _recover(self, claim: _Claim, error: BaseException) -> _Commit:
            try:
                return _recover(claim, error)
            except BaseException as crash:  # noqa: BLE001 - likewise, out of `handle`
                return _crash(claim, crash)

        def _note_progress(self, claim: _Claim) -> None:
            row = claim.row
            self._host.show_progress(row, _json(self._services.progress.pop((row.id, row.claim))))

        def _outcome(self, commit: _Commit, interrupt: BaseException | None = None) -> tools.Outcome:
            columns = tools._columns(commit.change)
            if commit.claim.is_migrated:
                columns = tools._as_it_stands(commit.migrated_row) | columns
            is_asking = isinstance(commit.change, _Advance) and commit.is_asking
            return tools.Outcome(
                commit.claim,
                commit.kind,
                columns,
                commit.effects,
                commit.shown,
                commit.children,
                commit.is_inline,
                is_asking,
                interrupt,
                commit,
            )

    @staticmethod
    def _columns(change: _Change) -> dict[str, Any]:
        """All columns that a change sets, also those which are only cleared."""
        columns = {**change._asdict(), "status": Status(change.status), "worker": None, "cancel_reason": None}
        if isinstance(change, _Advance):
            columns |= _CLEAN_SLATE
        elif isinstance(change, _End):
            columns |= {"progress": None} if change.status == Status.FAILED else _NOTHING_LEFT
        return columns

    @staticmethod
    def crashed(row: _Row, cause: str, now: int) -> dict[str, Any]:
        """Say what the columns of a row become whose process died, or its lease ran out: it runs again, or fails.

        Milliseconds since the epoch; `cause` is what its `last_error` begins with.
        """
        return tools._columns(_crashed(row, cause, now))

    @staticmethod
    def _as_it_stands(row: _Row) -> dict[str, Any]:
        """Return the columns that `migrate` brings to the version of the class."""
        return {"version": row.version, "step": row.step, "state": row.state, "max_attempts": row.max_attempts}

    @staticmethod
    def cancelled(row: _Row, reason: str) -> dict[str, Any]:
        """Say what the columns of a row become whose step has left, and that somebody has cancelled."""
        return tools._as_it_stands(row) | tools._columns(_failed(row, reason))

    @staticmethod
    def check_code(rows: Any) -> list[str]:
        """Hold `rows.live()`, (id, fsm, version, step, state) each, and `rows.schedule_rows()` against the code."""
        return _check_code(rows)

    @staticmethod
    def filters(**given: Any) -> dict[str, Any]:
        """Check what `find` is to look for: what is given, instants in milliseconds, `status` and `fsm` as JSON."""
        return _checked_filters(given)

    @staticmethod
    def record(kind: type[_Record], columns: Sequence[Any]) -> _Record:
        """Make an `Instance`, a `Signal`, or another of these records, of its columns in the order of its fields."""
        return cast(_Record, _maker_of(kind)(columns))

    class Checks:
        """Take a value and its name, and return the value as it is kept; a `ValueError` says what is allowed."""

        text = staticmethod(_text)
        boolean = staticmethod(_boolean)
        count = staticmethod(_count)
        duration_ms = staticmethod(_duration_ms)
        callback = staticmethod(_check_callback)

    await_future = staticmethod(_await_future)
    call_beside_loop = staticmethod(_call_beside_loop)
    end_tasks = staticmethod(_end_tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `durable ARGV…`, which is in the package `durable_tools`, and return its exit status."""
    import importlib

    try:
        command_line = importlib.import_module("durable_tools.cli")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("durable_tools"):
            raise
        print("durable: the command line is a package beside this module: pip install durable-fsm", file=sys.stderr)
        return 1
    return cast(int, command_line.main(argv))


if __name__ == "__main__":
    import durable  # once more, under its name: an FSM of `__main__` is none of `durable`, which users import

    sys.exit(durable.main())
