"""From adapter folders to tables, files and pictures; and the refusals that come before anything long."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import small_runs
import torch
from PIL import Image
from typer.testing import CliRunner

from beyondlora.analyse import analyse
from beyondlora.cli import app
from beyondlora.progress import Progress
from beyondlora.tables import show_analysis
from beyondlora.train import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def runs(house, tmp_path_factory):
    """One finished run a method, in a folder of this module's own."""
    folder = tmp_path_factory.mktemp("analysed")
    for name, adapter in small_runs.ADAPTERS.items():
        train(small_runs.recipe(house, adapter=adapter, output_dir=str(folder / name), learning_rate=0.03))
    return folder


@pytest.fixture(scope="module")
def result(runs, house):
    """All of them analysed at once, with every file written."""
    targets = [runs / name for name in small_runs.ADAPTERS]
    return analyse(targets, data=str(house / "text.txt"), out=runs / "out", max_tokens=500)


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


def test_the_result_is_that_of_each_adapter_by_itself(runs, house, result):
    assert [a["label"] for a in result["adapters"]] == list(small_runs.ADAPTERS)
    alone = analyse([runs / "cera"], data=str(house / "text.txt"), max_tokens=500)["adapters"][0]
    together = result["adapters"][1]
    assert alone["mean"] == together["mean"]
    assert alone["layers"] == together["layers"]
    assert alone["mean"]["tokens"] == 500


def test_progress_ends_where_the_rows_do(runs, house):
    class Recorded(Progress):
        totals, last = [], 0

        def begin(self, what, total, done=0):
            self.totals.append(total)

        def advance(self, done, note=""):
            self.last = done

    for limit in (100, 1_000_000):
        seen = Recorded()
        analyse([runs / "cera"], data=str(house / "text.txt"), max_tokens=limit, progress=seen)
        assert seen.totals.pop() == seen.last
    assert seen.last < 1_000_000


def test_every_adapter_is_compared_with_every_other(result):
    pairs = {(pair["a"], pair["b"]) for pair in result["subspaces"]}
    assert pairs == set(itertools.combinations(small_runs.ADAPTERS, 2))


def test_adapters_are_called_by_what_tells_their_paths_apart(runs, house, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "lora" / "adapter", tmp_path / name / "same" / "adapter")
    both = [tmp_path / name / "same" / "adapter" for name in ("one", "two")]
    recipe = small_runs.recipe(house)
    found = analyse(both, data=str(house / "text.txt"), recipe=recipe, max_tokens=50)
    assert [a["label"] for a in found["adapters"]] == ["one/same/adapter", "two/same/adapter"]


def test_means_are_means_over_layers(result):
    for adapter in result["adapters"]:
        ranks = [layer["effective_rank"] for layer in adapter["layers"]]
        assert adapter["mean"]["effective_rank"] == pytest.approx(np.mean(ranks))
        assert adapter["mean"]["effective_rank_deviation"] == pytest.approx(np.std(ranks))
        spectra = [np.array(layer["singular_values"]) / np.sum(layer["singular_values"]) for layer in adapter["layers"]]
        np.testing.assert_allclose(adapter["mean"]["spectrum"], np.mean(spectra, axis=0), rtol=1e-9)


def test_files_hold_what_the_result_holds(runs, result):
    out = runs / "out"
    written = json.loads((out / "analysis.json").read_text())
    assert written["adapters"] == json.loads(json.dumps(result["adapters"]))
    with (out / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 14
    assert float(rows[0]["effective_rank"]) == result["adapters"][0]["layers"][0]["effective_rank"]
    with (out / "spectra.csv").open() as file:
        spectra = list(csv.DictReader(file))
    values = [float(row["singular_value"]) for row in spectra if (row["adapter"], row["of"]) == ("cera", "outputs")]
    assert values == [value for layer in result["adapters"][1]["layers"] for value in layer["singular_values"]]
    assert {row["adapter"] for row in spectra if row["of"] == "update"} == {"lora", "aurora", "stella"}
    for name in ("spectrum.png", "effective-rank.png", "splines.png"):
        with Image.open(out / name) as picture:
            picture.verify()
    assert not list(out.glob("*.partial"))


def test_subspaces_are_scipys_for_the_directions_of_a_linear_adapter(runs, house, tmp_path):
    """Of a LoRA of rank 1 the outputs have one direction, B's column: no data needed to know the angle."""
    one = {"peft_type": "LORA", "r": 1, "target_modules": "all-linear"}
    for seed in (1, 2):
        train(small_runs.recipe(house, adapter=one, seed=seed, output_dir=str(tmp_path / str(seed))))
    (pair,) = analyse([tmp_path / "1", tmp_path / "2"], max_tokens=200)["subspaces"]
    columns = [small_runs.weights(tmp_path / seed / "adapter") for seed in ("1", "2")]
    for row in pair["layers"]:
        a, b = (w[f"base_model.model.{row['name']}.lora_B.weight"].double().numpy() for w in columns)
        expected = np.rad2deg(scipy.linalg.subspace_angles(a, b))
        np.testing.assert_allclose(row["angles_degrees"], expected, atol=1e-6)
        assert row["overlap"] == pytest.approx(np.cos(np.deg2rad(expected[0])) ** 2, abs=1e-8)
        assert row["chance"] == pytest.approx(1 / len(a))
        a, b = (w[f"base_model.model.{row['name']}.lora_A.weight"].double().numpy().T for w in columns)
        expected = np.rad2deg(scipy.linalg.subspace_angles(a, b))
        np.testing.assert_allclose(row["inputs"]["angles_degrees"], expected, atol=1e-6)
        assert row["inputs"]["chance"] == pytest.approx(1 / len(a))


def test_an_adapter_is_in_the_subspace_of_its_copy(runs, house, tmp_path):
    copy = shutil.copytree(runs / "lora", tmp_path / "copy")
    (pair,) = analyse([runs / "lora", copy], max_tokens=200)["subspaces"]
    assert pair["overlap"] == pytest.approx(1, abs=1e-12)
    assert pair["input_overlap"] == pytest.approx(1, abs=1e-12)
    assert 0 < pair["input_chance"] < 0.5
    assert len(pair["layers"]) == 14


def test_many_adapters_are_a_table_of_80_columns_with_whole_names_and_no_list_of_pairs(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    mean = analyse([runs / "cera"], max_tokens=200)["adapters"][0]["mean"]
    labels = [f"cera-r-{rank}-lr0.03-seed0" for rank in range(7)]
    pair = {"a": labels[0], "b": labels[1], "overlap": 0.5, "chance": 0.1, "input_overlap": 0.5, "input_chance": None}
    result = {"adapters": [{"label": label, "mean": mean} for label in labels], "data": "text", "seconds": 1.0}
    said = []
    show_analysis(result | {"subspaces": [pair] * 15}, said.append)
    shown = capsys.readouterr().out
    assert all(label in shown for label in labels)
    assert shown.count("0.50") == 30
    assert said == []
    show_analysis(result | {"subspaces": [pair] * 21}, said.append)
    assert "0.50" not in capsys.readouterr().out
    assert said == ["How near the subspaces of 21 pairs of adapters are is in the JSON (--json, or --out FOLDER)."]


# The command line ---------------------------------------------------------------------------------------------------


def test_the_table_and_json(runs, house):
    arguments = ["analyse", runs / "cera", runs / "stella", "--data", house / "text.txt", "--max-tokens", 300]
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert "300 tokens of" in done.stdout
    assert "effective" in done.stdout
    assert "cera and stella" in done.stdout
    as_json = call(*arguments, "--json")
    assert [a["peft_type"] for a in json.loads(as_json.stdout)["adapters"]] == ["CERA", "STELLA"]
    few = call("analyse", runs / "cera", "--max-tokens", 3)
    assert "bound every rank here below r" in few.output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{runs}/nowhere"], "does not exist"),
        (["{house}/base"], "a whole model, without an adapter"),
        (["{house}"], "not an adapter folder"),
        (["{runs}/lora", "{runs}/lora/../lora"], "given twice"),
        (["{runs}/lora", "--max-tokens", "1"], "at least 2 tokens"),
        (["{runs}/lora", "--data", "{house}/none.txt"], "none.txt"),
        (["{runs}/lora", "--out", "{house}"], "holds other files"),
        (["{runs}/lora", "--out", "{house}/text.txt"], "is a file"),
        (["{runs}/lora", "--out", "{house}/text.txt/below"], "text.txt is a file; name another place"),
        (["{runs}/lora/adapter", "{runs}/other-base", "--data", "{house}/text.txt"], "different base models"),
    ],
)
def test_what_cannot_be_analysed_is_said_in_a_sentence(arguments, complaint, runs, house):
    other = runs / "other-base"
    if not other.exists():
        shutil.copytree(runs / "lora", other)
        recipe = (other / "recipe.yaml").read_text()
        (other / "recipe.yaml").write_text(recipe.replace(str(house / "base"), "demo"))
    done = call("analyse", *(argument.format(runs=runs, house=house) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert complaint in done.stderr
    assert "Traceback" not in done.output


def test_runs_that_see_different_rows_are_refused(runs, house, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("another text, with other words.\n" * 30)
    train(small_runs.recipe(house, dataset_name=str(other), output_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="different rows"):
        analyse([runs / "lora", tmp_path / "run"])


@pytest.mark.filterwarnings("ignore:The PEFT config.s `base_model_name_or_path` was renamed")
def test_one_base_may_be_spelled_in_two_ways(runs, house, tmp_path):
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    (tmp_path / "link").symlink_to(house / "base")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(house / "base"), str(tmp_path / "link")))
    assert len(analyse([runs / "lora", run], max_tokens=50)["adapters"]) == 2


def test_pictures_of_an_earlier_analysis_do_not_stay(runs, tmp_path):
    for name in ("aurora", "lora"):
        analyse([runs / name], out=tmp_path / "out", max_tokens=50)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"analysis.json", "layers.csv", "spectra.csv", "spectrum.png", "effective-rank.png"}


def test_an_untrained_adapter_names_its_folder(runs, tmp_path):
    run = shutil.copytree(runs / "lora", tmp_path / "run")
    weights = small_runs.weights(run / "adapter")
    for name in weights:
        if "lora_B" in name:
            weights[name] = torch.zeros_like(weights[name])
    from safetensors.torch import save_file

    save_file(weights, run / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"run/adapter: The adapter's outputs do not vary"):
        analyse([run])
