"""The `garden` command line; start reading at `main`."""
