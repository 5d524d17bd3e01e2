"""The same branch in fewer passes over memory: y + s · up(h) in one multiplication, input dropout without a copy of x.

LoRA's price is not its arithmetic (2·T·R·(M+N) beside 2·T·M·N) but its traffic: up(h), s · up(h) and the sum are three
arrays of the size of the output, dropout two of the size of the input, all written, read and kept. Nothing here
changes what is computed: `Adapter.forward` is the definition, and the tests hold the two together.

Legend: T tokens (any leading dimensions), N inputs, M outputs, R rank.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from ..manifold.linear import StiefelLinear

LINEAR = (nn.Linear.forward, StiefelLinear.forward)
BLOCK = 256  # rows a piece: small enough for a cache, large enough for a matrix product


def add_up(y_TM: Tensor, h_TR: Tensor, up: nn.Module, scaling: float, *, overwrite: bool = False) -> Tensor:
    """y + s · up(h), written over y where the caller gives y away and nobody can notice.

    Args:
        y_TM: what is added to.
        h_TR: the input of the up-projection.
        up: any module; `nn.Linear` and `StiefelLinear` without bias and hooks have the fast form.
        scaling: s.
        overwrite: y was made for the caller and nobody else holds it.

    Returns: a tensor of y's shape; y itself or its memory if overwritten. Where dtypes differ, what `+` makes of them.
    """
    if not is_plain_linear(up):
        return y_TM + up(h_TR) * scaling
    h_TR, W_MR = as_autocast(y_TM, h_TR, up.weight)
    if not y_TM.dtype == h_TR.dtype == W_MR.dtype:
        return y_TM + up(h_TR) * scaling
    if not (overwrite and is_eager() and may_overwrite(y_TM)):
        y_flat, h_flat = y_TM.reshape(-1, y_TM.shape[-1]), h_TR.reshape(-1, h_TR.shape[-1])
        return torch.addmm(y_flat, h_flat, W_MR.mT, alpha=scaling).view(y_TM.shape)
    if torch.is_grad_enabled():
        return AddProduct.apply(y_TM, h_TR, W_MR, scaling)
    y_TM.view(-1, y_TM.shape[-1]).addmm_(h_TR.reshape(-1, h_TR.shape[-1]), W_MR.mT, alpha=scaling)
    return y_TM


def dropped_linear(x_TN: Tensor, down: nn.Module, dropout: nn.Module) -> Tensor:
    """down(dropout(x)); with dropout it keeps x, which is there anyway, and a byte an entry instead of two arrays."""
    if not (is_plain_linear(down) and is_eager()):
        return down(dropout(x_TN))
    cast_TN, W_RN = as_autocast(x_TN, x_TN, down.weight)
    if cast_TN.dtype != W_RN.dtype:
        return down(dropout(x_TN))
    if not is_dropping(dropout):
        return NarrowLinear.apply(dropout(cast_TN), W_RN)
    x_TN = cast_TN
    keep_TN, share = keep_mask(x_TN, dropout.p)
    return DroppedLinear.apply(x_TN, W_RN, keep_TN, share)


class AddProduct(torch.autograd.Function):
    """y + s · h Wᵀ in y's memory. Saves h and W, both R wide."""

    @staticmethod
    def forward(ctx: Any, y_TM: Tensor, h_TR: Tensor, W_MR: Tensor, scaling: float) -> Tensor:
        """One in-place product."""
        # The alias has y's memory and version counter (a y that somebody saved is still noticed) and is no view to
        # autograd: an in-place change of a view, which F.linear returns, would cost a copy of the gradient.
        out_TM = y_TM.detach()
        out_TM.view(-1, W_MR.shape[0]).addmm_(h_TR.reshape(-1, W_MR.shape[1]), W_MR.mT, alpha=scaling)
        ctx.save_for_backward(h_TR, W_MR)
        ctx.scaling = scaling
        return out_TM

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of y is that of the output, untouched; s is applied where it is R wide."""
        h_TR, W_MR = ctx.saved_tensors
        g_TM = gradients[0].reshape(-1, W_MR.shape[0])
        dh_TR = dW_MR = None
        # Both products with the narrow matrix first: the other order took up to seven times as long (docs/speed.md).
        if ctx.needs_input_grad[1]:
            dh_TR = (W_MR.mT @ g_TM.mT).mT.mul(ctx.scaling).reshape(h_TR.shape)
        if ctx.needs_input_grad[2]:
            dW_MR = (h_TR.reshape(-1, W_MR.shape[1]).mT @ g_TM).mT.mul(ctx.scaling)
        return gradients[0], dh_TR, dW_MR, None


class NarrowLinear(torch.autograd.Function):
    """x Wᵀ, whose gradient of x autograd can add the base layer's to in place."""

    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, W_RN: Tensor) -> Tensor:
        """One product."""
        ctx.save_for_backward(x_TN, W_RN)
        return x_TN @ W_RN.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """`F.linear` would return the gradient of x as a view, and a view is never added to in place."""
        x_TN, W_RN = ctx.saved_tensors
        dx_TN = dW_RN = None
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            dx_TN = gradients[0] @ W_RN
        elif ctx.needs_input_grad[0]:
            dx_TN = x_TN.new_empty(x_TN.shape)
            torch.mm(flat(gradients[0]), W_RN, out=dx_TN.view(-1, W_RN.shape[1]))
        if ctx.needs_input_grad[1]:
            dW_RN = flat(gradients[0]).mT @ flat(x_TN)
        return dx_TN, dW_RN


class DroppedLinear(torch.autograd.Function):
    """(x ∘ keep) Wᵀ / share. Saves x, W and the mask; x ∘ keep exists a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, W_RN: Tensor, keep_TN: Tensor, share: float) -> Tensor:
        """Block by block."""
        ctx.save_for_backward(x_TN, W_RN, keep_TN)
        ctx.share = share
        z_TR = x_TN.new_empty(keep_TN.shape[0], W_RN.shape[0])
        for x, keep, z in zip(*(rows.split(BLOCK) for rows in (flat(x_TN), keep_TN, z_TR)), strict=True):
            torch.mm(torch.where(keep, x, 0), W_RN.mT, out=z)
        return z_TR.div_(share).view(*x_TN.shape[:-1], W_RN.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Block by block again. Refuses to be differentiated itself, as torch words it."""
        x_TN, W_RN, keep_TN = ctx.saved_tensors
        g_TR = flat(gradients[0]) / ctx.share
        dx_TN = x_TN.new_empty(x_TN.shape) if ctx.needs_input_grad[0] else None
        dW_RN = torch.zeros_like(W_RN) if ctx.needs_input_grad[1] else None
        for start in range(0, keep_TN.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            if dx_TN is not None:
                flat(dx_TN)[rows] = torch.where(keep_TN[rows], g_TR[rows] @ W_RN, 0)
            if dW_RN is not None:
                dW_RN.addmm_(g_TR[rows].mT, torch.where(keep_TN[rows], flat(x_TN)[rows], 0))
        return dx_TN, dW_RN, None, None


def keep_mask(like_TN: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask (T, N) of the entries to keep, and the share of them expected: 1 − p to 16 bits.

    Sixteen random bits an entry, compared with a threshold: a third of the time of `bernoulli_`, which draws one number
    after the other.
    """
    dropped = min(max(round(p * 2**16), 1), 2**16 - 1)
    keep_TN = torch.empty(flat(like_TN).shape, dtype=torch.bool, device=like_TN.device)
    for rows in keep_TN.split(BLOCK):
        words = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64, device=rows.device).random_(-(2**63), None)
        torch.ge(words.view(torch.int16)[: rows.numel()].view(rows.shape), dropped - 2**15, out=rows)
    return keep_TN, 1 - dropped / 2**16


def flat(x_TN: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x_TN.reshape(-1, x_TN.shape[-1])


def as_autocast(like: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as autocast would cast them; themselves without autocast."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in operands)


def is_dropping(module: nn.Module) -> TypeGuard[nn.Dropout]:
    """Dropout at work, with something dropped and something left."""
    return type(module) is nn.Dropout and module.training and 0 < module.p < 1 and not has_hooks(module)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """x Wᵀ and nothing else: no bias, no hook that would see the module called (FSDP's, a profiler's, a user's)."""
    return type(module).forward in LINEAR and module.bias is None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody would notice that the module is not called, or holds what it returned."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or torch_module._has_any_global_hook()


def is_eager() -> bool:
    """Plain eager execution: no compiler (which fuses by itself), tracer, function transform or forward-mode AD."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    transformed = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and torch._C._len_torch_dispatch_stack() == 0


def may_overwrite(y_TM: Tensor) -> bool:
    """A plain dense tensor that autograd lets anybody overwrite."""
    ordinary = type(y_TM) is Tensor and y_TM.layout is torch.strided and y_TM.is_contiguous()
    return ordinary and not (y_TM.is_leaf and y_TM.requires_grad)
