"""Containers from create to destroy, through gRPC, on real parts."""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kit.cgroups import cgroups_of
from kit.garden import PATIENCE, code_of, events_of, sh, text_of, wait_until
from kit.server import ServerProcess

from garden_py.api._pb import garden_pb2 as pb
from garden_py.api._pb import garden_pb2_grpc
from garden_py.client import (
    AlreadyExists,
    BindMount,
    Container,
    ContainerSpec,
    ContainerState,
    EventKind,
    ExitStatus,
    FailedPrecondition,
    GardenClient,
    InvalidArgument,
    Limits,
    MountMode,
    NotFound,
)

pytestmark = pytest.mark.root


@pytest.mark.cgroup2
def test_container_is_described_as_it_is(garden: GardenClient) -> None:
    """What was asked for, what was filled in, and where it is on the host."""
    spec = ContainerSpec(
        handle="described",
        env={"SECRET": "value"},
        properties={"owner": "test"},
        limits=Limits(memory_bytes=64 << 20),
        grace_time=timedelta(hours=1),
    )
    with garden.create(spec) as container:
        info = container.info()
        assert info == container.created
        assert (info.handle, info.state) == ("described", ContainerState.ACTIVE)
        assert dict(info.properties) == {"owner": "test"}
        assert dict(info.spec.env) == {"SECRET": ""}
        assert info.spec.limits.memory_bytes == 64 << 20
        assert info.spec.hostname == "described"
        assert info.spec.grace_time == timedelta(hours=1)
        assert info.container_ip.rpartition(".")[0] == info.host_ip.rpartition(".")[0]
        comm = Path(f"/proc/{info.pid}/comm").read_text()
        assert comm == "garden-init\n"
        assert cgroups_of("described")


@pytest.mark.cgroup2
def test_destroy_removes_everything(garden: GardenClient, garden_server: ServerProcess) -> None:
    """Processes, cgroups, link, directory, socket: each is looked for by name."""
    runtime = garden_server.place / "run" / "runc"
    before = set(runtime.iterdir())
    container = garden.create(ContainerSpec(handle="doomed"))
    assert set(runtime.iterdir()) > before
    container.start(sh("sleep 1000 & sleep 1000"))
    pid = container.info().pid
    container.destroy()
    assert not Path(f"/proc/{pid}/ns/net").exists()
    assert cgroups_of("doomed") == []
    assert not (garden_server.place / "state" / "containers" / "doomed").exists()
    assert set(runtime.iterdir()) == before
    with pytest.raises(NotFound):
        container.info()
    with pytest.raises(NotFound):
        container.destroy()


def ip_links() -> list[str]:
    return [path.name for path in Path("/sys/class/net").iterdir()]


def test_links_come_and_go_with_containers(garden: GardenClient) -> None:
    """One link per container on the host, and none when it is gone."""
    before = set(ip_links())
    container = garden.create()
    made = set(ip_links()) - before
    assert len(made) >= 1
    container.destroy()
    wait_until(lambda: len(set(ip_links()) & made) < len(made), "the link's end")


def test_handle_can_be_used_again_at_once(garden: GardenClient) -> None:
    """A scheduler that replaces a container need not wait, and finds nothing of the old one."""
    for _ in range(3):
        with garden.create(ContainerSpec(handle="again")) as container:
            assert code_of(container, "test ! -e /tmp/mark && touch /tmp/mark") == 0


def test_duplicate_handle_is_refused_and_the_first_lives(garden: GardenClient) -> None:
    """The loser of a race must not destroy the winner."""
    with garden.create(ContainerSpec(handle="twice")) as container:
        with pytest.raises(AlreadyExists) as refused:
            garden.create(ContainerSpec(handle="twice"))
        assert refused.value.code == "HANDLE_IN_USE"
        assert text_of(container, "echo alive") == "alive\n"


def test_many_creates_of_one_handle_have_one_winner(garden: GardenClient) -> None:
    """Eight at a time: one container, seven refusals."""

    def create(_: int) -> Container | None:
        try:
            return garden.create(ContainerSpec(handle="race"))
        except AlreadyExists:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = [container for container in pool.map(create, range(8)) if container is not None]
    assert len(made) == 1
    assert text_of(made[0], "echo winner") == "winner\n"
    made[0].destroy()


def test_request_id_makes_create_idempotent(garden: GardenClient) -> None:
    """A client that lost the answer gets the same container; another request does not."""
    spec = ContainerSpec(handle="idempotent")
    with garden.create(spec, request_id="one") as first:
        assert garden.create(spec, request_id="one").info().pid == first.info().pid
        with pytest.raises(AlreadyExists):
            garden.create(spec, request_id="two")
        with pytest.raises(AlreadyExists):
            garden.create(spec)


def test_concurrent_destroys_all_succeed(garden: GardenClient) -> None:
    """Each joins the first, or finds the container gone."""
    container = garden.create()

    def destroy(_: int) -> str:
        try:
            container.destroy()
        except NotFound:
            return "gone"
        return "done"

    with ThreadPoolExecutor(8) as pool:
        assert "done" in list(pool.map(destroy, range(8)))


def test_list_filters_and_pages(garden: GardenClient, stub: garden_pb2_grpc.GardenStub) -> None:
    """By properties, in order of handles, page by page without gap or repetition."""
    made = [
        garden.create(ContainerSpec(handle=f"page-{n}", properties={"kind": "odd" if n % 2 else "even"}))
        for n in range(4)
    ]
    assert [c.handle for c in garden.list({"kind": "even"})] == ["page-0", "page-2"]
    assert list(garden.list({"kind": "none"})) == []
    token, seen = "", []
    while True:
        page = stub.ListContainers(pb.ListContainersRequest(page_size=3, page_token=token))
        seen += [c.handle for c in page.containers]
        assert len(page.containers) <= 3
        if not (token := page.next_page_token):
            break
    assert [handle for handle in seen if handle.startswith("page-")] == [f"page-{n}" for n in range(4)]
    assert len(seen) == len(set(seen))
    for container in made:
        container.destroy()


def test_properties_are_set_and_removed(shared_box: Container) -> None:
    """In one step; absent keys are no error."""
    assert shared_box.update_properties({"a": "1", "b": "ä"}) == {"a": "1", "b": "ä"}
    assert shared_box.update_properties({"a": "2"}, remove=["b", "absent"]) == {"a": "2"}
    assert dict(shared_box.info().properties) == {"a": "2"}


def test_unused_container_is_destroyed_after_its_grace_time(garden: GardenClient) -> None:
    """It disappears by itself; one with a running stream stays."""
    used = garden.create(ContainerSpec(grace_time=timedelta(milliseconds=300)))
    process = used.run(["cat"])
    unused = garden.create(ContainerSpec(handle="unused"))
    events = events_of(garden, "unused")
    unused.set_grace_time(timedelta(milliseconds=200))
    assert next(e for e in events if e.kind is EventKind.CONTAINER_DESTROYED).handle == "unused"
    assert process.exit is None
    process.stdin.close()
    assert process.output().exit.code == 0
    wait_until(lambda: used.handle not in [c.handle for c in garden.list()], "the end of the used one")


@pytest.mark.cgroup2
def test_stop_lets_processes_choose_their_end(box: Container) -> None:
    """TERM reaches the children too, and a trap decides the exit code."""
    trapping = box.run(sh("trap 'exit 42' TERM; echo up; while :; do sleep 0.05; done"))
    parent = box.run(sh("sh -c 'echo up; exec sleep 1000'; exit 9"))
    for process in (trapping, parent):
        assert next(iter(process)).data == b"up\n"
    box.stop()
    assert trapping.wait(PATIENCE).code == 42
    assert parent.wait(PATIENCE).shell_code in (9, 143)
    assert box.info().state is ContainerState.STOPPED
    assert text_of(box, "echo again") == "again\n"
    assert box.metrics().pids == 1


def test_stop_kills_what_ignores_term_after_the_grace(box: Container) -> None:
    """Not before; and with kill at once."""
    stubborn = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    first = box.run(sh(stubborn))
    assert next(iter(first)).data == b"up\n"
    box.stop(grace=timedelta(milliseconds=300))
    assert first.wait(PATIENCE).signal == 9
    second = box.run(sh(stubborn))
    assert next(iter(second)).data == b"up\n"
    box.stop(kill=True)
    assert second.wait(PATIENCE).signal == 9


@pytest.mark.cgroup2
def test_privileged_container_is_root_of_the_host_with_its_own_network(garden: GardenClient) -> None:
    """No user namespace, no filter; still limits and an address of its own."""
    with garden.create(ContainerSpec(privileged=True, limits=Limits(pids=50))) as container:
        status = text_of(container, "cat /proc/self/status /proc/self/uid_map")
        assert "Seccomp:\t0\n" in status
        assert "         0          0 4294967295\n" in status
        host = Path("/proc/self/status").read_text()
        bounding = next(line for line in host.splitlines() if line.startswith("CapBnd"))
        assert bounding in status
        assert text_of(container, "readlink /proc/self/ns/net").strip() != str(
            Path("/proc/self/ns/net").readlink()
        )
        assert container.limits().pids == 50
        assert code_of(container, "mkdir /m && mount -t tmpfs none /m") == 0


def test_hostname_is_the_handle_or_what_was_asked_for(garden: GardenClient) -> None:
    """Long handles give their last 49 characters; the name resolves to the container's address."""
    handle = "7132-ec774112a9cd-101f8293-230e-4fa8-4138-e8244e6dcfa1"
    with garden.create(ContainerSpec(handle=handle)) as container:
        assert text_of(container, "hostname").strip() == handle[-49:]
        hosts = text_of(container, "cat /etc/hosts").splitlines()
        assert hosts == ["127.0.0.1 localhost", f"{container.info().container_ip} {handle[-49:]}"]
    with garden.create(ContainerSpec(hostname="other")) as container:
        assert text_of(container, "hostname") == "other\n"


@pytest.fixture
def host_directory(garden_server: ServerProcess) -> Path:
    directory = garden_server.place / "binds"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    return directory


def test_bind_mounts_show_files_and_directories(garden: GardenClient, host_directory: Path) -> None:
    """Read-only refuses everybody, read-write changes the host's file; missing destinations are made."""
    (host_directory / "file").write_text("content\n")
    (host_directory / "dir").mkdir()
    (host_directory / "dir" / "inner").write_text("inner\n")
    mounts = (
        BindMount(str(host_directory / "file"), "/deep/er/file"),
        BindMount(str(host_directory / "dir"), "/ro"),
        BindMount(str(host_directory / "dir"), "/rw", MountMode.READ_WRITE),
    )
    with garden.create(ContainerSpec(bind_mounts=mounts)) as container:
        assert text_of(container, "cat /deep/er/file /ro/inner") == "content\ninner\n"
        assert code_of(container, "echo x >/deep/er/file") != 0
        assert code_of(container, "touch /ro/new") != 0
        assert code_of(container, "mount -o remount,rw /ro") != 0
        assert code_of(container, "echo written >/rw/new") == 0
        assert (host_directory / "dir" / "new").read_text() == "written\n"
    assert (host_directory / "dir" / "inner").exists()


def test_written_files_belong_to_the_hosts_owner_of_the_mapped_id(
    garden: GardenClient, host_directory: Path
) -> None:
    """Id-mapped binds: container root writes as host root, so what it wrote can be read after it is gone."""
    (host_directory / "owned").mkdir()
    mounts = (BindMount(str(host_directory / "owned"), "/rw", MountMode.READ_WRITE),)
    with garden.create(ContainerSpec(bind_mounts=mounts)) as container:
        text_of(container, "touch /rw/root /rw/user; chown 1000:1000 /rw/user")
    assert (host_directory / "owned" / "root").stat().st_uid == 0
    assert (host_directory / "owned" / "user").stat().st_uid == 1000


def test_a_source_without_mapped_ids_is_the_callers_mistake(garden: GardenClient) -> None:
    """Garden statement BI3: the kernel maps no owners on a procfs. A privileged container needs no mapping."""
    mounts = (BindMount("/etc", "/a"), BindMount("/proc/sys", "/b"))
    with pytest.raises(InvalidArgument, match="mapped ids") as caught:
        garden.create(ContainerSpec(bind_mounts=mounts))
    assert caught.value.fields[0].field == "spec.bind_mounts[1].source"
    with garden.create(ContainerSpec(bind_mounts=mounts, privileged=True)) as container:
        assert code_of(container, "test -d /b/kernel") == 0


def test_capacity_counts_containers(garden: GardenClient) -> None:
    """What is in use goes up and down with creates and destroys."""
    before = garden.capacity()
    assert before.memory_bytes > 1 << 28
    assert before.disk_bytes > before.disk_free_bytes > 0
    assert before.max_containers == 253
    assert before.cpus >= 1
    assert before.ports == 50
    with garden.create() as container:
        container.map_port(80)
        during = garden.capacity()
        assert (during.containers, during.ports_in_use) == (before.containers + 1, before.ports_in_use + 1)
    after = garden.capacity()
    assert (after.containers, after.ports_in_use) == (before.containers, before.ports_in_use)


@pytest.mark.cgroup2
def test_metrics_tell_what_a_container_uses(garden: GardenClient, box: Container) -> None:
    """Memory, CPU, tasks, age; unknown handles are entries, not failures."""
    box.run(sh("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")).output()
    found = {entry.handle: entry for entry in garden.metrics([box.handle, "unknown"])}
    entry = found[box.handle]
    assert entry.error == ""
    assert entry.memory_bytes > 100_000
    assert 0 < entry.memory_working_set_bytes <= entry.memory_bytes <= entry.memory_peak_bytes
    assert entry.cpu_usage_ns > 50_000_000
    assert entry.pids == 1
    assert (entry.memory_limit_bytes, entry.pids_limit) == (0, 0)
    assert timedelta() < entry.age < timedelta(minutes=1)
    assert entry.memory_stat
    assert found["unknown"].error
    assert box.handle in {entry.handle for entry in garden.metrics()}


def test_events_tell_the_life_of_a_container(garden: GardenClient) -> None:
    """In order, with the exit status, and again for who comes later with a cursor."""
    events = events_of(garden, "watched")
    container = garden.create(ContainerSpec(handle="watched"))
    container.update_properties({"a": "b"})
    container.update_limits(Limits(pids=10))
    container.run(sh("exit 3"), id="p").output()
    container.stop()
    container.destroy()
    seen = []
    for event in events:
        seen.append(event)
        if event.kind is EventKind.CONTAINER_DESTROYED:
            break
    assert [event.kind for event in seen] == [
        EventKind.CONTAINER_CREATED,
        EventKind.PROPERTIES_CHANGED,
        EventKind.LIMITS_CHANGED,
        EventKind.PROCESS_STARTED,
        EventKind.PROCESS_EXITED,
        EventKind.CONTAINER_STOPPED,
        EventKind.CONTAINER_DESTROYED,
    ]
    exited = seen[4]
    assert exited.process_id == "p"
    assert isinstance(exited.exit, ExitStatus)
    assert exited.exit.code == 3
    again = garden.events(["watched"], after_cursor=seen[0].cursor)
    assert [next(again).cursor for _ in range(3)] == [event.cursor for event in seen[1:4]]


def test_ping_health_and_reflection(garden: GardenClient, garden_server: ServerProcess) -> None:
    """What load balancers and grpcurl need."""
    assert garden.ping()
    with grpc.insecure_channel(garden_server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "garden.v1.Garden"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=10)
        names = {service.name for service in answer.list_services_response.service}
        assert {"garden.v1.Garden", "grpc.health.v1.Health"} <= names


@pytest.mark.cgroup2
def test_broken_container_says_so_and_can_be_destroyed(garden: GardenClient) -> None:
    """PID 1 is killed from the host: processes end, waiters are answered, the reason is shown."""
    container = garden.create(ContainerSpec(handle="broken"))
    process = container.run(["sleep", "1000"], id="victim")
    events = events_of(garden, "broken")
    os.kill(container.info().pid, signal.SIGKILL)
    assert next(e for e in events if e.kind is EventKind.CONTAINER_BROKEN).details["reason"]
    assert process.wait(PATIENCE).signal == 9
    info = container.info()
    assert info.state is ContainerState.BROKEN
    # How it ended is known as long as it is a zombie, and on Linux 6.15 for good.
    assert info.state_reason in ("its PID 1 was ended by signal 9 (SIGKILL)", "its PID 1 has ended")
    assert container.wait("victim", PATIENCE) is not None
    with pytest.raises(FailedPrecondition, match="broken"):
        container.run(["true"])
    container.destroy()


def test_socket_is_for_its_group_only(garden_server: ServerProcess) -> None:
    """Mode 0660 from the first moment; nothing else of the run directory is readable by others."""
    path = garden_server.place / "run" / "garden.sock"
    assert path.stat().st_mode & 0o7777 == 0o660
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))


def test_image_that_is_no_directory_is_refused(garden: GardenClient, host_directory: Path) -> None:
    """A missing one, one that can be neither, and a file that is no tar are told apart."""
    (host_directory / "image-file").touch()
    for image, message in (
        ("/nonexistent", "does not exist"),
        ("/dev/null", "not a directory or a tar file"),
    ):
        with pytest.raises(InvalidArgument, match=message) as refused:
            garden.create(ContainerSpec(image=image))
        assert [field.field for field in refused.value.fields] == ["spec.image"]
    with pytest.raises(FailedPrecondition, match="not a tar archive"):
        garden.create(ContainerSpec(image=str(host_directory / "image-file")))


def test_unknown_method_is_unimplemented(garden_server: ServerProcess) -> None:
    """A newer client learns that the server is older."""
    with grpc.insecure_channel(garden_server.address) as channel:
        call = channel.unary_unary("/garden.v1.Garden/NoSuchCall", bytes, bytes)
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
