"""What a config asks of a model, looked at before the first layer is touched: refused, or said."""

import difflib
import functools
import inspect
import re
import warnings
from typing import Any

import torch
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn

from ..targets import fits
from .base_layers import bare, is_supported, layer_problem
from .experts import parameter_problem

HEADS = {"classifier", "score", "qa_outputs"}  # what PEFT itself adds to modules_to_save, there or not
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
BEFORE_ANY_INPUT = re.compile(r"_?_?(?:init|reset|post_init|tie|resize|prune|load|save)")  # methods
OF_EXPERTS = {"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def check_modules_to_save(config: Any, model: nn.Module) -> None:
    """Refuse a name in modules_to_save that no module has: PEFT trains nothing for it, and says nothing.

    Raises: ValueError.
    """
    names = [name for name, _ in model.named_modules() if name]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if wanted not in HEADS and not any(f"base_model.model.{name}".endswith(wanted) for name in names):
            leaves = {name.rpartition(".")[2] for name in names} - {"base_layer"}
            near = difflib.get_close_matches(wanted.rpartition(".")[2], leaves)
            hint = f"did you mean {near[0]!r}?" if near else "name modules as model.named_modules() does."
            raise ValueError(
                f"modules_to_save holds {wanted!r}, which no module of {type(model).__name__} is called; {hint}"
            )


def target_problem(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why a module of a model cannot be adapted, by its name; None where it can."""
    if reason := _idle(name, module, model):
        return f"{name}: {reason}; leave it out of target_modules, or name it in exclude_modules."
    parent = model.get_submodule(name.rpartition(".")[0])
    if _has_fast_path(parent) and isinstance(bare(module), nn.Linear):
        return (
            f"{name}: nn.TransformerEncoderLayer has a fast path for evaluation, which reads this layer's weight and "
            "does not call it, so an adapter would be trained and then without effect. Switch it off before, in every "
            "program that uses the adapter: torch.backends.mha.set_fastpath_enabled(False)."
        )
    problem = layer_problem(bare(module))
    return problem and f"{name} is a {type(bare(module)).__name__}: {problem}"


def leave_out_idle(targets: dict[str, nn.Module], config: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Of all linear layers those beside which an adapter does something; the others are said, if they are not all."""
    reasons = {name: reason for name, module in targets.items() if (reason := _idle(name, module, model))}
    if not reasons or len(reasons) == len(targets):
        return targets
    name, reason = next(iter(reasons.items()))
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    warnings.warn(f"'all-linear' leaves out {name}{more}: {reason}.", stacklevel=2)
    config.target_modules -= reasons.keys()
    return {name: module for name, module in targets.items() if name not in reasons}


def _idle(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why an adapter beside a module would be without effect or without sense; None where it would not."""
    if reader := _reader(name, model):
        return f"{reader}, so an adapter would be without effect"
    layer = bare(module)
    if isinstance(layer, nn.Linear) and _gives_several(layer):
        return f"{type(layer).__name__} returns more than one tensor, and there is no saying to which to add"
    return None


def _gives_several(layer: nn.Linear) -> bool:
    """Whether a linear layer with a forward of its own, as a router, returns no tensor; asked without any numbers."""
    if type(layer).forward is nn.Linear.forward or resolve_quantization_backend(layer) is not None:
        return False
    try:
        weights = {name: torch.empty_like(weight, device="meta") for name, weight in layer.named_parameters()}
        rows = torch.empty(2, layer.in_features, device="meta", dtype=layer.weight.dtype)
        with torch.no_grad():
            result = torch.func.functional_call(layer, weights, (rows,))
    except Exception:  # it wants another input, or real numbers
        return False
    return not isinstance(result, torch.Tensor)


def _reader(name: str, model: nn.Module) -> str | None:
    """Who reads a module's weight instead of calling the module, in words; None where it is called."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this layer's weight and never calls it"
    fused = hasattr(parent, "A_log")  # a state space layer (one with a matrix A, as Mamba's)
    if not _reads(type(parent), leaf, even_if_called=fused):
        return None
    where = ", at least in its fused kernels," if fused else ""
    return f"{type(parent).__name__} reads this layer's weight{where} and does not call it"


def _has_fast_path(parent: nn.Module) -> bool:
    """Whether a layer of torch's own transformer may be evaluated in one kernel, for all that is known beforehand."""
    if not isinstance(parent, nn.TransformerEncoderLayer) or not torch.backends.mha.get_fastpath_enabled():
        return False
    attention, is_usual = parent.self_attn, bool(parent.activation_relu_or_gelu)
    if not isinstance(attention, nn.MultiheadAttention):
        return False
    return is_usual and attention.batch_first and attention.in_proj_bias is not None and attention.num_heads % 2 == 0


def _reads(kind: Any, name: str, *, even_if_called: bool) -> bool:
    """Whether a class's code reads the weight of a module that it holds, and does not call the module.

    A state space layer may do either, by whether its fused kernels are there (which of its projections it reads differs
    from model to model; PEFT knows two names and five models): `even_if_called`.
    """
    code = _code_of(kind)
    if code is None:
        return even_if_called and name != "in_proj"
    module = rf"self\.{re.escape(name)}\b"
    reads = re.search(rf"{module}\.weight\b(?!\.(?:device|dtype|shape|size))", code) is not None
    used = re.search(rf"(?<!isinstance\(){module}(?!\.)", code) is not None  # called, or handed on
    return reads and (even_if_called or not used)


@functools.cache
def _code_of(kind: Any) -> str | None:
    """What a module class and those above it do with inputs; None of a class without a file."""
    own = kind.__mro__[: -len(nn.Module.__mro__)]
    methods = [method for cls in own for method in vars(cls).values() if inspect.isfunction(method)]
    try:
        return "".join(inspect.getsource(method) for method in methods if not BEFORE_ANY_INPUT.match(method.__name__))
    except (OSError, TypeError):
        return None


def warn_of_experts(config: Any, model: nn.Module) -> None:
    """Where targets sound like experts' layers, say that transformers holds those in parameters."""
    targets = config.target_modules or ()
    if isinstance(targets, str):
        wanted = targets.lower() == "all-linear"
    else:
        wanted = any(name.rpartition(".")[2] in OF_EXPERTS for name in targets)
    if config.target_parameters is not None or not wanted:
        return
    if left_out := _expert_parameters(model):
        able = not any(parameter_problem(name, model) for name in left_out)
        help_text = f" target_parameters={_ends(left_out)} gives them one; [] keeps them so, without this warning."
        warnings.warn(
            f"This model's experts are no layers but parameters, as {left_out[0]}, and get no adapter: they stay "
            f"frozen.{help_text if able else ''}",
            stacklevel=2,
        )


def refuse_no_parameter(config: Any, model: nn.Module) -> None:
    """Say why target parameters fit none, and name those that can be meant. Raises: ValueError."""
    targets, there = sorted(config.target_parameters), _expert_parameters(model)
    if meant := [name for name, _ in model.named_parameters() if fits(name, targets)]:
        raise ValueError(
            f"target_parameters {targets} name {len(meant)} parameters ({meant[0]}, …), and {_narrowed(config)} leaves "
            "none of them."
        )
    hint = f"Those of its experts: {_ends(there)}." if there else "It has no experts."
    raise ValueError(f"Target parameters {targets} not found in the base model {type(model).__name__}. {hint}")


def refuse_unmatched(config: Any, model: nn.Module) -> None:
    """Say why target modules fit no layer, and name the layers that may have been meant. Raises: ValueError."""
    targets, names = sorted(config.target_modules), [name for name, _ in model.named_modules() if name]
    meant = [name for name in names if fits(name, targets)]
    if meant and (told := _narrowed(config)):
        raise ValueError(
            f"No layer is left to adapt: target_modules {targets} name {len(meant)} modules ({meant[0]}, …), "
            f"and {told} leaves none of them."
        )
    leaves = {name.rpartition(".")[2] for name in names if is_supported(bare(model.get_submodule(name)))}
    near = {match for target in targets for match in difflib.get_close_matches(target.rpartition(".")[2], leaves)}
    hint = f"Did you mean {sorted(near)}?" if near else f"Layers that can be adapted: {sorted(leaves)}."
    raise ValueError(f"Target modules {targets} not found in the base model {type(model).__name__}. {hint}")


def _expert_parameters(model: nn.Module) -> list[str]:
    return [
        name for name, weight in model.named_parameters() if weight.dim() == 3 and name.rpartition(".")[2] in OF_EXPERTS
    ]


def _ends(names: list[str]) -> list[str]:
    """The last two parts of each name."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def _narrowed(config: Any) -> str:
    """The options that leave layers out, as they are set."""
    options = {name: value for name in NARROWING if (value := getattr(config, name)) is not None}
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def joined(problems: list[str], limit: int = 5) -> str:
    """The first problems of many, a line each."""
    more = f"\n  … and {len(problems) - limit} more." if len(problems) > limit else ""
    return "These layers cannot be adapted as asked:\n  " + "\n  ".join(problems[:limit]) + more
