"""Environment, PATH search, limits and request fields: the agent's pure parts."""

from __future__ import annotations

import pytest

from garden_py.agent import rlimit
from garden_py.agent.environment import build_environment, executable_candidates
from garden_py.agent.fields import Fields, InvalidField


def test_later_assignments_win_and_order_is_kept() -> None:
    """E1: the server sends container variables, then process variables."""
    environment = build_environment(
        [b"CONTAINER_ENV=1", b"TEST=old", b"FRUIT=banana", b"TEST=a=b", b"EMPTY="],
        uid=0,
        user="",
        home=b"/root",
    )
    assert list(environment.items()) == [
        (b"CONTAINER_ENV", b"1"), (b"TEST", b"a=b"), (b"FRUIT", b"banana"), (b"EMPTY", b""),
        (b"PATH", b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
        (b"USER", b"root"), (b"HOME", b"/root"),
    ]  # fmt: skip


def test_defaults_of_a_plain_user() -> None:
    """E2-E5: PATH without the sbin directories, USER verbatim, nothing else."""
    assert build_environment([], uid=1001, user="1001:1002", home=b"/home/alice") == {
        b"PATH": b"/usr/local/bin:/usr/bin:/bin", b"USER": b"1001:1002", b"HOME": b"/home/alice",
    }  # fmt: skip


def test_given_values_win_over_defaults_even_if_empty() -> None:
    """E2-E4: an empty PATH is a choice."""
    given = [b"PATH=", b"USER=me", b"HOME=/there"]
    assert build_environment(given, uid=0, user="x", home=b"/") == {
        b"PATH": b"",
        b"USER": b"me",
        b"HOME": b"/there",
    }


def test_only_a_bare_name_is_searched() -> None:
    """P4, P5: a slash anywhere means a path."""
    assert executable_candidates(b"ls", b"/bin::/usr/bin") == [b"/bin/ls", b"./ls", b"/usr/bin/ls"]
    assert executable_candidates(b"./ls", b"/bin") == [b"./ls"]


def test_limits_take_one_value_or_two() -> None:
    """R1: one value is soft and hard alike; -1 is unlimited."""
    unlimited = rlimit.UNLIMITED
    assert rlimit.parse_limits({"nofile": 30, "core": [0, -1], "nproc": -1}) == [
        ("nofile", 7, 30, 30),
        ("core", 4, 0, unlimited),
        ("nproc", 6, unlimited, unlimited),
    ]


@pytest.mark.parametrize("value", [-2, True, "1", None, [1], [2, 1], [-1, 5], [1, 2, 3], [0, "x"], 1.0])
def test_impossible_limits_are_refused_by_name(value: object) -> None:
    """A wrong limit must not silently become another one."""
    with pytest.raises(rlimit.BadLimit, match="nofile"):
        rlimit.parse_limits({"nofile": value})


def test_an_unknown_limit_is_refused() -> None:
    """Ignoring it would run the process without the protection asked for."""
    with pytest.raises(rlimit.BadLimit, match="'NOFILE'"):
        rlimit.parse_limits({"NOFILE": 1})


@pytest.mark.parametrize(
    ("accessor", "value"),
    [
        ("text", b"x"), ("text", "a\0b"), ("text", "x" * 5000), ("identifier", ""), ("identifier", "ä" * 200),
        ("boolean", 1), ("byte_string", "x"), ("byte_string", b"a\0"), ("byte_strings", b"x"),
        ("byte_strings", [b"x", "y"]), ("mapping", []), ("integer_pair", [1]), ("integer_pair", [1, True]),
    ],
)  # fmt: skip
def test_wrong_fields_are_named_with_their_prefix(accessor: str, value: object) -> None:
    """The server shows the field to whoever sent the request."""
    fields = Fields({"it": value}, "tty.")  # type: ignore[dict-item]
    with pytest.raises(InvalidField) as caught:
        getattr(fields, accessor)("it")
    assert caught.value.field.startswith("tty.it")


def test_a_bool_is_no_integer() -> None:
    """True is 1 to Python, and a mistake to everybody else."""
    with pytest.raises(InvalidField, match="integer from 0 to 9"):
        Fields({"n": True}).integer("n", 0, 9)
