"""Every error of the model has a gRPC status, and its facts are in the details."""

from __future__ import annotations

import inspect
from base64 import b64encode
from urllib.parse import quote

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from garden_py.api.grpc.status import CODES, code_of, status_of
from garden_py.model import errors

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.GardenError) and value is not errors.GardenError
]


def details_of(error: errors.GardenError) -> dict[str, AnyMessage]:
    """The details by the name of their message."""
    status = status_of(error)
    (payload,) = [value for key, value in status.trailing_metadata if key == "grpc-status-details-bin"]
    proto = status_pb2.Status.FromString(payload)
    assert proto.message == str(error)
    return {detail.TypeName().rpartition(".")[2]: detail for detail in proto.details}


def info_of(error: errors.GardenError) -> error_details_pb2.ErrorInfo:
    info = error_details_pb2.ErrorInfo()
    details_of(error)["ErrorInfo"].Unpack(info)
    return info


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_a_code(kind: type[errors.GardenError]) -> None:
    """A new error cannot be forgotten here: it would reach callers as INTERNAL."""
    assert any(parent in CODES for parent in kind.__mro__), f"{kind.__name__} is not in CODES"


def test_stable_codes_are_unique() -> None:
    """Clients tell errors apart by them."""
    codes = [kind.code for kind in CLASSES if kind not in (errors.InvalidField,)]
    assert len(set(codes)) == len(codes)
    assert errors.InvalidField.code == errors.InvalidRequest.code


def test_bad_fields_are_listed() -> None:
    """One violation per field, in order."""
    error = errors.InvalidRequest(
        [errors.FieldViolation("a", "bad"), errors.FieldViolation("b[1].c", "worse")]
    )
    bad = error_details_pb2.BadRequest()
    details_of(error)["BadRequest"].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [("a", "bad"), ("b[1].c", "worse")]
    assert code_of(error) is StatusCode.INVALID_ARGUMENT
    assert info_of(error).reason == "INVALID_REQUEST"


def test_missing_image_is_a_bad_field_with_a_reason_of_its_own() -> None:
    """A subclass keeps its parent's code and details."""
    error = errors.ImageNotFound("spec.image", "does not exist")
    assert code_of(error) is StatusCode.INVALID_ARGUMENT
    assert info_of(error).reason == "IMAGE_NOT_FOUND"
    assert "BadRequest" in details_of(error)


def test_exhausted_pool_is_named_with_size_and_flag() -> None:
    """The operator learns which setting to change."""
    error = errors.PoolExhausted("ports", 50, "--port-pool-size")
    quota = error_details_pb2.QuotaFailure()
    details_of(error)["QuotaFailure"].Unpack(quota)
    assert quota.violations[0].subject == "ports"
    assert dict(info_of(error).metadata) == {"pool": "ports", "size": "50", "flag": "--port-pool-size"}
    assert code_of(error) is StatusCode.RESOURCE_EXHAUSTED


def test_full_subnet_is_an_exhausted_pool_without_a_flag() -> None:
    """The caller has chosen its size."""
    error = errors.SubnetFull("10.80.0.0/30", 1)
    quota = error_details_pb2.QuotaFailure()
    details_of(error)["QuotaFailure"].Unpack(quota)
    assert (quota.violations[0].subject, quota.violations[0].description) == (
        "addresses of 10.80.0.0/30", "size 1",
    )  # fmt: skip
    assert code_of(error) is StatusCode.RESOURCE_EXHAUSTED


def test_offsets_are_in_the_details() -> None:
    """A reader resumes from what it is told."""
    error = errors.OffsetOutOfRange(1, 2, 3)
    assert dict(info_of(error).metadata) == {"offset": "1", "first_offset": "2", "end_offset": "3"}
    assert code_of(error) is StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (errors.ContainerNotFound("box"), "container", "box"),
        (errors.HandleInUse("box"), "container", "box"),
        (errors.ProcessNotFound("box", "p"), "process", "box/p"),
        (errors.ProcessIdInUse("box", "p"), "process", "box/p"),
        (errors.PortInUse(80, "other"), "host port", "80"),
    ],
)
def test_things_found_or_not_are_named(error: errors.GardenError, kind: str, name: str) -> None:
    """ResourceInfo says what was missing or taken."""
    info = error_details_pb2.ResourceInfo()
    details_of(error)["ResourceInfo"].Unpack(info)
    assert (info.resource_type, info.resource_name) == (kind, name)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("no_such_path", StatusCode.NOT_FOUND),
        ("permission_denied", StatusCode.PERMISSION_DENIED),
        ("broken_archive", StatusCode.INVALID_ARGUMENT),
        ("no_space", StatusCode.RESOURCE_EXHAUSTED),
        ("io_error", StatusCode.FAILED_PRECONDITION),
    ],
)
def test_failed_copies_have_the_code_of_their_reason(reason: str, code: StatusCode) -> None:
    """A caller need not read the message."""
    assert code_of(errors.CopyFailed(reason, "x")) is code


def test_unkillable_can_be_retried() -> None:
    """UNAVAILABLE is the code that says: ask again."""
    assert code_of(errors.Unkillable("box", "stuck")) is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("text", ["a" * 9000, "\N{EURO SIGN}" * 9000, "%\n" * 4000])
def test_a_status_is_no_longer_than_clients_take(text: str) -> None:
    """What a program of somebody else's says can be long; the client would say nothing but RESOURCE_EXHAUSTED."""
    for error in (errors.HostFault("running image plugin create", text), errors.Unkillable("box", text)):
        status = status_of(error)
        (payload,) = [value for key, value in status.trailing_metadata if key == "grpc-status-details-bin"]
        assert len(quote(status.details, safe=" ")) + len(b64encode(payload)) < 8000
        assert status.details.endswith("...")
        assert status.details[:-3] == str(error)[: len(status.details) - 3]
