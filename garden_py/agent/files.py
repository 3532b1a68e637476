"""Built-in programs of the forked child: unpack and pack a tar stream as the container's user.

They run after the user switch, so every right they have is the user's, and use nothing of the image. Archive
names are not trusted: what an entry may touch lies beneath the destination, checked by the kernel (openat2).
"""

from __future__ import annotations

import errno
import posix
import stat
import tarfile

from garden_py.agent import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 512
_CHUNK_BYTES = 1 << 20
_XATTR_PREFIX = "SCHILY.xattr."  # pax keyword of extended attributes, as GNU tar and star write them
_TEXT = ("utf-8", "surrogateescape")  # tarfile's form of names that are bytes

# linux/openat2.h, openat2(2)
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10

_DIRECTORY = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC
_UNSUPPORTED_XATTR = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL)


class TransferError(Exception):
    """The transfer failed; becomes the line `CODE: message` on stderr."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


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
    posix.write(2, line.encode(*_TEXT) + b"\n")
    return 1


def _classify(error: Exception) -> tuple[str, str]:
    if not isinstance(error, OSError) or error.errno is None:
        return "broken_archive", f"{type(error).__name__}: {error}"
    name = error.filename
    shown = name.decode(*_TEXT) if isinstance(name, bytes) else name
    # The wording is the one of the C library, which clients look for ("Permission denied").
    message = f"{shown}: {error.strerror}" if shown else str(error.strerror)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "no_such_path", message
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "permission_denied", message
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no_space", message
    return "io_error", message


class _Input:
    """stdin as tarfile reads it, remembering the last block, which tells a whole archive from a cut one."""

    def __init__(self) -> None:
        self._last = b""

    def read(self, size: int) -> bytes:
        data = posix.read(0, min(size, _CHUNK_BYTES))
        self._last = (self._last + data)[-_BLOCK:] if len(data) < _BLOCK else data[-_BLOCK:]
        return data

    def finish(self) -> None:
        """Read to the end, so that the sender is not killed by SIGPIPE over padding.

        Raises:
            TransferError: the archive does not end with the zero block tar(5) demands.
        """
        while self.read(_CHUNK_BYTES):
            pass
        if len(self._last) < _BLOCK or any(self._last):
            raise TransferError("broken_archive", "unexpected end of data")


class _Output:
    """stdout as tarfile writes it."""

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[posix.write(1, rest) :]
        return len(data)


def unpack(destination: bytes) -> None:
    """Unpack the archive on stdin into an existing directory.

    Entries belong to the calling user, modes are masked by the umask, device nodes are skipped, an existing
    directory keeps its mode, anything else existing is replaced.
    """
    root = posix.open(destination, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    source = _Input()
    unpacker = _Unpacker(root, is_whole_tree=destination.strip(b"/") == b"")
    with tarfile.open(
        fileobj=source,
        mode="r|",
        bufsize=_CHUNK_BYTES,
        encoding=_TEXT[0],
        errors=_TEXT[1],
    ) as archive:
        for member in archive:
            unpacker.place(archive, member)
            # tarfile keeps every member for random access; a stream never goes back.
            archive.members = []  # type: ignore[attr-defined]
    unpacker.finish()
    source.finish()


class _Unpacker:
    def __init__(self, root: int, *, is_whole_tree: bool) -> None:
        self._root = root
        # Beneath "/" nothing leads out, so an image's own absolute links (/var/run -> /run) may be followed;
        # beneath any other destination a link that leads out makes its entry fail.
        scope = _RESOLVE_IN_ROOT if is_whole_tree else _RESOLVE_BENEATH
        self._resolve = scope | _RESOLVE_NO_MAGICLINKS
        self._umask = posix.umask(0)
        posix.umask(self._umask)
        self._made_directories: list[tuple[list[bytes], int, int]] = []

    def place(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _split(member.name)
        if member.isdir():
            self._place_directory(parts, member)
            return
        if not parts:
            raise TransferError("broken_archive", "an entry that is no directory has the name of the root")
        place = self._placer(archive, member)
        if place is None:
            return
        parent = self._open_parent(parts)
        try:
            _remove_existing(parts[-1], parent)
            place(parts[-1], parent)
        except OSError as error:
            raise _named(error, member) from error
        finally:
            posix.close(parent)

    def _placer(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo
    ) -> Callable[[bytes, int], None] | None:
        """What makes the entry under a name in a directory; None for what is skipped."""
        if member.issym():
            target = member.linkname.encode(*_TEXT)
            return lambda name, parent: posix.symlink(target, name, dir_fd=parent)
        if member.islnk():
            return lambda name, parent: self._link(_split(member.linkname), name, parent)
        if member.isfifo():
            return lambda name, parent: posix.mkfifo(name, self._mode(member), dir_fd=parent)
        if member.ischr() or member.isblk():
            return None
        return lambda name, parent: self._write_file(archive, member, name, parent)

    def _mode(self, member: tarfile.TarInfo) -> int:
        return member.mode & 0o777 & ~self._umask

    def _place_directory(self, parts: list[bytes], member: tarfile.TarInfo) -> None:
        if not parts:
            return
        parent = self._open_parent(parts)
        try:
            # Writable until its content is there; `finish` sets the wanted mode and time.
            posix.mkdir(parts[-1], 0o700 | self._mode(member), dir_fd=parent)
        except FileExistsError:
            posix.close(self._open(parts, posix.O_PATH | posix.O_DIRECTORY))
            return
        except OSError as error:
            raise _named(error, member) from error
        finally:
            posix.close(parent)
        self._made_directories.append((parts, self._mode(member), _mtime_ns(member)))
        self._set_xattrs_of(parts, member)

    def _write_file(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: bytes, parent: int
    ) -> None:
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
        fd = posix.open(name, flags, 0o600 | self._mode(member), dir_fd=parent)
        try:
            content = archive.extractfile(member)
            left = member.size if content is not None else 0
            while content is not None and left > 0:
                data = content.read(min(left, _CHUNK_BYTES))
                if not data:
                    raise TransferError("broken_archive", "unexpected end of data")
                left -= len(data)
                rest = memoryview(data)
                while rest:
                    rest = rest[posix.write(fd, rest) :]
            posix.fchmod(fd, self._mode(member))
            _set_xattrs(fd, member)
            posix.utime(fd, ns=(_mtime_ns(member), _mtime_ns(member)))
        finally:
            posix.close(fd)

    def _link(self, target: list[bytes], name: bytes, parent: int) -> None:
        if not target:
            raise TransferError("broken_archive", "a hard link to the root")
        target_parent = self._open_parent(target)
        try:
            posix.link(target[-1], name, src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            posix.close(target_parent)

    def _set_xattrs_of(self, parts: list[bytes], member: tarfile.TarInfo) -> None:
        if any(key.startswith(_XATTR_PREFIX) for key in member.pax_headers):
            fd = self._open(parts, _DIRECTORY)
            try:
                _set_xattrs(fd, member)
            finally:
                posix.close(fd)

    def finish(self) -> None:
        """Modes and times of the directories made, the deepest first: a parent may become unwritable."""
        for parts, mode, mtime_ns in reversed(self._made_directories):
            fd = self._open(parts, _DIRECTORY | posix.O_NOFOLLOW)
            try:
                posix.utime(fd, ns=(mtime_ns, mtime_ns))
                posix.fchmod(fd, mode)
            finally:
                posix.close(fd)

    def _open_parent(self, parts: list[bytes]) -> int:
        """The directory an entry lies in, made with its parents if the archive did not name it before."""
        if len(parts) == 1:
            return posix.dup(self._root)
        try:
            return self._open(parts[:-1], posix.O_PATH | posix.O_DIRECTORY)
        except FileNotFoundError:
            grandparent = self._open_parent(parts[:-1])
        try:
            posix.mkdir(parts[-2], 0o777, dir_fd=grandparent)
        finally:
            posix.close(grandparent)
        return self._open(parts[:-1], posix.O_PATH | posix.O_DIRECTORY)

    def _open(self, parts: list[bytes], flags: int) -> int:
        path = b"/".join(parts)
        try:
            return syscalls.open_beneath(self._root, path, flags, self._resolve)
        except OSError as error:
            if error.errno == errno.EXDEV:
                shown = path.decode(*_TEXT)
                raise TransferError("broken_archive", f"{shown}: leads out of the destination") from error
            error.filename = path
            raise


def _split(name: str) -> list[bytes]:
    """Components of an archive name, relative to the destination whatever the archive says."""
    parts = [part for part in name.encode(*_TEXT).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise TransferError("broken_archive", f"{name}: leads out of the destination")
    return parts


def _remove_existing(name: bytes, parent: int) -> None:
    try:
        posix.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    # EISDIR for a directory: it is not replaced by a file, as with tar(1).


def _named(error: OSError, member: tarfile.TarInfo) -> OSError:
    return OSError(error.errno, error.strerror, member.name.encode(*_TEXT))


def _mtime_ns(member: tarfile.TarInfo) -> int:
    return int(member.mtime * 1_000_000_000)


def _set_xattrs(fd: int, member: tarfile.TarInfo) -> None:
    """Extended attributes of a pax header; those the user or the file system does not allow are left out."""
    for key, value in member.pax_headers.items():
        if not key.startswith(_XATTR_PREFIX):
            continue
        name = key[len(_XATTR_PREFIX) :]
        try:
            posix.setxattr(fd, name.encode(*_TEXT), value.encode(*_TEXT))
        except OSError as error:
            if error.errno not in _UNSUPPORTED_XATTR:
                raise


def pack(source: bytes) -> None:
    """Write the source as a tar archive to stdout.

    `/a/b` becomes `b` or `b/...`; `/a/b/` becomes `./` and `./...`. Sockets and device nodes are left out.
    """
    with tarfile.open(
        fileobj=_Output(),  # type: ignore[call-overload]
        mode="w|",
        bufsize=_CHUNK_BYTES,
        format=tarfile.PAX_FORMAT,
        encoding=_TEXT[0],
        errors=_TEXT[1],
    ) as archive:
        packer = _Packer(archive)
        if source.endswith(b"/"):
            packer.add_root(posix.open(source, _DIRECTORY), b".")
            return
        parent_path, _, name = source.rpartition(b"/")
        parent = posix.open(parent_path or b"/", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        if name in (b".", b".."):
            packer.add_root(posix.open(name, _DIRECTORY, dir_fd=parent), b".")
        else:
            packer.add(parent, name, name)


class _Packer:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._first_names: dict[tuple[int, int], str] = {}

    def add_root(self, directory: int, name: bytes) -> None:
        status = posix.fstat(directory)
        member = self._member(name, status)
        _get_xattrs(directory, member)
        self._archive.addfile(member)
        self._add_content(directory, name)

    def add(self, parent: int, entry: bytes, name: bytes) -> None:
        """Add one entry of the directory `parent` under the archive name, with all that is in it."""
        try:
            status = posix.stat(entry, dir_fd=parent, follow_symlinks=False)
            member = self._member(name, status)
            if stat.S_ISREG(status.st_mode):
                self._add_file(parent, entry, member, status)
            elif stat.S_ISDIR(status.st_mode):
                directory = posix.open(entry, _DIRECTORY | posix.O_NOFOLLOW, dir_fd=parent)
                try:
                    _get_xattrs(directory, member)
                    self._archive.addfile(member)
                    self._add_content(directory, name)
                finally:
                    posix.close(directory)
            elif stat.S_ISLNK(status.st_mode):
                member.type = tarfile.SYMTYPE
                member.linkname = posix.readlink(entry, dir_fd=parent).decode(*_TEXT)
                self._archive.addfile(member)
            elif stat.S_ISFIFO(status.st_mode):
                member.type = tarfile.FIFOTYPE
                self._archive.addfile(member)
        except OSError as error:
            if error.filename is None or error.filename == entry:
                error.filename = name
            raise

    def _add_content(self, directory: int, name: bytes) -> None:
        for entry in sorted(posix.listdir(directory)):
            raw = entry.encode(*_TEXT)
            self.add(directory, raw, name + b"/" + raw)

    def _member(self, name: bytes, status: posix.stat_result) -> tarfile.TarInfo:
        # Made by hand: `gettarinfo` asks NSS for names, that is, for code of the container.
        member = tarfile.TarInfo(name.decode(*_TEXT))
        member.mode = stat.S_IMODE(status.st_mode)
        member.uid, member.gid = status.st_uid, status.st_gid
        member.mtime = status.st_mtime_ns // 1_000_000_000
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        return member

    def _add_file(
        self, parent: int, entry: bytes, member: tarfile.TarInfo, status: posix.stat_result
    ) -> None:
        identity = (status.st_dev, status.st_ino)
        first_name = self._first_names.get(identity)
        if first_name is not None:
            member.type = tarfile.LNKTYPE
            member.linkname = first_name
            self._archive.addfile(member)
            return
        # O_NONBLOCK: should a FIFO have taken the name since the stat, opening it must not wait for a writer.
        flags = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC
        fd = posix.open(entry, flags, dir_fd=parent)
        try:
            member.size = posix.fstat(fd).st_size
            _get_xattrs(fd, member)
            self._archive.addfile(member, _ExactContent(fd))
        finally:
            posix.close(fd)
        if status.st_nlink > 1:
            self._first_names[identity] = member.name


class _ExactContent:
    """A file's content as its header announced it: cut if the file grew meanwhile, zeros if it shrank."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int = 0) -> bytes:
        data = b""
        while len(data) < size and (more := posix.read(self._fd, size - len(data))):
            data = data + more if data else more
        return data + bytes(size - len(data))


def _get_xattrs(fd: int, member: tarfile.TarInfo) -> None:
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
        member.pax_headers = {**member.pax_headers, _XATTR_PREFIX + name: value.decode(*_TEXT)}
