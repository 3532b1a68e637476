"""A diagnosis says what can be had and tells what cannot, whatever is wrong; secrets are in no part of it."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from dataclasses import dataclass, field
from typing import Any

import pytest
from kit.core import Server

from garden_py.backend.linux.rule_listing import pick_elements
from garden_py.backend.streams.agent_talk import AgentTalk
from garden_py.model.errors import ContainerNotFound, HostFault, Unkillable
from garden_py.model.lifecycle import State
from garden_py.model.process import ProcessSpec
from garden_py.model.redact import scrub, secrets_of, without_secrets
from garden_py.model.spec import ContainerSpec
from garden_py.observe.recent import RecentLines
from garden_py.service.core import Core
from garden_py.service.diagnosis import SUMMARY, Diagnosis
from garden_py.service.ports import Clue


@dataclass
class Bundle:
    files: dict[str, bytes] = field(default_factory=dict)

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])

    @property
    def problems(self) -> dict[str, str]:
        return {part["name"]: part["problem"] for part in self.json(SUMMARY)["parts"] if part["problem"]}


async def diagnose(core: Core, handle: str, deadline_s: float = 6.0) -> Bundle:
    expiry = core.containers.expiry
    diagnosis = Diagnosis(
        core.backend, core.registry, core.events, expiry, lambda _: "a line\n", "0", deadline_s
    )
    data = b"".join([piece async for piece in diagnosis.collect(handle)])
    bundle = Bundle()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            assert member.name.startswith(f"garden-{handle}/")
            bundle.files[member.name.removeprefix(f"garden-{handle}/")] = file.read()
    assert list(bundle.files)[-1] == SUMMARY
    return bundle


def clue(name: str, outcome: Any) -> Clue:
    async def read() -> bytes:
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:
            await asyncio.Event().wait()
        return bytes(outcome)

    return Clue(name, read)


async def test_parts_that_fail_hang_or_are_too_large_are_told_and_spoil_nothing() -> None:
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="web"))
    server.backend.further_clues = [
        clue("good", b"here"),
        clue("fault", HostFault("nft", "no table")),
        clue("bug", KeyError("oops")),
        clue("hangs", None),
        clue("large", b"x" * (3 << 20)),
        clue("last", b"there"),
    ]
    found = await diagnose(core, "web", deadline_s=0.2)
    assert found.problems == {
        "fault": "nft: no table",
        "bug": "KeyError('oops')",
        "hangs": "not read in 0.2 s",
        "large": f"cut: there were {3 << 20} bytes",
    }
    assert (found.files["good"], found.files["last"]) == (b"here", b"there")
    assert len(found.files["large"]) == 2 << 20
    assert not {"fault", "bug", "hangs"} & found.files.keys()
    assert found.json("container.json")["state"] == "active"
    assert found.files["log.jsonl"] == b"a line\n"
    assert b"CONTAINER_CREATED" in found.files["events.jsonl"]
    await core.close()


async def test_a_container_that_cannot_be_destroyed_can_be_diagnosed() -> None:
    server = Server()
    core = await server.start()
    await core.containers.create(ContainerSpec(handle="web"))
    server.backend.destroy_failures = [Unkillable("web", "PID 1 (7) does not end: state D")]
    with pytest.raises(Unkillable):
        await core.containers.destroy("web")
    assert core.registry.find("web").state is State.UNKILLABLE  # type: ignore[union-attr]
    found = await diagnose(core, "web")
    assert found.json("container.json")["state"] == "unkillable"
    assert "state D" in found.json("container.json")["state_reason"]
    with pytest.raises(ContainerNotFound):
        await diagnose(core, "nobody")
    await core.close()


async def test_values_of_variables_are_nowhere() -> None:
    """Not where they belong, and not where a program has repeated them."""
    server = Server()
    core = await server.start()
    spec = ContainerSpec(handle="web", env=("PASSWORD=s3cret-one", "PATH=/usr/bin", "N=1"))
    await core.containers.create(spec)
    await core.processes.start("web", ProcessSpec("true", id="p", env=("TOKEN=s3cret-two",)), "")
    server.backend.further_clues = [
        clue("agent.log", b"it said s3cret-one and s3cret-two in /usr/bin 1 time"),
        clue("fault", HostFault("sh", "token s3cret-two")),
    ]
    found = await diagnose(core, "web")
    everything = b"".join(found.files.values())
    assert b"s3cret" not in everything
    assert found.json("container.json")["spec"]["env"] == [
        "PASSWORD=<removed>",
        "PATH=<removed>",
        "N=<removed>",
    ]
    assert found.json("processes.json")[0]["spec"]["env"] == ["TOKEN=<removed>"]
    assert found.files["agent.log"] == b"it said <removed> and <removed> in /usr/bin 1 time"
    assert found.problems["fault"] == "sh: token <removed>"
    await core.close()


def test_secrets_are_found_at_any_depth() -> None:
    value = {"process": {"env": ["A=b", "C"], "args": ["A=b"]}, "sidecar": {"image_auth": {"password": "p"}}}
    assert without_secrets([value]) == [
        {"process": {"env": ["A=<removed>", "C=<removed>"], "args": ["A=b"]}, "sidecar": {}}
    ]


def test_a_secret_inside_another_does_not_leave_the_rest_of_it() -> None:
    secrets = secrets_of(["A=password", "B=password-and-more", "PATH=/usr/local/bin", "C=short"])
    assert scrub(b"password-and-more password short", secrets) == b"<removed> <removed> short"


def test_a_secret_is_found_as_json_writes_it() -> None:
    """In arguments of a process, for one."""
    secrets = secrets_of(['A=qu"ote\\d', "B=p\u00e4sswort"])
    for value in ('qu"ote\\d', "p\u00e4sswort"):
        for ascii_only in (True, False):
            written = json.dumps(["echo", value], ensure_ascii=ascii_only).encode()
            assert scrub(written, secrets) == b'["echo", "<removed>"]'


def test_rules_of_others_are_left_out() -> None:
    listing = """table inet garden_3fa1 {
	set members {
		type ifname . ipv4_addr
		elements = { "gdn3fa1-2" . 10.254.0.2, "gdn3fa1-22" . 10.254.0.22,
				"gdn3fa1-3" . 10.254.0.3 }
	}
	map portmap {
		elements = { tcp . 61001 : 10.254.0.2 . 8080, udp . 61002 : 10.254.0.20 . 53 }
	}
	chain refuse {
		reject with icmpx admin-prohibited
	}
}"""
    picked = pick_elements(listing, {"10.254.0.2", "gdn3fa1-2"})
    assert 'elements = { "gdn3fa1-2" . 10.254.0.2 } # 2 of others' in picked
    assert "elements = { tcp . 61001 : 10.254.0.2 . 8080 } # 1 of others" in picked
    assert "reject with icmpx admin-prohibited" in picked
    assert "10.254.0.22" not in picked


def test_what_is_kept_of_a_talk_with_an_agent() -> None:
    """The latest, without environments and arguments, and harmless on a terminal."""
    talk = AgentTalk()
    for number in range(100):
        talk.sent({"op": "spawn", "id": f"p{number}", "env": [b"A=s3cret"], "argv": [b"x"]})
    talk.answered({"op": "ping"}, "no answer in 20 s")
    talk.heard({"event": "exited", "process": "\x1b[31mred", "status": 7})
    talk.ended("the other side closed the connection")
    lines = [line.split(" ", 1)[1] for line in talk.lines()]
    assert len(lines) == 64
    assert lines[-4] == "server: op=spawn id=p99"
    assert lines[-3:] == [
        "agent: op=ping: no answer in 20 s",
        "agent: event=exited process=?[31mred status=7",
        "link: the other side closed the connection",
    ]
    assert not any("s3cret" in line for line in lines)


def test_the_latest_lines_of_each_container_are_kept_and_old_containers_go() -> None:
    recent = RecentLines()
    for number in range(100):
        recent(None, "info", {"event": "rpc.done", "handle": "web", "n": number, "exc_info": object()})
    recent(None, "info", {"event": "server.ready"})
    lines = [json.loads(line) for line in recent.about("web").splitlines()]
    assert [line["n"] for line in lines] == list(range(36, 100))
    assert "exc_info" not in lines[0]
    for number in range(1000):
        recent(None, "info", {"event": "rpc.done", "handle": f"c{number}"})
    assert recent.about("web") == ""
    assert recent.about("c0")
