"""A run's folder on disk: what it holds, and how nothing half-written ever stands there under a final name.

    recipe.yaml        the resolved recipe; its presence makes the folder a run
    environment.json   versions, commit, device, seed, fingerprint of the data
    metrics.jsonl      one line a logging or evaluation event, as it happens
    metrics.json       the final figures; its presence makes the run finished
    adapter/           the best adapter by evaluation loss, PEFT's format; of full fine-tuning, the whole model
    last/              the adapter (the model) after the last step
    generations.jsonl  what the best one answered to the evaluation rows, where metrics or lm_eval_tasks ask
    curves.png         loss curves
    tracking/          what the experiment trackers of report_to keep on disk
    checkpoints/       what --resume starts from; gone once the run is finished
    .lock              held while a process trains here

Files are written as .NAME.beyondlora.partial and renamed; folders are filled in a folder of that name, where their
predecessor steps aside, too. No user's file is called so: what a kill leaves there is deleted the next time.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

CONTENTS = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "metrics.json",
    "adapter",
    "last",
    "generations.jsonl",
    "generations-test.jsonl",
    "curves.png",
    "tracking",
    "checkpoints",
)
KEPT_CHECKPOINTS = 2  # the newest, and one to fall back on should it be damaged
MANIFEST, LOCK = "manifest.json", ".lock"
PACKAGES = ("beyondlora", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


class RunFolder:
    """The folder of one training run.

    >>> run = RunFolder("runs/shakespeare")
    >>> run.claim(resume=False, overwrite=False)    # FileExistsError where a run or a stranger's files are
    >>> run.log({"step": 10, "loss": 2.5})
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.metrics_log = self.path / "metrics.jsonl"
        self.metrics = self.path / "metrics.json"
        self.adapter = self.path / "adapter"
        self.last = self.path / "last"
        self.generations = self.path / "generations.jsonl"
        self.test_generations = self.path / "generations-test.jsonl"  # of a comparison's test rows
        self.curves = self.path / "curves.png"
        self.tracking = self.path / "tracking"
        self.checkpoints = self.path / "checkpoints"
        self.staging = self.checkpoints / "partial"  # the Trainer writes here; `keep_checkpoint` renames

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may be written here; changes nothing on disk.

        Raises:
            FileExistsError: a run is here already, or files that are not ours.
            NotADirectoryError, PermissionError: nothing can be written here.
            ValueError: both flags at once.
        """
        if resume and overwrite:
            raise ValueError("--resume continues the run that is there, --overwrite deletes it: give one of them.")
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output_dir {str(self.path)!r} is a file; name a folder.")
        if self.path.is_symlink() and not self.path.exists():
            raise FileExistsError(
                f"output_dir {str(self.path)!r} is a link to {os.readlink(self.path)}, which does not exist; make that "
                "folder, or name another."
            )
        check_writable(self.recipe)
        strangers = self._strangers()
        if strangers and (overwrite or not self.recipe.exists()):
            raise FileExistsError(
                f"output_dir {str(self.path)!r} holds files that no run wrote ({', '.join(strangers[:5])}"
                f"{', ...' if len(strangers) > 5 else ''}). Nothing was touched; choose another output_dir, "
                "or move them away."
            )
        if self.recipe.exists() and not (resume or overwrite):
            state = "a finished run" if self.metrics.exists() else "an unfinished run"
            raise FileExistsError(
                f"output_dir {str(self.path)!r} already holds {state}. Continue it with --resume, "
                "replace it with --overwrite, or choose another output_dir."
            )

    def _strangers(self) -> list[str]:
        # A recipe is what a run writes first and what `clear` deletes last: without one, an `adapter` is somebody's.
        names = CONTENTS if self.recipe.exists() else [self.recipe.name]
        ours = {spelled for name in names for spelled in _spellings(name)} | {LOCK}
        return sorted(entry.name for entry in self.path.glob("*") if entry.name not in ours)

    def clear(self) -> None:
        """Delete what a run wrote here, and nothing else; the recipe last: half-cleared, it is still a run."""
        for name in reversed(CONTENTS):
            for spelled in _spellings(name):
                entry = self.path / spelled
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    # --- metrics.jsonl -------------------------------------------------------------------------------------------

    def log(self, row: dict[str, Any]) -> None:
        """Append one event; numbers that JSON has no word for (NaN, infinity) become null."""
        with self.metrics_log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return the events so far; a last line cut short by a kill is left out."""
        if not self.metrics_log.exists():
            return []
        rows = []
        for line in self.metrics_log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rows_until(self, step: int) -> list[dict[str, Any]]:
        """Return the events up to a step that a run resumes from; those after it will be lived through again."""
        return [row for row in self.rows() if row["step"] <= step]

    def rewind(self, step: int) -> None:
        """Forget the events after `step`."""
        write_text(self.metrics_log, "".join(json.dumps(row) + "\n" for row in self.rows_until(step)))

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def staged(self, step: int) -> Path:
        """Where the Trainer has written a checkpoint that is not sealed yet."""
        return self.staging / f"checkpoint-{step}"

    def keep_checkpoint(self, step: int) -> None:
        """Give the Trainer's staged checkpoint its final name, sealed with a manifest, and drop the oldest."""
        staged, final = self.staged(step), self.checkpoints / f"checkpoint-{step}"
        write_json(staged / MANIFEST, {name: _sha256(staged / name) for name in _files(staged)})
        if final.exists():  # a damaged one, which the resumed run has overtaken
            shutil.rmtree(final)
        os.replace(staged, final)
        for folder in self._checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(folder)

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint all of whose files are as they were written, or None."""
        return next(filter(_is_intact, reversed(self._checkpoints())), None)

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints: a finished run needs none. What a tracker wrote beside them is kept."""
        for entry in self.staging.glob("[!.]*"):
            if not entry.name.startswith("checkpoint-"):
                self.tracking.mkdir(exist_ok=True)
                os.replace(entry, self.tracking / entry.name)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


# --- writing ---------------------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Refuse a place where nothing can be written, before the work whose result would go there.

    Args:
        path: of a file or folder to be, or to be replaced.

    Raises: NotADirectoryError, PermissionError.
    """
    above = _nearest_above(path)
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written, because {above} is a file; name another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {above} is not writable for you; name another place.")


def _nearest_above(path: Path) -> Path:
    """What exists of the folders that a path names."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _partial(path: Path) -> Path:
    """Where a file or folder is written that is not whole yet: beside its place, so that renaming is enough."""
    return path.with_name(f".{path.name}.beyondlora.partial")


def _spellings(name: str) -> tuple[str, ...]:
    """A run's own name, and what a kill leaves of it; the last two were everybody's until files were hidden."""
    return name, _partial(Path(name)).name, name + ".partial", name + ".old"


def write_text(path: Path, text: str) -> None:
    """Write a file so that either the old or the new text stands under its name, never half of one."""
    partial = _partial(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as indented JSON, atomically; NaN and infinity become null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n")


@contextlib.contextmanager
def saying_disk(path: Path) -> Iterator[None]:
    """Turn what safetensors and torch make of a full disk into an OSError that says so."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if not any(sign in str(error) for sign in ("while serializing", "inline_container", "iostream error")):
            raise
        free = shutil.disk_usage(_nearest_above(path)).free / 2**20
        raise OSError(
            f"{path} could not be written ({str(error).splitlines()[0]}). {free:,.0f} MiB are free there: make room, "
            "and give the command again (training goes on with --resume)."
        ) from error


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder to fill; it takes the name `folder` once the block ends without an error.

    Of a link it is the folder behind it that is replaced. Raises: BlockingIOError: another process is at it.

    >>> with replacing(run.adapter) as partial:
    ...     model.save_pretrained(partial)
    """
    folder = folder.resolve()
    work = _partial(folder)
    partial, old = work / folder.name, work / f"{folder.name}.old"
    busy = f"{folder}: another process is writing this folder. Wait for it, or name another folder."
    with _lock(work, busy):
        if old.exists() and not folder.exists():  # a kill came between the two renames
            os.replace(old, folder)
        for left in (partial, old):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        try:
            with saying_disk(folder):
                yield partial
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(work, ignore_errors=True)


def _lock(folder: Path, busy: str) -> contextlib.AbstractContextManager[Any]:
    """Make and lock a folder, until the block ends. Raises: BlockingIOError(busy), where it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK).acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # the other one has just deleted it
        raise BlockingIOError(busy) from None


def endings(paths: Sequence[Path]) -> list[str]:
    """The shortest endings, of as many parts each, that tell different paths apart."""
    depths = range(1, max((len(path.parts) for path in paths), default=0) + 1)
    each = (["/".join(path.parts[-depth:]) for path in paths] for depth in depths)
    return next((labels for labels in each if len(set(labels)) == len(labels)), [])


def finite(value: Any) -> Any:
    """A JSON value in which NaN and infinity, which JSON has no word for, are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def alone_in(folder: Path, work: str) -> Iterator[None]:
    """Hold a folder for a kind of work ("run", "comparison"); released with the process, however it ends.

    Raises: BlockingIOError: another process holds it, or this one.
    """
    busy = (
        f"{folder}: another {work} is at work in this folder. Wait for it or stop it (a job in the background may not "
        "hear Ctrl-C), or choose another output_dir."
    )
    with _lock(folder, busy):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows does not delete what is open
                (folder / LOCK).unlink()


def refuse_if_busy(folder: Path, work: str) -> None:
    """Raise what `alone_in` would where another process holds the folder, before any long preparation."""
    if (folder / LOCK).exists():
        with alone_in(folder, work):
            pass


# --- looking ---------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(checkpoint / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return False


def environment(*, device: str, seed: int, fingerprint: str) -> dict[str, Any]:
    """Return what one needs to repeat a run: versions, commit, command, machine, seed, data."""
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": device,
        "seed": seed,
        "data_sha256": fingerprint,
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this package's source stands at, `-dirty` where it was changed since; None outside a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed within somebody's repository
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40")


def _git(*words: str) -> str | None:
    """What git answers in this package's folder, or None."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
