"""Creates that something goes wrong with: the caller is told what, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit.server import running_server
from kit.trace import assert_no_trace, snapshot

from garden_py.client import ContainerSpec, GardenClient, GardenError
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


def test_a_server_whose_runtime_is_gone_takes_over_what_runs(no_trace: None, tmp_path: Path) -> None:
    """As while its package is being replaced. Only a create needs it, and says so."""
    runtime = tmp_path / "runc"
    runtime.write_text('#!/bin/sh\nexec runc "$@"\n')
    runtime.chmod(0o755)
    before = snapshot()
    with running_server("--runtime", str(runtime)) as server, GardenClient(server.address) as garden:
        box = garden.create()
        server.stop()
        runtime.unlink()
        server.start()
        assert box.run(["true"]).output().exit.code == 0
        with pytest.raises(GardenError, match="is not installed"):
            garden.create()
        box.destroy()
    assert_no_trace(before)
