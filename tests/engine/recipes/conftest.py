"""Fixtures of the recipes' tests."""

import signal

import pytest

from tests.engine.helpers.cli_run import new_model


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Handle the signals that a background job ignores from its start; under `nohup` a run ignores them too."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the folder of a tiny model, which the tests of a module share."""
    return new_model(tmp_path_factory.mktemp("base"))
