"""What happens beside the Trainer's steps: figures, evaluations, the best adapter, checkpoints, and the stop at nan.

>>> trainer = Trainer(model, arguments, callbacks=[recorder], ...)
>>> model.register_forward_hook(recorder.check_loss)
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState

from . import processes
from .attach import Trained, save_trained, write_trained
from .data import Splits
from .figures import Examination
from .interrupts import Interrupts
from .measure import Measurements, measure
from .progress import Progress, in_stretches
from .recipe import Recipe, warmup_problem
from .run_folder import RunFolder


class Recorder(TrainerCallback):
    """Keeps the run folder up to date: metrics, evaluations, the best adapter, sealed checkpoints; stops at nan.

    A new best adapter is always backed by a checkpoint of the same step, and is moved into place after it: so whatever
    moment a kill comes at, the resumed run knows from metrics.jsonl which adapter is the best, and has it.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        splits: Splits,
        progress: Progress,
        resumed_at: int,
        processor: Any,
        trackers: Sequence[TrainerCallback] = (),
    ) -> None:
        self.run, self.recipe, self.splits, self.progress, self.processor = run, recipe, splits, progress, processor
        self.trackers = trackers  # the Trainer tells them what it logs, this class what it measures
        self.main = PartialState().is_main_process
        rows = run.rows_until(resumed_at)
        self.seconds_before = max((row["seconds"] for row in rows), default=0.0)
        evaluated = [(row["eval_loss"], row["step"]) for row in rows if row.get("eval_loss") is not None]
        self.best_loss: float
        self.best_step: int
        self.best_loss, self.best_step = min(evaluated, default=(math.inf, 0))
        self.train_loss = next((row["loss"] for row in reversed(rows) if "loss" in row), None)
        self.step = resumed_at
        self.begun = time.monotonic()
        self.interrupts = Interrupts()
        self.finite: tuple[int, dict[str, torch.Tensor]] | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, earlier sessions included."""
        return self.seconds_before + time.monotonic() - self.begun

    # --- events of the Trainer, in the order they come

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make good what a kill between a checkpoint and its adapter left undone."""
        if self.best_step and self.best_step == state.global_step:
            self.save(kwargs["model"], self.run.adapter)
        if told := warmup_problem(self.recipe, state.max_steps):
            self.progress.say(told)
        self.progress.begin("training", state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop for a Ctrl-C that was swallowed somewhere."""
        self.interrupts.raise_if_asked()

    def check_loss(self, module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """Stop before a loss that is no number reaches the weights (a forward hook)."""
        if module.training and processes.anywhere(~torch.isfinite(output.loss).all()):
            raise self._stop(f"the loss became {output.loss.detach().float().mean().item()}")

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every batch of this step gave a finite loss: remember the weights that did, unless the gradient is not."""
        weights = {name: weight for name, weight in kwargs["model"].named_parameters() if weight.requires_grad}
        gradients = [processes.part_here(weight.grad) for weight in weights.values() if weight.grad is not None]
        if self.finite is None:
            self._say_what_is_idle(weights)
        largest = get_total_norm(gradients, math.inf)  # an accelerator is waited for once, and not for every gradient
        if processes.anywhere(~largest.to(args.device).isfinite()):
            raise self._stop("the gradient became nan or infinite")
        trained = {name: processes.part_here(weight) for name, weight in weights.items()}
        kept = self.finite[1] if self.finite else {}
        if kept.keys() != trained.keys():
            kept = {name: torch.empty_like(weight) for name, weight in trained.items()}
        torch._foreach_copy_(list(kept.values()), list(trained.values()))
        self.finite = (state.global_step, kept)

    def _say_what_is_idle(self, weights: dict[str, torch.nn.Parameter]) -> None:
        idle = [name for name, weight in weights.items() if weight.grad is None]
        if idle and len(idle) < len(weights):  # ZeRO takes all gradients away
            self.progress.say(
                f"{len(idle)} of {len(weights)} trained weights got no gradient from the first batches, as {idle[0]}: "
                "the model did not call what they belong to, and what is never called does not learn."
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate where it is due; a checkpoint always closes a line of the log, so that both can be resumed."""
        self.step = state.global_step
        finished = state.global_step >= state.max_steps
        if self.splits.evaluation is not None and (finished or state.global_step % self.recipe.eval_steps == 0):
            figures = self._evaluate(kwargs["model"], state)
            for tracker in self.trackers if self.main else ():
                tracker.on_log(args, state, control, logs=dict(figures), model=kwargs["model"])
            control.should_save = control.should_save or self.best_step == state.global_step
        control.should_save = control.should_save or finished or self.interrupts.ending
        control.should_log = control.should_log or control.should_save
        self.progress.advance(state.global_step, self._note())

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a line of training figures (the Trainer's closing summary is not one)."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.train_loss = logs["loss"]
            self._write(state, {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs})

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint, promote its adapter if it is the best so far, and end if SIGTERM waits for it."""
        if processes.has_shards(kwargs["model"]):  # which is all that the Trainer keeps then
            with processes.whole(kwargs["model"]):
                if self.main:
                    write_trained(kwargs["model"], self.run.staged(state.global_step), self.processor)
        PartialState().wait_for_everyone()
        if self.main:
            self.run.keep_checkpoint(state.global_step)
        if self.best_step == state.global_step:
            self.save(kwargs["model"], self.run.adapter)
        if self.interrupts.ending:
            self.interrupts.end()

    # --- what they do

    def examine(self, model: Trained, examination: Examination) -> Measurements:
        """Measure the weights that were kept, with every figure that the recipe asks for."""
        try:
            shown, kept = in_stretches(self.progress, "evaluating"), self.run.generations if self.main else None
            return examination.measure(model, on_batch=shown, keep=kept)
        finally:
            self.progress.end()

    def save(self, model: Trained, folder: Path) -> None:
        """Write what was trained, atomically; for all processes to call."""
        with processes.whole(model):
            if self.main:
                save_trained(model, folder, self.processor)

    def save_last(self, model: Trained) -> None:
        """Save the weights as last/, and as adapter/ where no evaluation chose one; for all processes to call."""
        self.save(model, self.run.last)
        if not self.best_step:
            self.save(model, self.run.adapter)

    def keep_finite(self, model: Trained) -> None:
        """Go back to the last weights that gave a finite loss, and save them."""
        if self.finite is not None:
            with torch.no_grad():
                weights = dict(model.named_parameters())
                for name, value in self.finite[1].items():
                    processes.put_back(weights[name], value)
        self.save_last(model)

    def _evaluate(self, model: Trained, state: TrainerState) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        scores = measure(
            model,
            self.splits.evaluation,
            self.splits.collator,
            task=self.recipe.task,
            batch_size=self.recipe.per_device_eval_batch_size,
            bf16=self.recipe.bf16,
            resample=False,
            on_batch=lambda done, rows: self.progress.advance(self.step, f"evaluating {done}/{rows}"),
        )
        for name, score in scores.items():
            figures |= {f"eval_{name}": score.value, f"eval_{name}_stderr": score.stderr}
        self._write(state, figures)
        if figures["eval_loss"] < self.best_loss:
            self.best_loss, self.best_step = figures["eval_loss"], state.global_step
        return figures

    def _write(self, state: TrainerState, figures: dict[str, Any]) -> None:
        if self.main:
            self.run.log({"step": state.global_step, "epoch": state.epoch, **figures, "seconds": self.seconds})

    def _note(self) -> str:
        parts = [] if self.train_loss is None else [f"loss {self.train_loss:.4f}"]
        return "  ".join(parts + ([f"best eval {self.best_loss:.4f}"] if self.best_step else []))

    def _stop(self, reason: str) -> FloatingPointError:
        if self.main:
            self.run.log({"step": self.step + 1, "stopped": reason, "seconds": self.seconds})
        kept = self.finite[0] if self.finite else self.step
        best = f"the best by evaluation (step {self.best_step})" if self.best_step else "the same"
        return FloatingPointError(
            f"Training stopped at step {self.step + 1}: {reason}. The last weights with a finite loss (after step "
            f"{kept}) are in {self.run.last}, {best} in {self.run.adapter}. Try a lower learning_rate "
            f"(it was {self.recipe.learning_rate:g}), warmup_steps, or a smaller max_grad_norm."
        )
