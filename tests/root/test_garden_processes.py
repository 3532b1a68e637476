"""Processes as Garden specifies them, through the Garden door; a test is named after its statement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from garden_image import any_client
from kit.garden import wait_until
from kit.garden_http import GardenClientBase, GardenHttpError
from kit.rights import raises_limits
from kit.server import ServerProcess

pytestmark = pytest.mark.root

ALICE = "alice"
__all__ = ["any_client"]  # the fixture `garden`


@pytest.fixture(scope="module")
def box(garden: GardenClientBase) -> Iterator[str]:
    with garden.container(env=["CONTAINER_ENV=1", "BOTH=container"]) as handle:
        yield handle


# --- identity


def test_P1_id_is_used_as_given_or_made(garden: GardenClientBase, box: str) -> None:
    given, made = garden.run(box, "true", id="my-id"), garden.run(box, "true")
    assert (given.wait(), made.wait()) == (0, 0)
    assert (given.id, len(made.id)) == ("my-id", 36)


def test_P2_id_in_use_is_refused(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sleep", "100", id="taken")
    with pytest.raises(GardenHttpError, match=r"already (in use|exists)"):
        garden.run(box, "true", id="taken")
    process.signal(1)
    assert process.wait() == 137


@pytest.mark.garden_only("processes have no bind mounts over gRPC")
def test_P3_bind_mounts_need_an_image(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError, match="bind mounts and no image provided is not allowed"):
        garden.run(box, "true", bind_mounts=[{"src_path": "/tmp", "dst_path": "/x"}])


def test_P4_start_failure_is_told_by_run(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError, match=r"executable file not found in \$PATH") as caught:
        garden.run(box, "no-such-program")
    assert caught.value.type == "ExecutableNotFoundError"
    with pytest.raises(GardenHttpError, match="stat /no/such/program: no such file or directory") as caught:
        garden.run(box, "/no/such/program")
    assert caught.value.type == "ExecutableNotFoundError"


def test_P5_lookup_uses_the_processs_own_path(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError, match="not found in"):
        garden.run(box, "hello-world", user=ALICE)
    process = garden.run(box, "hello-world", user=ALICE, env=["PATH=/sbin:/bin"])
    assert process.wait() == 0
    assert process.stdout.startswith(b"hello from")


def test_P7_only_the_standard_streams_are_open(garden: GardenClientBase, box: str) -> None:
    assert garden.text_of(box, "exec ls /proc/self/fd").split() == ["0", "1", "2", "3"]


# --- users


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0 0 | 0 10"),
        ("root", "0 0 | 0 10"),
        (ALICE, "1001 1010 | 1010 1011"),
        ("1001", "1001 1010 | 1010 1011"),
        ("1001:1002", "1001 1002 | 1002"),
        ("testuser:staff", "1000 50 | 50"),
        ("4242", "4242 0 | 0"),
        ("50000:50000", "50000 50000 | 50000"),
    ],
)
def test_U1_to_U8_users(garden: GardenClientBase, box: str, user: str, expected: str) -> None:
    assert garden.text_of(box, "echo $(id -u) $(id -g) '|' $(id -G)", user=user).strip() == expected


def test_U5_unknown_names(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError, match="unable to find user bob: no matching entries in passwd file"):
        garden.run(box, "true", user="bob")
    with pytest.raises(GardenHttpError, match="unable to find group gang: no matching entries in group file"):
        garden.run(box, "true", user="alice:gang")


def test_U6_root_needs_no_passwd(garden: GardenClientBase) -> None:
    with garden.container() as handle:
        garden.text_of(handle, "rm /etc/passwd /etc/group")
        assert garden.text_of(handle, "id -u; id -g; echo $HOME").split() == ["0", "0", "/"]
        with pytest.raises(
            GardenHttpError, match="unable to find user alice: no matching entries in passwd file"
        ):
            garden.run(handle, "true", user=ALICE)


def test_U8_users_added_at_run_time(garden: GardenClientBase) -> None:
    with garden.container() as handle:
        garden.text_of(handle, "echo 'late:x:50000:50000::/home/late:/bin/sh' >>/etc/passwd")
        assert garden.text_of(handle, "id -u; pwd", user="late").split() == ["50000", "/home/late"]


# --- environment, directories, rlimits


def test_E1_process_over_container(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "env", env=["BOTH=process", "TEST=hello"])
    assert process.wait() == 0
    lines = process.stdout.decode().splitlines()
    assert lines[:3] == ["CONTAINER_ENV=1", "BOTH=process", "TEST=hello"]


@pytest.mark.parametrize(
    ("user", "path", "name", "home"),
    [
        ("", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "root", "/root"),
        (ALICE, "/usr/local/bin:/usr/bin:/bin", "alice", "/home/alice"),
        ("1001:1002", "/usr/local/bin:/usr/bin:/bin", "1001:1002", "/home/alice"),
    ],
)
def test_E2_to_E5_defaults(
    garden: GardenClientBase, box: str, user: str, path: str, name: str, home: str
) -> None:
    process = garden.run(box, "env", user=user)
    assert process.wait() == 0
    found = dict(line.split("=", 1) for line in process.stdout.decode().splitlines())
    assert found == {"CONTAINER_ENV": "1", "BOTH": "container", "PATH": path, "USER": name, "HOME": home}


def test_E2_to_E4_given_ones_win(garden: GardenClientBase, box: str) -> None:
    given = ["PATH=/bin", "USER=me", "HOME=/tmp"]
    process = garden.run(box, "env", env=given)
    assert process.wait() == 0
    assert set(given) < set(process.stdout.decode().splitlines())


def test_W1_home_is_the_default(garden: GardenClientBase, box: str) -> None:
    assert garden.text_of(box, "pwd").strip() == "/root"
    assert garden.text_of(box, "pwd", user=ALICE).strip() == "/home/alice"
    assert garden.text_of(box, "pwd", user="4242").strip() == "/"


def test_W2_missing_directories_are_made_for_the_user(garden: GardenClientBase, box: str) -> None:
    garden.text_of(box, "mkdir /home/alice/closed && chmod 555 /home/alice/closed")
    text = garden.text_of(box, "pwd; touch f; stat -c '%U %a' . ..", user=ALICE, dir="/home/alice/closed/a/b")
    assert text.split() == ["/home/alice/closed/a/b", "alice", "755", "alice", "755"]


def test_W3_existing_directory_stays_what_it_is(garden: GardenClientBase, box: str) -> None:
    status, _, err = garden.sh(box, "touch here", user=ALICE, dir="/root")
    assert status != 0
    assert b"Permission denied" in err


def test_W4_links_in_the_path_stay_inside(garden: GardenClientBase, box: str) -> None:
    garden.text_of(box, "ln -sfn ../../../../../../../tmp /home/alice/link")
    assert (
        garden.text_of(box, "pwd -P", user=ALICE, dir="/home/alice/link/made-here").strip()
        == "/tmp/made-here"
    )
    assert not Path("/tmp/made-here").exists()


def test_R1_rlimits(garden: GardenClientBase, box: str) -> None:
    assert garden.text_of(box, "ulimit -n", rlimits={"nofile": 30}).strip() == "30"
    text = garden.text_of(box, "grep processes /proc/self/limits", rlimits={"nproc": 4567})
    assert text.split()[2:4] == ["4567", "4567"]


@pytest.mark.cgroup2
@raises_limits
def test_R3_rlimits_above_the_servers_own(garden: GardenClientBase, box: str) -> None:
    for user in ("root", ALICE):
        text = garden.text_of(box, "grep nice /proc/self/limits", user=user, rlimits={"nice": 40})
        assert text.split()[3:] == ["40", "40"]


# --- streams


def test_S1_output_is_complete_and_apart_also_of_quick_exits(garden: GardenClientBase, box: str) -> None:
    for number in range(100):
        process = garden.run(box, "sh", "-c", f"echo out{number}; echo err{number} >&2; exit {number}")
        assert process.wait() == number
        assert (process.stdout, process.stderr) == (f"out{number}\n".encode(), f"err{number}\n".encode())


def test_S1_output_of_a_terminal_is_complete(garden: GardenClientBase, box: str) -> None:
    expected = b"".join(b"%d\r\n" % n for n in range(1, 10001))
    for _ in range(10):
        process = garden.run(box, "seq", "1", "10000", tty={})
        assert process.wait() == 0
        assert process.stdout == expected


def test_S2_streams_can_be_opened_by_name(garden: GardenClientBase, box: str) -> None:
    process = garden.run(
        box, "sh", "-c", "cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr", user=ALICE
    )
    process.write("in\n")
    process.end_input()
    assert process.wait() == 0
    assert (process.stdout, process.stderr) == (b"in\nout\n", b"err\n")


def test_S3_stdin_and_its_end(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "cat")
    for _ in range(20):
        process.write("é" * 10_000)
    process.end_input()
    assert process.wait() == 0
    assert process.stdout == ("é" * 200_000).encode()


def test_S5_exit_is_told_while_stdin_still_comes(garden: GardenClientBase, box: str) -> None:
    for _ in range(10):
        process = garden.run(box, "ls", "/bin/true")
        process.write("x" * 1024)
        assert process.wait() == 0


def test_S7_background_children_delay_the_end_of_output_only(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sh", "-c", "(sleep 0.5; echo late) & echo early")
    assert process.wait() == 0
    assert process.stdout == b"early\nlate\n"


def test_S8_nobody_has_to_read(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "head", "-c", "100000000", "/dev/zero", sides=())
    assert process.wait() == 0


def test_large_output_arrives_whole(garden: GardenClientBase, box: str) -> None:
    """Through sendfile, over many segments."""
    process = garden.run(box, "head", "-c", "300000000", "/dev/zero", sides=("stdout",))
    assert process.wait() == 0
    assert process.stdout.count(0) == 300_000_000


# --- exit and signals


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_X1_codes(garden: GardenClientBase, box: str, code: int) -> None:
    assert garden.sh(box, f"exit {code}")[0] == code


@pytest.mark.parametrize("user", ["", ALICE])
def test_X2_X5_signals(garden: GardenClientBase, box: str, user: str) -> None:
    for number, expected in ((0, 143), (1, 137)):
        process = garden.run(box, "sleep", "100", user=user)
        process.signal(number)
        assert process.wait() == expected


def test_X5_twenty_runs_and_kills(garden: GardenClientBase, box: str) -> None:
    for _ in range(20):
        process = garden.run(box, "sleep", "100")
        process.signal(1)
        assert process.wait() == 137


def test_X7_trapped_term(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sh", "-c", "trap 'exit 42' TERM; echo up; while true; do sleep 0.1; done")
    while not process.stdout:
        time.sleep(0.01)
    process.signal(0)
    assert process.wait() == 42


def test_X8_six_attachers_get_the_code(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sh", "-c", "read line; exit 12", id="six")
    others = [garden.attach(box, "six") for _ in range(6)]
    process.write("go\n")
    assert [each.wait() for each in (process, *others)] == [12] * 7


# --- attach


def test_AT1_unknown_process(garden: GardenClientBase, box: str) -> None:
    with pytest.raises(GardenHttpError) as caught:
        garden.attach(box, "nobody")
    assert (caught.value.type, caught.value.error["ProcessID"]) == ("ProcessNotFoundError", "nobody")


def test_AT2_all_attached_clients_get_everything(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sh", "-c", "read x; echo out; echo err >&2", id="all")
    others = [garden.attach(box, "all") for _ in range(3)]
    process.write("go\n")
    for each in (process, *others):
        assert each.wait() == 0
        assert (each.stdout, each.stderr) == (b"out\n", b"err\n")


@pytest.mark.garden_only("a gRPC client says where it was")
def test_attach_again_loses_and_repeats_nothing(garden: GardenClientBase, box: str) -> None:
    """The client vanishes in the middle; the next one says nothing about where it was."""
    script = "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done"
    process = garden.run(box, "sh", "-c", script, id="resumed", sides=("stdout",))
    while process.stdout.count(b"\n") < 3:
        time.sleep(0.01)
    process.leave()
    process.wait_for_sides()
    again = garden.attach(box, "resumed")
    assert again.wait() == 0
    assert process.stdout + again.stdout == b"1\n2\n3\n4\n5\n6\n"


@pytest.mark.garden_only("a gRPC client says where it was")
def test_AT4_after_a_restart_of_the_server(
    garden: GardenClientBase, box: str, garden_http_server: ServerProcess
) -> None:
    """Output from where the last client was, and the exit of what ended meanwhile."""
    process = garden.run(
        box, "sh", "-c", "echo one; sleep 0.7; echo two; exit 7", id="over", sides=("stdout",)
    )
    while process.stdout != b"one\n":
        time.sleep(0.01)
    # A server that is killed in the instant between handing over and writing down would repeat these four bytes.
    record = garden_http_server.place / "state/containers" / box / "streams/over/delivered.stdout"
    wait_until(
        lambda: record.exists() and record.read_bytes()[:1] == b"\x04", "the record of what was delivered"
    )
    garden_http_server.kill()
    with pytest.raises(ConnectionError):
        process.next_message()
    process.leave()
    time.sleep(0.8)
    garden_http_server.start()
    again = garden.attach(box, "over")
    assert again.wait() == 7
    assert again.stdout == b"two\n"


# --- terminals


def test_T1_T2_T3_terminal(garden: GardenClientBase, box: str) -> None:
    process = garden.run(
        box, "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && stty size; echo err >&2", tty={}
    )
    assert process.wait() == 0
    assert (process.stdout, process.stderr) == (b"24 80\r\nerr\r\n", b"")


def test_T2_given_size(garden: GardenClientBase, box: str) -> None:
    tty = {"window_size": {"columns": 123, "rows": 456}}
    process = garden.run(box, "stty", "size", tty=tty)
    assert process.wait() == 0
    assert process.stdout == b"456 123\r\n"


def test_T4_resize(garden: GardenClientBase, box: str) -> None:
    script = "trap 'stty size; exit' WINCH; echo up; while true; do sleep 0.05; done"
    process = garden.run(box, "sh", "-c", script, tty={})
    while b"up" not in process.stdout:
        time.sleep(0.01)
    process.resize(columns=100, rows=40)
    assert process.wait() == 0
    assert process.stdout == b"up\r\n40 100\r\n"


@pytest.mark.garden_only("resizing what has no terminal is an error over gRPC")
def test_T5_T7_no_terminal(garden: GardenClientBase, box: str) -> None:
    process = garden.run(box, "sh", "-c", "test -t 1; echo $?; read x")
    process.resize(columns=100, rows=40)
    process.end_input()
    process.wait()
    assert process.stdout == b"1\n"


# --- stop


def test_ST1_ST2_ST4_stop_reaches_children(garden: GardenClientBase) -> None:
    with garden.container() as handle:
        process = garden.run(
            handle, "sh", "-c", "sh -c \"trap 'exit 42' TERM; while true; do sleep 0.1; done\" & wait; exit 3"
        )
        time.sleep(0.2)
        started = time.monotonic()
        garden.stop(handle, kill=False)
        assert time.monotonic() - started < 9
        assert process.wait() == 143
        assert garden.info(handle)["State"] == "stopped"
        assert garden.text_of(handle, "echo again") == "again\n"


def test_ST3_kill(garden: GardenClientBase) -> None:
    with garden.container() as handle:
        process = garden.run(handle, "sh", "-c", "trap '' TERM; while true; do sleep 0.1; done")
        garden.stop(handle, kill=True)
        assert process.wait() in (137, 255)


def test_X4_destroy_under_a_waiting_client(garden: GardenClientBase) -> None:
    handle = garden.create()
    process = garden.run(handle, "sleep", "100")
    garden.destroy(handle)
    assert process.wait() == 137
