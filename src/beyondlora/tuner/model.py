"""AdapterModel: puts adapters beside the layers of a base model, for every method."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from ..manifold.guard import check_manifold, check_state, unwrapped
from .base_layers import CONVOLUTIONS, bare, matrix_shape, reading_of
from .checks import (
    check_modules_to_save,
    joined,
    leave_out_idle,
    refuse_no_parameter,
    refuse_unmatched,
    target_problem,
    warn_of_experts,
)
from .combine import check_combination, combine, combined_config
from .config import AdapterConfig, LayerSpec
from .experts import (
    ExpertLinear,
    OpenExperts,
    close_experts,
    expert_shape,
    layer_names,
    match,
    open_experts,
    opened_targets,
    parameter_problem,
    targets_of,
)
from .layer import AdapterLayer
from .mixed_batch import check_names, handing_out
from .packing import keep_unpacked, refuse_packed


class AdapterModel(BaseTuner):
    """A base model with adapters of one method.

    A method subclasses it with its `prefix` and `tuner_layer_cls`, nothing else.
    """

    prefix: str = ""
    tuner_layer_cls: type[AdapterLayer] = AdapterLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target before the first one is replaced: a refused config leaves the model as it was."""
        check_modules_to_save(peft_config, model)
        warn_of_experts(peft_config, model)
        all_linear = _include_all_linear(peft_config, model)
        targets = self._targets(peft_config, model)
        if all_linear:
            targets = leave_out_idle(targets, peft_config, model)
        parameters = targets_of(peft_config, model)
        if peft_config.target_parameters and not parameters:
            refuse_no_parameter(peft_config, model)
        if not targets and not parameters and isinstance(peft_config.target_modules, (set, list)):
            refuse_unmatched(peft_config, model)
        found = [
            target_problem(name, module, model) or self._unbuildable(peft_config, name, *matrix_shape(bare(module)))
            for name, module in targets.items()
        ]
        for name, experts in parameters.items():
            found.append(parameter_problem(name, model))
            if found[-1] is None:
                shape = expert_shape(experts, name.rpartition(".")[2])
                found += [self._unbuildable(peft_config, layer, *shape) for layer in layer_names(name, experts)]
        problems = [problem for problem in found if problem]
        if problems:
            raise ValueError(joined(problems))
        for module in () if peft_config.inference_mode else model.modules():
            refuse_packed(module, "no gradient passes through it, so nothing before it would learn")
        keep_unpacked(model)
        for experts in parameters.values():
            open_experts(experts)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """PEFT's, on a list of ours: it edits modules_to_save, and what it notes is of this model alone."""
        peft_config.modules_to_tie = None
        if peft_config.modules_to_save is not None:
            peft_config.modules_to_save = list(peft_config.modules_to_save)
        with warnings.catch_warnings():
            if peft_config.ensure_weight_tying and peft_config.trainable_token_indices is not None:
                # It looks for tied modules before it comes to the tokens, which it does tie.
                warnings.filterwarnings("ignore", message=".*no tied modules are added in either")
            super()._check_tied_modules(model, peft_config)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)  # type: ignore[arg-type]

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying=True, and target_modules={peft_config.target_modules!r} name the embeddings, which "
            f"this model ties to {', '.join(tied_weight_keys)}: adapters are not tied here (a nonlinear one has no "
            "transpose). Train the table in full, tied (modules_to_save=['embed_tokens'] instead of target_modules), "
            "or some of its rows (trainable_token_indices), or leave ensure_weight_tying out."
        )

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """PEFT's: an architecture's default targets. One that has none may be meant by its experts alone."""
        unknown = model_config["model_type"] not in self.target_module_mapping
        if peft_config.target_modules is None and peft_config.target_parameters and unknown:
            peft_config.target_modules = set()
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        """PEFT's rule; experts are meant by `target_parameters` alone."""
        answer = match(peft_config, key, self.model)
        return super()._check_target_module_exists(peft_config, key) if answer is None else answer

    def _inject_parameters(self, peft_config: Any, model: nn.Module, *_: Any, **__: Any) -> list[str]:
        """The parameters that are meant; their layers have been given adapters as all layers are."""
        names = opened_targets(peft_config, model)
        self.targeted_parameter_names = list(dict.fromkeys([*self.targeted_parameter_names, *names]))  # for peft 0.20
        return names

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> Any:  # type: ignore[override]
        if merge:
            self._check_mergeable(options.get("adapter_names"))
        base: Any = super()._unload_and_optionally_merge(merge, **options)
        close_experts(base)
        return base

    def _targets(self, peft_config: AdapterConfig, model: nn.Module) -> dict[str, nn.Module]:
        tuner_layers = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        return {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(tuner_layers) and self._check_target_module_exists(peft_config, name)
        }

    def _unbuildable(self, config: AdapterConfig, name: str, out_features: int, in_features: int) -> str | None:
        rank = _pattern_value(config.rank_pattern, name, config.r)
        problem = config.layer_problem(rank, out_features, in_features)
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
            reading=reading_of(layer.get_base_layer()),
        )
        layer.add(adapter_name, peft_config.make_adapter(spec), inference_mode=peft_config.inference_mode)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own version also hands over weights and moves devices. Our layer holds the child itself, and has moved
        # its adapter; and a weight cannot be handed over where the child is a wrapper that computes it.
        setattr(parent, child_name, new_module)

    def _hidden_size(self) -> int | None:
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        return getattr(config, "hidden_size", None)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add a new adapter that is the weighted sum of others, exactly; refused where the core is nonlinear.

        Args:
            adapters: names of adapters on this model.
            weights: a factor for each.
            adapter_name: of the new adapter, whose rank is the sum of theirs (at most the layer's smaller side).
            combination_type: "cat"; PEFT's others are approximations of LoRA's.

        Raises: ValueError, with the model as it was.
        """
        if combination_type != "cat":
            raise ValueError(f"combination_type={combination_type!r} is not offered; 'cat' is exact.")
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, AdapterLayer)}
        check_combination(layers, self.peft_config, adapters, weights, adapter_name)
        first = self.peft_config[adapters[0]]
        names = [name for name, _ in self.model.named_modules() if name]
        self.peft_config[adapter_name] = dataclasses.replace(first, **combined_config(layers, adapters, names))
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            if adapter_name in layer.adapters:
                combine(layer, adapters, weights, adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's; layers that share a base weight (tied embeddings) go back to what it was before all their merges."""
        self._check_mergeable(adapter_names)
        kept = _weights_before_merge(self.model)
        try:
            super().merge_adapter(adapter_names, safe_merge)
        finally:
            kept = _weights_before_merge(self.model) | kept
            for layer, weight in _merged_into(self.model):
                layer._weight_before_merge = kept[weight]

    def _check_mergeable(self, names: list[str] | None) -> None:
        """Refuse before the first layer is touched if an adapter is no weight update; None = the active ones."""
        for module in self.model.modules():
            if isinstance(module, AdapterLayer):
                module.check_mergeable(module.active_adapters if names is None else names)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_manifold(self.model)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any], *others: Any, **more: Any
    ) -> dict[str, Any]:
        """PEFT's choice of what is saved, once it has been seen to be on the manifold."""
        check_state(model, state_dict)
        chosen = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *others, **more)
        # peft 0.21 looks for the names that modules have inside FSDP1's wrappers. A state dict does not show those.
        ours = {
            f"{unwrapped(name)}.{part}"
            for name, module in model.named_modules()
            if isinstance(module, AdapterLayer) and unwrapped(name) != name
            for part in module.adapter_layer_names
        }
        return chosen | {key: value for key, value in state_dict.items() if key.rsplit(".", 2)[0] in ours}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first; adapters are "
                "trained one at a time, see model.set_adapter."
            )
        layers = [module for module in self.modules() if isinstance(module, AdapterLayer)]
        check_names(names, {name for layer in layers for name in layer.adapters})
        acting: list[nn.Module] = [module for module in self.modules() if isinstance(module, OpenExperts)]
        acting += [layer for layer in layers if not isinstance(layer.get_base_layer(), ExpertLinear)]
        with handing_out(self, names, layers=acting, beams=kwargs.get("num_beams") or 1):
            yield


def _merged_into(model: nn.Module) -> list[tuple[AdapterLayer, Tensor]]:
    """Layers with something merged into a base weight of their own, and the weight."""
    merged = [module for module in model.modules() if isinstance(module, AdapterLayer) and module.merged]
    weights = [layer.get_base_layer()._parameters.get("weight") for layer in merged]
    return [(layer, weight) for layer, weight in zip(merged, weights, strict=True) if weight is not None]


def _weights_before_merge(model: nn.Module) -> dict[Tensor, Any]:
    """Of each weight what the first of its layers has kept."""
    return {weight: layer._weight_before_merge for layer, weight in reversed(_merged_into(model))}


def _include_all_linear(config: Any, model: nn.Module) -> bool:
    """PEFT's "all-linear", without what is trained whole, and embeddings and convolutions with an adapter already.

    Returns: whether it was asked for.
    """
    before = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules == before:
        return False
    others = (nn.Embedding, ExpertLinear, *CONVOLUTIONS)
    config.target_modules = {
        name
        for name in config.target_modules
        if not isinstance(bare(model.get_submodule(name)), others)
        and not name.endswith(tuple(config.modules_to_save or ()))  # as PEFT finds those
    }
    return True


def _pattern_value(pattern: dict[str, Any], name: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(list(pattern), name), default)
