"""Fine-tune a model by a recipe, with any method PEFT knows: one call, one run folder.

>>> train(Recipe.load("configs/shakespeare-lora.yaml"))["metrics"]["perplexity"]

transformers' Trainer does the steps. What it writes goes to a staging folder first (run_folder.py), and every figure
that is reported or chosen by comes from measure.py, not from the Trainer's average over batches (recorder.py).
"""

import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, get_scheduler, set_seed
from transformers.integrations.deepspeed import deepspeed_init, is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from . import curves, data, models, tracking
from .attach import Trained, attach, config_from, count_parameters, load_weights, quiet, resume_refusal, with_weights
from .evaluate import device, load_base, load_processor
from .figures import Examination, check_extras
from .interrupts import listening
from .manifold.guard import refuse_optimizer
from .manifold.linear import StiefelLinear
from .measure import Measurements, as_dict
from .progress import Progress
from .recipe import Recipe, nearest
from .recorder import Recorder
from .run_folder import RunFolder, alone_in, environment, refuse_if_busy, saying_disk, write_json, write_text

SAME_NAMES = (  # in a recipe as in TrainingArguments
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "bf16",
    "seed",
    "logging_steps",
    "save_steps",
    "dataloader_num_workers",
)


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a recipe and return what metrics.json holds.

    Everything that can be refused is refused before the first step, and before anything on disk is touched.

    Args:
        resume: continue from the newest intact checkpoint; on the CPU in float32 the final weights are, bit for bit,
            those of a run that was never interrupted. Where there is none yet, start anew.
        overwrite: delete the run in output_dir first.
        progress: shows the way; None = silent.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: bad input.
        BlockingIOError: another process trains in output_dir.
        FloatingPointError: the loss or its gradient became nan or infinite; the last finite weights are kept.
    """
    progress = progress or Progress()
    config, run, arguments = config_from(recipe), RunFolder(recipe.output_dir), _training_arguments(recipe)
    _check_launch(recipe)
    trackers = tracking.trackers_of(recipe.report_to)
    run.claim(resume=resume, overwrite=overwrite)
    if PartialState().is_main_process:
        refuse_if_busy(run.path, "run")
    PartialState().wait_for_everyone()  # several processes: nobody writes before all have looked
    if resume and run.recipe.exists():
        _check_same_recipe(recipe, run)
        if run.metrics.exists():
            progress.say(f"The run in {run.path} is finished; nothing to resume.")
            return _read_json(run.metrics)
    checkpoint = run.newest_checkpoint() if resume else None
    if checkpoint is not None and (refusal := resume_refusal(config)):
        raise ValueError(refusal)
    check_extras(recipe)
    if arguments.n_gpu > 1:
        progress.say(
            f"There are {arguments.n_gpu} devices, and one is used: `accelerate launch -m beyondlora train …` uses all."
        )
        arguments._n_gpu = 1  # the Trainer would take nn.DataParallel
    if not curves.can_draw():
        progress.say("curves.png will be skipped: matplotlib is not installed (pip install 'beyondlora[plots]').")

    raw = data.read_splits(recipe)
    set_seed(recipe.seed)  # before the head and the adapter draw their first weights
    processor = load_processor(recipe)
    extra = models.extra_inputs(recipe.model_name_or_path, task=recipe.task, image_size=recipe.image_size)
    splits = data.prepare(raw, processor, recipe, extra_inputs=extra)
    held_out = splits.held_out()
    examination = Examination.of(recipe, processor, held_out) if held_out else None
    progress.say(splits.description)
    base = load_base(recipe, processor, splits.label_names)
    examination = examination and examination.begun_with(base, device())
    model: Any = attach(base, config, recipe)
    _check_optimizer(arguments, model)

    if checkpoint is not None:
        _check_same_data(splits, run)
    with alone_in(run.path, "run") if PartialState().is_main_process else nullcontext():
        if PartialState().is_main_process:
            run.claim(resume=resume, overwrite=overwrite)  # again: all this took a while
            _check_not_overtaken(run, checkpoint, resume=resume)
            _open(run, recipe, splits, checkpoint)
        PartialState().wait_for_everyone()
        if checkpoint is not None:
            progress.say(f"Resuming from step {_step_of(checkpoint)}.")
        recorder = Recorder(run, recipe, splits, progress, _step_of(checkpoint), processor, trackers)
        _fit(model, arguments, splits, recorder, checkpoint)
        return _finish(model, recorder, examination)


# --- before training -------------------------------------------------------------------------------------------------


def _check_launch(recipe: Recipe) -> None:
    """Refuse what cannot be done with weights that accelerate was asked to cut over the processes."""
    # accelerate answers this request with plain data parallel on CPUs, and with nothing for one process.
    unheard = PartialState().distributed_type in (DistributedType.MULTI_CPU, DistributedType.NO)
    shards = parse_flag_from_env("ACCELERATE_USE_FSDP") and not unheard
    if shards and os.environ.get("FSDP_VERSION", "1") == "1":
        raise ValueError(
            "accelerate was asked for the first version of FSDP, which flattens weights, and a recipe's run has not "
            "learned to save such. Launch it with --fsdp_version 2 (or fsdp_version: 2 in accelerate's configuration)."
        )
    if not (shards or is_deepspeed_zero3_enabled()):
        return
    if recipe.bits:
        raise ValueError(
            f"load_in_{recipe.bits}bit, and the launcher was asked to cut weights over processes (FSDP or ZeRO 3): "
            "packed ones are not cut here. Launch data parallel, or leave one of the two out."
        )
    if recipe.forgetting_dataset_name:
        raise ValueError(
            f"forgetting_dataset_name={recipe.forgetting_dataset_name!r} asks for the base model's loss before "
            f"training, and under {'FSDP' if shards else 'ZeRO 3'} no process has a model that it could call before "
            "the training begins. Leave it out and measure with `beyondlora evaluate`, or launch data parallel."
        )


def _check_names(recipe: Recipe) -> None:
    """Refuse an optimizer or a schedule that the Trainer does not know, or that would wait for its evaluations."""
    for key, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        value, names = getattr(recipe, key), [str(name.value) for name in known]
        if value not in names:
            raise ValueError(f"{key}={value!r} is unknown to transformers; {nearest(value, names)}")
    if recipe.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"lr_scheduler_type={recipe.lr_scheduler_type!r} follows evaluations of the Trainer's own, and those of a "
            "run are others; choose another, as 'cosine'."
        )
    try:
        anything = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        get_scheduler(recipe.lr_scheduler_type, anything, num_warmup_steps=0, num_training_steps=1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type={recipe.lr_scheduler_type!r} takes settings that a recipe has no keys for ({error}); "
            "choose another, as 'cosine'."
        ) from error


def _check_optimizer(arguments: TrainingArguments, model: Any) -> None:
    """Refuse an optimizer whose package is missing, or that cannot step what the model trains."""
    with quiet():
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if any(isinstance(module, StiefelLinear) and module.weight.requires_grad for module in model.modules()):
        refuse_optimizer(kind)


def check_beginning(recipe: Recipe, base: Any) -> None:
    """Refuse what no run of this recipe would get past on its base model, whatever its data.

    Args:
        base: gets the adapter; names and shapes will do (models.empty_base).
    Raises: ValueError.
    """
    arguments = _training_arguments(recipe)
    _check_optimizer(arguments, attach(base, config_from(recipe), recipe))


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    _check_names(recipe)
    renamed: dict[str, Any] = {"gradient_checkpointing": recipe.gradient_checkpointing}
    if any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments)):
        renamed = {
            "activation_checkpointing": recipe.gradient_checkpointing
        }  # newer transformers warn about the old name
    with quiet():
        return TrainingArguments(
            output_dir=str(RunFolder(recipe.output_dir).staging),
            **{name: getattr(recipe, name) for name in SAME_NAMES},
            **renamed,
            warmup_steps=recipe.warmup_steps or recipe.warmup_ratio,
            eval_strategy="no",  # Recorder evaluates
            save_strategy="steps",
            save_total_limit=None,  # RunFolder rotates
            logging_nan_inf_filter=False,  # Recorder stops
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=device().type == "cpu",
            dataloader_pin_memory=device().type != "cpu",
            disable_tqdm=True,
            report_to="none",  # Recorder has them
            run_name=RunFolder(recipe.output_dir).path.resolve().name,  # which is what trackers show
        )


def _check_same_recipe(recipe: Recipe, run: RunFolder) -> None:
    stored = Recipe.load(run.recipe)
    different = recipe.differences(stored)
    if different:
        changes = "; ".join(f"{key}: {mine!r}, was {theirs!r}" for key, (mine, theirs) in different.items())
        raise ValueError(
            f"--resume continues the run in {run.path} as it was begun, but the recipe differs ({changes}). "
            "Undo the change, or start anew with --overwrite or another output_dir."
        )


def _check_same_data(splits: data.Splits, run: RunFolder) -> None:
    if _read_json(run.environment)["data_sha256"] != splits.fingerprint:
        raise ValueError(
            f"--resume continues the run in {run.path} as it was begun, but the data have changed since "
            f"({run.environment} holds their old fingerprint). Start anew with --overwrite or another output_dir."
        )


def _check_not_overtaken(run: RunFolder, checkpoint: Path | None, *, resume: bool) -> None:
    if resume and (run.metrics.exists() or (checkpoint is not None and not checkpoint.exists())):
        raise BlockingIOError(
            f"{run.path}: another process went on with this run while this one was getting ready. Nothing was touched; "
            "give the command again."
        )


def _open(run: RunFolder, recipe: Recipe, splits: data.Splits, checkpoint: Path | None) -> None:
    """Make the folder a run: an empty one, or one rewound to the checkpoint it goes on from."""
    if checkpoint is None:
        run.clear()
    else:
        run.rewind(_step_of(checkpoint))
    run.path.mkdir(parents=True, exist_ok=True)
    write_text(run.recipe, recipe.to_yaml())
    record = environment(device=str(device()), seed=recipe.seed, fingerprint=splits.fingerprint)
    write_json(run.environment, record | {"data": splits.description, "label_names": splits.label_names})


# --- training --------------------------------------------------------------------------------------------------------


def _fit(
    model: Any, arguments: TrainingArguments, splits: data.Splits, recorder: "Recorder", checkpoint: Path | None
) -> None:
    """Take the steps that are left; raises FloatingPointError with the last finite weights saved."""
    if checkpoint is not None:
        state = _read_json(checkpoint / "trainer_state.json")
        if state["global_step"] >= state["max_steps"]:  # the Trainer would take one step more
            _place(model, arguments)
            load_weights(model, checkpoint)
            recorder.on_train_begin(arguments, TrainerState(**_known(state)), TrainerControl(), model=model)
            return
    told = tracking.open_in(recorder.trackers, recorder.run.tracking, recorder.step)
    with quiet(), told, listening() as recorder.interrupts:
        callbacks = [*recorder.trackers, recorder]
        trainer = Trainer(
            model, arguments, data_collator=splits.collator, train_dataset=splits.train, callbacks=callbacks
        )
        trainer.remove_callback(PrinterCallback)
        hook = model.register_forward_hook(recorder.check_loss)
        try:
            with saying_disk(recorder.run.staging):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except FloatingPointError:
            recorder.keep_finite(model)
            raise
        finally:
            hook.remove()
            recorder.progress.end()


def _place(model: Any, arguments: TrainingArguments) -> None:
    """Put a model where it would be trained."""
    trainer = Trainer(model, arguments)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.prepare(model, trainer.create_optimizer())
    elif is_deepspeed_zero3_enabled():
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.accelerator.prepare(model)  # from now on its layers put their weights together when they are called
    else:
        model.to(arguments.device)


# --- after training --------------------------------------------------------------------------------------------------


def _finish(model: Trained, recorder: Recorder, examination: Examination | None) -> dict[str, Any]:
    """Save the last adapter, measure the best, write the summary; metrics.json comes last, and says: finished."""
    run, recipe = recorder.run, recorder.recipe
    trainable, total = count_parameters(model)
    recorder.save_last(model)
    PartialState().wait_for_everyone()
    scores: Measurements = {}
    if examination is not None:
        model = with_weights(model, run.adapter)
        scores = recorder.examine(model, examination)
    summary = {
        "task": recipe.task,
        "peft_type": recipe.adapter["peft_type"],
        "metrics": as_dict(scores),
        "best_step": recorder.best_step or recorder.step,
        "steps": recorder.step,
        "train_loss": recorder.train_loss,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "seconds": recorder.seconds,
        "data": recorder.splits.description,
    }
    if recorder.main:
        if curves.can_draw():
            curves.draw({"evaluation": run.rows()}, run.curves, title=f"{recipe.adapter['peft_type']}: {run.path.name}")
        write_json(run.metrics, summary)
        run.drop_checkpoints()
    return summary


# --- small things ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return content


def _known(state: dict[str, Any]) -> dict[str, Any]:
    return {field.name: state[field.name] for field in dataclasses.fields(TrainerState) if field.name in state}


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
