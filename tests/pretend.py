"""An accelerator that is not there: a device whose numbers lie in the CPU's memory and must not be mixed with it.

What runs on it can be compared with a CPU to the bit, and it shows what a GPU would: every tensor on the right device,
nothing waited for, nothing sent over that was there already, nothing asked for that the device has no kernel for. torch
lets anybody write a device in Python ("PrivateUse1", torch 2.10 on).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree, backend_registration

from beyondlora.adapters import dropout, fused, products
from beyondlora.precise import has_float64

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices that are written in Python", allow_module_level=True)

NAME = "pretend"
CROSSING = {"copy_", "_to_copy"}  # may lead from one device to another; all else needs its tensors on one
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select"}  # the results say how the program goes on

Watcher = Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]

waits: list[str] = []  # operations for whose results the CPU waited
sent: list[str] = []  # operations that brought numbers from it
_lacking: set[str] = set()
_watchers: list[Watcher] = []
_memory = "cpu"


class Away(Tensor):
    """A tensor on a device that is not there; its numbers are `here`."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        away = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        away.here = here
        return away

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: "Away") -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.here = other.here

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.here.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Away":
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __repr__(self) -> str:
        return f"Away({self.here}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, *args, **(kwargs or {}))


def _run(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation where the numbers are. Its result belongs to the device asked for, or that of what went in."""
    name = function._schema.name.split("::")[1]
    if "linalg" in _lacking and name.lstrip("_").startswith("linalg_") and name != "linalg_vector_norm":
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the {NAME} device.")
    given = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = {id(tensor.here): tensor for tensor in given if isinstance(tensor, Away)}
    devices = {tensor.device for tensor in given if isinstance(tensor, Away) or tensor.dim() > 0}
    if len(devices) > 1 and name not in CROSSING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found them on {devices}")
    target = kwargs.get("device") or next((tensor.device for tensor in away.values()), torch.device("cpu"))
    if name == "copy_":
        target = args[0].device
    target = torch.device(target)
    if name in WAITING or (name in CROSSING and target.type != NAME):
        waits.append(name)
    if name in CROSSING and target.type == NAME and not isinstance(args[1 if name == "copy_" else 0], Away):
        sent.append(name)
    if kwargs.get("device") is not None:
        kwargs["device"] = _memory if target.type == NAME else target
    here_args, here_kwargs = _pytree.tree_map_only(Away, lambda tensor: tensor.here, (args, kwargs))

    def placed(result: Tensor) -> Tensor:
        if id(result) in away:  # in place, or by `out`
            return away[id(result)]
        if target.type != NAME:
            return result
        if "float64" in _lacking and result.dtype == torch.float64:
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype as the framework doesn't support it.")
        return Away(result)

    result = _pytree.tree_map_only(Tensor, placed, function(*here_args, **here_kwargs))
    for watcher in _watchers:
        watcher(name, args, kwargs, result)
    return result


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
    def is_available(self) -> bool:
        return False  # nobody is to choose it unasked

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, index: int) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, index: int) -> None:
        torch.set_rng_state(state)

    def is_available(self) -> bool:
        return False

    def synchronize(self) -> None:
        waits.append("synchronize")

    def get_device_name(self) -> str:
        return NAME

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 1  # nobody counts


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())
_library = torch.library.Library("_", "IMPL")
_library.fallback(_run, "PrivateUse1")
_kernels = torch.library.Library("aten", "IMPL")
# eye's own resizes a tensor that it has at hand; SiLU's gradient is one kernel on every device that counts.
for _own in (torch.ops.aten.eye.default, torch.ops.aten.eye.m, torch.ops.aten.silu_backward.default):
    _kernels.impl(_own, functools.partial(_run, _own), "PrivateUse1")


def _in_lower_precision(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What autocast does to products."""
    without = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1))
    with without:
        dtype = torch.get_autocast_dtype(NAME)
        lower = lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float32 else tensor  # noqa: E731
        return function(*_pytree.tree_map_only(Tensor, lower, args), **kwargs)


_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _product in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm"):
    _function = getattr(torch.ops.aten, _product).default
    _kernels.impl(_function, functools.partial(_in_lower_precision, _function), "AutocastPrivateUse1")
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device) goes through the CPU, and not below our dispatch


@contextmanager
def standing_for(kind: str, *, numbers: bool = True) -> Iterator[None]:
    """Within it the device is like a maker's: "cuda", or "mps", without float64, factorisations and one-kernel dropout.

    beyondlora takes its tensors for plain ones. Without `numbers` there is nothing behind them but shapes.
    """
    global _memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_plain", lambda x: type(x) in (Tensor, torch.nn.Parameter, Away))
        for module in (products, dropout):
            patch.setattr(module, "DROPPING", {NAME} if kind == "cuda" else set())
        _lacking.update({"cuda": (), "mps": ("float64", "linalg")}[kind])
        _memory = "cpu" if numbers else "meta"
        has_float64.cache_clear()
        try:
            yield
        finally:
            _lacking.clear()
            _memory = "cpu"
            has_float64.cache_clear()


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it `watcher` is called after every operation on the device: with its name, arguments and result."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
