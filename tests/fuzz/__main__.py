"""`scripts/fuzz`: fuzz for a while; exit status 1 if anything failed."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from fuzz.grower import Grower, Reach
from fuzz.seeds import SEEDS, WORDS
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[1] / "corpus"


def main() -> int:
    """Fuzz each chosen target for its share of the time."""
    options = _parse_options()
    failed = 0
    for name in options.only or TARGETS:
        failed += _fuzz(name, options.minutes * 60 / len(options.only or TARGETS), options.seed)
    return 1 if failed else 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "scripts/fuzz",
        description="Change inputs that strangers can send. Those that reach a line no other has reached are kept in "
        "tests/corpus, which every run of the tests tries; so are those that fail, as failed-…: keep one when "
        "what it found is mended. Needs neither root nor a server.",
    )
    parser.add_argument("--minutes", type=float, default=10, help="all targets together (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of chance; the same one tries the same inputs"
    )
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    return parser.parse_args()


def _fuzz(name: str, seconds: float, seed: int | None) -> int:
    place = CORPUS / name
    place.mkdir(parents=True, exist_ok=True)
    seed = random.randrange(1 << 32) if seed is None else seed
    grower = Grower(Reach(TARGETS[name]), WORDS[name], place, random.Random(seed))
    for data in (*SEEDS[name], *(path.read_bytes() for path in sorted(place.iterdir()))):
        grower.offer(data, keep=True)
    begun, end = len(grower.corpus), time.monotonic() + seconds
    while time.monotonic() < end:
        grower.step()
    print(
        f"{name}: seed {seed}, {grower.tried} inputs, {len(grower.known)} lines reached, "
        f"{len(grower.corpus) - begun} inputs new in the corpus, {len(grower.failures)} failures",
        flush=True,
    )
    return len(grower.failures)


if __name__ == "__main__":
    raise SystemExit(main())
