"""What strangers can send: every input that fuzzing has kept, and some that chance makes (scripts/fuzz has more)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.seeds import SEEDS, WORDS
from fuzz.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(name: str) -> None:
    """Those that reached something new, and those that once failed."""
    for data in (*SEEDS[name], *(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))):
        TARGETS[name].check(data)


def test_corpus_is_small() -> None:
    """It is read by every run, and by people."""
    sizes = [path.stat().st_size for path in CORPUS.glob("*/*")]
    assert max(sizes) <= 1500
    assert sum(sizes) < 200_000


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_words_in_any_order(name: str, data: st.DataObject) -> None:
    """Pieces of what is well-formed, in an order that is not."""
    pieces = st.sampled_from((*WORDS[name], *SEEDS[name])) | st.binary(max_size=8)
    TARGETS[name].check(b"".join(data.draw(st.lists(pieces, max_size=12))))
