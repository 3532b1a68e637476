"""The `garden doctor` command: runs every check and prints what it found."""

from __future__ import annotations

import ipaddress
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.doctor import identity, images, kernel, network, runtimes, storage
from garden_py.cli.doctor.finding import Finding, Level
from garden_py.cli.doctor.leaks import DEFAULT_STATE_DIR, report_leaks

_COLOURS = {Level.OK: "\x1b[32m", Level.WARN: "\x1b[33m", Level.FAIL: "\x1b[31m"}
_UIDS_PER_CONTAINER = 65_536
_MAX_COLUMNS = 110


@dataclass(frozen=True, slots=True)
class Plan:
    """The server's settings that checks depend on; the defaults are the server's."""

    state_dir: Path
    runtime: str
    pool: ipaddress.IPv4Network
    uid_start: int
    uid_ranges: int
    pool_v6: ipaddress.IPv6Network | None = None
    dns_servers: tuple[str, ...] = ()


def doctor(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    leaks: Annotated[
        bool, typer.Option("--leaks", help="Instead: compare a server's journal with what is on the host.")
    ] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="With --leaks: remove orphans that are surely the server's own.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="With --leaks: ask this server.  [default: the one on --state-dir, if it runs; without that flag "
            "the one at GARDEN_ADDRESS, if set]",
            show_default=False,
        ),
    ] = None,
    state_dir: Annotated[
        str,
        typer.Option("--state-dir", metavar="DIR", envvar="GARDEN_STATE_DIR", help="As for `garden server`."),
    ] = str(DEFAULT_STATE_DIR),
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME", help="As for `garden server`.")
    ] = "runc",
    network_pool: Annotated[
        str, typer.Option("--network-pool", metavar="CIDR", help="As for `garden server`.")
    ] = "10.254.0.0/22",
    network_pool_v6: Annotated[
        str, typer.Option("--network-pool-v6", metavar="CIDR", help="As for `garden server`.")
    ] = "",
    dns_server: Annotated[
        list[str] | None,
        typer.Option("--dns-server", metavar="ADDRESS", help="As for `garden server`; repeatable."),
    ] = None,
    uid_pool_start: Annotated[
        int, typer.Option("--uid-pool-start", metavar="UID", help="As for `garden server`.")
    ] = 0x7000_0000,
    uid_pool_size: Annotated[
        int, typer.Option("--uid-pool-size", metavar="N", help="As for `garden server`.")
    ] = 4096,
) -> None:
    """Check what this host can do for containers, or with --leaks what a server has left on it.

    Most things are found out by trying them, in namespaces that vanish with the trial; nothing is changed and
    no server is needed. Exit code 1 if something is missing that no container can do without (FAIL).

        garden doctor

        garden doctor --json | jq '.[] | select(.level != "OK")'

    --leaks compares journal and host, both ways: `orphan` is on the host, carries the server's name, and belongs
    to no container; `missing` should be there for a running container and is not. It asks the server on
    --state-dir, or reads the journal itself if that server is stopped (it cannot start meanwhile). Both need root,
    and without it a server is asked: that of --address, else the one at the default address. What
    is being made or destroyed is neither; what is found must be found twice, a second apart. Exit code 1 if a leak
    is left. GARDEN_ADDRESS names the server as for other commands, unless --state-dir is given. --fix removes
    orphans; what only looks like the server's is kept, and the last column says why. A
    running server does the same by itself, see `garden server --janitor-interval-s`.

        garden doctor --leaks

        garden doctor --leaks --fix --state-dir /srv/garden -o json
    """
    if fix and not leaks:
        raise parse.BadInput("--fix goes with --leaks")
    if as_json:
        output = render.OutputFormat.JSON
    if not state_dir.startswith("/"):
        raise parse.BadInput(f"--state-dir: {state_dir!r} is not an absolute path")
    if leaks:
        report_leaks(context, Path(state_dir), address, output, fix=fix)
        return
    try:
        pool = ipaddress.IPv4Network(network_pool)
    except ValueError as error:
        raise parse.BadInput(f"--network-pool: {error}") from error
    try:
        pool_v6 = ipaddress.IPv6Network(network_pool_v6) if network_pool_v6 else None
    except ValueError as error:
        raise parse.BadInput(f"--network-pool-v6: {error}") from error
    servers = tuple(dns_server or ())
    plan = Plan(Path(state_dir), runtime, pool, uid_pool_start, uid_pool_size, pool_v6, servers)
    findings = run_checks(plan)
    if output is render.OutputFormat.JSON:
        render.print_json(findings)
    else:
        _print_findings(findings)
    if any(finding.level is Level.FAIL for finding in findings):
        raise typer.Exit(1)


def run_checks(plan: Plan) -> list[Finding]:
    """Every check, in the order in which a reader wants to know."""
    checks: list[Callable[[], Finding | list[Finding]]] = [
        kernel.check_root,
        lambda: Finding("kernel", Level.OK, f"{os.uname().release} {os.uname().machine}"),
        kernel.check_user_namespaces,
        lambda: kernel.check_overlayfs(plan.state_dir),
        lambda: kernel.check_idmapped_mounts(plan.state_dir),
        lambda: kernel.check_idmapped_overlay(plan.state_dir),
        kernel.check_cgroups,
        kernel.check_systemd,
        kernel.check_seccomp,
        kernel.check_apparmor,
        kernel.check_pidfd,
        lambda: kernel.check_splice(plan.state_dir),
        lambda: runtimes.check_runtimes(plan.runtime),
        network.check_libnftables,
        network.check_nf_tables,
        network.check_nflog,
        network.check_ctnetlink,
        network.check_link_egress,
        network.check_bridge_family,
        network.check_links,
        lambda: network.check_address_pool(plan.pool, _tag_of(plan.state_dir)),
        lambda: network.check_names(plan.pool, plan.dns_servers, has_ipv6=plan.pool_v6 is not None),
        network.check_forwarding,
        lambda: [] if plan.pool_v6 is None else network.check_ipv6(plan.pool_v6),
        network.check_conntrack,
        lambda: storage.check_state_directory(plan.state_dir),
        lambda: storage.check_disk_quota(plan.state_dir),
        images.check_images,
        identity.check_capabilities,
        lambda: identity.check_uid_pool(plan.uid_start, plan.uid_ranges * _UIDS_PER_CONTAINER),
        identity.check_memory,
        identity.check_open_files,
        identity.check_process_numbers,
        check_busybox,
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            outcome = check()
        except OSError as error:  # e.g. without root there may be no directory to try things in
            outcome = Finding("check", Level.FAIL, f"could not be made: {error}")
        findings += outcome if isinstance(outcome, list) else [outcome]
    return findings


def _tag_of(state_dir: Path) -> str:
    """What marks the links of a server with this state directory."""
    from garden_py.config import Config  # takes longer to load than most commands take

    return Config(state_dir=state_dir).tag


def check_busybox() -> Finding:
    """The root file system of containers that name no image is made from it."""
    path = shutil.which("busybox")
    if path is not None:
        return Finding("busybox", Level.OK, path)
    return Finding(
        "busybox",
        Level.WARN,
        "not installed",
        "containers must name an image, or the server a --default-rootfs",
        "apt install busybox-static",
    )


def _print_findings(findings: list[Finding]) -> None:
    width = max(len(finding.check) for finding in findings)
    colour = sys.stdout.isatty()
    for finding in findings:
        mark = finding.level.ljust(4)
        if colour:
            mark = f"{_COLOURS[finding.level]}{mark}\x1b[0m"
        typer.echo(f"{mark}  {finding.check.ljust(width)}  {finding.found}")
        for heading, text in (("cost: ", finding.cost), ("get it: ", finding.remedy)):
            if text:
                typer.echo(_wrapped(heading, text, indent=width + 8))
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    typer.echo(
        f"\n{len(findings)} checks: " + ", ".join(f"{count} {level}" for level, count in counts.items())
    )


def _wrapped(heading: str, text: str, *, indent: int) -> str:
    columns = min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
    blanks = " " * indent
    return textwrap.fill(
        text, max(columns, indent + 40), initial_indent=blanks + heading, subsequent_indent=blanks + "  "
    )
