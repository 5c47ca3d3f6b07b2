"""What the text of a class says of its steps: which outcomes lead from one to another."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

from durable import tools


class Edge(NamedTuple):
    """An outcome that the text of a class shows: in which step it stands, and to which it leads."""

    step: str | None
    """"?" for code that stands in no step that can be told, None for `handle`, which any step may come to."""
    outcome: str
    """"Next", "Retry", "Await", "ScheduleChildren", "Done" or "Stop"."""
    to: str | None
    """"?" for a name that is computed and for the step that failed, None at an end."""
    line: int
    """Where it stands in the file of the class."""


def _quoted(node: Any) -> list[Any]:
    """List the texts that stand in quotes in a piece of text."""
    return [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]


class _TextReader:
    """Reads the text of a class for the outcomes that stand in it; nothing of it is run."""

    _ENDS = ("Done", "Stop")
    _TARGETS: ClassVar = {"Next": 0, "Await": 1, "ScheduleChildren": 1}
    """Position of the step among the arguments."""

    def __init__(self, cls: type, steps: Collection[str]) -> None:
        self._cls = cls
        self._steps = steps
        self._seen: set[tuple[str | None, str]] = set()

    def edges(self, step: str | None, method: str) -> Iterator[Edge]:
        """Yield the outcomes of a method that a step runs, and those of the methods that it calls on itself."""
        function = getattr(self._cls, method)
        function = inspect.unwrap(getattr(function, "_function", function))
        if (step, method) in self._seen or getattr(function, "__module__", None) == "durable":
            return
        self._seen.add((step, method))
        try:
            lines, first = inspect.getsourcelines(function)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):  # a class without a source, as one typed at a prompt
            return
        parameters = list(inspect.signature(function).parameters)
        for edge in self._within(tree, step, parameters[1] if method == "step" else None):
            yield edge._replace(line=first + edge.line - 1)

    def _within(self, node: Any, step: str | None, parameter: str | None) -> Iterator[Edge]:
        """Yield the outcomes in a piece of text; where it asks the parameter, by the names that this is."""
        for names, inner in self._branches(node, step, parameter):
            for name, one in itertools.product(names, inner):
                if isinstance(one, ast.Call):
                    yield from self._of_call(one, name)
                yield from self._within(one, name, parameter)

    def _branches(self, node: Any, step: str | None, parameter: str | None) -> Iterator[tuple[list[Any], list[Any]]]:
        """Take a piece of text apart: under which steps' names each part of it runs."""
        if isinstance(node, ast.Match) and getattr(node.subject, "id", "") == parameter:
            for case in node.cases:
                yield _quoted(case.pattern) or [step], case.body
        elif isinstance(node, ast.If) and self._asks(node.test, parameter):
            yield _quoted(node.test) or [step], node.body
            yield [step], node.orelse
        else:
            yield [step], list(ast.iter_child_nodes(node))

    @staticmethod
    def _asks(test: Any, parameter: str | None) -> bool:
        """Whether a condition asks if the parameter is a name, on whichever side that stands, or one of several."""
        if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq | ast.In):
            return False
        asked = [test.left, test.comparators[0]] if isinstance(test.ops[0], ast.Eq) else [test.left]
        return any(getattr(one, "id", "") == parameter for one in asked)

    def _of_call(self, call: Any, step: str | None) -> Iterator[Edge]:
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        is_own = getattr(getattr(call.func, "value", None), "id", "") == "self"
        if is_own and inspect.isfunction(getattr(self._cls, name, None)):
            yield from (edge._replace(line=call.lineno) for edge in self.edges(step, name))
        elif name in self._ENDS:
            yield Edge(step, name, None, call.lineno)
        elif name == "Retry":
            yield Edge(step, name, "?" if step is None else step, call.lineno)  # `handle`'s: whichever failed
        elif name in self._TARGETS:
            named = [one.value for one in call.keywords if one.arg in ("step", "then")]
            given = [*call.args[self._TARGETS[name] :], *named][:1]
            for to in itertools.chain.from_iterable(map(self._targets, given)):
                yield Edge(step, name, to, call.lineno)

    def _targets(self, given: Any) -> list[str]:
        """Return the steps that an argument means: a text in quotes, a `@step` method, or one of two of these."""
        if isinstance(given, ast.IfExp):
            return self._targets(given.body) + self._targets(given.orelse)
        if isinstance(given, ast.Attribute) and given.attr in self._steps:
            return [given.attr]
        return _quoted(given) if isinstance(given, ast.Constant) else ["?"]


def edges(spec: Any) -> list[Edge]:
    """Read which outcomes lead from which step of a class, one of `tools.registry`, to which; nothing of it is run.

    A step's outcomes are also those of the methods that it calls on `self`. In the order of the text; a class without a
    source, as one typed at a prompt, has none.
    """
    is_one_for_all = spec.any_step is not None
    reader = _TextReader(spec.cls, () if is_one_for_all else spec.steps)
    methods = [("?", "step")] if is_one_for_all else [(name, name) for name in spec.steps]
    found = [reader.edges(step, method) for step, method in (*methods, (None, "handle"))]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def misspelt() -> Iterator[str]:
    """Look for steps that the texts of the classes known here name and the classes do not have: a line each."""
    for spec in {id(spec): spec for spec in tools.registry.values()}.values():
        if spec.any_step is None and not spec.is_job:
            for edge in edges(spec):
                if edge.to not in (*spec.steps, "?", None):
                    where = "handle" if edge.step is None else f"step {edge.step!r}"
                    known = ", ".join(map(repr, spec.steps))
                    file = os.path.basename(inspect.getsourcefile(spec.cls) or "")
                    yield (
                        f"{spec.name}: {where} goes on with {edge.to!r} ({file}, line {edge.line}),"
                        f" which is none of its steps {known}"
                    )
