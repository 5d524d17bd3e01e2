"""docs/optimizers.md is what happens: every optimizer at hand, under every wrapper, follows the law or is refused."""

import importlib.util
from pathlib import Path

import pytest
from manifold import any_optimizer

from beyondlora.doctor.optimizers import HOMES
from beyondlora.manifold import distance_to_stiefel

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/optimizers.md").read_text(encoding="utf-8")


def documented() -> dict[str, tuple[str, ...]]:
    """Optimizer → its signs in the document's table."""
    found: dict[str, tuple[str, ...]] = {}
    for line in DOCUMENT[DOCUMENT.index("| package |") :].split("\n\n")[0].splitlines()[2:]:
        home, kinds, *signs = line.removeprefix("| ").removesuffix(" |").split(" | ")
        found |= {f"{home} {kind}": tuple(signs) for kind in kinds.split(", ")}
    return found


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("name", documented())
def test_an_optimizer_does_what_the_document_says(name: str) -> None:
    package = HOMES[name.split()[0]][1]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if name not in any_optimizer.optimizers():
        pytest.skip(f"this version of {package} has no such optimizer")
    signs, reasons = any_optimizer.signs(name)
    assert signs == documented()[name], reasons
    assert any_optimizer.SIGNS["wrong"] not in signs, reasons


def test_every_optimizer_at_hand_is_in_the_document() -> None:
    assert set(any_optimizer.optimizers()) <= set(documented())


def test_what_schedule_free_optimizers_evaluate_is_off_the_manifold() -> None:
    """Why they are refused: with algorithm 1 around them they train orthonormal factors, and evaluate others."""
    pytest.importorskip("schedulefree")
    make = any_optimizer.optimizers()["schedule-free AdamWScheduleFree"]
    run = any_optimizer.Regression("euclidean", make, any_optimizer.Literal)
    optimizer = run.optimizer()
    run.steps(optimizer, 10)
    assert distance_to_stiefel(run.model.up.weight) < 1e-6
    optimizer.eval()
    assert distance_to_stiefel(run.model.up.weight) > 1e-2
