"""Changing inputs, and keeping those that reach a line which no other has reached."""

from __future__ import annotations

import hashlib
import random
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.targets import Target, cuts_of

INPUT_MAX_BYTES = 1500
_TRIMS = 60


@dataclass
class Reach:
    """Runs a target and tells which lines of its modules it went through."""

    target: Target
    lines: set[tuple[str, int]] = field(default_factory=set)

    def run(self, data: bytes) -> frozenset[tuple[str, int]]:
        """The lines of one run, the input cut somehow; what the target raises is passed on."""
        self.target.check(data)
        self.lines = set()
        *_, pieces = cuts_of(data)
        sys.settrace(self._enter)
        try:
            self.target.read(pieces)
        finally:
            sys.settrace(None)
        return frozenset(self.lines)

    def __post_init__(self) -> None:
        self._files = frozenset(str(module.__file__) for module in self.target.modules)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step if frame.f_code.co_filename in self._files else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._step


@dataclass
class Grower:
    """Grows a corpus.

    Attributes:
        words: that a changed input may get.
        place: directory in which what is kept and what fails is written down; None: nowhere.
        failures: inputs that failed, with the reason; of each reason the first.
    """

    reach: Reach
    words: tuple[bytes, ...]
    place: Path | None
    chance: random.Random
    corpus: list[bytes] = field(default_factory=list)
    known: set[tuple[str, int]] = field(default_factory=set)
    failures: dict[str, bytes] = field(default_factory=dict)
    tried: int = 0

    def offer(self, data: bytes, *, keep: bool = False) -> None:
        """Try an input; keep it if it reaches something new, or anyhow."""
        lines = self._try(data)
        if lines is None:
            return
        new = lines - self.known
        if new and not keep:
            data = self._trimmed(data, new)
            self._write("", data)
        if new or keep:
            self.corpus.append(data)
            self.known |= lines

    def step(self) -> None:
        """Change one input of the corpus somehow, and offer the outcome."""
        data = bytearray(self.chance.choice(self.corpus))
        for _ in range(self.chance.choice((1, 1, 2, 4, 8))):
            self.chance.choice(_CHANGES)(self, data)
        self.offer(bytes(data[:INPUT_MAX_BYTES]))

    def _try(self, data: bytes) -> frozenset[tuple[str, int]] | None:
        self.tried += 1
        try:
            return self.reach.run(data)
        except Exception as error:  # noqa: BLE001 - which is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            if reason not in self.failures:
                self.failures[reason] = data
                self._write("failed-", data)
                sys.stderr.write(f"{reason}: {data!r}\n{traceback.format_exc()[-1500:]}\n")
            return None

    def _trimmed(self, data: bytes, new: frozenset[tuple[str, int]]) -> bytes:
        """A shorter input that reaches the same new lines, if a few attempts find one."""
        for _ in range(_TRIMS):
            size = self.chance.randint(1, max(1, len(data) // 3))
            at = self.chance.randint(0, len(data))
            shorter = data[:at] + data[at + size :]
            lines = self._try(shorter)
            if lines is not None and new <= lines:
                data = shorter
        return data

    def _write(self, prefix: str, data: bytes) -> None:
        if self.place is not None:
            name = prefix + hashlib.sha256(data).hexdigest()[:12]
            (self.place / name).write_bytes(data)


def _at(grower: Grower, data: bytearray) -> int:
    return grower.chance.randint(0, len(data))


def _flip(grower: Grower, data: bytearray) -> None:
    if data:
        data[grower.chance.randrange(len(data))] ^= 1 << grower.chance.randrange(8)


def _set(grower: Grower, data: bytearray) -> None:
    if data:
        data[grower.chance.randrange(len(data))] = grower.chance.randrange(256)


def _cut(grower: Grower, data: bytearray) -> None:
    at = _at(grower, data)
    del data[at : at + grower.chance.choice((1, 2, 4, 16, 100))]


def _double(grower: Grower, data: bytearray) -> None:
    at = _at(grower, data)
    data[at:at] = data[at : at + grower.chance.choice((1, 2, 4, 16, 100))]


def _word(grower: Grower, data: bytearray) -> None:
    at = _at(grower, data)
    data[at:at] = grower.chance.choice(grower.words)


def _splice(grower: Grower, data: bytearray) -> None:
    other, at = grower.chance.choice(grower.corpus), _at(grower, data)
    data[at:] = other[grower.chance.randint(0, len(other)) :]


_CHANGES: tuple[Callable[[Grower, bytearray], None], ...] = (
    _flip,
    _set,
    _cut,
    _double,
    _word,
    _word,
    _splice,
)
