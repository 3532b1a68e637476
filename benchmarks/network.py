"""What the network costs with one container and with five hundred, and whether rates are kept.

"Alone" and "beside" cannot be taken in turns: the figures of the first are from just before the others are made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator

from cell import Cell, run_request, running_cell
from measure import Samples, alternate, timed_ms
from queries import running_containers
from report import Row, at_most, ratio_at_least, ratio_at_most
from setting import Setting

from garden_py.api._pb import garden_pb2 as pb

BESIDE = 500
RULES = 100
MANY_RULES = 3_000
BULK = 250
RATE_BYTES_PER_S = 8 << 20
_TRANSFER_S = 4.0
_PORT = 7000
_PACKETS = 2_000

# New flows, one datagram each: every one meets the rules. Refused ones come back as EPERM, allowed ones find nobody.
_SEND = """
import json, socket, sys, time
address, packets = sys.argv[1], int(sys.argv[2])
times = []
for number in range(packets):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        begin = time.perf_counter_ns()
        try:
            s.sendto(b"x", (address, 20000 + number))
        except PermissionError:
            pass
        times.append(time.perf_counter_ns() - begin)
print(json.dumps(sorted(times)[len(times) // 2] / 1000))
"""


def measure_network(setting: Setting) -> Iterator[Row]:
    """Rules, packets, bulk metrics and bandwidth."""
    pools = ("--uid-pool-size", str(BESIDE + 10))
    with (
        running_cell(setting.runtime, *pools, network_pool="10.248.0.0/22") as cell,
        cell.container() as box,
        cell.container() as neighbour,
    ):
        alone = _measure(cell, setting, box, neighbour)
        with running_containers(cell, BESIDE) as others:
            beside = _measure(cell, setting, box, neighbour)
            bulk = pb.GetMetricsRequest(handles=others[:BULK])
            per_container = alternate(
                {"metrics": lambda: timed_ms(lambda: cell.stub.GetMetrics(bulk, timeout=60)) / BULK},
                rounds=setting.rounds,
            )
        many = alternate({"set": lambda: _set_egress(cell, box, MANY_RULES)}, rounds=setting.rounds)
    for what, unit in alone.items():
        marks = (ratio_at_most(1.25), *((at_most(10),) if unit[0] == "ms" else ()))
        yield Row(f"{what}, beside {BESIDE} containers", unit[0], beside[what][1], "alone", unit[1], marks)
    yield Row(f"SetEgress of {MANY_RULES} rules", "ms", many["set"], marks=(at_most(300),))
    metrics = per_container["metrics"]
    yield Row(f"GetMetrics of {BULK}, per container", "ms", metrics, marks=(at_most(0.3),))
    yield from _measure_bandwidth(setting)


def _measure(cell: Cell, setting: Setting, box: str, neighbour: str) -> dict[str, tuple[str, Samples]]:
    """Figures of one container, whatever else there is."""
    address = _info(cell, neighbour).container_ip
    found = alternate({"set": lambda: _set_egress(cell, box, RULES)}, rounds=setting.rounds)
    denied = alternate({"send": lambda: _send_us(cell, box, address)}, rounds=5)
    policy = _policy(RULES)
    policy.rules.append(pb.EgressRule(action=pb.EgressPolicy.ALLOW, networks=[address]))
    cell.stub.SetEgress(pb.SetEgressRequest(handle=box, policy=policy), timeout=60)
    allowed = alternate({"send": lambda: _send_us(cell, box, address)}, rounds=5)
    return {
        f"SetEgress of {RULES} rules": ("ms", found["set"]),
        f"packet that {RULES} rules refuse": ("µs", denied["send"]),
        f"packet that the rule behind {RULES} allows": ("µs", allowed["send"]),
    }


def _set_egress(cell: Cell, box: str, rules: int) -> float:
    request = pb.SetEgressRequest(handle=box, policy=_policy(rules))
    return timed_ms(lambda: cell.stub.SetEgress(request, timeout=60))


def _policy(rules: int) -> pb.EgressPolicy:
    """A closed policy whose rules open what no test host is."""
    return pb.EgressPolicy(
        default_action=pb.EgressPolicy.DENY,
        rules=[
            pb.EgressRule(
                action=pb.EgressPolicy.ALLOW,
                protocol=pb.EgressRule.TCP,
                networks=[f"192.0.{number >> 8}.{number & 255}"],
                ports=[pb.PortRange(start=443)],
            )
            for number in range(rules)
        ],
    )


def _send_us(cell: Cell, box: str, address: str) -> float:
    """Median time of one first packet, from a process in the container's network namespace."""
    argv = ["nsenter", "-t", str(_info(cell, box).pid), "-n", sys.executable, "-I", "-c", _SEND]
    done = subprocess.run(
        [*argv, address, str(_PACKETS)], capture_output=True, text=True, check=True, timeout=120
    )
    return float(json.loads(done.stdout))


def _info(cell: Cell, handle: str) -> pb.Container:
    return cell.stub.GetContainer(pb.GetContainerRequest(handle=handle), timeout=10)


def _measure_bandwidth(setting: Setting) -> Iterator[Row]:
    """A real transfer each way through a limited link, by the kernel's counters of it."""
    cell = setting.cell
    limits = pb.Limits(network_rx_bytes_per_s=RATE_BYTES_PER_S, network_tx_bytes_per_s=RATE_BYTES_PER_S)
    with cell.container() as box, cell.container() as peer:
        cell.stub.UpdateLimits(pb.UpdateLimitsRequest(handle=box, limits=limits), timeout=10)
        server = ["nc", "-ll", "-p"]
        _start(cell, peer, *server, str(_PORT), "-e", "cat", "/dev/zero")
        _start(cell, peer, *server, str(_PORT + 1), "-e", "sh", "-c", "exec cat >/dev/null")
        address = _info(cell, peer).container_ip
        asked = Samples((RATE_BYTES_PER_S / 1e6,))
        for what, script, counter in (
            ("in", f"exec nc {address} {_PORT} >/dev/null", "network_rx_bytes"),
            ("out", f"exec nc {address} {_PORT + 1} </dev/zero", "network_tx_bytes"),
        ):
            process = _start(cell, box, "sh", "-c", script)
            rates = Samples(tuple(_rate(cell, box, counter) for _ in range(3)))
            stop = pb.SignalProcessRequest(handle=box, process_id=process, signal=pb.Signal(name="KILL"))
            cell.stub.SignalProcess(stop, timeout=10)
            marks = (ratio_at_least(0.85), ratio_at_most(1.15))
            yield Row(f"bandwidth {what}, limited", "MB/s", rates, "the limit", asked, marks)


def _start(cell: Cell, handle: str, path: str, *args: str) -> str:
    request = run_request(handle, path, *args).start
    wanted = pb.StartProcessRequest(handle=handle, spec=request.spec)
    return cell.stub.StartProcess(wanted, timeout=10).id


def _rate(cell: Cell, box: str, counter: str) -> float:
    """MB/s in the long run: the first burst is over when this is asked for."""

    def passed() -> tuple[int, float]:
        metrics = cell.stub.GetMetrics(pb.GetMetricsRequest(handles=[box]), timeout=10).metrics[0]
        return getattr(metrics, counter), time.monotonic()

    time.sleep(0.5)
    before, begin = passed()
    time.sleep(_TRANSFER_S)
    after, end = passed()
    return (after - before) / 1e6 / (end - begin)
