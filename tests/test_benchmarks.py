"""The benchmarks run to their pages, on a CPU and on an accelerator (a pretended one). Small: no time is looked at."""

import importlib
import sys
from pathlib import Path

import pretend
import pytest
import side_by_side
import torch

TINY = {
    "branch": ["--layers", "8x12", "--ranks", "2", "--tokens", "16"],
    "experts": ["--layers", "8x4x3x2", "--ranks", "2", "--tokens", "16", "--computed-by", "eager"],
    "model_step": ["--layers", "1", "--rank", "2", "--tokens", "8", "--length", "4"],
    "decode": ["--rank", "2", "--new", "2"],
    "nonlinear_layer": [],
    "riemannian_step": ["--rank", "2", "--layers", "1", "--share"],
}
ROWS = {"branch": 9, "experts": 6, "model_step": 9, "decode": 18, "nonlinear_layer": 8, "riemannian_step": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    llamas, steps, core = map(importlib.import_module, ("llamas", "riemannian_step", "nonlinear_layer"))
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    monkeypatch.setitem(llamas.SIZES, "small", llamas.SIZES["small"] | sizes)
    monkeypatch.setattr(steps, "SIZES", {"q": (16, 12), "k": (12, 16)})
    monkeypatch.setattr(core, "CASES", [(rank, tokens // 64, spline) for rank, tokens, spline in core.CASES])


def page(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> str:
    out = folder / "page.md"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY[name], "--rounds", "2", *more, "--out", str(out)])
    importlib.import_module(name).main()
    return out.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TINY)
def test_a_page_has_all_its_rows(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = page(name, monkeypatch, tmp_path)
    assert written.count("\n| ") == ROWS[name] + 1
    assert "CPU cores" in written


@pytest.mark.parametrize("name", TINY)
def test_an_accelerator_does_all_of_it_and_is_waited_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend.waits.clear()
    with pretend.standing_for("cuda"):
        lower = ["--dtype", "bfloat16"] if name in ("branch", "experts", "model_step", "decode") else []
        written = page(name, monkeypatch, tmp_path, "--device", pretend.NAME, *lower)
    assert written.count("\n| ") == ROWS[name] + 1
    assert f", {pretend.NAME}, Python" in written
    assert pretend.waits.count("synchronize") > 2 * ROWS[name]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.85, "1,850"), (12.3456, "12,346"), (0.9996, "1,000"), (0.1, "100"), (0.09996, "100"), (0.0012345, "1.23")],
)
def test_milliseconds_are_written_without_an_exponent(seconds: float, shown: str) -> None:
    assert side_by_side.Ratio(1.0, 1.0, 1.0, seconds).ms == shown


def test_a_bfloat16_base_trains_under_autocast_on_an_accelerator_alone() -> None:
    for device, dtype, expected in [
        (pretend.NAME, torch.bfloat16, True),
        (pretend.NAME, torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ]:
        with side_by_side.autocast(torch.device(device), dtype):
            assert torch.is_autocast_enabled(device) == expected
