"""Exported adapters in llama.cpp itself: its converters take the folder, its logits are compared with the live model's.

    BEYONDLORA_SHARED=../shared python benchmarks/llama_cpp.py --keep llama-cpp --out docs/results/llama-cpp.md

Fetches the source distribution of llama-cpp-python, which holds llama.cpp and its converters, from the package index
and builds it in a virtual environment of its own: a C++ compiler and, on two cores, about twenty minutes. The folder
named by --keep is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import machine, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

from beyondlora.evaluate import open_target
from beyondlora.export import export
from beyondlora.recipe import Recipe
from beyondlora.train import train

SHARED = Path(os.environ.get("BEYONDLORA_SHARED", "../shared"))
BASE = SHARED / "models" / "stories260K"
TEXT = SHARED / "data" / "text" / "tinyshakespeare" / "input.txt"
VERSION = "0.3.36"
WINDOW = 256  # tokens a block

# Runs in the environment that has llama_cpp: model, adapter or "-", blocks of tokens; writes their logits.
ASK = """
import json, sys
import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
model, adapter, blocks, out = sys.argv[1:]
plain = {"logits_all": True, "verbose": False, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "n_ctx": 512}
llama = Llama(model, lora_path=None if adapter == "-" else adapter, **plain)
found = []
for ids in json.load(open(blocks)):
    llama.reset()
    llama.eval(ids)
    found.append(np.array(llama.scores[: len(ids)]))
np.save(out, np.stack(found))
"""
ADAPTERS: dict[str, dict[str, Any]] = {
    "StelLA, r = 8": {"recipe": "shakespeare-stella"},
    "AuroRA trained in its static form, r = 8": {"recipe": "shakespeare-aurora", "adapter": {"aurora_mode": "static"}},
}


def fetched(place: Path) -> tuple[Path, Path]:
    """The source tree of llama.cpp, and a Python that has it built."""
    source, python = place / f"llama_cpp_python-{VERSION}", place / "venv" / "bin" / "python"
    if not source.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", str(place), f"llama-cpp-python=={VERSION}"], check=True)
        with tarfile.open(next(place.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
        archive = next(place.glob("llama_cpp_python-*.tar.gz"))
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(archive)], check=True)
    if not (place / "packages").exists():  # what the converter imports beside transformers
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place / "packages")]
        subprocess.run([*pip, "sentencepiece", "protobuf"], check=True)
    return source / "vendor" / "llama.cpp", python


def converted(script: str, llama_cpp: Path, *arguments: str | Path, out: Path) -> Path:
    """A GGUF file in float32 by one of llama.cpp's own converters."""
    paths = os.pathsep.join([str(llama_cpp / "gguf-py"), str(llama_cpp.parents[2] / "packages")])
    command = [sys.executable, str(llama_cpp / script), *map(str, arguments), "--outfile", str(out), "--outtype", "f32"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    return out


def trained(recipe: str, adapter: dict[str, Any], folder: Path) -> None:
    """A run of one of configs/."""
    loaded = Recipe.load(Path("configs") / f"{recipe}.yaml")
    train(loaded.replace(adapter=loaded.adapter | adapter, output_dir=str(folder), max_eval_samples=50))


def compared(name: str, live: torch.Tensor, theirs: torch.Tensor, ids: torch.Tensor) -> str:
    """One line of the table: the largest difference of a logit, agreement on the first token, both perplexities."""
    first = (live.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    gap = (live - theirs).abs().max().item()
    ours, other = (perplexity(logits, ids) for logits in (live, theirs))
    return f"| {name} | {gap:.1e} | {live.abs().max():.1f} | {first:.2%} | {ours:.4f} | {other:.4f} |"


def perplexity(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    """Of every token but the first of each block."""
    chosen = logits_BTV[:, :-1].double().log_softmax(-1).gather(-1, ids_BT[:, 1:, None])
    return float((-chosen.mean()).exp())


def live_logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Of a model in this process, (blocks, T, vocabulary)."""
    with torch.no_grad():
        return torch.cat([model.eval()(ids_T[None]).logits for ids_T in ids_BT])


def their_logits(python: Path, model: Path, adapter: Path | None, ids_BT: torch.Tensor) -> torch.Tensor:
    """Of llama.cpp, (blocks, T, vocabulary)."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "blocks.json", Path(folder) / "logits.npy"
        asked.write_text(json.dumps(ids_BT.tolist()))
        subprocess.run([str(python), "-c", ASK, str(model), str(adapter or "-"), str(asked), str(answer)], check=True)
        return torch.from_numpy(np.load(answer))


def main() -> None:
    """Convert, ask both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder for source, build and runs")
    parser.add_argument("--blocks", type=int, default=20, help=f"blocks of {WINDOW} tokens from the end of the text")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    place = options.keep.resolve()
    place.mkdir(parents=True, exist_ok=True)
    llama_cpp, python = fetched(place)
    tokens = AutoTokenizer.from_pretrained(BASE)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    ids = torch.tensor(tokens[-options.blocks * WINDOW :]).view(options.blocks, WINDOW)
    model = converted("convert_hf_to_gguf.py", llama_cpp, BASE, out=place / "base.gguf")
    live = live_logits(AutoModelForCausalLM.from_pretrained(BASE), ids)
    rows = [compared("base model", live, their_logits(python, model, None, ids), ids)]
    for name, wanted in ADAPTERS.items():
        run = place / wanted["recipe"]
        if not (run / "metrics.json").exists():
            trained(wanted["recipe"], wanted.get("adapter", {}), run)
        with tempfile.TemporaryDirectory() as folder:
            export(run, Path(folder) / "lora")
            adapter = place / f"{run.name}.gguf"
            converted("convert_lora_to_gguf.py", llama_cpp, "--base", BASE, Path(folder) / "lora", out=adapter)
        live = live_logits(open_target(run).load(), ids)
        rows.append(compared(name, live, their_logits(python, model, adapter, ids), ids))
    publish([*head(options.blocks), *rows], options.out)


def head(blocks: int) -> list[str]:
    """What stands above the table."""
    return [
        "# Exported adapters in llama.cpp",
        "",
        "`python benchmarks/llama_cpp.py`: stories260K fine-tuned on tinyshakespeare (configs/). llama.cpp's own",
        f"scripts converted base model and adapter, and it (llama-cpp-python {VERSION}) ran them, all in float32, on",
        f"{blocks} blocks of {WINDOW} tokens. Beside it the live adapter: this package's layers, not the export.",
        f"{machine()}.",
        "",
        "| model | largest gap of a logit | largest logit | same first token | perplexity, live | in llama.cpp |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
