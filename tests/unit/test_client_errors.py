"""Failed calls become exceptions that carry the server's facts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from kit.fake_server import RunningFake, serve_fake

from garden_py.cli.failures import failure_text, report
from garden_py.client import (
    Aborted,
    AlreadyExists,
    AsyncGardenClient,
    BadAddress,
    ContainerSpec,
    EgressPolicy,
    GardenClient,
    InvalidArgument,
    NotFound,
    RetryPolicy,
    Tls,
    Unavailable,
)
from garden_py.client.address import DEFAULT_ADDRESS, resolve_target
from garden_py.client.errors import ErrorDetails, make_error
from garden_py.client.retry import Patience


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[RunningFake]:
    with serve_fake(tmp_path) as running:
        yield running


@pytest.fixture
def client(fake: RunningFake) -> Iterator[GardenClient]:
    with GardenClient(fake.address) as connected:
        yield connected


def test_an_invalid_field_is_named(client: GardenClient) -> None:
    """Callers act on the field, not on the prose."""
    with pytest.raises(InvalidArgument) as caught:
        client.create(ContainerSpec(handle="a/b"))
    assert [(each.field, each.problem) for each in caught.value.fields] == [("spec.handle", "no slashes")]


def test_a_taken_handle_has_its_own_code(client: GardenClient) -> None:
    """ALREADY_EXISTS covers handles, ports and process ids; the code tells which."""
    client.create(ContainerSpec(handle="a"))
    with pytest.raises(AlreadyExists) as caught:
        client.create(ContainerSpec(handle="a"))
    assert caught.value.code == "HANDLE_IN_USE"


def test_a_missing_container_is_named_as_resource(client: GardenClient) -> None:
    """`resource` is what was not found."""
    with pytest.raises(NotFound) as caught:
        client.container("nosuch").info()
    assert (caught.value.code, caught.value.resource) == ("CONTAINER_NOT_FOUND", "nosuch")


async def test_the_asynchronous_client_raises_the_same_errors(fake: RunningFake) -> None:
    """One mapping serves both faces."""
    async with AsyncGardenClient(fake.address) as client:
        with pytest.raises(NotFound) as caught:
            await client.container("nosuch").info()
        assert caught.value.code == "CONTAINER_NOT_FOUND"
        container = await client.create()
        with pytest.raises(NotFound) as not_started:
            await container.run(["nosuch"])
        assert not_started.value.code == "EXECUTABLE_NOT_FOUND"


def test_a_lost_update_is_aborted(client: GardenClient) -> None:
    """An etag that is not the current one changes nothing."""
    container = client.create()
    with pytest.raises(Aborted):
        container.set_egress(EgressPolicy(etag="stale"))


def test_no_server_is_unavailable_at_once(tmp_path: Path) -> None:
    """A wrong address must not look like a slow server."""
    with GardenClient(f"unix:{tmp_path}/nothing.sock") as client, pytest.raises(Unavailable):
        client.ping()


def test_create_with_a_request_id_is_idempotent(client: GardenClient) -> None:
    """A retry after a lost answer returns the container that was made."""
    spec = ContainerSpec(handle="a")
    assert client.create(spec, request_id="r").handle == client.create(spec, request_id="r").handle


def test_a_failed_call_knows_its_name_in_the_servers_log() -> None:
    """What an operator greps for; a fault of the server's shows it on the command line."""
    error = make_error(grpc.StatusCode.INTERNAL, "mount: no", [("x-request-id", "ticket-17")])
    assert error.request_id == "ticket-17"
    assert failure_text(error) == "mount: no (request_id ticket-17 in the server's log)"
    assert make_error(grpc.StatusCode.INTERNAL, "mount: no", None).request_id == ""


def test_leaving_the_block_destroys_the_container(client: GardenClient) -> None:
    """Also if it was destroyed inside already."""
    with client.create(ContainerSpec(handle="a")):
        pass
    with client.create(ContainerSpec(handle="b")) as container:
        container.destroy()
    assert list(client.list()) == []


def test_list_follows_all_pages(client: GardenClient) -> None:
    """The caller sees one list, whatever the page size."""
    for number in range(5):
        client.create(ContainerSpec(handle=f"c{number}", properties={"even": str(number % 2 == 0)}))
    assert [each.handle for each in client.list()] == ["c0", "c1", "c2", "c3", "c4"]
    assert [each.handle for each in client.list({"even": "True"})] == ["c0", "c2", "c4"]


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("/run/x.sock", "unix:/run/x.sock"),
        ("unix:/run/x.sock", "unix:/run/x.sock"),
        ("unix:///run/x.sock", "unix:/run/x.sock"),
        ("cell-7.example:7777", "cell-7.example:7777"),
        ("[::1]:7777", "[::1]:7777"),
    ],
)
def test_addresses_of_every_form_become_targets(given: str, target: str) -> None:
    """The three forms of the documentation, and IPv6."""
    assert resolve_target(given) == target


@pytest.mark.parametrize("given", ["", "host", "host:0", "host:99999", "dns:///x", "unix:relative", "a b:1"])
def test_other_addresses_are_refused(given: str) -> None:
    """GRPC would take many of them for host names and fail much later."""
    with pytest.raises(BadAddress):
        resolve_target(given)


def test_the_address_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """GARDEN_ADDRESS first, then the server's own default."""
    monkeypatch.setenv("GARDEN_ADDRESS", "/run/y.sock")
    assert resolve_target(None) == "unix:/run/y.sock"
    monkeypatch.delenv("GARDEN_ADDRESS")
    assert resolve_target(None) == DEFAULT_ADDRESS


def test_a_certificate_needs_its_key() -> None:
    """Half a pair would fail inside gRPC without a word about which half."""
    with pytest.raises(ValueError, match="both or neither"):
        Tls(Path("ca.pem"), cert=Path("cert.pem"))


def test_delays_grow_and_end() -> None:
    """The sum is bounded, so a caller waits no longer than total_s."""
    assert list(RetryPolicy(0.1, 0.4, 1.2).delays_s()) == pytest.approx([0.1, 0.2, 0.4, 0.4])


def test_what_the_kernel_holds_is_not_retried() -> None:
    """UNKILLABLE comes as UNAVAILABLE, but the server keeps trying by itself."""
    error = Unavailable("held", ErrorDetails(code="UNKILLABLE"))
    with pytest.raises(Unavailable):
        Patience(RetryPolicy()).next_delay_s(error)


def test_patience_comes_back_with_progress_and_with_time() -> None:
    """A process that is quiet for days must survive any number of restarts."""
    now_s = 0.0
    patience = Patience(RetryPolicy(1.0, 1.0, 1.0), lambda: now_s)
    lost = Unavailable("lost")
    assert patience.next_delay_s(lost) == 1.0
    with pytest.raises(Unavailable):
        patience.next_delay_s(lost)
    patience.restore()
    assert patience.next_delay_s(lost) == 1.0
    now_s = 3600.0
    assert patience.next_delay_s(lost) == 1.0


def test_what_a_terminal_would_obey_is_written_out_in_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """They repeat names of files and handles; lines of a message stay lines."""
    report("no file 'a\x1b[2J'\nfield: problem")
    assert capsys.readouterr().err == "garden: no file 'a\\x1b[2J'\nfield: problem\n"
