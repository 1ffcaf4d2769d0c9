"""A small byte-level tokenizer, with longer tokens that straddle whatever a grammar is made of."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PIECES = [
    '{"',
    '":',
    ', "',
    "yes",
    "no",
    "ab",
    "abc",
    "12",
    "é",
    '"}',
    '{"a": ',
    "true",
    "  ",
    "\n",
]


def byte_tokenizer(path: Path) -> Tokenizer:
    """All bytes, PIECES, and the special tokens <end> and <turn>; written to `path`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for piece in PIECES:
        ((shown, _),) = byte_level.pre_tokenize_str(piece)
        vocab.setdefault(shown, len(vocab))
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = byte_level
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>"), AddedToken("<turn>")])
    made.save(str(path))
    return made
