"""The block of memory that holds chunks of logits."""

import threading

import pytest
import torch

from rlhf_kernels import head_workspace_bytes, lend_workspace, linear_ppo_loss, release_workspace
from rlhf_kernels._native import WORKSPACE

from .helpers.heads import make


def test_a_block_is_kept_grown_and_released():
    release_workspace()
    cpu = torch.device("cpu")
    first = WORKSPACE.take((16, 10), torch.float32, cpu).data_ptr()
    assert WORKSPACE.take((8, 10), torch.bfloat16, cpu).data_ptr() == first
    assert WORKSPACE.take((64, 100), torch.float32, cpu).shape == (64, 100)
    assert WORKSPACE._block.numel() == 64 * 100 * 4
    release_workspace()
    assert WORKSPACE._block is None


def test_the_previous_content_of_the_block_has_no_effect():
    leaves, constants, _ = make(0)
    hidden, weight = leaves["hidden"], leaves["weight"]
    release_workspace()
    expected = linear_ppo_loss(hidden, weight, **constants).loss
    WORKSPACE._block.fill_(255)  # NaN in every dtype
    assert torch.equal(linear_ppo_loss(hidden, weight, **constants).loss, expected)


def test_a_lent_block_is_used_and_then_released():
    leaves, constants, _ = make(0)
    hidden, weight = leaves["hidden"], leaves["weight"]
    release_workspace()
    expected = linear_ppo_loss(hidden, weight, **constants).loss
    size = head_workspace_bytes(len(weight), weight.dtype, tokens=constants["mask"].numel())
    block = torch.full((size + 64,), 255, dtype=torch.uint8)
    with lend_workspace(block[:size]):
        assert WORKSPACE._block is None
        assert torch.equal(linear_ppo_loss(hidden, weight, **constants).loss, expected)
        assert WORKSPACE._block is None
    assert not (block[:size] == 255).all() and (block[size:] == 255).all()
    with (
        lend_workspace(block[: size // 2 // 64 * 64]),
        pytest.raises(ValueError, match="bytes, expected at least"),
    ):
        linear_ppo_loss(hidden, weight, **constants)
    linear_ppo_loss(hidden, weight, **constants)
    assert WORKSPACE._block is not None and WORKSPACE._lent is None


def test_head_workspace_bytes_depend_on_shapes_only():
    """The CPU holds 512 rows of float32 logits or 2048 of bfloat16, 256 without a gradient, and at least 16."""
    assert head_workspace_bytes(1000, torch.float32) == 512 * 1000 * 4
    assert head_workspace_bytes(1000, torch.float32, tokens=100) == 100 * 1000 * 4
    assert head_workspace_bytes(1000, torch.float32, tokens=3) == 16 * 1000 * 4
    assert head_workspace_bytes(1000, torch.bfloat16) == 2048 * 1000 * 2
    assert head_workspace_bytes(1000, torch.bfloat16, gradient=False) == 256 * 1000 * 2
    assert head_workspace_bytes(1000, torch.bfloat16, chunk_tokens=128) == 128 * 1000 * 2
    with pytest.raises(ValueError, match="backend: got 'reference'"):
        head_workspace_bytes(1000, torch.float32, backend="reference")


@pytest.mark.parametrize("block", [torch.zeros(64), torch.zeros(2, 64).byte(), torch.zeros(128).byte()[1:]], ids=str)
def test_a_block_that_cannot_be_lent_is_refused(block):
    with pytest.raises(ValueError, match=r"^block: got"), lend_workspace(block):
        pass


def test_threads_do_not_share_the_block():
    WORKSPACE.take((16, 10), torch.float32, torch.device("cpu"))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(WORKSPACE._block))
    thread.start()
    thread.join()
    assert seen == [None]
