"""Ours beside the others on the same weights, noise and noise levels; equality before time.

Every implementation ("arm") works in a process of its own, so that imports do not clash and memory
is each one's own.  `cases` says what is measured, `arms` how each implementation does it, `worker`
is the process, `run` interleaves the arms, `report` writes the outcome.
"""
