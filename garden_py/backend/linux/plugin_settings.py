"""What a server is told about external programs."""

from __future__ import annotations

import os

import structlog

from garden_py.backend.plugin.image import Command
from garden_py.config import Config
from garden_py.model.errors import InvalidField

log = structlog.get_logger()
# What only a server that makes networks itself puts in force.
_OWN_NETWORK = (
    "network_pool",
    "network_pool_v6",
    "port_pool_start",
    "port_pool_size",
    "allow_host_access",
    "container_access",
    "deny_network",
    "default_egress",
    "mtu",
)


def image_commands(config: Config) -> dict[bool, Command]:
    """Image plugins by whether they are for privileged containers; an empty one: there is none."""
    found = {
        False: (config.image_plugin, *config.image_plugin_extra_arg),
        True: (config.privileged_image_plugin, *config.privileged_image_plugin_extra_arg),
    }
    return {privileged: command if command[0] else () for privileged, command in found.items()}


def check_plugins(config: Config) -> None:
    """Refuse programs that cannot be run, and say which settings are without effect beside them.

    Raises:
        InvalidField.
    """
    for name in ("image_plugin", "privileged_image_plugin", "network_plugin"):
        program = getattr(config, name)
        if program and not (os.path.isfile(program) and os.access(program, os.X_OK)):
            raise InvalidField(name, f"{program} is not a program that can be run")
    if not config.network_plugin:
        return
    idle = sorted(set(_OWN_NETWORK) & config.model_fields_set)
    if idle:
        log.warning("settings.without_effect", settings=idle, because="the network plugin decides")
