"""One image of a registry, a layout or an archive, read through skopeo: manifest, config, and blobs as streams.

`skopeo experimental-image-proxy` answers JSON requests on a SOCK_SEQPACKET socket, with a pipe beside the answer where
there is data. The write end of such a pipe is closed by FinishPipe alone, which waits until all has been written, so
it is asked for while somebody else reads. Transport and authentication are skopeo's, as is the check of each blob's
digest.

Source: skopeo's proxy.go, skopeo-experimental-image-proxy(1), containers-auth.json(5).
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROTOCOL = re.compile(r"0\.2\.\d+")
_MESSAGE_MAX = 1 << 20
METADATA_MAX = 16 << 20
_OPEN_TIMEOUT_S = 60.0
_LAST_WORDS_S = 1.0


class ProxyFailed(Exception):
    """skopeo refused a request; the message is its own."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where to read an image from.

    Attributes:
        image: by containers-transports(5), e.g. `docker://host/repo:tag`.
        host: of the registry that username and password are for.
        insecure: plain HTTP, and certificates that nobody vouches for, are fine there.
        ca: a PEM file with what certificates there must chain to; empty: what the host trusts.
    """

    image: str
    host: str = ""
    username: str = ""
    password: str = ""
    insecure: bool = False
    ca: str = ""


class ImageProxy:
    """A skopeo process with one image open.

    Args:
        source: the image.
        scratch: a directory for its files, which somebody else removes. The password is in none of them.

    Raises:
        ProxyFailed: it cannot be opened.
        FileNotFoundError: there is no skopeo.
    """

    def __init__(self, source: Source, scratch: Path) -> None:
        if shutil.which("skopeo") is None:
            raise FileNotFoundError("skopeo")
        self._start(source, scratch)
        try:
            version = str(self._ask("Initialize"))
            if not _PROTOCOL.fullmatch(version):
                raise ProxyFailed(f"skopeo speaks version {version} of its protocol, not 0.2")
            self._image = self._ask("OpenImage", source.image)
        except BaseException:
            self.close()
            raise

    def _start(self, source: Source, scratch: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        auth = _auth_file(source)
        # It ends with the thread that starts it, also when that is killed; setpriv(1).
        argv = ["setpriv", "--pdeathsig", "KILL", "skopeo"]
        argv += ["--insecure-policy"]  # who signed an image is not judged here
        argv += ["--tmpdir", str(scratch)]  # it takes archives apart
        argv += [
            "--registries-conf",
            os.devnull,
        ]  # the host's own mirrors would not be given the caller's password
        argv += ["experimental-image-proxy", "--sockfd", str(theirs.fileno())]
        argv += ["--authfile", f"/proc/self/fd/{auth}"]
        if source.host:
            argv.append(f"--tls-verify={str(not source.insecure).lower()}")
        if source.ca:
            argv += ["--cert-dir", str(_certificates(source, scratch))]
        try:
            self._process = subprocess.Popen(
                argv,
                pass_fds=[theirs.fileno(), auth],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # it says the same in its answers
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(auth)
        ours.settimeout(_OPEN_TIMEOUT_S)
        self._socket = ours

    def _ask(self, method: str, *args: Any) -> Any:
        value, fd, _ = self._request(method, *args)
        if fd >= 0:
            os.close(fd)
        return value

    def _request(self, method: str, *args: Any) -> tuple[Any, int, int]:
        """The answer's value, and descriptor and id of its pipe: -1 and 0 without one."""
        self._socket.send(json.dumps({"method": method, "args": args}).encode())
        data, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_MAX, 1)
        if not data:
            raise ProxyFailed("skopeo has ended")
        fd = fds[0] if fds else -1
        try:
            answer = json.loads(data)
            if not answer["success"]:
                raise ProxyFailed(str(answer["error"]))
            return answer["value"], fd, int(answer["pipeid"])
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def manifest(self) -> tuple[str, dict[str, Any]]:
        """Digest of the manifest as the registry has it, and the manifest of this host's platform in OCI's form."""
        digest, content = self._read("GetManifest")
        return str(digest), _parse_object(content, "manifest")

    def config(self) -> dict[str, Any]:
        """The image's config in OCI's form."""
        return _parse_object(self._read("GetFullConfig")[1], "config")

    def _read(self, method: str) -> tuple[Any, bytes]:
        value, fd, pipe = self._request(method, self._image)
        # The proxy buffers nothing: it writes from a thread of its own while it handles FinishPipe.
        self._socket.send(json.dumps({"method": "FinishPipe", "args": [pipe]}).encode())
        with os.fdopen(fd, "rb") as file:
            content = file.read(METADATA_MAX + 1)
        if len(content) > METADATA_MAX:
            raise ProxyFailed(f"its {method.removeprefix('Get').lower()} is larger than {METADATA_MAX} bytes")
        self._finished()
        return value, content

    def _finished(self) -> None:
        data = self._socket.recv(_MESSAGE_MAX)
        if not data:
            raise ProxyFailed("skopeo has ended")
        answer = json.loads(data)
        if not answer["success"]:
            raise ProxyFailed(str(answer["error"]))

    def blob(self, digest: str, size: int, consume: Callable[[int], None]) -> None:
        """Have a blob read; its digest is checked.

        Args:
            digest: `sha256:…`.
            size: bytes; -1 if unknown.
            consume: is given the descriptor to read from to its end, and closes it before it returns. What it raises
                goes through to the caller unless skopeo knows better why the stream ended.

        Raises:
            ProxyFailed: the blob cannot be fetched, or is not what its digest says.

        After a failure, only `close` is left to call.
        """
        _, fd, pipe = self._request("GetBlob", self._image, digest, size)
        self._socket.settimeout(None)  # a large blob may take any time; the server watches the progress
        self._socket.send(json.dumps({"method": "FinishPipe", "args": [pipe]}).encode())
        try:
            consume(fd)
        except BaseException as error:
            self._socket.settimeout(_LAST_WORDS_S)  # it may be waiting for a registry that says nothing more
            try:
                self._finished()
            except TimeoutError:
                raise error from None
            except ProxyFailed as cause:
                if "broken pipe" not in str(cause):  # which is consume's own end, as skopeo sees it
                    raise cause from error
            raise
        self._finished()

    def close(self) -> None:
        """End the process, at once: it keeps nothing."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _auth_file(source: Source) -> int:
    """A containers-auth.json(5) in memory: nothing of a password may be left when somebody is killed."""
    known = {}
    if source.username:
        pair = f"{source.username}:{source.password}".encode()
        known[source.host] = {"auth": base64.b64encode(pair).decode()}
    fd = os.memfd_create("garden-auth", os.MFD_CLOEXEC)
    os.write(fd, json.dumps({"auths": known}).encode())
    return fd


def _certificates(source: Source, scratch: Path) -> Path:
    directory = scratch / f"certs-{source.host}"
    directory.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (directory / "ca.crt").symlink_to(source.ca)
    return directory


def _parse_object(content: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ProxyFailed(f"its {what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ProxyFailed(f"its {what} is not a JSON object")
    return found
