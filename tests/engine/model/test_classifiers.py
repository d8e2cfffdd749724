"""Reward models of others: sequence classifiers of transformers with one label, compared with their own scores."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from rlhf_engine.data import train_tokenizer
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.reward_model import RewardModel
from tests.engine.helpers.cli_run import ANSWERS, new_model, new_run, rlhf
from tests.engine.helpers.tiny_models import CONFIGS, VOCABULARY

PAD, EOS = 0, 2


def save_classifier(folder, family="llama", *, labels=1, dtype=torch.float32, **changes):
    """Write a random classifier as TRL's RewardTrainer does; return its path."""
    kind, arguments = CONFIGS[family]
    special = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(3)
    config = kind(**{"vocab_size": VOCABULARY, "num_labels": labels} | special | arguments | changes)
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def batch(last=EOS):
    """Return ids padded on the right, and their lengths."""
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([9, 4, 1, 6])
    ids[torch.arange(4), lengths - 1] = last
    return ids * (torch.arange(9) < lengths[:, None]), lengths


def theirs(folder, ids, lengths):
    """Return transformers' own scores, one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=row[None, :length]).logits[0] for row, length in zip(ids, lengths, strict=True)]
        )


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2_tied", "gpt2", "mistral", "gemma2"])
@torch.no_grad()
def test_the_scores_are_those_of_transformers(tmp_path, family):
    save_classifier(tmp_path, family)
    ids, lengths = batch()
    found, expected = RewardModel.load(tmp_path, attention="eager")(ids, lengths), theirs(tmp_path, ids, lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


@torch.no_grad()
def test_where_the_pad_token_is_eos_the_token_before_it_is_read(tmp_path):
    """Transformers skips every trailing token that equals the pad token, an EOS included."""
    save_classifier(tmp_path, pad_token_id=EOS)
    ids, lengths = batch()
    model = RewardModel.load(tmp_path)
    expected = theirs(tmp_path, ids, lengths)
    torch.testing.assert_close(model(ids, lengths), expected, rtol=1e-5, atol=1e-5)
    without = torch.where(lengths > 1, lengths - 1, lengths)
    torch.testing.assert_close(model(ids, without), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "ours").mkdir()
    model.save(tmp_path / "ours")
    assert torch.equal(RewardModel.load(tmp_path / "ours")(ids, lengths), model(ids, lengths))


def test_a_classifier_with_several_labels_is_refused(tmp_path):
    save_classifier(tmp_path, labels=3)
    with pytest.raises(ValueError, match="got a sequence classifier with 3 labels, expected one"):
        RewardModel.load(tmp_path)


def test_an_encoder_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a BertForSequenceClassification, which has no linear layer `score`"):
        RewardModel.load(tmp_path)


def test_a_score_that_is_computed_differently_is_refused(tmp_path, monkeypatch):
    save_classifier(tmp_path)
    kind = type(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    forward = kind.forward

    def doubled(self, *arguments, **options):
        found = forward(self, *arguments, **options)
        found.logits = found.logits * 2
        return found

    monkeypatch.setattr(kind, "forward", doubled)
    with pytest.raises(ValueError, match="does not compute its score by a linear layer on the last hidden state"):
        RewardModel.load(tmp_path)


def test_a_missing_score_layer_is_named(tmp_path):
    path = save_classifier(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["score.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weight score\.weight is missing"):
        RewardModel.load(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2_tied", "gpt2_tied"])
def test_as_a_policy_a_classifier_is_refused(tmp_path, family):
    """With tied embeddings all weights of a causal LM are there, so that transformers drops the head without an error."""
    save_classifier(tmp_path, family)
    with pytest.raises(ValueError, match=r"got a .*ForSequenceClassification|weight lm_head.weight is missing"):
        load_pretrained(AutoModelForCausalLM, tmp_path)


@pytest.fixture
def run(tmp_path):
    base = new_model(tmp_path / "base", family="qwen2_tied")
    reward = save_classifier(tmp_path / "their_rm", "qwen2_tied", vocab_size=300, eos_token_id=0, pad_token_id=1)
    train_tokenizer(ANSWERS, 300).save_pretrained(reward)
    return new_run(tmp_path, base)


def test_a_classifier_is_a_reward_and_a_judge_for_the_command_line(run, capsys):
    reward = run / "their_rm"
    code, _, err = rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=[f"reward.path={reward}"])
    assert code == 0, err
    contest = [f"eval.candidate={run / 'out' / 'ppo'}", f"eval.baseline={run / 'base'}", f"eval.judge={reward}"]
    code, shown, err = rlhf(capsys, "eval", "--config", run / "run.yaml", sets=[*contest, "eval.split=train"])
    assert code == 0 and "Win rate of" in shown, err
    code, _, err = rlhf(capsys, "sft", "--config", run / "run.yaml", sets=[f"model.path={reward}"])
    assert code == 2 and "got a Qwen2ForSequenceClassification" in err and "reward.path or eval.judge" in err
