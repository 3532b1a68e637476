"""A web server on loopback that has layers: with passwords, redirections, and answers that go wrong."""

from __future__ import annotations

import base64
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass
class Answer:
    """What is under one path.

    Attributes:
        location: it is redirected there.
        password: USER:PASSWORD that it asks for.
        cut_at: bytes after which the connection breaks off.
        chunked: the length is not told.
        before_body: called when the head has been sent.
    """

    body: bytes = b""
    status: int = 200
    location: str = ""
    password: str = ""
    cut_at: int | None = None
    chunked: bool = False
    before_body: Callable[[], object] = field(default=lambda: None)


class LayerHost:
    """Serves `answers` by path; a query does not matter.

    Args:
        certificate: and key, for TLS.

    Attributes:
        asked: path and query of each request so far.
        passwords: what each was sent with; empty for none.
    """

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        host = self
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.passwords: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.asked.append(self.path)
                sent = self.headers.get("Authorization", "")
                host.passwords.append(base64.b64decode(sent.partition(" ")[2]).decode())
                answer = host.answers.get(self.path.partition("?")[0], Answer(status=404))
                if answer.password and answer.password != host.passwords[-1]:
                    answer = Answer(status=401)
                self.send_response(answer.status)
                if answer.location:
                    self.send_header("Location", answer.location)
                if answer.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                answer.before_body()
                body = answer.body[: answer.cut_at]
                if answer.chunked:
                    body = b"%x\r\n%s\r\n" % (len(body), body) + (b"" if answer.cut_at else b"0\r\n\r\n")
                self.wfile.write(body)
                self.close_connection = answer.cut_at is not None

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self._server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def put(self, path: str, answer: Answer | bytes) -> str:
        """Put something under a path; its URL."""
        self.answers[path] = Answer(answer) if isinstance(answer, bytes) else answer
        return f"{self.scheme}://{self.host}{path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
