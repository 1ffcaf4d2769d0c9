"""A stage of which one part fails, one can't run, and one is fine."""

from gpu.stage import NotRun, Stage, main


def run(stage: Stage) -> None:
    with stage.part("first"):
        stage.claim("told before the fault", True, number=1)
        raise ValueError("what went wrong")
    with stage.part("second"):
        raise NotRun("nothing to run it on")
    with stage.part("third"):
        stage.figure("answer_ms", 42)


if __name__ == "__main__":
    main(run)
