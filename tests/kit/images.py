"""Root file systems for tests: a Debian made once per machine, and one that holds a single static program."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kit.guest import in_guest

CACHE = Path("/var/cache/garden-tests")
DEBOOTSTRAP_TIMEOUT_S = 600
_APT = Path("/etc/apt")

HELLO_SOURCE = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    char line[256];
    if (argc > 1 && strcmp(argv[1], "cat") == 0) {
        ssize_t got;
        while ((got = read(0, line, sizeof line)) > 0)
            if (write(1, line, got) != got) return 2;
        return 0;
    }
    printf("hello from pid %d, uid %d\n", getpid() > 1, getuid());
    return argc > 1 ? 7 : 0;
}
"""


def parse_apt_source(directory: Path) -> tuple[str, str]:
    """(address, suite) of the first Debian archive in an apt configuration. sources.list(5), both formats."""
    for file in sorted(directory.glob("sources.list.d/*.sources")):
        fields: dict[str, str] = {}
        for line in [*file.read_text().splitlines(), ""]:
            key, colon, value = line.partition(":")
            if colon and not line.startswith(("#", " ")):
                fields[key.strip().lower()] = value.strip()
            elif not line.strip() and "deb" in fields.get("types", "").split():
                return fields["uris"].split()[0], fields["suites"].split()[0]
    for file in (directory / "sources.list", *sorted(directory.glob("sources.list.d/*.list"))):
        for line in file.read_text().splitlines() if file.exists() else []:
            words = re.sub(r"#.*|\[[^]]*\]", "", line).split()
            if words[:1] == ["deb"] and len(words) > 2:
                return words[1], words[2]
    raise AssertionError(f"no Debian archive is configured in {directory}")


def debian_image() -> Path:
    """A Debian minbase root file system from the machine's own archive; made by the first caller, kept for all."""
    address, suite = parse_apt_source(_APT)
    target = CACHE / f"debian-{suite}-{os.uname().machine}-1"
    CACHE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            if in_guest():
                pytest.skip("needs a Debian made before, by the tests on the host: the guest has no network")
            _debootstrap(address, suite, target)
    return target


def _debootstrap(address: str, suite: str, target: Path) -> None:
    making = target.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    proxy = subprocess.run(
        ["apt-config", "shell", "P", "Acquire::http::Proxy"],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
    ).stdout
    environ = dict(os.environ)
    if proxy:
        environ["http_proxy"] = proxy.strip().removeprefix("P=").strip("'")
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", suite, str(making), address],
        env=environ,
        capture_output=True,
        text=True,
        timeout=DEBOOTSTRAP_TIMEOUT_S,
    )
    assert done.returncode == 0, f"debootstrap failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    making.chmod(0o755)
    making.rename(target)


def make_hello_image(target: Path) -> None:
    """A root file system that holds /hello, a static program, and nothing else: no libc, no shell, no /etc."""
    target.mkdir(mode=0o755)
    source = target.with_suffix(".c")
    source.write_text(HELLO_SOURCE)
    subprocess.run(["gcc", "-static", "-O1", "-o", target / "hello", source], check=True, timeout=60)
    source.unlink()
    target.chmod(0o755)
