"""One adapted linear layer, forward and backward: what LoRA costs, and what the three methods cost beside it.

    python benchmarks/branch.py --out docs/results/branch.md
    python benchmarks/branch.py --layers 64x64 --ranks 8 --tokens 8 --at-once 200   # next to no arithmetic
    python benchmarks/branch.py --device cuda --dtype bfloat16 --layers 4096x4096 4096x14336 --ranks 16 32 --tokens 4096

float32, or a bfloat16 layer with float32 adapters (--dtype bfloat16), as PEFT makes them. A CPU has one thread, and its
time is taken; on an accelerator bfloat16 runs under autocast. Every contender does the same layer, rank and input.
"base" is the frozen layer with the gradient of its input only: what no adapter can go below.
"""

import argparse
import itertools
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from side_by_side import autocast, command, compare, machine, options, peak_bytes, publish
from torch import nn

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

METHODS: dict[str, Any] = {
    "LoRA": lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False),
    "LoRA again": lambda r: LoraConfig(r=r, lora_alpha=r, target_modules=["0"], init_lora_weights=False),
    "LoRA+drop": lambda r: LoraConfig(
        r=r, lora_alpha=r, lora_dropout=0.05, target_modules=["0"], init_lora_weights=False
    ),
    "base": None,
    "CeRA": lambda r: CeraConfig(r=r, target_modules=["0"], init_lora_weights=False),
    "AuroRA": lambda r: AuroraConfig(r=r, target_modules=["0"], init_lora_weights=False),
    "AuroRA+drop": lambda r: AuroraConfig(r=r, lora_dropout=0.05, target_modules=["0"], init_lora_weights=False),
    "StelLA": lambda r: StellaConfig(r=r, target_modules=["0"]),
    "StelLA+drop": lambda r: StellaConfig(r=r, lora_dropout=0.05, target_modules=["0"]),
}


def layer(method: str, base: nn.Linear, rank: int) -> nn.Module:
    """The base layer in a model, with the method's adapter."""
    model = nn.Sequential(nn.Linear(base.in_features, base.out_features, bias=False, device="meta"))
    model[0] = base  # the weight is shared by all contenders
    make = METHODS[method]
    if make is not None:
        model = inject_adapter_in_model(make(rank), model)
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.data = weight.data.float()  # as get_peft_model does
    return model.train()


class Step:
    """Forward and backward of one contender; gradients are freed after it."""

    def __init__(self, model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> None:
        self.model, self.x, self.upstream = model, x, upstream

    def __call__(self) -> None:
        """Once."""
        with autocast(self.x.device, self.x.dtype):
            y = self.model(self.x)
        y.backward(self.upstream)
        self.x.grad = None
        self.model.zero_grad()


def rows(inputs: int, outputs: int, rank: int, tokens: int, arguments: argparse.Namespace) -> list[str]:
    """The table's lines for one shape."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    at_once = arguments.at_once or (1 if device.type == "cpu" else 10)
    base = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device).requires_grad_(False)
    x = torch.randn(1, tokens, inputs, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(1, tokens, outputs, dtype=dtype, device=device)
    steps = {method: Step(layer(method, base, rank), x, upstream) for method in METHODS}
    peaks = {method: peak_bytes(step, device) for method, step in steps.items()}
    ratios = compare(steps, "LoRA", arguments.rounds, device, at_once=at_once)
    head = f"| {inputs}→{outputs} | {rank} | {tokens} |"
    lora, dropping = "LoRA", "LoRA+drop"
    return [
        f"{head} {method} | {ratio} | {ratio.median / ratios[dropping].median:.2f} | {ratio.ms} | "
        f"{peaks[method] / peaks[lora]:.2f} | {peaks[method] / peaks[dropping]:.2f} | {peaks[method] / 2**20:.1f} |"
        for method, ratio in ratios.items()
    ]


def shape(word: str) -> tuple[int, int]:
    """A layer's widths N and M from "NxM"."""
    inputs, outputs = map(int, word.split("x"))
    return inputs, outputs


def main() -> None:
    """Measure and write the table."""
    parser = options(__doc__, rounds=21)
    layers = [(768, 3072), (2048, 2048), (4096, 4096)]
    parser.add_argument("--layers", type=shape, nargs="+", default=layers, help="widths: inputs x outputs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen layer")
    parser.add_argument("--at-once", type=int, help="calls a timing; default: 1, on an accelerator 10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# One adapted linear layer, forward and backward",
        "",
        f"`{command()}`: {arguments.dtype}, {arguments.rounds} rounds, interleaved in one process.",
        f"{machine(arguments.device)}.",
        "",
        "Time is the median over the rounds of time / LoRA's time in the same round (quartiles); memory the peak of",
        "tensor bytes during the step beyond weights, input and upstream gradient.",
        "",
        "| layer | r | tokens | method | time / LoRA | / LoRA+drop | ms | memory / LoRA | / LoRA+drop | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for widths, rank, tokens in itertools.product(arguments.layers, arguments.ranks, arguments.tokens):
        lines += rows(*widths, rank, tokens, arguments)
        print(*lines[-len(METHODS) :], sep="\n", flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
