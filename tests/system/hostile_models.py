"""Folders and files that no model is: careless ones, damaged ones, ones that were made to do harm.

Owns the corpus, as code: a name, how it is made of a sound model, and what the refusal must name.
Knows nothing of the code under test.
"""

import base64
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.workers.checkpoint.checkpoint_files import assemble, damaged, entry, write_gguf

Make = Callable[[Path], Path | None]
"""Spoils the model in a folder; the path to serve, if that is not the folder."""

DEEP = "[" * 100_000
EVERY_FILE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


@dataclass(frozen=True)
class Hostile:
    """`words` are in the one line that refuses it; none where it is served all the same."""

    name: str
    make: Make
    words: tuple[str, ...]

    @property
    def concerns_the_server(self) -> bool:
        """Whether the server itself reads what is spoiled, and not an instance alone."""
        return not self.name.startswith(("config:", "weights:", "index:", "GGUF:"))


# --- how a file is replaced


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def listening(file: Path) -> None:
    """A socket's name stays when its socket is closed."""
    file.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(file.parent)  # its path may be too long for a socket
        try:
            bound.bind(file.name)
        finally:
            os.chdir(here)


def device(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def dangling(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("../blobs/0123456789abcdef")


def circular(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def endless(file: Path) -> None:
    """Of a terabyte, none of which is on the disk."""
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


def unreadable_kinds() -> Iterator[Hostile]:
    kinds = {
        pipe: "named pipe",
        directory: "folder",
        listening: "socket",
        device: "device",
        dangling: "can't be read",
        circular: "can't be read",
    }
    for file in EVERY_FILE:
        for kind, word in kinds.items():

            def make(folder: Path, file: str = file, kind: Any = kind) -> None:
                kind(folder / file)

            missing = kind in (dangling, circular)
            if missing and file == "tokenizer.json":
                word = "tokenizer.json"  # of which another message says how to make one
            yield Hostile(f"{file} is a {kind.__name__}", make, (file, word))
    for file in ("config.json", "generation_config.json", "tokenizer.json"):

        def grown(folder: Path, file: str = file) -> None:
            endless(folder / file)

        yield Hostile(f"{file} is endless", grown, (file, "MiB"))
    for file in (
        "chat_template.jinja",
        "model.safetensors.index.json",
        "modules.json",
        "special_ids.json",
    ):

        def piped(folder: Path, file: str = file) -> None:
            pipe(folder / file)

        yield Hostile(f"{file} is a pipe", piped, (file, "pipe"))


# --- texts that are no JSON, or not the JSON that belongs there


def broken_texts() -> Iterator[Hostile]:
    texts: dict[str, bytes] = {
        "empty": b"",
        "half": b'{"model_type": "lla',
        "an array": b"[1, 2]",
        "a number": b"7",
        "null": b"null",
        "no text": b'{"a": "\xff\xfe"}',
        "deep": b'{"a": ' + DEEP.encode() + b"}",
        "a long number": b'{"a": ' + b"9" * 100_000 + b"}",
        "zeros": bytes(4096),
        "UTF-16": '{"a": 1}'.encode("utf-16"),
    }
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        for name, text in texts.items():
            if (file, name) == ("generation_config.json", "UTF-16"):
                continue  # which is JSON, after all

            def make(folder: Path, file: str = file, text: bytes = text) -> None:
                (folder / file).write_bytes(text)

            word = "model_type" if (file, name) == ("config.json", "UTF-16") else file
            yield Hostile(f"{file}: {name}", make, (word,))


def changed(file: str, **changes: Any) -> Make:
    """Fields of a JSON file; `...` leaves one out."""

    def make(folder: Path) -> None:
        path = folder / file
        document = json.loads(path.read_text()) | changes
        kept = {name: value for name, value in document.items() if value is not ...}
        path.write_text(json.dumps(kept))

    return make


def without(file: str) -> Make:
    return lambda folder: (folder / file).unlink()


def both(first: Make, second: Make) -> Make:
    def make(folder: Path) -> None:
        first(folder)
        second(folder)

    return make


def configs() -> Iterator[Hostile]:
    def case(name: str, words: tuple[str, ...], **changes: Any) -> Hostile:
        return Hostile(f"config: {name}", changed("config.json", **changes), words)

    for value in (["llama"], {"a": 1}, 7, None, "no-such-model", "", "../../etc", ...):
        yield case(f"model_type {value!r}", ("model_type",), model_type=value)
    yield case("an architecture that brings its code", ("auto_map",), model_type="x", auto_map={})
    for name, values in {
        "num_hidden_layers": (0, -1, 1_000_000, 10**12, "3", 2.5, True),
        "num_attention_heads": (0, -4, 10**9, "x"),
        "num_key_value_heads": (0, -1, 10**9, "x"),
        "head_dim": (10**10, "x", -16),
        "hidden_size": (0, -64, 10**10, "64"),
        "vocab_size": (0, -1, 10**12, "x"),
        "intermediate_size": (10**12, -1, "x"),
        "max_position_embeddings": (0, -1, "x"),
    }.items():
        for value in values:
            yield case(f"{name} {value!r}", (name,), **{name: value})
    yield case("head_dim 10**9", ("MB of tables",), head_dim=10**9)
    yield case("heads that do not divide", ("not a multiple",), num_attention_heads=7)
    yield case("heads that do not share", ("",), num_key_value_heads=3)
    for value in ("x", [1], {}, 10**400):
        yield case(f"rms_norm_eps {str(value)[:9]!r}", ("llama",), rms_norm_eps=value)
    for value in ("x", [1.0], {"a": 1}):
        yield case(f"rope_theta {value!r}", ("llama",), rope_theta=value)
    for rope in (
        {"rope_type": "yarn", "factor": 0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": "x", "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 0, "rope_theta": 10000.0},
        {"rope_type": "llama3", "rope_theta": 10000.0},
        {"rope_type": "no-such", "rope_theta": 10000.0},
        {"rope_type": ["yarn"], "rope_theta": 10000.0},
        {"rope_type": "dynamic", "factor": 0.0, "rope_theta": 0},
        ["yarn"],
        "yarn",
    ):
        yield case(f"rope {json.dumps(rope)[:60]}", ("config.json",), rope_parameters=rope)
    yield case("an activation that is none", ("llama",), hidden_act="no-such")
    yield case("an activation that is a number", ("llama",), hidden_act=5)
    for value in ("full_attention", [1, 2, 3], [["full_attention"]] * 3, {"a": 1}):
        yield case(f"layer_types {value!r}", ("llama",), layer_types=value)
    yield case("a million layer types", ("llama",), layer_types=["full_attention"] * 300_000)
    for value in ("x", 5, ["bitsandbytes"], {"quant_method": ["x"]}, {"quant_method": "gptq"}):
        yield case(f"quantization {value!r}", ("quantized",), quantization_config=value)
    for value in ("x", [[1]], -1, {"a": 1}, 10**30, [2, "x"]):
        make = both(changed("config.json", eos_token_id=value), without("generation_config.json"))
        yield Hostile(f"config: eos_token_id {value!r}", make, ("eos_token_id",))
    for value in (5, "LlamaForCausalLM", [7], {"a": 1}):
        yield case(f"architectures {value!r}", (), architectures=value)
    yield case("a config in a config", ("configs in another",), text_config=nested(50))
    yield case("attention_bias without biases", ("missing",), attention_bias=True)
    yield case("more layers than there are", ("missing",), num_hidden_layers=9)
    yield case("fewer layers than there are", ("no place",), num_hidden_layers=1)
    yield case("other sizes than there are", ("another shape",), hidden_size=128, head_dim=32)
    yield case("layers of another kind", ("layers of type",), layer_types=["linear_attention"] * 3)
    yield case("a pad token far outside", ("Padding_idx",), pad_token_id=10**6)
    yield case("an encoder", ("",), model_type="t5")
    yield case("one that sees", ("",), model_type="llava")
    yield case("names of 1 MB", (), **{"x" * (1 << 20): 1})


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"text_config": inner}
    return inner


def generation_configs() -> Iterator[Hostile]:
    for value in ("x", [[1]], -1, {"a": 1}, 2.5, [2, "x"], True):
        make = changed("generation_config.json", eos_token_id=value)
        words = ("generation_config.json", "eos_token_id")
        yield Hostile(f"generation config: eos_token_id {value!r}", make, words)
    for changes in (
        {"temperature": "hot", "top_p": [1], "top_k": None},
        {"temperature": 1e300, "repetition_penalty": -5},
        {"eos_token_id": None, "transformers_version": {"a": []}},
    ):
        make = changed("generation_config.json", **changes)
        yield Hostile(f"generation config: {changes}", make, ())


# --- weights


def weights() -> Iterator[Hostile]:
    def written(content: bytes) -> Make:
        def make(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(content)

        return make

    for name, content in list(damaged().items())[::4]:  # each of them is read by other tests
        words = ("holds no tensors",) if name == "no tensors" else ("model.safetensors",)
        yield Hostile(f"weights: {name}", written(content), words)
    many = {f"t{n}": entry([0], 0, 0, "U8") for n in range(300_000)}
    yield Hostile("weights: too many tensors", written(assemble(many)), ("262,144 tensors",))
    some = {f"model.layers.{n}.x": entry([0], 0, 0, "U8") for n in range(20_000)}
    yield Hostile("weights: many tensors of no use", written(assemble(some)), ("",))
    bomb = b'{"a": {"dtype": "F32", "shape": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}"
    yield Hostile("weights: a shape of shapes", written(assemble(bomb)), ("model.safetensors",))
    names = {"x" * (1 << 20): entry([1], 0, 4), "a": entry([1], 4, 8)}
    yield Hostile("weights: an endless name", written(assemble(names, bytes(8))), ("no end",))
    names = {"a\n\0b\x1b[31m": entry([1], 0, 4)}
    yield Hostile("weights: a strange name", written(assemble(names, bytes(4))), ("missing",))

    def only_pickles(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    yield Hostile("weights: pickles", only_pickles, ("pickled",))
    yield Hostile(
        "weights: none", lambda folder: (folder / "model.safetensors").unlink(), ("safetensors",)
    )
    for name, index in {
        "names a missing file": {"weight_map": {"a": "model-00001.safetensors"}},
        "names no file": {"weight_map": {"a": "model"}},
        "names a file elsewhere": {"weight_map": {"a": "../../etc/passwd.safetensors"}},
        "names a number": {"weight_map": {"a": 7}},
        "is a list": {"weight_map": ["model.safetensors"]},
        "is empty": {"weight_map": {}},
    }.items():

        def make(folder: Path, index: Any = index) -> None:
            # Beside the usual file an index is not looked at.
            (folder / "model.safetensors").rename(folder / "model-1.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

        yield Hostile(f"index: {name}", make, ("index.json",))

    def of_another_kind(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))

    yield Hostile("weights: whole numbers", of_another_kind, ("dtype",))

    def no_numbers(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = struct.pack("<f", float("nan")) * ((len(content) - start) // 4)
        path.write_bytes(content)

    yield Hostile("weights: no numbers", no_numbers, ())  # each request says so


# --- tokenizers


def tokenizers() -> Iterator[Hostile]:
    def replaced(document: Any) -> Make:
        text = document if isinstance(document, str) else json.dumps(document)

        def make(folder: Path) -> None:
            (folder / "tokenizer.json").write_text(text)

        return make

    def case(name: str, words: tuple[str, ...], **changes: Any) -> Hostile:
        return Hostile(f"tokenizer: {name}", changed("tokenizer.json", **changes), words)

    broken: dict[str, Any] = {
        "nothing in it": {},
        "a model of an unknown type": {"model": {"type": "no-such"}},
        "a vocabulary that is a list": {"model": {"type": "BPE", "vocab": [1], "merges": []}},
        "negative ids": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        "ids of 2**40": {"model": {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}},
        "merges of nothing": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}},
        "an empty Unigram": {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
    }
    for name, document in broken.items():
        yield Hostile(f"tokenizer: {name}", replaced(document), ("tokenizer.json",))
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a"}
    decoding = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    yield case(
        "a normalizer that doubles, forty times",
        ("normalizer", "times as much"),
        normalizer={"type": "Sequence", "normalizers": [doubled] * 40},
    )
    yield case(
        "a normalizer that puts a book before each text",
        ("normalizer", "times as much"),
        normalizer={"type": "Prepend", "prepend": "x" * (1 << 20)},
    )
    regex = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10_000}
    yield case("a normalizer that fills gaps", ("times as much",), normalizer=regex)
    charsmap = base64.b64encode(bytes(4) + b"x" * 10_000 + b"\0").decode()
    yield case(
        "a table of long texts",
        ("tokenizer.json",),
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap},
    )
    yield case(
        "a decoder that writes a book for a letter",
        ("decoder", "times as much"),
        decoder={"type": "Sequence", "decoders": [decoding, {"type": "Fuse"}]},
    )
    yield case(
        "steps without end",
        ("256 steps",),
        normalizer={"type": "Sequence", "normalizers": [step] * 2000},
    )
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 5000
    yield case(
        "five thousand tokens around a text",
        ("1024 tokens around",),
        post_processor={
            "type": "TemplateProcessing",
            "single": [*around, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    )
    yield case(
        "an expression that is none",
        ("tokenizer.json",),
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(((("},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    long = {"a" * (1 << 17): 300}

    def a_long_token(folder: Path) -> None:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text())
        document["model"]["vocab"] |= long
        path.write_text(json.dumps(document))

    yield Hostile("tokenizer: a token like a book", a_long_token, ("characters",))
    for name, text in {
        "a list": "[]",
        "no JSON": "{",
    }.items():

        def make(folder: Path, text: str = text) -> None:
            (folder / "tokenizer_config.json").write_text(text)

        yield Hostile(f"tokenizer_config: {name}", make, ("tokenizer_config.json",))
    for changes in (
        {"eos_token": 5, "bos_token": [1], "chat_template": 7},
        {"eos_token": {"content": {"a": 1}}, "chat_template": [1, {"name": "default"}, None]},
        {"eos_token": "no-such-token", "chat_template": [{"name": ["x"], "template": 5}]},
    ):
        make = changed("tokenizer_config.json", **changes)
        yield Hostile(f"tokenizer_config: {json.dumps(changes)[:50]}", make, ())
    half = changed("tokenizer_config.json", eos_token="\ud800")
    yield Hostile(
        "tokenizer_config: half a character", half, ("tokenizer_config.json", "surrogate")
    )


def templates() -> Iterator[Hostile]:
    """A template that fails is told to whoever sends a chat; only files that can't be read are a
    reason not to serve."""

    def written(content: bytes) -> Make:
        def make(folder: Path) -> None:
            (folder / "chat_template.jinja").write_bytes(content)

        return make

    yield Hostile("template: no text", written(b"\xff\xfe"), ("chat_template.jinja", "UTF-8"))
    yield Hostile("template: 5 MiB", written(b"a" * (5 << 20)), ("chat_template.jinja", "MiB"))
    for name, text in {
        "no template": "{% for %}",
        "much memory": "{{ 'a' * 10 ** 10 }}",
        "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "many names": "{% set a = 1 %}" * 5_000,
    }.items():
        yield Hostile(f"template: {name}", written(text.encode()), ())


def sentence_models() -> Iterator[Hostile]:
    for name, steps in {
        "a step elsewhere": [{"type": "x.Pooling", "path": "../../etc"}],
        "a step that is no object": [1],
        "a step of an unknown kind": [{"type": "x.Transformer"}, {"type": "x.Magic", "path": "m"}],
        "no steps": [],
        "deep": None,
    }.items():
        text = json.dumps(steps) if steps is not None else DEEP

        def make(folder: Path, text: str = text) -> None:
            (folder / "modules.json").write_text(text)

        yield Hostile(f"modules: {name}", make, ("modules.json",))


# --- paths


def paths() -> Iterator[Hostile]:
    def at(make: Callable[[Path], Path]) -> Make:
        return make

    def a_hub_folder(folder: Path) -> Path:
        """As the hub's cache has it, after its blobs were removed."""
        snapshot = folder / "models--x--y" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        for name in EVERY_FILE:
            (snapshot / name).symlink_to(f"../../blobs/{name}")
        return snapshot

    def a_linked_folder(folder: Path) -> Path:
        (folder / "link").symlink_to("link")
        return folder / "link"

    def an_empty_folder(folder: Path) -> Path:
        (folder / "empty").mkdir()
        return folder / "empty"

    def two_gguf_files(folder: Path) -> Path:
        inner = an_empty_folder(folder)
        for name in ("a.gguf", "b.gguf"):
            (inner / name).write_bytes(b"GGUF")
        return inner

    def no_utf8(folder: Path) -> Path:
        path = Path(os.fsdecode(os.fsencode(folder) + b"-\xff"))
        shutil.copytree(folder, path)
        return path

    def a_file_in_it_that_is_no_utf8(folder: Path) -> None:
        (folder / "model.safetensors").rename(
            Path(os.fsdecode(os.fsencode(folder) + b"/w-\xff.safetensors"))
        )

    yield Hostile("path: a hub folder without blobs", at(a_hub_folder), ("config.json",))
    yield Hostile("path: a link to itself", at(a_linked_folder), ("link",))
    yield Hostile("path: an empty folder", at(an_empty_folder), ("neither config.json",))
    yield Hostile("path: two GGUF files", at(two_gguf_files), ("neither config.json",))
    yield Hostile("path: no UTF-8", at(no_utf8), ("UTF-8",))
    yield Hostile("path: a file that is no UTF-8", a_file_in_it_that_is_no_utf8, ("UTF-8",))
    yield Hostile("path: nothing", lambda folder: folder / "no-such", ("does not exist",))
    yield Hostile("path: endless", lambda folder: folder / ("x" * 5000), ("too long",))
    yield Hostile("path: of nobody", lambda _folder: Path("~no-such/model"), ("~no-such",))
    yield Hostile("path: a device", lambda _folder: Path("/dev/zero"), ("/dev/zero", "device"))
    yield Hostile("path: a file that is no model", lambda folder: folder / "config.json", ("GGUF",))
    for kind, word in {pipe: "pipe", listening: "socket"}.items():

        def make(folder: Path, kind: Any = kind) -> Path:
            kind(folder / "model.gguf")
            return folder / "model.gguf"

        yield Hostile(f"path: a {kind.__name__} called .gguf", make, ("model.gguf", word))


def folders() -> list[Hostile]:
    """All that are made of a folder of Hugging Face's kind."""
    parts = (
        unreadable_kinds,
        broken_texts,
        configs,
        generation_configs,
        weights,
        tokenizers,
        templates,
        sentence_models,
        paths,
    )
    return [one for part in parts for one in part()]


# --- GGUF files


def gguf_files() -> list[Hostile]:
    """Each replaces `model.gguf`; what they say is looked at by an instance."""

    def header(num_tensors: int, num_fields: int, rest: bytes = b"", version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + rest

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def field(name: bytes, kind: int, value: bytes) -> bytes:
        return text(name) + struct.pack("<I", kind) + value

    llama = field(b"general.architecture", 8, text(b"llama"))
    strings = struct.pack("<IQ", 8, 5_000_000) + bytes(8 * 5_000_000)
    tensor = text(b"token_embd.weight")
    files: dict[str, bytes] = {
        "empty": b"",
        "a beginning": b"GGUF",
        "a text": b"a text\n" * 100,
        "zeros": bytes(1000),
        "version 99": header(0, 0, version=99),
        "nothing in it": header(0, 0),
        "2**63 tensors": header(1 << 63, 1, llama),
        "a million tensors": header(1_000_000, 1, llama + bytes(100_000)),
        "2**63 fields": header(0, 1 << 63, llama),
        "a name of 2**63 bytes": header(0, 1, struct.pack("<Q", 1 << 63)),
        "an array of 2**62 numbers": header(0, 1, field(b"a", 9, struct.pack("<IQ", 4, 1 << 62))),
        "an array of arrays": header(
            0, 1, field(b"a", 9, struct.pack("<IQ", 9, 200_000) + bytes(12 * 200_000))
        ),
        "five million empty strings": header(0, 1, field(b"a", 9, strings)),
        "a field of an unknown kind": header(0, 1, field(b"a", 99, bytes(8))),
        "a field twice": header(0, 2, llama + llama),
        "an alignment of 0": header(
            0, 2, llama + field(b"general.alignment", 4, struct.pack("<I", 0))
        ),
        "no architecture": header(0, 1, field(b"a", 4, struct.pack("<I", 0))),
        "an architecture that is a number": header(
            0, 1, field(b"general.architecture", 4, struct.pack("<I", 7))
        ),
        "an architecture that is no text": header(
            0, 1, field(b"general.architecture", 8, text(b"\xff\xfe"))
        ),
        "an architecture of nobody": header(
            0, 1, field(b"general.architecture", 8, text(b"no-such"))
        ),
        "2**32 dimensions": header(1, 1, llama + tensor + struct.pack("<I", 0xFFFFFFFF)),
        "dimensions of 2**62": header(
            1, 1, llama + tensor + struct.pack("<IQQIQ", 2, 1 << 62, 1 << 62, 0, 0)
        ),
        "an offset beyond the file": header(
            1, 1, llama + tensor + struct.pack("<IQIQ", 1, 4, 0, 1 << 60) + bytes(64)
        ),
        "a tensor of an unknown type": header(
            1, 1, llama + tensor + struct.pack("<IQIQ", 1, 4, 999, 0) + bytes(64)
        ),
        "a model of nothing": header(0, 1, llama),
    }
    found = []
    for name, content in files.items():

        def make(folder: Path, content: bytes = content) -> Path:
            (folder / "model.gguf").write_bytes(content)
            return folder / "model.gguf"

        found.append(Hostile(f"GGUF: {name}", make, ("model.gguf",)))
    said: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "a billion layers": ({"llama.block_count": 1_000_000_000}, ("num_hidden_layers",)),
        "no layers": ({"llama.block_count": 0}, ("num_hidden_layers",)),
        "no heads": ({"llama.attention.head_count": 0}, ("model.gguf",)),
        "heads of 10**9": ({"llama.attention.key_length": 10**9}, ("model.gguf",)),
        "heads that are text": ({"llama.attention.head_count": "x"}, ("model.gguf",)),
        "no width": ({"llama.embedding_length": 0}, ("model.gguf",)),
        "rotations of text": ({"llama.rope.freq_base": "x"}, ("",)),
        "scaled by nothing": (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 0.0},
            ("model.gguf", "yarn"),
        ),
        "an end that is text": ({"tokenizer.ggml.eos_token_id": "x"}, ("eos_token_id",)),
        "another end that is text": ({"tokenizer.ggml.eot_token_id": "x"}, ("eos_token_id",)),
        "a length of 0": ({"llama.context_length": 0}, ("max_position_embeddings",)),
    }
    for name, (metadata, words) in said.items():

        def make(folder: Path, metadata: Any = metadata) -> Path:
            return write_gguf(folder / "model.gguf", said=metadata)

        found.append(Hostile(f"GGUF: {name}", make, words))
    return found
