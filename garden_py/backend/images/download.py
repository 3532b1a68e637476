"""One download over HTTP, as a process of its own: `python -m garden_py.backend.images.download FD`.

    server                                  downloader
      │  stdin: {"url": …, …}                    │
      ├─────────────────────────────────────────▶│  GET, redirections followed
      │  stdout: {"size": bytes, or null}        │
      │◀─────────────────────────────────────────┤
      │  descriptor FD: the body                 │
      │◀─────────────────────────────────────────┤
      │  {"failed": {"kind": …, "message": …}}   │  at any time, and the end
      │◀─────────────────────────────────────────┤

The request: `url`, `username` and `password` (for the URL's host alone; empty: none), `ca` (a PEM file that its
certificate must chain to; empty: as the host trusts), `insecure` (any certificate will do), `stall_s`. Kinds of
failures are those of puller.py. What the body is worth, its reader knows by its digest.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from typing import IO, Any, Final
from urllib.parse import urlsplit

from garden_py.backend.host import syscalls
from garden_py.backend.images.tasks import read_task

_READ_BYTES: Final = 256 << 10
_DENIED: Final = (401, 403, 407)
_MISSING: Final = (404, 410)


class _Failed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows them, but from TLS to plain text."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise _Failed("unreachable", f"it is redirected from https to {shown(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Proxies(urllib.request.ProxyHandler):
    """Those of the environment, as skopeo takes them: never for this host itself."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        host = urlsplit(req.full_url).hostname or ""
        if host == "localhost" or host == "::1" or host.startswith("127."):
            return None
        return super().proxy_open(req, proxy, type)


def shown(url: str) -> str:
    """A URL without its query, which may be a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _opener(request: dict[str, Any]) -> urllib.request.OpenerDirector:
    """Of http and https alone."""
    context = ssl.create_default_context(cafile=request["ca"] or None)
    if request["insecure"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Proxies(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=context),
        _Redirections(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _open(request: dict[str, Any]) -> http.client.HTTPResponse:
    wanted = urllib.request.Request(  # noqa: S310 - of http and https, to an opener that knows nothing else
        request["url"], headers={"User-Agent": "garden-py"}
    )
    if request["username"] or request["password"]:
        pair = base64.b64encode(f"{request['username']}:{request['password']}".encode()).decode()
        wanted.add_unredirected_header(
            "Authorization", f"Basic {pair}"
        )  # wherever it is sent on to, is another's
    try:
        answer = _opener(request).open(wanted, timeout=request["stall_s"])
    except urllib.error.HTTPError as error:
        kind = "denied" if error.code in _DENIED else "missing" if error.code in _MISSING else "unreachable"
        raise _Failed(kind, f"{error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Failed("unreachable", str(error.reason)) from error
    if answer is None:
        raise _Failed("unreachable", "it is redirected to what is neither http nor https")
    found: http.client.HTTPResponse = answer
    return found


def _copy(answer: http.client.HTTPResponse, target_fd: int) -> None:
    size, done = answer.length, 0
    while data := answer.read(_READ_BYTES):
        done += len(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(target_fd, rest) :]
    if size is not None and done != size:
        raise _Failed("unreachable", f"the connection ended after {done} of {size} bytes")


def _say(value: dict[str, Any]) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def main() -> None:
    """Serve one request."""
    syscalls.die_with_parent()
    target_fd = int(sys.argv[1])
    request = read_task(sys.stdin)
    if request is None:
        return
    try:
        try:
            with _open(request) as answer:
                _say({"size": answer.length})
                _copy(answer, target_fd)
        except BrokenPipeError:
            return  # whoever wanted it has seen enough
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Failed("unreachable", f"{type(error).__name__}: {error}") from error
    except _Failed as failure:
        _say({"failed": {"kind": failure.kind, "message": f"the layer {shown(request['url'])}: {failure}"}})


if __name__ == "__main__":
    main()
