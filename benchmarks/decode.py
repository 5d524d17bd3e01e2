"""Decoding with adapters that are not merged: the base model, PEFT's LoRA and the three methods, interleaved.

    python benchmarks/decode.py --out docs/results/decode.md [--compiled] [--rank 8] [--new 32]
    python benchmarks/decode.py --device cuda --model 1b --dtype bfloat16 --rank 32

Greedy generation with a cache on a Llama of random weights, a prompt of 32 tokens, all seven linear layers of every
block adapted. A CPU has one thread, and its time is taken. "mixed" gives every row of a batch of 16 one of two
adapters.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from llamas import SIZES, llama
from peft import LoraConfig, get_peft_model
from side_by_side import command, compare, machine, options, publish

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

METHODS: dict[str, Any] = {"LoRA": LoraConfig, "CeRA": CeraConfig, "AuroRA": AuroraConfig, "StelLA": StellaConfig}
PROMPT = 32


def models(arguments: argparse.Namespace) -> dict[str, Any]:
    """The base model and one of each method beside a copy of it, with two adapters each."""
    base = llama(arguments.model, None, getattr(torch, arguments.dtype), arguments.device).eval()
    found: dict[str, Any] = {"base": base}
    for name, config in METHODS.items():
        weights = {} if name == "StelLA" else {"init_lora_weights": False}
        make = config(r=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM", **weights)
        found[name] = get_peft_model(copy.deepcopy(base), make)
        found[name].add_adapter("other", make)
        found[name].eval()
    if arguments.compiled:
        for model in found.values():
            model.forward = torch.compile(model.forward, dynamic=True)
    return found


def generation(model: Any, rows: int, new: int, **more: Any) -> Callable[[], None]:
    """Generate so many tokens for so many rows."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(5, model.config.vocab_size, (rows, PROMPT), generator=generator).to(model.device)

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
    parser = options(__doc__, rounds=21)
    parser.add_argument("--model", choices=list(SIZES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = models(arguments)
    lines = [
        "# Decoding with adapters that are not merged",
        "",
        f"`{command()}`: r = {arguments.rank}, {arguments.rounds} rounds, {arguments.new} new tokens, "
        f"{'compiled' if arguments.compiled else 'eager'}.",
        f"{machine(arguments.device)}.",
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
        for name, ratio in compare(runs, "LoRA", arguments.rounds, arguments.device).items():
            lines.append(f"| {title} | {name} | {rows * arguments.new / ratio.seconds:.0f} | {ratio} |")
            print(lines[-1], flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
