"""Who a process runs as: the user string of a spec against the container's passwd and group files. Pure.

The files are attacker-controlled content: bad lines are skipped, and nothing here consults NSS, whose modules
would be loaded from the container (CVE-2019-14271).
"""

from __future__ import annotations

_MAX_ID = 2**31 - 1


class Identity:
    """A resolved user.

    Attributes:
        uid, gid: 0..2**31-1.
        groups: supplementary group ids, sorted, without gid.
        home: absolute path, `/` if unknown.
    """

    __slots__ = ("gid", "groups", "home", "uid")

    def __init__(self, uid: int, gid: int, groups: list[int], home: bytes) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home

    def __repr__(self) -> str:
        return f"Identity(uid={self.uid}, gid={self.gid}, groups={self.groups}, home={self.home!r})"


class UserNotFound(Exception):
    """The user part names nobody in passwd."""


class GroupNotFound(Exception):
    """The group part names nothing in group."""


class IdOutOfRange(Exception):
    """A numeric id is above 2**31-1."""


def resolve_user(spec: str, passwd: bytes, group: bytes) -> Identity:
    """Resolve `""`, `name`, `uid`, `name:group`, `uid:gid` and the mixes; an empty part counts as not given.

    Args:
        spec: the user string; empty means root.
        passwd: content of /etc/passwd (passwd(5)), empty if the container has none.
        group: content of /etc/group (group(5)), empty if the container has none.

    Returns:
        The identity. Without a group part it has the passwd entry's gid (0 if there is none) and every group
        that lists the user; with one it has that gid and no supplementary groups.

    Raises:
        UserNotFound, GroupNotFound: a name without an entry. `root` needs none.
        IdOutOfRange: a number above 2**31-1.
    """
    user, _, wanted_group = spec.partition(":")
    entry = _find_user(user, passwd)
    if entry is None and user in ("", "root"):
        entry = (b"root", 0, 0, b"/")
    if entry is None and _is_number(user):
        entry = (b"", _id(user), 0, b"/")
    if entry is None:
        raise UserNotFound(f"unable to find user {user}: no matching entries in passwd file")
    name, uid, gid, home = entry
    if wanted_group:
        return Identity(uid, _find_gid(wanted_group, group), [], home)
    return Identity(uid, gid, _groups_listing(name, group, without=gid), home)


def find_tty_gid(group: bytes, default: int) -> int:
    """5, the conventional gid of group `tty`, if the group file has an entry for it, else `default`."""
    return 5 if any(gid == 5 for _, gid, _ in _group_entries(group, b":5")) else default


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _id(text: str) -> int:
    # The length is bounded first: int() of a huge digit string is quadratic.
    if len(text) > 20 or int(text) > _MAX_ID:
        raise IdOutOfRange(f"id {text[:20]} is above {_MAX_ID}")
    return int(text)


def _find_user(user: str, passwd: bytes) -> tuple[bytes, int, int, bytes] | None:
    """The first matching (name, uid, gid, home). Digits are always a uid, never a name, as in runc."""
    wanted_uid = 0 if user == "" else _id(user) if _is_number(user) else None
    wanted_name = user.encode("utf-8")
    for line in _lines_with(wanted_name if wanted_uid is None else b"%d" % wanted_uid, passwd):
        fields = line.split(b":")
        if len(fields) < 4 or (wanted_uid is None and fields[0] != wanted_name):
            continue
        uid, gid = _file_id(fields[2]), _file_id(fields[3])
        if uid is None or gid is None or (wanted_uid is not None and uid != wanted_uid):
            continue
        home = fields[5] if len(fields) > 5 else b""
        return fields[0], uid, gid, home if home.startswith(b"/") else b"/"
    return None


def _find_gid(wanted: str, group: bytes) -> int:
    if _is_number(wanted):
        return _id(wanted)
    wanted_name = wanted.encode("utf-8")
    for name, gid, _ in _group_entries(group, wanted_name):
        if name == wanted_name:
            return gid
    raise GroupNotFound(f"unable to find group {wanted}: no matching entries in group file")


def _groups_listing(name: bytes, group: bytes, without: int) -> list[int]:
    if not name:
        return []
    gids = {gid for _, gid, members in _group_entries(group, name) if name in members.split(b",")}
    return sorted(gids - {without})


def _lines_with(text: bytes, database: bytes) -> list[bytes]:
    """The lines that can matter: taking all of them apart is most of the time a process needs to start."""
    return [line for line in database.split(b"\n") if text in line]


def _group_entries(group: bytes, text: bytes) -> list[tuple[bytes, int, bytes]]:
    """(name, gid, comma-joined members) of every well-formed line that contains the text."""
    entries = []
    for line in _lines_with(text, group):
        fields = line.split(b":")
        if len(fields) >= 3 and fields[0] and (gid := _file_id(fields[2])) is not None:
            entries.append((fields[0], gid, fields[3] if len(fields) > 3 else b""))
    return entries


def _file_id(text: bytes) -> int | None:
    """An id of a passwd or group line; None if it is none, or outside the range (the line is skipped)."""
    if not text.isdigit() or len(text) > 20:
        return None
    number = int(text)
    return number if number <= _MAX_ID else None
