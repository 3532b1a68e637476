"""`benchmarks/run`: measure, compare, print. See README.md for what each row means.

Needs tests/ on the module path (the wrapper sees to it): the server is started as in the tests.
"""

from __future__ import annotations

import os

# Before grpc is imported: commands are started with vfork beside its threads, its fork handlers would only warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import argparse
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import agent
import bare_runtime
import copies
import garden
import garden_load
import images
import layers
import lifecycle
import network
import noisy
import processes
import queries
import restart
import streams
from report import Row, format_table, row_to_json
from setting import Setting, open_setting

RESULTS = Path(__file__).parent / "results" / "latest.json"

MEASUREMENTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "lifecycle": lifecycle.measure_lifecycle,
    "run": processes.measure_run,
    "stdout": streams.measure_stdout,
    "stdin": streams.measure_stdin,
    "egress": queries.measure_egress,
    "queries": queries.measure_queries,
    "agent": agent.measure_agent,
    "load": lifecycle.measure_load,
    "restart": restart.measure_restart,
    "images": images.measure_images,
    "garden": garden.measure_garden,
    "garden_load": garden_load.measure_garden_load,
    "unpack": layers.measure_unpack,
    "copies": copies.measure_copies,
    "noisy": noisy.measure_noisy,
    "network": network.measure_network,
}


def main() -> None:
    """Run the chosen measurements; exit status 0 unless one could not be made."""
    options = _parse_options()
    signal.signal(signal.SIGTERM, _on_sigterm)
    facts = _describe_host(options.runtime)
    rows: list[Row] = []
    with open_setting(runtime=options.runtime, rounds=options.rounds) as setting:
        place = setting.cell.server.place
        for name in options.only or MEASUREMENTS:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            rows.extend(MEASUREMENTS[name](setting))
    if left := [str(path) for path in (place, *bare_runtime.cgroups()) if path.exists()]:
        raise SystemExit(f"left on the host: {', '.join(left)}")
    facts["load_average_after"] = os.getloadavg()[0]
    result = {"host": facts, "rounds": options.rounds, "rows": [row_to_json(row) for row in rows]}
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False) if options.output == "json" else _format(facts, rows))


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks/run", description="Measure a garden server beside its peers."
    )
    parser.add_argument("--rounds", type=_positive, default=20, help="samples of each latency (default: 20)")
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS)
    )
    parser.add_argument("--runtime", choices=("runc", "crun"), default="runc", help="runtime of the server")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/latest.json")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _on_sigterm(number: int, frame: object) -> NoReturn:
    """Leave through the contexts, so that nothing stays on the host."""
    raise SystemExit(128 + number)


def _describe_host(runtime: str) -> dict[str, Any]:
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / (1 << 30), 1),
        "python": platform.python_version(),
        "runc": _first_line("runc", "--version"),
        "crun": _first_line("crun", "--version"),
        "server_runtime": runtime,
        "load_average_before": os.getloadavg()[0],
        "crun_note": "crun runs in a mount namespace without the hybrid v2 cgroup hierarchy, as under the server",
    }


def _first_line(*argv: str) -> str:
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.splitlines()[0]


def _format(facts: dict[str, Any], rows: list[Row]) -> str:
    head = (
        f"{facts['date']}: Linux {facts['kernel']}, {facts['cpus']} CPUs, {facts['memory_gib']} GiB, "
        f"Python {facts['python']}, {facts['runc']}, {facts['crun']}; the server uses {facts['server_runtime']}.\n"
        f"Load average {facts['load_average_before']:.2f} before, {facts['load_average_after']:.2f} after. "
        f"{facts['crun_note'].capitalize()}.\n"
    )
    return f"{head}\n{format_table(rows)}"


if __name__ == "__main__":
    main()
