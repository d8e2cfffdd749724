"""`python -m rlhf_engine.cli`: the command `rlhf`."""

from rlhf_engine.cli import main

main()
