"""One fetch of an image, as a process of its own: `python -m garden_py.backend.images.puller`.

It reads JSON lines from stdin and writes JSON lines to stdout. The first line says what to fetch:

    {"sources": [Source, …], "scratch": DIR, "limits": {"max_bytes": N, "max_entries": N}, "lanes": N}

Sources are tried in order until one has the image; this is answered by

    {"image": {"source": text, "manifest_digest": …, "manifest": {…}, "config": {…}}}

or {"failed": {"kind": "denied" | "missing" | "ambiguous" | "unreachable" | "invalid" | "no_skopeo", "message": …}} and
the end.
Then each

    {"layer": K, "digest": …, "size": N, "diff_id": …, "media_type": …, "target": DIR}

is fetched and unpacked into the empty DIR, `lanes` of them at a time, with {"layer": K, "progress": bytes} meanwhile
and {"layer": K, "done": {…}} or {"layer": K, "failed": {…}} at the end (see unpack.py). The end of stdin ends the
process; whoever kills it loses nothing but what is in the targets.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from garden_py.backend.images.proxy import ImageProxy, ProxyFailed, Source
from garden_py.backend.images.tasks import read_task

UNPACKER = "garden_py.backend.images.unpack"
_DENIED = (
    "unauthorized",
    "authentication required",
    "invalid username/password",
    "access to the resource is denied",
)
_MISSING = (
    "manifest unknown",
    "name unknown",
    "not found",
    "no such file",
    "no descriptor found",
    "does not exist",
    "no image found",
)  # in skopeo's words and in registries'
_AMBIGUOUS = ("choose an image", "expected 1 item")  # of a layout and of docker-archive: several, and no tag
_INVALID = (
    "corrupted",
    "digest mismatch",
    "did not match",
    "is not JSON",
    "unsupported",
    "invalid character",
    "not a directory",
    "cannot unmarshal",
    "larger than",
)

_LAYER_FIELDS = ("digest", "size", "mediaType")
_CONFIG_FIELDS = ("Env", "User", "WorkingDir", "Entrypoint", "Cmd", "Labels")

_output = threading.Lock()


def main() -> None:
    """Serve one fetch."""
    job = read_task(sys.stdin)
    if job is None:
        return
    sources = [Source(**each) for each in job["sources"]]
    scratch = Path(job["scratch"])
    try:
        source, proxy = _open_first(sources, scratch)
        digest, manifest = proxy.manifest()
        config = proxy.config()
    except ProxyFailed as error:
        _say({"failed": _describe(error, sources[-1])})
        return
    except TimeoutError:
        _say({"failed": {"kind": "unreachable", "message": "the registry does not answer"}})
        return
    except FileNotFoundError:
        _say({"failed": {"kind": "no_skopeo", "message": "skopeo is not installed on the server"}})
        return
    try:
        image = _essence(digest, manifest, config)
    except (AttributeError, TypeError, KeyError) as error:
        _say({"failed": {"kind": "invalid", "message": f"its manifest or config is none: {error!r}"}})
        return
    _say({"image": {"source": source.image, **image}})
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    lanes = [_Lane(jobs, source, scratch, job["limits"]) for _ in range(job["lanes"])]
    lanes[0].proxy = proxy
    for lane in lanes:
        lane.start()
    while (task := read_task(sys.stdin)) is not None:
        jobs.put(task)
    os._exit(0)  # the server has heard all it wants; nobody waits for a lane in the middle of something


def _open_first(sources: list[Source], scratch: Path) -> tuple[Source, ImageProxy]:
    """The first source that has the image.

    Raises:
        ProxyFailed: none has; the message is of the last one, which is the registry itself.
    """
    told: list[str] = []
    for source in sources[:-1]:
        _say({"trying": source.host})
        try:
            return source, ImageProxy(source, scratch)
        except (ProxyFailed, TimeoutError) as error:
            told.append(f"{source.image}: {error}")
    _say({"trying": sources[-1].host})
    try:
        return sources[-1], ImageProxy(sources[-1], scratch)
    except ProxyFailed as error:
        if told:
            error.add_note(f"(mirrors, asked before: {'; '.join(told)})")
        raise


class _Lane(threading.Thread):
    """Fetches one layer after the other, through a proxy of its own: one proxy hands out one blob at a time."""

    def __init__(
        self,
        jobs: queue.SimpleQueue[dict[str, Any]],
        source: Source,
        scratch: Path,
        limits: dict[str, int],
    ) -> None:
        super().__init__(daemon=True)
        self.proxy: ImageProxy | None = None
        self._jobs = jobs
        self._source = source
        self._scratch = scratch
        self._limits = limits

    def run(self) -> None:
        """Until the process ends."""
        while True:
            job = self._jobs.get()
            try:
                answer = self._fetch(job)
            except ProxyFailed as error:
                answer = {"failed": _describe(error, self._source)}
            except TimeoutError:
                answer = {"failed": {"kind": "unreachable", "message": "the registry does not answer"}}
            except Exception as error:  # noqa: BLE001 - somebody waits for an answer
                answer = {"failed": {"kind": "host_fault", "message": f"{type(error).__name__}: {error}"}}
            if "failed" in answer and self.proxy is not None:
                self.proxy.close()
                self.proxy = None
            _say({"layer": job["layer"], **answer})

    def _fetch(self, job: dict[str, Any]) -> dict[str, Any]:
        if self.proxy is None:
            self.proxy = ImageProxy(self._source, self._scratch)
        told: dict[str, Any] = {}

        def consume(fd: int) -> None:
            told.update(self._unpack(job, fd))
            if "failed" in told:
                raise _Refused

        try:
            self.proxy.blob(job["digest"], job["size"], consume)
        except _Refused:
            return told
        return told

    def _unpack(self, job: dict[str, Any], fd: int) -> dict[str, Any]:
        """Run the unpacker on a stream; its last words."""
        process = _start_unpacker(job, fd, self._limits)
        last: dict[str, Any] = {}
        assert process.stdout is not None
        for line in process.stdout:
            last = json.loads(line)
            if "progress" in last:
                _say({"layer": job["layer"], "progress": last["progress"]})
        status = process.wait()
        return read_last_words(last, status)


class _Refused(Exception):
    """The unpacker does not want the layer."""


def _start_unpacker(job: dict[str, Any], fd: int, limits: dict[str, int]) -> subprocess.Popen[bytes]:
    task = {name: job[name] for name in ("target", "size", "media_type", "digest", "diff_id")}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", UNPACKER],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    finally:
        os.close(fd)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps({**task, **limits, "source_fd": fd}).encode() + b"\n")
    return process


def read_last_words(last: dict[str, Any], status: int) -> dict[str, Any]:
    """What an unpacker's last line and exit status come to: `done` or `failed`."""
    if "done" in last and status == 0:
        return {"done": last["done"]}
    if "error" in last:
        error = last["error"]
        return {
            "failed": {"kind": error["code"], "message": error["message"], "facts": error.get("facts", {})}
        }
    return {
        "failed": {"kind": "host_fault", "message": f"the unpacker ended with status {status}", "facts": {}}
    }


def _essence(digest: str, manifest: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Of a manifest and a config only what the server reads: they are of any size and depth.

    Raises:
        AttributeError, TypeError, KeyError: they are not what they should be.
    """
    layers = [{name: layer.get(name) for name in _LAYER_FIELDS} for layer in manifest["layers"]]
    own = config.get("config")
    return {
        "manifest_digest": str(digest),
        "manifest": {"config": {"digest": manifest["config"]["digest"]}, "layers": layers},
        "config": {
            **{name: config.get(name) for name in ("architecture", "os", "created")},
            "config": {name: own.get(name) for name in _CONFIG_FIELDS} if isinstance(own, dict) else {},
            "rootfs": {"diff_ids": config["rootfs"]["diff_ids"]},
        },
    }


def _describe(error: ProxyFailed, source: Source) -> dict[str, Any]:
    """A refusal of skopeo's by kind; it knows texts only, in which names may stand that read like any of them."""
    message = "; ".join([str(error), *getattr(error, "__notes__", ())])
    name, _, tag = source.image.partition("://")[2].rpartition(":")
    lower = str(error).lower()
    for text in (f"{name}:{tag}", name, f"manifest {tag} in", source.host):
        lower = lower.replace(text.lower(), "") if text else lower
    kinds = (("denied", _DENIED), ("missing", _MISSING), ("ambiguous", _AMBIGUOUS), ("invalid", _INVALID))
    for kind, texts in kinds:
        if any(text.lower() in lower for text in texts):
            return {"kind": kind, "message": message}
    return {"kind": "unreachable", "message": message}


def _say(value: dict[str, Any]) -> None:
    line = json.dumps(value).encode() + b"\n"
    try:
        with _output:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        os._exit(1)  # the server has gone, and with it whoever wanted the image


if __name__ == "__main__":
    main()
