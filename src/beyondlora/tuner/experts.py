"""Experts: a layer for each projection of each expert, where a model holds the weights of all of them in one parameter.

A mixture of transformers 5 keeps (E, M, N) arrays and multiplies by slices of them: there is no layer beside which an
adapter could stand. `open_experts` gives such a module a child for each expert, with a linear layer for each of its
projections: `experts.7.down_proj`. Its weight is a view of the array, so nothing is copied, and the base model's state
dict keeps its names. `close_experts` takes the children away. Every method, check and file then works as beside any
other linear layer.

Legend: E experts, T tokens, K experts of a token, S = T · K pairs, N inputs, M outputs.
"""

import copy
import functools
import itertools
import re
import types
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .base_layers import bare

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# What transformers' decorator for experts says of their form; a class without it computes in a way of its own.
FORM = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
_KEY = re.compile(rf"(.+)\.(\d+)\.({'|'.join(PROJECTIONS)})")


class ExpertLinear(nn.Linear):
    """One projection of one expert: a linear layer without parameters, whose weight is a slice of all experts'.

    Args:
        experts: the module that holds the parameters.
        name: of the projection.
        index: of the expert.
    """

    def __init__(self, experts: Any, name: str, index: int) -> None:
        nn.Module.__init__(self)
        self.name, self.index = name, index
        self._experts = (experts,)  # in a tuple: it is no child
        self.out_features, self.in_features = expert_shape(experts, name)

    @property
    def experts(self) -> Any:
        """The module that holds the parameters."""
        return self._experts[0]

    def belong_to(self, experts: nn.Module) -> None:
        """Take the weights of this module from now on: a replica of the first, such as `nn.DataParallel`'s."""
        if self._experts[0] is not experts:
            self._experts = (experts,)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W0 (M, N), a view; what is left of the parameter while ZeRO 3 has it cut up."""
        parameter: Tensor = getattr(self.experts, self.name)
        if parameter.dim() != 3:
            return parameter
        return parameter[self.index].mT if self.experts.is_transposed else parameter[self.index]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """b (M,), a view, where the experts have biases."""
        return getattr(self.experts, f"{self.name}_bias")[self.index] if self.experts.has_bias else None

    @torch.no_grad()
    def write(self, weight_MN: Tensor) -> None:
        """Write other numbers into the parameter."""
        self.weight.copy_(weight_MN)


class OpenExperts(nn.Module):
    """What `open_experts` puts before the class of the experts: their computation through the children."""

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        """Σ over a token's experts of weight · expert(token), (T, N).

        Args:
            hidden_states: (T, N).
            top_k_index, top_k_weights: (T, K), which experts, and what they count for.
            adapter_names: of each row of the batch, whose tokens lie side by side, the one adapter to use.
        """
        if adapter_names is None and self._is_whole():
            whole: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return whole
        me: Any = self
        expert_S, order_S = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(expert_S, minlength=count_of(self)).tolist()
        rows = hidden_states[order_S // top_k_index.shape[-1]].split(counts)
        names: Any = [None] * len(rows)
        if adapter_names is not None:
            names = _by_pair(adapter_names, order_S, counts)
        # In training an expert without tokens is called, too: it has a gradient then, zero, on every process alike.
        some = self.training or torch.is_grad_enabled() or not len(order_S) or _is_put_together(self._modules["0"])
        y_SN = torch.cat([self._expert(e, x, names[e]) for e, x in enumerate(rows) if len(x) or some])
        if getattr(me, "has_post_expert_norm", False):  # which old ones do not know
            y_SN = me.post_expert_norm(y_SN)
        y_SN = y_SN * top_k_weights.flatten()[order_S, None]
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return y_SN[back_S].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor, names: list[str] | None) -> Tensor:
        me: Any = self
        layers: Any = self._modules[str(index)]
        for layer in layers.values():
            linear: Any = bare(layer)
            linear.belong_to(self)
        up, down = (functools.partial(_called, layer, names) for layer in layers.values())
        hidden = up(x)
        return down(me._apply_gate(hidden) if me.has_gate else me.act_fn(hidden))

    def _is_whole(self) -> bool:
        """Whether the parameters say all there is to say: no child has an adapter, but for merged ones."""
        for name, layers in self._modules.items():  # asked in every forward pass, of hundreds of layers
            for layer in layers._modules.values() if layers is not None and name.isdecimal() else ():
                if isinstance(layer, BaseTunerLayer) and (layer.disable_adapters or not layer.merged):
                    return False
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (closed_class(self),), self.__dict__.copy()


def _called(layer: nn.Module, names: list[str] | None, x: Tensor) -> Tensor:
    y: Tensor = layer(x, adapter_names=names) if names is not None and isinstance(layer, BaseTunerLayer) else layer(x)
    return y


def _is_put_together(expert: Any) -> bool:
    """Whether a call puts weights together from all processes, so that all must make it: ZeRO 3, FSDP around parts."""
    cut = any(hasattr(weight, "ds_id") for weight in expert.parameters())
    return cut or any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in expert.modules())


def _by_pair(names: list[str], order_S: Tensor, counts: list[int]) -> list[list[str]]:
    """Of each expert, the adapters of the rows that its pairs come from."""
    each = len(order_S) // len(names)
    ends = list(itertools.accumulate(counts))
    of_pairs = [names[pair // each] for pair in order_S.tolist()]
    return [of_pairs[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _empty(kind: type) -> nn.Module:
    """An open module without content, for pickle and deepcopy to fill."""
    module: nn.Module = object.__new__(_open_class(kind))
    return module


@functools.cache
def _open_class(kind: type) -> type:
    return type(f"Open{kind.__name__}", (OpenExperts, kind), {"__module__": kind.__module__})


def closed_class(experts: nn.Module) -> type:
    """The class of the experts, opened or not."""
    kind = type(experts)
    return kind.__mro__[2] if isinstance(experts, OpenExperts) else kind


def count_of(experts: Any) -> int:
    """E."""
    return _shape(experts.down_proj)[0]


def projections_of(experts: Any) -> tuple[str, str]:
    """The names of the two projections of each expert: up and down."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def open_experts(experts: nn.Module) -> None:
    """Give experts children that are layers; nothing is done where they have them."""
    if isinstance(experts, OpenExperts):
        return
    for index in range(count_of(experts)):
        layers = {name: ExpertLinear(experts, name, index) for name in projections_of(experts)}
        experts.add_module(str(index), nn.ModuleDict(layers).train(experts.training))
    kind: Any = type(experts)
    _become(experts, _open_class(kind))


def has_open_experts(model: nn.Module) -> bool:
    """Whether a model has experts that compute through layers."""
    return any(isinstance(module, OpenExperts) for module in model.modules())


def close_experts(model: nn.Module) -> None:
    """Make the experts of a model what they were, without what is beside their layers."""
    for experts in list(model.modules()):
        if isinstance(experts, OpenExperts):
            for index in range(count_of(experts)):
                delattr(experts, str(index))
            _become(experts, closed_class(experts))


def _become(experts: Any, kind: Any) -> None:
    experts.__class__ = kind
    if "_old_forward" in vars(experts):  # accelerate's hook calls this, and not the class's
        experts._old_forward = types.MethodType(kind.forward, experts)


def execution_device(layer: Any) -> torch.device | None:
    """Where accelerate computes with a layer whose weight it keeps elsewhere; None where the weight is in place."""
    weight = getattr(layer, "weight", None)
    hook = getattr(layer.experts if isinstance(layer, ExpertLinear) else layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if weight is not None and weight.is_meta and device is not None else None


def parameter_of(key: str, model: nn.Module) -> str | None:
    """The parameter that a layer of an expert is a slice of, by name; None where it is another layer."""
    found = _KEY.fullmatch(key)
    if found is None or not isinstance(model.get_submodule(found[1]), OpenExperts):
        return None
    return parameter_name(key)


def parameter_name(layer: str) -> str:
    """The parameter that a layer of an expert is a slice of, by the layer's name."""
    holder, _, name = layer.rsplit(".", 2)
    return f"{holder}.{name}"


def layer_index(layer: str) -> int:
    """Which expert's a layer is, by its name."""
    return int(layer.rsplit(".", 2)[1])


def layer_names(parameter: str, experts: nn.Module) -> list[str]:
    """The names of the layers that are slices of a parameter, once the experts that hold it are open."""
    holder, _, key = parameter.rpartition(".")
    return [f"{holder}.{index}.{key}" for index in range(count_of(experts))]


def match(config: Any, key: str, model: nn.Module) -> Any:
    """PEFT's answer whether a config's `target_parameters` mean a module; None where it is no expert's.

    What is meant is an expert's layer, for the parameter that it is a slice of. Closed experts are excluded where a
    parameter of theirs is: PEFT wants to know of every exclusion.
    """
    if (parameter := parameter_of(key, model)) is not None:
        return match_parameter(config, parameter)
    if config.target_parameters and config.exclude_modules and is_experts(model.get_submodule(key)):
        answers = [match_parameter(config, f"{key}.{name}") for name in PROJECTIONS]
        return next((answer for answer in answers if isinstance(answer, _ExcludedModule)), None)
    return None


def match_parameter(config: Any, parameter: str) -> Any:
    """PEFT's answer whether `target_parameters`, with the exclusions and the choice of layers, mean a parameter."""
    if not config.target_parameters:
        return False
    as_modules = copy.copy(config)
    as_modules.target_modules = config.target_parameters
    return check_target_module_exists(as_modules, parameter)


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes as transformers' experts do."""
    return all(hasattr(module, sign) for sign in FORM)


def targets_of(config: Any, model: nn.Module) -> dict[str, nn.Module]:
    """The parameters that a config means, by name, whatever they are: the module that holds each."""
    return {
        f"{name}.{key}": module
        for name, module in model.named_modules()
        for key, _ in module.named_parameters(recurse=False)
        if name and match_parameter(config, f"{name}.{key}")
    }


def opened_targets(config: Any, model: nn.Module) -> list[str]:
    """The names of the parameters that a config means, once their experts are open."""
    names = (
        f"{holder}.{name}"
        for holder, module in model.named_modules()
        if isinstance(module, OpenExperts)
        for name in projections_of(module)
    )
    return [name for name in names if match_parameter(config, name)]


def expert_shape(experts: Any, name: str) -> tuple[int, int]:
    """(M, N) of a projection of one expert."""
    _, rows, columns = _shape(getattr(experts, name))
    return (columns, rows) if experts.is_transposed else (rows, columns)


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # as a whole, where ZeRO 3 has it cut up


def parameter_problem(name: str, model: nn.Module) -> str | None:
    """Why a parameter of a model cannot be adapted, by its name; None where it can."""
    place, _, key = name.rpartition(".")
    around, experts = model.get_submodule(place.rpartition(".")[0]), model.get_submodule(place)
    kind = type(experts).__name__
    if not is_experts(experts):
        return (
            f"{name}: {kind} does not compute as transformers' experts do, so there is no saying where its parameters "
            "meet their input. Leave it out of target_parameters; layers are named in target_modules."
        )
    if key not in projections_of(experts):
        return f"{name}: experts are adapted at {' and '.join(projections_of(experts))}; leave it out."
    if getattr(experts, "_is_expert_parallel", False) or hasattr(experts, "_hf_tp_plan"):
        return (
            f"{name}: the experts are split over devices, by expert or tensor parallelism. Shard the model with FSDP2 "
            "or DDP instead (accelerate launch)."
        )
    if any("forward" in vars(module) and "_old_forward" not in vars(module) for module in (around, experts)):
        return (
            f"{name}: {kind} or what is around it computes by a function from elsewhere, such as a hub's kernel, "
            "which an adapter would not be seen by. Load the model without (use_kernels=False)."
        )
    weight = getattr(experts, key)
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"{name}: its numbers are packed. Load the model in bfloat16 or float32."
    return None
