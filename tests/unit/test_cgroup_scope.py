"""Where a scope of systemd is, who may name its slice, and what is said where there is none."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from garden_py.backend.cgroup import scope
from garden_py.backend.cgroup.layout import Hierarchies
from garden_py.backend.cgroup.scope import HOLDER, Scope, slice_path
from garden_py.backend.linux import cgroup_driver
from garden_py.backend.linux.cgroup_driver import CgroupDriver, check_cgroup_driver
from garden_py.config import Config, load_config
from garden_py.model.errors import HostFault, InvalidField, InvalidRequest
from garden_py.model.handle import name_problem


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(state_dir=tmp_path / "state", cgroup_driver="systemd")


def hierarchies_at(top: Path) -> Hierarchies:
    """A cgroup v2 that only looks like one."""
    return Hierarchies(2, dict.fromkeys(("cpu", "memory", "pids"), top))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("garden.slice", "garden.slice"),
        ("a-b-c.slice", "a.slice/a-b.slice/a-b-c.slice"),
        (r"a\x2db.slice", r"a\x2db.slice"),
        ("-.slice", ""),
    ],
)
def test_slices_are_in_those_that_their_names_begin_with(name: str, path: str, tmp_path: Path) -> None:
    """systemd.slice(5); and the scope is in the slice."""
    assert load_config({"cgroup_slice": name}, environ={}).cgroup_slice == name
    assert slice_path(name) == path
    assert Scope(hierarchies_at(tmp_path), name, "3fa1").path == os.path.join(path, "garden-3fa1.scope")


@pytest.mark.parametrize(
    "name",
    ["", "garden", ".slice", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", "--.slice", "a b.slice"],
)
def test_what_is_no_slice_is_refused(name: str) -> None:
    """Before systemd would refuse it, in words of its own."""
    with pytest.raises(InvalidRequest, match="must be the name of a slice of systemd"):
        load_config({"cgroup_slice": name}, environ={})
    with pytest.raises(InvalidRequest):
        load_config({"cgroup_slice": "a" * 250 + ".slice"}, environ={})


def test_no_container_is_taken_for_the_holder() -> None:
    """It is beside containers."""
    assert name_problem(HOLDER) is not None


def test_hosts_that_cannot_are_told_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    """Not booted with systemd, cgroup v1, no tools; and a server with the other driver does not care."""
    monkeypatch.setattr(scope, "_BOOTED", tmp_path / "none")
    assert "systemd does not run here" in scope.find_obstacle(2)
    with pytest.raises(InvalidField, match="systemd does not run here") as refused:
        check_cgroup_driver(config, 2)
    assert refused.value.field == "cgroup_driver"
    check_cgroup_driver(Config(), 2)
    monkeypatch.setattr(scope, "_BOOTED", tmp_path)
    assert "cgroup v1" in scope.find_obstacle(1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scope.find_obstacle(2) == "systemd-run and systemctl cannot be found"
    for name in ("systemd-run", "systemctl"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert scope.find_obstacle(2) == ""


def test_scope_with_containers_in_another_slice_keeps_a_server_from_starting(
    tmp_path: Path, config: Config
) -> None:
    """With either driver: it could neither move them nor find them."""
    driver = CgroupDriver(config, hierarchies_at(tmp_path))
    elsewhere = f"other.slice/{driver.scope.unit}"
    (tmp_path / elsewhere / "web").mkdir(parents=True)
    with pytest.raises(InvalidField, match=f"are in {elsewhere}") as refused:
        asyncio.run(driver.open({elsewhere, driver.scope.path}))
    assert refused.value.field == "cgroup_slice"
    with pytest.raises(OSError, match="web"):
        driver.scope.stop(elsewhere)
    assert cgroup_driver.parent_of(config.tag) != driver.parent == driver.scope.path


def test_holder_alone_is_nobody(tmp_path: Path) -> None:
    """A scope that only its holder is in has no containers; one that is not there has none either."""
    found = Scope(hierarchies_at(tmp_path), "garden.slice", "3fa1")
    assert (found.containers(found.path), found.is_held) == ([], False)
    (found.directory / HOLDER).mkdir(parents=True)
    (found.directory / HOLDER / "cgroup.procs").write_text("")
    assert (found.containers(found.path), found.is_held) == ([], False)
    (found.directory / HOLDER / "cgroup.procs").write_text("77\n")
    assert (found.containers(found.path), found.is_held) == ([], True)


def put_tools(place: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Programs that stand in for those of the same name."""
    place.mkdir()
    for name, script in scripts.items():
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")


def test_scope_is_made_once_and_passes_controllers_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is held is left as it is."""
    found = Scope(hierarchies_at(tmp_path / "cgroup"), "garden.slice", "3fa1")
    calls = tmp_path / "calls"
    put_tools(
        tmp_path / "tools",
        monkeypatch,
        systemctl="exit 0",
        setsid=f'echo "$*" >>{calls}; mkdir -p {found.directory}; while [ "$1" != sh ]; do shift; done; exec "$@"',
        sleep="exit 0",
    )
    for _ in range(2):
        found.hold()
        assert found.is_held
        assert (found.directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    (call,) = calls.read_text().splitlines()
    assert call.startswith(
        "--fork systemd-run --scope --quiet --collect --unit garden-3fa1.scope --slice garden.slice "
    )
    assert " --property Delegate=yes --property TasksMax=infinity " in call


def test_what_systemd_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words, not those of this server's guess."""
    monkeypatch.setattr(scope, "_PATIENCE_S", 0)
    put_tools(tmp_path / "tools", monkeypatch, systemctl="exit 0", setsid="echo Access denied >&2")
    with pytest.raises(HostFault, match=r"scope garden-3fa1.scope: Access denied"):
        Scope(hierarchies_at(tmp_path), "garden.slice", "3fa1").hold()
    put_tools(
        tmp_path / "broken", monkeypatch, systemctl="echo Transport endpoint is not connected >&2; exit 1"
    )
    with pytest.raises(HostFault, match="systemctl: Transport endpoint is not connected"):
        Scope(hierarchies_at(tmp_path), "garden.slice", "3fa1").find()
