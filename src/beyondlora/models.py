"""Base models and what prepares their input, from a folder, the hub, a Python package or this one.

>>> processor = load_processor("demo", task="causal-lm")
>>> model = load_base("demo", task="causal-lm")
"""

from __future__ import annotations

import contextlib
import importlib.resources
import importlib.util
import inspect
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import deepspeed as zero
from transformers.utils import logging as transformers_logging

_AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "sequence-regression": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
_CONFIG_CLASS = re.compile(r"configuration class <class '(?:\w+\.)*(\w+)'>")
# What tables of learned positions are called.
_POSITIONS = {"wpe", "position_embeddings", "embed_positions", "positions_embed"}
_BEGUN = "_beyondlora_begun_anew"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def demo_base() -> Path:
    """The folder of the small pretrained model that this package carries."""
    return Path(str(importlib.resources.files("beyondlora") / "demo" / "base"))


def resolve_name(name_or_path: str) -> str:
    """What `from_pretrained` should be given: "demo" and "package:NAME/FOLDER" become folders, other names stay.

    Raises: FileNotFoundError for a folder or package that is not there, ValueError for a folder that holds no model.
    """
    if name_or_path == "demo":
        folder = demo_base()
    elif name_or_path.startswith("package:"):
        folder = _package_folder(name_or_path)
    else:
        folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        _check_folder(folder, name_or_path)
        return str(folder)
    if folder.exists():
        raise ValueError(f"model_name_or_path={name_or_path!r} is a file; give the folder that holds its config.json")
    if name_or_path == "demo" or name_or_path.startswith(("package:", ".", "/", "~")) or name_or_path.count("/") > 1:
        start = "" if folder.is_absolute() else f"; relative paths start from {Path.cwd()}"
        raise FileNotFoundError(f"model_name_or_path={name_or_path!r}: there is no folder {folder}{start}")
    return name_or_path


def load_base(
    name_or_path: str,
    *,
    task: str,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: str = "float32",
    bits: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """The pretrained model for a task, with a new head where the task needs another one than the folder has.

    The head's initialisation draws from torch's global generator: seed it first. Every other weight must come from the
    folder and fit; nothing is filled in silently.

    Args:
        name_or_path: see `resolve_name`.
        task: one of recipe.TASKS.
        num_labels: classes of a classification task; taken from label_names where those are given.
        label_names: their names, in the order of their numbers.
        dtype: "float32" or "bfloat16", of the weights.
        bits: 8 or 4 = bitsandbytes holds the linear layers in so many, on the accelerator if there is one.
        pad_token_id: the processor's; a decoder that classifies sequences needs it to find their ends.
    Raises: FileNotFoundError, ValueError.
    """
    options = {"dtype": _DTYPES[dtype], **_head_options(task, num_labels, label_names)}
    if bits is not None:
        options["quantization_config"] = _quantization(bits, _DTYPES[dtype])
    if bits == 8:  # which says in every run, and nowhere else, that it computes in half precision
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with quiet_transformers(), _explained(name_or_path, f"a model for {task}"):
        model, report = _AUTO_CLASSES[task].from_pretrained(
            resolve_name(name_or_path), output_loading_info=True, ignore_mismatched_sizes=task != "causal-lm", **options
        )
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    _check_weights(name_or_path, "" if task == "causal-lm" else f"{_body(model)}.", new)
    setattr(model, _BEGUN, _outermost(model, new))
    if pad_token_id is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad_token_id
    return model


def begun_anew(model: torch.nn.Module) -> list[str]:
    """The modules of a model whose weights `load_base` drew, since the folder has none for them: heads, poolers."""
    names: list[str] = getattr(model, _BEGUN, [])
    return names


def empty_base(name_or_path: str, *, task: str) -> PreTrainedModel:
    """The architecture of a model without its weights (on the meta device): names and shapes in no time.

    Raises: FileNotFoundError, ValueError.
    """
    with quiet_transformers(), _explained(name_or_path, f"a model for {task}"):
        config = AutoConfig.from_pretrained(resolve_name(name_or_path))
        with _without_zero(), torch.device("meta"):
            model: PreTrainedModel = _AUTO_CLASSES[task].from_config(config)
    return model


@contextlib.contextmanager
def _without_zero() -> Iterator[None]:
    """Build whole models under ZeRO 3, too, which would make real weights to cut up, and draw random numbers."""
    reference = zero._hf_deepspeed_config_weak_ref
    zero._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = reference


def load_processor(
    name_or_path: str, *, task: str, image_size: int | None = None, chat_template_path: str | None = None
) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """The tokenizer, or for images the image processor, that belongs to a model.

    A tokenizer pads on the right and always has a pad token (its end token where it has none of its own); its
    `model_max_length` is no more than the positions that its model has learned, where it learns them. An image
    processor works with Pillow, with or without torchvision installed, so that two machines prepare the same pixels.

    Args:
        image_size: side in pixels to resize images to; None = the model's own.
        chat_template_path: a file with the Jinja template for conversations; None = the tokenizer's own, if any.
    Raises: FileNotFoundError, ValueError.
    """
    if task == "image-classification":
        return _load_image_processor(name_or_path, image_size)
    with quiet_transformers(), _explained(name_or_path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolve_name(name_or_path))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {name_or_path!r} has no pad, end or unknown token to pad rows with")
    tokenizer.model_max_length = min(tokenizer.model_max_length, _learned_positions(name_or_path, task))
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_path).expanduser())
    return tokenizer


def _learned_positions(name: str, task: str) -> float:
    """The tokens that a model's table of learned positions has rows for; infinite for models that compute positions.

    Rotary positions go on for ever, whatever max_position_embeddings says; behind the end of a table is an IndexError.
    """
    try:
        model = empty_base(name, task=task)
    except (FileNotFoundError, ValueError, ImportError):  # loading the model explains that better
        return math.inf
    tables = [
        module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and path.rpartition(".")[2] in _POSITIONS
    ]
    # OPT and BART count from an offset, RoBERTa from behind its pad token.
    starts = (getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1) for table in tables)
    return min((table.num_embeddings - start for table, start in zip(tables, starts, strict=True)), default=math.inf)


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"chat_template_path={str(path)!r}: there is no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"chat_template_path={str(path)!r} is no text in UTF-8") from None


def extra_inputs(name_or_path: str, *, task: str, image_size: int | None = None) -> dict[str, bool]:
    """What the model's forward needs to be told besides the batch.

    A vision transformer that gets images of another size than it was trained on must be told to interpolate its
    position embeddings; a convolutional network takes any size.
    """
    if task != "image-classification" or image_size is None:
        return {}
    with quiet_transformers(), _explained(name_or_path, "a config"):
        config = AutoConfig.from_pretrained(resolve_name(name_or_path))
    if image_size == getattr(config, "image_size", None):
        return {}
    model_class: Any = AutoModelForImageClassification._model_mapping.get(type(config), None)
    takes_it = (
        model_class is not None and "interpolate_pos_encoding" in inspect.signature(model_class.forward).parameters
    )
    return {"interpolate_pos_encoding": True} if takes_it else {}


# --------------------------------------------------------------------------------------------------------------- names


def _package_folder(name: str) -> Path:
    package, _, inner = name.removeprefix("package:").partition("/")
    # find_spec on a dotted name would import the parents; a top-level name is only looked up.
    if not package.isidentifier() or importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f"model_name_or_path={name!r}: the Python package {package!r} is not installed here")
    return Path(str(importlib.resources.files(package).joinpath(*inner.split("/"))))


def _check_folder(folder: Path, name: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model_name_or_path={name!r} holds an adapter, not a base model; name the model that it was trained on "
            "(base_model_name_or_path in its adapter_config.json)"
        )
    holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ValueError(
        f"model_name_or_path={name!r} holds no config.json, so it is no transformers model; it holds {holds}"
    )


# ------------------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines below errors, like those about a new head, which is new on purpose."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str, wanted: str) -> Iterator[None]:
    """Say which name failed, why, and what to do, instead of showing a library's traceback."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if str(error).startswith("model_name_or_path="):
            raise
        raise ValueError(f"model_name_or_path={name!r}: cannot load {wanted}: {_reason(error, name)}") from error


def _reason(error: Exception, name: str) -> str:
    text = str(error)
    lowered = text.lower()
    # The hub's answers; a path may hold any number.
    if not Path(name).exists() and ("gated" in lowered or "401" in lowered or "403" in lowered):
        return "it is gated or private; accept its terms on its hub page and run `hf auth login`"
    if "couldn't connect" in lowered:
        return "there is no local folder of that name, and the hub cannot be reached; check the name and the network"
    if "not a valid model identifier" in lowered:
        return "there is no local folder and no public hub model of that name; check the spelling"
    if isinstance(error, SafetensorError):
        return f"its weights are damaged or cut short ({text}); fetch or copy them again"
    if match := _CONFIG_CLASS.search(text):
        return f"transformers knows no such form of this architecture ({match[1]})"
    first_lines = " ".join(text.split())
    return first_lines if len(first_lines) <= 300 else first_lines[:300] + " ..."


def _head_options(task: str, num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    if task == "causal-lm":
        return {}
    if task == "sequence-regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if label_names is None:
        if num_labels is None:
            raise ValueError(f"task={task!r} needs num_labels or label_names to size the classifier")
        label_names = [str(i) for i in range(num_labels)]
    options: dict[str, Any] = {"problem_type": "single_label_classification"}
    options["id2label"] = dict(enumerate(label_names))
    options["label2id"] = {label: i for i, label in enumerate(label_names)}
    return options


def _quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _body(model: torch.nn.Module) -> str:
    """The name of what a head is put on; in some families (CLIP, SigLIP) the class calls it otherwise: the largest."""
    sizes = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()}
    prefix: str = model.base_model_prefix  # type: ignore[assignment]
    return prefix if prefix in sizes else max(sizes, key=lambda name: sizes[name])


def _outermost(model: torch.nn.Module, new: set[str]) -> list[str]:
    """The largest modules all of whose parameters are among these."""
    found: list[str] = []
    for name, module in model.named_modules():
        weights = [f"{name}.{weight}" for weight, _ in module.named_parameters()]
        if weights and new.issuperset(weights) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found.append(name)
    return found


def _check_weights(name: str, body: str, new: set[str]) -> None:
    """Only a task head, outside `body`, may be new: a body weight that is missing or misfits would be noise."""
    # Some encoders are published without their pooler, which counts as a part of the head.
    noise = sorted(key for key in new if key.startswith(body) and "pooler" not in key)
    if noise:
        raise ValueError(
            f"model_name_or_path={name!r}: {len(noise)} weights are missing or have another shape than its config says "
            f"({', '.join(noise[:3])}{', ...' if len(noise) > 3 else ''}); a damaged folder, or no model of this kind"
        )


def _load_image_processor(name_or_path: str, image_size: int | None) -> BaseImageProcessor:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError("image tasks need Pillow, which is not installed: pip install 'beyondlora[images]'")
    options = {} if image_size is None else {"size": {"height": image_size, "width": image_size}}
    with quiet_transformers(), _explained(name_or_path, "an image processor"):
        return AutoImageProcessor.from_pretrained(resolve_name(name_or_path), backend="pil", **options)
