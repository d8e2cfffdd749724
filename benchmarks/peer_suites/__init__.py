"""The unit tests that other projects ship, run with our functions in place of theirs.

`suites.toml` is the table of suites, `plugin` the pytest plugin that swaps functions, `swaps` the functions for peers without
an adapter, `__main__` the command. No file of a peer is copied: source distributions are downloaded when the command runs,
and suites that no distribution contains are read from a checkout of the peer's repository.
"""
