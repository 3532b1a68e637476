"""Control groups of containers, v1 and v2: where they are, what limits mean there, what they report."""
