"""Whether what is computed here is what another engine computes: `onecopy check`, and the tests.

Greedy tokens on one side, what a reference thinks of each of them on the other. `greedy.py` drives
our engine, `program.py` is the process that compares, `ties.py` the judge. The files `*_logits.py`
are programs for the reference's own interpreter, which need nothing of ours.
"""
