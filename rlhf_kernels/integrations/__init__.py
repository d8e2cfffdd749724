"""Other trainers' losses under their own names and signatures: objects that a user passes or calls, nothing is patched.

`trl`, `openrlhf`, `verl`, `deepspeed_chat`; `head` is the fused head for any of them. No peer needs to be installed. Where an
adapter differs from its peer on purpose, `faithful=True` gives the peer's own: what it leaves at entries that do not count,
NaN or an error for a mask without a True, padding counted in metrics. The default is this library's: zeros.
"""
