"""A real registry on loopback, Debian's docker-registry: open or with passwords (Basic, Bearer), plain or with TLS."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

START_TIMEOUT_S = 20
_ISSUER, _SERVICE = "garden-test-issuer", "garden-test"


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _openssl(*argv: str, data: bytes | None = None) -> bytes:
    return subprocess.run(["openssl", *argv], input=data, check=True, capture_output=True).stdout


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    _openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=garden-test",
        "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
    )  # fmt: skip
    return certificate, key


class Registry:
    """One registry. `host` is what references and settings call it.

    Args:
        directory: for its files.
        users: names and passwords; with any it asks for one.
        challenge: how it asks: Basic, or Bearer, for which a token server is started too.
        tls: it speaks TLS, with the certificate `certificate`.

    Attributes:
        small: what stands in the log for the fetch of a blob that a test watches.
    """

    def __init__(
        self,
        directory: Path,
        users: dict[str, str] | None = None,
        *,
        challenge: Literal["basic", "bearer"] = "basic",
        tls: bool = False,
    ) -> None:
        self.directory = directory
        self.users = users or {}
        self.port = free_port()
        self.small = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._tokens: _TokenServer | None = None
        directory.mkdir(parents=True)
        self._log = directory / "log"
        config: dict[str, Any] = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": f"{directory}/data"}, "delete": {"enabled": True}},
            "http": {"addr": self.host, "net": "tcp"},
            "log": {"level": "info"},
        }
        self.tls = tls
        if tls or challenge == "bearer":
            self.certificate, key = make_certificate(directory)
            if tls:
                config["http"]["tls"] = {"certificate": str(self.certificate), "key": str(key)}
        if self.users and challenge == "bearer":
            self._tokens = _TokenServer(self.users, self.certificate, key)
            config["auth"] = {
                "token": {
                    "realm": f"http://127.0.0.1:{self._tokens.port}/token",
                    "service": _SERVICE,
                    "issuer": _ISSUER,
                    "rootcertbundle": str(self.certificate),
                }
            }
        elif self.users:
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self._passwords())}}
        (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def _passwords(self) -> Path:
        file = self.directory / "htpasswd"
        file.touch()
        for name, password in self.users.items():
            argv = ["htpasswd", "-Bi", str(file), name]
            subprocess.run(argv, input=password.encode(), check=True, capture_output=True)
        return file

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert shutil.which("docker-registry"), "scripts/setup --tests installs docker-registry"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(self.directory / "config.yml")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the registry did not start: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it; twice is fine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None

    def fill(self, source: str, name: str, *options: str) -> str:
        """Copy an image into it with skopeo; the reference to it."""
        creds = [f"--dest-creds={':'.join(next(iter(self.users.items())))}"] if self.users else []
        argv = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *creds, *options]
        argv += [source.replace("://", ":", 1), f"docker://{self.host}/{name}"]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return f"docker://{self.host}/{name}"

    def asked(self) -> str:
        """Its log, in which each request is a line."""
        return self._log.read_text()

    def count(self, what: str) -> int:
        """How many lines of the log hold a text."""
        return sum(what in line for line in self.asked().splitlines())


class _TokenServer:
    """Gives tokens to who has a password. Source: distribution's auth/token.md and jwt.md."""

    def __init__(self, users: dict[str, str], certificate: Path, key: Path) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                user = server._user_of(self.headers.get("Authorization", ""))
                if user is None:
                    self.send_error(401)
                    return
                body = json.dumps({"token": server._token(user, query.get("scope", []))}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._users, self._key = users, key
        der = _openssl("x509", "-in", str(certificate), "-outform", "DER")
        self._chain = [base64.b64encode(der).decode()]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _user_of(self, authorization: str) -> str | None:
        """Who asks: "" nobody in particular, None one with a wrong password."""
        if not authorization:
            return ""
        name, _, password = base64.b64decode(authorization.partition(" ")[2]).decode().partition(":")
        return name if self._users.get(name) == password else None

    def _token(self, user: str, scopes: list[str]) -> str:
        access = []
        for scope in scopes if user else []:
            kind, name, actions = scope.split(":", 2)
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        claims = {
            "iss": _ISSUER, "sub": user, "aud": _SERVICE, "exp": now + 600, "nbf": now - 10, "iat": now,
            "jti": str(now), "access": access,
        }  # fmt: skip
        head = {"typ": "JWT", "alg": "RS256", "x5c": self._chain}
        signed = b".".join(_encode(json.dumps(part).encode()) for part in (head, claims))
        signature = _openssl("dgst", "-sha256", "-sign", str(self._key), data=signed)
        return b".".join((signed, _encode(signature))).decode()


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
