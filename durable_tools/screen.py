"""What the command line shows: text that steers no terminal, tables, bars, times as people say them."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import attrs
from apsw.unicode import text_width, text_width_substr

from durable import Status

# How a status looks in a bar, as a block and as a letter, from what is over to what is still to come.
BLOCKS = {
    Status.DONE: "█#",
    Status.FAILED: "▚x",
    Status.EXECUTING: "▓=",
    Status.AWAITING_CHILDREN: "▒~",
    Status.AWAITING_SIGNAL: "▒~",
    Status.RUNNABLE: "░.",
}
_COLOURS = dict(zip(BLOCKS, ("32", "31", "33", "35", "34", "36"), strict=True)) | {"bold": "1", "dim": "2"}


def plain(value: object) -> str:
    """`value` on one line, without anything that would steer a terminal."""
    text = "-" if value is None or value == "" else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """`text` in exactly `width` columns of a terminal, where a letter may take two."""
    if text_width(text) > width:
        text = text_width_substr(text, width - 1)[1] + "…"
    padding = " " * (width - text_width(text))
    return padding + text if right else text + padding


def _jsonable(value: object) -> object:
    """What JSON has no form for: an instant, as ISO text, or a record, as an object."""
    return value.isoformat() if isinstance(value, dt.datetime) else attrs.asdict(cast(Any, value), recurse=False)


class Screen(NamedTuple):
    """What can be shown where a verb writes."""

    live: bool  # a terminal that moves its cursor when told to
    colour: bool
    blocks: bool  # the encoding has block characters

    @classmethod
    def of_stdout(cls) -> Screen:
        """What standard output can show: plain lines, unless it is a terminal."""
        if sys.stdout is None:
            raise OSError("standard output is closed")
        live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        if live and os.name == "nt":
            os.system("")  # makes the Windows console understand escape sequences
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a letter that can't be shown is no reason to show nothing
        blocks = str(sys.stdout.encoding).lower().startswith("utf")
        return cls(live, live and not os.environ.get("NO_COLOR"), blocks)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines; a pipe takes lines of any length."""
        columns, lines = shutil.get_terminal_size()
        return (columns, lines) if self.live else (1_000_000, 1_000_000)

    def json(self, value: object, indent: int | None = None) -> str:
        """`value` as JSON text, in ASCII where some of it can't be written otherwise."""
        text = json.dumps(value, indent=indent, default=_jsonable, ensure_ascii=not self.blocks)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            return json.dumps(value, indent=indent, default=_jsonable)
        return text

    def answer(self, value: object, lines: Iterable[str], *, as_json: bool) -> None:
        """Print `value` for a program, or the `lines` that tell it to people."""
        print(self.json(value, indent=2) if as_json else "\n".join(lines), flush=True)

    def paint(self, text: str, style: str) -> str:
        """`text` in the colour of a status, bold or dim, if there are colours."""
        return f"\x1b[{_COLOURS[style]}m{text}\x1b[0m" if self.colour else text

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
        """`rows` under `head`, the widest columns cut to fit: numbers to the right, a status in its colour."""
        cells = [[plain(cell) for cell in row] for row in rows]
        widths = [max(map(text_width, column)) for column in zip(head, *cells, strict=True)]
        room = self.size[0] - 2 * (len(widths) - 1)
        while sum(widths) > room and max(widths) > 4:
            widths[widths.index(max(widths))] -= 1
        yield self.paint("  ".join(map(fit, head, widths)).rstrip(), "bold")
        for row, texts in zip(rows, cells, strict=True):
            line = []
            for cell, text, width in zip(row, texts, widths, strict=True):
                text = fit(text, width, right=isinstance(cell, int))
                line.append(self.paint(text, cell) if isinstance(cell, Status) else text)
            yield "  ".join(line).rstrip()

    def bar(self, tally: Mapping[str, int], width: int) -> str:
        """The statuses of `tally` as stretches of one bar; the smallest can still be seen."""
        total = sum(tally.values()) or 1
        cells = {status: max(bool(tally.get(status)), width * tally.get(status, 0) // total) for status in BLOCKS}
        cells[max(cells, key=cells.__getitem__)] += width - sum(cells.values())
        which = 0 if self.blocks else 1
        return "".join(self.paint(BLOCKS[status][which] * n, status) for status, n in cells.items() if n)


def now() -> dt.datetime:
    """This instant."""
    return dt.datetime.now(dt.UTC)


def span(seconds: float) -> str:
    """A length of time in its largest unit: `40 ms`, `3.2 s`, `12 min`, `5 h`, `9 d`."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.{seconds < 10 * size:d}f} {unit}".replace(".0 ", " ")
    return f"{seconds * 1000:.0f} ms"


def distance(instant: dt.datetime) -> str:
    """How far off `instant` is: `3 min ago`, `in 2 h`."""
    seconds = (instant - now()).total_seconds()
    return f"in {span(seconds)}" if seconds > 0 else f"{span(-seconds)} ago"


def moment(instant: dt.datetime) -> str:
    """`instant` on the reader's own clock, and how far off it is."""
    with contextlib.suppress(OverflowError, ValueError, OSError):  # the calendar's last hours are beyond it elsewhere
        instant = instant.astimezone()
    return f"{instant:%Y-%m-%d %H:%M:%S} ({distance(instant)})"


def ended(tally: Mapping[str, int]) -> int:
    """How many of those that were counted by status have ended."""
    return tally.get(Status.DONE, 0) + tally.get(Status.FAILED, 0)
