"""Resource limits of processes (getrlimit(2)) above what a server gives by itself, Garden statement R3.

Raising one takes CAP_SYS_RESOURCE over the host, which is missing here and there in virtual machines; in the guest of
`scripts/test --cgroup2` the server has it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from kit.garden import code_of, sh, text_of
from kit.rights import may_raise_limits, raises_limits
from kit.server import ServerProcess

from garden_py.client import (
    Container,
    ContainerSpec,
    GardenClient,
    InvalidArgument,
    ProcessSpec,
    Sidecar,
    Tty,
)

pytestmark = pytest.mark.root
MIB = 1 << 20
UNLIMITED = (1 << 64) - 1
SHOW = "grep -E 'nice|realtime prio|locked|pending|msgqueue|processes' /proc/self/limits"
HIGH = {
    "nice": 40,
    "rtprio": 7,
    "memlock": 64 * MIB,
    "sigpending": 1 << 30,
    "msgqueue": 1 << 30,
    "nproc": 1 << 30,
}
SHOWN = {
    "Max nice priority": "40",
    "Max realtime priority": "7",
    "Max locked memory": str(64 * MIB),
    "Max pending signals": str(1 << 30),
    "Max msgqueue size": str(1 << 30),
    "Max processes": str(1 << 30),
}
# Makes as many message queues as can be, 30 at most; each takes some 80 KiB of RLIMIT_MSGQUEUE (mq_overview(7)).
QUEUES = """
#include <fcntl.h>
#include <mqueue.h>
#include <stdio.h>
int main(void) {
    char name[16];
    int made = 0;
    for (; made < 30; made++) {
        sprintf(name, "/%d", made);
        if (mq_open(name, O_CREAT | O_RDWR, 0600, 0) == (mqd_t)-1) break;
    }
    for (int i = 0; i < made; i++) {
        sprintf(name, "/%d", i);
        mq_unlink(name);
    }
    printf("%d", made);
    return 0;
}
"""


def parse(text: str) -> dict[str, str]:
    """Soft limits by name; hard ones must be the same."""
    found = {}
    for line in text.splitlines():
        soft, hard = line[25:].split()[:2]
        assert soft == hard
        found[line[:25].strip()] = soft
    return found


@raises_limits
@pytest.mark.cgroup2
@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_limits_above_the_servers_own_are_in_force(garden: GardenClient, privileged: bool) -> None:
    """For root and users, with and without a terminal, and for nobody who does not ask for them."""
    with garden.create(ContainerSpec(privileged=privileged)) as box:
        before = parse(text_of(box, SHOW))
        for user in ("", "1000:1000"):
            assert parse(text_of(box, SHOW, rlimits=HIGH, user=user)) == SHOWN
            terminal = box.run(sh(SHOW), rlimits=HIGH, user=user, tty=Tty()).output()
            assert parse(terminal.stdout.decode().replace("\r", "")) == SHOWN
        assert parse(text_of(box, SHOW)) == before
        assert not set(before.values()) & set(SHOWN.values())


@raises_limits
@pytest.mark.cgroup2
def test_a_sidecar_gets_them_too(garden_server: ServerProcess, garden: GardenClient) -> None:
    (image,) = (garden_server.place / "state/rootfs").iterdir()
    with garden.create() as box:
        spec = ProcessSpec("sh", ("-c", SHOW), sidecar=Sidecar(str(image)), rlimits=HIGH)
        assert parse(box.run(spec).output().stdout.decode()) == SHOWN


@raises_limits
@pytest.mark.cgroup2
def test_what_user_namespaces_count_is_not_held_back(garden: GardenClient, tmp_path: Path) -> None:
    """The kernel counts queues against the namespace's maker as well, and would refuse what the limit allows."""
    (tmp_path / "queues.c").write_text(QUEUES)
    subprocess.run(["gcc", "-static", "-o", tmp_path / "queues", tmp_path / "queues.c", "-lrt"], check=True)
    with garden.create() as box:
        box.write_file("/queues", (tmp_path / "queues").read_bytes(), mode=0o755)
        for user in ("", "1000"):
            assert text_of(box, "/queues", user=user, rlimits={"msgqueue": 1 << 30}) == "30"
            assert text_of(box, "/queues", user=user, rlimits={"msgqueue": UNLIMITED}) == "30"
            assert int(text_of(box, "/queues", user=user, rlimits={"msgqueue": 300_000})) < 5


@pytest.mark.parametrize("privileged", [False, True], ids=["unprivileged", "privileged"])
def test_what_nobody_states_is_the_servers(
    garden_server: ServerProcess, garden: GardenClient, privileged: bool
) -> None:
    """Statement R2; whatever the launcher has lifted for itself."""
    names = (
        "locked memory",
        "pending signals",
        "msgqueue size",
        "nice",
        "realtime priority",
        "stack",
        "processes",
    )
    own = Path(f"/proc/{garden_server.pid}/limits").read_text().splitlines()
    with garden.create(ContainerSpec(privileged=privileged)) as box:
        shown = text_of(box, "cat /proc/self/limits").splitlines()
    for name in names:
        (ours,) = [line.split() for line in own if name in line]
        (theirs,) = [line.split() for line in shown if name in line]
        assert theirs == ours


def test_more_than_the_kernel_allows_is_refused(garden: GardenClient) -> None:
    """By name, nothing has run, and the container goes on."""
    with garden.create() as box:
        too_many = int(Path("/proc/sys/fs/nr_open").read_text()) + 1
        for limits in ({"nofile": too_many}, {"nproc": 100, "nofile": too_many}):
            with pytest.raises(
                InvalidArgument, match=f"nofile={too_many}: Operation not permitted"
            ) as caught:
                box.run(sh("touch /ran"), rlimits=limits)
            assert caught.value.fields[0].field == "spec.rlimits"
        assert code_of(box, "test -e /ran") == 1
        assert still_counts(box)


@pytest.mark.skipif(may_raise_limits(), reason="root may raise limits here")
def test_without_the_right_it_is_refused(garden: GardenClient) -> None:
    with garden.create() as box:
        with pytest.raises(InvalidArgument, match="nice=40: Operation not permitted"):
            box.run(["true"], rlimits={"nice": 40})
        assert still_counts(box)


def still_counts(box: Container) -> bool:
    """Whether limits below the server's own work."""
    return text_of(box, "ulimit -n", rlimits={"nofile": 30}) == "30\n"
