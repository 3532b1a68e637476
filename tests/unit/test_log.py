"""What the server writes into its log, and what it never does."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
from garden_py.observe.log import configure_logging
configure_logging("info", "text")
import structlog, sys

def fail(environment):
    raise ValueError("it failed")

try:
    fail({"PASSWORD": "s3cret"})
except ValueError:
    structlog.get_logger().exception("rpc.failed")
print("rich" in sys.modules)
"""


def test_traceback_in_a_text_log_tells_no_values() -> None:
    """Rich draws them with all local variables, among them environments and input."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert "ValueError" in done.stderr
    assert "it failed" in done.stderr
    assert "s3cret" not in done.stderr
    assert done.stdout == "False\n"
