"""`accelerate launch … train recipe.yaml`: what a test starts it with, and what came of it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from two_processes import free_port

TESTS = Path(__file__).resolve().parent


def launch(
    machines: list[list[str]],
    recipe: Path,
    home: Path,
    *,
    program: Sequence[str] = ("-m", "beyondlora"),
    options: Sequence[str] = (),
    **variables: str,
) -> list[tuple[int, str]]:
    """Start what each machine starts, and wait for all. Returns: their exit codes, and what they said."""
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH")]
    environment = (
        os.environ
        | variables
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HOME": str(home),  # and with it no configuration of the person who runs the test
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
    )
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    started = [
        subprocess.Popen(
            [*accelerate, *machine, *program, "train", str(recipe), *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for machine in machines
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
    finally:
        for process in started:
            process.kill()
