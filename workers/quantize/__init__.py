"""Checkpoints rounded to fewer bits, by rows: memory depends on a chunk, never on the model.

Neither torch nor transformers is needed for it, and none of it is loaded with this package.
"""
