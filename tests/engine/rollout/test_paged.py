"""Sampling with pages: the tokens of slots and of an uncached loop for any pool size, and pages that are shared."""

import weakref

import pytest
import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout import Generator
from rlhf_engine.rollout.decode.paged import PagedDecoder, pages_within, pool_shape
from rlhf_engine.rollout.decode.slots import SlotDecoder
from rlhf_kernels import sample_tokens
from tests.engine.helpers.paged_sampling import SETTINGS, check_same, dirty, make_generator
from tests.engine.helpers.passes import hidden_of, logits_of
from tests.engine.helpers.recorded_graphs import RecordedCuda
from tests.engine.helpers.sampling import ENDS, make_actor, make_prompts, same_sequence
from tests.engine.helpers.tiny_models import FAMILIES, VOCABULARY


@pytest.mark.parametrize("family", FAMILIES)
def test_paged_sampling_equals_slot_sampling(family):
    actor, prompts = make_actor(family), make_prompts(20)
    slots = make_generator(actor, cache="slots").generate(prompts, torch.arange(20))
    generator = make_generator(actor)
    check_same(generator.generate(prompts, torch.arange(20)), slots)
    assert actor.model.config.get_text_config()._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "qwen2"])
def test_paged_sampling_equals_an_uncached_loop(family):
    """The loop runs one sequence at a time, and the trunk reads the whole sequence for every token."""
    actor, prompts = make_actor(family), make_prompts(5, seed=2)
    rollout = make_generator(actor, max_response_tokens=8).generate(prompts, torch.arange(5))
    for row, prompt in enumerate(prompts):
        ids = prompt.tolist()
        with torch.no_grad():
            for step in range(8):
                logits = logits_of(actor, hidden_of(actor, torch.tensor([ids]))[:, -1])
                drawn = sample_tokens(logits, seed=3, sequence=torch.tensor([row]), position=torch.tensor([step]))
                ids.append(int(drawn.ids))
                torch.testing.assert_close(rollout.logprobs[row, step : step + 1], drawn.logprobs, rtol=0, atol=1e-5)
                if ids[-1] in ENDS:
                    break
        n = int(rollout.response_lengths[row])
        assert rollout.response_ids[row, :n].tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_small_pool_preempts_and_regenerates_sequences(family):
    """8 pages of 4 tokens hold one sequence of 32. The results have the same bits as with pages for all sequences."""
    actor, prompts = make_actor(family), make_prompts(20)
    whole = make_generator(actor).generate(prompts, torch.arange(20))
    ended = []
    for pages in (8, 13):
        generator = make_generator(actor, pages=pages)
        rollout = generator.generate(prompts, torch.arange(20), ended.append)
        assert all(same_sequence(whole, i, rollout, i) for i in range(20))
        assert not rollout.response_ids.masked_fill(rollout.mask, 0).any()
        assert not rollout.logprobs.masked_fill(rollout.mask, 0).any()
        assert sum(ended) == 20
        ended.clear()
    assert generator.metrics()["restarted_sequences"] > 0


def test_a_preempted_response_does_not_count_for_the_repetition_penalty():
    """The penalty applies to the ids of the prompt and the new response, not to those of the preempted response."""
    actor, prompts, settings = (
        make_actor(),
        make_prompts(10, longest=3),
        {"repetition_penalty": 2.0, "ends": (VOCABULARY,)},
    )
    whole = make_generator(actor, **settings).generate(prompts, torch.arange(10))
    generator = make_generator(actor, **settings, pages=10)
    rollout = generator.generate(prompts, torch.arange(10))
    assert generator.metrics()["restarted_sequences"] > 0
    assert all(same_sequence(whole, i, rollout, i) for i in range(10))


def test_a_sequence_does_not_depend_on_its_batch():
    generator, prompts = make_generator(make_actor()), make_prompts(24)
    whole = generator.generate(prompts, torch.arange(24))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = generator.generate([prompts[i] for i in order], order)
    assert all(same_sequence(whole, int(i), shuffled, j) for j, i in enumerate(order))
    single = generator.generate([prompts[5]], torch.tensor([5]))
    assert same_sequence(whole, 5, single, 0)


def test_samples_of_one_prompt_share_its_pages():
    """Two prompts of 10 and 11 tokens, 5 samples each: 3 pages of 4 tokens each. All samples but one copy the last page."""
    actor, prompts = make_actor(), [torch.arange(3, 13)] * 5 + [torch.arange(4, 15)] * 5
    decoder = PagedDecoder(actor, 10, 32, page_size=4)
    decoder.open(10, dirty)
    with torch.no_grad():
        decoder.want = ("hidden",)
        hidden = decoder.prefill(prompts, 0).hidden
        assert decoder.sequences.pages.free == decoder.page_count - 6
        assert torch.equal(decoder.table[0, :3], decoder.table[4, :3])
        expected = torch.cat([hidden_of(actor, prompt[None])[0, -1:] for prompt in prompts])
        torch.testing.assert_close(hidden[:10], expected, rtol=1e-4, atol=1e-4)
        tokens = torch.arange(20, 20 + decoder.slots)
        positions = torch.tensor([len(prompt) for prompt in prompts] + [0] * decoder.slots)[: decoder.slots]
        decoded = decoder.decode(tokens, positions, 10).hidden
        assert decoder.sequences.pages.free == decoder.page_count - 6 - 8
        for row, prompt in enumerate(prompts):
            whole = hidden_of(actor, torch.cat([prompt, tokens[row : row + 1]])[None])[0, -1]
            torch.testing.assert_close(decoded[row], whole, rtol=1e-4, atol=1e-4)
    slots = make_generator(actor, cache="slots").generate(prompts, torch.arange(10))
    check_same(make_generator(actor, pages=14).generate(prompts, torch.arange(10)), slots)


def test_the_pool_is_allocated_once_and_freed():
    actor, taken = make_actor(), []

    def allocate(shape, dtype, device):
        tensor = dirty(shape, dtype, device)
        taken.append((shape, dtype, weakref.ref(tensor)))
        return tensor

    generator = make_generator(actor, pages=20, allocate=allocate)
    taken.clear()
    generator.generate(make_prompts(9), torch.arange(9))
    ((shape, dtype, memory),) = taken
    assert shape == (2, 2, 21, 4, 2, 8) == pool_shape(actor, 21, 4) and dtype == torch.float32
    assert memory() is None and generator.decoder.pool is None

    def broken(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(make_prompts(9), torch.arange(9), broken)
    assert taken[1][2]() is None
    check_same(
        generator.generate(make_prompts(9), torch.arange(9)),
        make_generator(actor, cache="slots").generate(make_prompts(9), torch.arange(9)),
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {}),
        ("gpt2", {"repetition_penalty": 1.5, "top_k": 20, "temperature": 0.8}),
        ("qwen2", {"min_p": 0.05}),
    ],
)
def test_steps_are_captured_as_graphs(monkeypatch, family, settings):
    """A stand-in captures and replays: no step waits for the device, and a pool at a new address is captured again."""
    monkeypatch.setattr("rlhf_kernels.ops.checks.values_visible", lambda x: False)  # as on a GPU
    actor, prompts = make_actor(family), make_prompts(20)
    expected = make_generator(actor, **settings).generate(prompts, torch.arange(20))
    pools = []

    def allocate(shape, dtype, device):
        pools.append(dirty(shape, dtype, device) if len(pools) != 1 else pools[0])
        return pools[-1]

    generator, cuda = make_generator(actor, allocate=allocate, **settings), RecordedCuda.installed(monkeypatch)
    generator.decoder.captures = True
    for graphs in (1, 1, 2):
        check_same(generator.generate(prompts, torch.arange(20)), expected)
        assert len(cuda.graphs) == graphs and cuda.graphs[-1].replays > 10
    buffer = pools[-1]

    def same_place(shape, dtype, device):
        pools.append(buffer.view(-1)[: torch.Size(shape).numel()].view(shape))
        return pools[-1]

    # Fewer prompts in the same number of slots use the same graphs.
    fewer = make_generator(actor, **settings).generate(prompts[:17], torch.arange(17))
    check_same(generator.generate(prompts[:17], torch.arange(17), allocate=same_place), fewer)
    assert len(cuda.graphs) == graphs
    # In a pool of fewer pages at the same address, the layers have other offsets.
    fewer = make_generator(actor, **settings).generate(prompts[:3], torch.arange(3))
    check_same(generator.generate(prompts[:3], torch.arange(3), allocate=same_place), fewer)
    assert pools[-1].data_ptr() == buffer.data_ptr() and len(cuda.graphs) == graphs + 1
    # With autocast, graphs read copies of the weights that end with the rollout, so `close` drops the graphs.
    actor.compute_dtype = torch.bfloat16
    generator.decoder.close()
    assert generator.decoder._graphed is None


def test_the_config_and_kv_bytes_select_decoder_and_pages():
    actor = make_actor()
    assert all(isinstance(make_generator(actor, cache=cache).decoder, SlotDecoder) for cache in ("auto", "slots"))
    config = RolloutConfig(**SETTINGS, cache="paged")
    one = 2 * 2 * 64 * 2 * 8 * 4
    for kv_bytes, pages in (
        (10 * one + 5, 9),
        (100 * one, 16),
    ):  # page 0 is scratch; 16 sequences of one page need 16 pages
        generator = Generator(actor, config, eos_token_ids=ENDS, pad_token_id=0, seed=3, kv_bytes=kv_bytes)
        assert generator.decoder.page_count == pages <= pages_within(actor, kv_bytes) == kv_bytes // one - 1


def test_few_sequences_allocate_only_the_pages_that_they_can_fill():
    shapes = []

    def allocate(shape, dtype, device):
        shapes.append(shape)
        return torch.empty(shape, dtype=dtype, device=device)

    generator = make_generator(make_actor(), cache="paged", batch_size=1000)
    prompts = [torch.arange(3, 8), torch.arange(4, 7)]
    generator.generate(prompts, torch.arange(2), allocate=allocate)
    places = generator.decoder.table.shape[1]
    assert [shape[2] for shape in shapes] == [1 + 2 * places]
    # If the pool has pages for all sequences of the rollout, all are admitted, even if no page stays free.
    few = make_generator(make_actor(), cache="paged", pages=4 * places)
    few.decoder.open(4)
    assert few.decoder.admissible([torch.arange(4 * places) + number for number in range(4)], 0) == 4
    # A prompt that fills the pool is admitted if there is no active sequence, because waiting would free no page.
    one = make_generator(make_actor(), cache="paged", pages=places)
    one.decoder.open(2)
    assert one.decoder.admissible([torch.arange(4 * places)] * 2, 0) == 1


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ("paged", "kv_bytes: got 16384, expected at least 32768"),
        ("slots", "kv_bytes: got 8191, expected at least 8192"),
    ],
)
def test_kv_bytes_too_small_for_one_sequence_are_refused(cache, words):
    config = RolloutConfig(**SETTINGS, cache=cache)
    kv_bytes = 2 * 2 * 64 * 2 * 8 * 4 if cache == "paged" else 2 * 2 * 32 * 2 * 8 * 4 - 1
    with pytest.raises(ValueError, match=words):
        Generator(make_actor(), config, eos_token_ids=ENDS, pad_token_id=0, seed=3, kv_bytes=kv_bytes)


def test_heads_that_differ_from_the_config_are_refused():
    actor = make_actor()
    actor.model.config.num_key_value_heads = 4
    with pytest.raises(ValueError, match=r"policy: got keys or values of \(heads, size\) \(2, 8\), expected \(4, 8\)"):
        PagedDecoder(actor, 16, 32).check()
