"""The tour that scripts/quickstart gives. Every step is a command a user would type, and is checked."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GARDEN = str(Path(sys.executable).with_name("garden"))
TIMEOUT_S = 60
BOLD, DIM, GREEN, RED, END = (
    ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("",) * 5
)


class StepFailed(Exception):
    """A step did not do what it says."""


class Tour:
    """Runs steps, prints what they do, keeps the times."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.address = f"unix:{place}/run/garden.sock"
        self.times: list[tuple[str, float]] = []
        self.environment = {**os.environ, "GARDEN_ADDRESS": self.address}

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One chapter of the tour; its time goes into the table."""
        print(f"\n{BOLD}{len(self.times) + 1}. {title}{END}", flush=True)
        started = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - started))

    def garden(self, *args: str, stdin: str | None = None, expect: int = 0) -> str:
        """Run a garden command as a user would, show it and its output, and check its exit code."""
        shown = f"printf {shlex.quote(stdin)} | " if stdin is not None else ""
        print(f"   {DIM}${END} {shown}garden {shlex.join(args)}", flush=True)
        process = subprocess.Popen(
            [GARDEN, *args],
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            text=True,
        )
        watchdog = threading.Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        if stdin is not None and process.stdin is not None:
            process.stdin.write(stdin)
            process.stdin.close()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:  # as it comes: output is live
            print(f"     {line}", end="", flush=True)
            lines.append(line)
        status = process.wait()
        watchdog.cancel()
        if status != expect:
            raise StepFailed(f"`garden {shlex.join(args)}` ended with {status}, not {expect}")
        return "".join(lines)

    def check(self, what: str, truth: bool) -> None:
        """Say what was checked; stop the tour if it is not so."""
        print(f"     {GREEN}ok{END} {what}" if truth else f"     {RED}NOT SO{END} {what}", flush=True)
        if not truth:
            raise StepFailed(what)

    def start_server(self) -> subprocess.Popen[str]:
        """Start a server with directories and pools of its own."""
        flags = ["--state-dir", str(self.place / "state"), "--run-dir", str(self.place / "run")]
        flags += [
            "--network-pool",
            "10.253.128.0/24",
            "--port-pool-start",
            "40000",
            "--port-pool-size",
            "100",
        ]
        flags += ["--default-egress", "deny", "--log-level", "info"]
        print(f"   {DIM}${END} garden server {shlex.join(flags)}", flush=True)
        log = (self.place / "server.log").open("w")
        with log:
            server = subprocess.Popen(
                [GARDEN, "server", *flags],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert server.stdout is not None
        line = server.stdout.readline()
        print(f"     {line}", end="")
        self.check("the server says that it is ready", line.startswith("garden server ready"))
        return server


def host_state() -> dict[str, set[str]]:
    """What containers could leave on the host."""

    def lines(*argv: str) -> set[str]:
        return set(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines())

    return {
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "links": {line.split()[1] for line in lines("ip", "-o", "link")},
        "nft tables": lines("nft", "list", "tables"),
        "cgroups": {str(p) for p in Path("/sys/fs/cgroup").glob("**/garden-*") if p.is_dir()},
    }


def create_and_run(tour: Tour) -> None:
    """Steps about one container."""
    with tour.step("Create a container with a memory limit of 64 MiB"):
        handle = tour.garden("create", "--handle", "first", "--memory", "64M", "--pids", "64").strip()
        tour.check("it has the handle that was asked for", handle == "first")
    with tour.step("Run a process; its output arrives while it runs"):
        out = tour.garden(
            "run", "first", "sh", "-c", "for i in 1 2 3; do echo line $i; sleep 0.2; done; exit 7", expect=7
        )
        tour.check("three lines came, and exit code 7 was passed on", out == "line 1\nline 2\nline 3\n")
    with tour.step("Feed a process's stdin"):
        text = "to be sorted\nby a process\nin the container\n"
        out = tour.garden("run", "-i", "first", "sort", stdin=text)
        tour.check("it read to the end and sorted", out.splitlines() == sorted(text.splitlines()))
    with tour.step("A process that takes more memory than it may is killed, and the reason is told"):
        out = tour.garden(
            "run",
            "--id",
            "hog",
            "first",
            "sh",
            "-c",
            "exec dd if=/dev/zero of=/dev/shm/hog bs=1M count=200",
            expect=137,
        )
        out = tour.garden("ps", "first")
        info = tour.garden("info", "first")
        tour.check("the reason is out of memory", "memory" in out.lower() and "Out of memory" in info)
        tour.garden("run", "first", "sh", "-c", "rm -f /dev/shm/hog; echo the container lives on")


def talk(tour: Tour) -> None:
    """Steps about the network: rules that change while the process runs."""
    with tour.step("A second container serves TCP; its egress policy and ours are closed"):
        tour.garden("create", "--handle", "second")
        tour.garden(
            "run",
            "-d",
            "--id",
            "web",
            "second",
            "sh",
            "-c",
            "mkdir -p /srv; echo hello from the second > /srv/index.html; exec httpd -f -p 8080 -h /srv",
        )
        address = next(
            line.split()[-1]
            for line in tour.garden("info", "second").splitlines()
            if "container_ip" in line or "10.253.128." in line
        )
        address = next(
            word.strip('",') for word in address.split() if word.strip('",').startswith("10.253.128.")
        )
    # busybox wget of Debian's static build needs NSS libraries for any name or address; nc does not.
    fetch = ["sh", "-c", f"printf 'GET /index.html HTTP/1.0\\n\\n' | nc -w 3 {address} 8080"]
    with tour.step("Denied: a process in the first container cannot connect"):
        out = tour.garden("run", "first", *fetch, expect=1)
        tour.check("the connection was refused", "refused" in out)
    with tour.step("Allowed: a rule is set on the running container"):
        tour.garden("egress", "add", "first", f"tcp:{address}:8080")
        out = tour.garden("run", "first", *fetch)
        tour.check("the page came", out.endswith("hello from the second\n"))
    with tour.step("Denied again: the rule is removed"):
        tour.garden("egress", "remove", "first", f"tcp:{address}:8080")
        out = tour.garden("run", "first", *fetch, expect=1)
        tour.check("the connection was refused", "refused" in out)


def copy(tour: Tour) -> None:
    """Copy in and out."""
    with tour.step("Copy a file in and out again"):
        source, back = tour.place / "copy-in", tour.place / "copy-out"
        source.mkdir()
        (source / "data").write_bytes(os.urandom(1 << 20))
        tour.garden("cp", str(source / "data"), "first:/root/")
        tour.garden("run", "first", "ls", "-l", "/root/data")
        back.mkdir()
        tour.garden("cp", "first:/root/data", str(back))
        same = (
            hashlib.sha256((back / "data").read_bytes()).digest()
            == hashlib.sha256((source / "data").read_bytes()).digest()
        )
        tour.check("1 MiB came back byte for byte", same)


def clean_up(tour: Tour, server: subprocess.Popen[str], before: dict[str, set[str]]) -> None:
    """Destroy, stop, and compare the host with how it was."""
    with tour.step("Destroy both containers"):
        tour.garden("destroy", "first", "second")
        tour.check("the server knows no container any more", not tour.garden("list", "-q").strip())
    with tour.step("Stop the server; the host is as clean as before"):
        server.send_signal(signal.SIGTERM)
        tour.check("it ended with status 0", server.wait(30) == 0)
        deadline = time.monotonic() + 10
        while (
            left := {k: sorted(v - before[k]) for k, v in host_state().items() if v - before[k]}
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        tour.check(f"no mount, link, nft table or cgroup is left {left or ''}", not left)


def main() -> int:
    """Give the tour; 0 if every step did what it says."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the server running and say how to use it")
    keep = parser.parse_args().keep
    before = host_state()
    place = Path(tempfile.mkdtemp(prefix="garden-", dir="/var/tmp"))
    place.chmod(0o711)
    tour = Tour(place)
    server: subprocess.Popen[str] | None = None
    try:
        with tour.step("Start a server"):
            server = tour.start_server()
        create_and_run(tour)
        talk(tour)
        copy(tour)
        if keep:
            say_how_to_go_on(tour, server)
            return 0
        clean_up(tour, server, before)
    except StepFailed as failure:
        print(f"\n{RED}quickstart failed:{END} {failure}\nthe server's log is {place}/server.log")
        return 1
    finally:
        if server is not None and server.poll() is None and not keep:
            put_away(tour, server)
    shutil.rmtree(place)
    print(
        f"\n{BOLD}Times{END} (each with the start of the command line, about a quarter of a second a command)"
    )
    for title, took_s in tour.times:
        print(f"   {took_s:6.2f} s  {title}")
    return 0


def put_away(tour: Tour, server: subprocess.Popen[str]) -> None:
    """After a failed step: leave nothing running."""
    subprocess.run(
        [GARDEN, "destroy", "--all", "--yes"], env=tour.environment, check=False, timeout=TIMEOUT_S
    )
    server.terminate()
    server.wait(30)


def say_how_to_go_on(tour: Tour, server: subprocess.Popen[str]) -> None:
    """What to type next."""
    print(f"""
{BOLD}The server keeps running{END} (pid {server.pid}, log {tour.place}/server.log). Use it:

   export GARDEN_ADDRESS={tour.address} PATH={Path(GARDEN).parent}:$PATH
   garden list
   garden run -it first sh

and when you are done:

   garden destroy --all --yes; kill {server.pid}; rm -r {tour.place}
""")


if __name__ == "__main__":
    sys.exit(main())
