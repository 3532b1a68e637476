"""Chaos: many clients whose every answer is checked, while the server and its containers are attacked.

`python -m chaos` with `tests/` on the path; scripts/chaos does that. Reading order: `plan` (what a seed decides, pure),
`board` (what everybody knows), `patience` (which error is nobody's fault), `work` (processes and what they must say),
`life` (one container from its create to its end), `attacks` (what is done to it), `cell` (server and disk), `run`.
"""
