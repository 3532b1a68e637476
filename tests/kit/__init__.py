"""Helpers of the tests: clients, fakes, namespaces."""

import os

# Before any test imports grpc: its fork handlers would start a thread in each child that a test forks in this process,
# and that thread aborts the child when it finds its descriptors closed. The server leaves them out likewise (wiring).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
