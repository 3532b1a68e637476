"""garden-py: a container server that keeps a small agent alive inside every container.

Reading order for a newcomer, from a call to the kernel:

1. `garden_py.model`: the nouns (handles, specs, rules, errors); no I/O.
2. `garden_py.service`: the verbs; the life of a container reads top to bottom in `service/containers.py`.
3. `garden_py.backend`: the ports of the service made of real files and kernels.
4. `garden_py.wire`: the frames that backend and agent exchange, drawn as a diagram.
5. `garden_py.agent`: PID 1 of each container.
6. `garden_py.api`, `garden_py.cli`: the doors; they decode, call the service and encode.

This module imports nothing: the agent passes through it inside every container, where each import costs
start-up time and memory.
"""
