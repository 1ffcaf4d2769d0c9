"""What transformers makes of a model's texts and chats.

A program for an interpreter that has `transformers` and nothing of ours. Reads one JSON object:
`tokenizer`, a folder, or None; `is_built`, whether that has nothing but a tokenizer; `model`, a
GGUF file that is read where there is no folder; `template`, a chat template in place of the model's
own, or None; `texts`; `chats`, each a list of forms of one chat, with what else
`apply_chat_template` takes. Writes one: ids of each text, without and with what is
put around it; and of each form of each chat the prompt, or the error. Exit status 3: transformers
is not there.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        import transformers
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    if request["tokenizer"] is not None:
        kind = transformers.PreTrainedTokenizerFast if request["is_built"] else None
        tokenizer = (kind or transformers.AutoTokenizer).from_pretrained(request["tokenizer"])
    else:
        file = Path(request["model"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    answer = {
        "version": f"transformers {transformers.__version__}",
        "plain": [tokenizer.encode(one, add_special_tokens=False) for one in request["texts"]],
        "special": [tokenizer.encode(one) for one in request["texts"]],
        "chats": [
            [_rendered(tokenizer, form, request["template"]) for form in chat]
            for chat in request["chats"]
        ],
    }
    json.dump(answer, sys.stdout)
    return 0


def _rendered(tokenizer: Any, chat: dict[str, Any], template: str | None) -> dict[str, str]:
    options = {} if template is None else {"chat_template": template}
    try:
        return {"text": tokenizer.apply_chat_template(tokenize=False, **chat, **options)}
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its answer
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


if __name__ == "__main__":
    sys.exit(main())
