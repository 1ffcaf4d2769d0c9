"""llama.cpp's own tokenizer, asked through the shared library of the package `xllamacpp`.

A program for an interpreter that has that package and nothing of ours. Reads one JSON object:
`model`, a GGUF file, of which only the vocabulary is read; `texts`. Writes one: ids of each text,
without and with what is put around it, and which tokens end an answer. Exit status 3: the package
is not there.
"""

import ctypes
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


class _Parameters(ctypes.Structure):
    """llama_model_params, as far as it is known here: its flags begin at byte 72."""

    _fields_ = [
        ("others", ctypes.c_uint8 * 72),
        ("vocab_only", ctypes.c_bool),
        ("flags", ctypes.c_uint8 * 7),
    ]


def _library(package: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(package.glob("*.so"))))
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    for name, result, arguments in (
        ("llama_model_default_params", _Parameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_vocab_is_eog", flag, [pointer, number]),
        (
            "llama_tokenize",
            number,
            [pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, flag, flag],
        ),
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
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    model = library.llama_model_load_from_file(request["model"].encode(), parameters)
    if not model:
        return 1
    vocabulary = library.llama_model_get_vocab(model)

    def ids(text: str, special: bool) -> list[int]:
        raw = text.encode()
        room = 2 * len(raw) + 16
        found = (ctypes.c_int32 * room)()
        count = library.llama_tokenize(vocabulary, raw, len(raw), found, room, special, True)
        return list(found[:count])

    num_tokens = library.llama_vocab_n_tokens(vocabulary)
    answer = {
        "version": f"xllamacpp {version('xllamacpp')}",
        "ends": [i for i in range(num_tokens) if library.llama_vocab_is_eog(vocabulary, i)],
        "plain": [ids(text, False) for text in request["texts"]],
        "special": [ids(text, True) for text in request["texts"]],
    }
    json.dump(answer, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
