"""Small calls: questions about containers, and a new egress policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from cell import Cell, ping_ms
from measure import alternate, in_a_row, timed_ms, timing
from report import Row, at_most
from setting import Setting
from stopwatch import running_stopwatch

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api.grpc import convert
from garden_py.backend.net.firewall import compile_container_ruleset
from garden_py.model.netrule import DefaultAction

CONTAINERS = 50
RULES, MANY_RULES = 100, 3000
_PING = "bare gRPC Ping"
# The server keeps a socket in the container's namespace for one second after a change (backend/net/rule_socket.py).
_SOCKET_GONE_S = 1.2


def measure_queries(setting: Setting) -> Iterator[Row]:
    """With 50 containers in the cell."""
    cell, stub = setting.cell, setting.cell.stub
    with running_containers(cell, CONTAINERS) as handles:
        one, all_of_them = pb.GetContainerRequest(handle=handles[0]), pb.GetMetricsRequest(handles=handles)
        found = alternate(
            {
                "info": timing(lambda: stub.GetContainer(one, timeout=10)),
                _PING: lambda: ping_ms(setting.bare),
                "ping": lambda: ping_ms(stub),
                "list": timing(lambda: _require(len(stub.ListContainers(_page(), timeout=10).containers))),
                "metrics": timing(lambda: _require(len(stub.GetMetrics(all_of_them, timeout=10).metrics))),
            },
            rounds=5 * setting.rounds,
            warm_up=10,
        )
    peer = found[_PING]
    yield Row("Ping", "ms", found["ping"], _PING, peer)
    yield Row("info (GetContainer)", "ms", found["info"], _PING, peer, (at_most(1.5, later=True),))
    yield Row(f"list of {CONTAINERS}", "ms", found["list"], _PING, peer)
    metrics_mark = at_most(0.3 * CONTAINERS, later=True)
    yield Row(f"GetMetrics of {CONTAINERS}", "ms", found["metrics"], _PING, peer, (metrics_mark,))


def _page() -> pb.ListContainersRequest:
    return pb.ListContainersRequest(page_size=CONTAINERS)


def _require(count: int) -> None:
    if count != CONTAINERS:
        raise RuntimeError(f"{count} containers answered, not {CONTAINERS}")


@contextmanager
def running_containers(cell: Cell, count: int) -> Iterator[list[str]]:
    """So many, made four at a time and destroyed at the end; their handles."""
    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(lambda _: cell.create().handle, range(count)))
        try:
            yield handles
        finally:
            list(pool.map(cell.destroy, handles))


def measure_egress(setting: Setting) -> Iterator[Row]:
    """Replace policies again and again, beside `nft -f` of the same text in a namespace of its own."""
    cell, stub = setting.cell, setting.cell.stub
    place = cell.server.place
    rules, lists = place / "rules.nft", place / "lists.nft"
    rules.write_text(_nft_text(_policy()))
    lists.write_text(_nft_text(_policy_of_lists()))
    log = str(place / "nft.log")
    with cell.container() as handle, running_stopwatch("unshare", "--net") as stopwatch:
        # The rules speak of the container's link.
        link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far"]
        stopwatch.ask(op="time", argv=link, log=log)
        request = pb.SetEgressRequest(handle=handle, policy=_policy())

        def set_egress() -> float:
            return timed_ms(lambda: stub.SetEgress(request, timeout=30))

        def nft(file: Path = rules) -> float:
            return float(stopwatch.ask(op="time", argv=["nft", "-f", str(file)], log=log)["ms"])

        fresh = (pb.SetEgressRequest(handle=handle, policy=_policy(first)) for first in count(1))

        def set_new() -> float:
            new = next(fresh)
            return timed_ms(lambda: stub.SetEgress(new, timeout=30))

        many = pb.SetEgressRequest(handle=handle, policy=_policy_of_lists())

        def set_many() -> float:
            return timed_ms(lambda: stub.SetEgress(many, timeout=60))

        def set_egress_cold() -> float:
            time.sleep(_SOCKET_GONE_S)
            return set_egress()

        often = alternate({"garden": in_a_row(set_egress), "nft": in_a_row(nft)}, rounds=setting.rounds)
        new = alternate({"garden": in_a_row(set_new), "nft": in_a_row(nft)}, rounds=setting.rounds)
        seldom = alternate(
            {"garden": set_egress_cold, "nft": nft}, rounds=setting.throughput_rounds, warm_up=0
        )
        long = alternate(
            {"garden": set_many, "nft": lambda: nft(lists)}, rounds=setting.throughput_rounds, warm_up=1
        )
    what, peer = f"SetEgress of {RULES} rules", "nft -f"
    yield Row(f"{what}, in a row", "ms", often["garden"], peer, often["nft"], (at_most(10),))
    yield Row(f"{what}, none of which it has seen", "ms", new["garden"], peer, new["nft"], (at_most(10),))
    yield Row(f"{what}, seldom", "ms", seldom["garden"], peer, seldom["nft"], (at_most(10),))
    what = f"SetEgress of {MANY_RULES} rules, each with a list of networks and one of ports"
    yield Row(what, "ms", long["garden"], peer, long["nft"])


def _policy_of_lists() -> pb.EgressPolicy:
    """Rules that kernels dislike: each with lists, which as sets would be walked through for each other."""
    return pb.EgressPolicy(
        default_action=pb.EgressPolicy.DENY,
        rules=[
            pb.EgressRule(
                action=pb.EgressPolicy.ALLOW,
                protocol=pb.EgressRule.TCP,
                networks=[f"10.{number >> 8}.{number & 255}.{32 * part}/28" for part in range(2)],
                ports=[pb.PortRange(start=port) for port in range(443, 453, 2)],
            )
            for number in range(MANY_RULES)
        ],
    )


def _policy(first: int = 0) -> pb.EgressPolicy:
    """Rules as security groups have them: a network, a protocol, a few ports.

    Args:
        first: its rules have nothing in common with those of another number.
    """
    return pb.EgressPolicy(
        default_action=pb.EgressPolicy.DENY,
        rules=[
            pb.EgressRule(
                action=pb.EgressPolicy.ALLOW,
                protocol=pb.EgressRule.TCP,
                networks=[f"10.{number}.{first & 255}.0/{24 if first else 16}"],
                ports=[pb.PortRange(start=443), pb.PortRange(start=8000 + number, end=8100 + number)],
            )
            for number in range(RULES)
        ],
    )


def _nft_text(policy: pb.EgressPolicy) -> str:
    """What the server compiles it to, so that the peer has the same work in the kernel."""
    return compile_container_ruleset(convert.policy_from(policy, DefaultAction.DENY, "policy"))
