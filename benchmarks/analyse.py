"""How long the spectrum of one layer takes, and how near it is to the SVD of the whole outputs.

    python benchmarks/analyse.py --threads 2 --out docs/results/analyse-speed.md

First LLaMA3-8B's layer shapes at r = 512 with 16,384 tokens, in blocks of 2,048 as they come from a model: a linear
adapter (the factor of R columns) and a nonlinear one (2R columns, which also gives the nonlinear share). The weights
and the bottleneck's activations are random, the arithmetic is that of `beyondlora analyse` on real ones. Then a small
layer, where the direct way (all outputs, centred, float64 SVD) can be timed beside ours: both interleaved in one
process, CPU time, with our own way against itself as the noise of the measurement.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import machine
from torch import Tensor

from beyondlora.analyse.spectra import CentredQR, product_svd, unexplained_share

TOKENS, BLOCK, RANK = 16_384, 2_048, 512
SHAPES = {"q_proj, o_proj": 4096, "k_proj, v_proj": 1024, "gate_proj, up_proj": 14_336, "down_proj": 4096}
SMALL = {"tokens": 2_048, "outputs": 512, "rank": 64}


def ours(H_TR: Tensor, W_MR: Tensor, block: int) -> Tensor:
    """The singular values of a linear adapter's centred outputs."""
    qr = CentredQR(H_TR.shape[1])
    for rows in H_TR.split(block):
        qr.add(rows)
    return product_svd(qr.factor(), W_MR)[0]


def nonlinear(Z_TR: Tensor, H_TR: Tensor, W_MR: Tensor, block: int) -> Tensor:
    """The same for a nonlinear core, with the share of variance that is not affine in what enters it."""
    rank = H_TR.shape[1]
    qr = CentredQR(2 * rank)
    for z_TR, h_TR in zip(Z_TR.split(block), H_TR.split(block), strict=True):
        qr.add(torch.cat([z_TR, h_TR], dim=1))
    unexplained_share(qr.factor(), W_MR)
    return product_svd(qr.factor()[:, rank:], W_MR)[0]


def direct(H_TR: Tensor, W_MR: Tensor) -> Tensor:
    """All outputs, centred, and their SVD."""
    Y_TM = H_TR.double() @ W_MR.double().mT
    return torch.linalg.svdvals(Y_TM - Y_TM.mean(dim=0))


def seconds(job: Callable[[], object]) -> tuple[float, float]:
    """How long a job takes: wall, and CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def large_rows(rounds: int) -> list[str]:
    """One line of the table a shape: median and least seconds, linear and nonlinear."""
    lines = []
    for name, outputs in SHAPES.items():
        torch.manual_seed(0)
        Z_TR = torch.randn(TOKENS, RANK)
        H_TR, W_MR = torch.nn.functional.silu(Z_TR), torch.randn(outputs, RANK) / RANK**0.5
        cells = [name, f"{outputs:,}"]
        jobs = [lambda: ours(H_TR, W_MR, BLOCK), lambda: nonlinear(Z_TR, H_TR, W_MR, BLOCK)]  # noqa: B023
        for job in jobs:
            taken = [seconds(job) for _ in range(rounds)]
            cells += [f"{statistics.median(clock):.2f} ({min(clock):.2f})" for clock in zip(*taken, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def small_rows(rounds: int) -> list[str]:
    """Ours against the direct way and against itself, interleaved; and how far the singular values are apart."""
    torch.manual_seed(0)
    H_TR = torch.nn.functional.silu(torch.randn(SMALL["tokens"], SMALL["rank"]))
    W_MR = torch.randn(SMALL["outputs"], SMALL["rank"])
    jobs = {
        "ours": lambda: ours(H_TR, W_MR, 256),
        "ours again": lambda: ours(H_TR, W_MR, 256),
        "direct SVD": lambda: direct(H_TR, W_MR),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            taken[name].append(seconds(job)[1])
    lines = []
    for name, values in taken.items():
        ratios = sorted(value / base for value, base in zip(values, taken["ours"], strict=True))
        spread = (
            f"{statistics.median(ratios):.2f} ({ratios[len(ratios) // 10]:.2f} to {ratios[-len(ratios) // 10]:.2f})"
        )
        lines.append(f"| {name} | {1000 * statistics.median(values):.1f} | {spread} |")
        print(lines[-1], flush=True)
    sigma, expected = ours(H_TR, W_MR, 256), direct(H_TR, W_MR)[: SMALL["rank"]]
    lines += ["", f"Largest difference, relative to the largest singular value: {difference(sigma, expected):.1e}."]
    return lines


def difference(sigma: Tensor, expected: Tensor) -> float:
    """The largest difference of two spectra relative to the largest singular value."""
    return ((sigma - expected).abs().max() / expected[0]).item()


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21, help="of the small layer")
    parser.add_argument("--large-rounds", type=int, default=3, help="of each large layer")
    parser.add_argument("--out", type=Path, help="the Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = f"{machine()}; load average at the start {os.getloadavg()[0]:.1f}."
    large = large_rows(arguments.large_rounds)
    torch.set_num_threads(1)
    small = small_rows(arguments.rounds)
    text = "\n".join(
        [
            "# How long `beyondlora analyse` takes a layer",
            "",
            *(__doc__ or "").strip().splitlines()[4:],
            "",
            where,
            "",
            f"Seconds a layer, median (least) of {arguments.large_rounds} rounds, r = {RANK}, {TOKENS:,} tokens; CPU "
            "seconds add up both threads:",
            "",
            "| layer | outputs | linear: wall | CPU | nonlinear: wall | CPU |",
            "|---|---|---|---|---|---|",
            *large,
            "",
            f"CPU milliseconds on one thread, medians of {arguments.rounds} rounds; ratio to ours, median (10 % to "
            f"90 %); {SMALL['tokens']:,} tokens, {SMALL['outputs']} outputs, r = {SMALL['rank']}:",
            "",
            "| way | ms | ratio |",
            "|---|---|---|",
            *small,
            "",
            "The command: `python benchmarks/analyse.py --threads 2`.",
            "",
        ]
    )
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
