"""Where a reference leads: the registries to ask, in order, and with which password. Pure."""

from __future__ import annotations

from garden_py.backend.images.proxy import Source
from garden_py.config import Config, RegistrySettings
from garden_py.model.image import DOCKER_HUB, ImageRef, RegistryAuth, Transport


def sources_of(ref: ImageRef, auth: RegistryAuth | None, config: Config) -> list[Source]:
    """The places to read an image from: mirrors in their order, then the registry itself.

    The caller's user and password go to each of them: who answers decides whether they are right.
    """
    if ref.transport is not Transport.REGISTRY:
        tag = f":{ref.tag}" if ref.tag else ""
        return [Source(f"{ref.transport.value}:{ref.path}{tag}")]
    host = config.docker_registry if ref.host == DOCKER_HUB else ref.host
    own = config.registry.get(ref.host) or config.registry.get(host) or RegistrySettings()
    places = [*(mirror.partition("/")[::2] for mirror in own.mirrors), (host, "")]
    return [_source(ref, place, prefix, auth, config) for place, prefix in places]


def _source(ref: ImageRef, host: str, prefix: str, auth: RegistryAuth | None, config: Config) -> Source:
    settings = config.registry.get(host) or RegistrySettings()
    name = f"{prefix.strip('/')}/{ref.name}" if prefix.strip("/") else ref.name
    end = f"@{ref.digest}" if ref.digest else f":{ref.tag}"
    return Source(
        image=f"docker://{host}/{name}{end}",
        host=host,
        username=auth.username if auth else "",
        password=auth.password if auth else "",
        insecure=settings.plain_http or host in config.insecure_registry,
        ca=str(settings.ca) if settings.ca else "",
    )
