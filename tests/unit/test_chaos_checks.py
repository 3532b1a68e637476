"""The checks of scripts/chaos can fail, and its seed decides what is done."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from chaos.board import Board, Failure, Hurt, Subject
from chaos.patience import persist
from chaos.plan import WORKS, Step, plan_attacks, plan_life
from chaos.work import Seen, Work, count

from garden_py.client import ContainerSpec, ExitStatus, OutputChunk, Stream
from garden_py.client.errors import ErrorDetails, FailedPrecondition, ServerFault, Unavailable

SUBJECT = Subject(ContainerSpec(handle="box"))
COUNT = Step("count", "run", size=3, code=7, fraction=0.5, sidecar=False)


def seen_of(stdout: bytes, stderr: bytes) -> Seen:
    seen = Seen()
    seen.add(OutputChunk(Stream.STDOUT, 0, stdout))
    seen.add(OutputChunk(Stream.STDERR, 0, stderr))
    return seen


def judge(step: Step, seen: Seen, status: ExitStatus) -> None:
    container: Any = None
    Work(Board(Path(), [], Path()), SUBJECT, container, step, "p")._judge(seen, status)


def test_seed_decides_lives_and_attacks() -> None:
    """The same for the same seed, another for another."""
    assert plan_life(1, 2, 3) == plan_life(1, 2, 3)
    assert plan_life(1, 2, 3) != replace(plan_life(2, 2, 3))
    series = [list(islice(plan_attacks(seed, "s", ("a", "b"), (1, 2), 1.0), 5)) for seed in (1, 1, 2)]
    assert series[0] == series[1] != series[2]


def test_output_as_it_was_written_passes() -> None:
    """Else the tests below would show nothing."""
    judge(COUNT, seen_of(b"1\n2\n3\n", b"done\n"), ExitStatus(code=7))


@pytest.mark.parametrize("stdout", [b"1\n2\n", b"1\n2\n3\n3\n", b"1\n3\n2\n"])
def test_lost_repeated_and_swapped_bytes_are_found(stdout: bytes) -> None:
    """By the hash of the whole."""
    with pytest.raises(Failure, match="not what was written"):
        judge(COUNT, seen_of(stdout, b"done\n"), ExitStatus(code=7))


@pytest.mark.parametrize("status", [ExitStatus(code=0), ExitStatus(signal=9)])
def test_wrong_exit_is_found(status: ExitStatus) -> None:
    """Code and signal alike."""
    with pytest.raises(Failure, match="ended with"):
        judge(COUNT, seen_of(b"1\n2\n3\n", b"done\n"), status)


def test_blob_must_hash_to_what_its_process_said() -> None:
    """Random bytes are compared with the sum that was taken inside."""
    told = hashlib.sha256(b"abc").hexdigest().encode() + b"  -\n"
    blob = Step("blob", "run", size=3, code=0, fraction=0, sidecar=False)
    judge(blob, seen_of(b"abc", told), ExitStatus(code=0))
    with pytest.raises(Failure, match="not what was written"):
        judge(blob, seen_of(b"abx", told), ExitStatus(code=0))


def test_gap_between_chunks_is_found() -> None:
    """Offsets must follow each other."""
    seen = seen_of(b"abc", b"")
    with pytest.raises(Failure, match="goes on at 4"):
        seen.add(OutputChunk(Stream.STDOUT, 4, b"x"))


def test_every_kind_of_process_has_a_judgement() -> None:
    """A kind that nobody judges would pass always."""
    for kind in set(WORKS):
        step = Step(kind, "run", size=3, code=0, fraction=0, sidecar=False)
        with pytest.raises(Failure):
            judge(step, seen_of(b"rubbish", b"rubbish"), ExitStatus(code=0, signal=None))


async def raised_by(error: Exception, subject: Subject, board: Board) -> None:
    async def act() -> None:
        raise error

    await persist(board, subject, "test", act)


async def test_errors_without_an_attack_are_failures() -> None:
    """A lost connection as well as a fault of the host; of a container broken on purpose, typed ones are expected."""
    host_fault = ServerFault("no", ErrorDetails(code="HOST_FAULT"))
    for error in (Unavailable("gone"), host_fault, ServerFault("bug")):
        with pytest.raises(Failure):
            await raised_by(error, SUBJECT, Board(Path(), [], Path()))
    broken = FailedPrecondition("no", ErrorDetails(code="CONTAINER_BROKEN"))
    hurt = Subject(ContainerSpec(handle="box"), hurt=["agent-kill"])
    with pytest.raises(Failure):
        await raised_by(broken, SUBJECT, Board(Path(), [], Path()))
    with pytest.raises(Hurt):
        await raised_by(broken, hurt, Board(Path(), [], Path()))
    with pytest.raises(Failure, match="untyped"):
        await raised_by(ServerFault("bug"), hurt, Board(Path(), [], Path()))


async def test_attack_excuses_what_it_causes_for_a_while() -> None:
    """And nothing else."""
    board = Board(Path(), [], Path())
    with board.attack("server-kill"):
        pass
    assert board.overlapped(frozenset({"server-kill"}), time.monotonic())
    assert not board.overlapped(frozenset({"disk-full"}), time.monotonic())
    assert not board.overlapped(frozenset({"server-kill"}), time.monotonic() + 3600)
    assert count(3) == b"1\n2\n3\n"
