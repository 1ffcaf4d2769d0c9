"""Whether a tokenizer.json can be loaded and used without harm: tried out in a process of its own.

Owns that process (`python -m server.text.tokenizer_check FILE SHOWN`), which the kernel bounds in
memory and time. Invariant: what passes was loaded and has encoded and decoded text within these
bounds, so that the server can do the same. Nothing of it stays.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Final

from allocator import module_command, module_environment
from server.text.tokenizer_files import TokenizerMissing
from workers import MAX_TOKENIZER_BYTES, CheckpointError, read_file

DATA_BYTES: Final = 480 << 20
"""One of 262,144 tokens and 514,000 merges takes 400 MB while it is loaded."""
PROCESSOR_S: Final = 30
_DEADLINE_S: Final = 120.0
"""However slow the machine."""
_SAMPLES: Final = (
    "The quick brown fox jumps over the lazy dog. 0123456789, (x) = {y}; #!/usr/bin <|end|>\n\n",
    " " * 200 + "\t" * 50 + "\n" * 50,
    "a" * 1000,
    "1" * 1000,
    "éàüñ ß İ ﷺ 한국어 中文字符 ひらがな العربية עברית हिन्दी \N{GRINNING FACE}" * 4,
    "aA1 _-." * 100,
)


def try_tokenizer(file: Path, shown: Path | None = None) -> None:
    """Raises TokenizerMissing, with what is wrong with it. `shown` is what people know it by."""
    shown = shown or file
    try:
        ended = subprocess.run(  # noqa: S603 - our own interpreter and module
            module_command("server.text.tokenizer_check", os.fspath(file), os.fspath(shown)),
            env=module_environment(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TokenizerMissing(f"{shown} could not be loaded within {_DEADLINE_S:.0f} s") from error
    if ended.returncode == 0:
        return
    if ended.returncode == 1 and (words := ended.stderr.strip().rpartition("\n")[2]):
        raise TokenizerMissing(words)
    raise TokenizerMissing(
        f"{shown} can't be loaded within {DATA_BYTES >> 20} MiB and {PROCESSOR_S} s of work (the "
        f"process that tried ended with status {ended.returncode}): it is damaged, or made to do "
        "harm. Copy it anew."
    )


# --- in that process


def _main() -> int:
    file, shown = sys.argv[1:]
    for limit, value in (
        (resource.RLIMIT_DATA, DATA_BYTES),
        (resource.RLIMIT_CPU, PROCESSOR_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(limit)
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (bound, bound))
    from tokenizers import Tokenizer

    from server.text.tokenizer_limits import check_tokenizer

    try:
        try:
            tokenizer = Tokenizer.from_buffer(read_file(Path(file), MAX_TOKENIZER_BYTES))
        except CheckpointError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # plain `Exception`, or a panic, which is none
            raise TokenizerMissing(f"{shown} can't be read: {error}. Copy it anew.") from error
        check_tokenizer(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for sample in _SAMPLES:
            for encoding in tokenizer.encode_batch_fast([sample], add_special_tokens=True):
                tokenizer.decode(encoding.ids, skip_special_tokens=False)
    except (TokenizerMissing, CheckpointError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    except Exception as error:  # noqa: BLE001 - whatever the library raises
        words = " ".join(str(error).split())
        sys.stderr.write(f"{shown} can't encode text: {type(error).__name__}: {words}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
