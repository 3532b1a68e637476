"""The launcher: the one part that forks and runs external commands.

A process that has loaded grpc must not fork (its threads and locks do not survive it), so the server starts this small
process first and talks to it over socket pairs in the frames of `garden_py.wire`:

    server                      launcher (main.py)                worker (worker.py), several
      │  "worker" ──────────────────>│ fork ───────────────────────>│
      │<───────────── one end of a socket pair                      │
      │  job + descriptors ────────────────────────────────────────>│ mounts, runc through sh, links, nft
      │<──────────────────────────────────────────── result or error│

It lives in a mount namespace of its own: root file systems are mounted there, handed to the runtime, and detached
again as soon as the container has its copy. The host's mount table never changes, and whatever is left half-done
disappears with the launcher. One job at a time per worker, so no job ever forks beside another thread.
"""

MODULE = "garden_py.backend.launcher.main"
