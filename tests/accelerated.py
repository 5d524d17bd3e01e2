"""`accelerate launch -m beyondlora train`: what a test starts it with, and what came of it."""

import os
import subprocess
import sys
from pathlib import Path

from two_processes import free_port

SOURCE = Path(__file__).resolve().parents[1] / "src"


def launch(machines: list[list[str]], recipe: Path, home: Path) -> list[tuple[int, str]]:
    """Start what each machine starts, and wait for all. Returns: their exit codes, and what they said."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")])),
        "HF_HOME": str(home),  # and with it no configuration of the person who runs the test
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    started = [
        subprocess.Popen(
            [*accelerate, *machine, "-m", "beyondlora", "train", str(recipe)],
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
