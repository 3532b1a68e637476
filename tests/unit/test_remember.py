"""What is remembered, and what is too large to be."""

from __future__ import annotations

import tracemalloc

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc.convert import policy_from, policy_to
from garden_py.backend.net.firewall import compile_container_ruleset
from garden_py.backend.net.nftables import encode
from garden_py.model.netrule import DefaultAction
from garden_py.model.remember import SHORT, is_short, remembered


def test_small_arguments_are_remembered_and_large_ones_are_not() -> None:
    asked: list[str] = []

    @remembered(is_short)
    def upper(text: str) -> str:
        """Documented."""
        asked.append(text)
        return text.upper()

    small, large = "a" * SHORT, "b" * (SHORT + 1)
    for _ in range(2):
        assert upper(small) == small.upper()
        assert upper(large) == large.upper()
    assert asked == [small, large, large]
    assert upper.__doc__ == "Documented."


def test_rules_as_long_as_callers_like_leave_nothing_in_memory() -> None:
    """Each has three thousand networks, and none is another's."""

    def take(number: int) -> None:
        networks = [f"10.{number}.{item >> 8}.{item & 255}/32" for item in range(0, 6000, 2)]
        rule = pb.EgressRule(protocol=pb.EgressRule.TCP, networks=networks, ports=[pb.PortRange(start=80)])
        policy = policy_from(pb.EgressPolicy(rules=[rule]), DefaultAction.DENY, "policy")
        encode(compile_container_ruleset(policy))
        policy_to(policy)

    take(0)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1, 11):
            take(number)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1 << 20
