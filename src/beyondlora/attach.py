"""Adapters onto models: by a recipe's block, or from a folder; strict in both directions.

>>> model = attach(base, config_from(recipe), recipe)
>>> save_adapter(model, folder)
>>> model = load_adapter(folder, base)      # every tensor must be there, and fit
"""

import dataclasses
import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import load_peft_weights

from .recipe import Recipe
from .run_folder import replacing

PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "sequence-regression": "SEQ_CLS",
    "image-classification": None,  # PEFT has no name for it
}


# --- from a recipe ---------------------------------------------------------------------------------------------------


def config_from(recipe: Recipe) -> PeftConfig:
    """Turn a recipe's adapter block into a PEFT config. Raises: ValueError."""
    settings = dict(recipe.adapter)
    name = settings.pop("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    if config_class is None:
        near = _nearest(name, peft_types())
        raise ValueError(f"adapter: peft_type {name!r} is unknown{near}; the known ones are {', '.join(peft_types())}.")
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    for key in settings:
        if key not in known:
            near = _nearest(key, known)
            raise ValueError(f"adapter: {name} has no key {key!r}{near}; its keys are {', '.join(known)}.")
    task_type = PEFT_TASKS[recipe.task]
    if settings.get("task_type") not in (None, task_type):
        raise ValueError(
            f"adapter: task_type is {settings['task_type']!r}, but the recipe's task is {recipe.task!r}: "
            "leave task_type out, it follows from the task."
        )
    try:
        config: PeftConfig = config_class(**settings | {"task_type": task_type, "inference_mode": False})
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter: {error}") from error
    return config


def peft_types() -> list[str]:
    """Return the names of every method PEFT knows in this process, ours included."""
    return sorted(str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING)


def _nearest(name: str, known: list[str]) -> str:
    spelled = {word.lower(): word for word in known}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f", did you mean {spelled[near[0]]!r}?" if near else ""


def attach(base: Any, config: Any, recipe: Recipe) -> PeftModel:
    """Put a new adapter on a base model; a head that PEFT does not know as one is trained and saved with it."""
    if recipe.task == "image-classification" and getattr(config, "modules_to_save", None) is None:
        config.modules_to_save = [name for name, _ in base.named_children() if name != base.base_model_prefix]
    if recipe.gradient_checkpointing:
        base.enable_input_require_grads()
    try:
        with quiet():
            model: PeftModel = get_peft_model(base, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter: {error}") from error
    return model


# --- from a folder and into one --------------------------------------------------------------------------------------


def load_adapter(folder: Path, base: torch.nn.Module) -> PeftModel:
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
    except (TypeError, ValueError) as error:
        raise ValueError(f"The adapter in {folder} does not fit its base model: {error}") from error
    load_weights(model, folder)
    return model.eval()


def config_in(folder: Path) -> PeftConfig:
    """Read a folder's adapter_config.json. Raises: FileNotFoundError, ValueError."""
    config_content(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
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


def load_weights(model: PeftModel, folder: Path) -> None:
    """Load an adapter's tensors into a model that has the adapter already. Raises: FileNotFoundError, ValueError."""
    if not any((folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise FileNotFoundError(f"{folder} holds no adapter_model.safetensors: the adapter has no weights.")
    try:
        found = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and pickle raise types of their own
        raise ValueError(f"The weights in {folder} are damaged: {error}") from error
    check_tensors(folder, get_peft_model_state_dict(model, save_embedding_layers=False), found)
    set_peft_model_state_dict(model, found)


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


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter folder in PEFT's format, atomically."""
    with replacing(folder) as partial:
        model.save_pretrained(str(partial))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what libraries tell each other: advice, log lines, deprecations between them."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)
