"""What people are shown on the way: names as they are written, and a bar that fits what is being done."""

from io import StringIO

import pytest
from rich.console import Console

from beyondlora.progress import Progress, in_stretches, progress_on
from beyondlora.tables import show_analysis, show_figures, show_gap

NAME = "runs/[/lora] [red]:cat: [1]"
FIGURES = ("rank", "effective_rank", "manifold_dimension", "stable_rank", "update_effective_rank", "nonlinear_share")
FIGURES += ("dead_units", "saturated", "orthonormality")


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_and_colons_are_shown_as_they_are_given(terminal):
    console = Console(file=StringIO(), force_terminal=terminal, width=120)
    progress = progress_on(console)
    progress.begin(NAME, 2)
    progress.advance(1, note=NAME)
    progress.say(NAME)
    progress.end()
    assert NAME in console.file.getvalue()


def test_tables_show_names_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    gap = {"layers": {NAME: 0.1}, "layer_gap": {"largest": 0.1, "median": 0.1}, "logits_relative": 0.1}
    gap |= {"logits_max": 0.1, "adapter_relative": 0.1, "top1_agreement": 1.0, "made_from": "X", "form": "exact"}
    show_gap(gap | {"compared_on": NAME, "computed_in": "float32"}, every_layer=True)
    show_figures(NAME, {NAME: {"value": 1.0, "stderr": None, "n": 3}})
    means = {"tokens": 9, "layers": 1, "left_out": []} | dict.fromkeys(FIGURES, 1.0)
    adapters = [{"label": NAME, "mean": means}]
    show_analysis({"adapters": adapters, "data": NAME, "seconds": 1, "subspaces": []}, print)
    assert capsys.readouterr().out.count(NAME) == 6


@pytest.mark.parametrize("columns", [20, 50, 80])
def test_a_narrow_terminal_gets_whole_figures_and_breaks_names_first(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    show_figures("a run", {"perplexity": {"value": 5728676.5987, "stderr": 6101144.1616, "n": 1234}})
    label, other = "a" * 100, "other"
    means = {"tokens": 9, "layers": 1, "left_out": []} | dict.fromkeys(FIGURES, 0.5) | {"rank": 4}
    pair = {"a": label, "b": other, "overlap": 0.25, "chance": 0.125, "input_overlap": 0.5, "input_chance": 0.75}
    adapters = [{"label": name, "mean": means} for name in (label, other)]
    show_analysis({"adapters": adapters, "data": "x", "seconds": 1, "subspaces": [pair]}, print)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(word in shown for word in ("perplexity", "5728676.5987", "6101144.1616", "1,234", "50.0%", "0.75"))
    assert columns < 80 or all(len(line) <= columns for line in shown.splitlines())


class Bar(Progress):
    def __init__(self):
        self.shown, self.total = [], 0

    def begin(self, what, total, done=0):
        self.total = total

    def advance(self, done, note=""):
        self.shown.append((done, self.total))


def test_a_stretch_after_a_shorter_one_has_a_bar_of_its_own():
    told = in_stretches(bar := Bar(), "evaluating")
    calls = [(3, 5), (5, 5), (8, 20), (16, 20), (8, 20)]
    for done, total in calls:
        told(done, total)
    assert bar.shown == calls


def test_no_time_is_told_before_there_is_a_pace(monkeypatch):
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr("beyondlora.progress.time.monotonic", lambda: next(clock))
    progress = progress_on(console := Console(file=StringIO(), width=120))
    progress.begin("demo", 100, done=20)
    for done in (20, 40):
        progress.advance(done)
    assert console.file.getvalue().split("\n")[:2] == ["demo: 20/100  ", "demo: 40/100    60 s left"]
