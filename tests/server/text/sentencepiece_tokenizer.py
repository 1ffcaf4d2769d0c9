"""A tokenizer as Llama 2's and Mistral's tokenizer.json has it: a blank before the first word,
which the decoder drops, and a token for each byte."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

_TEXT = "the cat sat on the mat user assistant hello world " * 3
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_tokenizer(*special: str) -> Tokenizer:
    """With further special tokens; BOS is 1, EOS 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["▁"],
        special_tokens=[*_SPECIAL, *_BYTES, *special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.split(), trainer)
    # Bytes are tokens of the vocabulary, and no special ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in _BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer
