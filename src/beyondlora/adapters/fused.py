"""The same branch in fewer passes over memory: y + s · up(h) in one multiplication, input dropout without a copy of x.

LoRA's price is not its arithmetic (2·T·R·(M+N) beside 2·T·M·N) but its traffic: up(h), s · up(h) and the sum are three
arrays of the size of the output, dropout two of the size of the input, the gradients of x that base layer and branch
make two more; beside a bfloat16 layer, all of them in float32. Beside a frozen linear layer one function does it all,
`Beside`; elsewhere `Down` begins and `AddProduct` ends, with the core between them. Nothing here changes what is
computed: `Adapter.forward` is the definition, and the tests hold the two together.

Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..manifold.linear import StiefelLinear
from .brief import bias_of, is_recorded, is_watched, weight_of
from .dropout import Drawn, draw
from .products import add_product_, flat, masked, narrow, read_twice, up_gradient, weight_gradient, widen_, written_out

LINEAR = (nn.Linear.forward, StiefelLinear.forward)


class Middle:
    """What stands between the projections, as functions of z (T, R) and of tensors: here nothing does."""

    extra: tuple[Tensor, ...] = ()  # the weights that it has
    dear = False  # whether its values are kept by a CPU, too: what is R wide and kept is what an adapter costs

    def begin(self, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`values`, and what had to be drawn for them: the last arguments of the other two."""
        return self.values(z_TR, *extra), ()

    def values(self, z_TR: Tensor, *extra: Tensor) -> Tensor:
        """What the up-projection sees, (T, R)."""
        return z_TR

    def gradients(self, dh_TR: Tensor, z_TR: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        """Of z and of each weight, from that of `values`, in operations that can be differentiated in turn."""
        return (dh_TR,)


class Operands(NamedTuple):
    """The tensors of a frozen linear layer and of the projections beside it.

    Attributes:
        x: the layer's input (..., N), cast as autocast would.
        base: W0 (M, N), in the dtype of x.
        bias: b (M,).
        down, up: A (R, N) and B (M, R), as they are.
        dtype: in which these two are used, and in which is what is R wide: float32 beside a bfloat16 layer is fine.
    """

    x: Tensor
    base: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    dtype: torch.dtype


def operands(x_TN: Tensor, base: nn.Module, down: nn.Module, up: nn.Module, dropout: nn.Module) -> Operands | None:
    """What `Beside` works on; None where base layer and branch must be called one by one.

    That is: another kind of layer, one that trains, a hook, a compiler.
    """
    if not (is_eager() and is_frozen_linear(base)):
        return None
    if not (is_plain_linear(down) and is_plain_linear(up) and (is_dropping(dropout) or is_nothing(dropout))):
        return None
    x_TN, W_MN = as_autocast(x_TN, x_TN, weight_of(base))
    A_RN, B_MR, b_M = weight_of(down), weight_of(up), bias_of(base)
    lower = autocast_dtype(x_TN)
    dtype = A_RN.dtype if lower is None or A_RN.dtype == torch.float64 else lower
    if x_TN.dtype != W_MN.dtype or A_RN.dtype != B_MR.dtype or not widens(x_TN.dtype, dtype):
        return None
    return Operands(x_TN, W_MN, b_M if b_M is None else b_M.to(W_MN.dtype), A_RN, B_MR, dtype)


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


class Beside(torch.autograd.Function):
    """x W0ᵀ + b + s · middle((x ∘ mask) Aᵀ / share) Bᵀ: a layer and its branch in one. x's gradient is one array.

    Saves x, the weights and the mask; of what is R wide (x ∘ mask) Aᵀ / share, and what the middle makes of it where
    that is dear.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TN: Tensor,
        W_MN: Tensor,
        b_M: Tensor | None,
        A_RN: Tensor,
        B_MR: Tensor,
        dtype: torch.dtype,
        scaling: float,
        drop: Drawn,
        middle: Middle,
        *extra: Tensor,
    ) -> Tensor:
        """Two products, the middle, and a third product into the first's memory."""
        A_low, B_low = (A_RN, B_MR) if A_RN.dtype == dtype else (A_RN.to(dtype), B_MR.to(dtype))
        z_TR = dropped_and_narrow(flat(x_TN), A_low, drop)
        h_TR, drawn = middle.begin(z_TR, *extra)
        kept_TR = h_TR if middle.dear or x_TN.device.type != "cpu" else None  # on a GPU a launch is dear
        ctx.save_for_backward(x_TN, W_MN, A_RN, B_MR, drop.mask, z_TR, kept_TR, *extra, *drawn)
        ctx.low = A_low, B_low
        ctx.scaling, ctx.share, ctx.middle = scaling, drop.share, middle
        # With a bias F.linear gives a view, which nobody could change in place; the alias is none to autograd.
        return add_product_(F.linear(x_TN, W_MN, b_M), h_TR, B_low, scaling).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Narrow to wide, the base layer's part of x's gradient last; what is not kept is made again."""
        x_TN, W_MN, A_RN, B_MR, mask, z_TR, h_TR, *extra = ctx.saved_tensors
        (A_low, B_low), middle, share, rows_TN = ctx.low, ctx.middle, ctx.share, flat(x_TN)
        if torch.is_grad_enabled():  # a second derivative: from what came in, with a graph
            A_low, B_low = A_RN.to(z_TR.dtype), B_MR.to(z_TR.dtype)
            z_TR, h_TR = dropped_and_narrow(rows_TN, A_low, Drawn(mask, share)), None
        needs_x, _, _, needs_A, needs_B, _, _, _, _, *needs_extra = ctx.needs_input_grad
        g_TM = flat(gradients[0])
        wide_TM, dx_TN, dA_RN, dB_MR = read_twice(g_TM, B_low), None, None, None
        d_extra: list[Tensor | None] = [None] * len(needs_extra)
        if needs_B:
            h_TR = middle.values(z_TR, *extra) if h_TR is None else h_TR
            dB_MR = times(ctx.scaling, up_gradient(h_TR, wide_TM))
            del h_TR
        if needs_x or needs_A or any(needs_extra):
            dh_TR = times(ctx.scaling, narrow(wide_TM, B_low.mT))
            dz_TR, *d_extra = middle.gradients(dh_TR, z_TR, *extra)
            dz_TR = over(share, dz_TR)
            dA_RN = weight_gradient(dz_TR, rows_TN, mask) if needs_A else None
            dx_TN = input_gradient(x_TN, dz_TR, A_low, mask, base=(g_TM, W_MN)) if needs_x else None
        return dx_TN, None, None, dA_RN, dB_MR, None, None, None, None, *d_extra


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


def over(share: float, x_TR: Tensor) -> Tensor:
    """x / share, and x itself for 1."""
    return x_TR if share == 1 else x_TR / share


def times(scaling: float, x_TR: Tensor) -> Tensor:
    """s · x, and x itself for 1."""
    return x_TR if scaling == 1 else x_TR * scaling


def as_autocast(like: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as autocast would cast them; themselves without autocast."""
    lower = autocast_dtype(like)
    return operands if lower is None else tuple(x if x.dtype == torch.float64 else x.to(lower) for x in operands)


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """What autocast casts operands to where `like` lies; None without autocast."""
    device = like.device.type
    at_work = device != "meta" and torch.is_autocast_enabled(device)  # which knows no meta
    return torch.get_autocast_dtype(device) if at_work else None


def input_gradient(
    x_TN: Tensor, g_TR: Tensor, A_RN: Tensor, mask: Tensor | None, base: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(g A) ∘ mask, and beside a base layer (its output's gradient and W0) their product too: one array like x."""
    if written_out(g_TR):
        dx_TN = masked(flat(g_TR) @ A_RN, mask).to(x_TN.dtype)
        return (dx_TN if base is None else flat(base[0]) @ base[1] + dx_TN).view(x_TN.shape)
    dx_TN = x_TN.new_empty(x_TN.shape)  # `g @ W` may give a view, which autograd never adds to in place
    rows_TN = flat(dx_TN)
    widen_(rows_TN, flat(g_TR), A_RN, mask)
    if base is not None:  # last: the large product adds in float32 to what is there, whatever it is rounded to then
        rows_TN.addmm_(flat(base[0]), base[1])
    return dx_TN


def drawn(dropout: nn.Module, x_TN: Tensor) -> Drawn:
    """What dropout does to x this time."""
    return draw(x_TN, dropout.p) if is_dropping(dropout) else Drawn()


def dropped_and_narrow(x_TN: Tensor, A_RN: Tensor, drop: Drawn) -> Tensor:
    """(x ∘ mask) Aᵀ / share."""
    if drop.rest is not None:
        return narrow(drop.rest.reshape(x_TN.shape), A_RN)  # laid out as x is, flat or not
    return over(drop.share, narrow(x_TN, A_RN, drop.mask))


def widens(dtype: torch.dtype, to: torch.dtype) -> bool:
    """Whether a sum of both dtypes is computed in the second."""
    return dtype == to or torch.promote_types(dtype, to) == to


def is_frozen_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """A linear layer that does not train and that nobody watches, with plain tensors for weights."""
    if type(module).forward is not nn.Linear.forward or has_hooks(module):
        return False
    weight, bias = weight_of(module), bias_of(module)
    if bias is not None and (bias.requires_grad or not is_plain(bias)):
        return False
    return is_plain(weight) and not weight.requires_grad


def is_nothing(module: nn.Module) -> bool:
    """Dropout that drops nothing, and that nobody watches."""
    return is_idle(module) and not has_hooks(module)


def is_idle(module: nn.Module) -> bool:
    """Dropout that drops nothing, whoever watches it."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and (not module.training or module.p == 0))


def is_dropping(module: nn.Module) -> TypeGuard[nn.Dropout]:
    """Dropout at work, with something dropped and something left."""
    return type(module) is nn.Dropout and module.training and 0 < module.p < 1 and not has_hooks(module)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """x Wᵀ and nothing else: no bias, no hook that would see the module called (FSDP's, a profiler's, a user's)."""
    bare = type(module).forward in LINEAR and bias_of(module) is None
    return bare and not has_hooks(module)


def is_plain(x: Tensor) -> bool:
    """A tensor of torch's own and no subclass, which may be quantised, in shards, or anything."""
    return type(x) in (Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody would notice that the module is not called, or holds what it returned."""
    return bool(module._backward_hooks or module._backward_pre_hooks) or is_watched(module)


def is_eager() -> bool:
    """Plain eager execution: no compiler (which fuses by itself), tracer, function transform or forward-mode AD."""
    if is_recorded():
        return False
    transformed = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and torch._C._len_torch_dispatch_stack() == 0


def may_overwrite(y_TM: Tensor) -> bool:
    """A plain dense tensor that autograd lets anybody overwrite."""
    ordinary = is_plain(y_TM) and y_TM.layout is torch.strided and y_TM.is_contiguous()
    return ordinary and not (y_TM.is_leaf and y_TM.requires_grad)
