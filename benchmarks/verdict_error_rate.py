"""How often does a verdict of `compare` find a difference that is not there, and one that is?

    python benchmarks/verdict_error_rate.py            # about 2 minutes on one quiet core; a Markdown table

Simulated grids whose truth is known. Rows differ in difficulty for all methods (standard deviation 1), each method has
rows it finds easier (0.7), each training is a little better or worse than its method (the seed spread), with a little
luck on each row (0.3).
"""

import itertools

import numpy as np

from beyondlora.compare.statistics import compare_with

ROWS, NULL_GRIDS, REAL_GRIDS, EFFECT = 100, 400, 200, 0.5


def main() -> None:
    """Print the table."""
    print("| methods | seeds | seed spread | wrong verdicts | 0.5 found |\n| ---: | ---: | ---: | ---: | ---: |")
    for methods, seeds, spread in itertools.product((2, 4), (2, 3, 5), (0.0, 0.1, 0.3)):
        draw = np.random.default_rng(1)
        wrong = sum(bool(set(verdicts(draw, methods, seeds, spread)) - {"within noise"}) for _ in range(NULL_GRIDS))
        draw = np.random.default_rng(1)
        found = sum(verdicts(draw, methods, seeds, spread, EFFECT)[0] == "better" for _ in range(REAL_GRIDS))
        rates = f"{wrong / NULL_GRIDS:.2%} | {found / REAL_GRIDS:.0%}"
        print(f"| {methods} | {seeds} | {spread} | {rates} |", flush=True)


def verdicts(draw: np.random.Generator, methods: int, seeds: int, spread: float, effect: float = 0.0) -> list[str]:
    """The verdicts of one grid in which the second method differs from all others by `effect`."""
    difficulty = draw.normal(size=ROWS)
    arms = {}
    for method in range(methods):
        own = (
            0.7 * draw.normal(size=ROWS) + spread * draw.normal(size=(seeds, 1)) + 0.3 * draw.normal(size=(seeds, ROWS))
        )
        arms[str(method)] = {"x": difficulty + own + (effect if method == 1 else 0)}
    baseline = arms.pop("0")
    found = compare_with(baseline, arms, lambda rows: rows["x"].mean(-1), higher_is_better=True, resamples=200)
    return [comparison.verdict for comparison in found.values()]


if __name__ == "__main__":
    main()
