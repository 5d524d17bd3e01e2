"""Adapters onto models: by a recipe's block, or from a folder; strict in both directions.

>>> model = attach(base, config_from(recipe), recipe)
>>> save_trained(model, folder)
>>> model = load_trained(folder, base)      # every tensor must be there, and fit

Full fine-tuning is a method like the others, `peft_type: FULL`, with nothing attached: what is trained, saved and
loaded is then the base model itself, a `PreTrainedModel` where the others are a `PeftModel`.
"""

import dataclasses
import difflib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import ModulesToSaveWrapper, load_peft_weights

from . import processes
from .models import begun_anew, quiet_transformers
from .recipe import Recipe
from .run_folder import replacing, write_text
from .tuner.card import how_to_load
from .tuner.checks import HEADS, check_modules_to_save
from .tuner.config import AdapterConfig

Trained = PeftModel | transformers.PreTrainedModel
FULL = "FULL"
WANTS = {  # methods that no recipe can train, and what for
    "MULTITASK_PROMPT_TUNING": "a task id with every row",
    "POLY": "a task id with every row",
    "XLORA": "trained LoRA adapters to mix",
}

WRITTEN = {  # what people call methods that PEFT has under another name
    "DORA": "peft_type: LORA with use_dora: true",
    "RSLORA": "peft_type: LORA with use_rslora: true",
    "PISSA": "peft_type: LORA with init_lora_weights: pissa",
    "QLORA": "peft_type: LORA, and load_in_4bit: true outside the adapter block",
}

PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "sequence-regression": "SEQ_CLS",
    "image-classification": None,  # PEFT has no name for it
}

HEAD = re.compile("classifier|score|head")  # of images, for which PEFT has no task

# What PEFT and a method make of settings that cannot work.
BAD_SETTINGS = (TypeError, ValueError, AttributeError, LookupError, re.error)


# --- from a recipe ---------------------------------------------------------------------------------------------------


@dataclass
class FullFineTuning:
    """Every weight of the base model is trained, and nothing attached. It has no settings of its own."""

    task_type: str | None = None
    inference_mode: bool = False


def config_from(recipe: Recipe) -> PeftConfig | FullFineTuning:
    """Turn a recipe's adapter block into a PEFT config. Raises: ValueError."""
    settings = dict(recipe.adapter)
    name = settings.pop("peft_type")
    if name in WANTS:
        raise ValueError(f"adapter: {name} wants {WANTS[name]}, which a recipe does not have; choose another method.")
    task_type = PEFT_TASKS[recipe.task]
    if settings.get("task_type") not in (None, task_type):
        raise ValueError(
            f"adapter: task_type is {settings['task_type']!r}, but the recipe's task is {recipe.task!r}: "
            "leave task_type out, it follows from the task."
        )
    return config_by_name(name, settings | {"task_type": task_type, "inference_mode": False})


def config_by_name(peft_type: str, settings: dict[str, Any]) -> PeftConfig | FullFineTuning:
    """The config of a method with these fields; an unknown one is refused by name. Raises: ValueError."""
    known = keys_of(peft_type)
    for key in settings:
        if key not in known:
            near = _nearest(key, known)
            raise ValueError(f"adapter: {peft_type} has no key {key!r}{near}; its keys are {', '.join(known)}.")
    for key in ("target_modules", "exclude_modules"):
        _check_pattern(key, settings.get(key))
    try:
        config: PeftConfig | FullFineTuning = _config_classes()[peft_type](**settings)
    except BAD_SETTINGS as error:
        raise ValueError(f"adapter: {error}") from error
    return config


def _check_pattern(key: str, value: Any) -> None:
    if not isinstance(value, str) or value == "all-linear":
        return
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"adapter: {key}={value!r} is no regular expression ({error}); give one, or a list of names."
        ) from error


def keys_of(peft_type: str) -> list[str]:
    """The keys that a method's adapter block may have. Raises: ValueError for an unknown method."""
    known = [*peft_types(), FULL]
    if peft_type not in known:
        written = WRITTEN.get(peft_type.upper())
        near = f": it is written {written}" if written else _nearest(peft_type, known)
        raise ValueError(f"adapter: peft_type {peft_type!r} is unknown{near}; the known ones are {', '.join(known)}.")
    return [field.name for field in dataclasses.fields(_config_classes()[peft_type]) if field.init]


def _config_classes() -> dict[str, Any]:
    return {str(getattr(name, "value", name)): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()} | {
        FULL: FullFineTuning
    }


def peft_types() -> list[str]:
    """Return the names of every method PEFT knows in this process, ours included."""
    return sorted(_config_classes().keys() - {FULL})


def _nearest(name: str, known: list[str]) -> str:
    spelled = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f", did you mean {spelled[near[0]]!r}?" if near else ""


def attach(base: Any, config: Any, recipe: Recipe) -> Trained:
    """Put a new adapter on a base model; what was begun anew there, and every head, is trained and saved with it.

    Full fine-tuning attaches nothing: it is the base model that is returned. Raises: ValueError.
    """
    if isinstance(config, FullFineTuning):
        return base
    heads = begun_anew(base)
    if recipe.task == "image-classification":
        heads = [*heads, *(name for name, _ in base.named_children() if HEAD.search(name))]
    else:
        heads = [name for name in heads if name not in HEADS]  # which PEFT adds
    if heads and hasattr(config, "modules_to_save"):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    if recipe.gradient_checkpointing:
        base.enable_input_require_grads()
    try:
        check_modules_to_save(config, base)
        with quiet():
            model: PeftModel = get_peft_model(base, config)
    except BAD_SETTINGS as error:
        raise ValueError(f"adapter: {error}") from error
    if lost := _not_kept(base):
        raise ValueError(
            f"adapter: {recipe.adapter['peft_type']} trains no head, and {lost[0]} of this model is begun anew: it "
            "would stay random. Choose another method, or a model that has its head."
        )
    return model


def _not_kept(base: Any) -> list[str]:
    """What was begun anew in a base model and does not belong to the adapter on it."""
    kept = [name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    return [name for name in begun_anew(base) if not any(f"{name}.".startswith(f"{outer}.") for outer in kept)]


def count_parameters(model: Trained) -> tuple[int, int]:
    """(trainable, all) parameters."""
    if isinstance(model, PeftModel):  # which knows how many a packed 4-bit weight stands for
        trainable, total = model.get_nb_trainable_parameters()
        return trainable, total
    return model.num_parameters(only_trainable=True), model.num_parameters()


# --- from a folder and into one --------------------------------------------------------------------------------------


def load_trained(folder: Path, base: Any) -> Trained:
    """What a folder holds, for inference: its adapter on the base model, or the base model with its trained weights.

    Raises: FileNotFoundError, ValueError.
    """
    if not holds_model(folder):
        return _load_adapter(folder, base)
    load_weights(base, folder)
    model: transformers.PreTrainedModel = base.eval()
    return model


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a whole model, without an adapter beside it."""
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds neither a whole model nor an adapter of a known method.

    Raises: FileNotFoundError, ValueError.
    """
    if not holds_model(folder):
        config_in(folder)


def _load_adapter(folder: Path, base: torch.nn.Module) -> PeftModel:
    """Attach the adapter in a folder to its base model, for inference.

    PEFT itself leaves a missing tensor at its initial value and says nothing; for most methods that means zero.

    Raises:
        FileNotFoundError, ValueError: what is missing, damaged, unknown or of the wrong shape.
    """
    config = config_in(folder)
    config.inference_mode = True
    try:
        with quiet():
            model: PeftModel = get_peft_model(base, config)
    except BAD_SETTINGS as error:
        raise ValueError(f"The adapter in {folder} does not fit its base model: {error}") from error
    load_weights(model, folder)
    if lost := _not_kept(base):
        raise ValueError(
            f"{lost[0]} of the base model is begun anew, and the adapter in {folder} does not hold it (by itself PEFT "
            "keeps heads called classifier or score alone): its outputs would be random. Train again."
        )
    return model.eval()


def config_in(folder: Path) -> PeftConfig:
    """Read a folder's adapter_config.json. Raises: FileNotFoundError, ValueError."""
    config_content(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except BAD_SETTINGS as error:
        raise ValueError(f"{folder / 'adapter_config.json'}: {error}") from error


def config_content(folder: Path) -> dict[str, Any]:
    """What a folder's adapter_config.json holds, of a known peft_type. Raises: FileNotFoundError, ValueError."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not an adapter folder: it has no adapter_config.json. Name a run folder, or a folder "
            "written by model.save_pretrained."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        peft_type = content.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if peft_type not in peft_types():
        raise ValueError(f"{path}: peft_type {peft_type!r} is unknown; the known ones are {', '.join(peft_types())}.")
    return content


def load_weights(model: Trained, folder: Path) -> None:
    """Load the tensors of a folder into a model of its form. Raises: FileNotFoundError, ValueError."""
    with processes.writable(model):
        if isinstance(model, PeftModel):
            _load_adapter_weights(model, folder)
        else:
            _load_model(model, folder)


def _load_adapter_weights(model: PeftModel, folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors: the adapter has no weights.")
    try:
        found = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and pickle raise types of their own
        raise ValueError(f"The weights in {folder} are damaged: {error}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if found.keys() - expected.keys():
        expected |= {name: tensor for name, tensor in _embeddings(model).items() if name in found}
    check_tensors(folder, expected, found)
    set_peft_model_state_dict(model, processes.cut_like(found, expected))


def _embeddings(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base model's own tables, by name: PEFT saves them beside an adapter that adapts them."""
    base, weights = model.get_base_model(), set[int]()
    for side in ("input", "output"):
        with suppress(AttributeError, NotImplementedError):  # a model of images has none, and says so in several ways
            weights |= {id(weight) for weight in getattr(base, f"get_{side}_embeddings")().parameters()}
    return {name: weight for name, weight in model.state_dict(keep_vars=True).items() if id(weight) in weights}


def with_weights(model: Trained, folder: Path) -> Trained:
    """A model of this form with the tensors of a folder: itself where it can take them. Raises: as `load_weights`.

    Of an encoder of prompts PEFT saves the prompts that it made, so a folder is put onto the base model as a user does.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        home = model.device
        return load_trained(folder, model.get_base_model()).to(home)
    load_weights(model, folder)
    return model


def resume_refusal(config: Any) -> str | None:
    """Why a training with this config cannot go on from a checkpoint of PEFT's; None where it can."""
    if getattr(config, "prefix_projection", False) or hasattr(config, "encoder_reparameterization_type"):
        return (
            f"{config.peft_type.value} trains an encoder of prompts, and PEFT saves the prompts alone: there is "
            "nothing to resume from. Give --overwrite to start anew."
        )
    return None


def _load_model(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Load a whole model's tensors; none may be missing or of another shape."""
    try:
        with quiet():
            form: Any = type(model)
            found, report = form.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    except Exception as error:  # safetensors and pickle raise types of their own
        raise ValueError(f"The weights in {folder} are missing, damaged or of another model: {error}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ValueError(
            f"The weights in {folder} do not belong to this model: {len(lacking)} missing ({lacking[0]}, ...)"
        )
    with processes.whole(found, trained=False):
        expected = model.state_dict()
        check_tensors(folder, expected, found.state_dict())
        model.load_state_dict(processes.cut_like(found.state_dict(), expected))


def check_tensors(folder: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that are not exactly the expected ones in name and shape. Raises: ValueError."""
    missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or foreign:
        kinds = ((missing, "missing"), (foreign, "unknown"))
        parts = [f"{len(keys)} {kind} ({keys[0]}, ...)" for keys, kind in kinds if keys]
        raise ValueError(
            f"The weights in {folder} do not belong to its adapter_config.json on this base model: tensors "
            f"{' and '.join(parts)}. Is it the base model the adapter was trained on?"
        )
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise ValueError(
                f"The weights in {folder} do not fit the base model: {name} has shape {tuple(found[name].shape)}, "
                f"the model wants {tuple(tensor.shape)}. Is it the base model the adapter was trained on?"
            )


def save_trained(model: Trained, folder: Path, processor: Any) -> None:
    """Write an adapter folder in PEFT's format, or a model folder with its processor; atomically."""
    with replacing(folder) as partial:
        write_trained(model, partial, processor)


def write_trained(model: Trained, folder: Path, processor: Any) -> None:
    """The same, among what the folder holds already."""
    if not isinstance(model, PeftModel):
        with quiet():
            model.save_pretrained(str(folder))
        processor.save_pretrained(str(folder))
        return
    with quiet():  # and without the base model's tables of tokens, which an adapter beside them has not changed
        model.save_pretrained(str(folder), save_embedding_layers=False)
    _write_card(model.peft_config[model.active_adapter], folder)
    if isinstance(template := getattr(processor, "chat_template", None), str):  # who serves it must write alike
        write_text(folder / "chat_template.jinja", template)


def _write_card(config: PeftConfig, folder: Path) -> None:
    """Say how an adapter of ours is loaded, which PEFT's card does not know."""
    if not isinstance(config, AdapterConfig):
        return
    write_text(
        folder / "README.md",
        f"---\nbase_model: {config.base_model_name_or_path}\nlibrary_name: peft\ntags:\n- beyondlora\n---\n\n"
        + how_to_load(config.method, f"path/to/{folder.name}"),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what libraries tell each other: advice, log lines, bars, deprecations between them."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
