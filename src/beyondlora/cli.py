"""The command line. Whatever needs torch is imported inside a command, so that --help answers at once.

Exit codes: 0 done; 1 stopped (the loss became nan; nobody reads the output any more, as behind `| head`), or a bug,
which shows its traceback; 2 the input cannot work; 130 Ctrl-C; 143 SIGTERM. BEYONDLORA_TRACEBACK=1 shows the traceback
of an input error too.
"""

import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import __version__, chatter  # noqa: F401  (which works by being imported)
from .interrupts import ASKED_TO_END, Terminated, terminate
from .recipe import EXPLAINED, Recipe, apply_override
from .run_folder import RunFolder, finite
from .tables import show, show_analysis, show_figures, show_gap

if TYPE_CHECKING:
    from .progress import Progress

INTERRUPTED, TERMINATED = 130, 143
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
messages = Console(stderr=True, emoji=False)  # messages and progress; results alone go to stdout

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change a key of the recipe; adapter.KEY=VALUE in the adapter block."
    ),
]


def main() -> None:
    """Run the command line; never returns."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where it knows no ±, a ? is better than no table
            stream.reconfigure(errors="replace")
    # A launcher ends its processes one by one: none of them must wait for a step that others no longer take.
    if "RANK" not in os.environ and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(INTERRUPTED)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"beyondlora {__version__}")
        raise typer.Exit


@app.callback()
def beyondlora(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Adapters beyond LoRA: train them, and find out honestly whether they helped."""


@app.command()
def train(
    recipe: Annotated[
        Path,
        typer.Argument(help=f"A recipe (YAML). Its keys: {EXPLAINED}", metavar="RECIPE"),
    ],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir where it stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in output_dir first.")] = False,
) -> None:
    """Fine-tune a model by a recipe, into the run folder output_dir."""
    with _explained():
        loaded = Recipe.load(recipe, set_ or ())
        with _resumable(loaded):
            from . import train as training

            summary = training.train(loaded, resume=resume, overwrite=overwrite, progress=_progress())
        if not _is_first_process():
            return
        show_figures(
            f"{summary['peft_type']}, {summary['trainable_parameters']:,} trainable parameters, "
            f"best step {summary['best_step']} of {summary['steps']}, {summary['seconds']:.0f} s",
            summary["metrics"],
        )
        _say(f"Run folder: {loaded.output_dir}")


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.", metavar="RUN_OR_ADAPTER")],
    data: Annotated[
        str | None, typer.Option(help="File, folder or hub name to evaluate on. Default: the run's evaluation rows.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Fold the adapter into the base weights first.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="How to read the data, for an adapter that belongs to no run.")
    ] = None,
    set_: Overrides = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Write the questions of the recipe's metrics and the model's answers here (JSON lines)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure an adapter: loss, accuracy, correlations, the recipe's metrics; each with its standard error."""
    with _explained():
        source = recipe or RunFolder(target).recipe
        if set_ and not source.exists():
            raise ValueError(f"--set changes a recipe, and {target} holds none; name one with --recipe.")
        loaded = Recipe.load(source, set_ or ()) if recipe or set_ else None
        from . import evaluate as evaluation

        progress = _progress()
        with _bar(progress) as on_batch:
            result = evaluation.evaluate(target, data=data, recipe=loaded, merged=merged, on_batch=on_batch, keep=keep)
        if not _is_first_process():
            return
        if as_json:
            _print_json(result)
        else:
            how = " (merged)" if merged else ""
            show_figures(f"{result['adapter']}{how} on {result['data']}, {result['seconds']:.0f} s", result["metrics"])


@app.command()
def analyse(
    targets: Annotated[
        list[Path], typer.Argument(help="Run folders or adapter folders, of one base model.", metavar="ADAPTER")
    ],
    data: Annotated[
        str | None, typer.Option(help="File, folder or hub name to run through it. Default: the runs' evaluation rows.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for analysis.json, layers.csv, spectra.csv and the pictures.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens of the data.")] = 16_384,
    recipe: Annotated[Path | None, typer.Option(help="How to read the data. Default: as each run did.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what adapters do on real data: spectra, effective ranks, dead units, subspaces, splines."""
    with _explained():
        loaded = Recipe.load(recipe) if recipe else None
        from . import analyse as analysis

        result = analysis.analyse(
            targets, data=data, recipe=loaded, out=out, max_tokens=max_tokens, progress=_progress()
        )
        if as_json:
            _print_json(result)
        else:
            show_analysis(result, _say)
        if out is not None:
            _say(f"Written: {out}")


@app.command()
def export(
    target: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.", metavar="RUN_OR_ADAPTER")],
    to: Annotated[str, typer.Option(help="'lora': a plain LoRA any server loads. 'merged': a whole model.")] = "lora",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: RUN-lora or -merged, or ADAPTER-lora, beside it.")
    ] = None,
    distil: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Fit the nearest LoRA to a nonlinear adapter on DATA ('train': the run's training rows).",
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the distilled LoRA. Default: the adapter's.")] = None,
    round_rank: Annotated[
        bool, typer.Option("--round-rank", help="Pad the rank to one that vLLM takes as --max-lora-rank.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Compare on all evaluation rows: each layer, loss, perplexity, agreement.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="File, folder or hub name to compare on. Default: the run's evaluation rows, or a few prompts."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="How to read the data, for an adapter that belongs to no run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what export.json holds.")] = False,
) -> None:
    """Write what a server loads, a plain LoRA or a merged model, once it has been compared with the live adapter."""
    with _explained():
        named = target.parent if RunFolder(target.parent).recipe.exists() else target  # beside the run, not in it
        named = named if named.name not in ("", "..") else named.resolve()
        folder = out or named.with_name(f"{named.name}-{to}")
        loaded = Recipe.load(recipe) if recipe else None
        from .export import export as write

        record = write(
            target,
            folder,
            to=to,
            distil=distil,
            rank=rank,
            round_rank=round_rank,
            data=data,
            recipe=loaded,
            report=report,
            progress=_progress(),
        )
        if as_json:
            _print_json(record)
            return
        show_gap(record, every_layer=report)
        _say(f"Written: {folder}. To serve it:")
        _print(record["serve"])


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="An authors' checkpoint (.pt), or an adapter folder of theirs.", metavar="SOURCE")
    ],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    base_model: Annotated[
        str | None, typer.Option(help="Folder or hub name of the base model. Default: what the adapter folder names.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the adapter's config that the source does not hold."),
    ] = None,
) -> None:
    """Turn the authors' own files into an adapter folder; a tensor missing or left over is an error."""
    with _explained():
        settings = dict[str, Any]()
        for setting in set_ or ():
            apply_override(settings, setting)
        from .foreign import import_adapter

        found = import_adapter(source, out, base_model=base_model, settings=settings)
        _print(
            f"{found['peft_type']}, r={found['r']}, {found['layers']} layers ({', '.join(found['target_modules'])}) of "
            f"{found['base_model']}"
        )
        if found["repaired"]:
            _say(f"{len(found['repaired'])} factors were stored rounded, and were put back on the Stiefel manifold.")
        _say(f"Written: {out}")


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Folder for the runs. Default: runs/demo, or runs/demo-2, ...")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted demo in --output.")] = False,
) -> None:
    """Adapt the embedded model to Python source with five methods at equal size, and compare them; a few minutes."""
    with _explained():
        if resume and output is None:
            raise ValueError("--resume goes on with the demo in a folder: name it with --output.")
        from .demo import run

        folder = output or run.free_folder(Path("runs/demo"))
        try:
            rows = run.demo(folder, resume=resume, progress=_progress())
        except ASKED_TO_END:
            _say(f"The demo can be continued: beyondlora demo --output {folder} --resume")
            raise
        show(run.table(rows))
        _print(run.caption(rows))
        _say(f"Runs, curves.png and results.json: {folder}")


@app.command()
def compare(
    grid: Annotated[
        Path, typer.Argument(help="A grid (YAML): a recipe with methods, learning rates and seeds.", metavar="GRID")
    ],
    set_: Overrides = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side. Default: one per core, or one on an accelerator.")
    ] = None,
    join: Annotated[
        list[Path] | None, typer.Option(help="Output folder of another comparison, whose runs join the table.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start although the grid has over 60 runs or takes over an hour.")
    ] = False,
) -> None:
    """Compare methods fairly: search learning rates for all alike, repeat seeds, and say what is noise."""
    with _explained():
        from .compare import comparison, words
        from .compare.grid import Grid

        loaded = Grid.load(grid, set_ or ())
        try:
            outcome = comparison.compare(
                loaded,
                title=loaded.title or grid.stem,
                command=["beyondlora", *sys.argv[1:]],
                joined=join or (),
                jobs=jobs,
                yes=yes,
                progress=_progress(),
            )
        except ASKED_TO_END:
            _say("The comparison can be continued: the same command again.")
            raise
        except comparison.NoVerdictError as error:
            show(words.table(error.outcome))
            raise
        show(words.table(outcome))
        for sentence in [*words.verdicts(outcome), *words.pair_verdicts(outcome), *outcome.notes]:
            _print(f"- {sentence}")
        _say(f"report.html, report.md, results.jsonl and the runs: {loaded.output}")


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe: will it run? Without one: what works here?", metavar="RECIPE")
    ] = None,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown source.")] = False,
) -> None:
    """Find out what works in this environment, by doing it on small models; or try the first steps of a recipe."""
    with _explained():
        if recipe is None and set_:
            raise ValueError("--set changes a recipe; name one.")
        if as_markdown and (as_json or recipe is not None):
            raise ValueError("--markdown prints what works here: without a recipe, and without --json.")
        loaded = None if recipe is None else Recipe.load(recipe, set_ or ())
        from . import doctor as examination

        progress = _progress()
        if loaded is not None:
            found = examination.try_recipe(loaded, progress)
            if as_json:
                _print_json(found)
            else:
                _print(_verdict(found))
            return
        with _bar(progress, "probing") as on_row:
            matrix = examination.probe_methods(on_row)
        findings = (examination.describe_environment(), matrix, examination.probe_optimizers())
        if as_json:
            _print_json(examination.as_json(*findings))
        elif as_markdown:
            _print(examination.as_markdown(*findings))
        else:
            from rich.markdown import Markdown

            Console().print(Markdown(examination.as_markdown(*findings)))


def _verdict(found: dict[str, Any]) -> str:
    """What a trial of a recipe found, in words."""
    steps = f"{found['steps']:,} steps of {found['seconds_per_step']:.2f} s, about {found['seconds'] / 60:.0f} min"
    return (
        f"This recipe runs: {found['trainable_parameters']:,} trainable parameters, {steps}, and the evaluations. "
        f"Training loss of the first step {found['loss_before']:.4f}, of the third {found['loss_after']:.4f}."
        + "".join(f"\nNote: {note}" for note in found["notes"])
    )


@contextmanager
def _explained() -> Iterator[None]:
    """Turn warnings into sentences, and what went wrong into one and an exit code."""
    try:
        with _warnings_said():
            yield
    except KeyboardInterrupt:
        messages.print("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        messages.print("Ended by SIGTERM.")
        raise typer.Exit(TERMINATED) from None
    except FloatingPointError as error:
        messages.print(f"[red]Stopped:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("BEYONDLORA_TRACEBACK"):
            raise
        messages.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def _resumable(recipe: Recipe) -> Iterator[None]:
    """Say on Ctrl-C and SIGTERM from where --resume would go on."""
    try:
        yield
    except ASKED_TO_END:
        run = RunFolder(recipe.output_dir)
        if run.recipe.exists():
            checkpoint = run.newest_checkpoint()
            place = f"from step {checkpoint.name.rpartition('-')[2]}" if checkpoint else "from the start"
            _say(f"The run in {run.path} can be continued {place}: the same command with --resume.")
        raise


@contextmanager
def _bar(progress: "Progress", what: str = "evaluating") -> Iterator[Any]:
    """A bar that is begun by the first call, when the number of rows is known."""
    from .progress import in_stretches

    try:
        yield in_stretches(progress, what)
    finally:
        progress.end()


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Show our own warnings as sentences, each once, without the line of source they come from."""
    said = set[str]()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category is UserWarning and str(message) not in said:
            said.add(str(message))
            _say(f"Warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _say(message: str) -> None:
    messages.print(escape(message), soft_wrap=True, highlight=False)


def _print(text: str) -> None:
    """To standard output; where nobody reads that any more, the command ends."""
    try:
        typer.echo(text)
    except BrokenPipeError:
        # Or Python tries again at its end, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _print_json(content: Any) -> None:
    _print(json.dumps(finite(content), indent=2))


def _progress() -> "Progress":
    from .progress import Progress, progress_on

    return progress_on(messages) if _is_first_process() else Progress()


def _is_first_process() -> bool:
    """Whether this process speaks for all that a launcher (accelerate, torchrun) started."""
    return os.environ.get("RANK", "0") == "0"
