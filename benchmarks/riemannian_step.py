"""What StelLA's step costs: ours, the authors' algorithm, and AdamW on the same factors, interleaved in one process.

    python benchmarks/riemannian_step.py [--rank 32] [--sizes 4096x24,1024x8,14336x8] [--threads 1] [--rounds 21]

Both sides do the step before (gradient conversion, keeping Y) and the step after (scaling, projection, retraction), in
float32, on the shapes of LLaMA3-8B. The reference is the authors' algorithm as their paper and METHODS of this
project describe it: factors of one shape are stacked, and the polar factor is a batched SVD. CPU time; the row A/A is
the reference against itself.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from beyondlora.manifold import StiefelLinear
from beyondlora.manifold.moves import plan


class Authors:
    """The authors' algorithm on stacks of factors."""

    def __init__(self, groups: list[list[StiefelLinear]]) -> None:
        self.groups = groups
        self.kept: list[Tensor] = []

    def before(self) -> None:
        """G ← G − Y Gᵀ Y, and keep Y."""
        self.kept = []
        for group in self.groups:
            Y = torch.stack([layer.weight.detach() for layer in group])
            G = torch.stack([layer.weight.grad for layer in group])
            for layer, gradient in zip(group, G - Y @ (G.mT @ Y), strict=True):
                layer.weight.grad.copy_(gradient)
            self.kept.append(Y)

    def after(self) -> None:
        """Scale, project onto the tangent space, retract by SVD."""
        for group, Y in zip(self.groups, self.kept, strict=True):
            step = (torch.stack([layer.weight.detach() for layer in group]) - Y) * group[0].step_scale
            H = Y.mT @ step
            Z = Y + step - Y @ ((H + H.mT) / 2)
            U, _, Vh = torch.linalg.svd(Z, full_matrices=False, driver="gesvda" if Z.is_cuda else None)
            for layer, new in zip(group, U @ Vh, strict=True):
                layer.weight.copy_(new)


class Ours:
    """The package's step, with its buffers kept as in training."""

    def __init__(self, groups: list[list[StiefelLinear]]) -> None:
        self.moves = plan([layer for group in groups for layer in group])

    def before(self) -> None:
        """Every move's beginning."""
        for move in self.moves:
            move.begin()

    def after(self) -> None:
        """Every move's end."""
        for move in self.moves:
            move.end()


@torch.no_grad()
def main() -> None:
    """Time and print one table row a comparison."""
    options = argparse.ArgumentParser()
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--sizes", default="4096x24,1024x8,14336x8")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=21)
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    shapes = [tuple(map(int, size.split("x"))) for size in chosen.sizes.split(",")]
    groups = [
        [StiefelLinear(chosen.rank, rows, step_scale=(4096 / rows) ** 0.5) for _ in range(count)]
        for rows, count in shapes
    ]
    layers = [layer for group in groups for layer in group]
    update = [5e-4 * torch.randn_like(layer.weight).sign() for layer in layers]
    for layer in layers:
        layer.weight.grad = torch.randn_like(layer.weight)
    authors, ours = Authors(groups), Ours(groups)
    twins = [torch.nn.Parameter(layer.weight.clone()) for layer in layers]
    for twin, layer in zip(twins, layers, strict=True):
        twin.grad = layer.weight.grad.clone()
    adamw = torch.optim.AdamW(twins, foreach=True)

    def step(side: Authors | Ours) -> float:
        spent = timed(side.before)
        torch._foreach_add_([layer.weight for layer in layers], update)
        return spent + timed(side.after)

    sides = {
        "reference": lambda: step(authors),
        "A/A": lambda: step(authors),
        "ours": lambda: step(ours),
        "AdamW(foreach)": lambda: timed(adamw.step),
    }
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(chosen.rounds):
        for name in list(sides) if number % 2 else list(reversed(sides)):
            times[name].append(sides[name]())
    report(chosen, times)


def timed(work: Callable[[], object]) -> float:
    """Seconds of CPU time (one thread) or of the clock (several) that a call takes."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    work()
    return clock() - begin


def report(chosen: argparse.Namespace, times: dict[str, list[float]]) -> None:
    """One row of the table."""

    def ratio(top: str, bottom: str) -> str:
        values = sorted(a / b for a, b in zip(times[top], times[bottom], strict=True))
        low, _, high = statistics.quantiles(values, n=4)
        return f"{statistics.median(values):.2f} ({low:.2f}–{high:.2f})"

    ms = {name: f"{1e3 * statistics.median(values):.1f}" for name, values in times.items()}
    print(f"python {platform.python_version()}, torch {torch.__version__}, {chosen.rounds} rounds", flush=True)
    print(
        f"| {chosen.sizes} | {chosen.rank} | {chosen.threads} | {ms['reference']} | {ms['ours']} | "
        f"{ratio('reference', 'ours')} | {ratio('A/A', 'reference')} | {ratio('ours', 'AdamW(foreach)')} |"
    )


if __name__ == "__main__":
    main()
