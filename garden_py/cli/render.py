"""What the command line prints: tables for people, JSON with the protocol's field names for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

from garden_py.cli.parse import CPU_PERIOD_US, SWAP_UNLIMITED, format_rlimits, format_size
from garden_py.cli.printable import plain

if TYPE_CHECKING:
    from garden_py.client import Limits


class OutputFormat(StrEnum):
    """Values of `-o`."""

    TABLE = "table"
    JSON = "json"


def jsonable(value: Any) -> Any:
    """A client value as JSON knows it.

    Dataclasses become objects under the field names of `garden.proto`, enums their names, moments RFC 3339 in
    UTC, time spans seconds as a number, bytes text with undecodable bytes replaced.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: jsonable(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, Mapping):
        return {str(key): jsonable(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(each) for each in value]
    return value


def print_json(value: Any) -> None:
    """One JSON document, indented."""
    sys.stdout.write(json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def print_json_line(value: Any) -> None:
    """One JSON document on one line, at once: the reader may be a program that waits for it."""
    sys.stdout.write(json.dumps(jsonable(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def table_lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell, two spaces apart, no trailing spaces."""
    cells = [list(headings), *[[plain(cell) or "-" for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, its heading bold on a terminal."""
    heading, *lines = table_lines(headings, rows)
    if sys.stdout.isatty():
        heading = f"\x1b[1m{heading}\x1b[0m"
    sys.stdout.write("\n".join([heading, *lines]) + "\n")


def print_fields(fields: Mapping[str, str]) -> None:
    """One `name  value` per line; empty values are left out."""
    shown = {name: text for name, text in fields.items() if text}
    width = max(map(len, shown), default=0)
    sys.stdout.write("".join(f"{name.ljust(width)}  {plain(text)}\n" for name, text in shown.items()))


def limits_text(limits: Limits) -> str:
    """The limits that are set, in words."""
    parts = {
        "memory": "" if not limits.memory_bytes else format_size(limits.memory_bytes),
        "swap": _swap_text(limits.swap_bytes),
        "cpu weight": "" if limits.cpu_weight is None else str(limits.cpu_weight),
        "cpu quota": "" if not limits.cpu_quota_us else f"{limits.cpu_quota_us} µs",
        "cpu period": "" if not limits.cpu_quota_us else f"{limits.cpu_period_us or CPU_PERIOD_US} µs",
        "pids": "" if not limits.pids else str(limits.pids),
        "disk": "" if not limits.disk_bytes else format_size(limits.disk_bytes) + _scope_text(limits),
        "inodes": "" if not limits.disk_inodes else str(limits.disk_inodes),
        "bandwidth in": _rate_text(limits.network_rx_bytes_per_s, None),
        "bandwidth out": _rate_text(limits.network_tx_bytes_per_s, None),
        "io weight": "" if not limits.io_weight else str(limits.io_weight),
        "reads": _rate_text(limits.io_read_bytes_per_s, limits.io_read_ops_per_s),
        "writes": _rate_text(limits.io_write_bytes_per_s, limits.io_write_ops_per_s),
        "rlimits": format_rlimits(limits.rlimits),
    }
    return ", ".join(f"{name} {text}" for name, text in parts.items() if text) or "none"


def _swap_text(swap_bytes: int | None) -> str:
    return "unlimited" if swap_bytes == SWAP_UNLIMITED else format_size(swap_bytes) if swap_bytes else ""


def _rate_text(bytes_per_s: int | None, ops_per_s: int | None) -> str:
    parts = [f"{format_size(bytes_per_s)}/s" if bytes_per_s else "", f"{ops_per_s}/s" if ops_per_s else ""]
    return " and ".join(filter(None, parts))


def _scope_text(limits: Limits) -> str:
    return " with the image" if limits.disk_scope else ""


def note(message: str) -> None:
    """A remark on stderr that is not an error."""
    sys.stderr.write(f"garden: {message}\n")
    sys.stderr.flush()
