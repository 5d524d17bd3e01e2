"""`beyondlora demo`: five methods at matched trainable parameters on the embedded model, and one table.

Every training is an ordinary run of a recipe, in a run folder of its own; finished ones are not repeated on --resume.
The learning rate is chosen on the validation modules, the table is measured on the test modules, which nothing was
trained or chosen on. Whatever comes out is reported.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from .. import curves, data, models
from ..evaluate import device, evaluate, load_base
from ..measure import as_dict, measure
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import RunFolder, write_json
from ..train import train
from .corpus import write_corpus

CORPUS, RESULTS = "corpus", "results.json"


@dataclass(frozen=True)
class Row:
    """What the table says about one method."""

    method: str
    rank: int | None
    parameters: int
    learning_rate: float | None
    at_edge: bool  # the best learning rate is the smallest or the largest that was tried
    perplexity: dict[str, Any]
    seconds: float
    run: str | None


def settings() -> dict[str, Any]:
    """Read demo/recipe.yaml."""
    text = (resources.files("beyondlora.demo") / "recipe.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def demo(
    output: Path, *, plan: Mapping[str, Any] | None = None, resume: bool = False, progress: Progress | None = None
) -> list[Row]:
    """Run the comparison into a folder and return the rows of its table.

    Args:
        output: must not hold anything yet, unless resume.
        plan: other settings than demo/recipe.yaml's.
        resume: go on where an interrupted demo stopped.

    Raises: FileExistsError, FileNotFoundError, ValueError.
    """
    progress, plan = progress or Progress(), plan or settings()
    if not resume and output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} is not empty. Go on with an interrupted demo with --resume, or name another --output."
        )
    corpus = dict(plan["corpus"])
    files = write_corpus(output / CORPUS, corpus, max_bytes=corpus.pop("max_bytes"))
    base = Recipe(
        **plan["recipe"],
        adapter={"peft_type": "LORA"},
        output_dir=str(output),
        dataset_name=str(files["train"]),
        eval_dataset_name=str(files["validation"]),
    )
    rates = [float(rate) for rate in plan["learning_rates"]]
    steps = base.max_steps
    progress.begin("demo", len(plan["methods"]) * len(rates) * steps)
    try:
        rows, best, done = [_base_row(base, files["test"])], {}, 0
        for method, adapter in plan["methods"].items():
            losses, runs = {}, {}
            for rate in rates:
                runs[rate] = RunFolder(output / f"{method.lower()}-lr{rate:g}")
                recipe = base.replace(adapter=adapter, learning_rate=rate, output_dir=str(runs[rate].path))
                part = _Part(progress, f"{method}, learning rate {rate:g}", done)
                losses[rate] = train(recipe, resume=resume, progress=part)["metrics"]["loss"]["value"]
                done += steps
            rate = min(losses, key=lambda rate: losses[rate])
            best[method] = runs[rate]
            rows.append(_row(method, rate, rate in (min(rates), max(rates)), runs[rate], files["test"]))
    finally:
        progress.end()
    _write(output, rows, best)
    return rows


def free_folder(folder: Path) -> Path:
    """Return the folder, or the first of FOLDER-2, FOLDER-3, ... that holds nothing."""
    candidates = itertools.chain([folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2)))
    return next(path for path in candidates if not path.exists() or not any(path.iterdir()))


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out for a terminal of 80 columns."""
    shown = Table(title="Held-out Python source", title_justify="left")
    for heading in ("method", "rank", "trainable", "best LR", "perplexity", "± 1 s.e.", "time"):
        shown.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        trained = row.learning_rate is not None
        shown.add_row(
            row.method,
            str(row.rank) if trained else "",
            f"{row.parameters:,}",
            f"{row.learning_rate:g}{'*' if row.at_edge else ''}" if trained else "",
            f"{row.perplexity['value']:.2f}",
            f"{row.perplexity['stderr']:.2f}",
            f"{row.seconds:.0f} s" if trained else "",
        )
    return shown


def caption(rows: Sequence[Row]) -> str:
    """Say what the table can and cannot show."""
    lines = [
        f"± over {rows[0].perplexity['n']} blocks of modules that nothing was trained or chosen on. One seed,",
        "a short run: a demonstration, not a benchmark. Time is the training of the run shown.",
    ]
    if any(row.at_edge for row in rows):
        lines.append("* the best learning rate was the smallest or largest tried: another might do better.")
    return "\n".join(lines)


class _Part(Progress):
    """One training's share of the demo's single bar."""

    def __init__(self, whole: Progress, what: str, before: int) -> None:
        self.whole, self.what, self.before, self.training = whole, what, before, False

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember whether the steps that follow are training steps."""
        self.training = what == "training"

    def advance(self, done: int, note: str = "") -> None:
        """Move the whole bar."""
        if self.training:
            self.whole.advance(self.before + done, f"{self.what}  {note}")


def _base_row(base: Recipe, test: Path) -> Row:
    """The model before any training."""
    processor = models.load_processor(base.model_name_or_path, task=base.task)
    rows = data.prepare_evaluation(base.replace(max_eval_samples=None), processor, str(test))
    model = load_base(base, processor, None).to(device())
    scores = measure(
        model, rows.rows, rows.collator, task=base.task, batch_size=base.per_device_eval_batch_size, bf16=base.bf16
    )
    return Row("none (base)", None, 0, None, False, as_dict(scores)["perplexity"], 0.0, None)


def _row(method: str, rate: float, at_edge: bool, run: RunFolder, test: Path) -> Row:
    recipe = Recipe.load(run.recipe)
    scores = evaluate(run.path, data=str(test), recipe=recipe.replace(max_eval_samples=None))["metrics"]
    summary = json.loads(run.metrics.read_text(encoding="utf-8"))
    return Row(
        method=method,
        rank=recipe.adapter.get("r"),
        parameters=summary["trainable_parameters"],
        learning_rate=rate,
        at_edge=at_edge,
        perplexity=scores["perplexity"],
        seconds=summary["seconds"],
        run=str(run.path),
    )


def _write(output: Path, rows: Sequence[Row], best: Mapping[str, RunFolder]) -> None:
    write_json(output / RESULTS, {"rows": [asdict(row) for row in rows]})
    if curves.can_draw():
        curves.draw({name: run.rows() for name, run in best.items()}, output / "curves.png", title="validation modules")
