"""The block that chunks of logits are made in."""

import threading

import torch

from rlhf_kernels import linear_ppo_loss, release_workspace
from rlhf_kernels.workspace import WORKSPACE

from .heads import make


def test_a_block_is_kept_grown_and_released():
    release_workspace()
    cpu = torch.device("cpu")
    first = WORKSPACE.take((16, 10), torch.float32, cpu).data_ptr()
    assert WORKSPACE.take((8, 10), torch.bfloat16, cpu).data_ptr() == first
    assert WORKSPACE.take((64, 100), torch.float32, cpu).shape == (64, 100)
    assert WORKSPACE._block.numel() == 64 * 100 * 4
    release_workspace()
    assert WORKSPACE._block is None


def test_what_lay_in_the_block_does_not_matter():
    leaves, constants, _ = make(0)
    hidden, weight = leaves["hidden"], leaves["weight"]
    release_workspace()
    expected = linear_ppo_loss(hidden, weight, **constants).loss
    WORKSPACE._block.fill_(255)  # NaN in every dtype
    assert torch.equal(linear_ppo_loss(hidden, weight, **constants).loss, expected)


def test_threads_do_not_share_it():
    WORKSPACE.take((16, 10), torch.float32, torch.device("cpu"))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(WORKSPACE._block))
    thread.start()
    thread.join()
    assert seen == [None]
