"""The data files of vendor/runc-config, read once."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[3] / "vendor" / "runc-config"
_INSTALLED = Path(sys.prefix) / "share" / "garden-py" / "runc-config"


@dataclass(frozen=True, slots=True)
class RuncConfigData:
    """Parsed contents of vendor/runc-config; treat as read-only."""

    unprivileged: dict[str, Any]
    privileged: dict[str, Any]
    seccomp: dict[str, Any]
    capabilities: dict[str, list[str]]

    def capability_mask(self, kind: str) -> int:
        """The bit mask of the capability set called kind."""
        numbers = self.capabilities["numbers"]
        return sum(1 << numbers.index(name) for name in self.capabilities[kind])

    def capability_names(self, mask: int) -> list[str]:
        """Names of the capabilities in mask, without bits newer than our table."""
        return [name for number, name in enumerate(self.capabilities["numbers"]) if mask & 1 << number]


@cache
def load_runc_config() -> RuncConfigData:
    """Read the data files, from the checkout or from where the package was installed."""
    directory = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED

    def read(name: str) -> Any:
        return json.loads((directory / name).read_text())

    return RuncConfigData(
        unprivileged=read("config.json"),
        privileged=read("config-privileged.json"),
        seccomp=read("seccomp.json"),
        capabilities=read("capabilities.json"),
    )
