"""References to images, and what an image says of itself.

One syntax for every door (docs/images.md):

    /dir, raw:///dir, file:///dir     a directory on the server, used as it is and never written
    /file.tar, file:///file.tar       a tar of a root file system on the server, read again when the file changes
    oci:///dir[:tag]                  an OCI image layout
    oci-archive:///file[:tag]         a tar of one
    docker-archive:///file[:name]     what `docker save` writes
    docker://host/repo[:tag|@digest]  in a registry; `docker:///repo` on Docker Hub; Garden's `#tag` is taken for `:tag`
    store:name, store:sha256:…        in the server's own store: by the name it was imported under, or by its id
    preloaded+layer:///file.tar?layer=URL&layer_path=DIR&layer_digest=SHA256
                                      a tar of a root file system on the server, with one more layer put at DIR

Source: OCI image-spec config.md, distribution-spec (names), Garden statement M2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

DOCKER_HUB = "docker.io"
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LOCAL_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/:-]*")  # a layout's ref.name may be a whole name and tag
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME_MAX = 255
_LENGTH_MAX = 4096
_LAYER_KEYS = ("layer", "layer_path", "layer_digest")
_NOT_IN_URL = re.compile(r"[^\x21-\x7e]")


class Transport(Enum):
    """How an image is reached; the values are those of containers-transports(5) where it has one."""

    PATH = "path"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    REGISTRY = "docker"
    STORE = "store"
    PRELOADED = "preloaded+layer"


@dataclass(frozen=True, slots=True)
class ExtraLayer:
    """A layer that is put on a tar of a root file system.

    Attributes:
        url: it is fetched from there; http:, https: or file:.
        directory: of the root file system that it is put into; absolute, no `.` nor `..` in it.
        digest: `sha256:…` of it as it is fetched.
    """

    url: str
    directory: str
    digest: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A well-formed reference.

    Attributes:
        path: on the server; of PATH, OCI, PRELOADED and the archives.
        host: of a registry, as the caller wrote it, `docker.io` for Docker Hub; REGISTRY only.
        name: the repository (REGISTRY), the name or id in the store (STORE).
        tag: of one image among several; empty: `latest` in a registry, else the only one there is.
        digest: `sha256:…` of the manifest; then tag does not count.
        layer: PRELOADED only.
    """

    transport: Transport
    path: str = ""
    host: str = ""
    name: str = ""
    tag: str = ""
    digest: str = ""
    layer: ExtraLayer | None = None

    def __str__(self) -> str:
        """The canonical text, which parses to the same reference.

        But for an extra layer: what that is, its digest says. Where it comes from may change, and be signed.
        """
        if self.layer is not None:
            where = f"layer_path={quote(self.layer.directory)}&layer_digest={self.layer.digest}"
            return f"{self.transport.value}://{quote(self.path)}?{where}"
        match self.transport:
            case Transport.PATH:
                return self.path
            case Transport.STORE:
                return f"store:{self.name}"
            case Transport.REGISTRY:
                end = f"@{self.digest}" if self.digest else f":{self.tag or 'latest'}"
                return f"docker://{self.host}/{self.name}{end}"
            case _:
                return f"{self.transport.value}://{self.path}" + (f":{self.tag}" if self.tag else "")

    @property
    def id(self) -> str:
        """The image id that a reference into the store states itself; else empty."""
        return self.name if self.transport is Transport.STORE and is_digest(self.name) else ""


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """A user's name and password at a registry. Never written down, and not shown."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What processes may take from an image. Source: OCI image-spec config.md.

    Attributes:
        env: NAME=VALUE.
        labels: free pairs, sorted.
    """

    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of an image in the store.

    Attributes:
        diff_id: digest of the uncompressed layer; of one that was put into a directory, an id of its own.
        bytes: unpacked, on disk.
    """

    diff_id: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image in the store.

    Attributes:
        id: digest of its config, `sha256:…`.
        names: references by which it was pulled or imported; none any more if all have moved on to other images.
        layers: lowest first.
        pulled_ns, used_ns: CLOCK_REALTIME; the latest pull, and the latest create.
        in_use: by how many containers and sidecars.
        manifest_digest: `sha256:…`, of the latest pull; empty for an imported one.
    """

    id: str
    names: tuple[str, ...]
    layers: tuple[LayerInfo, ...]
    config: ImageConfig
    architecture: str
    os: str
    created: str
    pulled_ns: int
    used_ns: int
    in_use: int
    manifest_digest: str = ""

    @property
    def bytes(self) -> int:
        """On disk, layers shared with other images included."""
        return sum(layer.bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class UsedImage:
    """What a container or sidecar was started from.

    Attributes:
        id: as ImageInfo.id.
        name: the reference as it was given.
        diff_ids: of its layers, lowest first.
        bytes: of all layers on disk.
        made_by: image plugins that it is to be removed by, if the store has nothing of it; each a program and its
            extra arguments.
    """

    id: str
    name: str
    diff_ids: tuple[str, ...]
    config: ImageConfig
    bytes: int
    made_by: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a pull is.

    Attributes:
        phase: "resolving", "pulling", "unpacking" or "done".
        layers, layers_done: of the image; those in the store already count as done.
        bytes, bytes_done: compressed, of the layers that have to be fetched; 0 while not known.
    """

    phase: str
    layers: int = 0
    layers_done: int = 0
    bytes: int = 0
    bytes_done: int = 0

    def __str__(self) -> str:
        """For people."""
        if self.phase == "resolving" or not self.layers:
            return f"{self.phase} image"
        layers = f"{self.layers_done} of {self.layers} layers"
        return f"{self.phase} image: {layers}, {self.bytes_done} of {self.bytes} bytes"


def is_digest(text: str) -> bool:
    """Whether a text is `sha256:` and 64 hexadecimal digits in lower case."""
    return _DIGEST.fullmatch(text) is not None


class BadReference(ValueError):
    """A text is no image reference; the message says what would be."""


def parse_image(text: str) -> ImageRef:
    """Read a reference.

    Raises:
        BadReference: says what is wrong.
    """
    if "\0" in text or len(text) > _LENGTH_MAX:
        raise BadReference(f"must be at most {_LENGTH_MAX} characters without NUL")
    scheme, colon, rest = text.partition(":")
    if text.startswith("/") or not colon:
        return _parse_path(text)
    match scheme:
        case "raw" | "file":
            return _parse_path(_after_slashes(scheme, rest))
        case "oci" | "oci-archive" | "docker-archive":
            return _parse_local(Transport(scheme), _after_slashes(scheme, rest))
        case "docker":
            return _parse_registry(rest)
        case Transport.PRELOADED.value:
            return _parse_preloaded(text)
        case "store":
            return _parse_store(rest)
        case _:
            raise BadReference(
                f"{scheme}: is not known here; known are a directory or tar file (/path, raw:///path, file:///path), "
                "oci:///dir:tag, oci-archive:///file, docker-archive:///file, docker://host/repo:tag, store:name and "
                "preloaded+layer:///file.tar?layer=URL&layer_path=DIR&layer_digest=SHA256"
            )


def image_problem(image: str) -> str | None:
    """What is wrong with an image reference; None if it is well-formed."""
    try:
        parse_image(image)
    except BadReference as error:
        return str(error)
    return None


def _after_slashes(scheme: str, rest: str) -> str:
    """The path of `scheme:///path` and of `scheme:/path`."""
    path = rest[2:] if rest.startswith("//") else rest
    if not path.startswith("/"):
        raise BadReference(f"must be an absolute path: {scheme}:///path")
    return path


def _parse_path(path: str) -> ImageRef:
    if not path.startswith("/"):
        raise BadReference(
            "must be an absolute directory, or a reference with its kind in front, e.g. docker:///busybox"
        )
    return ImageRef(Transport.PATH, path=path)


def _parse_local(transport: Transport, rest: str) -> ImageRef:
    """`/path[:tag]`; the tag may be a whole name, and have colons of its own."""
    path, _, tag = rest.partition(":")
    if tag and not _LOCAL_TAG.fullmatch(tag):
        raise BadReference(f"{tag!r} is not a tag")
    return ImageRef(transport, path=path, tag=tag)


def _parse_registry(rest: str) -> ImageRef:
    if not rest.startswith("//"):
        raise BadReference("must be docker://host/repository:tag, or docker:///repository:tag for Docker Hub")
    text = rest[2:].replace("#", ":", 1)  # Garden statement M2
    if "@" in text.partition("/")[0]:
        raise BadReference("must not have a user or password in it; they are given apart")
    host, name = _split_host(text)
    name, at, digest = name.partition("@")
    if at and not is_digest(digest):
        raise BadReference("a digest must be sha256: and 64 hexadecimal digits in lower case")
    name, colon, tag = name.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise BadReference(f"{tag!r} is not a tag: at most 128 of A-Z a-z 0-9 . _ -")
    if host == DOCKER_HUB and "/" not in name:
        name = f"library/{name}"
    if not _REPOSITORY.fullmatch(name) or len(name) > _NAME_MAX:
        raise BadReference(
            f"{name!r} is not a repository: lower-case letters, digits, and single . _ - between them"
        )
    if not _HOST.fullmatch(host):
        raise BadReference(f"{host!r} is not a registry's HOST or HOST:PORT")
    return ImageRef(
        Transport.REGISTRY, host=host, name=name, tag="" if digest else tag or "latest", digest=digest
    )


def _split_host(text: str) -> tuple[str, str]:
    """Host and rest; without a host, Docker Hub. A first part with neither dot nor port is none, but `localhost`."""
    if text.startswith("/"):
        return DOCKER_HUB, text[1:]
    first, slash, rest = text.partition("/")
    if slash and (set(first) & set(".:[") or first == "localhost"):
        known = {"index.docker.io", "registry-1.docker.io"}
        return (DOCKER_HUB if first in known else first), rest
    return DOCKER_HUB, text


def _parse_preloaded(text: str) -> ImageRef:
    """Source: Garden statement M2. A layer's URL may have escapes of its own: `layer` is unquoted once."""
    parts = _split_url(text, "the reference")
    path, query = unquote(parts.path), parse_qs(parts.query)
    if parts.netloc or not path.startswith("/"):
        raise BadReference("must begin with an absolute path: preloaded+layer:///file.tar?layer=…")
    for key in _LAYER_KEYS:
        if key not in query:
            raise BadReference(f"no query parameter '{key}' found in URL {text}")
    if unknown := query.keys() - set(_LAYER_KEYS):
        raise BadReference(
            f"{', '.join(sorted(unknown))}: no parameter of a preloaded+layer; a & in a layer's URL is written %26"
        )
    if len(query["layer"]) + len(query["layer_path"]) + len(query["layer_digest"]) > len(_LAYER_KEYS):
        raise BadReference(f"each of {', '.join(_LAYER_KEYS)} can be there once")
    url, directory, digest = (query[key][0] for key in _LAYER_KEYS)
    digest = f"sha256:{digest.removeprefix('sha256:')}"
    if not is_digest(digest):
        raise BadReference("layer_digest must be the 64 hexadecimal digits in lower case of a sha256")
    if "\0" in path + directory:
        raise BadReference("must not contain NUL")
    _check_layer_url(url)
    return ImageRef(
        Transport.PRELOADED, path=path, layer=ExtraLayer(url, _parse_layer_path(directory), digest)
    )


def _split_url(text: str, what: str) -> SplitResult:
    if _NOT_IN_URL.search(text):
        raise BadReference(f"{what} must be a URL: blanks and what is not ASCII are written %XX")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - it is looked at only now
    except ValueError as error:
        raise BadReference(f"{what} must be a URL: {error}") from error
    if "#" in text:
        raise BadReference(f"{what} must be a URL without a fragment; a # is written %23")
    return parts


def _check_layer_url(url: str) -> None:
    parts = _split_url(url, "layer")
    match parts.scheme:
        case "file":
            if parts.netloc or not parts.path.startswith("/"):
                raise BadReference("layer must name a file of the server: file:///path")
            if "\0" in unquote(parts.path):
                raise BadReference("layer must not contain NUL")
        case "http" | "https":
            if "@" in parts.netloc:
                raise BadReference("layer must not have a user or password in it; they are given apart")
            if not parts.hostname:
                raise BadReference("layer must name a host")
        case _:
            raise BadReference("layer must be a file:, http: or https: URL")


def _parse_layer_path(directory: str) -> str:
    parts = [part for part in directory.split("/") if part not in ("", ".")]
    if not directory.startswith("/") or ".." in parts:
        raise BadReference("layer_path must be an absolute path without '..'")
    return "/" + "/".join(parts)


def _parse_store(name: str) -> ImageRef:
    base, colon, tag = name.partition(":")
    if is_digest(name):
        return ImageRef(Transport.STORE, name=name)
    if not _REPOSITORY.fullmatch(base) or (colon and not _TAG.fullmatch(tag)) or len(base) > _NAME_MAX:
        raise BadReference(
            "must be store:name[:tag] with a lower-case name, or store:sha256:… with an image's id"
        )
    return ImageRef(Transport.STORE, name=f"{base}:{tag or 'latest'}")
