"""Forward passes of a model with outputs in the shapes that tests compare. B sequences, S positions, H hidden, V vocabulary."""

from rlhf_engine.model import TokenBatch


def hidden_of(model, ids, mask=None, **options):  # (B, S) -> (B, S, H)
    batch = TokenBatch(input_ids=ids, attention_mask=mask, **options)
    return model(batch, ("hidden",)).hidden.view(*ids.shape, -1)


def logits_of(model, hidden):  # (..., H) -> (..., V)
    """Return the logits of the output layer, without a fused op."""
    with model.products():
        return model.head.transform(model.model.get_output_embeddings()(hidden))


def logprobs_of(model, ids, **options):  # (B, S) -> (B, S - 1)
    """Return the log-probs of all tokens but the first of each row."""
    batch = TokenBatch(input_ids=ids[:, :-1], ids=ids[:, 1:].flatten())
    return model(batch, ("logprobs",), **options).logprobs.view(len(ids), -1)
