"""A network plugin: another program connects containers, opens destinations and maps ports.

    PROGRAM [EXTRA…] --action ACTION --handle HANDLE, a JSON value on stdin, one or nothing on stdout

Source: Garden behaviour, statements N40 to N44.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from garden_py.backend.plugin.caller import Lane, PluginCaller, first_problem, said
from garden_py.model.errors import HostFault
from garden_py.model.netrule import EgressRule, Protocol
from garden_py.model.spec import PortMapping

PREFIX: Final = "garden.network."
CONTAINER_IP: Final = f"{PREFIX}container-ip"
CONTAINER_IPV6: Final = f"{PREFIX}container-ipv6"
HOST_IP: Final = f"{PREFIX}host-ip"
EXTERNAL_IP: Final = f"{PREFIX}external-ip"
MAPPED_PORTS: Final = f"{PREFIX}mapped-ports"
INTERFACE: Final = f"{PREFIX}interface"
_SENT_PREFIX: Final = "network."
_LOG_CONFIG: Final = "log_config"
_ADDRESSES: Final = (CONTAINER_IP, CONTAINER_IPV6, HOST_IP)
# What is a word stays one in hosts(5) and resolv.conf(5).
_Word = Annotated[str, Field(pattern=r"^\S+$")]
_PROTOCOLS: Final = {Protocol.ALL: 0, Protocol.TCP: 1, Protocol.UDP: 2, Protocol.ICMP: 3}


@dataclass(frozen=True, slots=True)
class Connected:
    """What a plugin says of a container that it has connected.

    Attributes:
        properties: for the container.
        ports: that lead to it.
        dns_servers: for its resolv.conf, in place of the server's; empty: it says nothing about them.
        search_domains: likewise.
    """

    properties: tuple[tuple[str, str], ...]
    ports: tuple[PortMapping, ...]
    dns_servers: tuple[str, ...]
    search_domains: tuple[str, ...]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Port(_Answer):
    host_port: int = Field(alias="HostPort", ge=1, le=0xFFFF)
    container_port: int = Field(alias="ContainerPort", ge=1, le=0xFFFF)


class _Up(_Answer):
    properties: dict[str, str] | None = Field(default=None, alias="Properties")
    dns_servers: list[_Word] | None = None
    search_domains: list[_Word] | None = None

    @field_validator("properties")
    @classmethod
    def _addresses(cls, properties: dict[str, str] | None) -> dict[str, str] | None:
        for key in _ADDRESSES:
            address = (properties or {}).get(key, "")
            if address and address.split() != [address]:
                raise ValueError(f"{key} is not an address")
        return properties


class _NetIn(_Answer):
    host_port: int = Field(ge=1, le=0xFFFF)
    container_port: int = Field(ge=1, le=0xFFFF)


_AnswerT = TypeVar("_AnswerT", bound=_Answer)
_PORTS: Final = TypeAdapter(list[_Port] | None)


class NetworkPlugin:
    """The verbs of one program.

    Args:
        command: the program and its extra arguments.
        caller: runs it.

    Every verb raises HostFault if the program cannot be run, fails, or says what it should not.
    """

    def __init__(self, command: Sequence[str], caller: PluginCaller) -> None:
        self.command = tuple(command)
        self._caller = caller

    async def up(
        self,
        handle: str,
        pid: int,
        properties: Mapping[str, str],
        rules: Sequence[EgressRule],
        ports: Sequence[PortMapping],
        *,
        timeout_s: float,
    ) -> Connected:
        """Connect a container.

        Args:
            handle: of the container.
            pid: of a process in its network namespace, as the host numbers it.
            properties: of the container; the plugin is given those that are meant for it.
            rules: that allow.
            ports: to be mapped; 0 asks for one.
            timeout_s: until the program is killed.
        """
        asked = {
            "Pid": pid,
            "Properties": plugin_properties(properties),
            "netout_rules": [rule_json(rule) for rule in rules],
            "netin": [{"host_port": p.host_port, "container_port": p.container_port} for p in ports],
        }
        told = self._parse("up", _Up, await self._call("up", handle, asked, timeout_s))
        found = told.properties or {}
        return Connected(
            tuple(sorted(found.items())),
            self._read_ports(found.get(MAPPED_PORTS, "")),
            tuple(told.dns_servers or ()),
            tuple(told.search_domains or ()),
        )

    async def down(self, handle: str, *, timeout_s: float) -> None:
        """Disconnect a container; one that is not connected is fine."""
        await self._call("down", handle, None, timeout_s, lane=Lane.REMOVE)

    async def map_port(
        self, handle: str, wanted: PortMapping, *, external_ip: str, container_ip: str, timeout_s: float
    ) -> PortMapping:
        """Map one more port; with its ports filled in."""
        asked = {
            "HostIP": external_ip,
            "HostPort": wanted.host_port,
            "ContainerIP": container_ip,
            "ContainerPort": wanted.container_port,
        }
        told = self._parse("net-in", _NetIn, await self._call("net-in", handle, asked, timeout_s))
        return PortMapping(told.host_port, told.container_port)

    async def open(
        self, handle: str, rules: Sequence[EgressRule], *, container_ip: str, bulk: bool, timeout_s: float
    ) -> None:
        """Allow more destinations; not bulk: there is one rule."""
        found = [rule_json(rule) for rule in rules]
        action = "bulk-net-out" if bulk else "net-out"
        asked = {"netout_rules": found} if bulk else {"netout_rule": found[0]}
        await self._call(action, handle, {"container_ip": container_ip, **asked}, timeout_s)

    async def _call(
        self, action: str, handle: str, value: Any, timeout_s: float, lane: Lane = Lane.CHANGE
    ) -> str:
        step, stdin = _step(action), json.dumps(value).encode()
        argv = [*self.command, "--action", action, "--handle", handle]
        ended = await self._caller.run(
            argv, call=action, step=step, stdin=stdin, timeout_s=timeout_s, lane=lane
        )
        if ended.status != 0:
            told = said(ended.stderr) or said(ended.stdout)
            raise HostFault(step, f"{ended.how}{told}")
        return ended.stdout

    def _parse(self, action: str, kind: type[_AnswerT], text: str) -> _AnswerT:
        try:
            return kind.model_validate_json(text if text.strip() else "{}")
        except ValidationError as error:
            raise HostFault(
                _step(action), f"its answer is not what it should be: {first_problem(error)}"
            ) from error

    def _read_ports(self, text: str) -> tuple[PortMapping, ...]:
        try:
            found = _PORTS.validate_json(text or "[]") or []
        except ValidationError as error:
            raise HostFault(
                _step("up"), f"its property {MAPPED_PORTS} is not a list of ports: {text!r}"
            ) from error
        return tuple(PortMapping(each.host_port, each.container_port) for each in found)


def _step(action: str) -> str:
    return f"external networker encountered an error running '{action}' action"  # statement N40


def plugin_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Those of a container's properties that are meant for a network plugin, under its names (statement N43)."""
    found = {
        key.removeprefix(_SENT_PREFIX): value
        for key, value in properties.items()
        if key.startswith(_SENT_PREFIX)
    }
    return found | ({_LOG_CONFIG: properties[_LOG_CONFIG]} if _LOG_CONFIG in properties else {})


def rule_json(rule: EgressRule) -> dict[str, Any]:
    """A rule as the Garden protocol has it (Garden HTTP protocol §2.4); parts that it does not have are left out."""
    found: dict[str, Any] = {"protocol": _PROTOCOLS[rule.protocol]}
    if rule.networks:
        found["networks"] = [{"start": str(each.start), "end": str(each.end)} for each in rule.networks]
    if rule.ports:
        found["ports"] = [{"start": each.start, "end": each.end} for each in rule.ports]
    if rule.icmp is not None:
        code = {} if rule.icmp.code is None else {"code": rule.icmp.code}
        found["icmps"] = {"type": rule.icmp.type, **code}
    if rule.log:
        found["log"] = True
    return found
