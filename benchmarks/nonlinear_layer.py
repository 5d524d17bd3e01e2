"""AuroRA's nonlinear layer alone: the closed form against the Cox–de Boor recursion, which is its definition.

    python benchmarks/nonlinear_layer.py --out docs/results/nonlinear-layer.md

Forward and backward, float32, one thread, CPU time, interleaved; memory is what autograd saves for the backward pass.
"""

import argparse
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from side_by_side import compare, machine, publish
from torch import Tensor

from beyondlora.adapters.aurora import AdaptiveNonlinearLayer

CASES = [(rank, tokens, spline) for rank in (2, 16) for tokens in (2048, 8192) for spline in ("pooled", "per_dim")]


def saved_bytes(run: Callable[[Tensor], Tensor], z_TR: Tensor) -> int:
    """Bytes of the tensors that autograd keeps, parameters left out, each once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(z_TR)
    return sum(kept.values())


def row(rank: int, tokens: int, spline: str, rounds: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    layer = AdaptiveNonlinearLayer(rank, spline=spline)
    layer.reset_parameters()
    z_TR, g_TR = torch.randn(tokens, rank).mul(0.6).requires_grad_(), torch.randn(tokens, rank)
    weights = list(layer.parameters())

    def step(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(run(z_TR), [z_TR, *weights], g_TR) and None

    contenders = {"recursion": layer.by_definition, "again": layer.by_definition, "closed": layer.closed_form}
    ratios = compare({name: step(run) for name, run in contenders.items()}, "recursion", rounds)
    ours, theirs = (saved_bytes(contenders[name], z_TR) / 2**20 for name in ("closed", "recursion"))
    closed, again = ratios["closed"], ratios["again"]
    times = f"{closed} | {again} | {closed.seconds * 1e3:.2f}"
    return f"| {rank} | {tokens} | {spline} | {times} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.1%} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# AuroRA's nonlinear layer alone",
        "",
        f"`python benchmarks/nonlinear_layer.py`: forward and backward, float32, {arguments.rounds} rounds.",
        f"{date.today()} {machine()}.",
        "",
        "Time is the median over the rounds of time / the recursion's in the same round (quartiles); saved is what",
        "autograd keeps for the backward pass.",
        "",
        "| r | tokens | spline | closed form / recursion | recursion again | ms | saved, MiB | recursion's | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    publish(lines + [row(*case, arguments.rounds) for case in CASES], arguments.out)


if __name__ == "__main__":
    main()
