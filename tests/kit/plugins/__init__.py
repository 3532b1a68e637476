"""External programs for tests: an image plugin and a network plugin that do what they say, and can be told to fail.

Each is installed into a directory of its own, with `calls.jsonl`, a line for each call, and `orders/ACTION`, files that
change what an action does: `fail`, `hang`, `garbage`, `flood`, or a Python expression that is merged into its answer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class InstalledPlugin:
    """A plugin in a directory."""

    place: Path

    @property
    def program(self) -> str:
        return str(self.place / "plugin")

    def calls(self, action: str = "") -> list[dict[str, Any]]:
        """What it was asked, oldest first; action: only such calls."""
        log = self.place / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if not action or call["action"] == action]

    def order(self, action: str, what: str) -> None:
        """Change what an action does from now on; empty: as at first."""
        path = self.place / "orders" / action
        if what:
            path.write_text(what)
        else:
            path.unlink(missing_ok=True)

    def roots(self) -> list[str]:
        """Ids of what an image plugin has in its store."""
        store = self.place / "store"
        return sorted(os.listdir(store)) if store.exists() else []

    def pids(self) -> list[int]:
        """Of calls that run."""
        return [int(path.name) for path in (self.place / "running").iterdir()]


def install(name: str, place: Path, **settings: Any) -> InstalledPlugin:
    """Install the plugin of a module here; settings: for it, as JSON."""
    for directory in (place, place / "orders", place / "running"):
        directory.mkdir(parents=True, exist_ok=True)
    place.chmod(0o755)
    shutil.copy(_HERE / "program.py", place / "program.py")
    (place / "settings.json").write_text(json.dumps(settings))
    program = place / "plugin"
    program.write_text(f"#!{sys.executable}\n" + (_HERE / f"{name}.py").read_text())
    program.chmod(0o755)
    return InstalledPlugin(place)
