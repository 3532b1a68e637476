"""Between messages and values: nothing is lost on the way, and what has no meaning is refused by name."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import convert
from garden_py.model.errors import InvalidField
from garden_py.model.files import BindMount, MountMode
from garden_py.model.image import RegistryAuth
from garden_py.model.limits import Limits
from garden_py.model.netrule import DefaultAction, EgressPolicy, RuleAction, parse_egress_rule
from garden_py.model.process import ExitStatus, Sidecar, WindowSize
from garden_py.service.events import EventKind
from garden_py.service.ports import EgressCounts, RuleCount, Usage

DENY = DefaultAction.DENY


def test_unset_limits_and_zero_limits_are_different() -> None:
    """Unset says nothing, zero says unlimited."""
    assert convert.limits_from(pb.Limits()) == Limits()
    message = pb.Limits(memory_bytes=0, pids=7)
    assert convert.limits_from(message) == Limits(memory_bytes=0, pids=7)
    assert convert.limits_to(convert.limits_from(message)) == message
    message = pb.Limits(rlimits={"nofile": 9, "core": (1 << 64) - 1})
    assert convert.limits_from(message).rlimits == (("core", (1 << 64) - 1), ("nofile", 9))
    assert convert.limits_to(convert.limits_from(message)) == message


def test_container_spec_keeps_every_field() -> None:
    """Every field of the message arrives in the value, and comes back except for env values."""
    message = pb.ContainerSpec(
        handle="box",
        image="/image",
        privileged=True,
        env=["A=secret"],
        properties={"k": "v"},
        bind_mounts=[pb.BindMount(source="/a", destination="/b", mode=pb.BindMount.READ_WRITE, origin=1)],
        limits=pb.Limits(pids=1),
        grace_time=Duration(seconds=1, nanos=500_000_000),
        port_mappings=[pb.PortMapping(host_port=1, container_port=2, protocol=pb.PortMapping.UDP)],
        egress=pb.EgressPolicy(default_action=pb.EgressPolicy.DENY),
        hostname="host",
        image_auth=pb.RegistryAuth(username="me", password="secret"),
        network_mode=pb.HOST,
        subnet="10.1.2.0/24",
    )
    spec = convert.container_spec_from(message, DefaultAction.ALLOW)
    assert spec.grace_time_s == 1.5
    assert spec.bind_mounts[0].mode is MountMode.READ_WRITE
    back = convert._container_spec_to(spec)
    assert spec.image_auth == RegistryAuth("me", "secret")
    assert back.env == ["A="]
    assert not back.HasField("image_auth")
    back.image_auth.CopyFrom(message.image_auth)
    back.env[:] = message.env
    back.egress.etag = ""
    assert back == message


def test_every_field_of_the_container_spec_is_covered() -> None:
    """A field that is added to the proto must be added to the test above."""
    assert len(pb.ContainerSpec.DESCRIPTOR.fields) == 14
    assert len(pb.ProcessSpec.DESCRIPTOR.fields) == 12
    assert len(pb.Sidecar.DESCRIPTOR.fields) == 4


def test_process_spec_keeps_every_field() -> None:
    """Window, rlimits and limits among them."""
    spec = convert.process_spec_from(
        pb.ProcessSpec(
            id="p",
            path="sh",
            args=["-c", ""],
            env=["A=b"],
            dir="/d",
            user="u",
            tty=pb.Tty(rows=0, columns=100),
            rlimits={"nofile": (1 << 64) - 1},
            limits=pb.Limits(memory_bytes=1 << 30),
            output_retention_bytes=1 << 20,
            sidecar=pb.Sidecar(
                image="/i",
                bind_mounts=[pb.BindMount(source="/s", destination="/d", mode=1)],
                own_limits=True,
                image_auth=pb.RegistryAuth(username="me", password="secret"),
            ),
            from_image=True,
        )
    )
    mounts, auth = (BindMount("/s", "/d", MountMode.READ_WRITE),), RegistryAuth("me", "secret")
    assert spec.sidecar == Sidecar("/i", mounts, own_limits=True, image_auth=auth)
    assert spec.from_image
    assert (spec.id, spec.path, spec.args, spec.env) == ("p", "sh", ("-c", ""), ("A=b",))
    assert (spec.dir, spec.user, spec.tty) == ("/d", "u", WindowSize(0, 100))
    assert spec.rlimits == (("nofile", (1 << 64) - 1),)
    assert spec.limits == Limits(memory_bytes=1 << 30)
    assert spec.output_retention_bytes == 1 << 20
    assert convert.process_spec_from(pb.ProcessSpec(path="x")).tty is None


def test_egress_policy_there_and_back() -> None:
    """Every kind of rule survives, with counters beside it."""
    rules = tuple(
        parse_egress_rule(text)
        for text in ("tcp:10.0.0.0/8,10.1.0.1-10.1.0.9:80,443-445 log", "deny icmp:*:8/0", "udp", "all:[2001:db8::/32]")
    )  # fmt: skip
    policy = EgressPolicy(DENY, rules)
    counts = EgressCounts(tuple(RuleCount(n, n * 100) for n in range(4)), RuleCount(9, 900))
    message = convert.policy_to(policy, counts)
    assert [rule.packets for rule in message.rules] == [0, 1, 2, 3]
    assert (message.default_packets, message.default_bytes) == (9, 900)
    assert convert.policy_from(message, DefaultAction.ALLOW, "policy") == policy
    assert len(message.etag) == 16


def test_unspecified_actions_have_their_documented_meaning() -> None:
    """The policy's is the server's default, a rule's is ALLOW."""
    message = pb.EgressPolicy(rules=[pb.EgressRule(protocol=pb.EgressRule.TCP)])
    policy = convert.policy_from(message, DENY, "policy")
    assert policy.default_action is DENY
    assert policy.rules[0].action is RuleAction.ALLOW


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (pb.EgressRule(networks=["10.0.0.9-10.0.0.1"]), "p.rules[0].networks[0].end"),
        (pb.EgressRule(networks=["ok", "nonsense"]), "p.rules[0].networks[0].start"),
        (pb.EgressRule(networks=["10.0.0.1/8"]), "p.rules[0].networks[0].start"),
        (
            pb.EgressRule(protocol=pb.EgressRule.TCP, ports=[pb.PortRange(start=80, end=79)]),
            "p.rules[0].ports[0].end",
        ),
        (
            pb.EgressRule(protocol=pb.EgressRule.TCP, ports=[pb.PortRange(start=0)]),
            "p.rules[0].ports[0].start",
        ),
        (
            pb.EgressRule(protocol=pb.EgressRule.TCP, ports=[pb.PortRange(start=1, end=70_000)]),
            "p.rules[0].ports[0].end",
        ),
        (pb.EgressRule(ports=[pb.PortRange(start=80)]), "p.rules[0].ports"),
        (pb.EgressRule(protocol=pb.EgressRule.TCP, icmp=pb.IcmpMatch(type=8)), "p.rules[0].icmp"),
        (pb.EgressRule(protocol=pb.EgressRule.ICMP, icmp=pb.IcmpMatch(type=256)), "p.rules[0].icmp.type"),
        (pb.EgressRule(protocol=99), "p.rules[0].protocol"),  # type: ignore[arg-type]
        (pb.EgressRule(action=99), "p.rules[0].action"),  # type: ignore[arg-type]
    ],
)
def test_bad_rules_are_named_to_the_last_field(rule: pb.EgressRule, field: str) -> None:
    """Among a hundred rules the caller must find the bad one."""
    with pytest.raises(InvalidField) as refused:
        convert.policy_from(pb.EgressPolicy(rules=[rule]), DENY, "p")
    assert refused.value.field == field


def test_unknown_enum_values_are_refused() -> None:
    """A newer client's value must not be taken for an older meaning."""
    unknown = 99
    with pytest.raises(InvalidField):
        convert.mapping_from(pb.PortMapping(protocol=unknown), "mapping")  # type: ignore[arg-type]
    mount = pb.BindMount(source="/a", destination="/b", mode=unknown)  # type: ignore[arg-type]
    with pytest.raises(InvalidField) as refused:
        convert.container_spec_from(pb.ContainerSpec(bind_mounts=[mount]), DENY)
    assert refused.value.field == "spec.bind_mounts[0].mode"
    with pytest.raises(InvalidField):
        convert.stream_from(unknown)
    with pytest.raises(InvalidField):
        convert.policy_from(pb.EgressPolicy(default_action=unknown), DENY, "p")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        (pb.Signal(number=9), (9, False)),
        (pb.Signal(name="TERM", group=True), (15, True)),
        (pb.Signal(name="SIGUSR1"), (10, False)),
    ],
)
def test_signals(signal: pb.Signal, expected: tuple[int, bool]) -> None:
    """By number or by name."""
    assert convert.signal_from(signal) == expected


@pytest.mark.parametrize(
    ("signal", "field"),
    [
        (pb.Signal(), "signal"),
        (pb.Signal(number=9, name="KILL"), "signal"),
        (pb.Signal(number=99), "signal.number"),
        (pb.Signal(number=-1), "signal.number"),
        (pb.Signal(name="NOPE"), "signal.name"),
    ],
)
def test_bad_signals(signal: pb.Signal, field: str) -> None:
    """Neither, both, or one that does not exist."""
    with pytest.raises(InvalidField) as refused:
        convert.signal_from(signal)
    assert refused.value.field == field


def test_window_size_must_fit_the_kernels_type() -> None:
    """Struct winsize has 16 bits."""
    assert convert.window_from(pb.Tty(rows=65_535, columns=1)) == WindowSize(65_535, 1)
    with pytest.raises(InvalidField):
        convert.window_from(pb.Tty(rows=65_536))


def test_exit_status_is_code_or_signal() -> None:
    """A code of zero is a code."""
    assert convert.exit_to(ExitStatus(0, None)).WhichOneof("end") == "code"
    message = convert.exit_to(ExitStatus(None, 9, True, 1_500_000_000, "killed"))
    assert (message.WhichOneof("end"), message.signal, message.out_of_memory) == ("signal", 9, True)
    assert (message.exited_at.seconds, message.exited_at.nanos) == (1, 500_000_000)


def test_every_event_kind_is_in_the_proto() -> None:
    """An event that cannot be told would break every watcher's stream."""
    for kind in EventKind:
        assert pb.Event.Kind.Value(kind.value)


def test_every_usage_field_is_in_the_proto() -> None:
    """A metric that cannot be told would fail the whole bulk call."""
    values: dict[str, Any] = {name: 1 for name in Usage.__dataclass_fields__ if name != "memory_stat"}
    usage = Usage(**values)
    message = convert.metrics_to("box", usage, time.time_ns() - 2_500_000_000)
    assert message.oom_kills == message.network_tx_packets == 1
    assert message.age.ToTimedelta() >= timedelta(seconds=2.5)
