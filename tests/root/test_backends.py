"""Other runtimes and other backends behind the same door."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.garden import code_of, sh, text_of
from kit.server import running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import Container, ContainerSpec, GardenClient, Limits, PortMapping, Tty

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def crun(no_trace: None) -> Iterator[GardenClient]:
    """A client of a server that uses crun; it leaves no trace either."""
    before = snapshot()
    with running_server("--runtime", "crun") as server, GardenClient(server.address) as client:
        yield client
    assert_no_trace(before)


@pytest.fixture(params=[False, True], ids=["unprivileged", "privileged"])
def box(request: pytest.FixtureRequest, crun: GardenClient) -> Iterator[Container]:
    with crun.create(
        ContainerSpec(privileged=request.param, limits=Limits(memory_bytes=32 << 20))
    ) as container:
        yield container


def test_crun_makes_the_same_containers(box: Container) -> None:
    """Processes, terminals, limits, files: nothing of it depends on the runtime."""
    assert text_of(box, "echo $(id -u) $(hostname)") == f"0 {box.handle[-49:]}\n"
    assert box.run(sh("stty size"), tty=Tty(5, 6)).output().stdout == b"5 6\r\n"
    box.write_file("/tmp/f", b"x")
    assert box.read_file("/tmp/f") == b"x"
    hog = box.run(["tail", "/dev/zero"]).output()
    assert hog.exit.out_of_memory
    assert box.metrics().oom_kills == 1
    box.stop(kill=True)
    assert text_of(box, "echo again") == "again\n"


def test_crun_filters_and_confines_as_runc_does(crun: GardenClient) -> None:
    """Filter, capabilities and namespaces come from our configuration."""
    with crun.create() as container:
        status = text_of(container, "cat /proc/self/status")
        assert "Seccomp:\t2\n" in status
        assert "CapEff:\t00000000a80425fb\n" in status
        assert "CapInh:\t0000000000000000\n" in status
        assert code_of(container, "unshare -U true") != 0
        assert code_of(container, "echo x >/proc/sysrq-trigger") != 0


def test_crun_container_survives_a_restart() -> None:
    """Taking over a container asks no runtime."""
    with running_server("--runtime", "crun") as server, GardenClient(server.address) as client:
        container = client.create(ContainerSpec(port_mappings=(PortMapping(0, 80),)))
        process = container.run(sh("echo before; read x; echo after; exit 8"), id="p")
        assert next(iter(process)).data == b"before\n"
        process.close()
        server.kill()
        server.start()
        again = container.attach("p")
        again.stdin.write(b"\n")
        done = again.output()
        assert (done.stdout, done.exit.code) == (b"before\nafter\n", 8)


def test_runtime_may_be_a_path(tmp_path: Path) -> None:
    """A build of one's own is used from where it is."""
    found = shutil.which("runc")
    assert found
    (tmp_path / "runc").symlink_to(os.path.realpath(found))
    tmp_path.chmod(0o755)
    with (
        running_server("--runtime", str(tmp_path / "runc")) as server,
        GardenClient(server.address) as client,
        client.create() as container,
    ):
        assert text_of(container, "echo works") == "works\n"
