"""JSON forms of the model's values, for the journal. Pydantic walks them; the model's rules are not re-checked.

Passwords are left out: nothing writes them down.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from garden_py.model.process import ExitStatus, ProcessSpec
from garden_py.model.spec import ContainerSpec

_CONTAINER = TypeAdapter(ContainerSpec)
_PROCESS = TypeAdapter(ProcessSpec)
_EXIT = TypeAdapter(ExitStatus)


def dump_container_spec(spec: ContainerSpec) -> dict[str, Any]:
    """A spec as JSON values; `load_container_spec` is the inverse."""
    dumped: dict[str, Any] = _CONTAINER.dump_python(spec, mode="json", exclude={"image_auth"})
    return dumped


def load_container_spec(value: dict[str, Any]) -> ContainerSpec:
    """Rebuild a spec from its JSON values."""
    return _CONTAINER.validate_python(value)


def dump_process_spec(spec: ProcessSpec) -> dict[str, Any]:
    """A spec as JSON values; `load_process_spec` is the inverse."""
    dumped: dict[str, Any] = _PROCESS.dump_python(spec, mode="json", exclude={"sidecar": {"image_auth"}})
    return dumped


def load_process_spec(value: dict[str, Any]) -> ProcessSpec:
    """Rebuild a spec from its JSON values."""
    return _PROCESS.validate_python(value)


def dump_exit(status: ExitStatus) -> dict[str, Any]:
    """An exit status as JSON values; `load_exit` is the inverse."""
    dumped: dict[str, Any] = _EXIT.dump_python(status, mode="json")
    return dumped


def load_exit(value: dict[str, Any]) -> ExitStatus:
    """Rebuild an exit status from its JSON values."""
    return _EXIT.validate_python(value)
