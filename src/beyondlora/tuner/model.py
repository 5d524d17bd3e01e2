"""AdapterModel: puts adapters beside the layers of a base model, for every method."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..manifold.guard import check_manifold
from .config import AdapterConfig, LayerSpec
from .layer import AdapterLayer


class AdapterModel(BaseTuner):
    """A base model with adapters of one method.

    A method subclasses it with its `prefix` and `tuner_layer_cls`, nothing else.
    """

    prefix: str = ""
    tuner_layer_cls: type[AdapterLayer] = AdapterLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.copy()

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target before the first one is replaced: a refused config leaves the model as it was."""
        _maybe_include_all_linear_layers(peft_config, model)
        targets = self._targets(peft_config, model)
        if not targets and isinstance(peft_config.target_modules, (set, list)):
            _refuse_unmatched(sorted(peft_config.target_modules), model)
        problems = [
            problem
            for name, module in targets.items()
            if (problem := _unsupported(name, module, model) or self._unbuildable(peft_config, name, module))
        ]
        if problems:
            raise ValueError(_joined(problems))

    def _targets(self, peft_config: AdapterConfig, model: nn.Module) -> dict[str, nn.Module]:
        tuner_layers = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(tuner_layers) and self._check_target_module_exists(peft_config, name)
        }

    def _unbuildable(self, config: AdapterConfig, name: str, module: nn.Module) -> str | None:
        in_features, out_features = _get_in_out_features(_base(module))
        rank = _pattern_value(config.rank_pattern, name, config.r)
        problem = config.layer_problem(rank, int(out_features or 0), int(in_features or 0))
        return problem and f"{name}: {problem}"

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        if isinstance(target, AdapterLayer):
            layer = target
        else:
            layer = self.tuner_layer_cls(target, **get_quantization_kwargs(self.model))
            layer._active_adapter = adapter_name
        rank = _pattern_value(peft_config.rank_pattern, current_key, peft_config.r)
        alpha = _pattern_value(peft_config.alpha_pattern, current_key, peft_config.lora_alpha)
        spec = LayerSpec(
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=rank,
            scaling=peft_config.scaling_for(rank, alpha),
            hidden_size=self._hidden_size(),
            base_weight=layer.weight_matrix,
        )
        layer.add(adapter_name, peft_config.make_adapter(spec), inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _hidden_size(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return getattr(config, "hidden_size", None)

    def _check_merge_allowed(self) -> None:
        """Refuse before the first layer is touched if any active adapter is no weight update."""
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                module.check_mergeable(module.active_adapters)
        check_manifold(self.model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: batches that mix several adapters are not supported yet. Group the rows by adapter, "
                "and call model.set_adapter(name) before each group."
            )
        yield


def _pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_supported(module: nn.Module) -> bool:
    base = _base(module)
    return isinstance(base, (nn.Linear, Conv1D)) or resolve_quantization_backend(base) is not None


def _unsupported(name: str, module: nn.Module, model: nn.Module) -> str | None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return (
            f"{name}: nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would be "
            "without effect; leave it out of target_modules."
        )
    if not _is_supported(module):
        return (
            f"{name} is a {type(module).__name__}; adapters go beside nn.Linear and transformers' Conv1D. Leave it out "
            "of target_modules, or train it in full with modules_to_save."
        )
    return None


def _refuse_unmatched(targets: list[str], model: nn.Module) -> None:
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if name and _is_supported(module)}
    near = {match for target in targets for match in difflib.get_close_matches(target.rpartition(".")[2], leaves)}
    hint = f"Did you mean {sorted(near)}?" if near else f"Layers that can be adapted: {sorted(leaves)}."
    raise ValueError(f"Target modules {targets} not found in the base model {type(model).__name__}. {hint}")


def _joined(problems: list[str], limit: int = 5) -> str:
    more = f"\n  … and {len(problems) - limit} more." if len(problems) > limit else ""
    return "These layers cannot be adapted as asked:\n  " + "\n  ".join(problems[:limit]) + more
