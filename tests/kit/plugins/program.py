"""What the test plugins share; copied beside them."""

import json
import os
import sys
import time
from pathlib import Path

PLACE = Path(sys.argv[0]).resolve().parent
SETTINGS = json.loads((PLACE / "settings.json").read_text())


def begin(action, **facts: object):
    """Note a call and obey what was ordered; what is to be merged into the answer."""
    running = PLACE / "running" / str(os.getpid())
    running.touch()
    line = json.dumps({"action": action, "argv": sys.argv[1:], **facts}) + "\n"
    with (PLACE / "calls.jsonl").open("a") as log:
        log.write(line)
    order = PLACE / "orders" / action
    what = order.read_text() if order.exists() else ""
    if what == "hang":
        time.sleep(600)
    if what == "fail":
        print("said on stdout")
        print("a line of the log\nsaid on stderr", file=sys.stderr)
        finish(1)
    if what == "flood":
        while True:
            os.write(1, b"x" * 65536)
    if what == "garbage":
        print("{ this is not JSON")
        finish(0)
    return json.loads(what) if what.startswith("{") else {}


def finish(status=0):
    """End the call."""
    (PLACE / "running" / str(os.getpid())).unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(status)
