"""What llama.cpp would choose after each of the tokens that we chose, by its logits.

A program for an interpreter that has the package `xllamacpp` and nothing of ours; it calls the
shared library of that. Reads one JSON object: `model`, a GGUF file; `prompts` and `new`, token ids.
Writes one: for each new token its choice, and how far the logit of that is above ours. Exit status
3: the package is not there.
"""

import ctypes
import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _Parameters(ctypes.Structure):
    """llama_model_params, which are 80 bytes, or llama_context_params, which are more: used as they
    are by default, and larger than either, so that nobody writes behind them."""

    _fields_ = [("others", ctypes.c_uint8 * 1024)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def _library(package: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(package.glob("*.so"))))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_context_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_init_from_model", pointer, [pointer, _Parameters]),
        ("llama_free", None, [pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_set_n_threads", None, [pointer, number, number]),
        ("llama_batch_init", _Batch, [number, number, number]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.stderr.write("No module named 'xllamacpp'\n")
        return 3
    library = _library(Path(spec.origin).parent)
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
        lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) and None
    )
    library.llama_log_set(silent, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        request["model"].encode(), library.llama_model_default_params()
    )
    if not model:
        return 1
    pairs = zip(request["prompts"], request["new"], strict=True)
    found = [_judged(library, model, prompt, new) for prompt, new in pairs]
    answer = {
        "version": f"xllamacpp {version('xllamacpp')}",
        "choices": [[choice for choice, _ in one] for one in found],
        "gaps": [[gap for _, gap in one] for one in found],
    }
    json.dump(answer, sys.stdout)
    return 0


def _judged(library: Any, model: Any, prompt: list[int], new: list[int]) -> list[tuple[int, float]]:
    """Of each new token: the choice, and the gap."""
    ids, threads = [*prompt, *new], len(os.sched_getaffinity(0))
    context = library.llama_init_from_model(model, library.llama_context_default_params())
    if not context:
        raise MemoryError("llama.cpp makes no context")
    library.llama_set_n_threads(context, threads, threads)
    batch = library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for at, token_id in enumerate(ids):
        batch.token[at], batch.pos[at] = token_id, at
        batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
    if status := library.llama_decode(context, batch):
        raise RuntimeError(f"llama.cpp computes nothing (status {status})")
    vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    judged = []
    for at, chosen in enumerate(new, start=len(prompt) - 1):
        logits = library.llama_get_logits_ith(context, at)[:vocab_size]
        best = max(logits)
        choice = chosen if logits[chosen] == best else logits.index(best)
        judged.append((choice, best - logits[chosen]))
    library.llama_batch_free(batch)
    library.llama_free(context)
    return judged


if __name__ == "__main__":
    sys.exit(main())
