"""Processes with an image of their own ("peas"), as Garden specifies them; a test is named after its statement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from garden_image import any_client, make_garden_image
from kit.garden_http import GardenClientBase, GardenHttpError
from kit.places import open_to_all

pytestmark = pytest.mark.root

__all__ = ["any_client"]  # the fixture `garden`
MIB = 1 << 20
MARK = "echo mine >/tmp/mark; cat /tmp/mark"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sidecar's image: a program and a user that the container's own image lacks."""
    place = tmp_path_factory.mktemp("sidecar")
    open_to_all(place)
    root = make_garden_image(place)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\noperator:x:37:37::/var:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\noperator:x:37:\nextra:x:99:operator\n")
    (root / "bin/only-here").write_text("#!/bin/sh\necho only here\n")
    (root / "bin/only-here").chmod(0o755)
    return str(root)


@pytest.fixture(scope="module", params=[False, True], ids=["unprivileged", "privileged"])
def box(request: pytest.FixtureRequest, garden: GardenClientBase) -> Iterator[str]:
    with garden.container(env=["CONTAINER_ENV=1"], privileged=request.param) as handle:
        yield handle


def as_pea(image: str, **spec: Any) -> dict[str, Any]:
    return {"image": {"uri": f"raw://{image}"}, **spec}


NAMESPACES = 'cd /proc/self/ns; for n in net ipc pid uts user mnt; do echo "$n $(readlink $n)"; done'


def test_PE1_only_the_mount_namespace_is_its_own(garden: GardenClientBase, box: str, image: str) -> None:
    own = dict(line.split() for line in garden.text_of(box, NAMESPACES).splitlines())
    pea = dict(line.split() for line in garden.text_of(box, NAMESPACES, **as_pea(image)).splitlines())
    assert {name for name in own if own[name] != pea[name]} == {"mnt"}
    process = garden.run(box, "only-here", **as_pea(image))
    assert (process.wait(), process.stdout) == (0, b"only here\n")
    with pytest.raises(GardenHttpError, match="not found"):
        garden.run(box, "only-here")


def test_PE2_its_image_is_written_by_nobody_and_its_layer_goes_with_it(
    garden: GardenClientBase, box: str, image: str
) -> None:
    assert garden.text_of(box, MARK, **as_pea(image)) == "mine\n"
    assert not Path(image, "tmp/mark").exists()
    assert garden.text_of(box, "ls /tmp", **as_pea(image)) == ""
    assert "mark" not in garden.text_of(box, "ls /tmp")


def test_PE3_hosts_and_resolv_conf_are_the_containers(garden: GardenClientBase, box: str, image: str) -> None:
    for name in ("hosts", "resolv.conf"):
        garden.text_of(box, f"echo '# of the container' >>/etc/{name}")
        assert "# of the container" in garden.text_of(box, f"cat /etc/{name}", **as_pea(image))
        garden.text_of(box, f"echo '# of the pea' >>/etc/{name}", **as_pea(image))
        assert "# of the pea" in garden.text_of(box, f"cat /etc/{name}")


def test_PE3_bind_mounts_are_its_own(garden: GardenClientBase, image: str, tmp_path: Path) -> None:
    for name in ("of-container", "of-pea"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    binds = {
        name: [{"src_path": str(tmp_path / name), "dst_path": "/bound"}]
        for name in ("of-container", "of-pea")
    }
    with garden.container(bind_mounts=binds["of-container"]) as handle:
        assert garden.text_of(handle, "ls /bound") == "of-container\n"
        pea = as_pea(image, bind_mounts=binds["of-pea"])
        assert garden.text_of(handle, "ls /bound; touch /bound/x 2>&1 || true", **pea).splitlines() == [
            "of-pea",
            "touch: /bound/x: Read-only file system",
        ]
        assert garden.sh(handle, "ls /bound", **as_pea(image))[0] != 0


def test_PE3_shm_is_its_own(garden: GardenClientBase, box: str, image: str) -> None:
    garden.text_of(box, "touch /dev/shm/x")
    assert garden.text_of(box, "ls /dev/shm", **as_pea(image)) == ""


def test_PE4_environment(garden: GardenClientBase, box: str, image: str) -> None:
    process = garden.run(box, "env", **as_pea(image, env=["OWN=1"]))
    assert process.wait() == 0
    lines = process.stdout.decode().splitlines()
    assert lines[0] == "OWN=1"
    assert "CONTAINER_ENV=1" not in lines
    assert {line.partition("=")[0] for line in lines} == {"OWN", "PATH", "USER", "HOME"}


@pytest.mark.parametrize(
    ("user", "expected"),
    [("", "0 0 0"), ("root", "0 0 0"), ("1001:1002", "1001 1002 1002"), ("operator", "37 37 37")],
)
def test_PE5_user_of_its_own_image_without_supplementary_groups(
    garden: GardenClientBase, box: str, image: str, user: str, expected: str
) -> None:
    assert (
        garden.text_of(box, "echo $(id -u) $(id -g) $(id -G)", **as_pea(image, user=user)).strip() == expected
    )


def test_PE5_unknown_user(garden: GardenClientBase, box: str, image: str) -> None:
    with pytest.raises(
        GardenHttpError, match="unable to find user alice: no matching entries in passwd file"
    ):
        garden.run(box, "true", **as_pea(image, user="alice"))


def test_PE6_working_directory(garden: GardenClientBase, box: str, image: str) -> None:
    assert garden.text_of(box, "pwd", **as_pea(image, user="operator")) == "/\n"
    assert garden.text_of(box, "pwd", **as_pea(image, dir="/var")) == "/var\n"


def test_PE7_exit_code_streams_and_signals(garden: GardenClientBase, box: str, image: str) -> None:
    assert garden.sh(box, "echo out; echo err >&2; exit 42", **as_pea(image)) == (42, b"out\n", b"err\n")
    for number, status in ((0, 143), (1, 137)):
        process = garden.run(box, "sleep", "100", **as_pea(image))
        process.signal(number)
        assert process.wait() == status
    with pytest.raises(GardenHttpError, match=r"executable file not found in \$PATH") as caught:
        garden.run(box, "no-such-program", **as_pea(image))
    assert caught.value.type == "ExecutableNotFoundError"


def test_PE7_tty(garden: GardenClientBase, box: str, image: str) -> None:
    tty = {"window_size": {"columns": 91, "rows": 17}}
    process = garden.run(box, "stty", "size", **as_pea(image, tty=tty))
    assert (process.wait(), process.stdout) == (0, b"17 91\r\n")


STATUS = "grep -E '^(Cap|Seccomp:)' /proc/self/status"


@pytest.mark.parametrize("user", ["root", "1001:1002"])
def test_PE8_capabilities_and_seccomp_are_the_containers(
    garden: GardenClientBase, box: str, image: str, user: str
) -> None:
    assert garden.text_of(box, STATUS, **as_pea(image, user=user)) == garden.text_of(box, STATUS, user=user)
    status, _, err = garden.sh(box, "unshare -U true", **as_pea(image, user="1001:1002"))
    if "2" in garden.text_of(box, "grep Seccomp: /proc/self/status"):
        assert status != 0
        assert b"Operation not permitted" in err


def fill(mib: int) -> str:
    """Keep so much memory busy, in a file of a tmpfs."""
    return f"dd if=/dev/zero of=/dev/shm/full bs=1M count={mib} 2>/dev/null"


def test_PE9_without_limits_it_shares_the_containers(garden: GardenClientBase, image: str) -> None:
    with garden.container(limits={"memory_limits": {"limit_in_bytes": 64 * MIB}}) as handle:
        garden.text_of(handle, fill(5))
        assert garden.sh(handle, fill(65), **as_pea(image))[0] != 0
        garden.text_of(handle, fill(20), **as_pea(image))


def test_PE10_empty_limits_are_none_and_its_own(garden: GardenClientBase, image: str) -> None:
    limits = {"memory_limits": {"limit_in_bytes": 64 * MIB}, "pid_limits": {"max": 20}}
    with garden.container(limits=limits) as handle:
        garden.text_of(handle, fill(65), **as_pea(image, limits={}))
        many = "for i in $(seq 40); do sleep 5 & done; jobs | wc -l"
        assert garden.text_of(handle, many, **as_pea(image, limits={})).strip() == "40"
        pea = garden.run(handle, "sh", "-c", f"{fill(80)}; echo full; sleep 100", **as_pea(image, limits={}))
        while b"full" not in pea.stdout:
            pass
        used = garden.metrics(handle)["MemoryStat"]["TotalUsageTowardLimit"]
        assert used < 40 * MIB, "it counts against the container"
        pea.signal(1)
        pea.wait()


def test_PE11_its_own_limit_ends_what_exceeds_it(garden: GardenClientBase, image: str) -> None:
    limited = as_pea(image, limits={"memory_limits": {"limit_in_bytes": 32 * MIB}})
    with garden.container() as handle:
        status, out, _ = garden.sh(handle, f"{fill(64)}; status=$?; echo after; exit $status", **limited)
        assert status != 0 or b"after" not in out
        garden.text_of(handle, fill(64))
        assert "Out of memory" not in (garden.info(handle)["Events"] or []), "EV3"


def test_PE13_destroy_ends_it_with_137(garden: GardenClientBase, image: str) -> None:
    handle = garden.create()
    peas = [
        garden.run(handle, "sleep", "100", **as_pea(image)),
        garden.run(handle, "sleep", "100", **as_pea(image, limits={})),
    ]
    garden.destroy(handle)
    assert [pea.wait() for pea in peas] == [137, 137]


@pytest.mark.garden_only("gRPC asks for a process by its container and id; tests/root/test_sidecars.py")
def test_PE14_its_id_in_metrics_and_attach(garden: GardenClientBase, box: str, image: str) -> None:
    pea = garden.run(box, "sh", "-c", f"{fill(8)}; echo ready; cat", **as_pea(image, id="the-pea"))
    while b"ready" not in pea.stdout:
        pass
    found = garden.json("GET", f"/containers/bulk_metrics?handles={box},the-pea,nobody")
    metrics = found["the-pea"]["Metrics"]
    assert (found["the-pea"]["Err"], metrics["CPUEntitlement"], metrics["NetworkStat"]) == (None, 0, None)
    assert metrics["MemoryStat"]["TotalUsageTowardLimit"] >= 8 * MIB
    assert metrics["PidStat"]["Current"] >= 1
    assert metrics["Age"] > 0
    assert found["nobody"]["Err"] is not None
    again = garden.attach(box, "the-pea")
    again.send(source=0, data="bye\n")
    again.send(source=0)
    pea.send(source=0)
    assert again.wait() == 0
    assert pea.wait() == 0
    assert pea.stdout == b"ready\nbye\n"
    found = garden.json("GET", "/containers/bulk_metrics?handles=the-pea")
    assert found["the-pea"]["Err"]["Message"] == "unknown process: the-pea"


def test_ST2_stop_reaches_it_and_what_it_started(garden: GardenClientBase, image: str) -> None:
    with garden.container() as handle:
        script = "trap 'exit 42' TERM; sleep 100 & wait"
        peas = [
            garden.run(handle, "sh", "-c", script, **as_pea(image, **more)) for more in ({}, {"limits": {}})
        ]
        time.sleep(0.3)
        garden.stop(handle, kill=False)
        assert [pea.wait() for pea in peas] == [42, 42]
