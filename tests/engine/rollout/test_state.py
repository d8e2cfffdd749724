"""The books of a rollout: slots without a sequence, which a graph's step covers too, are in nobody's way."""

import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout.state import ActiveSlots, RolloutState
from rlhf_engine.rollout.stopping import EOS, LENGTH


def make():
    config = RolloutConfig(max_prompt_tokens=4, max_response_tokens=2, batch_size=3)
    ends = torch.tensor([2, 7])
    record = RolloutState(2, 4, 6, config, eos_token_ids=ends, pad_token_id=0, stop_token_id=None, stops=None)
    record.begin([torch.tensor([5]), torch.tensor([6, 5])], torch.tensor([10, 11]))
    running = ActiveSlots.of(4, 2, ends.device)
    running.keep(0)
    running.row[0], running.position[0], running.count = 1, 1, 1
    return record, running


def said(record, running, ids):
    numbers = torch.arange(4.0) + 1
    record.note(torch.tensor(ids), numbers, numbers, numbers, running, slice(0, 4))
    return record.count_ended(running, 0)


def test_rows_without_a_sequence_neither_end_nor_move():
    record, running = make()
    assert said(record, running, [5, 7, 7, 7]) == 0
    assert running.position.tolist() == [2, 0, 0, 0] and running.step.tolist() == [1, 0, 0, 0]
    assert said(record, running, [7, 7, 5, 5]) == 1 and record.finished.tolist() == [True, False, False, False]
    assert record.ids[:2].tolist() == [[0, 0], [5, 7]] and record.lengths[:2].tolist() == [0, 2]
    assert record.stop_reason[:2].tolist() == [LENGTH, EOS]


def test_what_is_done_while_idle_does_not_count():
    record, running = make()
    with running.idle():
        assert said(record, running, [7, 7, 7, 7]) == 0 and running.row.tolist() == [2] * 4
    assert running.row.tolist() == [1, 2, 2, 2] and running.position.tolist() == [1, 0, 0, 0] and running.count == 1
    assert not record.ids[:2].any() and not record.lengths[:2].any()


def test_a_rollout_is_a_copy():
    record, running = make()
    said(record, running, [5, 0, 0, 0])
    said(record, running, [6, 0, 0, 0])  # as wide as the books, whose rows are then one piece
    rollout = record.rollout()
    before = rollout.logprobs.clone()
    record.begin([torch.tensor([5]), torch.tensor([6, 5])], torch.tensor([12, 13]))
    assert torch.equal(rollout.logprobs, before) and rollout.response_ids.tolist() == [[0, 0], [5, 6]]
