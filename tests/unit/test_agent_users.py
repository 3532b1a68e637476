"""User strings are resolved as garden-behaviour §2.2 (U1-U9) says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.agent.users import (
    GroupNotFound,
    Identity,
    IdOutOfRange,
    UserNotFound,
    find_tty_gid,
    resolve_user,
)

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
# a comment: line
broken line
alice:x:1001:1010::/home/alice:/bin/sh
twin:x:1001:1099::/home/twin:/bin/sh
testuser:x:1000:1000::/home/testuser
nohome:x:1005:1005
badhome:x:1006:1006::relative:/bin/sh
huge:x:99999999999999999999999999:0::/:/bin/sh
"""
GROUP = b"""root:x:0:
wheel:x:10:root,alice2
tty:x:5:
staff:x:50:
alice:x:1010:
extra:x:1011:bob,alice
also:x:1012:alicex
"""


def seen(identity: Identity) -> tuple[int, int, list[int], bytes]:
    return identity.uid, identity.gid, identity.groups, identity.home


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", (0, 0, [10], b"/root")),
        ("root", (0, 0, [10], b"/root")),
        ("alice", (1001, 1010, [1011], b"/home/alice")),
        ("1001", (1001, 1010, [1011], b"/home/alice")),
        ("4242", (4242, 0, [], b"/")),
        ("1001:1002", (1001, 1002, [], b"/home/alice")),
        ("1000000000:1000000000", (1000000000, 1000000000, [], b"/")),
        ("testuser:staff", (1000, 50, [], b"/home/testuser")),
        ("alice:", (1001, 1010, [1011], b"/home/alice")),
        (":50", (0, 50, [], b"/root")),
        ("nohome", (1005, 1005, [], b"/")),
        ("badhome", (1006, 1006, [], b"/")),
        ("2147483647:2147483647", (2147483647, 2147483647, [], b"/")),
    ],
)
def test_user_strings(spec: str, expected: tuple[int, int, list[int], bytes]) -> None:
    """U1-U4 and U7: which ids, which groups, which home."""
    assert seen(resolve_user(spec, PASSWD, GROUP)) == expected


@pytest.mark.parametrize("spec", ["", "root", "0"])
def test_root_needs_no_passwd(spec: str) -> None:
    """U6: an image of one binary has none."""
    assert seen(resolve_user(spec, b"", b"")) == (0, 0, [], b"/")


@pytest.mark.parametrize("spec", ["hans", "alic", "huge", "broken line", "Alice", "-1", "+1", "1_0", "١"])
def test_unknown_names_are_refused_by_the_words_clients_know(spec: str) -> None:
    """U5; digits of other scripts, signs and underscores, which int() takes, are names."""
    with pytest.raises(UserNotFound, match="no matching entries in passwd file") as caught:
        resolve_user(spec, PASSWD, GROUP)
    assert f"unable to find user {spec}:" in str(caught.value)


def test_an_unknown_group_is_refused() -> None:
    """U5, for the part behind the colon."""
    with pytest.raises(
        GroupNotFound, match="unable to find group nogroup: no matching entries in group file"
    ):
        resolve_user("alice:nogroup", PASSWD, GROUP)


@pytest.mark.parametrize("spec", ["2147483648", "0:2147483648", "9" * 5000])
def test_ids_end_at_2_to_the_31(spec: str) -> None:
    """U9; and a huge digit string must not cost time."""
    with pytest.raises(IdOutOfRange):
        resolve_user(spec, PASSWD, GROUP)


@given(
    st.binary(max_size=300), st.binary(max_size=300), st.text(max_size=20).filter(lambda t: t.isprintable())
)
def test_files_of_the_container_cannot_break_the_lookup(passwd: bytes, group: bytes, spec: str) -> None:
    """The files are the attacker's; only the three documented errors may come out."""
    try:
        identity = resolve_user(spec, passwd, group)
    except (UserNotFound, GroupNotFound, IdOutOfRange):
        return
    assert 0 <= identity.uid < 2**31
    assert identity.home.startswith(b"/")


def test_the_tty_group_is_5_only_where_the_image_has_it() -> None:
    """A gid nobody knows would show as a number in ls."""
    assert find_tty_gid(GROUP, default=1010) == 5
    assert find_tty_gid(b"", default=1010) == 1010
