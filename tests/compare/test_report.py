"""The page and the pictures: whole, self-contained, and as a browser shows them."""

import re
import shutil
import subprocess
import xml.dom.minidom
from pathlib import Path

import numpy as np
import pytest

from beyondlora.compare import pictures
from beyondlora.compare.arms import outcome_of
from beyondlora.compare.grid import Grid
from beyondlora.compare.report import page
from beyondlora.compare.words import caption, markdown, verdicts

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


def line(run, difficulty, draw):
    good = 0.05 * (run.recipe.learning_rate == 1e-2) + 0.3 * (run.method != "LoRA")
    nll = 20 * (difficulty - good + 0.02 * draw.normal() + 0.02 * draw.normal(size=40))
    loss = float(nll.sum() / 800)
    diverged = run.method != "LoRA" and run.recipe.learning_rate == 1e-3 and run.seed == 1
    rank = run.recipe.adapter.get("r", 3)
    figures = {"perplexity": {"value": float(np.exp(loss)), "stderr": None, "n": 40}}
    return {
        "run": run.name,
        "method": run.method,
        "arm": run.arm,
        "searched": run.searched,
        "seed": run.seed,
        "recipe": vars(run.recipe),
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


def test_every_figure_of_the_table_stands_on_the_page_and_in_the_markdown(outcome, shown):
    text = markdown(outcome, command="c")
    for arm in outcome.arms:
        for figure in (f"{arm.figures.mean():.3f}", f"{arm.lines[0]['trainable_parameters']:,}"):
            assert figure in shown
            assert figure in text
    assert text.count("\n| ") >= 1 + 1 + 3 + 6


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
    points = drawn["parameters"][1]
    assert "trainable parameters" in points


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
