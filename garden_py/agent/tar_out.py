"""Pack a file or a directory as a tar stream to stdout."""

from __future__ import annotations

import posix
import stat
import tarfile

from garden_py.agent.tar_shared import CHUNK_BYTES, DIRECTORY, TEXT, get_xattrs


class _Output:
    """stdout as tarfile writes it."""

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[posix.write(1, rest) :]
        return len(data)


def pack(source: bytes) -> None:
    """Write the source as a tar archive to stdout.

    `/a/b` becomes `b` or `b/...`; `/a/b/` becomes `./` and `./...`. Sockets and device nodes are left out.
    """
    with tarfile.open(  # type: ignore[call-overload]  # a stream is only written
        fileobj=_Output(),
        mode="w|",
        bufsize=CHUNK_BYTES,
        format=tarfile.PAX_FORMAT,
        encoding=TEXT[0],
        errors=TEXT[1],
    ) as archive:
        packer = _Packer(archive)
        if source.endswith(b"/"):
            packer.add_root(posix.open(source, DIRECTORY), b".")
            return
        parent_path, _, name = source.rpartition(b"/")
        parent = posix.open(parent_path or b"/", posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        if name in (b".", b".."):
            packer.add_root(posix.open(name, DIRECTORY, dir_fd=parent), b".")
        else:
            packer.add(parent, name, name)


class _Packer:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._first_names: dict[tuple[int, int], str] = {}

    def add_root(self, directory: int, name: bytes) -> None:
        status = posix.fstat(directory)
        member = self._member(name, status)
        get_xattrs(directory, member)
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
                directory = posix.open(entry, DIRECTORY | posix.O_NOFOLLOW, dir_fd=parent)
                try:
                    get_xattrs(directory, member)
                    self._archive.addfile(member)
                    self._add_content(directory, name)
                finally:
                    posix.close(directory)
            elif stat.S_ISLNK(status.st_mode):
                member.type = tarfile.SYMTYPE
                member.linkname = posix.readlink(entry, dir_fd=parent).decode(*TEXT)
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
            raw = entry.encode(*TEXT)
            self.add(directory, raw, name + b"/" + raw)

    def _member(self, name: bytes, status: posix.stat_result) -> tarfile.TarInfo:
        # Made by hand: `gettarinfo` asks NSS for names, that is, for code of the container.
        member = tarfile.TarInfo(name.decode(*TEXT))
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
            get_xattrs(fd, member)
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
