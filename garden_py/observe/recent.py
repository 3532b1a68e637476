"""The latest log lines about each container, for who diagnoses it."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import MutableMapping
from typing import Any

_LINES_PER_HANDLE = 64
_HANDLES_MAX = 1000


class RecentLines:
    """A structlog processor that changes nothing and remembers what names a handle, the latest of each.

    It comes behind the level's filter: what is not logged is not remembered either.
    """

    def __init__(self) -> None:
        self._by_handle: OrderedDict[str, deque[dict[str, Any]]] = OrderedDict()

    def __call__(self, logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """See structlog's processors."""
        handle = line.get("handle")
        if isinstance(handle, str):
            # A traceback would keep every local variable of its frames.
            kept = {name: value for name, value in line.items() if name not in ("exc_info", "exception")}
            self._by_handle.setdefault(handle, deque(maxlen=_LINES_PER_HANDLE)).append(kept)
            self._by_handle.move_to_end(handle)
            if len(self._by_handle) > _HANDLES_MAX:
                self._by_handle.popitem(last=False)
        return line

    def about(self, handle: str) -> str:
        """The lines about a container as JSON, one a line, the oldest first."""
        return "".join(f"{json.dumps(line, default=str)}\n" for line in self._by_handle.get(handle, ()))


RECENT = RecentLines()
"""Of this process, as its log is."""
