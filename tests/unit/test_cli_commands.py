"""Every command against the fake server: what it prints, where, and its exit code."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from kit.fake_server import FakeGarden, flood_bytes, serve_fake

from garden_py.api._pb import garden_pb2 as pb
from garden_py.cli.main import run_command
from garden_py.cli.render import table_lines


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Garden = Callable[..., Result]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGarden]:
    with serve_fake(tmp_path) as running:
        monkeypatch.setenv("GARDEN_ADDRESS", running.address)
        yield running.garden


@pytest.fixture
def garden(fake: FakeGarden, capfd: pytest.CaptureFixture[str]) -> Garden:
    """Runs a command line in this process; stdin is empty."""

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        code = run_command(arguments)
        sys.stdout.flush()
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def garden_with_stdin(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command line in a process of its own, with stdin."""
    argv = [sys.executable, "-m", "garden_py", *arguments]
    return subprocess.run(
        argv, input=data, capture_output=True, timeout=60, check=False, env=dict(os.environ)
    )


def test_create_sends_every_option_and_prints_the_handle(garden: Garden, fake: FakeGarden) -> None:
    """The handle is all that a script wants to know."""
    result = garden(
        "create", "--handle", "web", "--image", "/srv/root", "--privileged", "--env", "A=1", "--property", "p=q",
        "--mount", "/a:/b:rw", "--memory", "64M", "--cpu-weight", "50", "--cpu-quota", "50%", "--pids", "9",
        "--grace-time", "10m", "--publish", "8080:80", "--egress-default", "deny", "--egress", "tcp:10.0.0.0/8:80-90",
        "--hostname", "h", "--request-id", "r",
    )  # fmt: skip
    assert result == Result(0, "web\n", "")
    spec = fake.containers["web"].message.spec
    assert (spec.image, spec.privileged, list(spec.env), spec.hostname) == ("/srv/root", True, ["A=1"], "h")
    assert dict(spec.properties) == {"p": "q"}
    assert spec.bind_mounts[0] == pb.BindMount(source="/a", destination="/b", mode=pb.BindMount.READ_WRITE)
    assert spec.limits == pb.Limits(memory_bytes=64 << 20, cpu_weight=50, cpu_quota_us=50_000, pids=9)
    assert spec.grace_time.seconds == 600
    assert spec.port_mappings[0] == pb.PortMapping(host_port=8080, container_port=80)
    assert spec.egress.default_action == pb.EgressPolicy.DENY
    assert spec.egress.rules[0] == pb.EgressRule(
        action=pb.EgressPolicy.ALLOW,
        protocol=pb.EgressRule.TCP,
        networks=["10.0.0.0/8"],
        ports=[pb.PortRange(start=80, end=90)],
    )


def test_a_create_without_options_makes_no_statement(garden: Garden, fake: FakeGarden) -> None:
    """Unset must stay unset on the wire, or the server's defaults would never apply."""
    handle = garden("create").out.strip()
    spec = fake.containers[handle].message.spec
    assert not spec.HasField("grace_time")
    assert not spec.HasField("egress")
    assert spec.limits == pb.Limits()


def test_run_passes_output_and_exit_code_on(garden: Garden) -> None:
    """A container's program behaves like a local one."""
    garden("create", "--handle", "c")
    assert garden("run", "c", "emit", "out", "err", "3") == Result(3, "out", "err")


def test_run_passes_a_signals_death_on(garden: Garden, fake: FakeGarden) -> None:
    """128 + N, as shells have it."""
    garden("create", "--handle", "c")
    garden("run", "-d", "--id", "p", "c", "sleep")
    garden("signal", "c", "p", "TERM")
    assert garden("attach", "c", "p").code == 128 + 15


def test_options_after_the_handle_are_the_programs(garden: Garden, fake: FakeGarden) -> None:
    """`garden run c ls -l` must not ask for an option -l."""
    garden("create", "--handle", "c")
    garden("run", "--id", "p", "c", "env", "-l", "--memory", "-i")
    assert list(fake.containers["c"].processes["p"].spec.args) == ["-l", "--memory", "-i"]


def test_run_sends_every_option(garden: Garden, fake: FakeGarden) -> None:
    """Limits of the process are its own, apart from the container's."""
    garden("create", "--handle", "c")
    result = garden(
        "run", "-d", "--id", "p", "--user", "alice", "--dir", "/w", "--env", "A=b", "--rlimit", "nofile=9",
        "--memory", "8M", "--pids", "4", "--retention", "1M", "-t", "c", "sleep", "1",
    )  # fmt: skip
    assert result.out == "p\n"
    spec = fake.containers["c"].processes["p"].spec
    assert (spec.user, spec.dir, dict(spec.rlimits), spec.output_retention_bytes) == (
        "alice",
        "/w",
        {"nofile": 9},
        1 << 20,
    )
    assert spec.limits == pb.Limits(memory_bytes=8 << 20, pids=4)
    assert spec.HasField("tty")
    assert "A=b" in spec.env


def test_run_feeds_stdin_to_the_process(fake: FakeGarden, garden: Garden) -> None:
    """Bytes, not text, and the end of file."""
    garden("create", "--handle", "c")
    data = bytes(range(256)) * 3000
    done = garden_with_stdin(data, "run", "-i", "c", "cat")
    assert (done.returncode, done.stdout) == (0, data)


def test_logs_are_exact_from_any_offset(garden: Garden, fake: FakeGarden) -> None:
    """What is printed can be compared byte by byte."""
    garden("create", "--handle", "c")
    garden("run", "-d", "--id", "p", "c", "flood", "1000")
    assert garden("logs", "c", "p").out == flood_bytes(1000).decode()
    assert garden("logs", "--from", "990", "c", "p").out == flood_bytes(1000)[990:].decode()
    assert garden("logs", "--stderr", "c", "p").out == ""


def test_attach_shows_output_from_an_offset(garden: Garden) -> None:
    """And the exit code of the process, also if it has ended."""
    garden("create", "--handle", "c")
    garden("run", "-d", "--id", "p", "c", "emit", "0123456789", "", "7")
    assert garden("attach", "--from", "4", "c", "p") == Result(7, "456789", "")


def test_list_filters_and_prints_handles_for_scripts(garden: Garden) -> None:
    """`list -q | xargs destroy` is the idiom."""
    for name, owner in (("a", "x"), ("b", "y"), ("c", "x")):
        garden("create", "--handle", name, "--property", f"owner={owner}")
    assert garden("list", "-q", "--property", "owner=x").out == "a\nc\n"
    assert garden("list").out.splitlines()[0].split()[:2] == ["HANDLE", "STATE"]
    assert [each["handle"] for each in json.loads(garden("list", "-o", "json").out)] == ["a", "b", "c"]


def test_info_as_json_has_the_names_of_the_protocol(garden: Garden) -> None:
    """Programs read proto field names, whatever the table says."""
    garden("create", "--handle", "c", "--memory", "64M")
    info = json.loads(garden("info", "c", "-o", "json").out)
    assert set(info) == {field.name for field in pb.Container.DESCRIPTOR.fields}
    assert set(info["spec"]) == {field.name for field in pb.ContainerSpec.DESCRIPTOR.fields}
    assert (info["state"], info["spec"]["limits"]["memory_bytes"]) == ("ACTIVE", 64 << 20)


@pytest.mark.parametrize(
    "command", [["ps", "c"], ["metrics"], ["capacity"], ["limits", "c"], ["egress", "get", "c"]]
)
def test_every_table_has_a_json_form(garden: Garden, command: list[str]) -> None:
    """-o json anywhere."""
    garden("create", "--handle", "c")
    garden("run", "c", "emit", "", "", "0")
    assert json.loads(garden(*command, "-o", "json").out)
    assert garden(*command).out.strip()


def test_egress_add_and_remove_survive_a_concurrent_change(garden: Garden, fake: FakeGarden) -> None:
    """Read, change, write with etag; again when somebody else was faster."""
    garden("create", "--handle", "c")
    assert garden("egress", "set", "c", "--default", "deny", "tcp:10.0.0.0/8:443").code == 0
    fake.conflicts = 3
    assert garden("egress", "add", "c", "--at", "1", "deny all:169.254.169.254 log").code == 0
    assert fake.conflicts == 0
    shown = [line.split("  ")[1].strip() for line in garden("egress", "get", "c").out.splitlines()[1:]]
    assert shown == ["deny all:169.254.169.254 log", "tcp:10.0.0.0/8:443", "default: deny"]
    beyond = garden("egress", "add", "c", "--at", "4", "tcp:10.0.0.1:80")
    assert (beyond.code, beyond.err) == (2, "garden: --at 4: the last rule is 2\n")
    assert garden("egress", "remove", "c", "tcp:10.0.0.0/8:443").code == 0
    assert len(fake.containers["c"].egress.rules) == 1
    assert fake.containers["c"].egress.default_action == pb.EgressPolicy.DENY


def test_removing_a_rule_that_is_not_there_changes_nothing(garden: Garden, fake: FakeGarden) -> None:
    """A typo must not pass for success."""
    garden("create", "--handle", "c", "--egress", "udp:1.2.3.4:53")
    result = garden("egress", "remove", "c", "udp:1.2.3.4:54")
    assert (result.code, len(fake.containers["c"].egress.rules)) == (2, 1)


def test_limits_of_block_io(garden: Garden, fake: FakeGarden) -> None:
    """Sizes per second with their units, at create and live."""
    garden("create", "--handle", "c", "--io-read", "20M", "--io-weight", "50")
    garden("limits", "c", "--io-write-ops", "9", "--io-read", "0")
    assert fake.containers["c"].limits == pb.Limits(io_read_bytes_per_s=0, io_weight=50, io_write_ops_per_s=9)


def test_swap_on_top_of_memory(garden: Garden, fake: FakeGarden) -> None:
    """A size, or as much as there is; none is not shown."""
    garden("create", "--handle", "c", "--memory", "64M", "--swap", "32M")
    assert fake.containers["c"].limits == pb.Limits(memory_bytes=64 << 20, swap_bytes=32 << 20)
    assert garden("limits", "c").out == "memory 64.0M, swap 32.0M\n"
    assert "swap unlimited" in garden("limits", "c", "--swap", "unlimited").out
    assert garden("limits", "c", "--swap", "0").out == "memory 64.0M\n"


def test_rlimits_of_a_container(garden: Garden, fake: FakeGarden) -> None:
    """At create and live; the options of `run` are the process's own."""
    garden("create", "--handle", "c", "--rlimit", "nofile=9", "--rlimit", "core=unlimited")
    assert fake.containers["c"].limits == pb.Limits(rlimits={"nofile": 9, "core": (1 << 64) - 1})
    assert garden("limits", "c", "--rlimit", "core=0").out == "rlimits core=0 nofile=9\n"


def test_limits_are_changed_only_where_given(garden: Garden, fake: FakeGarden) -> None:
    """The rest stays as it is."""
    garden("create", "--handle", "c", "--memory", "64M", "--pids", "5")
    garden("limits", "c", "--memory", "1G")
    assert fake.containers["c"].limits == pb.Limits(memory_bytes=1 << 30, pids=5)


def test_properties_are_set_read_and_removed(garden: Garden) -> None:
    """One value for scripts, all for people."""
    garden("create", "--handle", "c")
    garden("properties", "set", "c", "a=1", "b=2")
    garden("properties", "rm", "c", "a")
    assert garden("properties", "get", "c").out == "b=2\n"
    assert garden("properties", "get", "c", "b").out == "2\n"
    assert json.loads(garden("properties", "get", "c", "b", "-o", "json").out) == "2"
    assert garden("properties", "get", "c", "a").code == 1


def test_publish_prints_the_mapping_that_was_made(garden: Garden) -> None:
    """The host port may be the server's choice."""
    garden("create", "--handle", "c")
    assert garden("publish", "c", "99").out == "61001->99/tcp\n"


def test_a_process_that_was_not_started_has_the_exit_codes_of_env(garden: Garden) -> None:
    """Which a program's own 1 cannot be taken for."""
    garden("create", "--handle", "c")
    assert garden("run", "c", "nosuch").code == 127
    assert garden("run", "-d", "nobody", "true").code == 125
    assert garden("run", "nobody", "true").code == 125
    assert garden("run", "--address", "/nothing.sock", "c", "true").code == 125


def test_the_version_needs_no_server() -> None:
    done = garden_with_stdin(b"", "--version")
    assert (done.returncode, done.stdout.decode()) == (0, f"garden {version('garden-py')}\n")


def test_an_interrupt_while_the_command_is_loaded_is_no_trace_of_python() -> None:
    """Whenever it comes."""
    for delay_s in (0.03, 0.06, 0.1, 0.15, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-m", "garden_py", "events", "--address", "/nothing.sock"],
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "/garden_py/" not in err, err  # before that it is Python itself that is interrupted


def test_copies_go_in_and_out(garden: Garden, fake: FakeGarden, tmp_path: Path) -> None:
    """By the rules of docker cp."""
    garden("create", "--handle", "c")
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("hello")
    assert garden("cp", str(source), "c:/new").code == 0
    assert fake.containers["c"].files == {"/new/file": b"hello"}
    assert garden("cp", str(source), "c:/new").code == 0
    assert fake.containers["c"].files["/new/source/file"] == b"hello"
    assert garden("cp", "c:/new/file", str(tmp_path / "renamed")).code == 0
    assert (tmp_path / "renamed").read_text() == "hello"
    assert garden("cp", "c:/new/.", str(tmp_path / "contents")).code == 0
    assert (tmp_path / "contents" / "source" / "file").read_text() == "hello"


def test_a_dash_is_a_tar_stream(garden: Garden, fake: FakeGarden) -> None:
    """For pipes to and from tar."""
    garden("create", "--handle", "c")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo("name")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"hello"))
    assert garden_with_stdin(packed.getvalue(), "cp", "-", "c:/in").returncode == 0
    done = garden_with_stdin(b"", "cp", "c:/in", "-")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert tar.getnames() == ["in", "in/name"]


def test_destroy_takes_many_and_reports_the_missing(garden: Garden, fake: FakeGarden) -> None:
    """One that fails must not keep the others."""
    for name in "abc":
        garden("create", "--handle", name)
    result = garden("destroy", "a", "nosuch", "b")
    assert (result.code, result.err) == (1, "garden: unknown handle: nosuch\n")
    assert list(fake.containers) == ["c"]


def test_destroy_all_asks_first(garden: Garden, fake: FakeGarden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal nobody can agree, so nothing is destroyed."""
    garden("create", "--handle", "a")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert garden("destroy", "--all").code == 1
    assert garden("destroy").code == 2
    assert list(fake.containers) == ["a"]
    assert garden("destroy", "--all", "--yes").code == 0
    assert not fake.containers


def test_events_are_json_lines(garden: Garden, fake: FakeGarden) -> None:
    """One object per line, readable as they come."""
    fake.events = [pb.Event(cursor=number, kind=pb.Event.PROCESS_EXITED, handle="c") for number in (1, 2, 3)]
    lines = garden("events", "-f", "--count", "2", "-o", "json").out.splitlines()
    assert [json.loads(line)["cursor"] for line in lines] == [1, 2]


def test_what_a_terminal_would_obey_is_written_out(garden: Garden) -> None:
    """Properties are callers' words, commands those of whoever runs them; JSON has them as they are."""
    obeyed = "a\x1b]0;b\x07\nc"
    garden("create", "--handle", "c", "--property", f"k={obeyed}")
    assert "k=a\\x1b]0;b\\x07\\nc\n" in garden("info", "c").out
    assert json.loads(garden("info", "c", "-o", "json").out)["spec"]["properties"]["k"] == obeyed
    assert table_lines(["A"], [["\x1b[31m"]]) == ["A", "\\x1b[31m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--handle", "a/b"], "spec.handle: no slashes"),
        (["create", "--memory", "12Q"], "--memory: '12Q' is not a size"),
        (["create", "--egress", "tpc:1.2.3.4"], "rule 'tpc:1.2.3.4'"),
        (["nosuch"], "nosuch"),
        (["create", "--handle", ""], "--handle is empty"),
        (["create", "--memory", "0.0000001M"], "is less than a byte"),
        (["create", "--cpu-quota", "0.0001%"], "is less than a microsecond"),
        (["destroy", "--all", "web"], "not both"),
        (["run", "--image-user", "u", "c", "true"], "--image-password-file"),
        (["ping", "--address", "nonsense"], "nonsense"),
        (["metrics", "web/"], "web/: a HANDLE or HANDLE/PROCESS is needed"),
        (["metrics", ""], "is needed"),
        (["run", "c", "echo", "a\udcff"], r"b'a\xff' is no UTF-8"),
        (["create", "--property", "a=\udcff"], r"b'\xff' is no UTF-8"),
        (["grace-time", "c", "9" * 20 + "d"], "is more than ten thousand years"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(garden: Garden, arguments: list[str], message: str) -> None:
    """Whoever refused it, the command line or the server."""
    result = garden(*arguments)
    assert result.code == 2
    assert result.err.startswith("garden: ")
    assert result.err.count("\n") == 1
    assert message in result.err


def test_a_failure_is_one_line_and_exit_code_1(garden: Garden) -> None:
    """The server's own sentence."""
    assert garden("info", "nosuch") == Result(1, "", "garden: unknown handle: nosuch\n")


def test_an_absent_server_is_said_in_words(garden: Garden, tmp_path: Path) -> None:
    """The first thing a new user meets."""
    result = garden("ping", "--address", f"{tmp_path}/nothing.sock")
    assert result.code == 1
    assert "is `garden server` running?" in result.err
    assert f"{tmp_path}/nothing.sock" in result.err
    assert "No such file" in result.err


def test_stop_grace_time_and_ping_reach_the_server(garden: Garden, fake: FakeGarden) -> None:
    """The small ones."""
    garden("create", "--handle", "c")
    assert garden("stop", "c", "--grace", "1s").code == 0
    assert fake.containers["c"].message.state == pb.STOPPED
    assert garden("grace-time", "c", "30m").code == 0
    assert fake.containers["c"].message.spec.grace_time.seconds == 1800
    assert "fake 1" in garden("ping").out


def test_inspect_is_everything_about_one_container(garden: Garden) -> None:
    garden("create", "--handle", "c", "--memory", "64M", "--env", "PASSWORD=hidden")
    shown = garden("inspect", "c")
    assert (shown.code, shown.err) == (0, "")
    assert {"limits", "egress", "usage"} <= set(shown.out.split())
    assert "hidden" not in shown.out
    told = json.loads(garden("inspect", "c", "-o", "json").out)
    assert set(told) == {"container", "limits", "egress", "processes", "metrics", "problems"}
    assert told["problems"] == {}
    assert garden("inspect", "nobody").code == 1


@pytest.mark.parametrize("network", [("none",), ("host", "--privileged")])
def test_inspect_of_a_container_without_a_link_has_no_problem(
    garden: Garden, network: tuple[str, ...]
) -> None:
    """It has no egress policy, which is as it should be."""
    garden("create", "--handle", "c", "--network", *network)
    assert "none: the container has no link of its own" in garden("inspect", "c").out
    told = json.loads(garden("inspect", "c", "-o", "json").out)
    assert (told["egress"], told["problems"]) == (None, {})


def test_diagnose_passes_the_tar_on_as_it_comes(garden: Garden) -> None:
    garden("create", "--handle", "c")
    assert garden("diagnose", "c") == Result(0, "a tar in pieces", "")
    assert garden("diagnose", "nobody").code == 1


@pytest.mark.parametrize(
    "arguments", [("events", "--after"), ("limits", "web", "--pids"), ("logs", "web", "p", "--from")]
)
def test_numbers_that_no_message_holds_are_bad_input(garden: Garden, arguments: tuple[str, ...]) -> None:
    """The server cannot refuse them: they do not get there."""
    number = "9" * 20
    result = garden(*arguments, number)
    assert (result.code, result.err) == (2, f"garden: {number} is too large a number\n")


def garden_without_streams(closing: str, *arguments: str) -> int:
    """Runs a command line with streams closed, e.g. `<&- >&-`; its exit code."""
    argv = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-m", "garden_py", *arguments]
    return subprocess.run(argv, timeout=60, check=False, stderr=subprocess.DEVNULL).returncode


def test_closed_streams_are_empty_and_take_anything(garden: Garden, fake: FakeGarden) -> None:
    """Supervisors and cron jobs start programs so; without stdin, a process that reads it would never end."""
    garden("create", "--handle", "c")
    assert garden_without_streams("<&-", "run", "-i", "c", "cat") == 0
    assert garden_without_streams(">&-", "run", "c", "emit", "out", "err", "3") == 3
    assert garden_without_streams("<&- >&- 2>&-", "run", "c", "emit", "out", "err", "3") == 3
    assert garden_without_streams(">&-", "list") == 0


def test_a_stdout_that_does_not_block_gets_everything(garden: Garden, fake: FakeGarden) -> None:
    """Pipes of event-driven parents are so, and terminals that one of these has had."""
    garden("create", "--handle", "c")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    argv = [sys.executable, "-m", "garden_py", "run", "c", "flood", "400000"]
    with subprocess.Popen(argv, stdout=writing, stdin=subprocess.DEVNULL) as process:
        os.close(writing)
        time.sleep(1)
        with os.fdopen(reading, "rb") as pipe:
            assert pipe.read() == flood_bytes(400_000)
    assert process.returncode == 0


def test_what_the_terminal_has_no_letters_for_is_written_in_numbers(
    garden: Garden, fake: FakeGarden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a trace of Python."""
    garden("create", "--handle", "c", "--property", "k=\u043a")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = garden_with_stdin(b"", "info", "c")
    assert done.returncode == 0
    assert b"k=\\u043a" in done.stdout


def test_a_password_that_is_no_text_is_bad_input(garden: Garden, tmp_path: Path) -> None:
    """A file of another kind, most likely."""
    (tmp_path / "key").write_bytes(b"\xff\xfe")
    words = ("create", "--image", "docker:///x", "--image-user", "u", "--image-password-file")
    assert garden(*words, str(tmp_path / "key")) == Result(2, "", f"garden: {tmp_path}/key is not in UTF-8\n")
