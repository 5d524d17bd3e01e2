"""AuroRA's nonlinear layer alone: the closed form against the Cox–de Boor recursion, which is its definition.

    python benchmarks/nonlinear_layer.py --out docs/results/nonlinear-layer.md [--compiled] [--device cuda]

Forward and backward, float32, interleaved; memory is what autograd saves for the backward pass. With
--compiled also `torch.compile` of the recursion, which is what a compiled model runs (it wants a C++ compiler).
"""

import argparse
from collections.abc import Callable

import torch
from side_by_side import command, compare, machine, options, publish
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


def row(rank: int, tokens: int, spline: str, arguments: argparse.Namespace) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    device = arguments.device
    layer = AdaptiveNonlinearLayer(rank, spline=spline, device=device)
    layer.reset_parameters()
    z_TR = torch.randn(tokens, rank, device=device).mul(0.6).requires_grad_()
    g_TR, weights = torch.randn(tokens, rank, device=device), list(layer.parameters())

    def step(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.grad(run(z_TR), [z_TR, *weights], g_TR) and None

    contenders = {
        "recursion": layer.by_definition,
        "again": layer.by_definition,
        "closed": layer.closed_form,
    }
    if arguments.compiled:
        torch.compiler.reset()
        contenders["compiled"] = torch.compile(layer.by_definition)
    works = {name: step(run) for name, run in contenders.items()}
    ratios = compare(works, "recursion", arguments.rounds, device, at_once=1 if device.type == "cpu" else 10)
    ours, theirs = (saved_bytes(contenders[name], z_TR) / 2**20 for name in ("closed", "recursion"))
    closed = ratios["closed"]
    times = f"{closed} | {ratios['again']} | {ratios.get('compiled', '')} | {closed.seconds * 1e3:.2f}"
    return f"| {rank} | {tokens} | {spline} | {times} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.1%} |"


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, rounds=41)
    parser.add_argument("--compiled", action="store_true", help="time torch.compile of the recursion, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# AuroRA's nonlinear layer alone",
        "",
        f"`{command()}`: forward and backward, float32, {arguments.rounds} rounds.",
        f"{machine(arguments.device)}.",
        "",
        "Time is the median over the rounds of time / the recursion's in the same round (quartiles); saved is what",
        "autograd keeps for the backward pass.",
        "",
        "| r | tokens | spline | closed form / recursion | recursion again | compiled | ms | saved, MiB | recursion's "
        "| share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    publish(lines + [row(*case, arguments) for case in CASES], arguments.out)


if __name__ == "__main__":
    main()
