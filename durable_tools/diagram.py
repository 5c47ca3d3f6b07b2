"""A machine as a diagram: its steps and what leads from one to another, by its classes' text and by what was seen."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from durable import DurableError, tools
from durable_tools.texts import edges

COMPUTED = "?"
"""The step of a name that is computed."""
IN_ANY_STEP = "handle"
"""What stands for `handle`, which an error in any step may come to."""

# What the history calls the outcomes that stand in a class's text; a retry leads back to where it came from.
_OUTCOMES = {
    "next": "Next",
    "retry": "Retry",
    "await": "Await",
    "children": "ScheduleChildren",
    "done": "Done",
    "stop": "Stop",
}
_SEEN = """
SELECT step, kind, "to", count(*) FROM durable_transitions
WHERE instance IN (SELECT value FROM json_each(?)) GROUP BY step, kind, "to"
"""
_SEEN_OF_CLASS = """
SELECT t.step, t.kind, t."to", count(*) FROM durable_transitions t JOIN durable_instances i ON i.id = t.instance
WHERE i.fsm IN (SELECT value FROM json_each(?)) AND i.version = ? GROUP BY t.step, t.kind, t."to"
"""
_STANDING = """
SELECT step, count(*) FROM durable_instances
WHERE fsm IN (SELECT value FROM json_each(?)) AND version = ?
    AND (status = 'runnable' OR status = 'executing' OR status = 'awaiting_signal' OR status = 'awaiting_children')
GROUP BY step
"""


class Arrow(NamedTuple):
    """What leads from a step to another, or to an end, which is None; `seen` is how often, None if nobody counted."""

    step: str
    outcome: str
    to: str | None
    seen: int | None = None
    is_in_text: bool = True


class Machine(NamedTuple):
    """The steps of a class and what leads from one to another, in the order in which they are met."""

    name: str
    version: int
    initial: str | None
    arrows: tuple[Arrow, ...]
    own_steps: tuple[str, ...] = ()
    standing: Mapping[str, int] | None = None
    """How many live instances stand at each step."""

    @property
    def steps(self) -> list[str]:
        """All steps: those of the class, and others that arrows name."""
        ends = [end for arrow in self.arrows for end in (arrow.step, arrow.to) if end is not None]
        first = [] if self.initial is None else [self.initial]
        return list(dict.fromkeys([*first, *self.own_steps, *ends, *(self.standing or ())]))

    def with_seen(self, seen: Iterable[tuple[str, str, str | None, int]]) -> Machine:
        """Add how often each arrow was taken, and arrows that the text does not show."""
        counted: collections.Counter[tuple[str, str, str | None]] = collections.Counter()
        for step, kind, to, count in seen:
            if kind != "rewind":  # which leads anywhere
                is_in_place = kind in ("retry", "crash")
                counted[step, _OUTCOMES.get(kind, kind), step if is_in_place else to] += count
        shown = [arrow._replace(seen=counted.pop(arrow[:3], 0)) for arrow in self.arrows]
        unshown = [Arrow(*key, seen=count, is_in_text=False) for key, count in sorted(counted.items(), key=repr)]
        return self._replace(arrows=(*shown, *unshown))

    def mermaid(self) -> str:
        """The diagram as Mermaid's text."""
        ids = dict(zip(self.steps, _ids(self.steps), strict=True))
        return "\n".join(
            [
                "stateDiagram-v2",
                f"    %% {_shown(self.name)}, version {self.version}",
                *(f"    {line}" for line in self._lines(ids)),
            ]
        )

    def _lines(self, ids: Mapping[str, str]) -> Iterator[str]:
        for step, name in ids.items():
            here = (self.standing or {}).get(step)
            text = "handle, after an error in any step" if step == IN_ANY_STEP else step
            label = f"{_shown(text)}: {here:,} here" if here else _shown(text)
            if label != name:
                yield f'state "{label}" as {name}'
        if self.initial is not None:
            yield f"[*] --> {ids[self.initial]}"
        for arrow in self.arrows:
            end = "[*]" if arrow.to is None else ids[arrow.to]
            count = "" if arrow.seen is None else f" ({arrow.seen:,})"
            yield f"{ids[arrow.step]} --> {end} : {_shown(arrow.outcome)}{count}"


# Names that mean something else to Mermaid where a state's stands.
_RESERVED = (
    *("accDescr", "accTitle", "as", "class", "classDef", "click", "default", "direction", "end", "hide", "href"),
    *("note", "root", "scale", "state", "style"),
)


def _ids(steps: Iterable[str]) -> Iterator[str]:
    """Name each step as Mermaid can: as it is, where that is a plain word."""
    for number, step in enumerate(steps):
        is_plain = re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", step) and step not in _RESERVED
        yield step if is_plain and not re.fullmatch("s[0-9]+", step) else f"s{number}"


def _shown(text: str) -> str:
    """`text` as Mermaid shows it: codes for letters that it would read, blanks for what can't be shown."""
    special = {letter: f"#{ord(letter)};" for letter in '"#:;<>\\%{}[]`&'}
    return "".join(special.get(letter, letter if letter.isprintable() else " ") for letter in text)


def machine_of(name: str, version: int) -> Machine | None:
    """Read a class that is known here for its diagram; None where it is not."""
    spec = tools.registry.get((name, version))
    if spec is None:
        return None
    arrows = [Arrow(IN_ANY_STEP if edge.step is None else edge.step, edge.outcome, edge.to) for edge in edges(spec)]
    if spec.is_job:
        arrows = [*_ways_of_a_job(spec.initial), *arrows]
    steps = tuple(spec.steps)
    return Machine(spec.name, spec.version, spec.initial, tuple(dict.fromkeys(arrows)), steps)


def _ways_of_a_job(step: str) -> Iterator[Arrow]:
    """What no outcome has to say: a job is done when it returns, and is tried again when it raises, until it fails."""
    yield Arrow(step, "Done", None)
    yield Arrow(step, "Retry", step)
    yield Arrow(step, "Stop", None)


def machine_seen(name: str, version: int) -> Machine:
    """The diagram of a class that is not known here, to which what was seen is to be added."""
    return Machine(name, version, None, ())


def seen_of(reader: tools.Reader, instances: Iterable[int]) -> list[tuple[str, str, str | None, int]]:
    """Count what the histories of some instances show."""
    return reader.rows(_SEEN, (json_of(instances),))


def counted(machine: Machine, reader: tools.Reader) -> Machine:
    """Add what the whole file shows of a machine: how often each arrow was taken, and how many stand at each step."""
    spec = tools.registry.get((machine.name, machine.version))
    names = json_of([machine.name] if spec is None else spec.names)
    standing = dict(reader.rows(_STANDING, (names, machine.version)))
    return machine.with_seen(reader.rows(_SEEN_OF_CLASS, (names, machine.version)))._replace(standing=standing)


def json_of(values: Iterable[object]) -> str:
    """Write several values for `json_each`."""
    import json

    return json.dumps(list(values))


def known_machine(cls: object) -> Machine:
    """The diagram of a class or a function job."""
    fsm = cls if isinstance(cls, type) else getattr(cls, "fsm", None)
    for (name, version), spec in tools.registry.items():
        if spec.cls is fsm and name == spec.name:
            machine = machine_of(name, version)
            assert machine is not None
            return machine
    raise DurableError(f"{cls!r} is no machine and no job: name a class or a function job")
