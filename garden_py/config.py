"""The server's settings: one frozen Config, filled from defaults, a TOML file, GARDEN_* variables and flags.

Later sources win: default < file < environment < flag. Each field's description is the flag's help text.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from garden_py.model.device import parse_device_rule
from garden_py.model.errors import FieldViolation, InvalidRequest
from garden_py.model.network import has_unicast_only
from garden_py.model.size import parse_size
from garden_py.model.spec import GRACE_TIME_MAX_S
from garden_py.observe.failpoints import parse_fail_point

ENV_PREFIX = "GARDEN_"
SETTINGS = "settings"
"""The field of a violation that is about several settings together."""
# systemd leaves 0x70000000 to 0x7fffffff unassigned (UIDS-GIDS.md), above its own and subuid(5)'s ranges.
UID_POOL_START = 0x7000_0000
UIDS_PER_CONTAINER = 65_536
_UNIT_NAME_MAX = 255  # systemd.unit(5)
_SLICE = re.compile(r"(-|[A-Za-z0-9:_.\\@]+(-[A-Za-z0-9:_.\\@]+)*)\.slice", re.ASCII)


def _parse_bytes(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


ByteCount = Annotated[int, BeforeValidator(_parse_bytes)]
"""A number of bytes, or text such as 512M or 20G (model/size.py)."""


# Unspecified and loopback with what is mapped to IPv4, its translations, 6to4, link-local, site-local, multicast:
# RFC 4291 §2.4, RFC 6052, RFC 8215, RFC 3056, RFC 3879.
_NO_POOLS_V6 = tuple(
    map(
        ipaddress.IPv6Network,
        ("::/32", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
)


_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RegistrySettings(BaseModel):
    """How one registry is reached: a table `[registry."HOST:PORT"]` of the configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mirrors: Annotated[
        tuple[str, ...],
        Field(
            description="HOST[:PORT][/PREFIX] to ask first, in this order, with the caller's user and password."
        ),
    ] = ()
    ca: Annotated[
        Path | None,
        Field(
            description="PEM file that the registry's certificate must chain to; none: as the host trusts."
        ),
    ] = None
    plain_http: Annotated[bool, Field(description="As --insecure-registry.")] = False


class Config(BaseModel):
    """Everything the server can be told. Frozen; read by the modules named in each group."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # -- doors: api/grpc/server.py
    listen: Annotated[str, Field(description="Address of the gRPC door: unix:PATH or HOST:PORT.")] = ""
    socket_mode: Annotated[str, Field(description="Mode of the unix socket, octal.")] = "0660"
    socket_group: Annotated[
        str, Field(description="Group that owns the unix socket; empty: the server's.")
    ] = ""
    insecure_loopback: Annotated[
        bool, Field(description="Allow a TCP door without TLS, on loopback addresses only.")
    ] = False
    tls_cert: Annotated[Path | None, Field(description="Server certificate (PEM) for a TCP door.")] = None
    tls_key: Annotated[Path | None, Field(description="Key of the server certificate (PEM).")] = None
    tls_client_ca: Annotated[
        Path | None, Field(description="CA (PEM) that client certificates must chain to.")
    ] = None
    max_message_bytes: Annotated[
        ByteCount,
        Field(ge=1 << 20, le=64 << 20, description="Largest gRPC message taken, in bytes or as 16M."),
    ] = 16 << 20

    # -- the Garden door: api/http/door.py
    garden_http: Annotated[
        str, Field(description="Address for Garden clients: unix:PATH or HOST:PORT; empty: nowhere.")
    ] = ""
    garden_http_mode: Annotated[
        str,
        Field(
            description="Mode of the Garden door's unix socket, octal; empty: 0660, or 0777 with --compat garden."
        ),
    ] = ""
    garden_http_group: Annotated[
        str, Field(description="Group that owns the Garden door's unix socket; empty: the server's.")
    ] = ""
    garden_http_insecure: Annotated[
        bool,
        Field(
            description="Allow --garden-http on an address that others can reach: it asks for no password."
        ),
    ] = False
    no_attach_cursor: Annotated[
        bool,
        Field(
            description="A Garden client that attaches again reads from now on, not from where the last one stopped."
        ),
    ] = False
    read_header_timeout_s: Annotated[
        float, Field(ge=0, description="Seconds a Garden client may take for a request's head; 0: any time.")
    ] = 30.0

    # -- places: wiring.py, backend
    state_dir: Annotated[
        Path, Field(description="Journal, containers' writable layers and output. On a disk, not on a tmpfs.")
    ] = Path("/var/lib/garden")
    run_dir: Annotated[Path, Field(description="Sockets, runtime state, mount points. A tmpfs is fine.")] = (
        Path("/run/garden")
    )
    store_size: Annotated[
        ByteCount,
        Field(
            ge=0,
            description="Size of a store of its own for images and writable layers: a btrfs in a sparse file below "
            "--state-dir, in bytes or as 20G. It lets disk space be limited on any file system, and bounds it in all. "
            "It grows with this setting, and never shrinks. 0: none, unless there is one already.",
        ),
    ] = 0
    default_rootfs: Annotated[
        str,
        Field(description="Image of containers that name none, of any kind; empty: an embedded busybox."),
    ] = ""

    # -- images: backend/images
    image_pull: Annotated[
        Literal["always", "missing"],
        Field(
            description="always: a registry is asked at every create; missing: only for an image that is not in the "
            "store by its name, or was fetched with another password. Layers in the store are never fetched again."
        ),
    ] = "always"
    image_stall_s: Annotated[
        float,
        Field(gt=0, description="Seconds without any progress until the fetch of an image is given up."),
    ] = 60.0
    image_max_bytes: Annotated[
        ByteCount, Field(ge=1 << 20, description="Largest image taken, unpacked, in bytes or as 20G.")
    ] = 32 << 30
    image_max_entries: Annotated[int, Field(ge=1, description="Most files and directories in an image.")] = (
        2_000_000
    )
    image_gc_bytes: Annotated[
        ByteCount,
        Field(
            ge=0,
            description="Above this many bytes of unpacked layers, e.g. 20G, images that no container uses go: "
            "those unused for longest first; 0: never.",
        ),
    ] = 64 << 30
    no_image_plugin: Annotated[
        bool, Field(description="Make containers of directories only; other kinds of images are refused.")
    ] = False
    image_plugin: Annotated[
        str,
        Field(
            description="Program that makes the root file systems of unprivileged containers, in place of the server; "
            "but of directories, and of images in the server's store."
        ),
    ] = ""
    image_plugin_extra_arg: Annotated[
        tuple[str, ...], Field(description="Argument for it, before all others; repeatable.")
    ] = ()
    privileged_image_plugin: Annotated[
        str, Field(description="As --image-plugin, for privileged containers.")
    ] = ""
    privileged_image_plugin_extra_arg: Annotated[
        tuple[str, ...], Field(description="Argument for it, before all others; repeatable.")
    ] = ()
    image_plugin_timeout_s: Annotated[
        float,
        Field(gt=0, description="Seconds until an image plugin that makes a root file system is killed."),
    ] = 600.0
    docker_registry: Annotated[
        str, Field(description="Registry that stands for Docker Hub in docker:///repository.")
    ] = "docker.io"
    insecure_registry: Annotated[
        tuple[str, ...],
        Field(
            description="HOST[:PORT] of a registry that may be spoken to without TLS, or with a certificate that "
            "nobody vouches for; repeatable."
        ),
    ] = ()
    registry: Annotated[
        dict[str, RegistrySettings],
        Field(
            description="Mirrors and certificates of registries, by HOST[:PORT]; in the configuration file only."
        ),
    ] = {}

    # -- backend
    backend: Annotated[str, Field(description="Backend by entry point name (group garden_py.backends).")] = (
        "linux"
    )
    runtime: Annotated[str, Field(description="OCI runtime: runc, crun, or a path to one of them.")] = "runc"
    launchers: Annotated[
        int,
        Field(
            ge=1, le=64, description="Worker processes that run the OCI runtime, i.e. creates in parallel."
        ),
    ] = 4
    create_timeout_s: Annotated[float, Field(gt=0, description="Deadline of one create, in seconds.")] = 30.0
    destroy_timeout_s: Annotated[
        float, Field(gt=0, description="Seconds until a destroy that the kernel blocks answers UNKILLABLE.")
    ] = 10.0
    agent_patience_s: Annotated[
        float, Field(gt=0, description="Seconds until an agent that does not answer breaks its container.")
    ] = 20.0
    agent_check_s: Annotated[
        float, Field(gt=0, description="Seconds between questions whether a silent agent still answers.")
    ] = 60.0
    uid_pool_start: Annotated[
        int,
        Field(ge=65_536, le=0xFFFF_0000, description="First host uid given to containers' user namespaces."),
    ] = UID_POOL_START
    uid_pool_size: Annotated[
        int, Field(ge=1, le=4096, description="Number of uid ranges (65536 ids each).")
    ] = 4096

    # -- cgroups: backend/linux/cgroup_driver.py
    cgroup_driver: Annotated[
        Literal["cgroupfs", "systemd"],
        Field(
            description="Who makes the cgroup that containers are in: the server, or systemd, as a scope "
            "(cgroup v2 only). Containers stay in the one that they were made in."
        ),
    ] = "cgroupfs"
    cgroup_slice: Annotated[
        str, Field(description="Slice of systemd that the scope is in, with --cgroup-driver systemd.")
    ] = "garden.slice"

    # -- memory: backend/cgroup/limits.py
    disable_swap_limit: Annotated[
        bool,
        Field(
            description="Let containers and processes with a memory limit use as much swap as there is, unless they "
            "state how much; else they get none."
        ),
    ] = False

    # -- processor time: service/containers.py, service/throttling.py
    cpu_quota_per_share: Annotated[
        int,
        Field(
            ge=0,
            le=1_000_000,
            description="Microseconds of CPU time per CPU share in each period of 100000, as the quota of containers, "
            "and of sidecars beside them, that state shares or a weight and no quota; 0: none.",
        ),
    ] = 0
    cpu_entitlement_per_share: Annotated[
        float,
        Field(
            ge=0,
            le=1e6,
            description="Percent of one core that a CPU share entitles to; 0: all cores, divided by the host's memory "
            "in MiB.",
        ),
    ] = 0.0
    enable_cpu_throttling: Annotated[
        bool,
        Field(
            description="Give containers that used more CPU time than their shares entitle to only what the others "
            "leave. On cgroup v1 of containers that are made from then on."
        ),
    ] = False
    cpu_throttling_check_interval: Annotated[
        float, Field(gt=0, description="Seconds between two looks at who used more than that.")
    ] = 15.0

    # -- block I/O: backend/linux/block_io.py
    default_container_blockio_weight: Annotated[
        int, Field(ge=0, le=10_000, description="Weight of containers' block I/O that state none; 0: none.")
    ] = 0
    container_io_max_read_bps: Annotated[
        ByteCount,
        Field(
            ge=0,
            description="Most bytes read per second of a container that states none, per block device; 0: any.",
        ),
    ] = 0
    container_io_max_write_bps: Annotated[
        ByteCount,
        Field(
            ge=0,
            description="Most bytes written per second of a container that states none, per block device; 0: any.",
        ),
    ] = 0
    container_io_max_read_iops: Annotated[
        int,
        Field(
            ge=0,
            description="Most reads per second of a container that states none, per block device; 0: any.",
        ),
    ] = 0
    container_io_max_write_iops: Annotated[
        int,
        Field(
            ge=0,
            description="Most writes per second of a container that states none, per block device; 0: any.",
        ),
    ] = 0

    # -- isolation: backend/linux/launching.py
    apparmor: Annotated[
        str, Field(description="AppArmor profile of unprivileged containers' processes; empty: none.")
    ] = ""
    no_new_privileges: Annotated[
        bool, Field(description="In unprivileged containers, no program gains privileges by being executed.")
    ] = False
    device_cgroup_rule: Annotated[
        tuple[str, ...],
        Field(
            description="Devices that processes in privileged containers may use besides those of all containers, as "
            "'TYPE MAJOR:MINOR ACCESS', e.g. 'c 10:232 rwm' (/dev/kvm); of containers that are made from then on; "
            "repeatable."
        ),
    ] = ()
    tcp_keepalive_time: Annotated[
        int,
        Field(
            ge=0,
            le=2_147_483,
            description="net.ipv4.tcp_keepalive_time of containers, in seconds; 0: the host's.",
        ),
    ] = 0
    tcp_keepalive_interval: Annotated[
        int,
        Field(
            ge=0,
            le=2_147_483,
            description="net.ipv4.tcp_keepalive_intvl of containers, in seconds; 0: the host's.",
        ),
    ] = 0
    tcp_keepalive_probes: Annotated[
        int, Field(ge=0, le=255, description="net.ipv4.tcp_keepalive_probes of containers; 0: the host's.")
    ] = 0
    tcp_retries1: Annotated[
        int, Field(ge=0, le=255, description="net.ipv4.tcp_retries1 of containers; 0: the host's.")
    ] = 0
    tcp_retries2: Annotated[
        int, Field(ge=0, le=255, description="net.ipv4.tcp_retries2 of containers; 0: the host's.")
    ] = 0
    compat: Annotated[
        Literal["none", "garden"],
        Field(
            description="garden: be no stricter than the Garden reference: one mapping of user ids for all containers, "
            "inheritable capabilities, the host's cgroup namespace, a Garden socket that is open to all."
        ),
    ] = "none"

    # -- network: backend/net
    network_pool: Annotated[
        ipaddress.IPv4Network, Field(description="Addresses of containers; its first one is the host's.")
    ] = ipaddress.IPv4Network("10.254.0.0/22")
    network_pool_v6: Annotated[
        ipaddress.IPv6Network | None,
        Field(
            description="IPv6 addresses of containers, /32 to /96, e.g. fd12:3456:789a::/64: each has its IPv4 "
            "address in the last 32 bits; without a pool they have no IPv6. Only those of fc00::/7 are masqueraded."
        ),
    ] = None
    port_pool_start: Annotated[int, Field(ge=1024, le=65_535, description="First host port of the pool.")] = (
        61_001
    )
    port_pool_size: Annotated[
        int, Field(ge=1, le=64_512, description="Number of host ports in the pool.")
    ] = 4_534
    external_ip: Annotated[
        str, Field(description="Address that mapped ports are reported under; empty: the host's own.")
    ] = ""
    allow_host_access: Annotated[
        bool, Field(description="Let containers reach the host's own addresses.")
    ] = False
    container_access: Annotated[
        Literal["all", "subnet", "none"],
        Field(
            description="Which other containers a container reaches by their addresses: all, those of its own chosen "
            "subnet, or none."
        ),
    ] = "all"
    deny_network: Annotated[
        tuple[_Network, ...],
        Field(
            description="Network that containers may not connect to unless a rule of theirs allows it, e.g. "
            "169.254.0.0/16; repeatable."
        ),
    ] = ()
    default_egress: Annotated[
        Literal["allow", "deny"], Field(description="Egress policy of containers that state none.")
    ] = "allow"
    dns_server: Annotated[
        tuple[str, ...], Field(description="DNS server for containers instead of the host's; repeatable.")
    ] = ()
    additional_dns_server: Annotated[
        tuple[str, ...], Field(description="DNS server for containers after all others; repeatable.")
    ] = ()
    additional_host_entry: Annotated[
        tuple[str, ...],
        Field(description="Line for containers' /etc/hosts, e.g. '10.0.0.1 name'; repeatable."),
    ] = ()
    network_plugin: Annotated[
        str,
        Field(
            description="Program that connects containers to a network, opens destinations and maps ports, in place of "
            "the server, which then makes no links, addresses and rules of its own."
        ),
    ] = ""
    network_plugin_extra_arg: Annotated[
        tuple[str, ...], Field(description="Argument for it, before all others; repeatable.")
    ] = ()
    mtu: Annotated[int, Field(ge=0, le=65_535, description="MTU of containers' links; 0: the uplink's.")] = 0

    # -- observe: api/pages.py, service/janitor.py
    debug: Annotated[
        str,
        Field(description="HOST:PORT, loopback, to serve /debug/vars and /debug/tasks on; empty: nowhere."),
    ] = ""
    metrics: Annotated[
        str, Field(description="HOST:PORT to serve /metrics on, for Prometheus; empty: nowhere.")
    ] = ""
    metrics_insecure: Annotated[
        bool,
        Field(description="Allow --metrics on an address that others can reach: it asks for no password."),
    ] = False
    otel_endpoint: Annotated[
        str,
        Field(
            description="URL of an OpenTelemetry collector, for OTLP over HTTP, that gets a trace of each create and "
            "destroy, e.g. http://127.0.0.1:4318; needs the extra garden-py[otel]; empty: none does."
        ),
    ] = ""
    janitor_interval_s: Annotated[
        float,
        Field(
            ge=0, description="Seconds between two searches for leaks, which are removed; 0: never search."
        ),
    ] = 60.0

    # -- service
    max_containers: Annotated[
        int, Field(ge=0, description="Most containers at a time; 0: as many as the pools allow.")
    ] = 0
    destroy_containers_on_startup: Annotated[
        bool, Field(description="Destroy all containers that an earlier server has left before serving.")
    ] = False
    disable_privileged_containers: Annotated[
        bool, Field(description="Refuse to create privileged containers; those there are stay.")
    ] = False
    default_grace_time_s: Annotated[
        float,
        Field(
            ge=0,
            le=GRACE_TIME_MAX_S,
            description="Seconds an unused container lives if it states nothing; 0: for ever.",
        ),
    ] = 0.0
    output_retention_bytes: Annotated[
        ByteCount, Field(ge=64 << 10, description="Output kept per stream of a process, in bytes or as 64M.")
    ] = 64 << 20

    # -- observe
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least level of log lines.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "json", "text"], Field(description="Form of log lines; auto: text on a terminal.")
    ] = "auto"

    # -- tests: observe/failpoints.py
    fail_points: Annotated[
        tuple[str, ...],
        Field(
            description="For testers: POINT:ACTION to fail once at a step (docs/debugging.md); repeatable."
        ),
    ] = ()

    @field_validator("fail_points")
    @classmethod
    def _known_fail_points(cls, points: tuple[str, ...]) -> tuple[str, ...]:
        for point in points:
            parse_fail_point(point)
        return points

    @field_validator("device_cgroup_rule")
    @classmethod
    def _device_rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            parse_device_rule(rule)
        return rules

    @field_validator("state_dir", "run_dir")
    @classmethod
    def _plain_absolute(cls, path: Path) -> Path:
        # ':' and ',' separate overlayfs's mount options (overlayfs.rst); a short run_dir leaves room for socket
        # names within sun_path's 108 bytes (unix(7)).
        if not path.is_absolute() or set(str(path)) & set(":,\\\n"):
            raise ValueError("must be an absolute path without ':' ',' or backslash")
        if len(str(path)) > 70:
            raise ValueError("is too long: at most 70 characters leave room for unix socket names")
        return path

    @field_validator("mtu")
    @classmethod
    def _links_take(cls, mtu: int) -> int:
        if 0 < mtu < 68:
            raise ValueError("must be 0 or at least 68 (RFC 791)")
        return mtu

    @field_validator("network_pool")
    @classmethod
    def _room_for_containers(cls, pool: ipaddress.IPv4Network) -> ipaddress.IPv4Network:
        if not 8 <= pool.prefixlen <= 29:
            raise ValueError("must be a network of /8 to /29")
        if not has_unicast_only(pool):
            raise ValueError("must be a network of unicast addresses, e.g. of 10.0.0.0/8")
        return pool

    @field_validator("network_pool_v6")
    @classmethod
    def _room_for_ipv4(cls, pool: ipaddress.IPv6Network | None) -> ipaddress.IPv6Network | None:
        if pool is None:
            return None
        if not 32 <= pool.prefixlen <= 96:
            raise ValueError("must be a network of /32 to /96: the last 32 bits are the IPv4 address")
        if any(pool.overlaps(other) for other in _NO_POOLS_V6):
            raise ValueError("must be a network of unicast addresses, e.g. of fd00::/8")
        return pool

    @field_validator("cgroup_slice")
    @classmethod
    def _slice(cls, name: str) -> str:
        # systemd.slice(5): "-" stands between the names of a slice and of those that it is in; "-.slice" is the root.
        if not _SLICE.fullmatch(name) or len(name) > _UNIT_NAME_MAX:
            raise ValueError("must be the name of a slice of systemd, such as garden.slice")
        return name

    @field_validator("socket_mode", "garden_http_mode")
    @classmethod
    def _octal(cls, mode: str) -> str:
        if mode and not re.fullmatch(r"0?[0-7]{1,3}", mode, re.ASCII):
            raise ValueError("must be an octal mode such as 0660")
        return mode

    @field_validator("deny_network", mode="before")
    @classmethod
    def _networks(cls, networks: Any) -> tuple[_Network, ...]:
        # By pydantic each is tried as IPv4 and as IPv6, and refused twice.
        written = networks if isinstance(networks, list | tuple) else (networks,)
        return tuple(_parse_network(str(each)) for each in written)

    @field_validator("external_ip")
    @classmethod
    def _address(cls, text: str) -> str:
        return text and str(_parse_address(text))

    @field_validator("dns_server", "additional_dns_server")
    @classmethod
    def _servers_of_containers(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for text in servers:
            address = _parse_address(text)
            if address.is_loopback or address.is_unspecified:
                raise ValueError(
                    f"{text} is a container itself, when a container asks; it has no DNS server there"
                )
            if isinstance(address, ipaddress.IPv6Address) and (address.is_link_local or address.scope_id):
                raise ValueError(f"{text} means nothing beyond one link")
        return servers

    @field_validator("additional_host_entry")
    @classmethod
    def _host_entries(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            words = entry.split()
            if len(words) < 2 or "\n" in entry:
                raise ValueError(f"{entry!r} is not 'ADDRESS NAME…'")
            _parse_address(words[0])
        return entries

    @model_validator(mode="after")
    def _ipv6_fits(self) -> Config:
        if self.network_pool_v6 is not None and 0 < self.mtu < 1280:
            raise ValueError("mtu must be 1280 or more with network_pool_v6 (RFC 8200)")
        return self

    @model_validator(mode="after")
    def _plugins_fit(self) -> Config:
        for name in ("image_plugin", "privileged_image_plugin", "network_plugin"):
            program, arguments = getattr(self, name), getattr(self, f"{name}_extra_arg")
            if program and not program.startswith("/"):
                raise ValueError(f"{name} must be an absolute path")
            if arguments and not program:
                raise ValueError(f"{name}_extra_arg goes with {name}")
        if self.no_image_plugin and (self.image_plugin or self.privileged_image_plugin):
            raise ValueError("no_image_plugin contradicts image_plugin and privileged_image_plugin")
        return self

    @model_validator(mode="after")
    def _pools_fit(self) -> Config:
        if self.port_pool_start + self.port_pool_size > 65_536:
            raise ValueError("port_pool_start + port_pool_size must not exceed 65536")
        if self.uid_pool_start + self.uid_pool_size * UIDS_PER_CONTAINER > 0xFFFF_FFFF:
            raise ValueError("uid_pool_start + 65536 * uid_pool_size must stay below 2^32 - 1")
        return self

    @property
    def listen_address(self) -> str:
        """Where the gRPC door is: `listen`, else `garden.sock` in the run directory."""
        return self.listen or f"unix:{self.run_dir}/garden.sock"

    @property
    def garden_http_socket_mode(self) -> int:
        """Mode of the Garden door's unix socket."""
        return int(self.garden_http_mode or ("0777" if self.compat == "garden" else "0660"), 8)

    @property
    def tag(self) -> str:
        """Four hex digits that tell this server's links, cgroups and tables from another server's.

        Derived from the state directory, so a restarted server finds what it made.
        """
        return hashlib.sha256(os.fsencode(self.state_dir)).hexdigest()[:4]


def load_config(
    flags: Mapping[str, Any], *, file: Path | None = None, environ: Mapping[str, str] | None = None
) -> Config:
    """Put a Config together from its sources.

    Args:
        flags: settings given on the command line, by field name; the strongest source.
        file: a TOML file with field names as keys, `-` or `_` alike.
        environ: variables; `GARDEN_<FIELD>` sets a field, lists are separated by commas.

    Raises:
        InvalidRequest: with one violation per bad setting, named as in the source.
    """
    in_file = {} if file is None else _from_file(file)
    in_environ = _from_environ(os.environ if environ is None else environ)
    try:
        return Config(**{**in_file, **in_environ, **flags})
    except ValidationError as error:
        found = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]) or SETTINGS
            setting = name.partition(".")[0]
            if setting not in flags and setting in in_environ:
                name = ENV_PREFIX + setting.upper()
            elif setting not in flags and setting in in_file:
                name = f"{file}: {name}"
            found.append(FieldViolation(name, _words(problem)))
        raise InvalidRequest(found) from error


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an IP address") from error


def _parse_network(text: str) -> _Network:
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a network, such as 169.254.0.0/16") from error
    if str(found.network_address) != str(ipaddress.ip_address(text.partition("/")[0])):
        raise ValueError(f"{text!r} is an address in a network; the network is {found}")
    return found


_WORDS: Final = {
    "int_parsing": "is not a whole number",
    "float_parsing": "is not a number",
    "bool_parsing": "is neither true nor false",
}


def _words(problem: ErrorDetails) -> str:
    """What is wrong with a setting, in a user's words where pydantic's are a programmer's."""
    if problem["type"] == "extra_forbidden":
        import difflib  # only here: a server's start is to be short

        near = difflib.get_close_matches(str(problem["loc"][-1]), Config.model_fields, n=1)
        return "there is no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if problem["type"] in _WORDS:
        return f"{problem['input']!r} {_WORDS[problem['type']]}"
    return problem["msg"].removeprefix("Value error, ")


def _from_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            found = tomllib.load(stream)
    except OSError as error:
        raise InvalidRequest([FieldViolation("config", f"{file}: {error.strerror}")]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest([FieldViolation("config", f"{file}: {error}")]) from error
    return {key.replace("-", "_"): value for key, value in found.items()}


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if "dict" in str(field.annotation):
            continue  # a table of the configuration file
        text = environ.get(ENV_PREFIX + name.upper())
        if text is None:
            continue
        repeatable = "tuple" in str(field.annotation)
        found[name] = tuple(filter(None, text.split(","))) if repeatable else text
    return found
