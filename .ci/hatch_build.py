"""Give the wheel its stub package: the module itself, under the name by which type checkers find it."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubPackage(BuildHookInterface[Any]):
    """Put a copy of durable.py into the wheel as durable-stubs/__init__.pyi.

    The copy is made outside the checkout, because Hatchling moves a file of the checkout that it is told to
    include elsewhere: the wheel would have the stub and no module.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the copy before the wheel is put together."""
        if version == "editable":  # its module changes, and a copy would not
            return
        self._folder = tempfile.TemporaryDirectory()
        stub = shutil.copy(Path(self.root, "durable.py"), self._folder.name)
        build_data["force_include"][stub] = "durable-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copy."""
        if version != "editable":
            self._folder.cleanup()
