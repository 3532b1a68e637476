"""Image plugins: other programs make root file systems, count what is in them, and remove them.

    PROGRAM [EXTRA…] create [--disk-limit-size-bytes N [--exclude-image-from-quota]]
                            [--username U] [--password P] URI ID
    PROGRAM [EXTRA…] delete ID | stats ID | capacity

One program makes those of unprivileged containers, one those of privileged ones. An id is a container's handle, or the
id of a process with an image of its own.

Source: Garden behaviour, statements MP1 to MP4.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from garden_py.backend.host.threads import in_spare_thread
from garden_py.backend.plugin.caller import AT_ONCE, Lane, PluginCaller, first_problem, said
from garden_py.backend.plugin.program import Ended
from garden_py.model.errors import HostFault, InvalidField, NotSupported
from garden_py.model.image import RegistryAuth
from garden_py.model.limits import DiskScope, Limits
from garden_py.model.process import check_env
from garden_py.service.ports import DiskUsage

log = structlog.get_logger()
Command = tuple[str, ...]
"""A program and its extra arguments."""

CREATE_STEP: Final = "running image plugin create"  # as errors begin, statement M11
_QUESTION_TIMEOUT_S = 10.0
_CAPACITY_KEPT_S = 30.0
_SILENCE_S = 10.0
_MESSAGE_MAX = 4000


@dataclass(frozen=True, slots=True)
class PluginRootfs:
    """A root file system that a plugin has made.

    Attributes:
        path: of it, on the host.
        env: of the image, NAME=VALUE; what else there is, no program could be started with.
        mounts: of the OCI's runtime-spec, to be made before all others.
    """

    path: str
    env: tuple[str, ...]
    mounts: tuple[dict[str, Any], ...]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Root(_Answer):
    path: str = Field(pattern=r"^/[^\x00]*$")


class _Process(_Answer):
    env: list[str] | None = None


class _Mount(_Answer):
    destination: str = Field(pattern=r"^/[^\x00]*$")
    type: str | None = None
    source: str | None = None
    options: list[str] | None = None


class _Made(_Answer):
    root: _Root
    process: _Process | None = None
    mounts: list[_Mount] | None = None


class _Use(_Answer):
    total_bytes_used: int = Field(ge=0)
    exclusive_bytes_used: int = Field(ge=0)


class _Stats(_Answer):
    disk_usage: _Use


class _Capacity(_Answer):
    capacity: int = Field(ge=0)


_AnswerT = TypeVar("_AnswerT", bound=_Answer)
_NAMES: Final = {False: "image_plugin", True: "privileged_image_plugin"}


class ImagePlugins:
    """The verbs of a server's image plugins.

    Args:
        commands: by whether they are for privileged containers; an empty one: there is none.
        caller: runs them.
        create_timeout_s: until a program that makes a root file system is killed.
    """

    def __init__(
        self, commands: dict[bool, Command], caller: PluginCaller, *, create_timeout_s: float
    ) -> None:
        self._commands = commands
        self._caller = caller
        self._create_timeout_s = create_timeout_s
        self._capacity, self._asked_at = 0, float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._has_asked = False
        self._questions = asyncio.Semaphore(AT_ONCE[Lane.ASK])
        self._silent_until = float("-inf")

    @property
    def commands(self) -> tuple[Command, ...]:
        """Those there are, that for unprivileged containers first (statement MP3)."""
        return tuple(filter(None, (self._commands[False], self._commands[True])))

    async def create(
        self, plugin_id: str, image: str, auth: RegistryAuth | None, limits: Limits, *, privileged: bool
    ) -> PluginRootfs:
        """Make a root file system.

        Args:
            plugin_id: it is to be known by.
            image: the reference as the caller wrote it.
            auth: for a registry.
            limits: on disk space.
            privileged: whether the container is.

        Raises:
            NotSupported: there is no plugin for this kind of container.
            InvalidField: user or password cannot be an argument.
            HostFault: it fails, or says what it should not.
        """
        command = self._commands[privileged]
        if not command:
            raise NotSupported(f"no {_NAMES[privileged]} provided")  # the reference's words
        _require_words(auth)
        ended = await self._caller.run(
            [*command, *_create_words(image, auth, limits), plugin_id],
            call="create",
            step=CREATE_STEP,
            timeout_s=self._create_timeout_s,
            lane=Lane.MAKE,
            secrets=() if auth is None else (auth.password,),
        )
        _require_success(ended, CREATE_STEP)
        made = _parse(CREATE_STEP, _Made, ended.stdout)
        # Its file system may hang; whoever gives the create up does not wait for that.
        if not await in_spare_thread(partial(os.path.isdir, made.root.path)):
            raise HostFault(CREATE_STEP, f"there is no directory {made.root.path}, which it says it has made")
        mounts = tuple(each.model_dump(exclude_none=True) for each in made.mounts or ())
        env = (made.process or _Process()).env or ()
        return PluginRootfs(made.root.path, tuple(each for each in env if not check_env((each,), "")), mounts)

    async def delete(self, plugin_id: str, made_by: Sequence[Command], *, timeout_s: float) -> None:
        """Remove a root file system; one that is not there is fine.

        Args:
            plugin_id: as it was created with.
            made_by: the plugins of the server that made it; asked if this server has none.
            timeout_s: until a program is killed.

        Raises:
            HostFault: one of them fails.
        """
        for command in self.commands or made_by:
            step = "running image plugin delete"
            ended = await self._caller.run(
                [*command, "delete", plugin_id],
                call="delete",
                step=step,
                timeout_s=timeout_s,
                lane=Lane.REMOVE,
            )
            _require_success(ended, step)

    async def usage(self, plugin_id: str, made_by: Sequence[Command]) -> DiskUsage:
        """What a root file system takes; arguments as of `delete`.

        Raises:
            HostFault: no plugin knows, or one has not answered a moment ago: many are asked about at a time.
        """
        step, refusal = "running image plugin stats", HostFault("running image plugin stats", "there is none")
        for command in self.commands or made_by:
            try:
                ended = await self._ask(command, ["stats", plugin_id], step)
                _require_success(ended, step)
            except HostFault as fault:
                refusal = fault
                continue
            use = _parse(step, _Stats, ended.stdout).disk_usage
            return DiskUsage(use.exclusive_bytes_used, use.total_bytes_used)
        raise refusal

    def capacity_bytes(self) -> int:
        """What the store of images holds, as last told; 0 while that is not known. Asks anew in the background."""
        loop = asyncio.get_running_loop()
        if self.commands and self._asking is None and loop.time() > self._asked_at + _CAPACITY_KEPT_S:
            self._asking = asyncio.ensure_future(self.ask_capacity())
            self._asking.add_done_callback(self._asked)
        return self._capacity

    async def capacity_told(self) -> None:
        """Wait for the end of the first question about the capacity, if that has been asked."""
        if self._asking is not None and not self._has_asked:
            await asyncio.wait([self._asking])

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking, self._has_asked = None, True
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("plugin.capacity_unknown", error=str(error))

    async def ask_capacity(self) -> None:
        """Ask the first plugin for the capacity; what it was stays if it does not say."""
        self._asked_at = asyncio.get_running_loop().time()
        step = "running image plugin capacity"
        try:
            ended = await self._ask(self.commands[0], ["capacity"], step)
            _require_success(ended, step)
            self._capacity = _parse(step, _Capacity, ended.stdout).capacity
        except HostFault as fault:
            log.warning("plugin.capacity_unknown", error=str(fault))

    async def _ask(self, command: Command, words: list[str], step: str) -> Ended:
        loop, argv = asyncio.get_running_loop(), [*command, *words]
        async with self._questions:
            if loop.time() < self._silent_until:
                raise HostFault(step, "the plugin has not answered a moment ago")
            began = loop.time()
            try:
                return await self._caller.run(
                    argv, call=words[0], step=step, timeout_s=_QUESTION_TIMEOUT_S, lane=Lane.ASK
                )
            except HostFault:
                if loop.time() >= began + _QUESTION_TIMEOUT_S:
                    self._silent_until = loop.time() + _SILENCE_S
                raise

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])


def _require_words(auth: RegistryAuth | None) -> None:
    for name in () if auth is None else ("username", "password"):
        try:
            is_word = b"\0" not in getattr(auth, name).encode()
        except UnicodeEncodeError:
            is_word = False
        if not is_word:
            raise InvalidField(f"image_auth.{name}", "cannot be an argument of the image plugin")


def _create_words(image: str, auth: RegistryAuth | None, limits: Limits) -> list[str]:
    words = ["create"]
    if limits.disk_bytes:
        words += ["--disk-limit-size-bytes", str(limits.disk_bytes)]
        if limits.disk_scope is not DiskScope.TOTAL:
            words.append("--exclude-image-from-quota")
    if auth is not None and auth.username:
        words += ["--username", auth.username]
    if auth is not None and auth.password:
        words += ["--password", auth.password]
    return [*words, image.replace("#", ":", 1)]  # statement M2


def _require_success(ended: Ended, step: str) -> None:
    """HostFault with what a plugin that has failed says: on stdout, for stderr has its log (statement MP1)."""
    if ended.status != 0:
        told = ended.stdout.strip() or f"{ended.how}{said(ended.stderr)}"
        raise HostFault(step, told[:_MESSAGE_MAX])


def _parse(step: str, kind: type[_AnswerT], text: str) -> _AnswerT:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise HostFault(step, f"its answer is not what it should be: {first_problem(error)}") from error
