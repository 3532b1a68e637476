"""Built-in programs of the forked child: unpack and pack a tar stream as the container's user.

They run after the user switch, so every right they have is the user's, and use nothing of the image.
"""

from __future__ import annotations

import errno
import posix
import tarfile

from garden_py.agent.tar_in import unpack
from garden_py.agent.tar_out import pack
from garden_py.agent.tar_shared import TEXT, TransferError


def run(program: str, path: bytes) -> int:
    """Run `tar-in` or `tar-out` on the standard streams; the exit code, 0 or 1.

    Args:
        program: which one.
        path: absolute destination or source; a trailing slash of a source means "its content".
    """
    try:
        if program == "tar-in":
            unpack(path)
        else:
            pack(path)
    except TransferError as error:
        code, message = error.code, str(error)
    except tarfile.TarError as error:
        code, message = "broken_archive", str(error)
    except (OSError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        code, message = _classify(error)
    else:
        return 0
    line = f"{code}: {message}".replace("\n", " ")[:1000]
    posix.write(2, line.encode(*TEXT) + b"\n")
    return 1


def _classify(error: Exception) -> tuple[str, str]:
    if not isinstance(error, OSError) or error.errno is None:
        return "broken_archive", f"{type(error).__name__}: {error}"
    name = error.filename
    shown = name.decode(*TEXT) if isinstance(name, bytes) else name
    # The wording is the one of the C library, which clients look for ("Permission denied").
    message = f"{shown}: {error.strerror}" if shown else str(error.strerror)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "no_such_path", message
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission_denied", message
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no_space", message
    return "io_error", message
