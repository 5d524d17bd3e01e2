"""What StelLA's step costs: ours, the authors' algorithm, and AdamW on the same factors, interleaved in one process.

    python benchmarks/riemannian_step.py [--rank 32] [--layers 4] [--threads 1] [--rounds 21] [--share]

The factors are those of LLaMA3-8B with q, k, v, up and down projections adapted, stored as StelLA stores them: U tall,
Vᵀ wide; ten a layer of the model. float32. The reference is the authors' algorithm as their paper and METHODS of this
project describe it: factors of one shape are stacked, and the polar factor is a batched SVD. Ours is what a user's
optimizer runs, hooks and guard and all; neither side's figure holds the optimizer's own step. A/A is the reference
against itself; memory is the most that is held beside the factors and their gradients, in bytes of the factors. With
--share the linear layers of one model layer go forward and backward on 2,048 tokens.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from side_by_side import compare, machine, peak_bytes, seconds
from torch import Tensor, nn

from beyondlora.manifold import StiefelLinear

SIZES = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "up": (4096, 14336), "down": (14336, 4096)}  # N, M
TOKENS = 2048


def factors(rank: int) -> list[StiefelLinear]:
    """U and Vᵀ of one layer's projections, gradient scaling on."""
    pairs = [(StiefelLinear(rank, M), StiefelLinear(N, rank)) for N, M in SIZES.values()]
    for factor in itertools.chain.from_iterable(pairs):
        factor.step_scale = (4096 / max(factor.weight.shape)) ** 0.5
    return list(itertools.chain.from_iterable(pairs))


def model(rank: int, count: int) -> list[StiefelLinear]:
    """The factors of so many layers, with gradients."""
    layers = [factor for _ in range(count) for factor in factors(rank)]
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
                U, Vh = Z, torch.eye(Z.shape[-1]).expand(len(Z), -1, -1)
            for layer, new in zip(group, U @ Vh, strict=True):
                layer.orthonormal.copy_(new)


class Update(torch.optim.Optimizer):
    """Adds a fixed step, and notes when."""

    def __init__(self, layers: list[StiefelLinear]) -> None:
        super().__init__([layer.weight for layer in layers], {})
        self.weights = [layer.weight for layer in layers]
        self.update = [5e-4 * torch.randn_like(weight).sign() for weight in self.weights]
        self.begins = self.ends = 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Once."""
        self.begins = seconds()
        torch._foreach_add_(self.weights, self.update)
        self.ends = seconds()


def ours(layers: list[StiefelLinear], optimizer: Update) -> Callable[[], float]:
    """The hooks around the step of an optimizer."""

    def step() -> float:
        fresh_gradients(layers)
        start = seconds()
        optimizer.step()
        end = seconds()
        return optimizer.begins - start + end - optimizer.ends

    return step


def reference(authors: Authors, layers: list[StiefelLinear], update: list[Tensor]) -> Callable[[], float]:
    """The authors' step around the same update."""

    @torch.no_grad()
    def step() -> float:
        fresh_gradients(layers)
        start = seconds()
        authors.before()
        middle = seconds()
        torch._foreach_add_([layer.weight for layer in layers], update)
        begins = seconds()
        authors.after()
        return middle - start + seconds() - begins

    return step


def adamw(layers: list[StiefelLinear]) -> Callable[[], float]:
    """AdamW(foreach) on copies of the factors, without a Riemannian step."""
    twins = [nn.Parameter(layer.weight.detach().clone()) for layer in layers]
    for twin in twins:
        twin.grad = torch.randn_like(twin)
    optimizer = torch.optim.AdamW(twins, foreach=True)

    def step() -> float:
        start = seconds()
        optimizer.step()
        return seconds() - start

    return step


def fresh_gradients(layers: list[StiefelLinear]) -> None:
    """New values: a Riemannian gradient converted again and again would grow without bound."""
    for layer in layers:
        layer.weight.grad.normal_()


def share(rank: int, per_layer: float) -> float:
    """The step's part of a training step: forward and backward of one layer's adapted projections on 2,048 tokens."""
    step = iter(factors(rank))
    times = []
    for N, M in SIZES.values():
        U, V = next(step), next(step)
        base = nn.Linear(N, M, bias=False).requires_grad_(False)
        x = torch.randn(TOKENS, N, requires_grad=True)
        for _ in range(2):
            start = seconds()
            (base(x) + U(V(x))).sum().backward()
            spent = seconds() - start
        times.append(spent)
    return per_layer / sum(times)


def main() -> None:
    """Time and print one table row."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--layers", type=int, default=4, help="layers of the model; the whole one has 32")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=21)
    options.add_argument("--share", action="store_true", help="time a training step of one layer too")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    layers, theirs = (
        model(chosen.rank, chosen.layers) for _ in range(2)
    )  # moved by others, ours would be checked anew
    optimizer = Update(layers)
    algorithm = Authors(theirs)
    authors, mine = reference(algorithm, theirs, optimizer.update), ours(layers, optimizer)
    contenders = {"authors": authors, "A/A": authors, "ours": mine, "AdamW": adamw(layers)}
    result = compare(contenders, "ours", chosen.rounds)
    noise = compare({"authors": authors, "A/A": authors}, "authors", chosen.rounds)["A/A"]
    stored = sum(layer.weight.nbytes for layer in layers)
    held = sum(value.nbytes for value in buffers(optimizer))
    print(machine(), f"{chosen.rounds} rounds")
    print("| factors | r | threads | authors, ms | ours, ms | authors / ours | A/A | ours / AdamW | memory |")
    cells = [
        len(layers),
        chosen.rank,
        chosen.threads,
        f"{1e3 * result['authors'].seconds:.1f}",
        f"{1e3 * result['ours'].seconds:.1f}",
        result["authors"],
        noise,
        f"{1 / result['AdamW'].median:.2f} ({1 / result['AdamW'].high:.2f}–{1 / result['AdamW'].low:.2f})",
        f"{(held + peak_bytes(mine)) / stored:.2f} (authors {peak_bytes(authors) / stored:.2f})",
    ]
    print("| " + " | ".join(map(str, cells)) + " |")
    if algorithm.failures:
        print(f"The reference's SVD did not converge {algorithm.failures} times (a stack of one shape each time).")
    if chosen.share:
        part = statistics.median(share(chosen.rank, result["ours"].seconds / chosen.layers) for _ in range(3))
        print(f"{part:.2%} of forward and backward of the adapted projections on {TOKENS} tokens")


def buffers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What the step keeps between one call and the next, each storage once."""
    from beyondlora.manifold import riemannian

    kept = [tensor for move in riemannian._plans[optimizer].moves for tensor in (*move.before, move.scratch)]
    return list({tensor.data_ptr(): tensor for tensor in kept}.values())


if __name__ == "__main__":
    main()
