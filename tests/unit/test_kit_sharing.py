"""Sessions that share their tests out run each of them once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from kit.sharing import APART, Sharing

MODULES = 6
MODULE = f"""
import os
import pytest
MARK
@pytest.fixture(scope="module")
def held():
    os.mkdir("held-NUMBER")
    yield
    os.rmdir("held-NUMBER")
@pytest.mark.parametrize("each", range(3))
def test_it(held, each):
    with open("run", "a") as file:
        print(f"NUMBER-{{each}}", os.environ.get("{APART}", 0), file=file)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Modules of tests that note who runs them, and what fails if another module comes between."""
    kit = Path(__file__).parents[1]
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {kit}\nmarkers = host\naddopts = -p no:cacheprovider -p no:asyncio -q\n"
    )
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\n"
        "from kit.sharing import Sharing\n"
        "def pytest_configure(config):\n"
        f"    config.pluginmanager.register(Sharing(Path({str(tmp_path / 'shared')!r})))\n"
    )
    for number in range(MODULES):
        mark = "pytestmark = pytest.mark.host" if number == MODULES - 1 else ""
        text = MODULE.replace("NUMBER", str(number)).replace("MARK", mark)
        (tmp_path / f"test_{number}.py").write_text(text)
    (tmp_path / "shared").mkdir()
    return tmp_path


def session(place: Path, *words: str, apart: bool = False) -> subprocess.Popen[str]:
    """A pytest over all modules."""
    env = {**os.environ, **({APART: "1"} if apart else {})}
    argv = [sys.executable, "-m", "pytest", *words]
    return subprocess.Popen(
        argv, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_of(place: Path) -> list[list[str]]:
    """[test, whether apart] of all that ran."""
    return [line.split() for line in (place / "run").read_text().splitlines()]


def test_each_test_is_run_once_and_what_needs_the_host_on_the_host(place: Path) -> None:
    """By two at a time, whoever is quicker."""
    sessions = [session(place), session(place, apart=True)]
    said = [each.communicate(timeout=60)[0] for each in sessions]
    assert all(each.returncode in (0, 5) for each in sessions), (
        said
    )  # 5: the other one was quicker at all of them
    assert Counter(test for test, _ in run_of(place)) == Counter(
        f"{number}-{each}" for number in range(MODULES) for each in range(3)
    )
    assert {apart for test, apart in run_of(place) if test.startswith(f"{MODULES - 1}-")} == {"0"}
    assert not list(place.glob("held-*"))


def test_what_another_one_has_begun_is_not_run(place: Path) -> None:
    """Nor waited for."""
    (place / "shared/test_2.py.begun").touch()
    one = session(place)
    said, _ = one.communicate(timeout=60)
    assert one.returncode == 0, said
    numbers = [test[0] for test, _ in run_of(place)]
    assert numbers == [str(number) for number in (5, 0, 1, 3, 4) for _ in range(3)]


def test_a_session_that_shall_stop_does(place: Path) -> None:
    """At the first failure, if told so."""
    (place / "test_0.py").write_text("def test_it():\n    assert False\n")
    one = session(place, "-x")
    said, _ = one.communicate(timeout=60)
    assert one.returncode == 1, said
    assert {test[0] for test, _ in run_of(place)} == {"5"}


def test_a_module_is_claimed_by_one(tmp_path: Path) -> None:
    """Whatever its directory is called."""
    first, second = Sharing(tmp_path), Sharing(tmp_path)
    assert first._claim("tests/root/test_a.py")
    assert not second._claim("tests/root/test_a.py")
    assert second._claim("tests/unit/test_a.py")
