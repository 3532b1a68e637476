"""Fuzzing what strangers can send: requests, control messages, agents' frames, layers. See `scripts/fuzz --help`.

`targets` says what must hold for any bytes, `seeds` where to begin, `grower` changes inputs and keeps those that reach
something new, `__main__` does so for a while. What is kept lies in tests/corpus, and every run of the tests tries it.
"""
