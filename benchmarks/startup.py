"""What starting costs: the command's help, the import beside PEFT's, adapters into 1,000 layers, and file sizes.

    python benchmarks/startup.py --rounds 11 --out docs/results/startup.md

CPU time of whole processes, interleaved; injection and files in this process, one thread.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import compare, machine, publish
from torch import nn

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

METHODS: dict[str, Any] = {"LoRA": LoraConfig, "CeRA": CeraConfig, "AuroRA": AuroraConfig, "StelLA": StellaConfig}
COMMANDS = {
    "beyondlora --help": [str(Path(sys.executable).parent / "beyondlora"), "--help"],
    "import peft": [sys.executable, "-c", "import peft"],
    "import peft, beyondlora": [sys.executable, "-c", "import peft, beyondlora"],
    "import beyondlora": [sys.executable, "-c", "import beyondlora"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process and what it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Layers(nn.Module):
    """A thousand linear layers of width 64."""

    def __init__(self, width: int = 64, count: int = 1000) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        for layer in self.layers:
            x = layer(x)
        return x


def saved_bytes(config: Any) -> tuple[int, int]:
    """Bytes of the weights that train, and of the file they are saved in."""
    model = get_peft_model(Layers(512, 8), config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return sum(p.nbytes for p in model.parameters() if p.requires_grad), stored


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, command in COMMANDS.items():
            times[name].append(cpu_seconds(command))
    lines = ["# What starting costs", "", f"`python benchmarks/startup.py`. {machine()}.", ""]
    lines += ["| process | CPU seconds, median (least–most) |", "|---|---|"]
    for name, values in times.items():
        lines.append(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f}) |")
    both, alone = times["import peft, beyondlora"], times["import peft"]
    added = statistics.median(a - b for a, b in zip(both, alone, strict=True))
    lines += ["", f"Importing it beside PEFT adds {added:.2f} s (median of the differences of a round).", ""]
    configs = {name: kind(r=8, target_modules=r"layers\.\d+") for name, kind in METHODS.items()}
    works = {name: lambda config=config: get_peft_model(Layers(), config) for name, config in configs.items()}
    wide = StellaConfig(r=32, target_modules=r"layers\.\d+")
    lines += ["| adapters into 1,000 layers of 64 | seconds | time / LoRA |", "|---|---|---|"]
    for name, ratio in compare(works, "LoRA", max(3, arguments.rounds // 3)).items():
        lines.append(f"| {name} | {ratio.seconds:.2f} | {ratio} |")
    start = compare(
        {"StelLA": lambda: get_peft_model(Layers(4096, 2), wide), "base": lambda: Layers(4096, 2)}, "base", 3
    )
    spent = start["StelLA"].seconds - start["base"].seconds
    lines += ["", f"StelLA beside a 4096×4096 layer at r = 32: {spent / 2:.3f} s a layer beyond making the layer.", ""]
    lines += ["| adapter of 8 layers of 512 | bytes that train | file | file / bytes |", "|---|---|---|---|"]
    for name, config in configs.items():
        trained, stored = saved_bytes(config)
        lines.append(f"| {name} | {trained} | {stored} | {stored / trained:.3f} |")
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
