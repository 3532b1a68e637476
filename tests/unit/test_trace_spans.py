"""Operations as OpenTelemetry traces, in front of a collector on loopback."""

from __future__ import annotations

import socket
import sys

import pytest
from kit.collector import attributes_of, running_collector

from garden_py.model.errors import InvalidField
from garden_py.observe.calls import begin_call
from garden_py.observe.steps import CREATE, Step, operation, step, taken_elsewhere
from garden_py.observe.traces import collector_url, open_tracing


def test_one_operation_is_one_trace_with_its_steps() -> None:
    with running_collector() as collector:
        tracing = open_tracing(collector.endpoint, version="1.2", instance="3fa1")
        assert tracing is not None
        begin_call("ticket-17")
        for handle in ("web", "db"):
            with operation(CREATE, handle, [tracing.operation_ended]):
                with step(Step.LEASE):
                    pass
                taken_elsewhere(Step.RUNTIME, 10**18, 5)
        tracing.close()
    assert collector.path == "/v1/traces"
    assert collector.resource["service.name"] == "garden"
    assert collector.resource["service.instance.id"] == "3fa1"
    first, second = collector.traces("create")
    assert first[0].trace_id != second[0].trace_id
    assert attributes_of(first[0]) == {"garden.handle": "web", "garden.request_id": "ticket-17"}
    assert {span.name for span in first[1:]} == {"lease", "runtime"}
    (runtime,) = [span for span in first if span.name == "runtime"]
    assert (runtime.start_time_unix_nano, runtime.end_time_unix_nano) == (10**18, 10**18 + 5)


def test_failures_are_marked() -> None:
    def fail() -> None:
        assert tracing is not None
        with operation(CREATE, "web", [tracing.operation_ended]), step(Step.NETWORK):
            raise OSError("secret words")

    with running_collector() as collector:
        tracing = open_tracing(collector.endpoint, version="1", instance="x")
        with pytest.raises(OSError, match="secret"):
            fail()
        assert tracing is not None
        tracing.close()
    (trace,) = collector.traces("create")
    assert [(span.status.code, span.status.message) for span in trace] == [(2, "OSError")] * 2


def test_a_caller_finds_its_create_in_its_own_trace() -> None:
    """W3C Trace Context §3.2; what is no such header begins a trace, and what is not to be sampled is not sent."""
    theirs, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with running_collector() as collector:
        tracing = open_tracing(collector.endpoint, version="1", instance="x")
        assert tracing is not None
        for handle, sent in (
            ("in", {"traceparent": f"00-{theirs}-{parent}-01", "tracestate": "vendor=1"}),
            ("unsampled", {"traceparent": f"00-{theirs}-{parent}-00"}),
            ("alone", {"traceparent": "nonsense"}),
            ("alone too", {}),
        ):
            begin_call("", handle, sent)
            with operation(CREATE, handle, [tracing.operation_ended]), step(Step.LEASE):
                pass
        tracing.close()
    found = {attributes_of(span)["garden.handle"]: span for span in collector.spans if span.name == "create"}
    assert set(found) == {"in", "alone", "alone too"}
    assert (found["in"].trace_id.hex(), found["in"].parent_span_id.hex()) == (theirs, parent)
    assert found["in"].trace_state == "vendor=1"
    (lease,) = [span for span in collector.spans if span.parent_span_id == found["in"].span_id]
    assert lease.trace_id.hex() == theirs
    assert not found["alone"].parent_span_id
    assert found["alone"].trace_id != found["alone too"].trace_id


def test_a_collector_that_is_not_there_harms_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        tracing = open_tracing(f"http://127.0.0.1:{sock.getsockname()[1]}", version="1", instance="x")
        assert tracing is not None
        with operation(CREATE, "web", [tracing.operation_ended]):
            pass
        tracing.close()


def test_off_unless_asked_for() -> None:
    assert open_tracing("", version="1", instance="x") is None


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://otel.example/in/garden", "https://otel.example/in/garden"),
    ],
)
def test_endpoints(endpoint: str, url: str) -> None:
    assert collector_url(endpoint) == url


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://h:1", "http://", "nonsense"])
def test_bad_endpoints_are_named(endpoint: str) -> None:
    with pytest.raises(InvalidField, match="otel_endpoint") as caught:
        open_tracing(endpoint, version="1", instance="x")
    assert endpoint in str(caught.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidField, match=r"pip install 'garden-py\[otel\]'"):
        open_tracing("http://127.0.0.1:4318", version="1", instance="x")
