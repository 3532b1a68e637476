"""The examples run as they are, on a real server: they are the first code that a new user copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.guest import in_guest
from kit.patience import FACTOR
from kit.server import ServerProcess

from garden_py.client import GardenClient

pytestmark = pytest.mark.root

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEADLINE_S = 120.0 * FACTOR


def run_example(server: ServerProcess, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "GARDEN_ADDRESS": server.address}
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=DEADLINE_S, check=False, env=environ
    )


@pytest.fixture(autouse=True)
def _nothing_left(garden_server: ServerProcess):
    """Whatever happens in an example, its containers are gone at its end."""
    yield
    with GardenClient(garden_server.address) as garden:
        assert list(garden.list(all_states=True)) == []


def run_job(server: ServerProcess, job: Path, artifacts: Path) -> subprocess.CompletedProcess[str]:
    runner = str(EXAMPLES / "ci_job_runner.py")
    return run_example(server, sys.executable, runner, str(job), "--artifacts", str(artifacts))


def test_the_job_of_the_repository_passes_and_leaves_its_artifact(
    garden_server: ServerProcess, tmp_path: Path
) -> None:
    """Steps share files, have their own variables and users, and write to our output."""
    done = run_job(garden_server, EXAMPLES / "job.toml", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 words" in done.stdout
    assert (tmp_path / "report" / "count.txt").read_text() == "5 words\n"


def test_a_failing_step_ends_the_job_with_its_code(garden_server: ServerProcess, tmp_path: Path) -> None:
    """Later steps do not run; artifacts are collected all the same."""
    job = tmp_path / "job.toml"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "file").write_text("copied in")
    job.write_text(
        'name = "failing"\nsource = "src"\nartifacts = ["/build/made", "/build/missing"]\n'
        '[[steps]]\nname = "first"\nrun = "cp file made; exit 3"\n'
        '[[steps]]\nname = "second"\nrun = "echo must not run"\n'
    )
    done = run_job(garden_server, job, tmp_path / "out")
    assert done.returncode == 3
    assert "must not run" not in done.stdout
    assert (tmp_path / "out" / "made").read_text() == "copied in"
    assert "/build/missing was not made" in done.stderr


def test_a_step_over_its_limit_is_ended(garden_server: ServerProcess, tmp_path: Path) -> None:
    """With its children: nothing may hold the job up."""
    job = tmp_path / "job.toml"
    job.write_text(
        'name = "slow"\n[[steps]]\nname = "sleep"\ntimeout_s = 0.3\nrun = "echo begun; sleep 1000; true"\n'
    )
    done = run_job(garden_server, job, tmp_path / "out")
    assert (done.returncode, done.stdout) == (124, "begun\n"), done.stderr


def test_a_job_file_with_an_unknown_key_is_refused(garden_server: ServerProcess, tmp_path: Path) -> None:
    """Before a container is made."""
    job = tmp_path / "job.toml"
    job.write_text('name = "x"\ncolour = "red"\n[[steps]]\nname = "a"\nrun = "true"\n')
    done = run_job(garden_server, job, tmp_path / "out")
    assert done.returncode == 2
    assert "colour" in done.stderr


def test_the_scheduler_runs_every_task_and_reports_failures(garden_server: ServerProcess) -> None:
    """Bounded at any time, complete in the end."""
    tasks = [f"t{number}" for number in range(12)]
    done = run_example(
        garden_server,
        sys.executable,
        str(EXAMPLES / "scheduler.py"),
        *["--at-most", "4", "--memory-mib", "32", "--", "sh", "-c", "echo $TASK; [ $TASK != t5 ]"],
        stdin="\n".join(tasks),
    )
    results = {result["task"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert set(results) == set(tasks), done.stderr
    assert {task for task, result in results.items() if result["exit_code"] != 0} == {"t5"}
    assert results["t3"]["output_tail"] == "t3\n"
    assert done.returncode == 1


@pytest.mark.host
def test_the_node_client_needs_only_the_proto(garden_server: ServerProcess, tmp_path: Path) -> None:
    """Any language with gRPC can drive the server."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    if in_guest():
        pytest.skip("needs a package registry, and the guest has no network")
    place = tmp_path / "examples" / "node-client"
    shutil.copytree(EXAMPLES / "node-client", place, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(EXAMPLES.parent / "proto", tmp_path / "proto")
    subprocess.run(["npm", "ci"], cwd=place, check=True, capture_output=True, timeout=DEADLINE_S)
    done = run_example(garden_server, "node", str(place / "client.js"))
    assert (done.returncode, done.stdout) == (3, "HELLO FROM NODE\n"), done.stderr
    assert "to stderr" in done.stderr
