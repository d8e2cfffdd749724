"""The switch for kernels that no device has timed."""

import pytest

from rlhf_kernels._options import ACTIVE_TRIALS
from rlhf_kernels.trials import TRIALS, trial


def test_a_trial_is_on_inside_its_context_only():
    name = next(iter(TRIALS))
    assert not ACTIVE_TRIALS
    with pytest.raises(RuntimeError), trial(name):
        with trial():
            assert name in ACTIVE_TRIALS
        raise RuntimeError
    assert not ACTIVE_TRIALS


def test_an_unknown_trial_is_refused():
    with pytest.raises(ValueError, match=r"trial: got faster, expected some of \w+"), trial("faster"):
        pass
