"""Continuous batching against the simplest loop: one sequence, no cache, and a whole forward pass for each token."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_engine.config import RolloutConfig
from rlhf_engine.data import train_tokenizer
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.saving import load_policy
from rlhf_engine.rollout import EOS, LENGTH, STOP_STRING, Generator, logprob_deviation
from rlhf_engine.rollout.decode import slots as slot_decoding
from rlhf_engine.rollout.decode.cpu import head_product
from rlhf_engine.rollout.decode.protocol import prompt_width
from rlhf_engine.rollout.decode.slots import slot_bytes
from rlhf_engine.rollout.stopping import StopStrings
from rlhf_kernels import sample_tokens
from tests.engine.helpers.sampling import ENDS, make_actor, make_generator, make_prompts, same_sequence
from tests.engine.helpers.tiny_models import VOCABULARY, tiny

SMALL = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED, SLIDING, ABSOLUTE = ("llama", "qwen2"), ("mistral", "gemma2"), ("gpt2",)


def penalise(logits, seen, penalty):
    """Apply the penalty of CTRL, section 4.1, one token at a time."""
    for token in set(seen):
        logits[0, token] = logits[0, token] / penalty if logits[0, token] > 0 else logits[0, token] * penalty
    return logits


@torch.no_grad()
def slow_loop(actor, prompt, number, *, seed=3, budget=12, penalty=1.0, temperature=1.0, top_k=None):
    """Return (ids, log-probs of the full distribution, log-probs of the distribution that was sampled from)."""
    ids, loop = prompt.tolist(), ([], [], [])
    for step in range(budget):
        full = actor.model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].float()
        taken = sample_tokens(
            penalise(full.clone(), ids, penalty),
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            sequence=torch.tensor([number]),
            position=torch.tensor([step]),
            backend="reference",
        )
        token = int(taken.ids)
        found = token, float((full / temperature).log_softmax(-1)[0, token]), float(taken.sampling_logprobs)
        for part, value in zip(loop, found, strict=True):
            part.append(value)
        ids.append(token)
        if token in ENDS:
            break
    return loop


def assert_is_the_loop(rollout, row, loop):
    n = int(rollout.response_lengths[row])
    assert rollout.response_ids[row, :n].tolist() == loop[0]
    for name, expected in (("logprobs", loop[1]), ("sampling_logprobs", loop[2])):
        torch.testing.assert_close(getattr(rollout, name)[row, :n], torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*GROUPED, *SLIDING, *ABSOLUTE])
def test_every_token_equals_that_of_the_loop(family):
    """The tokens do not depend on slots and order: 11 prompts in 1, 3 or 11 slots, in order and shuffled."""
    actor, prompts = make_actor(family), make_prompts(11)
    loop = [slow_loop(actor, prompt, number) for number, prompt in enumerate(prompts)]
    for slots in (1, 3, 64):
        generator = make_generator(actor, batch_size=slots, prefill_tokens=48)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(slots))
        for numbers in (torch.arange(11), order):
            rollout = generator.generate([prompts[i] for i in numbers], numbers)
            for row, number in enumerate(numbers.tolist()):
                assert_is_the_loop(rollout, row, loop[number])


def test_eager_attention_equals_the_loop():
    actor, prompts = make_actor("mistral"), make_prompts(5)
    actor.model.set_attn_implementation("eager")
    rollout = make_generator(actor, batch_size=2).generate(prompts, torch.arange(5))
    for row, prompt in enumerate(prompts):
        assert_is_the_loop(rollout, row, slow_loop(actor, prompt, row))


@pytest.mark.parametrize("settings", [{"penalty": 1.3}, {"penalty": 0.6, "temperature": 0.7, "top_k": 9}], ids=str)
def test_repetition_penalty(settings):
    """The penalty changes the sampled distribution; `logprobs` stay those of the full distribution without penalty."""
    actor, prompts = make_actor(), make_prompts(6)
    options = {name.replace("penalty", "repetition_penalty"): value for name, value in settings.items()}
    rollout = make_generator(actor, batch_size=4, **options).generate(prompts, torch.arange(6))
    for row, prompt in enumerate(prompts):
        assert_is_the_loop(rollout, row, slow_loop(actor, prompt, row, **settings))
    plain = make_generator(actor).generate(prompts, torch.arange(6))
    assert rollout.response_ids.shape != plain.response_ids.shape or (rollout.response_ids != plain.response_ids).any()


def test_a_prompt_is_prefilled_once_for_all_its_samples(monkeypatch):
    """Three prompts, five samples each: the prefill has three rows, and every sample has the bits of a batch of one."""
    read = []
    plain = slot_decoding.prefill_batch
    monkeypatch.setattr(
        slot_decoding,
        "prefill_batch",
        lambda policy, prompts, *rest: read.append(prompts) or plain(policy, prompts, *rest),
    )
    generator, prompts = make_generator(make_actor()), [p[:7] for p in make_prompts(40) if len(p) >= 7][:3]
    read.clear()
    rows = prompts * 5
    rollout = generator.generate(rows, torch.arange(15))
    assert sorted(tuple(p.tolist()) for batch in read for p in batch) == sorted(tuple(p.tolist()) for p in prompts)
    for row in range(15):
        assert same_sequence(rollout, row, generator.generate([rows[row]], torch.tensor([row])), 0)


def test_prefill_keeps_the_token_budget(monkeypatch):
    sizes = []
    plain = slot_decoding.prefill_batch
    monkeypatch.setattr(
        slot_decoding,
        "prefill_batch",
        lambda policy, prompts, *rest: (
            sizes.append((len(prompts), prompt_width(len(prompts[0])))) or plain(policy, prompts, *rest)
        ),
    )
    generator, prompts = make_generator(make_actor(), prefill_tokens=70, batch_size=64), make_prompts(30)
    sizes.clear()
    generator.generate(prompts, torch.arange(30))
    assert sum(count for count, _ in sizes) == 30 and max(count for count, _ in sizes) > 1
    assert all(count * width <= 70 for count, width in sizes)
    sizes.clear()
    make_generator(make_actor(), prefill_tokens=1).generate(prompts[:4], torch.arange(4))
    assert [count for count, _ in sizes[-4:]] == [1] * 4


def test_the_cache_uses_uninitialized_memory_from_the_allocator():
    asked = []

    def allocate(shape, dtype, device):
        asked.append(shape)
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    actor, prompts = make_actor("mistral"), make_prompts(20)
    config = RolloutConfig(max_prompt_tokens=20, max_response_tokens=12, batch_size=6)
    rest = {"eos_token_ids": ENDS, "pad_token_id": 0, "seed": 3}
    generator = Generator(actor, config, **rest, kv_bytes=3 * slot_bytes(actor, 32))
    asked.clear()
    rollout = generator.generate(prompts, torch.arange(20), allocate=allocate)
    assert asked == [(3, 2, 32, 8)] * 4  # keys and values of two layers; 3 slots and not 6
    assert slot_bytes(actor, 32) == sum(torch.Size(shape).numel() for shape in asked) // 3 * 4
    expected = Generator(actor, config, **rest).generate(prompts, torch.arange(20))
    assert all(same_sequence(rollout, row, expected, row) for row in range(20))
    with pytest.raises(ValueError, match=r"kv_bytes: got 8191, expected at least 8192, the keys and values of one"):
        Generator(actor, config, **rest, kv_bytes=8191)
    actor.model.set_attn_implementation("eager")
    with pytest.raises(
        ValueError, match=r"kv_bytes: got 8192, expected at least 131072, the keys and values of 16 seq"
    ):
        Generator(actor, config, **rest, kv_bytes=8192)


def test_sequences_longer_than_the_positions_are_refused():
    generator = make_generator(make_actor(max_position_embeddings=24))
    generator.generate([[5] * 12], torch.arange(1))
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: got 13 ids and rollout.max_response_tokens 12, expected a sum"
    ):
        generator.generate([[5], [5] * 13], torch.arange(2))


# ---- stop strings ----


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the end of the thing, and then some: ü\n\nUser: hello"] * 3, 300)


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "stop": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def spell(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("stop", ["\n\nUser", "ü", "nd then", "zzz", " "])
def test_a_stop_string_is_found_with_the_token_that_completes_it(tokenizer, stop):
    """The text is spelled in whole tokens, in tokens of one byte, and with special tokens that decode to no text."""
    stops = StopStrings(tokenizer, (stop,))
    bytes_ = [token for letter in f"ab{stop}" for token in spell(tokenizer, letter)]
    silent = [tokenizer.eos_token_id] * 40
    for ids in (spell(tokenizer, f"a{stop}"), bytes_, bytes_[:3] + silent + bytes_[3:]):
        text = [tokenizer.decode(ids[: n + 1], skip_special_tokens=True) for n in range(len(ids))]
        expected = [n for n in range(len(ids)) if stop in text[n]]
        assert expected and [n for n in range(len(ids)) if stops.found(ids[: n + 1])][:1] == expected[:1]
        # A long text before it does not change the result.
        assert stops.found(spell(tokenizer, "then some") * 30 + ids[: expected[0] + 1])
        assert not stops.found(spell(tokenizer, "thesome") * 9)


def test_an_incomplete_character_is_no_stop_string(tokenizer):
    stops, letter = StopStrings(tokenizer, ("\ufffd",)), spell(tokenizer, "ö")
    assert len(letter) == 2 and not stops.found(letter[:1]) and not stops.found(letter)


@pytest.mark.parametrize(
    ("make", "stops", "words"),
    [
        (None, ("",), r"stop\[0\]: got an empty text"),
        (word_level, ("stop", "halt"), r"stop\[1\]: got 'halt', which the tokenizer encodes and decodes to ''"),
        (word_level, ("é",), r"stop\[0\]: got 'é'"),
        (
            None,
            ("x", "ab" * 500),
            r"stop\[1\]: got a text of 1000 characters, expected at most \d+, the most that the 12 tokens",
        ),
    ],
)
def test_a_stop_string_that_can_never_occur_is_refused(tokenizer, make, stops, words):
    config = RolloutConfig(max_prompt_tokens=20, max_response_tokens=12, stop=stops)
    with pytest.raises(ValueError, match=words):
        tokens = tokenizer if make is None else make()
        Generator(make_actor(), config, eos_token_ids=2, pad_token_id=0, seed=3, tokenizer=tokens)


def test_special_tokens_spell_no_stop_string(tokenizer):
    names = [name for name, number in tokenizer.get_vocab().items() if number not in tokenizer.all_special_ids]
    most = 12 * (1 + max(map(len, names)))
    assert len(tokenizer.eos_token) > max(map(len, names))
    StopStrings(tokenizer, ("x" * most,), 12)
    with pytest.raises(ValueError, match=f"got a text of {most + 1} characters, expected at most {most},"):
        StopStrings(tokenizer, ("x" * (most + 1),), 12)


def test_ids_without_a_token_are_not_sampled_by_default(tmp_path, tokenizer, caplog):
    """A policy from a folder, as the Python API loads it, has rows that are no token of the folder's tokenizer."""
    rows = len(tokenizer) + 200
    model = tiny("llama")
    model.resize_token_embeddings(rows)
    torch.nn.init.zeros_(model.lm_head.weight)  # every row is as likely
    model.save_pretrained(tmp_path)
    config = RolloutConfig(max_prompt_tokens=8, max_response_tokens=8, batch_size=8)

    def sampled(**given):
        generator = Generator(load_policy(tmp_path), config, eos_token_ids=rows, pad_token_id=0, seed=3, **given)
        return generator, generator.generate([[5]] * 16, torch.arange(16)).response_ids

    generator, ids = sampled()
    assert generator.unknown_ids == 0 and ids.max() >= len(tokenizer)
    assert f"no `tokenizer` is given and {tmp_path} has none" in caplog.text
    make_generator(make_actor())
    assert "no `tokenizer` is given and a model that was built in memory has none" in caplog.text
    caplog.clear()
    restricted = make_actor()
    restricted.restrict(range(VOCABULARY - 3))
    make_generator(restricted)
    assert not caplog.text
    tokenizer.save_pretrained(tmp_path)
    generator, ids = sampled()
    assert generator.unknown_ids == 200 and ids.max() < len(tokenizer)
    assert torch.equal(ids, sampled(tokenizer=tokenizer)[1])


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"rollout\.stop is set to .* pass `tokenizer`"):
        make_generator(make_actor(), stop=("x",))


def test_a_response_ends_at_its_stop_string_with_that_reason(tokenizer):
    """The tokens up to the stop string equal those of a run without stop strings."""
    actor = make_actor(max_position_embeddings=64)
    text = tokenizer.decode(list(range(VOCABULARY)))
    stop = (text[40], text[50])
    config = {"max_prompt_tokens": 20, "max_response_tokens": 12, "batch_size": 6}
    rest = {"eos_token_ids": ENDS, "pad_token_id": 0, "seed": 3, "tokenizer": tokenizer}
    prompts = make_prompts(40)
    free = Generator(actor, RolloutConfig(**config), **rest).generate(prompts, torch.arange(40))
    rollout = Generator(actor, RolloutConfig(**config, stop=stop), **rest).generate(prompts, torch.arange(40))
    for row in range(40):
        n, whole = (
            int(rollout.response_lengths[row]),
            free.response_ids[row, : int(free.response_lengths[row])].tolist(),
        )
        ids = rollout.response_ids[row, :n].tolist()
        assert ids == whole[:n]
        ends = [any(s in tokenizer.decode(ids[: k + 1], skip_special_tokens=True) for s in stop) for k in range(n)]
        assert not any(ends[:-1])
        reason = EOS if ids[-1] in ENDS else STOP_STRING if ends[-1] else LENGTH
        assert int(rollout.stop_reason[row]) == reason and (reason != LENGTH or n == 12)
        assert bool(rollout.ended[row]) == (reason != LENGTH)
    assert {EOS, STOP_STRING, LENGTH} == set(rollout.stop_reason.tolist())


# ---- against a new forward pass ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_sampled_logprobs_are_within_1e_5_of_a_fresh_forward_pass(family):
    actor = make_actor(family)
    rollout = make_generator(actor).generate(make_prompts(24), torch.arange(24))
    size = {"microbatch": 8, "temperature": 1.0}
    assert logprob_deviation(actor, rollout, sequences=24, **size) <= 1e-5
    rollout.logprobs[5, 0] += 0.25
    assert logprob_deviation(actor, rollout, sequences=24, **size) == pytest.approx(0.25, abs=1e-4)
    assert logprob_deviation(actor, rollout, sequences=5, **size) <= 1e-5
    with torch.no_grad():
        actor.lm_weight.mul_(1.1)
    assert logprob_deviation(actor, rollout, sequences=5, **size) > 1e-3


def test_a_generator_uses_the_current_weights():
    """The head's weight is reordered again in each call."""
    actor, prompts = make_actor(), make_prompts(8)
    generator = make_generator(actor)
    before = generator.generate(prompts, torch.arange(8))
    with torch.no_grad():
        actor.lm_weight.copy_(tiny("llama", seed=9).lm_head.weight)
    after = generator.generate(prompts, torch.arange(8))
    assert not torch.equal(before.response_ids[:, 0], after.response_ids[:, 0])
    assert logprob_deviation(actor, after, sequences=8, microbatch=8, temperature=1.0) <= 1e-5


def test_a_row_of_the_reordered_head_does_not_depend_on_the_others():
    """The vocabulary is split among threads and is no multiple of a block. The result is also compared with float64."""
    torch.manual_seed(0)
    policy = ActorCritic(LlamaForCausalLM(LlamaConfig(vocab_size=5003, **SMALL)))
    product, hidden = head_product(policy), torch.randn(64, 96)

    def head(hidden):
        return product(hidden, policy.lm_weight, policy.model.get_output_embeddings().bias)

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            whole = head(hidden)
            for rows in (16, 17, 23, 32, 47, 64):
                for shift in (0, 7, 16):
                    chosen = (torch.arange(rows) + shift) % 64
                    assert torch.equal(head(hidden[chosen]), whole[chosen])
    finally:
        torch.set_num_threads(threads)
    assert product.reordered is not None
    exact = hidden.double() @ policy.lm_weight.double().T
    assert (whole - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()
