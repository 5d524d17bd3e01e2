"""`beyondlora demo`: five methods at matched trainable parameters on the embedded model, and one table.

Every training is an ordinary run of a recipe, in a run folder of its own; finished ones are not repeated on --resume.
Two or more run side by side (../workers.py).
The learning rate is chosen on the validation modules, the table is measured on the test modules, which nothing was
trained or chosen on. Whatever comes out is reported.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from .. import curves, data
from ..evaluate import device, evaluate, load_base, load_processor
from ..measure import measure
from ..progress import Progress
from ..recipe import Recipe
from ..run_folder import RunFolder, write_json
from ..train import train
from ..workers import results
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
    runs = _recipes(base, plan, output)
    progress.begin("demo", len(runs) * base.max_steps)
    try:
        losses = results(_train_one, [(recipe, resume) for recipe in runs.values()], progress=progress)
        best = _best_rates(dict(zip(runs, losses, strict=True)))
        tasks = [(runs[choice], files["test"]) for choice in best.items()]
        scores = results(_measure_one, [(base, files["test"]), *tasks])
    finally:
        progress.end()
    rows = [Row("none (base)", None, 0, None, False, scores[0], 0.0, None)]
    edges = [function(map(float, plan["learning_rates"])) for function in (min, max)]
    rows += [
        _row(method, runs[method, rate], rate in edges, score)
        for (method, rate), score in zip(best.items(), scores[1:], strict=True)
    ]
    _write(output, rows)
    return rows


def _recipes(base: Recipe, plan: Mapping[str, Any], output: Path) -> dict[tuple[str, float], Recipe]:
    return {
        (method, rate): base.replace(
            adapter=adapter, learning_rate=rate, output_dir=str(output / f"{method.lower()}-lr{rate:g}")
        )
        for method, adapter in plan["methods"].items()
        for rate in map(float, plan["learning_rates"])
    }


def _best_rates(losses: Mapping[tuple[str, float], float]) -> dict[str, float]:
    """Return each method's learning rate of lowest validation loss; one that ended in nan counts as infinite."""
    best: dict[str, float] = {}
    for method, rate in losses:
        if method not in best or losses[method, rate] < losses[method, best[method]]:
            best[method] = rate
    for method, rate in best.items():
        if math.isinf(losses[method, rate]):
            raise FloatingPointError(f"Every learning rate that was tried with {method} ended in a loss of nan.")
    return best


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


def _train_one(recipe: Recipe, resume: bool, progress: Progress) -> float:
    """Train in a worker; return the validation loss."""
    try:
        loss: float = train(recipe, resume=resume, progress=progress)["metrics"]["loss"]["value"]
    except FloatingPointError:
        return math.inf
    return loss


def _measure_one(recipe: Recipe, test: Path, _progress: Progress) -> dict[str, Any]:
    """Measure a run, or the base model where there is none, on all test rows; return the perplexity."""
    everything = recipe.replace(max_eval_samples=None)
    perplexity: dict[str, Any]
    if RunFolder(recipe.output_dir).metrics.exists():
        perplexity = evaluate(Path(recipe.output_dir), data=str(test), recipe=everything)["metrics"]["perplexity"]
        return perplexity
    processor = load_processor(recipe)
    rows = data.prepare_evaluation(everything, processor, str(test))
    model = load_base(recipe, processor, None).to(device())
    scores = measure(model, rows.rows, rows.collator, task=recipe.task, batch_size=recipe.per_device_eval_batch_size)
    return asdict(scores["perplexity"])


def _row(method: str, recipe: Recipe, at_edge: bool, perplexity: dict[str, Any]) -> Row:
    summary = json.loads(RunFolder(recipe.output_dir).metrics.read_text(encoding="utf-8"))
    return Row(
        method=method,
        rank=recipe.adapter.get("r"),
        parameters=summary["trainable_parameters"],
        learning_rate=recipe.learning_rate,
        at_edge=at_edge,
        perplexity=perplexity,
        seconds=summary["seconds"],
        run=recipe.output_dir,
    )


def _write(output: Path, rows: Sequence[Row]) -> None:
    write_json(output / RESULTS, {"rows": [asdict(row) for row in rows]})
    if curves.can_draw():
        drawn = {row.method: RunFolder(row.run).rows() for row in rows if row.run is not None}
        curves.draw(drawn, output / "curves.png", title="validation modules")
