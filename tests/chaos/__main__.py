"""The command line of scripts/chaos."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys

from chaos.attacks import ALL
from chaos.run import Settings, run

EPILOG = """\
A seed fixes what is decided: every client's lives with their containers, processes and changes, and the sequence of
attacks with their pauses. It does not fix the timing, so which container an attack meets in which moment differs from
run to run: give a failing seed a few tries. Exit status 1 means that something was found; the log is kept then.
"""


def main() -> int:
    """Parse, check, run."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Attacks a server while clients check its every answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long [1]")
    parser.add_argument("--seed", type=int, default=None, help="what is decided [random, and printed]")
    parser.add_argument("--clients", type=int, default=16, help="at the same time [16]")
    parser.add_argument(
        "--only", metavar="ATTACK,…", help=f"only these attacks, of {', '.join(ALL)}; none: no attack"
    )
    parser.add_argument("--no-attack", metavar="ATTACK,…", default="", help="not these attacks")
    parser.add_argument(
        "--server-every", type=float, default=6.0, help="mean seconds between ends of the server [6]"
    )
    parser.add_argument(
        "--attack-every", type=float, default=1.0, help="mean seconds between other attacks [1]"
    )
    given = parser.parse_args()
    only = set(ALL) if given.only is None else set(filter(None, given.only.replace("none", "").split(",")))
    without = set(filter(None, given.no_attack.split(",")))
    if unknown := (only | without) - set(ALL):
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        parser.error("containers need root")
    seed = random.SystemRandom().randrange(1 << 31) if given.seed is None else given.seed
    settings = Settings(
        given.minutes,
        seed,
        given.clients,
        frozenset(only - without),
        given.server_every,
        given.attack_every,
    )
    return asyncio.run(run(settings))


if __name__ == "__main__":
    sys.exit(main())
