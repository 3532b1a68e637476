"""Images for tests: layers as tars in memory, put together as OCI layouts, and what a container of them must show."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image"
BUSYBOX = Path("/bin/busybox")
_APPLETS = (
    "sh",
    "cat",
    "ls",
    "stat",
    "env",
    "id",
    "true",
    "sleep",
    "readlink",
    "test",
    "echo",
    "dd",
    "touch",
    "tar",
)


def entry(name: str, data: bytes | None = None, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar: a file if there is data, else a directory, or what `type` in facts says."""
    info = tarfile.TarInfo(name)
    info.mtime = 1_000_000_000
    if data is None:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
    else:
        info.size, info.mode = len(data), 0o644
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data or b""


def link(name: str, target: str, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A symbolic link."""
    return entry(name, None, type=tarfile.SYMTYPE, linkname=target, mode=0o777, **facts)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """A hard link to an earlier member."""
    return entry(name, None, type=tarfile.LNKTYPE, linkname=target, mode=0o644)


def tar_layer(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A layer, not compressed."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return stream.getvalue()


def busybox_layer(*more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A layer with a shell, a passwd with root and alice, and whatever else."""
    passwd = b"root:x:0:0::/root:/bin/sh\nalice:x:1001:1010::/home/alice:/bin/sh\n"
    return tar_layer(
        *(entry(name) for name in ("bin", "etc", "home", "dev", "proc", "sys")),
        entry("tmp", mode=0o1777),
        entry("root", mode=0o700),
        entry("home/alice", uid=1001, gid=1010),
        entry("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
        *(link(f"bin/{name}", "busybox") for name in _APPLETS),
        entry("etc/passwd", passwd),
        entry("etc/group", b"root:x:0:\nalice:x:1010:\n"),
        *more,
    )


@dataclass
class Layout:
    """An OCI image layout under construction. Source: OCI image-spec image-layout.md, manifest.md."""

    directory: Path
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.directory / "blobs/sha256").mkdir(parents=True)
        (self.directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(self, content: bytes, media_type: str) -> dict[str, Any]:
        """Store a blob; its descriptor."""
        digest = hashlib.sha256(content).hexdigest()
        (self.directory / "blobs/sha256" / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def blob(self, descriptor: Mapping[str, Any]) -> Path:
        """The file of a blob."""
        return self.directory / "blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")

    def add(
        self,
        tag: str,
        layers: Sequence[bytes],
        *,
        config: Mapping[str, Any] | None = None,
        compress: str = "gzip",
        diff_ids: Sequence[str] | None = None,
        architecture: str = "amd64",
    ) -> dict[str, Any]:
        """Add an image under a tag; its manifest."""
        blobs = [self._layer(layer, compress) for layer in layers]
        wanted = diff_ids or [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        return self.add_blobs(tag, blobs, wanted, config, architecture)

    def add_blobs(
        self,
        tag: str,
        blobs: Sequence[dict[str, Any]],
        diff_ids: Sequence[str],
        config: Mapping[str, Any] | None = None,
        architecture: str = "amd64",
    ) -> dict[str, Any]:
        """Add an image of layers that are there already; its manifest."""
        full = {
            "architecture": architecture,
            "os": "linux",
            "created": "2026-01-02T03:04:05Z",
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.put(json.dumps(full).encode(), f"{OCI}.config.v1+json"),
            "layers": list(blobs),
        }
        self.tag(tag, self.put(json.dumps(manifest).encode(), f"{OCI}.manifest.v1+json"))
        return manifest

    def tag(self, tag: str, descriptor: dict[str, Any]) -> None:
        """Let a tag lead to a manifest or an index."""
        self.manifests = [each for each in self.manifests if tag not in each["annotations"].values()]
        self.manifests.append({**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}})
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.directory / "index.json").write_text(json.dumps(index))

    def _layer(self, layer: bytes, compress: str) -> dict[str, Any]:
        match compress:
            case "gzip":
                return self.put(gzip.compress(layer, 1, mtime=0), f"{OCI}.layer.v1.tar+gzip")
            case "zstd":
                packed = subprocess.run(["zstd", "-q", "-c"], input=layer, capture_output=True, check=True)
                return self.put(packed.stdout, f"{OCI}.layer.v1.tar+zstd")
            case _:
                return self.put(layer, f"{OCI}.layer.v1.tar")

    def reference(self, tag: str) -> str:
        """What a caller writes."""
        return f"oci://{self.directory}:{tag}"
