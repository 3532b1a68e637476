"""Commands for the egress policy of a container: what it may connect to.

Rules are text; `garden_py.model.netrule` says how. `add` and `remove` read the policy, change it and write it
back with its etag, so that two of them at once never lose a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from garden_py.cli import options as opt
from garden_py.cli import parse, render

if TYPE_CHECKING:
    from garden_py.client import Container, EgressPolicy, EgressRule
    from garden_py.client import EgressAction as WireAction

app = typer.Typer(no_args_is_help=True, help="Show and change what a container may connect to.")

# Every conflict means that somebody else's change went in; so many in a row is a fight, not a race.
_MAX_TRIES: Final = 10


class EgressAction(StrEnum):
    """Values of --default and --egress-default."""

    ALLOW = "allow"
    DENY = "deny"
    SERVER = "server"

    def to_value(self) -> WireAction:
        """The client's name for it; `server` is the server's default."""
        from garden_py.client.values import EgressAction as WireAction

        return WireAction.UNSPECIFIED if self is EgressAction.SERVER else WireAction[self.name]


def parse_rules(texts: list[str]) -> tuple[EgressRule, ...]:
    """Rules from their text form, in order.

    Raises:
        BadInput: a rule does not parse; says which and why.
    """
    return tuple(_parse_rule(text) for text in texts)


def _parse_rule(text: str) -> EgressRule:
    from garden_py.client import values as v
    from garden_py.model.errors import InvalidField
    from garden_py.model.netrule import parse_egress_rule

    try:
        rule = parse_egress_rule(text)
    except InvalidField as error:
        raise parse.BadInput(f"rule {text!r}: {error}") from error
    return v.EgressRule(
        action=v.EgressAction[rule.action.name],
        protocol=v.EgressProtocol[rule.protocol.name],
        networks=tuple(map(str, rule.networks)),
        ports=tuple(v.PortRange(each.start, each.end) for each in rule.ports),
        icmp=None if rule.icmp is None else v.IcmpMatch(rule.icmp.type, rule.icmp.code),
        log=rule.log,
    )


def format_rule(rule: EgressRule) -> str:
    """A rule of the server as text that `parse_rules` reads."""
    from garden_py.model import netrule

    return netrule.format_egress_rule(
        netrule.EgressRule(
            protocol=netrule.Protocol[rule.protocol.name],
            networks=tuple(netrule.AddressRange.parse(each) for each in rule.networks),
            ports=tuple(netrule.PortRange(each.start, each.end or each.start) for each in rule.ports),
            icmp=None if rule.icmp is None else netrule.IcmpMatch(rule.icmp.type, rule.icmp.code),
            log=rule.log,
            action=netrule.RuleAction[rule.action.name] if rule.action else netrule.RuleAction.ALLOW,
        )
    )


def add_rules(policy: EgressPolicy, rules: tuple[EgressRule, ...], position: int | None) -> EgressPolicy:
    """The policy with rules inserted before the rule at position (1 is the first); None: at the end.

    Raises:
        BadInput: that is beyond the end.
    """
    if position is not None and position > len(policy.rules) + 1:
        raise parse.BadInput(f"--at {position}: the last rule is {len(policy.rules)}")
    at = len(policy.rules) if position is None else position - 1
    return replace(policy, rules=(*policy.rules[:at], *rules, *policy.rules[at:]))


def remove_rules(policy: EgressPolicy, rules: tuple[EgressRule, ...]) -> EgressPolicy:
    """The policy without rules that say the same as the given ones.

    Raises:
        BadInput: a given rule is not in the policy.
    """
    unwanted = {format_rule(rule) for rule in rules}
    present = {format_rule(rule) for rule in policy.rules}
    if missing := sorted(unwanted - present):
        raise parse.BadInput(f"the policy has no rule {missing[0]!r}")
    return replace(policy, rules=tuple(rule for rule in policy.rules if format_rule(rule) not in unwanted))


def change_policy(
    container: Container, change: Callable[[EgressPolicy], EgressPolicy], *, cut: bool = False
) -> EgressPolicy:
    """Read, change, write with etag; again from the start when somebody else was faster.

    Raises:
        Aborted: somebody else was faster every time.
    """
    from garden_py.client.errors import Aborted

    for remaining in reversed(range(_MAX_TRIES)):
        try:
            return container.set_egress(change(container.egress()), cut=cut)
        except Aborted:
            if not remaining:
                raise
    raise AssertionError("the last try returns or raises")


CutOption = Annotated[
    bool,
    typer.Option("--cut", help="End connections that the new policy does not allow, too."),
]
RulesArgument = Annotated[
    list[str],
    typer.Argument(metavar="RULE...", help="e.g. tcp:10.0.0.0/8:443 or 'deny all'", show_default=False),
]


@app.command("get")
def get(
    context: typer.Context,
    handle: opt.HandleArgument,
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Show the policy and what each rule has decided.

    The first rule that matches decides.

    garden egress get web
    """
    with opt.connect(context, address) as garden:
        policy = garden.container(handle).egress()
    if output is render.OutputFormat.JSON:
        render.print_json(policy)
        return
    rows = [
        [str(number), format_rule(rule), str(rule.packets), parse.format_size(rule.bytes)]
        for number, rule in enumerate(policy.rules, 1)
    ]
    if policy.denied_network_packets:
        denied = policy.denied_network_packets, policy.denied_network_bytes
        rows.append(["", "the server's denied networks", str(denied[0]), parse.format_size(denied[1])])
    default = policy.default_action.name.lower()
    rows.append(
        ["", f"default: {default}", str(policy.default_packets), parse.format_size(policy.default_bytes)]
    )
    render.print_table(["#", "RULE", "PACKETS", "BYTES"], rows)


@app.command("set")
def set_policy(
    context: typer.Context,
    handle: opt.HandleArgument,
    rules: Annotated[list[str] | None, typer.Argument(metavar="RULE...", show_default=False)] = None,
    default: Annotated[
        EgressAction, typer.Option("--default", help="What no rule matches.")
    ] = EgressAction.SERVER,
    cut: CutOption = False,
    address: opt.AddressOption = None,
) -> None:
    """Replace the whole policy in one step.

    New connections follow it at once; established ones go on unless --cut is given.

    garden egress set web --default deny tcp:10.0.0.0/8:443 udp:10.0.0.53:53

    garden egress set web --default allow 'deny all:169.254.169.254 log'
    """
    from garden_py.client.values import EgressPolicy

    policy = EgressPolicy(default.to_value(), parse_rules(rules or []))
    with opt.connect(context, address) as garden:
        garden.container(handle).set_egress(policy, cut=cut)


@app.command("add")
def add(
    context: typer.Context,
    handle: opt.HandleArgument,
    rules: RulesArgument,
    position: Annotated[
        int | None,
        typer.Option(
            "--at", metavar="N", min=1, help="Before rule N.  [default: at the end]", show_default=False
        ),
    ] = None,
    cut: CutOption = False,
    address: opt.AddressOption = None,
) -> None:
    """Add rules, at the end or before a rule.

    garden egress add web tcp:192.0.2.7:5432

    garden egress add web --at 1 'deny all:169.254.169.254'
    """
    parsed = parse_rules(rules)
    with opt.connect(context, address) as garden:
        change_policy(garden.container(handle), lambda policy: add_rules(policy, parsed, position), cut=cut)


@app.command("remove")
def remove(
    context: typer.Context,
    handle: opt.HandleArgument,
    rules: RulesArgument,
    cut: CutOption = False,
    address: opt.AddressOption = None,
) -> None:
    """Remove rules, written as `get` shows them.

    garden egress remove web tcp:192.0.2.7:5432
    """
    parsed = parse_rules(rules)
    with opt.connect(context, address) as garden:
        change_policy(garden.container(handle), lambda policy: remove_rules(policy, parsed), cut=cut)


_CAUSES: Final = {
    "DENIED_NETWORK": "a denied network of the server (--deny-network)",
    "DEFAULT": "the policy's default",
    "HOST": "it is an address of the host (--allow-host-access)",
    "CONTAINERS": "it is an address of another container",
    "UNREACHABLE": "no container has this address",
    "IPV6": "the container has no IPv6 (--network-pool-v6)",
    "LOOPBACK": "it is the container itself",
    "MARTIAN": "this address means nothing beyond one link",
}


@app.command("explain")
def explain(
    context: typer.Context,
    handle: opt.HandleArgument,
    protocol: Annotated[str, typer.Argument(metavar="PROTO", help="tcp, udp, icmp or all.")],
    destination: Annotated[
        str, typer.Argument(metavar="ADDRESS[:PORT]", help="For icmp, ADDRESS[:TYPE/CODE].")
    ],
    output: opt.FormatOption = render.OutputFormat.TABLE,
    address: opt.AddressOption = None,
) -> None:
    """Say what would become of a connection, and which rule decides. No packet is sent.

    garden egress explain web tcp 10.0.0.5:443
    """
    from garden_py.client import values as v
    from garden_py.model.errors import InvalidField
    from garden_py.model.netrule import Destination

    try:
        asked = Destination.parse(protocol, destination)
    except InvalidField as error:
        raise parse.BadInput(str(error)) from error
    icmp = None if asked.icmp is None else v.IcmpMatch(asked.icmp.type, asked.icmp.code)
    wanted = v.Destination(v.EgressProtocol[asked.protocol.name], str(asked.address), asked.port or 0, icmp)
    with opt.connect(context, address) as garden:
        decision = garden.container(handle).explain_egress(wanted)
    if output is render.OutputFormat.JSON:
        render.print_json(decision)
        return
    what = "allowed" if decision.action is v.EgressAction.ALLOW else "denied"
    why = f"rule {decision.rule_number}: {format_rule(decision.rule)}" if decision.rule else ""
    print(f"{asked}: {what} by {why}" if why else f"{asked}: {what}: {_CAUSES[decision.cause.name]}")
