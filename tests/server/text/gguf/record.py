"""Compares with llama.cpp, and records what it says for `make test`, which does without.

    python -m tests.server.text.gguf.record PYTHON          # writes llamacpp.json, too
    python -m tests.server.text.gguf.record PYTHON FILE...  # GGUF files with vocabularies

PYTHON is an interpreter that has the package xllamacpp. Prints how many kinds, texts and
differences there were; ends with 1 if there was one.
"""

import json
import sys
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
from tokenizers import Tokenizer

from server.conformance.references import ask
from server.text.gguf.metadata import read_metadata
from server.text.gguf.pipeline import tokenizer_json
from server.text.gguf.splits import DEFAULT, SPLITS
from server.text.gguf.vocabulary import WHOLE, vocabulary
from tests.server.text.gguf.approximations import AS_LLAMACPP
from tests.server.text.gguf.corpus import TEXTS, marked_texts, random_texts, trained

RECORD: Final = Path(__file__).with_name("llamacpp.json")
NUM_TOKENS: Final = {"bytes": 1500, "characters": 1800}
SCORED: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {},
    "llama without a first blank": {"add_space_prefix": False},
    "llama without BOS": {"add_bos_token": False},
    "llama with EOS": {"add_eos_token": True},
}
"""What a file of SentencePiece's BPE may say beside its tokens."""


def metadata_of(name: str, vocabularies: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_metadata` gives for a file of that kind: a split's name, or one of `SCORED`."""
    scored = name in SCORED
    in_bytes = not scored and SPLITS[name].in_bytes
    kept = vocabularies["bytes" if in_bytes else "characters"]
    said = {
        "model": "llama" if scored else "whitespace" if name == "whitespace" else "gpt2",
        "tokens": [one.encode() for one in kept["tokens"]],
        "token_type": kept["kinds"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if scored:
        said["scores"] = [-float(token_id) for token_id in range(len(kept["tokens"]))]
        said.update(SCORED[name])
    else:
        said["pre"] = name
        said["merges"] = [one.encode() for one in kept["merges"]]
    return {f"tokenizer.ggml.{key}": value for key, value in said.items()}


def tokenizer_of(metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(metadata, vocabulary(metadata))))


def write_file(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, number in {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 128,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ask_llamacpp(python: str, file: Path, texts: Sequence[str]) -> dict[str, Any]:
    return ask("llama.cpp", python, {"model": str(file), "texts": texts})


def differences(tokenizer: Tokenizer, texts: Sequence[str], answer: Mapping[str, Any]) -> list[str]:
    """The texts whose ids are not the same, with or without what is put around them."""
    found = []
    for text, plain, special in zip(texts, answer["plain"], answer["special"], strict=True):
        ours = (
            tokenizer.encode(text, add_special_tokens=False).ids,
            tokenizer.encode(text).ids,
        )
        if ours != (plain, special):
            found.append(text)
    return found


def _compare_files(python: str, files: Sequence[str]) -> int:
    """Against llama.cpp as it is; where it composes no characters, on texts that are composed."""
    total = 0
    for file in map(Path, files):
        metadata = read_metadata(file)
        words = vocabulary(metadata)
        whole = tuple(
            text for text, kind in zip(words.tokens, words.kinds, strict=True) if kind in WHOLE
        )
        texts = [*TEXTS, *random_texts(600, 1), *(marked_texts(60, 3, whole) if whole else ())]
        split = SPLITS.get(str(metadata.get("tokenizer.ggml.pre", DEFAULT)))
        if metadata.get("tokenizer.ggml.model") == "gpt2" and split is not None and split.composes:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        found = differences(tokenizer_of(metadata), texts, ask_llamacpp(python, file, texts))
        print(f"{file.name}: {len(texts)} texts, {len(found)} differ {found[:3]}")
        total += len(found)
    return total


def _compare_kinds(python: str) -> int:
    vocabularies = {name: trained(name == "bytes", count) for name, count in NUM_TOKENS.items()}
    texts = [*TEXTS, *marked_texts(30, 3)]
    more = [*texts, *random_texts(600, 1), *marked_texts(60, 4)]
    SPLITS.update(AS_LLAMACPP)  # type: ignore[attr-defined]
    record: dict[str, Any] = {"vocabularies": vocabularies, "texts": texts, "ids": [], "kinds": {}}
    seen: list[dict[str, int]] = [{} for _ in texts]
    record["ids"] = [[] for _ in texts]
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in (*SPLITS, *SCORED):
            metadata = metadata_of(name, vocabularies)
            file = write_file(Path(folder) / "model.gguf", metadata)
            answer = ask_llamacpp(python, file, more)
            record["xllamacpp"] = answer["version"]
            found = differences(tokenizer_of(metadata), more, answer)
            if found:
                print(f"{name}: {len(found)} of {len(more)} texts differ: {found[:5]}")
            total += len(found)
            chosen = []
            for at, ids in enumerate(answer["special"][: len(texts)]):
                key = json.dumps(ids)
                if key not in seen[at]:
                    seen[at][key] = len(record["ids"][at])
                    record["ids"][at].append(ids)
                chosen.append(seen[at][key])
            record["kinds"][name] = chosen
    print(f"{len(record['kinds'])} kinds, {len(more)} texts each, {total} differences")
    lines = [
        f' "{name}": {json.dumps(value, separators=(",", ":"))}' for name, value in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return total


if __name__ == "__main__":
    interpreter, *given = sys.argv[1:]
    sys.exit(bool(_compare_files(interpreter, given) if given else _compare_kinds(interpreter)))
