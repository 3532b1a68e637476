"""A container's mounts, made in the launcher's private mount namespace just before the runtime is called.

Everything lies below one directory on a tmpfs that only the launcher sees:

    <mount_dir>/<id>/0 …       the image's layers, lowest first, owners mapped to the container's ids (nothing is
    chowned)
    <mount_dir>/<id>/rootfs    overlay of the container's own upper directory over them; or what an image plugin has
    made
    <mount_dir>/<id>/b0 …      bind sources: copies of the mounts, read-only or not, for the runtime to bind

The runtime clones the namespace, pivots into `rootfs`, and the launcher lets go of its copy. No mount is ever visible
on the host, so none can leak or hold a directory busy.

Source: mount_setattr(2) (id-mapped mounts); overlayfs.rst ("volatile" skips syncs that a throw-away layer does
not need).
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from garden_py.backend.host import syscalls
from garden_py.backend.host.idmap import IdMap
from garden_py.backend.host.userns import make_userns
from garden_py.backend.rootfs.host_mounts import HOST_MOUNTS, HostMounts
from garden_py.model.errors import GardenError, ImageInvalid, InvalidField

_USERNS_CACHE_MAX = 64
_PLACES = ("dev", "etc", "proc", "sys")  # where the runtime mounts
_FILES = ("etc/hosts", "etc/resolv.conf")
_HERE = HostMounts()  # the launcher's own namespace


@dataclass(frozen=True, slots=True)
class BindSource:
    """A host path to make available as `<mount_dir>/<id>/<name>`.

    Attributes:
        mapped: show its owners through the container's user namespace.
        hardened: nosuid and nodev as well.
        inside: source is a path in the container's own root file system, not the host's.
        field: of the request, for errors.
    """

    source: str
    name: str
    read_only: bool
    mapped: bool = False
    hardened: bool = False
    inside: bool = False
    field: str = ""


@dataclass(frozen=True, slots=True)
class MountPlan:
    """All mounts of one container.

    Attributes:
        directory: `<mount_dir>/<id>`, made by `apply` and gone after `release`.
        layers: directories of the image, lowest first.
        image: what to call it in errors.
        id_map: of the container; None for a privileged one.
        ready: a root file system that is used as it is, in place of layers; empty: there is none.
        ready_map: shows its owners in the container's ids; None: they are those already.
    """

    directory: Path
    layers: tuple[str, ...]
    upper: str
    work: str
    id_map: IdMap | None
    binds: tuple[BindSource, ...] = ()
    image: str = ""
    ready: str = ""
    ready_map: IdMap | None = None

    @property
    def rootfs(self) -> Path:
        """Where the container's root file system is mounted."""
        return self.directory / "rootfs"


class MountStepFailed(OSError):
    """One mount of the plan failed; `step` says which."""

    def __init__(self, step: str, cause: OSError) -> None:
        super().__init__(cause.errno, f"{step}: {cause.strerror}", cause.filename)
        self.step = step


def apply(plan: MountPlan) -> None:
    """Make every mount of the plan; on failure nothing of it stays.

    Raises:
        MountStepFailed: naming the mount that failed.
        ImageInvalid: the image has something in the way of what every container gets.
        InvalidField: a bind source is not in the image, or cannot be mounted with mapped ids.
    """
    plan.directory.mkdir(mode=0o711)
    try:
        userns_fd = None if plan.id_map is None else _userns_fds.get(plan.id_map)
        if plan.ready:
            _mount_ready(plan)
        else:
            _mount_rootfs(plan, userns_fd)
        _check_places(plan)
        for bind in plan.binds:
            _clone_bind(plan.directory, bind, userns_fd)
    except (OSError, GardenError):
        release(plan.directory)
        raise


def release(directory: Path) -> None:
    """Detach and remove everything below a plan's directory; gone, or going by another worker's hand, is fine."""
    try:
        entries = sorted(
            os.scandir(directory), key=lambda e: e.name, reverse=True
        )  # rootfs before its layers
    except FileNotFoundError:
        return
    for entry in entries:
        path = Path(entry.path)
        try:
            syscalls.umount(path, lazy=True)
        except OSError:
            if path.is_mount():
                raise
    shutil.rmtree(directory, onerror=_gone_is_fine)


def _gone_is_fine(
    function: object, path: str, info: tuple[type[BaseException], BaseException, object]
) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]


def _mount_rootfs(plan: MountPlan, userns_fd: int | None) -> None:
    names = [str(number) for number in range(len(plan.layers))]
    for name, layer in zip(names, plan.layers, strict=True):
        lower = plan.directory / name
        lower.mkdir()
        try:
            _clone(Path(layer), lower, attributes=0, userns_fd=userns_fd)
        except OSError as error:
            step = f"id-mapped mount of image {layer}"
            if error.errno == errno.EINVAL:
                step += " (its file system does not support id-mapped mounts; see `garden doctor`)"
            raise MountStepFailed(step, error) from error
    plan.rootfs.mkdir()
    # By names as short as can be, seen from where they are: mount(2) takes 4096 bytes of options.
    data = f"lowerdir={':'.join(reversed(names))},upperdir={plan.upper},workdir={plan.work},volatile"
    try:
        os.chdir(plan.directory)
        syscalls.mount("garden", plan.rootfs, "overlay", 0, data)
    except OSError as error:
        raise MountStepFailed("overlay of the root file system", error) from error
    finally:
        os.chdir("/")


def _mount_ready(plan: MountPlan) -> None:
    plan.rootfs.mkdir()
    userns_fd = None if plan.ready_map is None else _userns_fds.get(plan.ready_map)
    try:
        _clone(Path(plan.ready), plan.rootfs, attributes=0, userns_fd=userns_fd)
    except OSError as error:
        step = f"mount of {plan.ready}, which the image plugin has made"
        if error.errno == errno.EINVAL and plan.ready_map is not None:
            step += (
                " (its file system does not support id-mapped mounts: have the plugin map ids as the server does, "
                "see --compat garden)"
            )
        raise MountStepFailed(step, error) from error


def _check_places(plan: MountPlan) -> None:
    """Refuse an image that would have the runtime mount elsewhere than where it says (runc CVE-2019-19921 class)."""
    for name in _PLACES:
        try:
            mode = (plan.rootfs / name).lstat().st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "not a directory"
            raise ImageInvalid(plan.image, f"its /{name} is {what}; a container needs a directory there")
    root = os.open(plan.rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in _FILES:
            _check_file(root, name, plan.image)
    finally:
        os.close(root)


def _check_file(root: int, name: str, image: str) -> None:
    """Refuse what a file cannot be mounted over; a link is followed within the root, and may lead to nothing."""
    try:
        fd = syscalls.open_in_root(root, name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return
        raise ImageInvalid(image, f"its /{name} cannot be resolved: {error.strerror}") from error
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise ImageInvalid(image, f"its /{name} is a directory; a container needs a file there")
    finally:
        os.close(fd)


def _clone_bind(directory: Path, bind: BindSource, userns_fd: int | None) -> None:
    if bind.inside:
        _clone_inside(directory, bind)
        return
    _mount_bind(bind, directory / bind.name, userns_fd, HOST_MOUNTS)


def _mount_bind(bind: BindSource, target: Path, userns_fd: int | None, place: HostMounts) -> None:
    source = Path(bind.source)
    try:
        with place.entered():
            is_directory = stat.S_ISDIR(source.stat().st_mode)
        if is_directory:
            target.mkdir()
        else:
            target.touch()
        attributes = syscalls.MOUNT_ATTR_RDONLY if bind.read_only else 0
        if bind.hardened:
            attributes |= syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
        userns_fd = userns_fd if bind.mapped else None
        _clone(source, target, attributes=attributes, userns_fd=userns_fd, place=place)
    except OSError as error:
        if bind.mapped and error.errno == errno.EINVAL:  # mount_setattr(2), "MOUNT_ATTR_IDMAP"
            problem = f"{bind.source} lies on a file system that cannot be mounted with mapped ids"
            raise InvalidField(bind.field, problem) from error
        raise MountStepFailed(f"bind mount of {bind.source}", error) from error


def _clone_inside(directory: Path, bind: BindSource) -> None:
    """As `_clone_bind` for a part of the root file system itself: owners are mapped there already."""
    root = os.open(directory / "rootfs", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = syscalls.open_in_root(root, bind.source)
    except OSError as error:
        problem = f"{bind.source} in the container's image: {error.strerror}"
        raise InvalidField(bind.field, problem) from error
    finally:
        os.close(root)
    try:
        own = replace(bind, source=f"/proc/self/fd/{fd}", mapped=False)
        _mount_bind(own, directory / bind.name, None, _HERE)
    finally:
        os.close(fd)


def _clone(
    source: Path, target: Path, *, attributes: int, userns_fd: int | None, place: HostMounts = HOST_MOUNTS
) -> None:
    """Copy a mount that is seen from a place, to target."""
    with place.entered():
        fd = syscalls.clone_mount(source)
    try:
        if attributes or userns_fd is not None:
            syscalls.set_mount_attributes(fd, attributes, userns_fd=userns_fd)
        syscalls.attach_mount(fd, target)
    finally:
        os.close(fd)


class _UsernsFds:
    """User namespaces that exist only to describe a mapping, the latest few kept open."""

    def __init__(self) -> None:
        self._fds: OrderedDict[IdMap, int] = OrderedDict()

    def get(self, id_map: IdMap) -> int:
        if id_map not in self._fds:
            self._fds[id_map] = make_userns(id_map)
        self._fds.move_to_end(id_map)
        while len(self._fds) > _USERNS_CACHE_MAX:
            os.close(self._fds.popitem(last=False)[1])
        return self._fds[id_map]


_userns_fds = _UsernsFds()
