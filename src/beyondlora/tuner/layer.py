"""AdapterLayer: a layer of the base model with adapters beside it, for every method.

The maths is in the adapter (`beyondlora.adapters`); here is what PEFT asks of a layer: weights in a ModuleDict a
letter (`<prefix><letter>.<adapter name>.weight`), merging, switching, devices and dtypes.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter
from ..adapters.brief import call, is_brief, is_recorded
from ..adapters.fused import has_hooks
from .base_layers import as_matrix, as_weight, matrix_shape
from .experts import ExpertLinear, execution_device
from .mixed_batch import check_rows, rows_by_adapter
from .packing import refuse_packed


class AdapterLayer(nn.Module, BaseTunerLayer):
    """base_layer(x) + Σ adapter(x) over the active adapters.

    A method subclasses it with its `prefix` and the `letters` of its weights, nothing else.

    Args:
        base_layer: a layer that `tuner/base_layers.py` lists (or PEFT layers around one).
        get_apply_tensor_subclass: what torchao layers need to be written back, passed on to PEFT's backend.
    """

    prefix: ClassVar[str] = ""
    letters: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = tuple(cls.prefix + letter for letter in cls.letters)
        cls.other_param_names = ("adapters", "_called", f"{cls.prefix}dropout")

    def __init__(self, base_layer: nn.Module, *, get_apply_tensor_subclass: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int
        self.out_features: int
        self.out_features, self.in_features = matrix_shape(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # A plain dict on purpose: the adapters' weights are registered below, under the names PEFT and others expect.
        self.adapters: dict[str, Adapter] = {}
        self._called: dict[str, dict[str, nn.Module]] = {}  # the parts that an adapter calls: its name → letter → part
        for name in (*self.adapter_layer_names, f"{self.prefix}dropout"):
            setattr(self, name, nn.ModuleDict())
        self._weight_before_merge: Tensor | None = None

    def add(self, name: str, adapter: Adapter, *, inference_mode: bool = False) -> None:
        """Put an adapter beside the base layer under a name (PEFT: `update_layer`)."""
        called = {self.prefix + letter: part for letter, part in adapter.train(self.training).parts().items()}
        for key, part in called.items():
            getattr(self, key)[name] = part  # first: torch may refuse the name
        getattr(self, f"{self.prefix}dropout")[name] = adapter.dropout
        self.adapters[name], self._called[name] = adapter, called
        self._move_adapter_to_device_of_base_layer(name, execution_device(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def get_base_weight(self) -> Tensor:
        """The base layer's weight, dequantised where need be."""
        refuse_packed(self.get_base_layer())
        weight: Tensor = super().get_base_weight()
        return weight

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put other numbers in the place of the base layer's weight."""
        base = self.get_base_layer()
        if isinstance(base, ExpertLinear):
            base.write(weight_data)
        else:
            super().set_base_weight(weight_data)

    def weight_matrix(self) -> Tensor:
        """The base weight W0 as (out, in), dequantised where need be."""
        return as_matrix(self.get_base_weight(), self.get_base_layer())

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output with every active adapter's branch added, in the base output's dtype.

        Args:
            adapter_names: of each row the one adapter to add, or "__base__"; default: the active ones to all rows.
        """
        if adapter_names is not None:
            check_rows(x, adapter_names, merged=self.merged)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._add_by_row(self._base(x, args, kwargs), x, adapter_names)
        active = self._active()
        result = None if args or kwargs else self._base_and_first(active, x)
        if result is None:
            result = self._base(x, args, kwargs)
        else:
            active = active[1:]
        if not active:
            return result
        dtype, ours = result.dtype, not is_brief(result) and self._gives_its_output_away()
        for adapter in active:
            result = self._add(adapter, result, x, overwrite=ours)
        return result if result.dtype == dtype else result.to(dtype)

    @torch.inference_mode(False)  # tensors made in it could not be trained beside
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weight updates to the base weight.

        Args:
            safe_merge: refuse, and leave the weight as it was, if the result is not finite.
            adapter_names: which adapters; default: the active ones.

        Raises: ValueError where an adapter is no weight update, before anything is changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        for warning in filter(None, (self.adapters[name].merge_warning for name in names)):
            warnings.warn(warning, stacklevel=2)
        original = self.get_base_weight()
        if original.is_meta and not all(self.adapters[name].down.weight.is_meta for name in names):
            raise ValueError(
                "The base layer's weight has been offloaded, by accelerate for example, and nothing can be added to it "
                "there. Load the model on a device (device_map), and merge there."
            )
        merged = original.to(torch.promote_types(original.dtype, torch.float32))
        for name in names:
            merged = merged + self.get_delta_weight(name).to(merged)
        merged = merged.to(original.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(_broken(names))
        if self._weight_before_merge is None:
            self._weight_before_merge = original.detach().to("cpu", copy=True)
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def check_mergeable(self, names: list[str]) -> None:
        """Raise a ValueError if one of these is no weight update or not finite, or the base cannot be written."""
        backend = self.quantization_backend
        for name in filter(self.adapters.__contains__, names):
            adapter = self.adapters[name]
            if adapter.merge_refusal:
                raise ValueError(adapter.merge_refusal)
            weights: list[Any] = [part.weight for part in adapter.parts().values()]
            if not all(weight.is_meta or torch.isfinite(weight).all() for weight in weights):
                raise ValueError(_broken([name]))
            if backend is not None and not backend.supports_merge:
                raise ValueError(
                    f"Cannot merge into a {type(self.get_base_layer()).__name__}: PEFT cannot write these weights "
                    "back. Keep the adapter attached, or export it (beyondlora export ADAPTER --to lora)."
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit where it is not quantised."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self._weight_before_merge.to(self.get_base_weight()))  # the model may have been cast since
        self._weight_before_merge = None
        self.merged_adapters.clear()

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight update of an adapter, scaling included, in the base weight's orientation.

        Raises: ValueError where the adapter is no weight update.
        """
        return as_weight(self.adapters[adapter].delta_weight(), self.get_base_layer())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is exactly a linear layer's weight update, which PEFT's `convert_to_lora` factorises."""
        adapter = self.adapters[adapter_name]
        if isinstance(self.get_base_layer(), ExpertLinear):
            return False  # PEFT's LoRA has another form beside experts
        return adapter.reading is None and not (adapter.merge_refusal or adapter.merge_warning)

    def _base(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The base layer's output, whatever it is asked."""
        if args or kwargs or torch.is_grad_enabled() or is_recorded():
            result: Tensor = self.base_layer(x, *args, **kwargs)
        else:
            result = call(self.base_layer, x)
        backend = self.quantization_backend
        return result if backend is None else backend.maybe_clone_base_result(result)

    def _base_and_first(self, active: list[Adapter], x: Tensor) -> Tensor | None:
        """The base layer's output with the first adapter's branch in it, where both can be computed together."""
        if not active or self.quantization_backend is not None:
            return None
        if not self.cast_input_dtype_enabled and x.dtype != active[0].dtype:
            return None  # the caller wants no dtype but x's
        return active[0].beside(self.base_layer, x)

    def _gives_its_output_away(self) -> bool:
        # A linear layer keeps nothing of what it returns; of any other module or with a hook there is no saying.
        return type(self.base_layer).forward in (nn.Linear.forward, Conv1D.forward) and not has_hooks(self.base_layer)

    def _active(self) -> list[Adapter]:
        return [self._adapter(name) for name in self.active_adapters if name in self.adapters]

    def _adapter(self, name: str) -> Adapter:
        """The adapter, with what is registered in place of its parts by now: FSDP1 wraps them one by one."""
        modules: Any = self._modules
        for key, part in self._called[name].items():
            present = modules[key]._modules[name]
            if present is not part:
                self.adapters[name].replace(part, present)
                self._called[name][key] = present
        return self.adapters[name]

    def _replicate_for_data_parallel(self) -> Any:
        """A copy for one device of `nn.DataParallel`, which replaces what is registered; the rest is copied here."""
        replica: Any = super()._replicate_for_data_parallel()
        replica._called = {name: dict(parts) for name, parts in self._called.items()}
        replica.adapters = {
            name: _replica(adapter, set(self._called[name].values())) for name, adapter in self.adapters.items()
        }
        return replica

    def _add(self, adapter: Adapter, result: Tensor, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """The adapter's branch added, perhaps in the result's memory."""
        if x.is_floating_point():  # and not an embedding's indices
            x = self._cast_input_dtype(x, adapter.dtype)
        if adapter.reading is None:
            return adapter.add_to(result, x, overwrite=overwrite)
        branch = adapter(x)
        scale = self._get_embed_scale()  # of embeddings that scale what they have looked up
        return result + (branch if scale is None else branch * scale.to(branch.dtype))

    def _add_by_row(self, result: Tensor, x: Tensor, names: list[str]) -> Tensor:
        for name, rows in rows_by_adapter(names).items():
            if name in self.adapters:
                index = torch.tensor(rows, device=result.device)
                mine = self._add(self._adapter(name), result.index_select(0, index), x.index_select(0, index))
                result.index_copy_(0, index, mine.to(result.dtype))
        return result

    def extra_repr(self) -> str:
        """The quantisation backend, if any."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return self.prefix.removesuffix("_") + "." + super().__repr__()


def _replica(module: nn.Module, registered: set[nn.Module]) -> Any:
    replica: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        if child is not None and child not in registered:
            replica._modules[name] = _replica(child, registered)
    return replica


def _broken(names: list[str]) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken; the base weight is "
        "as it was."
    )
