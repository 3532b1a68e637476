"""Method and path to a route. Source: Garden HTTP protocol §1.1 and §3; the first match wins."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote_plus

# In the order of the protocol's table. The name is the method of handlers.py that answers.
_TABLE = """
GET    /ping                                                           ping
GET    /capacity                                                       capacity
GET    /containers                                                     list_containers
POST   /containers                                                     create
GET    /containers/:handle/info                                        info
GET    /containers/bulk_info                                           bulk_info
GET    /containers/bulk_metrics                                        bulk_metrics
DELETE /containers/:handle                                             destroy
PUT    /containers/:handle/stop                                        stop
PUT    /containers/:handle/files                                       stream_in
GET    /containers/:handle/files                                       stream_out
GET    /containers/:handle/limits/bandwidth                            bandwidth_limits
GET    /containers/:handle/limits/cpu                                  cpu_limits
GET    /containers/:handle/limits/disk                                 disk_limits
GET    /containers/:handle/limits/memory                               memory_limits
POST   /containers/:handle/net/in                                      net_in
POST   /containers/:handle/net/out                                     net_out
POST   /containers/:handle/net/out/bulk                                bulk_net_out
GET    /containers/:handle/processes/:pid/attaches/:streamid/stdout    stdout
GET    /containers/:handle/processes/:pid/attaches/:streamid/stderr    stderr
POST   /containers/:handle/processes                                   run
GET    /containers/:handle/processes/:pid                              attach
PUT    /containers/:handle/grace_time                                  set_grace_time
GET    /containers/:handle/properties                                  properties
GET    /containers/:handle/properties/:key                             property
PUT    /containers/:handle/properties/:key                             set_property
DELETE /containers/:handle/properties/:key                             remove_property
GET    /containers/:handle/metrics                                     metrics
"""
_ROUTES = [(method, path.split("/"), name) for method, path, name in map(str.split, _TABLE.split("\n")[1:-1])]
NAMES = frozenset(name for _, _, name in _ROUTES)


@dataclass(frozen=True, slots=True)
class Match:
    """A route that answers.

    Attributes:
        captures: values of the path's variables, unescaped.
        query: first value of each key, unescaped.
    """

    name: str
    captures: dict[str, str]
    query: dict[str, str]


@dataclass(frozen=True, slots=True)
class NoMatch:
    """No route has this path and method; `allowed` are the methods of those that have the path."""

    allowed: tuple[str, ...] = ()


_ABSOLUTE: Final = re.compile(r"^https?://[^/?]*", re.IGNORECASE | re.ASCII)  # RFC 9112 §3.2.2


def match_route(method: str, target: str) -> Match | NoMatch:
    """The route of a request line's method and target (path and query, as sent)."""
    path, _, query = _ABSOLUTE.sub("", target).partition("?")
    segments = path.split("/")
    allowed: list[str] = []
    for route_method, pattern, name in _ROUTES:
        captures = _capture(pattern, segments)
        if captures is None:
            continue
        if route_method == method:
            return Match(name, captures, _parse_query(query))
        allowed.append(route_method)
    return NoMatch(tuple(dict.fromkeys(allowed)))


def _capture(pattern: list[str], segments: list[str]) -> dict[str, str] | None:
    """The variables' values; None if the path is another one. A variable is one segment, never an empty one."""
    if len(pattern) != len(segments):
        return None
    found: dict[str, str] = {}
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted.startswith(":"):
            if not segment:
                return None
            found[wanted[1:]] = unquote_plus(segment)
        elif wanted != segment:
            return None
    return found


def _parse_query(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        found.setdefault(key, value)
    return found
