"""Drift from the Stiefel manifold in 10,000 steps of AdamW: our step, the authors', theirs in bfloat16, none.

    python benchmarks/drift.py [--steps 10000] [--out docs/results/drift]

An adapter U Vᵀ learns a noisy target in float32, on batches drawn anew at each step and alike for all. Drift is the
largest |YᵀY − I| over both factors. In bfloat16 the factors are rounded after every step, as they are where they have a
half-precision base model's dtype; the share of entries that moved is of those steps, and of the same steps in float32.
"""

import argparse
import datetime
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
from riemannian_step import Authors
from torch import Tensor, nn

from beyondlora.manifold import StiefelLinear, distance_to_stiefel

SIZES = [(128, 96, 8)]  # M, N, R
RATE, ROWS, NOISE = 1e-3, 32, 0.5
SHOWN = [1, 10, 100, 1000, 10_000]


class Plain(nn.Linear):
    """A factor that the hooks know nothing of."""

    tall, orthonormal, step_scale = StiefelLinear.tall, StiefelLinear.orthonormal, 1.0


@dataclass
class Side:
    """One way to take the steps, and what came of it."""

    name: str
    factors: list[nn.Linear]
    around: Authors | None = None
    dtype: torch.dtype = torch.float32
    drift: dict[int, float] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([factor.weight for factor in self.factors], RATE, weight_decay=0.0)

    def step(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """One step of every adapter."""
        self.optimizer.zero_grad()
        for down, up, (x, y) in zip(self.factors[::2], self.factors[1::2], batches, strict=True):
            (up(down(x)) - y).square().mean().backward()
        before = [factor.weight.detach().clone() for factor in self.factors]
        with torch.no_grad():
            if self.around:
                self.around.before()
            self.optimizer.step()
            if self.around:
                self.around.after()
            for factor in self.factors:
                factor.weight.copy_(factor.weight.to(self.dtype))
            pairs = zip(before, self.factors, strict=True)
            changed = sum((start != factor.weight).sum().item() for start, factor in pairs)
        self.moved.append(changed / sum(start.numel() for start in before))

    def look(self, step: int) -> None:
        """Note the drift."""
        self.drift[step] = max(distance_to_stiefel(factor.tall(factor.weight)).item() for factor in self.factors)


def sides() -> list[Side]:
    """All of them, from one start."""
    start = [StiefelLinear(*pair) for M, N, R in SIZES for pair in ((N, R), (R, M))]

    def plain() -> list[nn.Linear]:
        made = [Plain(factor.in_features, factor.out_features, bias=False) for factor in start]
        for copy, factor in zip(made, start, strict=True):
            copy.load_state_dict(factor.state_dict())
        return made

    theirs, rounded = plain(), plain()
    return [
        Side("beyondlora", start),
        Side("authors' algorithm (SVD)", theirs, Authors(theirs)),
        Side("authors' algorithm, factors in bfloat16", rounded, Authors(rounded), torch.bfloat16),
        Side("AdamW without a step", plain()),
    ]


def main() -> None:
    """Train, and write the table and the figure."""
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=10_000)
    options.add_argument("--out", type=Path, default=Path("docs/results/drift"))
    chosen = options.parse_args()
    torch.manual_seed(0)
    contenders = sides()
    goals = [nn.Sequential(StiefelLinear(N, R), StiefelLinear(R, M)).requires_grad_(False) for M, N, R in SIZES]
    looks = {round(10 ** (number / 8)) for number in range(33)}
    for step in range(1, chosen.steps + 1):
        batches = []
        for (M, N, _), goal in zip(SIZES, goals, strict=True):
            x = torch.randn(ROWS, N)
            batches.append((x, goal(x) + NOISE * torch.randn(ROWS, M)))
        for side in contenders:
            side.step(batches)
            if step in looks or step == chosen.steps:
                side.look(step)
    chosen.out.with_suffix(".md").write_text(table(contenders, chosen.steps), encoding="utf-8")
    picture(contenders, chosen.out.with_suffix(".png"))


def table(contenders: list[Side], steps: int) -> str:
    """The page."""
    shown = [step for step in SHOWN if step <= steps]
    lines = ["| step | " + " | ".join(side.name for side in contenders) + " |", "|---" * (len(contenders) + 1) + "|"]
    lines += [f"| {step:,} | " + " | ".join(f"{side.drift[step]:.1e}" for side in contenders) + " |" for step in shown]
    shares = [f"{100 * sum(side.moved) / len(side.moved):.0f} %" for side in contenders]
    lines += ["| entries that move a step | " + " | ".join(shares) + " |"]
    return HEAD.format(
        steps=f"{steps:,}",
        date=datetime.date.today(),
        python=platform.python_version(),
        torch=torch.__version__,
        sizes=" and ".join(f"{M}×{N} of rank {R}" for M, N, R in SIZES),
        rate=RATE,
        table="\n".join(lines),
    )


HEAD = """\
# Drift from the Stiefel manifold

Largest |YᵀY − I| over both factors of an adapter ({sizes}) in {steps} steps of AdamW at {rate:g}, float32, noisy
targets, the same batches for all. {date}, Python {python}, torch {torch}, CPU.

    python benchmarks/drift.py

{table}

What of a step is smaller than half of bfloat16's spacing rounds away: the last row is why the factors stay in float32.

![drift](drift.png)
"""


def picture(contenders: list[Side], path: Path) -> None:
    """Drift over steps, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="step", ylabel="max |YᵀY − I|")
    for side in contenders:
        axes.plot(list(side.drift), list(side.drift.values()), label=side.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center right", bbox_to_anchor=(1, 0.36))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
