"""A simulator of faults: every seed is a schedule of faults for a tiny run, which must end with the bits of an undisturbed one.

`python -m tests.engine.faults SEED` replays a seed. The modules: `disk` (a disk that fails, and what a crash leaves of it),
`schedule` (what a seed chooses), `runs` (the stages), `simulate` (attempts with faults, the resumed run, the comparison).
"""
