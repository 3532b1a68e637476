"""The ledger: what the journal says exists, compared with what is on the host, both ways.

One module per kind of resource, each with the same three parts: `look` reads the host and says what it saw, `judge`
is pure and says what of it is claimed by nobody or lacks, and `remove` takes an orphan away. `book.py` is what the
journal claims; `compare.py` puts the judgements together. Which rows are believed, and when, is the service's affair
(service/janitor.py).
"""
