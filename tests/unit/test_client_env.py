"""Environments that the Python client sends."""

from __future__ import annotations

import pytest

from garden_py.client import calls
from garden_py.client.values import ContainerSpec, ProcessSpec


@pytest.mark.parametrize("name", ["A=B", "", "A\0B", "="])
def test_names_that_would_arrive_as_others_are_refused(name: str) -> None:
    """On the wire a variable is one text, NAME=VALUE: `A=B` with the value C would be A with the value `B=C`."""
    with pytest.raises(ValueError, match="cannot be the name of an environment variable"):
        calls.create(ContainerSpec(env={"GOOD": "1", name: "x"}), "")
    with pytest.raises(ValueError, match="cannot be the name of an environment variable"):
        calls.start("box", ProcessSpec(path="true", env={name: "x"}), "")


def test_values_may_hold_anything_else() -> None:
    """Equals signs, and nothing."""
    request = calls.create(ContainerSpec(env={"A": "B=C", "D": ""}), "").request
    assert list(request.spec.env) == ["A=B=C", "D="]  # type: ignore[attr-defined]
