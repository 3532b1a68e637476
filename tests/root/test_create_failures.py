"""Creates that something goes wrong with: the caller is told what, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.server import running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import ContainerSpec, GardenClient
from garden_py.client.errors import ServerFault

pytestmark = pytest.mark.root

# Stands in for runc: starts the container as runc does, then the agent ends as it might by itself.
AGENT_DIES = """#!/bin/sh
runc "$@" || exit
while [ $# -gt 0 ]; do
  [ "$1" = --pid-file ] && kill -KILL "$(cat "$2")"
  shift
done
"""


def test_agent_that_dies_during_a_create_is_a_fault_of_the_host(no_trace: None, tmp_path: Path) -> None:
    """Not a broken container: the caller never had one. The handle is free again."""
    runtime = tmp_path / "runc"
    runtime.write_text(AGENT_DIES)
    runtime.chmod(0o755)
    before = snapshot()
    with running_server("--runtime", str(runtime)) as server, GardenClient(server.address) as garden:
        for _ in range(2):
            with pytest.raises(ServerFault) as failed:
                garden.create(ContainerSpec(handle="again"))
            assert failed.value.code == "HOST_FAULT"
        assert list(garden.list(all_states=True)) == []
    assert_no_trace(before)
