"""Notices: one line per event that a user should know of and that is no error, such as a column that is ignored.

They are warnings of the logger `rlhf_engine`. The command line prints them on stderr.
"""

from __future__ import annotations

import logging
import sys

_LOGGER = logging.getLogger("rlhf_engine")


def notice(*lines: str) -> None:
    """Log each line as a warning."""
    for line in lines:
        _LOGGER.warning(line)


def print_notices(prefix: str) -> None:
    """Print later notices on the current stderr, each after `prefix`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    _LOGGER.handlers = [handler]
