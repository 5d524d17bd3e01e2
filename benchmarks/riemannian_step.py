"""What StelLA's step costs: ours, the authors' algorithm, and AdamW on the same factors, interleaved in one process.

    python benchmarks/riemannian_step.py [--rank 32] [--layers 4] [--threads 1] [--rounds 21] [--share]
    python benchmarks/riemannian_step.py --device cuda --layers 32 --share

The factors are those of LLaMA3-8B with q, k, v, up and down projections adapted, stored as StelLA stores them: U tall,
Vᵀ wide; ten a layer of the model. float32. The reference is the authors' algorithm as their paper and METHODS of this
project describe it: factors of one shape are stacked, and the polar factor is a batched SVD. Ours is what a user's
optimizer runs, hooks and guard and all; neither side's figure holds the optimizer's own step. A/A is the reference
against itself; memory is the most that is held beside the factors and their gradients, in bytes of the factors. With
--share the linear layers of one model layer go forward and backward on 2,048 tokens: in float32, on an accelerator in
bfloat16 under autocast. There every figure is the clock's, from an idle device to an idle device.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable

import torch
from side_by_side import autocast, compare, machine, options, peak_bytes, publish, seconds
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from beyondlora.manifold import StiefelLinear, riemannian

SIZES = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}  # N, M
TOKENS = 2048


def factors(rank: int, device: torch.device) -> list[StiefelLinear]:
    """U and Vᵀ of one layer's projections, gradient scaling on."""
    make = functools.partial(StiefelLinear, device=device)
    pairs = [(make(rank, M), make(N, rank)) for N, M in SIZES.values()]
    for factor in itertools.chain.from_iterable(pairs):
        factor.step_scale = (4096 / max(factor.weight.shape)) ** 0.5
    return list(itertools.chain.from_iterable(pairs))


def model(rank: int, count: int, device: torch.device) -> list[StiefelLinear]:
    """The factors of so many layers, with gradients."""
    layers = [factor for _ in range(count) for factor in factors(rank, device)]
    for layer in layers:
        layer.weight.grad = torch.randn_like(layer.weight)
    return layers


class Authors:
    """The authors' algorithm on stacks of factors."""

    def __init__(self, layers: list[StiefelLinear]) -> None:
        shape = lambda layer: layer.orthonormal.shape  # noqa: E731
        self.groups = [list(group) for _, group in itertools.groupby(sorted(layers, key=shape), key=shape)]
        self.kept: list[Tensor] = []
        self.failures = 0

    def before(self) -> None:
        """G ← G − Y Gᵀ Y, and keep Y."""
        self.kept = []
        for group in self.groups:
            Y = torch.stack([layer.orthonormal.detach() for layer in group])
            G = torch.stack([layer.tall(layer.weight.grad) for layer in group])
            for layer, gradient in zip(group, G - Y @ (G.mT @ Y), strict=True):
                layer.tall(layer.weight.grad).copy_(gradient)
            self.kept.append(Y)

    def after(self) -> None:
        """Scale, project onto the tangent space, retract by SVD."""
        for group, Y in zip(self.groups, self.kept, strict=True):
            step = (torch.stack([layer.orthonormal.detach() for layer in group]) - Y) * group[0].step_scale
            H = Y.mT @ step
            Z = Y + step - Y @ ((H + H.mT) / 2)
            try:
                U, _, Vh = torch.linalg.svd(Z, full_matrices=False, driver="gesvda" if Z.is_cuda else None)
            except torch.linalg.LinAlgError:  # singular values that are all 1, but for rounding: LAPACK may give up
                self.failures += 1
                U, Vh = Z, torch.eye(Z.shape[-1], device=Z.device).expand(len(Z), -1, -1)
            for layer, new in zip(group, U @ Vh, strict=True):
                layer.orthonormal.copy_(new)


class Update(torch.optim.Optimizer):
    """Adds a fixed step, and notes when."""

    def __init__(self, layers: list[StiefelLinear]) -> None:
        super().__init__([layer.weight for layer in layers], {})
        self.weights = [layer.weight for layer in layers]
        self.update = [5e-4 * torch.randn_like(weight).sign() for weight in self.weights]
        self.device = layers[0].weight.device
        self.begins = self.ends = 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Once."""
        self.begins = seconds(self.device)
        torch._foreach_add_(self.weights, self.update)
        self.ends = seconds(self.device)


def ours(layers: list[StiefelLinear], optimizer: Update) -> Callable[[], float]:
    """The hooks around the step of an optimizer."""

    def step() -> float:
        fresh_gradients(layers)
        start = seconds(optimizer.device)
        optimizer.step()
        end = seconds(optimizer.device)
        return optimizer.begins - start + end - optimizer.ends

    return step


def reference(authors: Authors, layers: list[StiefelLinear], update: list[Tensor]) -> Callable[[], float]:
    """The authors' step around the same update."""
    device = layers[0].weight.device

    @torch.no_grad()
    def step() -> float:
        fresh_gradients(layers)
        start = seconds(device)
        authors.before()
        middle = seconds(device)
        torch._foreach_add_([layer.weight for layer in layers], update)
        begins = seconds(device)
        authors.after()
        return middle - start + seconds(device) - begins

    return step


def adamw(layers: list[StiefelLinear]) -> Callable[[], float]:
    """AdamW(foreach) on copies of the factors, without a Riemannian step."""
    twins = [nn.Parameter(layer.weight.detach().clone()) for layer in layers]
    for twin in twins:
        twin.grad = torch.randn_like(twin)
    optimizer = torch.optim.AdamW(twins, foreach=True)

    def step() -> float:
        start = seconds(twins[0].device)
        optimizer.step()
        return seconds(twins[0].device) - start

    return step


def fresh_gradients(layers: list[StiefelLinear]) -> None:
    """New values: a Riemannian gradient converted again and again would grow without bound."""
    for layer in layers:
        layer.weight.grad.normal_()


def share(rank: int, per_layer: float, device: torch.device) -> float:
    """The step's part of a training step: forward and backward of one layer's adapted projections on 2,048 tokens."""
    step = iter(factors(rank, device))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    times = []
    for N, M in SIZES.values():
        U, V = next(step), next(step)
        base = nn.Linear(N, M, bias=False, device=device, dtype=dtype).requires_grad_(False)
        x = torch.randn(TOKENS, N, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2):
            start = seconds(device)
            with autocast(device, dtype):
                y = base(x) + U(V(x))
            y.backward(torch.ones_like(y))
            spent = seconds(device) - start
        times.append(spent)
    return per_layer / sum(times)


def measured(chosen: argparse.Namespace) -> list[str]:
    """The table's row, and what is to be said below it."""
    device: torch.device = chosen.device
    # Two sets: moved by others, ours would be checked anew.
    layers, theirs = (model(chosen.rank, chosen.layers, device) for _ in range(2))
    optimizer, algorithm = Update(layers), Authors(theirs)
    authors, mine = reference(algorithm, theirs, optimizer.update), ours(layers, optimizer)
    contenders = {"authors": authors, "A/A": authors, "ours": mine, "AdamW": adamw(layers)}
    result = compare(contenders, "ours", chosen.rounds, device)
    noise = compare({"authors": authors, "A/A": authors}, "authors", chosen.rounds, device)["A/A"]
    stored = sum(layer.weight.nbytes for layer in layers)
    held = sum(storage.nbytes() for storage in buffers(optimizer))
    peak, their_peak = peak_bytes(mine, device), peak_bytes(authors, device)
    cells = [
        len(layers),
        chosen.rank,
        chosen.threads,
        result["authors"].ms,
        result["ours"].ms,
        result["authors"],
        noise,
        f"{1 / result['AdamW'].median:.2f} ({1 / result['AdamW'].high:.2f}–{1 / result['AdamW'].low:.2f})",
        f"{(held + peak) / stored:.2f} (authors {their_peak / stored:.2f})",
    ]
    lines = ["| " + " | ".join(map(str, cells)) + " |"]
    if algorithm.failures:
        lines += [f"The reference's SVD did not converge {algorithm.failures} times (a stack of one shape each time)."]
    if chosen.share:
        parts = [share(chosen.rank, result["ours"].seconds / chosen.layers, device) for _ in range(3)]
        spent = f"{statistics.median(parts):.2%} of forward and backward"
        lines += [f"{spent} of the adapted projections on {TOKENS} tokens"]
    return lines


def main() -> None:
    """Time and print one table row."""
    parser = options(__doc__, rounds=21)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4, help="layers of the model; the whole one has 32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", action="store_true", help="time a training step of one layer too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    lines = [
        f"{machine(chosen.device)}, {chosen.rounds} rounds",
        "",
        "| factors | r | threads | authors, ms | ours, ms | authors / ours | A/A | ours / AdamW | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    publish(lines + measured(chosen), chosen.out)


def buffers(optimizer: torch.optim.Optimizer) -> list[torch.UntypedStorage]:
    """What the step keeps between one call and the next, each storage once."""
    (moves,) = riemannian._plans[optimizer].values()
    kept = [tree_leaves((move.before, move.scratch)) for move in moves]
    storages = [tensor.untyped_storage() for tensor in itertools.chain(*kept)]
    return list({storage.data_ptr(): storage for storage in storages}.values())


if __name__ == "__main__":
    main()
