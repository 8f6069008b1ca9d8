"""``forcetune mace-train``: the arguments of mace's ``mace_run_train``, and what becomes of each.

mace itself is not imported: its options stand in a table (:mod:`forcetune.cli.mace_train.options`), which a test
compares with the parser of mace-torch 0.3.16 and which `docs/mace_train.md` is written from.
"""
