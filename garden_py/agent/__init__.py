"""The agent: PID 1 of every container, and the only process the server talks to inside it.

Start reading at `main`, which prepares the process and hands over to `loop`. `requests` maps each message of
`garden_py.wire` to its handler; `spawn` is the parent's side of starting a process and `child` what happens
between fork and exec; `reap` is the only place that waits for children.

Rules of this package: it imports C modules, itself and `garden_py.wire`, nothing else, because its start-up
time and memory are paid once per container. PID 1 never blocks and never touches the container's file system
after start; whatever may hang (an image's /etc/passwd, a working directory) is done in the forked child.
"""
