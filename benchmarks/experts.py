"""The experts of one layer of a mixture, forward and backward: PEFT's LoRA of their parameters, and an adapter each.

    python benchmarks/experts.py --out docs/results/experts.md
    python benchmarks/experts.py --device cuda --dtype bfloat16 --layers 2048x768x128x8 --ranks 16 --tokens 8192

A layer is hidden x intermediate x experts x experts of a token, of transformers' Qwen3-MoE, computed as transformers
chooses ("grouped_mm"). PEFT's LoRA computes W + B A of all experts in every forward; here each expert's tokens pass
beside its own weight. "base" is the frozen layer with the gradient of its input only.
"""

import argparse
import copy
import itertools
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from side_by_side import autocast, command, compare, machine, options, peak_bytes, publish
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
METHODS: dict[str, Any] = {
    "LoRA": LoraConfig,
    "LoRA again": LoraConfig,
    "base": None,
    "CeRA": CeraConfig,
    "AuroRA": AuroraConfig,
    "StelLA": StellaConfig,
}


class Layer(nn.Module):
    """The experts, where an adapter finds them."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Through the experts."""
        y: torch.Tensor = self.experts(x, index, weights)
        return y


def layer(method: str, experts: nn.Module, rank: int) -> nn.Module:
    """The experts with the method's adapters; their weights are shared by all contenders."""
    model = nn.Sequential(Layer(copy.deepcopy(experts, {id(weight): weight for weight in experts.parameters()})))
    if (config := METHODS[method]) is not None:
        config = config(r=rank, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
        model = inject_adapter_in_model(config, model)
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.data = weight.data.float()  # as get_peft_model does
    return model[0].train()


class Step:
    """Forward and backward of one contender; gradients are freed after it."""

    def __init__(self, model: nn.Module, inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor) -> None:
        self.model, self.inputs, self.upstream = model, inputs, upstream

    def __call__(self) -> None:
        """Once."""
        x = self.inputs[0]
        with autocast(x.device, x.dtype):
            y = self.model(*self.inputs)
        y.backward(self.upstream)
        x.grad = None
        self.model.zero_grad()


def rows(shape: list[int], rank: int, tokens: int, arguments: argparse.Namespace) -> list[str]:
    """The table's lines for one shape."""
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    hidden, intermediate, count, chosen = shape
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=count)
    config._experts_implementation = arguments.computed_by
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
        for weight in experts.parameters():
            nn.init.normal_(weight, std=0.02)
        x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
        weights, index = torch.randn(tokens, count).softmax(-1).topk(chosen)
        upstream = torch.randn(tokens, hidden, dtype=dtype)
    steps = {method: Step(layer(method, experts, rank), (x, index, weights.to(dtype)), upstream) for method in METHODS}
    peaks = {method: peak_bytes(step, device) for method, step in steps.items()}
    ratios = compare(steps, "LoRA", arguments.rounds, device)
    head = f"| {hidden}, {intermediate} | {chosen} of {count} | {rank} | {tokens:,} |"
    return [
        f"{head} {method} | {ratio} | {ratio.seconds * 1e3:,.0f} | {peaks[method] / peaks['LoRA']:.2f} | "
        f"{peaks[method] / 2**20:,.0f} |"
        for method, ratio in ratios.items()
    ]


def sizes(word: str) -> list[int]:
    """A layer from "HIDDENxINTERMEDIATExEXPERTSxCHOSEN"."""
    hidden, intermediate, count, chosen = map(int, word.split("x"))
    return [hidden, intermediate, count, chosen]


def main() -> None:
    """Measure and write the table."""
    parser = options(__doc__, rounds=21)
    layers = [[512, 384, 32, 4], [2048, 768, 32, 8]]
    parser.add_argument(
        "--layers", type=sizes, nargs="+", default=layers, help="hidden x intermediate x experts x chosen"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen experts")
    parser.add_argument("--computed-by", default="grouped_mm", help="transformers' experts_implementation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [
        "# The experts of one layer of a mixture, forward and backward",
        "",
        f"`{command()}`: {arguments.dtype}, {arguments.rounds} rounds, interleaved in one process.",
        f"{machine(arguments.device)}.",
        "",
        "PEFT's LoRA computes W + B A of all experts in every forward; the three methods pass each expert's tokens",
        "beside its own weight. Time is the median over the rounds of time / LoRA's in the same round (quartiles),",
        "memory the peak of tensor bytes during the step beyond weights, input and upstream gradient.",
        "",
        "| hidden, intermediate | experts | r | tokens | method | time / LoRA | ms | memory / LoRA | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, rank, tokens in itertools.product(arguments.layers, arguments.ranks, arguments.tokens):
        lines += rows(shape, rank, tokens, arguments)
        print(*lines[-len(METHODS) :], sep="\n", flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
