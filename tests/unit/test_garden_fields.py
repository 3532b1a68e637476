"""JSON bodies are read as Go reads them, and what does not fit is told with its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from garden_py.api.http.fields import UINT64_MAX, BadJson, parse_object, parse_value


def test_keys_match_in_any_case_and_unknown_ones_are_ignored() -> None:
    """Statement 15 of the protocol's §1.2."""
    fields = parse_object(b'{"HANDLE": "a", "Grace_Time": 5, "what": [1]}')
    assert (fields.text("handle"), fields.number("grace_time")) == ("a", 5)


def test_missing_and_null_are_zero() -> None:
    """And tell themselves from a zero that was said, where that matters."""
    fields = parse_object(b'{"a": null, "zero": 0}')
    assert (fields.text("a"), fields.number("a"), fields.flag("a"), fields.texts("a")) == ("", 0, False, ())
    assert (fields.optional_number("a"), fields.optional_number("zero")) == (None, 0)
    assert (fields.has("a"), fields.has("zero")) == (False, True)
    assert fields.child("b").child("c").number("d") == 0


@pytest.mark.parametrize("body", [b'{"a": 1} trailing', b' \n{"a": 1}{"a": 2}', b'{"a": 1}\n'])
def test_only_the_first_value_counts(body: bytes) -> None:
    """Statement 15."""
    assert parse_object(body).number("a") == 1


def test_integers_do_not_go_through_a_float() -> None:
    """Statement 16: 2^64-1 arrives as it is, and 2^64 is refused."""
    assert parse_object(b'{"n": %d}' % UINT64_MAX).number("n") == UINT64_MAX
    with pytest.raises(BadJson, match=r"limits\.n: 18446744073709551616 is not within"):
        parse_object(b'{"limits": {"n": 18446744073709551616}}').child("limits").number("n")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "EOF"),
        (b"   ", "EOF"),
        (b"{", "invalid JSON"),
        (b"nonsense", "invalid JSON"),
        (b"[]", "the body: cannot take an array for an object"),
        (b'{"a": NaN}', "NaN is no JSON value"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid JSON"),
    ],
)
def test_what_is_no_object_is_refused(body: bytes, problem: str) -> None:
    """Statement 26; nesting and numbers without end included."""
    with pytest.raises(BadJson, match=problem):
        parse_object(body)


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda f: f.text("number"), "number: cannot take a number for a string"),
        (lambda f: f.number("text"), "text: cannot take a string for an integer"),
        (lambda f: f.number("fraction"), "fraction: cannot take a number with a fraction for an integer"),
        (lambda f: f.number("flag"), "flag: cannot take a boolean for an integer"),
        (lambda f: f.flag("number"), "number: cannot take a number for a boolean"),
        (lambda f: f.child("list"), "list: cannot take an array for an object"),
        (lambda f: f.texts("text"), "text: cannot take a string for an array"),
        (lambda f: f.texts("list"), r"list\[0\]: cannot take a number for a string"),
        (lambda f: f.text_map("object"), r"object\.k: cannot take a number for a string"),
        (lambda f: f.number("number", most=3), "number: 4 is not within 0 to 3"),
        (lambda f: f.number("negative"), "negative: -1 is not within 0"),
    ],
)
def test_wrong_types_are_told_with_their_place(read, problem: str) -> None:
    """Each is an error, never a guess."""
    body = b'{"number": 4, "negative": -1, "text": "t", "fraction": 1.0, "flag": true, "list": [1], "object": {"k": 1}}'
    with pytest.raises(BadJson, match=problem):
        read(parse_object(body))


@given(st.binary(max_size=200))
def test_no_body_makes_it_fail_otherwise(body: bytes) -> None:
    """Whatever comes, it is a value or a BadJson."""
    try:
        parse_value(body)
    except BadJson:
        return


def test_half_a_surrogate_pair_is_a_replacement_character() -> None:
    """As Go decodes it: such a text has no UTF-8, and no answer over gRPC could hold it. Whole pairs stay."""
    fields = parse_object(rb'{"a": "x\ud800", "b": ["\udfff", "\ud83d\ude00"], "c": {"\udc00k": "\ud800"}}')
    assert (fields.text("a"), fields.texts("b")) == ("x\N{REPLACEMENT CHARACTER}", ("\ufffd", "\U0001f600"))
    assert fields.text_map("c") == {"\ufffdk": "\ufffd"}
