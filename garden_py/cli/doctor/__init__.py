"""`garden doctor`: what this host can do for containers, found out by trying it.

Each check is a function that returns a Finding; `command` runs them all and prints. Nothing on the host is
changed: trials run in a forked child with namespaces of its own (`trial`), which take everything away when it
ends.
"""
