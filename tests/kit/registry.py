"""A real registry on loopback: Debian's docker-registry, with or without passwords, TLS, and what it was asked."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path

START_TIMEOUT_S = 20


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Registry:
    """One registry. `host` is what references and settings call it.

    Args:
        directory: for its files.
        users: names and passwords; with any it asks for one (Basic, from an htpasswd file).

    Attributes:
        small: what stands in the log for the fetch of a blob that a test watches.
    """

    def __init__(self, directory: Path, users: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.users = users or {}
        self.port = free_port()
        self.small = ""
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True)
        self._log = directory / "log"
        (directory / "config.yml").write_text(self._config())

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def _config(self) -> str:
        text = (
            "version: 0.1\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/data}}, delete: {{enabled: true}}}}\n"
            f"http: {{addr: '{self.host}', net: tcp}}\n"
            "log: {level: info}\n"
        )
        if self.users:
            passwords = self.directory / "htpasswd"
            for name, password in self.users.items():
                flags = "-Bbi" if passwords.exists() else "-cBbi"
                argv = ["htpasswd", flags.replace("b", ""), str(passwords), name]
                subprocess.run(argv, input=password.encode(), check=True, capture_output=True)
            text += f"auth: {{htpasswd: {{realm: test, path: {passwords}}}}}\n"
        return text

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

    def fill(self, source: str, name: str, *options: str) -> str:
        """Copy an image into it with skopeo; the reference to it."""
        creds = [f"--dest-creds={':'.join(next(iter(self.users.items())))}"] if self.users else []
        argv = ["skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *creds, *options]
        argv += [source.replace("://", ":", 1), f"docker://{self.host}/{name}"]
        subprocess.run(argv, check=True, capture_output=True, timeout=120)
        return f"docker://{self.host}/{name}"

    def asked(self) -> str:
        """Its log, in which each request is a line."""
        return self._log.read_text()

    def count(self, what: str) -> int:
        """How many lines of the log hold a text."""
        return sum(what in line for line in self.asked().splitlines())
