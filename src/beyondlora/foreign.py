"""`beyondlora import`: the methods' authors' own files become adapter folders of ours. Strict in both directions.

Two kinds of source:

    a checkpoint file   a dictionary saved by torch, whose `model_state_dict` holds `<layer>.<method>.<name>.weight`
                        and nothing else. It says nothing of rank, targets or base model: the first two follow from the
                        tensors, the third is asked for, and everything is checked against it.
    an adapter folder   adapter_config.json and weights as PEFT writes them, by the authors' package.

Nothing is unpickled but tensors, and nothing may be missing or left over: a weight that finds no place would leave its
layer at the start value, which for most methods is zero.
"""

import dataclasses
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from . import models
from .attach import check_tensors, config_content, quiet
from .manifold.linear import StiefelLinear
from .manifold.stiefel import distance_to_stiefel, polar_retraction
from .run_folder import replacing
from .targets import fits, is_linear, shortest_targets
from .tuner.config import AdapterConfig
from .tuner.methods import METHODS

WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # put in front of names by DDP, torch.compile and PEFT
ROUNDED = 1e-2  # a factor off the manifold by less was stored in half precision; by more, it is something else
EXACT = 1e-5


def import_adapter(
    source: Path, folder: Path, *, base_model: str | None = None, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turn an authors' checkpoint or adapter folder into an adapter folder of ours.

    Args:
        source: a checkpoint file or an adapter folder.
        folder: to write; must not exist yet.
        base_model: folder or hub name of the base model; None = as the source's adapter_config.json says.
        settings: what the source cannot say (an activation, a dropout): fields of the adapter's config.

    Returns: peft_type, base_model, r, target_modules, layers (how many), repaired (factors put back on the manifold).
    Raises: FileNotFoundError, FileExistsError, ValueError; nothing is written then.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; name a checkpoint file or an adapter folder.")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a folder that is not.")
    if source.is_dir():
        config, tensors = _read_folder(source, base_model, settings or {})
    else:
        config, tensors = _read_checkpoint(source, base_model, settings or {})
    repaired = _check(source, config, tensors)
    with replacing(folder) as partial:
        config.save_pretrained(str(partial))
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    return {
        "peft_type": config.method.upper(),
        "base_model": config.base_model_name_or_path,
        "r": config.r,
        "target_modules": sorted(config.target_modules or ()),
        "layers": len({key.rsplit(".", 2)[0] for key in tensors}),
        "repaired": repaired,
    }


# --- checkpoint files ------------------------------------------------------------------------------------------------


def _read_checkpoint(
    path: Path, base_model: str | None, settings: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    if base_model is None:
        raise ValueError(f"{path} does not say which base model it belongs to; name it with --base-model.")
    state = _state_dict(path)
    config_cls, layers = _layers(path, state)
    base = models.empty_base(base_model, task="causal-lm")
    modules = dict(base.named_modules())
    _check_layers(path, layers, modules)
    targets = shortest_targets(layers, modules)
    _check_complete(path, layers, targets, modules)
    ranks = {name: weights["A"].shape[0] for name, weights in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = _config(
        path,
        config_cls,
        {
            "r": rank,
            "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": models.resolve_name(base_model),
            "inference_mode": True,
            **settings,
        },
    )
    prefix = config_cls.method + "_"
    tensors = {
        f"base_model.model.{name}.{prefix}{letter}.weight": weight.contiguous()
        for name, weights in layers.items()
        for letter, weight in weights.items()
    }
    return config, tensors


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, and nothing that pickle could run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each raise types of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be loaded as a checkpoint of tensors ({reason}). It is damaged, or it holds objects that "
            "would have to be run to be read, which this program does not do."
        ) from None
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no model_state_dict; it holds {held or 'nothing'}.")
    strange = [name for name, value in state.items() if not torch.is_tensor(value)]
    if strange or not state:
        raise ValueError(
            f"{path}: model_state_dict holds {strange[0] if strange else 'nothing'}, where tensors belong."
        )
    return state


def _layers(path: Path, state: Mapping[str, Tensor]) -> tuple[type[AdapterConfig], dict[str, dict[str, Tensor]]]:
    """Take the names apart: the method, and for each layer its weights by letter."""
    candidates = [config_cls for config_cls in METHODS if config_cls.checkpoint_names]
    for config_cls in candidates:
        names = "|".join(config_cls.checkpoint_names)
        pattern = re.compile(rf"(.+)\.{config_cls.method}\.({names})\.weight")
        matches = {key: pattern.fullmatch(key) for key in state}
        if any(matches.values()):
            unmatched = [key for key, match in matches.items() if match is None]
            if unmatched:
                raise ValueError(f"{path} holds {len(unmatched)} tensors that are no adapter's ({unmatched[0]}, ...).")
            return config_cls, _by_layer(path, config_cls, state, {k: m.groups() for k, m in matches.items() if m})
    known = ", ".join(f"<layer>.{c.method}.{name}.weight" for c in candidates for name in c.checkpoint_names)
    raise ValueError(f"{path} holds no adapter: no tensor is called {known}; the first is {next(iter(state))}.")


def _by_layer(
    path: Path, config_cls: type[AdapterConfig], state: Mapping[str, Tensor], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, (layer, name) in parts.items():
        letter = config_cls.checkpoint_names[name]
        weights = layers[_unwrapped(layer)]
        if letter in weights:
            raise ValueError(f"{path} holds the {letter} of {_unwrapped(layer)} twice, under its old and new name.")
        if state[key].dim() != 2 or not torch.isfinite(state[key]).all():
            raise ValueError(f"{path}: {key} of shape {tuple(state[key].shape)} is no matrix of finite numbers.")
        weights[letter] = state[key].float()
    for layer, weights in layers.items():
        missing = set(config_cls.checkpoint_names.values()) - set(weights)
        if missing:
            raise ValueError(f"{path}: the {', '.join(sorted(missing))} of {layer} is missing.")
        if weights["A"].shape[0] != weights["B"].shape[1]:
            shapes = tuple(tuple(weights[letter].shape) for letter in "AB")
            raise ValueError(f"{path}: A and B of {layer} have shapes {shapes}, which do not fit together.")
    return dict(layers)


def _unwrapped(name: str) -> str:
    while any(name.startswith(wrapper) for wrapper in WRAPPERS):
        name = name.split(".", 2)[2] if name.startswith("base_model.model.") else name.split(".", 1)[1]
    return name


def _check_layers(path: Path, layers: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    for name in layers:
        if name not in modules or not is_linear(modules[name]):
            near = difflib.get_close_matches(name, [path for path, module in modules.items() if is_linear(module)], n=1)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise ValueError(f"{path}: the base model has no linear layer {name}{hint}. Is it the right base model?")


def _check_complete(
    path: Path, layers: Mapping[str, Any], targets: list[str], modules: Mapping[str, nn.Module]
) -> None:
    missing = [name for name in modules if fits(name, targets) and name not in layers]
    if missing:
        raise ValueError(
            f"{path} adapts {', '.join(targets)} in {len(layers)} layers, but not in {len(missing)} others of the base "
            f"model ({missing[0]}, ...). It was cut short, or belongs to a smaller model."
        )


# --- adapter folders -------------------------------------------------------------------------------------------------


def _read_folder(
    source: Path, base_model: str | None, settings: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    path, content = source / "adapter_config.json", config_content(source)
    by_name = {config_cls.method.upper(): config_cls for config_cls in METHODS}
    if content["peft_type"] not in by_name:
        raise ValueError(f"{path}: peft_type {content['peft_type']} is PEFT's own, and needs no import.")
    config_cls = by_name[content["peft_type"]]
    if content.get("task_type") != "CAUSAL_LM":
        raise ValueError(
            f"{path}: task_type is {content.get('task_type')!r}; import checks causal language models only. Load "
            "such a folder as it is: import beyondlora, then PeftModel.from_pretrained."
        )
    name = base_model or content.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{path} names no base model; name it with --base-model.")
    fields = {field.name for field in dataclasses.fields(config_cls) if field.init}
    effective = {key: value for key, value in content.items() if key not in fields and not _inert(key, value)}
    if effective:
        listed = ", ".join(f"{key}={value!r}" for key, value in effective.items())
        raise ValueError(f"{path} asks for what this version does not do: {listed}.")
    own = {key: value for key, value in content.items() if key in fields and key != "peft_type"}
    named = {"base_model_name_or_path": models.resolve_name(name), "inference_mode": True}
    try:
        tensors = load_peft_weights(str(source), device="cpu")
    except Exception as error:  # safetensors and pickle raise types of their own
        raise ValueError(f"The weights in {source} are missing or damaged: {error}") from None
    return _config(path, config_cls, {**own, **named, **settings}), tensors


def _inert(key: str, value: Any) -> bool:
    """Whether an unknown key of a config says nothing: switched off, empty, or about the file itself."""
    return value in (None, False, {}, [], "") or key in ("peft_type", "peft_version", "megatron_core")


# --- both ------------------------------------------------------------------------------------------------------------


def _config(path: Path, config_cls: type[AdapterConfig], values: Mapping[str, Any]) -> AdapterConfig:
    known = [field.name for field in dataclasses.fields(config_cls) if field.init]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; its keys are {', '.join(known)}."
            raise ValueError(f"{config_cls.method.upper()} has no key {key!r}{hint}")
    try:
        return config_cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check(source: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Compare with what the config makes of the base model, name by name; put rounded factors back in place."""
    base = models.empty_base(str(config.base_model_name_or_path), task="causal-lm")
    try:
        with quiet():
            model = get_peft_model(base, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The adapter in {source} does not fit its base model: {error}") from error
    check_tensors(source, get_peft_model_state_dict(model, save_embedding_layers=False), tensors)
    repaired = []
    for name, module in model.named_modules():
        key = name.removesuffix(f".{model.active_adapter}") + ".weight"
        if isinstance(module, StiefelLinear):
            weight = module.tall(tensors[key].float())
            distance = distance_to_stiefel(weight).item()
            if not distance < ROUNDED:
                raise ValueError(
                    f"{source}: {key} is off the Stiefel manifold by {distance:.1e}; it is no such factor."
                )
            if distance > EXACT:
                repaired.append(key)
                weight = polar_retraction(weight, torch.zeros_like(weight))
            tensors[key] = module.tall(weight).contiguous()
    return repaired
