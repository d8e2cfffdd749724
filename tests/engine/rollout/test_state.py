"""Rollout state: slots without a sequence, which are part of a captured step, change nothing."""

import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout.state import ActiveSlots, RolloutState
from rlhf_engine.rollout.stopping import EOS, LENGTH


def make():
    config = RolloutConfig(max_prompt_tokens=4, max_response_tokens=2, batch_size=3)
    ends = torch.tensor([2, 7])
    state = RolloutState(2, 4, 6, config, eos_token_ids=ends, pad_token_id=0, stop_token_id=None, stops=None)
    state.begin([torch.tensor([5]), torch.tensor([6, 5])], torch.tensor([10, 11]))
    active = ActiveSlots.of(4, 2, ends.device)
    active.keep(0)
    active.row[0], active.position[0], active.count = 1, 1, 1
    return state, active


def act(state, active, ids):
    numbers = torch.arange(4.0) + 1
    state.append(torch.tensor(ids), numbers, numbers, numbers, active, slice(0, 4))
    return state.count_ended(active, 0)


def test_rows_without_a_sequence_never_end_or_advance():
    state, active = make()
    assert act(state, active, [5, 7, 7, 7]) == 0
    assert active.position.tolist() == [2, 0, 0, 0] and active.step.tolist() == [1, 0, 0, 0]
    assert act(state, active, [7, 7, 5, 5]) == 1 and state.finished.tolist() == [True, False, False, False]
    assert state.ids[:2].tolist() == [[0, 0], [5, 7]] and state.lengths[:2].tolist() == [0, 2]
    assert state.stop_reason[:2].tolist() == [LENGTH, EOS]


def test_steps_inside_idle_change_nothing():
    state, active = make()
    with active.idle():
        assert act(state, active, [7, 7, 7, 7]) == 0 and active.row.tolist() == [2] * 4
    assert active.row.tolist() == [1, 2, 2, 2] and active.position.tolist() == [1, 0, 0, 0] and active.count == 1
    assert not state.ids[:2].any() and not state.lengths[:2].any()


def test_a_rollout_is_a_copy():
    state, active = make()
    act(state, active, [5, 0, 0, 0])
    act(state, active, [6, 0, 0, 0])  # the response has the width of the state, so a slice of its rows is contiguous
    rollout = state.rollout()
    before = rollout.logprobs.clone()
    state.begin([torch.tensor([5]), torch.tensor([6, 5])], torch.tensor([12, 13]))
    assert torch.equal(rollout.logprobs, before) and rollout.response_ids.tolist() == [[0, 0], [5, 6]]
