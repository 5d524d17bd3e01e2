"""Every recipe of configs/ once with LoRA and once with each method of ours; one table.

    python benchmarks/first_runs.py --runs runs/first --out docs/results/first-runs.md

The recipe's own learning rate serves all methods, no rate is tuned and no run repeated: the table shows that the
recipes work and what they cost, not which method is better (for that, sweep rates and seeds). The figure is that of
the best checkpoint on the evaluation split itself. Finished runs are kept: interrupt the command, and give it again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import __version__ as peft_version
from transformers import __version__ as transformers_version

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 8, "lora_alpha": 8},
    "CeRA": {"peft_type": "CERA", "r": 8},
    "AuroRA": {"peft_type": "AURORA", "r": 2, "lora_alpha": 4},
    "StelLA": {"peft_type": "STELLA", "r": 8, "lora_alpha": 8},
}
RECIPES = ["shakespeare-lora", "gsm8k", "rte", "cola", "sst2", "stsb", "cifar10", "dtd10"]
HEADLINE = {
    "causal-lm": "perplexity",
    "sequence-classification": "accuracy",
    "sequence-regression": "pearson",
    "image-classification": "accuracy",
}


def adapter_block(recipe: dict[str, Any], method: str) -> dict[str, Any]:
    """The recipe's targets and head with the method's type, rank and alpha."""
    kept = {key: recipe["adapter"][key] for key in ("target_modules", "modules_to_save") if key in recipe["adapter"]}
    return METHODS[method] | kept


def command(name: str, recipe: dict[str, Any], method: str, folder: Path) -> list[str]:
    """The command line of one run."""
    block = yaml.safe_dump(adapter_block(recipe, method), default_flow_style=True, width=1000).strip()
    words = ["beyondlora", "train", f"configs/{name}.yaml", "--set", f"adapter={block}"]
    return [*words, "--set", f"output_dir={folder}"]


def run(name: str, method: str, runs: Path) -> dict[str, Any]:
    """Train once, unless the run is there already; returns its metrics.json and its command."""
    recipe = yaml.safe_load(Path(f"configs/{name}.yaml").read_text(encoding="utf-8"))
    folder = runs / f"{name.removesuffix('-lora')}-{method.lower()}"
    words = command(name, recipe, method, folder)
    if not (folder / "metrics.json").exists():
        print(f"{name} with {method}", flush=True)
        again = ["--overwrite"] if folder.exists() else []
        subprocess.run([sys.executable, "-m", *words, *again], check=True, stdout=subprocess.DEVNULL)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics | {"command": words, "learning_rate": recipe["learning_rate"], "max_steps": recipe["max_steps"]}


def row(name: str, method: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    metric = HEADLINE[result["task"]]
    score = result["metrics"][metric]
    cells = [name.removesuffix("-lora"), method, METHODS[method]["r"], result["learning_rate"]]
    cells += [f"{result['trainable_parameters']:,}", f"{metric} {score['value']:.4f} ± {score['stderr']:.4f}"]
    return "| " + " | ".join(map(str, [*cells, f"{score['n']:,}", f"{result['seconds']:.0f}"])) + " |"


def machine() -> str:
    """What the figures were made on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} torch threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers_version}, "
        f"peft {peft_version}, commit {commit}"
    )


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/first"), help="where the run folders go")
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    arguments = parser.parse_args()
    lines = ["| recipe | method | r | learning rate | trainable parameters | evaluation | n | seconds |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    commands = []
    for name in arguments.recipes:
        for method in METHODS:
            result = run(name, method, arguments.runs)
            lines.append(row(name, method, result))
            commands.append(subprocess.list2cmdline(result["command"]))
    head = ["# First runs", "", *(__doc__ or "").strip().splitlines()[4:], "", f"{date.today()}, {machine()}."]
    text = "\n".join([*head, "", *lines, "", "The command of each run:", "", "```text", *commands, "```", ""])
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
