"""How long tests wait for what has to come, on machines that are slow on purpose."""

from __future__ import annotations

import os

# Limits of waiting are multiplied by it. An emulated machine sets it; what is asserted stays the same.
FACTOR = float(os.environ.get("GARDEN_TEST_PATIENCE", "1"))
