"""What unpacking and packing have in common: names, failures, extended attributes."""

from __future__ import annotations

import errno
import posix

TYPE_CHECKING = False
if TYPE_CHECKING:
    import tarfile

CHUNK_BYTES = 1 << 20
TEXT = ("utf-8", "surrogateescape")  # tarfile's form of names that are bytes
DIRECTORY = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC

_XATTR_PREFIX = "SCHILY.xattr."  # pax keyword of extended attributes, as GNU tar and star write them
_UNSUPPORTED_XATTR = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)


class TransferError(Exception):
    """The transfer failed; becomes the line `CODE: message` on stderr."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def has_xattrs(member: tarfile.TarInfo) -> bool:
    """Its pax header carries extended attributes."""
    return any(key.startswith(_XATTR_PREFIX) for key in member.pax_headers)


def set_xattrs(fd: int, member: tarfile.TarInfo) -> None:
    """Extended attributes of a pax header; those the user or the file system does not allow are left out."""
    for key, value in member.pax_headers.items():
        if not key.startswith(_XATTR_PREFIX):
            continue
        name = key[len(_XATTR_PREFIX) :]
        try:
            posix.setxattr(fd, name.encode(*TEXT), value.encode(*TEXT))
        except OSError as error:
            if error.errno not in _UNSUPPORTED_XATTR:
                raise


def get_xattrs(fd: int, member: tarfile.TarInfo) -> None:
    """Put the readable extended attributes of an open file into the pax header to be written."""
    try:
        names = posix.listxattr(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED_XATTR:
            raise
        return
    for name in names:
        try:
            value = posix.getxattr(fd, name)
        except OSError as error:
            if error.errno not in (*_UNSUPPORTED_XATTR, errno.ENODATA):
                raise
            continue
        member.pax_headers = {**member.pax_headers, _XATTR_PREFIX + name: value.decode(*TEXT)}
