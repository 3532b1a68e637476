"""External programs that make networks and images of containers in place of the server's own code.

    programs (network.py, image.py)   one call of the protocol: arguments, JSON in, JSON out
      │
    caller.py                         server's side: one program run in a worker, ended when nobody waits any more
      │ job "plugin.run"
    program.py                        worker's side: the process itself

They run as children of a launcher of their own (backend/launcher) that stays in the host's mount namespace: what they
mount is meant to be seen. A program does not outlive the call it was run for, nor the server.

Source: Garden behaviour, statements MP1 to MP4 and N40 to N44.
"""
