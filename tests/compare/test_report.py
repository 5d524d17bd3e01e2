"""The page and the pictures: whole, self-contained, and as a browser shows them."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest

from beyondlora.compare import comparison, pictures, report
from beyondlora.compare.arms import as_mapping, outcome_of
from beyondlora.compare.grid import Grid
from beyondlora.compare.report import page
from beyondlora.compare.words import caption, cells, markdown, pair_verdicts, table, verdicts
from beyondlora.run_folder import RunFolder
from beyondlora.tables import show

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH to show the page")
WIDTH = (
    "<iframe width={width} height=4000 srcdoc='{page}'></iframe><script>onload = () => {{ const {{ document: d }} = "
)
WIDTH += "frames[0]; document.title = d.documentElement.scrollWidth }}</script>"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A made-up comparison of ten runs, one of which diverged, with a name that has to be escaped."""
    folder = tmp_path_factory.mktemp("runs")
    mapping = {
        "task": "causal-lm",
        "model_name_or_path": "demo",
        "output_dir": str(folder),
        "dataset_name": "text.txt",
        "grid": {
            "methods": {"LoRA": {"peft_type": "LORA", "r": [2, 8]}, "<b>bold</b> & Co": {"peft_type": "OFT"}},
            "learning_rate": [1e-3, 1e-2],
            "seed": [0, 1],
            "test_fraction": 0.1,
        },
    }
    grid, draw = Grid.from_mapping(mapping), np.random.default_rng(0)
    difficulty = draw.normal(2, 0.3, size=40)
    return outcome_of(grid, [line(run, difficulty, draw) for run in grid.runs], title="A <comparison>")


def identity(run):
    """What a line of results.jsonl says of which run it is."""
    names = ("method", "arm", "searched", "seed")
    return {"run": run.name, "recipe": vars(run.recipe)} | {name: getattr(run, name) for name in names}


def line(run, difficulty, draw):
    good = 0.05 * (run.recipe.learning_rate == 1e-2) + 0.3 * (run.method != "LoRA")
    nll = 20 * (difficulty - good + 0.02 * draw.normal() + 0.02 * draw.normal(size=40))
    loss = float(nll.sum() / 800)
    diverged = run.method != "LoRA" and run.recipe.learning_rate == 1e-3 and run.seed == 1
    rank = run.recipe.adapter.get("r", 3)
    figures = {"perplexity": {"value": float(np.exp(loss)), "stderr": None, "n": 40}}
    return identity(run) | {
        "status": "diverged" if diverged else "finished",
        "error": "the loss became nan" if diverged else "",
        "validation": figures,
        "test": figures,
        "items": {"nll": nll.tolist(), "tokens": [20.0] * 40},
        "trainable_parameters": 10_000 * rank,
        "train_seconds": 10.0 + rank,
        "peak_memory_bytes": 2**28 + rank * 2**20,
    }


@pytest.fixture(scope="module")
def drawn(outcome):
    return pictures.draw(outcome)


@pytest.fixture(scope="module")
def shown(outcome, drawn):
    return page(outcome, drawn, command="beyondlora compare 'a & b.yaml'", machine=["a <machine>"])


def test_verdicts_say_what_was_seen_and_what_could_have_been(outcome):
    sentences = verdicts(outcome)
    found = outcome.comparisons["<b>bold</b> & Co"]
    assert found.verdict == "better"
    bold = next(sentence for sentence in sentences if sentence.startswith("<b>"))
    for part in (
        "is better than LoRA r=",
        "2 seeds, 40 rows",
        "for 2 comparisons at once",
        f"{found.detectable:.3f} would have been found",
    ):
        assert part in bold
    assert "lower is better" in caption(outcome)


def test_a_setting_with_a_diverged_run_is_not_chosen(outcome):
    bold = next(arm for arm in outcome.arms if arm.method != "LoRA")
    assert bold.chosen.learning_rate == 1e-2
    assert [setting.validation is None for setting in bold.settings] == [True, False]
    assert bold.count("diverged") == 1


# From lines to a table: what is chosen, and what a row says ----------------------------------------------------------


def graded(accuracies, rates=(1e-3, 1e-2, 1e-1), seeds=(0, 1), order=1, pairs=(), failed=(), stderr=None):
    """A made-up grid: method -> {rate: accuracy on validation}; on test it is (seed + 1) / 10, best's more."""
    mapping = {
        "task": "sequence-classification",
        "model_name_or_path": "demo",
        "output_dir": "out",
        "dataset_name": "rows.jsonl",
        "grid": {
            "methods": {name: {"peft_type": "LORA", "r": 2 + i} for i, name in enumerate(accuracies)},
            "learning_rate": list(rates),
            "seed": list(seeds),
            "test_fraction": 0.5,
            "pairs": list(pairs),
        },
    }
    grid = Grid.from_mapping(mapping)
    lines = []
    for run in grid.runs:
        correct = [float(row < 10 * (run.seed + 1) + 4 * (run.method == "best")) for row in range(100)]
        lines.append(
            identity(run)
            | {
                "status": "failed" if run.method in failed else "finished",
                "error": "",
                "validation": {
                    "accuracy": {"value": accuracies[run.method][run.recipe.learning_rate], "stderr": stderr}
                },
                "test": {"accuracy": {"value": sum(correct) / 100}},
                "items": {"correct": correct},
                "trainable_parameters": 1234,
                "train_seconds": 10.0 + 4 * run.seed,
                "peak_memory_bytes": 3 * 2**20,
            }
        )
    return outcome_of(grid, lines[::order], title="graded")


MIDDLE = {1e-3: 0.4, 1e-2: 0.6, 1e-1: 0.5}
EDGE = {1e-3: 0.4, 1e-2: 0.6, 1e-1: 0.8}


def test_the_best_on_validation_is_chosen_and_stands_first_whichever_way_is_better(outcome):
    found = graded({"base": MIDDLE, "best": EDGE, "low": {1e-3: 0.3, 1e-2: 0.2, 1e-1: 0.1}})
    assert [(arm.name, arm.chosen.learning_rate) for arm in found.arms] == [
        ("best", 1e-1),
        ("base", 1e-2),
        ("low", 1e-3),
    ]
    assert [arm.at_edge for arm in found.arms] == [True, False, True]
    assert not any(arm.at_edge for arm in graded({"base": {1e-2: 0.5}}, rates=[1e-2]).arms)
    assert outcome.arms[0].method != "LoRA"  # of perplexities the lowest
    assert {arm.chosen.learning_rate for arm in outcome.arms} == {1e-2}


def test_lines_stand_in_the_order_of_their_seeds_however_they_were_finished():
    (arm,) = graded({"base": MIDDLE}, seeds=(2, 0, 1), order=-1).arms
    assert [line["seed"] for line in arm.lines] == [0, 1, 2]
    assert arm.figures == pytest.approx([0.1, 0.2, 0.3])


def test_a_row_says_what_its_runs_came_to():
    found = graded({"base": MIDDLE, "best": EDGE})
    best, base = (cells(found, arm) for arm in found.arms)
    difference = found.comparisons["best"]
    assert best[:6] == ["best", "1,234", "0.1*", "0.1900", f"{np.std([0.14, 0.24], ddof=1):.4f}", "+0.0400"]
    assert best[6] == f"{difference.low:+.4f} to {difference.high:+.4f}"
    assert difference.low < 0.04 < difference.high
    assert best[7:] == [difference.verdict, "12 s", "3 MiB"]
    assert base[:8] == ["base", "1,234", "0.01", "0.1500", f"{np.std([0.1, 0.2], ddof=1):.4f}", "", "", "baseline"]
    (sentence,) = verdicts(found)
    assert "Not the last word: the search ended at its edge for best." in sentence
    (calm,) = verdicts(graded({"base": MIDDLE, "best": MIDDLE}))
    assert "Not the last word" not in calm


def test_a_choice_that_other_validation_rows_might_not_make_is_said():
    def told(stderr):
        notes = graded({"base": MIDDLE, "best": EDGE}, stderr=stderr).notes
        return [note for note in notes if note.startswith("Chosen by less")]

    (note,) = told(0.11)  # base: 0.6 against 0.5; best: 0.8 against 0.6
    assert ": base (0.6000 and 0.5000, ± 0.1100). Other rows" in note
    (both,) = told(0.21)
    assert "best (0.8000 and 0.6000, ± 0.2100); base" in both
    assert told(0.09) == told(None) == []


def correlated(validation, constant=(), spread=()):
    """A made-up grid: method -> its correlation on the validation rows; on test rows some predict one number.

    spread: method -> how much noisier each further seed is.
    """
    mapping = {
        "task": "sequence-regression",
        "model_name_or_path": "demo",
        "output_dir": "out",
        "dataset_name": "rows.jsonl",
        "grid": {
            "methods": {name: {"peft_type": "LORA", "r": [2, 4] if name == "base" else 8} for name in validation},
            "seed": [0, 1, 2],
            "test_fraction": 0.5,
        },
    }
    grid, draw = Grid.from_mapping(mapping), np.random.default_rng(0)
    label = draw.normal(size=60)
    lines = []
    for run in grid.runs:
        predicted = (
            np.zeros(60)
            if run.method in constant
            else label + (1 + run.seed * dict(spread).get(run.method, 0)) * draw.normal(size=60)
        )
        value = validation[run.method]
        value = value[run.recipe.adapter["r"]] if isinstance(value, dict) else value
        lines.append(
            identity(run)
            | {"status": "finished", "error": "", "validation": {"pearson": {"value": value}}, "test": {}}
            | {"items": {"predicted": predicted.tolist(), "label": label.tolist()}}
            | {"trainable_parameters": 1, "train_seconds": 1.0, "peak_memory_bytes": 1}
        )
    return outcome_of(grid, lines, title="correlated")


def test_what_has_no_figure_has_no_result_and_the_rest_is_judged():
    found = correlated({"base": {2: 0.5, 4: 0.4}, "blind": None, "constant": 0.1, "good": 0.3}, constant=["constant"])
    assert {arm.name: cells(found, arm)[7] for arm in found.arms if arm is not found.baseline} == {
        "base r=4": "within noise",
        "good": "within noise",
        "blind": "no result",
        "constant": "no result",
    }
    notes = " ".join(found.notes)
    assert "whose figure on the validation rows is no finite number: 1 of blind" in notes
    assert "No result, for the figure on the test rows is no finite number: constant." in notes
    assert "no result" in page(found, {}, command="c", machine=[])


def test_a_figure_of_zero_is_a_figure():
    found = correlated({"base": {2: 0.0, 4: -0.2}, "good": 0.3})
    assert [arm.name for arm in found.arms] == ["good", "base r=2", "base r=4"]
    assert found.baseline.name == "base r=2"


def test_an_arm_whose_seeds_spread_far_more_is_named():
    def notes(spread):
        found = correlated({"base": {2: 0.5, 4: 0.4}, "good": 0.3, "wild": 0.2}, spread={"wild": spread})
        return [note for note in found.notes if note.startswith(("The seeds of", "wild"))]

    assert notes(0) == []
    assert notes(0.5)[0].startswith("wild sets the margin")
    assert notes(3)[0].startswith("The seeds of wild spread clearly more than the others'")


def test_where_the_rows_cannot_tell_the_sentence_says_why(outcome):
    name, one = next(iter(outcome.comparisons.items()))
    unknown = dataclasses.replace(one, low=None, high=None, p_corrected=None, verdict="no verdict")
    (sentence,) = verdicts(dataclasses.replace(outcome, comparisons={name: unknown}))
    assert "for on too many resampled rows the figure is not defined" in sentence


def test_the_search_is_a_table_with_a_column_a_setting(outcome):
    found = markdown(graded({"base": MIDDLE, "best": EDGE}), command="c").split("\n\n")[-1].splitlines()
    assert found == [
        "| arm | learning_rate 0.001 | learning_rate 0.01 | learning_rate 0.1 |",
        "| --- | ---: | ---: | ---: |",
        f"| best | {EDGE[1e-3]:.4f} | {EDGE[1e-2]:.4f} | **{EDGE[1e-1]:.4f}** |",
        f"| base | {MIDDLE[1e-3]:.4f} | **{MIDDLE[1e-2]:.4f}** | {MIDDLE[1e-1]:.4f} |",
    ]
    (lost,) = (line for line in markdown(outcome, command="c").splitlines() if "diverged)" in line)
    assert lost.startswith("| <b>bold</b> & Co | – (1 of 2 diverged) | **")


def test_a_name_with_the_sign_between_columns_stays_in_its_column():
    name = "targets=(q|v)_proj"
    whole = graded({"base": MIDDLE, name: EDGE}, pairs=[[name, "base"]])
    rows = [row for row in markdown(whole, command="c").splitlines() if row.startswith(r"| targets=(q\|v)_proj |")]
    columns = [len(re.split(r"(?<!\\)\|", row)) - 2 for row in rows]
    assert columns == [10, 7, 4]  # the arm's, the pair's, the search's


def test_the_machine_is_the_one_that_the_runs_were_on():
    there = {"started": "2026-11-30T10:00:00", "device": "cpu", "python": "3.12.1", "versions": {"torch": "2.13"}}
    whole = graded({"base": MIDDLE})
    first, *others = whole.lines
    lines = [first | {"environment": there | {"cpus": 96, "platform": "Darwin-arm64"}}]
    lines += [line | {"environment": there} for line in others]  # an older version did not keep them
    assert comparison._machine(dataclasses.replace(whole, lines=lines)) == [
        "2026-11-30, cpu, 96 CPU cores, Darwin-arm64, Python 3.12.1, torch 2.13",
        "2026-11-30, cpu, Python 3.12.1, torch 2.13",
    ]


def test_the_terminal_shows_names_and_title_as_they_are_written(capsys, monkeypatch):
    found = graded({"base": MIDDLE, "best [/x] [v2]": EDGE})
    found = dataclasses.replace(found, title="Draft [v2] and [/x]")
    monkeypatch.setenv("COLUMNS", "200")
    show(table(found))
    shown = capsys.readouterr().out
    assert "Draft [v2] and [/x]" in shown
    assert "best [/x] [v2]" in shown


def test_many_cards_without_a_difference_are_folded_away(monkeypatch):
    found = graded({"base": MIDDLE, "one": EDGE, "two": EDGE})
    comparisons = found.comparisons | {"two": dataclasses.replace(found.comparisons["two"], verdict="better")}
    found = dataclasses.replace(found, comparisons=comparisons)
    whole = page(found, {}, command="c", machine=[])
    assert "Within noise: " not in whole
    monkeypatch.setattr(report, "MAX_CARDS", 1)
    shown, folded = page(found, {}, command="c", machine=[]).split("<summary>Within noise: 1 of 2</summary>")
    assert "two is better" in shown
    assert "one is within noise" not in shown
    assert "one is within noise" in folded.split("</details>")[0]


def test_a_pair_is_answered_apart_from_the_table():
    asked = [["best", "other"], ["lost", "base"]]
    found = graded(dict.fromkeys(("base", "other", "best", "lost"), MIDDLE), pairs=asked, failed=["lost"])
    assert list(found.pairs) == [("best", "other")]
    assert found.pairs["best", "other"].difference == pytest.approx(0.04)
    assert len(found.comparisons) == 2  # the table's are the baseline's, as without pairs
    (sentence,) = pair_verdicts(found)
    assert sentence.startswith("best is within noise of other: +0.0400 accuracy, 95% interval -")
    assert "comparisons at once" not in sentence
    assert "Not compared, for want of a result: lost and base." in found.notes
    written, shown = markdown(found, command="x"), page(found, {}, command="x", machine=[])
    for text in (written, shown):
        assert sentence in text
        assert "for all 1 together, apart from the table" in text
    assert re.search(
        r"^\| best \| other \| \+0.0400 \| -.* to \+.* \| 0\.\d+ \| 0\.\d{4} \| within noise \|$", written, re.MULTILINE
    )
    (mapping,) = as_mapping(found)["pairs"]
    assert (mapping["arm"], mapping["against"], mapping["verdict"]) == ("best", "other", "within noise")
    plain = graded({"base": MIDDLE, "best": EDGE})
    assert "Arm against arm" not in page(plain, {}, command="x", machine=[])
    assert "apart from the table" not in markdown(plain, command="x")


def test_an_arm_without_a_result_has_a_row_that_says_so():
    whole = graded({"base": MIDDLE, "best": EDGE})
    lines = [line | {"status": "failed", "error": "too wide"} for line in whole.lines]
    arms = [dataclasses.replace(arm, chosen=None) for arm in whole.arms]
    found = dataclasses.replace(whole, arms=arms, lines=lines, baseline=None, comparisons={})
    assert [cells(found, arm)[7] for arm in found.arms] == ["no result"] * 2
    assert "failed: too wide" in page(found, {}, command="c", machine=[])


def test_one_seed_gives_no_verdict_and_says_so():
    found = graded({"base": MIDDLE, "best": EDGE}, seeds=[0])
    assert any("One seed" in note for note in found.notes)
    two, three = graded({"base": MIDDLE}), graded({"base": MIDDLE}, seeds=(0, 1, 2))
    assert [[note[:9] for note in grid.notes if " seed" in note] for grid in (two, three)] == [["Two seeds"], []]
    (sentence,) = verdicts(found)
    assert sentence.startswith("best cannot be told from base with one seed: +0.0400 accuracy on 100 rows")


def test_a_p_value_is_never_said_more_exactly_than_it_is_known(outcome):
    for p, said in ((1e-9, "under 0.001"), (0.00099, "under 0.001"), (0.00123, "0.0012"), (0.456, "0.46")):
        found = dataclasses.replace(outcome.comparisons["<b>bold</b> & Co"], p_corrected=p)
        assert f"p = {said}, for" in verdicts(dataclasses.replace(outcome, comparisons={"a": found, "b": found}))[0]


def test_what_is_better_and_what_went_wrong_is_shown_as_that(shown):
    assert '<span class="badge better">better</span>' in shown
    assert '<span class="badge other">baseline</span>' in shown
    assert "diverged: the loss became nan" in shown
    assert "a &lt;machine&gt;" in shown
    assert "<pre>beyondlora compare &#x27;a &amp; b.yaml&#x27;</pre>" in shown
    assert "A setting with such a run is not chosen." in shown


def test_every_figure_of_the_table_stands_on_the_page_and_in_the_markdown(outcome, shown):
    text = markdown(outcome, command="c")
    for arm in outcome.arms:
        for figure in (f"{arm.figures.mean():.3f}", f"{arm.lines[0]['trainable_parameters']:,}"):
            assert figure in shown
            assert figure in text
    assert text.count("\n| ") == 2 * (2 + 3)  # arms, and the search


def test_the_page_is_one_file_that_asks_for_nothing_and_escapes_what_it_is_given(shown):
    assert "default-src 'none'" in shown
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<>)]+""", shown))
    assert all(address.startswith("http://www.w3.org/") for address in addresses), addresses  # SVG's namespaces
    assert not re.search(r"""\b(src|href)=["'](?!#|data:)""", shown)
    assert not re.search(r"url\((?!#)", shown)
    assert "<b>bold" not in shown
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; Co" in shown
    assert "prefers-color-scheme: dark" in shown


def test_pictures_are_xml_of_their_own_that_takes_the_page_s_colour(drawn, tmp_path):
    assert set(drawn) == {
        "differences",
        "parameters",
        "learning-rates",
        "seconds",
        "memory",
    }  # no run folder: no curves
    pictures.write(drawn, tmp_path)
    for name, (told, svg) in drawn.items():
        assert told
        assert "currentColor" in svg
        assert pictures.INK not in svg
        root = xml.dom.minidom.parseString((tmp_path / f"{name}.svg").read_text()).documentElement
        assert root.tagName == "svg"
        assert root.hasAttribute("viewBox")
        assert not root.hasAttribute("width")
        assert "prefers-color-scheme:dark" in root.toxml()  # by itself it is dark where the reader is
    points = drawn["parameters"][1]
    assert "trainable parameters" in points


def test_the_differences_are_drawn_where_they_are(outcome):
    caption, figure = pictures._differences(outcome, pictures._colors(outcome))
    assert "left of 0 is better" in caption
    drawn = [line.get_xdata() for line in figure.axes[0].lines[:-1]]  # the last one marks 0
    names = [arm.name for arm in outcome.arms if arm.name in outcome.comparisons][::-1]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names
    for number, name in enumerate(names):
        found = outcome.comparisons[name]
        assert list(drawn[2 * number]) == [found.low, found.high]
        assert list(drawn[2 * number + 1]) == [found.difference]
    raised, _ = pictures._differences(graded({"base": MIDDLE, "best": EDGE}), {"base": "b", "best": "r"})
    assert "right of 0 is better" in raised


def test_points_stand_at_the_mean_over_seeds(outcome):
    _, figure = pictures._memory(outcome, pictures._colors(outcome))
    points = sorted(place for bars in figure.axes[0].containers for place in zip(*bars[0].get_data(), strict=True))
    expected = sorted((arm.mean_of("peak_memory_bytes") / 2**20, arm.figures.mean()) for arm in outcome.arms)
    assert points == [pytest.approx(place) for place in expected]
    for bars in figure.axes[0].containers:
        (lines,) = bars[2]
        for (_, low), (_, high) in lines.get_segments():
            deviations = [arm.figures.std(ddof=1) for arm in outcome.arms]
            assert min(abs(high - low - 2 * deviation) for deviation in deviations) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("good", [True, False])
def test_what_would_squash_all_others_is_left_off_the_scale_and_said(outcome, good):
    worst = outcome.arms[-1]
    bad = dataclasses.replace(worst, figures=worst.figures + (1 if good else 400))
    found = dataclasses.replace(outcome, arms=[*outcome.arms[:-1], bad, *outcome.arms[:-1]])
    _, figure = pictures._parameters(found, pictures._colors(found))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ([] if good else [f"{bad.name}: {bad.figures.mean():.3g}"])
    low, high = axes.get_ylim()
    assert low < min(arm.figures.mean() for arm in found.arms)
    assert (high > bad.figures.mean()) == good
    up = graded({"base": MIDDLE, "one": EDGE, "two": EDGE, "three": EDGE, "best": EDGE})
    arms = [dataclasses.replace(arm, figures=arm.figures - 9 * (arm.name == "base")) for arm in up.arms]
    _, figure = pictures._parameters(dataclasses.replace(up, arms=arms), pictures._colors(up))
    assert [text.get_text() for text in figure.axes[0].texts] == ["base: -8.85"]
    assert figure.axes[0].get_ylim()[0] > -1
    # What is within noise stays, and so does everything where nothing is known of the noise.
    for shift, seeds, texts in ((0.05, (0, 1), 0), (0.34, (0, 1), 0), (0.37, (0, 1), 1), (9, (0, 1), 1), (9, (0,), 0)):
        even = graded({"base": MIDDLE, "one": EDGE, "two": EDGE, "three": EDGE, "four": EDGE}, seeds=seeds)
        arms = [dataclasses.replace(arm, figures=arm.figures - shift * (arm.name == "base")) for arm in even.arms]
        _, figure = pictures._parameters(dataclasses.replace(even, arms=arms), pictures._colors(even))
        assert len(figure.axes[0].texts) == texts


@pytest.mark.parametrize(("option", "joined"), [({"r": [2, 8]}, "-"), ({"lora_dropout": [0.0, 0.1]}, "None")], ids=str)
def test_points_are_joined_where_a_method_grows_and_not_across_its_options(option, joined, tmp_path):
    mapping = {
        "task": "causal-lm",
        "model_name_or_path": "demo",
        "output_dir": str(tmp_path),
        "dataset_name": "text.txt",
        "grid": {
            "methods": {"LoRA": {"peft_type": "LORA", **option}},
            "learning_rate": [1e-3],
            "seed": [0, 1],
            "test_fraction": 0.1,
        },
    }
    grid, draw = Grid.from_mapping(mapping), np.random.default_rng(0)
    outcome = outcome_of(grid, [line(run, draw.normal(2, 0.3, size=40), draw) for run in grid.runs], title="joined")
    for part in (pictures._parameters, pictures._seconds, pictures._memory):
        _, figure = part(outcome, {"LoRA": "blue"})
        assert [drawn.get_linestyle() for drawn in figure.axes[0].lines if len(drawn.get_xdata()) == 2][:1] == [joined]


def test_a_picture_grows_with_its_legend(outcome):
    _, short = pictures._parameters(outcome, pictures._colors(outcome))
    arms = [dataclasses.replace(outcome.arms[0], method=f"method number {number}") for number in range(9)]
    lines = [outcome.lines[0] | {"method": arm.method} for arm in arms]
    many = dataclasses.replace(outcome, arms=arms, lines=lines)
    _, tall = pictures._parameters(many, pictures._colors(many))
    assert tall.get_figheight() > short.get_figheight() + 0.5
    assert len(set(pictures._colors(many).values())) == 9


def test_a_setting_that_was_lost_is_crossed_out(outcome):
    _, figure = pictures._learning_rates(outcome, pictures._colors(outcome))
    lines = [line for axes in figure.axes for line in axes.lines]
    crosses = [list(line.get_xdata()) for line in lines if line.get_marker() == "x"]
    assert sorted(crosses) == [[], [], [1e-3]]  # of "bold" one seed diverged there
    assert pictures._learning_rates(graded({"base": {1e-2: 0.5}}, rates=[1e-2]), {}) is None


def test_every_method_with_several_arms_has_a_panel_of_its_own(outcome):
    _, figure = pictures._learning_rates(outcome, pictures._colors(outcome))
    assert [axes.get_title() for axes in figure.axes] == ["LoRA", ""]
    ranked, single = ([text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes)
    assert (ranked, single) == (["r=2", "r=8"], ["<b>bold</b> & Co"])
    curves = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [line.get_alpha() for line in curves] == pytest.approx([0.65, 1.0])  # the smaller one is paler
    for line, rank in zip(curves, ("r=2", "r=8"), strict=True):
        arm = next(arm for arm in outcome.arms if arm.name == f"LoRA {rank}")
        assert list(line.get_ydata()) == [setting.validation for setting in arm.settings]
    _, alone = pictures._learning_rates(graded({"base": MIDDLE, "best": EDGE}), {"base": "b", "best": "r"})
    assert len(alone.axes) == 1
    assert len(alone.axes[0].get_legend().get_texts()) == 2


@pytest.mark.parametrize(("key", "what"), [("eval_loss", "validation loss"), ("loss", "training loss")])
def test_curves_are_of_validation_rows_where_they_were_measured_more_than_once(key, what, tmp_path):
    found = graded({"base": MIDDLE})
    (arm,) = found.arms
    for line in arm.lines:
        folder = tmp_path / str(line["seed"])
        folder.mkdir()
        line["recipe"] = line["recipe"] | {"output_dir": str(folder)}
        rows = [{"step": step, "loss": 8.0 / step + line["seed"]} for step in (1, 2, 4)]
        rows += [{"step": step, "eval_loss": 1.0 / step + line["seed"]} for step in ((2, 4) if key != "loss" else (4,))]
        RunFolder(folder).metrics_log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told, figure = pictures._curves(found, {"base": "b"})
    assert told.startswith(f"The {what} at")
    (curve,) = figure.axes[0].lines
    expected = {2: 1.0, 4: 0.75} if key == "eval_loss" else {1: 8.5, 2: 4.5, 4: 2.5}  # means over seeds 0 and 1
    assert dict(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == pytest.approx(expected)


def browse(page_path: Path, *arguments: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments, str(page_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(shown, tmp_path, width):
    policy = re.search(r"<meta http-equiv=.*?>", shown)[0]
    free = shown.replace(policy, "").replace("'", "&#39;")
    (tmp_path / "frame.html").write_text(WIDTH.format(width=width, page=free))
    dom = browse(tmp_path / "frame.html", "--dump-dom", "--virtual-time-budget=3000")
    assert int(re.search(r"<title>(\d+)</title>", dom)[1]) <= width


@needs_chromium
def test_a_browser_draws_it_and_dark_is_dark(shown, tmp_path):
    from PIL import Image

    (tmp_path / "page.html").write_text(shown)
    brightness = {}
    for mode, switch in (("light", "--force-light-mode"), ("dark", "--force-dark-mode")):
        picture = tmp_path / f"{mode}.png"
        browse(tmp_path / "page.html", f"--screenshot={picture}", "--window-size=1280,900", switch)
        pixels = np.asarray(Image.open(picture).convert("L"), float)
        brightness[mode] = float(np.median(pixels))
        assert pixels.std() > 5  # there is something on it
    assert brightness["light"] > 200
    assert brightness["dark"] < 60
