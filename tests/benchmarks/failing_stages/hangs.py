"""A stage that never ends, nor does what it started in a session of its own."""

import signal
import subprocess
import sys
from pathlib import Path

from gpu.stage import Stage, main


def run(stage: Stage) -> None:
    stage.claim("told before it hangs", False)
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True
    )
    Path(sys.argv[-1]).write_text(str(child.pid))
    signal.pause()


if __name__ == "__main__":
    main(run)
