"""What an adapted linear layer asks of a GPU, forward and backward: kernels launched, bytes moved. Counted, not timed.

    python benchmarks/device_traffic.py --out docs/results/device-traffic.md

Needs no GPU. The layers run on a device that is written in Python (tests/pretend.py) and has shapes only; every
operation that reaches it is counted as one kernel that reads its arguments and writes its results. A bound follows,
from a data sheet: each kernel takes as long as its bytes or its products need at the very least. A real GPU reaches
neither, has caches, and waits between kernels.
"""

import argparse
import math
import sys
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
from branch import METHODS, layer
from side_by_side import publish
from torch import Tensor, nn
from torch.utils import _pytree

from beyondlora.manifold.guard import settle
from beyondlora.manifold.linear import StiefelLinear

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import pretend

SETTINGS = {  # of the layer, of the adapters, whether under autocast
    "bfloat16, autocast": (torch.bfloat16, torch.float32, True),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "bfloat16, float32 adapters": (torch.bfloat16, torch.float32, False),
    "float32": (torch.float32, torch.float32, False),
}
LLAMA = {4096: 192, 1024: 64, 14336: 64}  # rows of the factors of LLaMA3-8B's commonsense recipe: how many
SHAPES = [(4096, 4096), (4096, 14336)]
BANDWIDTH = 4.8e12  # bytes a second: NVIDIA's data sheet of the H200 SXM
PRODUCTS = {torch.bfloat16: 989e12, torch.float32: 67e12, torch.float64: 67e12}  # operations a second, dense, no TF32
VIEWS = {"view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand", "slice", "select", "unsqueeze"}
VIEWS |= {"squeeze", "permute", "as_strided", "split", "unbind", "diagonal", "split_with_sizes"}
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"}
WRITES_ONLY = {"copy_", "fill_", "zero_", "random_", "bernoulli_"}  # what they are called on
PRODUCT_NAMES = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


class Count:
    """Kernels, bytes and the least time, of what has run so far."""

    def __init__(self) -> None:
        self.kernels = self.bytes = 0
        self.seconds = 0.0

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take in an operation; see `pretend.Watcher`."""
        if name in VIEWS:
            return
        read = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        if name in WRITES_ONLY:
            read = read[1:]
        written = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        moved = sum(map(size, read)) + sum(map(size, written))
        seconds = moved / BANDWIDTH
        if name in PRODUCT_NAMES:
            left, right = read[-2:]
            operations = 2 * left.numel() * right.shape[-1]
            seconds = max(seconds, operations / PRODUCTS[left.dtype])
        self.kernels += 1
        self.bytes += moved
        self.seconds += seconds


def size(tensor: Tensor) -> int:
    """Bytes that a tensor really holds: an expanded dimension holds nothing."""
    held = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(held) * tensor.itemsize


def count(method: str, shape: tuple[int, int], rank: int, tokens: int, setting: str) -> tuple[Count, int]:
    """Run one layer once. Returns: the count, and how many kernels the forward pass took."""
    dtype, adapters, autocast = SETTINGS[setting]
    base = nn.Linear(*shape, bias=False, dtype=dtype, device="meta").requires_grad_(False)
    model = layer(method, base, rank)
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        weight.data = weight.data.to(adapters)
    model = on_the_device(model)
    x = torch.empty(1, tokens, shape[0], dtype=dtype, device=pretend.NAME).requires_grad_()
    upstream = torch.empty(1, tokens, shape[1], dtype=dtype, device=pretend.NAME)
    counted = Count()
    with pretend.watched(counted):
        with torch.autocast(pretend.NAME, torch.bfloat16) if autocast else nullcontext():
            y = model(x)
        forward = counted.kernels
        y.backward(upstream)
    return counted, forward


def layer_rows(shape: tuple[int, int], rank: int, tokens: int, setting: str) -> list[str]:
    """Of one layer in one setting, a row a method."""
    found = {
        method: count(method, shape, rank // 2 if method.startswith("AuroRA") else rank, tokens, setting)
        for method in METHODS
        if method != "LoRA again"
    }
    base, lora, drop = (found[name][0] for name in ("base", "LoRA", "LoRA+drop"))
    return [
        f"| {shape[0]}→{shape[1]} | {setting} | {method} | {forward} + {counted.kernels - forward} "
        f"| {counted.bytes / 2**30:.2f} | {(counted.bytes - base.bytes) / (lora.bytes - base.bytes):.2f} "
        f"| {counted.seconds * 1e3:.2f} | {counted.seconds / lora.seconds:.2f} "
        f"| {counted.seconds / drop.seconds:.2f} |"
        for method, (counted, forward) in found.items()
    ]


def step_row(implementation: str, rank: int) -> str:
    """What AdamW takes on plain weights, and how much more on Stiefel factors of the same shapes."""
    heights = [rows for rows, times in LLAMA.items() for _ in range(times)]
    plain = [on_the_device(nn.Linear(rank, rows, bias=False, device="meta")) for rows in heights]
    factors = [on_the_device(StiefelLinear(rank, rows, device="meta")) for rows in heights]
    for factor in factors:
        settle(factor)
    alone = count_step([layer.weight for layer in plain], implementation)
    pretend.waits.clear()
    both = count_step([factor.weight for factor in factors], implementation)
    return (
        f"| {implementation} | {alone.kernels} | {alone.bytes / 2**30:.2f} | {both.kernels - alone.kernels} "
        f"| {(both.bytes - alone.bytes) / 2**30:.2f} | {(both.seconds - alone.seconds) * 1e3:.2f} "
        f"| {len(pretend.waits)} |"
    )


def count_step(weights: list[nn.Parameter], implementation: str) -> Count:
    """The second step of AdamW on these weights."""
    optimizer = torch.optim.AdamW(weights, **{implementation: True})
    for _ in range(2):
        counted = Count()
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        with pretend.watched(counted):
            optimizer.step()
    return counted


def on_the_device(model: Any) -> Any:
    """The model with weights that are shapes on the device."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            away = torch.empty(weight.shape, dtype=weight.dtype, device=pretend.NAME)
            module._parameters[name] = nn.Parameter(away, requires_grad=weight.requires_grad)
    return model


def main() -> None:
    """Count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32, help="AuroRA's is half of it")
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output")
    arguments = parser.parse_args()
    lines = [
        "# What a layer asks of a GPU: kernels and bytes, counted",
        "",
        f"`python benchmarks/device_traffic.py`: one linear layer, forward and backward, {arguments.tokens} tokens, "
        f"r = {arguments.rank} (AuroRA {arguments.rank // 2}). {date.today()}, torch {torch.__version__}, "
        f"peft {peft.__version__}.",
        "",
        "**No GPU was at hand: nothing here is a time.** Operations are counted on a device that is written in Python",
        "and has shapes only; GiB are what each of them reads and writes. The bound is the time that none of them can",
        "go below at the bandwidth and the arithmetic of the H200's data sheet (4.8 TB/s; 989 TFLOP/s in bfloat16, 67",
        "in float32), added up. A real one reaches neither, has caches, and waits for the launch of a small kernel.",
        "",
        "| layer | dtype | method | kernels | GiB | beyond base, / LoRA's | bound, ms | / LoRA | / LoRA+drop |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with pretend.standing_for("cuda", numbers=False):
        for shape in SHAPES:
            for setting in SETTINGS:
                lines += layer_rows(shape, arguments.rank, arguments.tokens, setting)
        lines += [
            "",
            f"The Riemannian step of LLaMA3-8B's 320 factors, r = {arguments.rank}, float32, around AdamW. Its own is",
            "what the hooks add to the optimizer's own; waits are operations for whose result the CPU would wait.",
            "",
            "| AdamW | its kernels | its GiB | the step's kernels | its GiB | its bound, ms | waits |",
            "|---|---|---|---|---|---|---|",
            *(step_row(implementation, arguments.rank) for implementation in ("fused", "foreach")),
        ]
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
