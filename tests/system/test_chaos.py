"""The benchmark of killed and stopped processes, for a few seconds, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon_process import ROOT
from tests.quick import usual_or_long
from tests.system.running_server import TIMEOUT_S
from tests.workers.tiny_models import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.slow

NUM_STOPS = usual_or_long(1, 7)
"""Of a server all of whose other processes hang, and in the long run of all others."""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def test_no_request_suffers_from_what_is_done_to_processes(
    tmp_path: Path, tokenizer_cache: Path
) -> None:
    model = write_tokenizer(
        write_checkpoint(tmp_path / "tiny", "llama", max_position_embeddings=4096)
    )
    (model / "chat_template.jinja").write_text(TEMPLATE)
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/chaos.py", "--model", str(model), "--every", "0.6"),
            *("--seconds", usual_or_long("3", "12"), "--stops", str(NUM_STOPS)),
            *("--streams", "8", "--max-tokens", "40"),
            "--serve=--hang-timeout=1",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ONECOPY_CACHE_DIR": str(tokenizer_cache)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout, done.stderr
    document = json.loads(done.stdout)
    failures = [one for one in document["failures"] if "took" not in one]  # the machine may be slow
    assert failures == [], done.stderr
    for phase in document["phases"].values():
        assert phase["num_requests"] > 0
        assert phase["num_faults"]
    assert [stop["left"] for stop in document["stops"]] == [[]] * NUM_STOPS
