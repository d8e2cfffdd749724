"""Adapters with the names and signatures of other PPO libraries ("peers").

`trl`, `openrlhf`, `verl`, `nemo_rl`, `torchtune` and `deepspeed_chat`.

A user passes or calls these objects; nothing is patched at import. `head` is the fused head for any of the peers. No
peer needs to be installed.

An adapter differs from its peer on purpose in a few cases: masked entries of a result, a mask without a True entry, and
padding in metrics. By default masked entries and results of an empty mask are zeros, and metrics do not include
padding. With `faithful=True` the result is the peer's: its values at masked entries, NaN or an error for an empty mask,
and metrics that include padding.
"""
