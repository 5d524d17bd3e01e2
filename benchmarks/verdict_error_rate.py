"""How often does a verdict of `compare` find a difference that is not there, and one that is?

    python benchmarks/verdict_error_rate.py            # about 2 minutes on one quiet core; a Markdown table
    python benchmarks/verdict_error_rate.py --unequal  # about 5: the seeds of some methods spread more than others'
    python benchmarks/verdict_error_rate.py --unstable # about 1: what setting unstable methods apart buys and costs

Simulated grids whose truth is known. Rows differ in difficulty for all methods (standard deviation 1), each method has
rows it finds easier (0.7), each training is a little better or worse than its method (the seed spread), with a little
luck on each row (0.3). With --unequal the seed spread differs: the baseline's is four times the others',
or each method has its own (log-normal, deviation 1). With --unstable it is 0.3 but for the last method's or the last
two's, which spread thirty times as much.
"""

import argparse
import itertools
from collections.abc import Callable

import numpy as np

from beyondlora.compare import statistics
from beyondlora.compare.statistics import compare_with

ROWS, NULL_GRIDS, REAL_GRIDS, EFFECT = 100, 400, 200, 0.5
Spreads = Callable[[np.random.Generator, int], np.ndarray]  # the seed spread of each of so many methods


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unequal", action="store_true", help="methods whose seeds spread differently")
    parser.add_argument("--unstable", action="store_true", help="methods thirty times as wide, pooled and set apart")
    asked = parser.parse_args()
    if asked.unequal:
        unequal()
    elif asked.unstable:
        unstable()
    else:
        equal()


def equal() -> None:
    """Every method's seeds spread alike."""
    print("| methods | seeds | seed spread | wrong verdicts | 0.5 found |\n| ---: | ---: | ---: | ---: | ---: |")
    for methods, seeds, spread in itertools.product((2, 4), (2, 3, 5), (0.0, 0.1, 0.3)):

        def spreads(_: np.random.Generator, count: int, spread: float = spread) -> np.ndarray:
            return np.full(count, spread)

        draw = np.random.default_rng(1)
        found = sum(verdicts(draw, methods, seeds, spreads, EFFECT)[0] == "better" for _ in range(REAL_GRIDS))
        rates = f"{wrong(methods, seeds, spreads):.2%} | {found / REAL_GRIDS:.0%}"
        print(f"| {methods} | {seeds} | {spread} | {rates} |", flush=True)


def unequal() -> None:
    """Some spread more: what a variance that is taken from all methods together does not know."""

    def wide_baseline(_: np.random.Generator, count: int) -> np.ndarray:
        return np.array([1.2, *[0.3] * (count - 1)])

    def its_own(draw: np.random.Generator, count: int) -> np.ndarray:
        return np.asarray(0.3 * np.exp(draw.normal(size=count)))

    print("| methods | seeds | baseline's four times | each its own |\n| ---: | ---: | ---: | ---: |")
    for methods, seeds in itertools.product((4, 10), (2, 3, 5)):
        rates = " | ".join(f"{wrong(methods, seeds, spreads):.2%}" for spreads in (wide_baseline, its_own))
        print(f"| {methods} | {seeds} | {rates} |", flush=True)


def unstable() -> None:
    """One method in four spreads thirty times as much, or two of three; all pooled, and as a verdict counts them."""

    def last(wide: int) -> Spreads:
        return lambda _, count: np.array([0.3] * (count - wide) + [9.0] * wide)

    print("| seeds | 1 wide of 4: 1.5 found, pooled | set apart | 2 wide of 3: wrong, pooled | set apart |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    never, rule = 0.0, statistics.UNLIKE  # no p is below 0
    for seeds in (3, 5):
        found, mistaken = [], []
        for unlike in (never, rule):
            statistics.UNLIKE = unlike
            draw = np.random.default_rng(1)
            firsts = [verdicts(draw, 4, seeds, last(1), 5 * 0.3)[0] for _ in range(NULL_GRIDS)]
            found.append(f"{firsts.count('better') / NULL_GRIDS:.0%}")
            mistaken.append(f"{wrong(3, seeds, last(2)):.2%}")
        print(f"| {seeds} | {' | '.join(found)} | {' | '.join(mistaken)} |", flush=True)


def wrong(methods: int, seeds: int, spreads: Spreads) -> float:
    """The share of grids without any difference in which a verdict finds one."""
    draw = np.random.default_rng(1)
    grids = (verdicts(draw, methods, seeds, spreads) for _ in range(NULL_GRIDS))
    return sum(bool(set(grid) - {"within noise"}) for grid in grids) / NULL_GRIDS


def verdicts(draw: np.random.Generator, methods: int, seeds: int, spreads: Spreads, effect: float = 0.0) -> list[str]:
    """The verdicts of one grid in which the second method differs from all others by `effect`."""
    difficulty, arms = draw.normal(size=ROWS), {}
    for method, spread in enumerate(spreads(draw, methods)):
        own = (
            0.7 * draw.normal(size=ROWS) + spread * draw.normal(size=(seeds, 1)) + 0.3 * draw.normal(size=(seeds, ROWS))
        )
        arms[str(method)] = {"x": difficulty + own + (effect if method == 1 else 0)}
    baseline = arms.pop("0")
    found = compare_with(baseline, arms, lambda rows: rows["x"].mean(-1), higher_is_better=True, resamples=200)
    return [comparison.verdict for comparison in found.values()]


if __name__ == "__main__":
    main()
