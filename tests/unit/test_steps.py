"""The steps of an operation find it by themselves, and are told once, at its end."""

from __future__ import annotations

import asyncio

import pytest

from garden_py.observe.metrics import Metrics
from garden_py.observe.steps import CREATE, Operation, Step, operation, step, taken_elsewhere


async def test_steps_of_tasks_that_are_started_inside_belong_to_it() -> None:
    told: list[Operation] = []

    async def connect() -> None:
        with step(Step.NETWORK):
            await asyncio.sleep(0)

    with operation(CREATE, "web", [told.append]):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(connect())
        taken_elsewhere(Step.RUNTIME, 17, 5)
        assert not told
    (found,) = told
    assert (found.name, found.handle, found.failure) == (CREATE, "web", "")
    assert [each.step for each in found.steps] == [Step.NETWORK, Step.RUNTIME]
    assert found.steps[0].began_ns >= found.began_ns
    assert found.took_ns >= found.steps[0].took_ns


async def test_what_fails_is_told_with_its_failure_and_counted_in_no_histogram() -> None:
    metrics, told = Metrics(), list[Operation]()

    def fail() -> None:
        with (
            operation(CREATE, "web", [metrics.operation_ended, told.append]),
            step(Step.LEASE),
        ):
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        fail()
    assert (told[0].failure, told[0].steps[0].failure) == ("OSError", "OSError")
    text = metrics.render().decode()
    assert "garden_create_seconds_count 0.0" in text
    assert 'garden_create_step_seconds_count{step="lease"} 0.0' in text


async def test_outside_of_an_operation_nothing_is_told() -> None:
    with step(Step.KILL):
        taken_elsewhere(Step.RUNTIME, 1, 1)
