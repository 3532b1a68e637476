"""What a CPU share is worth: quotas that follow from shares, and the entitlement in metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kit.server import ServerProcess, running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import ContainerSpec, GardenClient, Limits, ProcessSpec, Sidecar

pytestmark = pytest.mark.root


@contextmanager
def server_with(*flags: str) -> Iterator[tuple[ServerProcess, GardenClient]]:
    """A server with these settings, and a client of it."""
    before = snapshot()
    with running_server(*flags) as server, GardenClient(server.address) as garden:
        yield server, garden
    assert_no_trace(before)


def test_quota_per_share(no_trace: None) -> None:
    """CP4, at create, live and for a sidecar beside its container; a quota that was stated is left alone."""
    with server_with("--cpu-quota-per-share", "20") as (server, garden):
        with garden.create(ContainerSpec(limits=Limits(cpu_weight=100))) as box:
            assert box.limits().cpu_quota_us == 20_480
            assert box.update_limits(Limits(cpu_weight=200)).cpu_quota_us == 40_960
            assert box.update_limits(Limits(cpu_quota_us=7_000)).cpu_quota_us == 7_000
            assert box.update_limits(Limits(cpu_weight=100)).cpu_quota_us == 7_000
            (image,) = (server.place / "state/rootfs").iterdir()
            beside = Sidecar(str(image), own_limits=True)
            for id, sidecar in (("within", None), ("beside", beside)):
                limits = Limits(cpu_weight=50)
                box.start(ProcessSpec("sleep", ("1000",), id=id, limits=limits, sidecar=sidecar))
            assert box.limits("within").cpu_quota_us == 0
            assert box.limits("beside").cpu_quota_us == 10_240
            assert box.update_limits(Limits(cpu_weight=1), "beside").cpu_quota_us == 1_000
        with garden.create() as box:
            assert box.limits().cpu_quota_us == 0


def test_entitlement_per_share(no_trace: None) -> None:
    """CP5: shares x worth x age; 0 without shares, and for single processes."""
    with (
        server_with("--cpu-entitlement-per-share", "0.1") as (_, garden),
        garden.create(ContainerSpec(limits=Limits(cpu_weight=50))) as box,
        garden.create() as other,
    ):
        box.start(ProcessSpec("sleep", ("1000",), id="own", limits=Limits(pids=5)))
        metrics = box.metrics()
        age_ns = metrics.age.total_seconds() * 1e9
        assert metrics.cpu_entitlement_ns == pytest.approx(512 * 0.1 / 100 * age_ns, rel=0.05)
        assert box.metrics().cpu_entitlement_ns > metrics.cpu_entitlement_ns
        assert other.metrics().cpu_entitlement_ns == 0
        (own,) = garden.metrics(processes=[(box.handle, "own")])
        assert own.cpu_entitlement_ns == 0
