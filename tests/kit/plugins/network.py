"""A network plugin: a veth pair between a container and a network namespace of the test's.

Settings: `router`, a process that is in that namespace.
"""

import argparse
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
from program import PLACE, SETTINGS, begin, finish

NUMBERS = PLACE / "numbers"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--action", required=True)
    parser.add_argument("--handle", required=True)
    given = parser.parse_args()
    asked = json.load(sys.stdin)
    extra = begin(given.action, handle=given.handle, asked=asked)
    ACTIONS[given.action](given.handle, asked, extra)
    finish()


def up(handle, asked, extra):
    NUMBERS.mkdir(exist_ok=True)
    number = next(n for n in range(2, 250) if not (NUMBERS / str(n)).exists())
    (NUMBERS / str(number)).write_text(handle)
    address, pid, router = f"10.77.0.{number}", str(asked["Pid"]), SETTINGS["router"]
    host_end = f"p{number}"
    inside(router, "link", "add", host_end, "type", "veth", "peer", "name", "eth7", "netns", pid)
    inside(router, "link", "set", host_end, "up")
    inside(router, "route", "add", f"{address}/32", "dev", host_end)
    inside(pid, "addr", "add", f"{address}/32", "dev", "eth7")
    inside(pid, "link", "set", "eth7", "up")
    inside(pid, "route", "add", "10.77.0.1/32", "dev", "eth7")
    inside(pid, "route", "add", "default", "via", "10.77.0.1", "dev", "eth7")
    ports = [
        {"HostPort": p["host_port"] or 9000 + number, "ContainerPort": p["container_port"]}
        for p in asked["netin"]
    ]
    properties = {
        "garden.network.container-ip": address,
        "garden.network.host-ip": "10.77.0.1",
        "garden.network.interface": "eth7",
        "garden.network.mapped-ports": json.dumps(ports),
        "plugin.color": "green",
    }
    told = {
        "Properties": properties,
        "dns_servers": ["10.77.0.1"],
        "search_domains": ["apps.internal", "example.org"],
    }
    print(json.dumps({**told, **extra}))


def down(handle, asked, extra):
    for path in NUMBERS.iterdir() if NUMBERS.exists() else ():
        if path.read_text() == handle:
            inside(SETTINGS["router"], "link", "del", f"p{path.name}", check=False)
            path.unlink()


def net_in(handle, asked, extra):
    told = {"host_port": asked["HostPort"] or 9999, "container_port": asked["ContainerPort"] or 9999}
    print(json.dumps({**told, **extra}))


def net_out(handle, asked, extra):
    """Noted, and nothing else."""


def inside(pid, *words: str, check=True):
    argv = ["nsenter", "-t", pid, "-n", "ip", *words]
    subprocess.run(argv, check=check, timeout=60, stderr=None if check else subprocess.DEVNULL)


ACTIONS = {"up": up, "down": down, "net-in": net_in, "net-out": net_out, "bulk-net-out": net_out}
main()
