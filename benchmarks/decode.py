"""Decoding with adapters that are not merged: the base model, PEFT's LoRA and the three methods, interleaved.

    python benchmarks/decode.py --rounds 21 --out docs/results/decode.md [--compiled] [--rank 8] [--new 32]

Greedy generation with a cache on a Llama of random weights (hidden 512, 8 layers), a prompt of 32 tokens, all seven
linear layers of every block adapted; one thread, CPU time. "mixed" gives every row of a batch of 16 one of two
adapters.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import compare, machine, publish
from transformers import LlamaConfig, LlamaForCausalLM

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

METHODS: dict[str, Any] = {"LoRA": LoraConfig, "CeRA": CeraConfig, "AuroRA": AuroraConfig, "StelLA": StellaConfig}
VOCABULARY, PROMPT = 1000, 32


def models(rank: int, compiled: bool) -> dict[str, Any]:
    """The base model and one of each method beside a copy of it, with two adapters each."""
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    ).eval()
    found: dict[str, Any] = {"base": base}
    for name, config in METHODS.items():
        weights = {} if name == "StelLA" else {"init_lora_weights": False}
        make = config(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **weights)
        found[name] = get_peft_model(copy.deepcopy(base), make)
        found[name].add_adapter("other", make)
        found[name].eval()
    if compiled:
        for model in found.values():
            model.forward = torch.compile(model.forward, dynamic=True)
    return found


def generation(model: Any, rows: int, new: int, **more: Any) -> Callable[[], None]:
    """Generate so many tokens for so many rows."""
    prompt = torch.randint(5, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(1))

    @torch.inference_mode()
    def run() -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **more,
        )

    return run


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output only")
    parser.add_argument("--date", default="", help="date to record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = models(arguments.rank, arguments.compiled)
    lines = [
        "# Decoding with adapters that are not merged",
        "",
        f"`python benchmarks/decode.py`: r = {arguments.rank}, {arguments.rounds} rounds, {arguments.new} new tokens, "
        f"{'compiled' if arguments.compiled else 'eager'}.",
        f"{arguments.date} {machine()}.",
        "",
        "Time is the median over the rounds of time / LoRA's time in the same round (quartiles).",
        "",
        "| batch | model | tokens/s | time / LoRA |",
        "|---|---|---|---|",
    ]
    mixed = {"adapter_names": ["default", "other"] * 8}
    for title, rows, more in [("1", 1, {}), ("16", 16, {}), ("16, mixed", 16, mixed)]:
        runs = {name: generation(model, rows, arguments.new, **more) for name, model in found.items() if name != "base"}
        runs |= {"LoRA again": runs["LoRA"], "base": generation(found["base"], rows, arguments.new)}
        for name, ratio in compare(runs, "LoRA", arguments.rounds).items():
            lines.append(f"| {title} | {name} | {rows * arguments.new / ratio.seconds:.0f} | {ratio} |")
            print(lines[-1], flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
