"""AppArmor as kernels tell of it, and what a server does about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from garden_py.backend.host import apparmor
from garden_py.backend.linux import site
from garden_py.model.errors import InvalidField, ProfileNotLoaded


@pytest.mark.parametrize(("switch", "obstacle"), [(None, "no AppArmor"), ("N\n", "turned off"), ("Y\n", "")])
def test_obstacle_is_named(tmp_path: Path, switch: str | None, obstacle: str) -> None:
    """Kernels without it, hosts that turned it off, and hosts that have it."""
    if switch is not None:
        (tmp_path / "module/apparmor/parameters").mkdir(parents=True)
        (tmp_path / "module/apparmor/parameters/enabled").write_text(switch)
    found = apparmor.find_obstacle(tmp_path)
    assert obstacle in found
    assert bool(found) == bool(obstacle)


def test_loaded_profiles_are_told_by_the_kernel(tmp_path: Path) -> None:
    """Whatever mode they are in, blanks in a name included; where nothing is told, nothing is known to be missing."""
    assert not apparmor.is_known_missing("mine", tmp_path)
    (tmp_path / "kernel/security/apparmor").mkdir(parents=True)
    (tmp_path / "kernel/security/apparmor/profiles").write_text("mine (enforce)\nwith blank (complain)\n")
    for loaded in ("mine", "with blank"):
        assert not apparmor.is_known_missing(loaded, tmp_path)
    for missing in ("min", "mine (enforce)", "with", ""):
        assert apparmor.is_known_missing(missing, tmp_path)


def test_server_refuses_a_profile_that_nothing_enforces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never silently without; the setting is named. Without the setting nobody asks."""
    monkeypatch.setattr(apparmor, "find_obstacle", lambda: "this kernel has no AppArmor")
    site.check_apparmor("")
    with pytest.raises(InvalidField, match="'mine'") as refused:
        site.check_apparmor("mine")
    assert refused.value.field == "apparmor"


def test_missing_profile_is_named_with_the_setting() -> None:
    """The caller cannot load it, but can tell who can what is wrong."""
    assert str(ProfileNotLoaded("mine")) == (
        "apparmor: profile 'mine', the server's setting --apparmor, is not loaded on this host"
    )
