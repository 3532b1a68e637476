"""Starting fast is a feature: what a command does not need, it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The server's half, and what only it needs.
SERVER_ONLY = (
    "garden_py.service",
    "garden_py.backend",
    "garden_py.wiring",
    "garden_py.agent",
    "structlog",
    "sh",
)


def modules_after(arguments: list[str]) -> set[str]:
    """Names of all modules that a command line has loaded when it ends."""
    program = (
        "import sys\nfrom garden_py.cli.main import run_command\n"
        f"run_command({arguments!r})\nprint(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"GARDEN_ADDRESS": "/nonexistent/garden.sock"},
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["create", "--help"]])
def test_help_loads_neither_grpc_nor_the_server(arguments: list[str]) -> None:
    """Loading gRPC alone would double the time."""
    loaded = modules_after(arguments)
    assert not loaded & {"grpc", "google.protobuf", *SERVER_ONLY}


def test_ping_loads_only_the_blocking_client() -> None:
    """Neither the other face nor the server."""
    loaded = modules_after(["ping"])
    assert "garden_py.client.sync.client" in loaded
    assert not loaded & {"garden_py.client.aio.client", "rich", *SERVER_ONLY}


def test_server_loads_no_door_before_it_has_asked_for_its_launcher() -> None:
    """Loading the doors takes as long as the launcher takes to come up, so it is done meanwhile; not all are needed."""
    program = "import sys\nimport garden_py.wiring\nprint(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert not set(done.stdout.split()) & {
        "grpc",
        "h11",
        "garden_py.api.grpc.server",
        "garden_py.api.http.door",
    }
