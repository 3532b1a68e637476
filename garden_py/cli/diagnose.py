"""Commands about one container for who wonders what is wrong with it: inspect, diagnose."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render
from garden_py.cli.containers import info_fields
from garden_py.cli.egress import format_rule
from garden_py.cli.processes import PS_HEADINGS, ps_row

if TYPE_CHECKING:
    from garden_py.client import Container, ContainerInfo, ContainerMetrics, EgressPolicy, Limits, ProcessInfo


def diagnose(context: typer.Context, handle: opt.HandleArgument, address: opt.AddressOption = None) -> None:
    """Write all that can be found out about a container, as a tar on stdout.

    State, OCI configuration, the latest exchanges with the agent, cgroup files, rules, mounts, processes, events and
    log lines; whatever state the container is in. summary.json says which parts could not be had. Values of environment
    variables are removed, command lines are not: look before you publish it.

    garden diagnose web > bundle.tar
    """
    if sys.stdout.isatty():
        raise parse.BadInput(
            "a tar is nothing for a terminal; say where to: garden diagnose HANDLE > bundle.tar"
        )
    with opt.connect(context, address) as garden:
        for piece in garden.container(handle).diagnose():
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@dataclass(slots=True)
class Overview:
    """Everything about one container; what could not be asked for is None and in `problems`.

    Attributes:
        limits: in force, as the kernel has them.
        egress: with the counters of its rules; None also of a container without a link of its own.
        problems: why there is no answer, by field.
    """

    container: ContainerInfo
    limits: Limits | None = None
    egress: EgressPolicy | None = None
    processes: list[ProcessInfo] | None = None
    metrics: ContainerMetrics | None = None
    problems: dict[str, str] = field(default_factory=dict)


def inspect(
    context: typer.Context,
    handle: opt.HandleArgument,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show everything about a container.

    Spec, state, addresses, image, limits in force, egress policy with counters, ports, processes, usage, agent. Of a
    broken container, what can still be asked for.

        garden inspect web

        garden inspect web -o json | jq .egress.rules
    """
    with opt.connect(context, address) as garden:
        found = look_at(garden.container(handle))
    if output is render.OutputFormat.JSON:
        render.print_json(found)
    else:
        _print_overview(found)


def look_at(container: Container) -> Overview:
    """Ask for everything.

    Raises:
        GardenError: there is no such container, or no server.
    """
    from garden_py.client.errors import GardenError
    from garden_py.client.values import NetworkMode

    found = Overview(container.info())
    questions: Mapping[str, Callable[[], Any]] = {
        "limits": container.limits,
        "egress": container.egress,
        "processes": container.processes,
        "metrics": container.metrics,
    }
    has_link = found.container.spec.network_mode is NetworkMode.OWN
    for name, ask in questions.items():
        if name == "egress" and not has_link:
            continue
        try:
            setattr(found, name, ask())
        except GardenError as error:
            found.problems[name] = str(error)
    if found.metrics is not None and found.metrics.error:
        found.problems["metrics"], found.metrics = found.metrics.error, None
    return found


def _print_overview(found: Overview) -> None:
    fields = info_fields(found.container)
    if found.limits is not None:
        fields["limits"] = render.limits_text(found.limits)
    if found.egress is None and "egress" not in found.problems:
        fields["egress"] = "none: the container has no link of its own"
    fields["environment"] = ", ".join(sorted(found.container.spec.env))
    render.print_fields(fields)
    if found.metrics is not None:
        _begin("usage")
        render.print_fields(_usage_fields(found.metrics))
    if found.egress is not None:
        _begin("egress")
        render.print_table(["#", "RULE", "PACKETS", "BYTES"], _policy_rows(found.egress))
    if found.processes:
        _begin("processes")
        render.print_table(PS_HEADINGS, [ps_row(each) for each in found.processes])
    if found.problems:
        _begin("no answer")
        render.print_fields(found.problems)


def _begin(section: str) -> None:
    sys.stdout.write(f"\n{section}\n")


def _usage_fields(usage: ContainerMetrics) -> dict[str, str]:
    size = parse.format_size
    return {
        "cpu": f"{usage.cpu_usage_ns / 1e9:.2f}s, throttled for {usage.cpu_throttled_ns / 1e9:.2f}s",
        "memory": f"{size(usage.memory_bytes)}, at most {size(usage.memory_peak_bytes)} so far, "
        f"working set {size(usage.memory_working_set_bytes)}",
        "disk": f"{size(usage.disk_exclusive_bytes)} of its own, {size(usage.disk_total_bytes)} with the image",
        "network": f"{size(usage.network_rx_bytes)} in, {size(usage.network_tx_bytes)} out",
        "pids": str(usage.pids),
        "out of memory": f"{usage.oom_kills} killed" if usage.oom_kills else "",
    }


def _policy_rows(policy: EgressPolicy) -> list[list[str]]:
    rows = [
        [str(number), format_rule(rule), str(rule.packets), parse.format_size(rule.bytes)]
        for number, rule in enumerate(policy.rules, 1)
    ]
    default = f"default: {policy.default_action.name.lower()}"
    return [*rows, ["", default, str(policy.default_packets), parse.format_size(policy.default_bytes)]]
