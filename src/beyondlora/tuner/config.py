"""What the configs of all methods share: LoRA's field names, their checks, and the way from a config to an adapter."""

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.reading import Reading
from .card import complete_cards

# Since peft 0.21 a method says itself what is saved of it. Before, biases of methods from outside are left out.
METHODS_SAY_WHAT_IS_SAVED = hasattr(BaseTuner, "_get_adapter_state_dict")


@dataclass(frozen=True)
class LayerSpec:
    """One layer to adapt, as a config needs to know it.

    Attributes:
        in_features, out_features: N and M of the base weight as a matrix.
        rank: R, after `rank_pattern`.
        scaling: s, after `alpha_pattern`.
        hidden_size: the model's, or None where it has none.
        base_weight: gives W0 (M, N), dequantised where need be; called only by starts that look at it.
        reading: how the layer reads its input, where that is not rows of features.
    """

    in_features: int
    out_features: int
    rank: int
    scaling: float
    hidden_size: int | None
    base_weight: Callable[[], Tensor]
    reading: Reading | None = None


def option(help_text: str, **default: Any) -> Any:
    """A config field with its help text."""
    return field(metadata={"help": help_text}, **default)


@dataclass
class AdapterConfig(PeftConfig):
    """Fields of every method, named and meant as in `peft.LoraConfig`."""

    method: ClassVar[str]
    # How the authors' own checkpoints call the weights, `<layer>.<method>.<name>.weight` → letter; {} = not at all.
    checkpoint_names: ClassVar[dict[str, str]] = {}

    r: int = option("Rank R of the bottleneck, at least 1.", default=8)
    lora_alpha: float | None = option("Scaling numerator: s = lora_alpha / r. None means s = 1.", default=None)
    lora_dropout: float = option("Dropout probability in [0, 1), in training only.", default=0.0)
    use_rslora: bool = option(
        "Scale by lora_alpha / sqrt(r) instead of lora_alpha / r; no effect where lora_alpha is None.", default=False
    )
    target_modules: list[str] | set[str] | str | None = option(
        "Names (or ends of names) of the layers to adapt, a regular expression, or 'all-linear'. "
        "Default: the architecture's LoRA targets.",
        default=None,
    )
    target_parameters: list[str] | None = option(
        "Names (or ends of names) of the parameters that hold a mixture's experts, as "
        "['experts.gate_up_proj', 'experts.down_proj']; each expert gets an adapter of its own.",
        default=None,
    )
    exclude_modules: list[str] | set[str] | str | None = option(
        "Names, or a regular expression, of layers to leave alone.", default=None
    )
    modules_to_save: list[str] | None = option("Other modules to train in full and to save.", default=None)
    bias: str = option("Biases to train: 'none', 'all' or '<method>_only'.", default="none")
    layers_to_transform: list[int] | int | None = option("Adapt only the blocks with these indices.", default=None)
    layers_pattern: list[str] | str | None = option(
        "Name of the module list that layers_to_transform counts in.", default=None
    )
    rank_pattern: dict[str, int] = option("Ranks that differ from r, by layer name or pattern.", default_factory=dict)
    alpha_pattern: dict[str, float] = option(
        "Alphas that differ from lora_alpha, by layer name or pattern.", default_factory=dict
    )
    fan_in_fan_out: bool = option(
        "The layer stores (in, out), like GPT-2's Conv1D; set automatically there.", default=False
    )
    init_lora_weights: bool | str = option(
        "True: the method's own start. False: random weights, which change the base model's outputs from the start.",
        default=True,
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        "Token indices whose embedding rows are trained as well.", default=None
    )
    ensure_weight_tying: bool = option(
        "Where the model ties its embeddings: keep those of modules_to_save and trainable_token_indices tied.",
        default=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.layers_to_transform, range):  # which JSON does not know
            self.layers_to_transform = list(self.layers_to_transform)
        self._check()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into PEFT's model card, if there is one, how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        complete_cards(Path(save_directory), self.method)

    def make_adapter(self, layer: LayerSpec) -> Adapter:
        """The adapter of this config for one layer, freshly initialised."""
        raise NotImplementedError

    def layer_problem(self, rank: int, out_features: int, in_features: int) -> str | None:
        """Why a layer of this shape cannot take an adapter of this rank; None where it can."""
        return None

    def scaling_for(self, rank: int, alpha: float | None) -> float:
        """The scaling s for a layer of this rank and alpha."""
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.use_rslora else rank)

    def _check(self) -> None:
        """Refuse bad values when the config is made, not when the model is."""
        for name, annotation in _annotations(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if name != "r" and not _fits(value, annotation):
                yaml = " (null, in YAML)" if value == "None" else ""
                self._refuse(f"{name}={value!r} is of no use there; give {_in_words(annotation)}{yaml}.")
        for name, rank in {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                self._refuse(f"{name}={rank!r} is not a rank; give a whole number of at least 1.")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if alpha is not None and not alpha > 0:
                self._refuse(f"{name}={alpha!r} scales the adapter away or upside down; give a number above 0.")
        if not 0 <= self.lora_dropout < 1:
            self._refuse(f"lora_dropout={self.lora_dropout!r} is not a probability in [0, 1).")
        biases = ("none", "all", f"{self.method}_only")
        if self.bias not in biases:
            self._refuse(f"bias={self.bias!r} is unknown; choose one of {list(biases)}.")
        if self.bias != "none" and not METHODS_SAY_WHAT_IS_SAVED:
            self._refuse(
                f"bias={self.bias!r}: peft {version('peft')} would train the biases and not save them. Install "
                "peft >= 0.21, or leave bias at 'none'."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            self._refuse("layers_pattern says where to count layers: give layers_to_transform, too.")
        self._check_choice("init_lora_weights", self.init_lora_weights, self.starts())
        self._check_method()

    @property
    def merge_refusal(self) -> str | None:
        """Why an adapter of this config beside a linear layer is no weight update; None where it is one."""
        return self._weightless_adapter().merge_refusal

    def starts(self) -> tuple[bool | str, ...]:
        """The values that `init_lora_weights` takes."""
        return (True, False)

    def _check_method(self) -> None:
        """Let the maths check the method's own fields."""
        try:
            self._weightless_adapter()
        except ValueError as error:
            self._refuse(str(error))

    def _weightless_adapter(self) -> Adapter:
        """An adapter beside a linear layer of one number, without memory."""
        with torch.device("meta"):
            return self.make_adapter(LayerSpec(1, 1, 1, 1.0, None, lambda: torch.empty(1, 1, device="meta")))

    def _check_choice(self, name: str, value: object, choices: tuple[bool | str, ...]) -> None:
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
            self._refuse(f"{name}={value!r} is unknown; choose one of {list(choices)}.")

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{type(self).__name__}: {reason}")


@functools.cache
def _annotations(config: Any) -> dict[str, Any]:
    """The types of the fields that are ours, by name."""
    hints = typing.get_type_hints(config)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(config) if "help" in entry.metadata}


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type, or becomes so from YAML or JSON, which know lists for all that has an order."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return True  # the method says which there are
    if origin is dict:
        key, entry = arguments
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, entry) for k, v in value.items())
    if origin in (list, set, tuple):
        several = isinstance(value, Iterable) and not isinstance(value, (str, dict))
        return several and all(_fits(entry, arguments[0]) for entry in value)
    kind = {int: numbers.Integral, float: numbers.Real}.get(annotation, annotation)
    return isinstance(value, kind) and (annotation is bool or not isinstance(value, bool))


def _in_words(annotation: Any) -> str:
    """What to give for a type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is dict:
        return f"a mapping to {_in_words(arguments[1])}"
    if origin in (list, set, tuple):
        return f"a list ({_in_words(arguments[0])} each)"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(annotation, str(annotation))
