"""Who is looked at for throttling, and who is over."""

from __future__ import annotations

from kit.core import Server
from kit.virtual_clock import in_virtual_time

from garden_py.model.limits import Limits
from garden_py.model.spec import ContainerSpec

DAY_NS = 86_400 * 10**9


@in_virtual_time
async def test_look() -> None:
    """Only containers with shares that used more than these stand for; a destroyed one is not looked at."""
    server = Server()
    core = await server.start(enable_cpu_throttling=True)
    for handle, limits in (
        ("greedy", Limits(cpu_shares=10)),
        ("modest", Limits(cpu_shares=10)),
        ("plain", Limits()),
        ("gone", Limits(cpu_weight=1)),
    ):
        await core.containers.create(ContainerSpec(handle=handle, limits=limits))
    server.backend.cpu_used_ns = {"greedy": DAY_NS, "modest": 0, "plain": DAY_NS, "gone": DAY_NS}
    await core.containers.destroy("gone")
    await core.throttling.look()
    assert server.backend.throttled == {"greedy"}
    await core.close()
