"""The same branch in fewer passes over memory: y + s · up(h) in one multiplication, input dropout without a copy of x.

LoRA's price is not its arithmetic (2·T·R·(M+N) beside 2·T·M·N) but its traffic: up(h), s · up(h) and the sum are three
arrays of the size of the output, dropout two of the size of the input, the gradients of x that base layer and branch
make two more; beside a bfloat16 layer, all of them in float32. Nothing here changes what is computed:
`Adapter.forward` is the definition, and the tests hold the two together.

Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from ..manifold.linear import StiefelLinear
from .dropout import Drawn, draw
from .products import add_product_, flat, masked, narrow, read_twice, up_gradient, weight_gradient, widen_

LINEAR = (nn.Linear.forward, StiefelLinear.forward)
Hidden = Callable[..., Tensor]  # of z (T, R) and other tensors: what the up-projection sees, (T, R)


def base_and_down(x_TN: Tensor, base: nn.Module, down: nn.Module, dropout: nn.Module) -> tuple[Tensor, Tensor] | None:
    """base(x) and down(dropout(x)) at once, so that x gets one gradient and not two to be added.

    Args:
        x_TN: the layer's input.
        base: the frozen layer.
        down: the down-projection; float32 beside a bfloat16 layer is fine.
        dropout: on the down-projection's input.

    Returns: (T, M) in the base layer's dtype and (T, R) in the down-projection's; None where they must be called one by
        one: another kind of layer, one that trains, a hook, a compiler, no gradients.
    """
    if not (torch.is_grad_enabled() and is_eager() and is_frozen_linear(base) and is_plain_linear(down)):
        return None
    if not (is_dropping(dropout) or is_nothing(dropout)):
        return None
    biases: list[Tensor] = [] if base.bias is None else [base.bias]
    x_TN, W_MN, A_RN, *biases = as_autocast(x_TN, x_TN, base.weight, down.weight, *biases)
    if x_TN.dtype != W_MN.dtype or not widens(x_TN.dtype, A_RN.dtype):
        return None
    return BaseAndDown.apply(x_TN, W_MN, biases[0] if biases else None, A_RN, *drawn(dropout, x_TN))


def dropped_linear(x_TN: Tensor, down: nn.Module, dropout: nn.Module) -> Tensor:
    """down(dropout(x)); with dropout it keeps x, which is there anyway, and a byte an entry instead of two arrays."""
    if not (is_plain_linear(down) and is_eager()):
        return down(dropout(x_TN))
    cast_TN, A_RN = as_autocast(x_TN, x_TN, down.weight)
    if cast_TN.dtype != A_RN.dtype:
        return down(dropout(x_TN))
    drop = drawn(dropout, cast_TN)
    if drop.mask is None and type(dropout) is not nn.Identity:
        cast_TN = dropout(cast_TN)
    if torch.is_grad_enabled():
        return Down.apply(cast_TN, A_RN, *drop)
    return dropped_and_narrow(cast_TN, A_RN, drop)


def keeps_input_alone(y_TM: Tensor, z_TR: Tensor, up: nn.Module) -> bool:
    """Whether `AddHidden` can write y + s · up(hidden(z)) over y: gradients are wanted, and nobody can notice."""
    if not (torch.is_grad_enabled() and is_eager() and is_plain_linear(up) and may_overwrite(y_TM)):
        return False
    return z_TR.dtype == up.weight.dtype and widens(y_TM.dtype, z_TR.dtype)


def add_up(y_TM: Tensor, h_TR: Tensor, up: nn.Module, scaling: float, *, overwrite: bool = False) -> Tensor:
    """y + s · up(h), written over y where the caller gives y away and nobody can notice.

    Args:
        y_TM: what is added to.
        h_TR: the input of the up-projection.
        up: any module; `nn.Linear` and `StiefelLinear` without bias and hooks have the fast form.
        scaling: s.
        overwrite: y was made for the caller and nobody else holds it.

    Returns: a tensor of y's shape: y itself or its memory, and so its dtype, if overwritten; otherwise, where dtypes
        differ, what `+` makes of them.
    """
    if not is_plain_linear(up):
        return y_TM + up(h_TR) * scaling
    h_TR, W_MR = as_autocast(y_TM, h_TR, up.weight)
    if h_TR.dtype != W_MR.dtype or not widens(y_TM.dtype, W_MR.dtype):
        return y_TM + up(h_TR) * scaling
    if overwrite and is_eager() and may_overwrite(y_TM):
        if torch.is_grad_enabled():
            return AddProduct.apply(y_TM, h_TR, W_MR, scaling)
        return add_product_(y_TM, h_TR, W_MR, scaling)
    if y_TM.dtype != W_MR.dtype:
        return torch.add(y_TM, up(h_TR), alpha=scaling)
    return torch.addmm(flat(y_TM), flat(h_TR), W_MR.mT, alpha=scaling).view(y_TM.shape)


class BaseAndDown(torch.autograd.Function):
    """x W0ᵀ + b and (x ∘ mask) Aᵀ / share. Saves x, the weights and the mask; x's gradient is one array."""

    @staticmethod
    def forward(
        ctx: Any, x_TN: Tensor, W_MN: Tensor, b_M: Tensor | None, A_RN: Tensor, *dropped: Any
    ) -> tuple[Tensor, Tensor]:
        """Two products."""
        drop = Drawn(*dropped)
        ctx.save_for_backward(x_TN, W_MN, A_RN, drop.mask)
        ctx.share = drop.share
        return F.linear(x_TN, W_MN, b_M), dropped_and_narrow(x_TN, A_RN, drop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The base layer's part of x's gradient is added to the branch's."""
        x_TN, W_MN, A_RN, mask = ctx.saved_tensors
        g_TM, g_TR = gradients[0], over(ctx.share, gradients[1])
        dx_TN = input_gradient(x_TN, g_TR, A_RN, mask, base=(g_TM, W_MN)) if ctx.needs_input_grad[0] else None
        dA_RN = weight_gradient(g_TR, x_TN, mask) if ctx.needs_input_grad[3] else None
        return dx_TN, None, None, dA_RN, None, None, None


class Down(torch.autograd.Function):
    """(x ∘ mask) Aᵀ / share by itself, whose gradient of x autograd can add the base layer's to in place."""

    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, A_RN: Tensor, *dropped: Any) -> Tensor:
        """One product."""
        drop = Drawn(*dropped)
        ctx.save_for_backward(x_TN, A_RN, drop.mask)
        ctx.share = drop.share
        return dropped_and_narrow(x_TN, A_RN, drop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """`F.linear` would return the gradient of x as a view, and a view is never added to in place."""
        x_TN, A_RN, mask = ctx.saved_tensors
        g_TR = over(ctx.share, gradients[0])
        dx_TN = input_gradient(x_TN, g_TR, A_RN, mask) if ctx.needs_input_grad[0] else None
        dA_RN = weight_gradient(g_TR, x_TN, mask) if ctx.needs_input_grad[1] else None
        return dx_TN, dA_RN, None, None, None


class AddProduct(torch.autograd.Function):
    """y + s · h Wᵀ in y's memory. Saves h and W, both R wide."""

    @staticmethod
    def forward(ctx: Any, y_TM: Tensor, h_TR: Tensor, W_MR: Tensor, scaling: float) -> Tensor:
        """One in-place product."""
        ctx.save_for_backward(h_TR, W_MR)
        ctx.scaling = scaling
        # The alias has y's memory and version counter (a y that somebody saved is still noticed) and is no view to
        # autograd: an in-place change of a view, which F.linear returns, would cost a copy of the gradient.
        return add_product_(y_TM.detach(), h_TR, W_MR, scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of y is that of the output, untouched; s is applied where it is R wide."""
        h_TR, W_MR = ctx.saved_tensors
        g_TM, dh_TR, dW_MR = read_twice(gradients[0], W_MR), None, None
        if ctx.needs_input_grad[1]:
            dh_TR = times(ctx.scaling, narrow(g_TM, W_MR.mT))
        if ctx.needs_input_grad[2]:
            dW_MR = times(ctx.scaling, up_gradient(h_TR, g_TM))
        return gradients[0], dh_TR, dW_MR, None


class AddHidden(torch.autograd.Function):
    """y + s · hidden(z, *extra) Wᵀ in y's memory, for a `hidden` that is cheap and draws nothing. Saves z, W and extra.

    hidden(z) itself is made again for the gradient: where R is large, what is R wide and kept is what an adapter costs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_TM: Tensor,
        z_TR: Tensor,
        W_MR: Tensor,
        scaling: float,
        hidden: Hidden,
        *extra: Tensor,
    ) -> Tensor:
        """See `AddProduct`."""
        ctx.save_for_backward(z_TR, W_MR, *extra)
        ctx.scaling, ctx.hidden = scaling, hidden
        return add_product_(y_TM.detach(), hidden(z_TR, *extra), W_MR, scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """hidden(z) once more, and its gradient by autograd, in the graph of a second derivative if there is one."""
        z_TR, W_MR, *extra = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        _, needs_z, needs_W, _, _, *needs_extra = ctx.needs_input_grad
        needs = needs_z, *needs_extra
        inputs = z_TR, *extra
        if not twice:
            inputs = tuple(x.detach().requires_grad_(needed) for x, needed in zip(inputs, needs, strict=True))
        with torch.enable_grad():
            h_TR = ctx.hidden(*inputs)
        g_TM = read_twice(gradients[0], W_MR)
        dW_MR = times(ctx.scaling, up_gradient(h_TR, g_TM)) if needs_W else None
        wanted, found = [i for i, needed in enumerate(needs) if needed], dict[int, Tensor]()
        if wanted:
            dh_TR = times(ctx.scaling, narrow(g_TM, W_MR.mT))
            made = torch.autograd.grad(h_TR, [inputs[i] for i in wanted], dh_TR, create_graph=twice)
            found = dict(zip(wanted, made, strict=True))
        dz_TR, *d_extra = map(found.get, range(len(needs)))
        return gradients[0], dz_TR, dW_MR, None, None, *d_extra


def over(share: float, x_TR: Tensor) -> Tensor:
    """x / share, and x itself for 1."""
    return x_TR if share == 1 else x_TR / share


def times(scaling: float, x_TR: Tensor) -> Tensor:
    """s · x, and x itself for 1."""
    return x_TR if scaling == 1 else x_TR * scaling


def as_autocast(like: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as autocast would cast them; themselves without autocast."""
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in operands)


def input_gradient(
    x_TN: Tensor, g_TR: Tensor, A_RN: Tensor, mask: Tensor | None, base: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(g A) ∘ mask, and beside a base layer (its output's gradient and W0) their product too: one array like x."""
    if torch.is_grad_enabled():
        dx_TN = masked(g_TR @ A_RN, mask).to(x_TN.dtype)
        return dx_TN if base is None else base[0] @ base[1] + dx_TN
    dx_TN = x_TN.new_empty(x_TN.shape)  # `g @ W` may give a view, which autograd never adds to in place
    widen_(dx_TN, g_TR, A_RN, mask)
    if base is not None:  # last: the large product adds in float32 to what is there, whatever it is rounded to then
        flat(dx_TN).addmm_(flat(base[0]), base[1])
    return dx_TN


def drawn(dropout: nn.Module, x_TN: Tensor) -> Drawn:
    """What dropout does to x this time."""
    return draw(x_TN, dropout.p) if is_dropping(dropout) else Drawn()


def dropped_and_narrow(x_TN: Tensor, A_RN: Tensor, drop: Drawn) -> Tensor:
    """(x ∘ mask) Aᵀ / share."""
    if drop.rest is not None:
        return narrow(drop.rest, A_RN)
    return over(drop.share, narrow(x_TN, A_RN, drop.mask))


def widens(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether a sum of both dtypes is computed in the second."""
    return torch.promote_types(dtype, to) == to


def is_frozen_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that does not train and that nobody watches, with plain tensors for weights."""
    if type(module).forward is not nn.Linear.forward or has_hooks(module):
        return False
    # Not `parameters()`: while FSDP1 computes, a weight is a view beside them, of something that may be training.
    weights: tuple[Any, ...] = (module.weight, module.bias)
    return all(weight is None or (is_plain(weight) and not weight.requires_grad) for weight in weights)


def is_nothing(module: nn.Module) -> bool:
    """Dropout that drops nothing."""
    idle = type(module) is nn.Dropout and (not module.training or module.p == 0)
    return (idle or type(module) is nn.Identity) and not has_hooks(module)


def is_dropping(module: nn.Module) -> TypeGuard[nn.Dropout]:
    """Dropout at work, with something dropped and something left."""
    return type(module) is nn.Dropout and module.training and 0 < module.p < 1 and not has_hooks(module)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """x Wᵀ and nothing else: no bias, no hook that would see the module called (FSDP's, a profiler's, a user's)."""
    return type(module).forward in LINEAR and module.bias is None and not has_hooks(module)


def is_plain(x: Tensor) -> bool:
    """A tensor of torch's own and no subclass, which may be quantised, in shards, or anything."""
    return type(x) in (Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody would notice that the module is not called, or holds what it returned."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    replaced = "forward" in vars(module)  # accelerate's way to move weights in and out
    return any(own) or replaced or torch_module._has_any_global_hook()


def is_eager() -> bool:
    """Plain eager execution: no compiler (which fuses by itself), tracer, function transform or forward-mode AD."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    transformed = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and torch._C._len_torch_dispatch_stack() == 0


def may_overwrite(y_TM: Tensor) -> bool:
    """A plain dense tensor that autograd lets anybody overwrite."""
    ordinary = is_plain(y_TM) and y_TM.layout is torch.strided and y_TM.is_contiguous()
    return ordinary and not (y_TM.is_leaf and y_TM.requires_grad)
