"""Images as callers see them, and how they are told; see `values` and `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from garden_py.api._pb import garden_pb2 as pb
from garden_py.client.times import moment


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """A user's name and password at a registry."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says of itself; see OCI image-spec config.md. `env` is NAME=VALUE."""

    env: tuple[str, ...] = ()
    user: str = ""
    working_dir: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())


@dataclass(frozen=True, slots=True)
class UsedImage:
    """The image that a container was made of; `name` is the reference as it was given."""

    id: str
    name: str
    config: ImageConfig


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One layer of an image; `bytes` is disk space."""

    diff_id: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image in the server's store.

    Attributes:
        id: sha256:…
        names: references that lead to it.
        layers: lowest first.
        in_use: containers and sidecars made of it.
        bytes: on disk, layers shared with other images included.
    """

    id: str
    names: tuple[str, ...]
    layers: tuple[ImageLayer, ...]
    config: ImageConfig
    architecture: str
    os: str
    created: str
    pulled_at: datetime | None
    used_at: datetime | None
    in_use: int
    manifest_digest: str
    bytes: int


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a pull is; `bytes` are compressed ones that have to be fetched, 0 while not known."""

    phase: str
    layers: int
    layers_done: int
    bytes: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune removed."""

    ids: tuple[str, ...]
    freed_bytes: int


def auth_to_pb(auth: RegistryAuth | None) -> pb.RegistryAuth | None:
    """A user and password, or none."""
    return None if auth is None else pb.RegistryAuth(username=auth.username, password=auth.password)


def used_image_from_pb(message: pb.UsedImage) -> UsedImage:
    """The image that a container was made of."""
    return UsedImage(message.id, message.name, _config_from_pb(message.config))


def _config_from_pb(message: pb.ImageConfig) -> ImageConfig:
    return ImageConfig(
        env=tuple(message.env),
        user=message.user,
        working_dir=message.working_dir,
        entrypoint=tuple(message.entrypoint),
        cmd=tuple(message.cmd),
        labels=dict(message.labels),
    )


def image_from_pb(message: pb.Image) -> ImageInfo:
    """An image of the store."""
    return ImageInfo(
        id=message.id,
        names=tuple(message.names),
        layers=tuple(ImageLayer(layer.diff_id, layer.bytes) for layer in message.layers),
        config=_config_from_pb(message.config),
        architecture=message.architecture,
        os=message.os,
        created=message.created,
        pulled_at=moment(message.pulled_at, message.HasField("pulled_at")),
        used_at=moment(message.used_at, message.HasField("used_at")),
        in_use=message.in_use,
        manifest_digest=message.manifest_digest,
        bytes=message.bytes,
    )


def news_from_pb(message: pb.PullImageResponse) -> PullProgress | ImageInfo:
    """One answer of a pull."""
    if message.WhichOneof("message") == "image":
        return image_from_pb(message.image)
    told = message.progress
    return PullProgress(told.phase, told.layers, told.layers_done, told.bytes, told.bytes_done)
