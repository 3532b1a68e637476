"""The file of a listening unix socket: who may connect to it, from the first moment on. Source: unix(7)."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from garden_py.model.errors import InvalidField


@contextmanager
def socket_file(path: Path, *, mode: int, group: str, fields: tuple[str, str]) -> Iterator[None]:
    """Bind inside; the file then has its mode at once, for the umask decides it before anyone can connect.

    Args:
        path: of the socket. One that an earlier server has left is removed.
        mode: permissions.
        group: that owns it; empty: the server's.
        fields: where path and group come from, for errors.

    Raises:
        InvalidField: something else is at path, or there is no such group; nothing is bound then.
        OSError: it cannot be changed.
    """
    path_field, group_field = fields
    gid = _find_group(group, group_field) if group else -1
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
        raise InvalidField(path_field, f"{path} is there already, and is no socket")
    path.unlink(missing_ok=True)
    before = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(before)
    os.chown(path, -1, gid)
    path.chmod(mode)


def _find_group(name: str, field: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise InvalidField(field, f"no group {name!r}") from error
