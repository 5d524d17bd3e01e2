"""`accelerate launch`: two processes, on one machine or on two, train a recipe to what one process makes of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
import torch

from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SOURCE = Path(__file__).resolve().parents[2] / "src"
ONE_MACHINE = [["--num_processes", "2"]]
TWO_MACHINES = [
    ["--num_processes", "2", "--num_machines", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
    for rank in "01"
]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(machines: list[list[str]], recipe: Path, home: Path) -> None:
    """Start what each machine starts, and wait for all."""
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "HF_HOME": str(home),  # and with it no configuration of the person who runs the test
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", free_port()]
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
        for process in started:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in started:
            process.kill()


two_machines = pytest.param(TWO_MACHINES, id="two machines", marks=pytest.mark.slow)


@pytest.mark.parametrize("machines", [pytest.param(ONE_MACHINE, id="one machine"), two_machines])
def test_two_processes_train_a_recipe_as_one_does(machines, house, tmp_path):
    options = {"adapter": small_runs.ADAPTERS["stella"], "max_steps": 6}
    half = small_runs.recipe(house, **options, per_device_train_batch_size=2, output_dir=str(tmp_path / "two"))
    (tmp_path / "recipe.yaml").write_text(half.to_yaml(), encoding="utf-8")
    launch(machines, tmp_path / "recipe.yaml", tmp_path / "home")
    train(small_runs.recipe(house, **options, per_device_train_batch_size=4, output_dir=str(tmp_path / "one")))
    one, two = (small_runs.weights(tmp_path / run / "adapter") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)  # float32 means of halves, through Adam
    mine, theirs = (small_runs.rows(tmp_path / run) for run in ("one", "two"))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]  # one process of the two keeps the record
