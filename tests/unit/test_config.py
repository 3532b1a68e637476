"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from garden_py.config import Config, load_config
from garden_py.model.device import DeviceRule, parse_device_rule
from garden_py.model.errors import InvalidRequest


def fields_of(error: InvalidRequest) -> set[str]:
    return {violation.field for violation in error.violations}


def test_later_sources_win(tmp_path: Path) -> None:
    """Default, file, environment, flag: each overrides the one before."""
    file = tmp_path / "garden.toml"
    file.write_text('launchers = 2\nlog-level = "debug"\nmtu = 1400\n')
    environ = {"GARDEN_LOG_LEVEL": "warning", "GARDEN_MTU": "1300", "OTHER": "x"}
    config = load_config({"mtu": 1200}, file=file, environ=environ)
    assert (config.launchers, config.log_level, config.mtu) == (2, "warning", 1200)
    assert config.runtime == Config().runtime


def test_lists_in_the_environment_are_separated_by_commas() -> None:
    """Repeatable flags have a form in one variable."""
    config = load_config({}, environ={"GARDEN_DNS_SERVER": "192.0.2.1,192.0.2.2"})
    assert config.dns_server == ("192.0.2.1", "192.0.2.2")


@pytest.mark.parametrize(
    "setting",
    ["store_size", "image_max_bytes", "image_gc_bytes", "output_retention_bytes", "max_message_bytes"],
)
def test_bytes_are_written_with_or_without_a_unit(setting: str) -> None:
    """In a flag, the environment and the file; in powers of 1024."""
    for written in ("16M", "16 MiB", "16m", str(16 << 20), 16 << 20):
        assert getattr(load_config({setting: written}, environ={}), setting) == 16 << 20
    with pytest.raises(InvalidRequest, match="not a size"):
        load_config({setting: "16 miles"}, environ={})


def test_door_is_in_the_run_directory_unless_stated() -> None:
    """Two servers with directories of their own need no further setting."""
    assert load_config({"run_dir": "/run/x"}, environ={}).listen_address == "unix:/run/x/garden.sock"
    assert load_config({"listen": "127.0.0.1:7777"}, environ={}).listen_address == "127.0.0.1:7777"


def test_tag_depends_on_the_state_directory_only() -> None:
    """A restarted server with other settings finds what it made; another server has another tag."""
    first = load_config({"state_dir": "/srv/a"}, environ={})
    again = load_config({"state_dir": "/srv/a", "run_dir": "/run/b", "mtu": 1400}, environ={})
    assert first.tag == again.tag
    assert len(first.tag) == 4
    assert first.tag != load_config({"state_dir": "/srv/b"}, environ={}).tag


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"state_dir": "relative"}, "state_dir"),
        ({"state_dir": "/with:colon"}, "state_dir"),
        ({"run_dir": "/" + "x" * 70}, "run_dir"),
        ({"network_pool": "10.0.0.0/31"}, "network_pool"),
        ({"network_pool": "10.0.0.1/24"}, "network_pool"),
        ({"network_pool": "239.0.0.0/24"}, "network_pool"),
        ({"network_pool": "fd00::/64"}, "network_pool"),
        ({"socket_mode": "0999"}, "socket_mode"),
        ({"socket_mode": "1777"}, "socket_mode"),
        ({"socket_mode": "0o660"}, "socket_mode"),
        ({"socket_mode": "-7"}, "socket_mode"),
        ({"port_pool_start": 80}, "port_pool_start"),
        ({"port_pool_start": 65_000, "port_pool_size": 1000}, "settings"),
        ({"uid_pool_start": 0xFFFE_0000, "uid_pool_size": 2}, "settings"),
        ({"launchers": 0}, "launchers"),
        ({"output_retention_bytes": 1}, "output_retention_bytes"),
        ({"default_egress": "maybe"}, "default_egress"),
        ({"log_level": "loud"}, "log_level"),
        ({"create_timeout_s": 0}, "create_timeout_s"),
        ({"create_timeout_s": float("inf")}, "create_timeout_s"),
        ({"cpu_entitlement_per_share": 1e300}, "cpu_entitlement_per_share"),
        ({"default_grace_time_s": 1e15}, "default_grace_time_s"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"external_ip": "foo"}, "external_ip"),
        ({"dns_server": ["192.0.2.1", "foo"]}, "dns_server"),
        ({"additional_dns_server": ["127.0.0.1"]}, "additional_dns_server"),
        ({"additional_dns_server": ["::1"]}, "additional_dns_server"),
        ({"dns_server": ["0.0.0.0"]}, "dns_server"),
        ({"dns_server": ["fe80::1%eth0"]}, "dns_server"),
        ({"deny_network": ["192.0.2.0/24", "foo"]}, "deny_network"),
        ({"deny_network": ["fd00::1/8"]}, "deny_network"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], field: str) -> None:
    """The server does not start with a setting that it cannot keep."""
    with pytest.raises(InvalidRequest) as refused:
        load_config(settings, environ={})
    assert fields_of(refused.value) == {field}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("foo", "'foo' is not a network, such as 169.254.0.0/16"),
        ("10.0.0.1/8", "'10.0.0.1/8' is an address in a network; the network is 10.0.0.0/8"),
        ("10.0.0.0/33", "'10.0.0.0/33' is not a network, such as 169.254.0.0/16"),
    ],
)
def test_denied_network_that_is_none_is_told_once_and_in_words(text: str, problem: str) -> None:
    """It may be of two kinds; that is nothing that a reader has to know."""
    with pytest.raises(InvalidRequest) as refused:
        load_config({"deny_network": ["192.0.2.0/24", text]}, environ={})
    (violation,) = refused.value.violations
    assert (violation.field, violation.problem) == ("deny_network", problem)


def test_denied_networks_are_read() -> None:
    """Of both kinds, from every source; an address is a network of one."""
    expected = (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::/8"), IPv4Network("192.0.2.1/32"))
    written = [str(each) for each in expected[:2]] + ["192.0.2.1"]
    assert load_config({"deny_network": written}, environ={}).deny_network == expected
    in_environ = {"GARDEN_DENY_NETWORK": ",".join(written)}
    assert load_config({}, environ=in_environ).deny_network == expected
    assert Config(deny_network=expected).deny_network == expected


def test_bad_settings_are_named_together() -> None:
    """One start shows every mistake."""
    with pytest.raises(InvalidRequest) as refused:
        load_config({"launchers": 0}, environ={"GARDEN_MTU": "big"})
    assert fields_of(refused.value) == {"launchers", "GARDEN_MTU"}


def test_bad_setting_is_named_as_it_was_written(tmp_path: Path) -> None:
    """Who has to change it has to find it; a flag takes the place of what the file says, and of its mistake."""
    file = tmp_path / "garden.toml"
    file.write_text("mtu = 'big'\nnetwork-pol = ''\nlaunchers = 0\n")
    with pytest.raises(InvalidRequest) as refused:
        load_config({"launchers": 0}, file=file, environ={"GARDEN_MAX_CONTAINERS": "many"})
    assert {(violation.field, violation.problem) for violation in refused.value.violations} >= {
        (f"{file}: mtu", "'big' is not a whole number"),
        (f"{file}: network_pol", "there is no such setting; did you mean network_pool?"),
        ("GARDEN_MAX_CONTAINERS", "'many' is not a whole number"),
    }
    assert "launchers" in fields_of(refused.value)


@pytest.mark.parametrize("content", [None, "not toml ["])
def test_unreadable_file_is_named(tmp_path: Path, content: str | None) -> None:
    """A missing or broken settings file is not the same as an empty one."""
    file = tmp_path / "garden.toml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidRequest, match=r"garden\.toml"):
        load_config({}, file=file, environ={})


def test_every_setting_explains_itself() -> None:
    """The description is the flag's help text."""
    assert [name for name, field in Config.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c 10:232 rwm", DeviceRule("c", 10, 232, "rwm")),
        ("b *:* m", DeviceRule("b", None, None, "m")),
        ("  c 5:* wr ", DeviceRule("c", 5, None, "rw")),
        ("a *:* rwm", DeviceRule("a", None, None, "rwm")),
    ],
)
def test_device_rules_are_read(text: str, expected: DeviceRule) -> None:
    assert parse_device_rule(text) == expected


@pytest.mark.parametrize(
    "text", ["", "c 10:232", "d 1:3 r", "c 1:3 rr", "c 1:3 x", "a 1:3 r", "c 1 rwm", "c -1:3 r"]
)
def test_device_rules_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"device_cgroup_rule.*TYPE MAJOR|type a"):
        load_config({"device_cgroup_rule": (text,)}, environ={})
