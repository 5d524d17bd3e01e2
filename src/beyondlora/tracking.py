"""Experiment trackers: transformers' own callbacks, checked before the work, and at home in the run folder.

>>> trackers = trackers_of(["tensorboard"])          # ValueError: unknown, or not installed
>>> with open_in(trackers, run.tracking, step=0):
...     trainer.train()
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    WandbCallback,
    get_available_reporting_integrations,
)

from .recipe import nearest

TENSORBOARD_FOLDER, WANDB_FOLDER = "TENSORBOARD_LOGGING_DIR", "WANDB_DIR"  # variables of theirs, which go first


def trackers_of(report_to: Sequence[str] | None) -> list[TrainerCallback]:
    """A callback for every tracker of a recipe's report_to; "all" are those that are installed.

    Nothing is written or sent before a training begins. Raises: ValueError: unknown, or its package is missing.
    """
    if report_to == ["all"]:
        report_to = get_available_reporting_integrations()
    return [_tracker(name) for name in report_to or ()]


def _tracker(name: str) -> TrainerCallback:
    kind = INTEGRATION_TO_CALLBACK.get(name)
    if kind is None:
        known = sorted(INTEGRATION_TO_CALLBACK)
        raise ValueError(f"report_to={name!r} is unknown to transformers; {nearest(name, known)}")
    try:
        return kind()
    except (ImportError, RuntimeError) as error:
        # transformers' own words name the package; of this one they say: update your PyTorch version.
        missing = "tensorboard is not installed (pip install tensorboard)" if kind is TensorBoardCallback else error
        raise ValueError(
            f"report_to={name!r} cannot work here: {str(missing).rstrip('.')}. Do that, or take it out of report_to."
        ) from error


@contextmanager
def open_in(trackers: Sequence[TrainerCallback], folder: Path, step: int) -> Iterator[None]:
    """Let the trackers of a training write into a folder, and close those that would stay open after it.

    Args:
        folder: for TensorBoard's events, and for what Weights & Biases keeps on this machine, unless their own
            variables say where. Other trackers have places and settings of their own.
        step: the training goes on from; TensorBoard forgets what it was told of later ones.
    """
    boards = [tracker for tracker in trackers if isinstance(tracker, TensorBoardCallback)]
    wandb = any(isinstance(tracker, WandbCallback) for tracker in trackers)
    with _boards_in(boards, folder, step), _wandb_in(folder) if wandb else nullcontext():
        yield


@contextmanager
def _boards_in(boards: Sequence[TensorBoardCallback], folder: Path, step: int) -> Iterator[None]:
    for board in boards if PartialState().is_main_process else ():
        board.tb_writer = _event_writer(os.environ.get(TENSORBOARD_FOLDER) or str(folder), step)
    try:
        yield
    finally:
        for board in boards:
            if board.tb_writer is not None:  # the training was stopped
                board.tb_writer.close()


def _event_writer(folder: str, step: int) -> Any:
    try:
        writers: Any = import_module("torch.utils.tensorboard")
    except ImportError:
        writers = import_module("tensorboardX")
    return writers.SummaryWriter(folder, purge_step=step + 1 if step else None)


@contextmanager
def _wandb_in(folder: Path) -> Iterator[None]:
    wandb: Any = sys.modules["wandb"]  # its callback has imported it
    if wandb.run is not None:  # somebody else's, who will end it
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)  # or it writes to a temporary one
    place = os.environ.setdefault(WANDB_FOLDER, str(folder))
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb.finish(exit_code=int(failed))  # or this process's next training would go into the same run
        if place == str(folder):
            os.environ.pop(WANDB_FOLDER, None)
