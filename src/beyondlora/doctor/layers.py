"""The kinds of layer that an adapter is asked to go beside, each as a small model with one of them in it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

TARGET = "target"


class Host(nn.Module):
    """A model of one layer.

    Attributes:
        additive: the effects of two weight updates on its output add up.
    """

    additive = True

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        output: Tensor = self.target(x)
        return output


class AttentionHost(Host):
    """A model of one attention layer, called as attention is."""

    additive = False  # there is a softmax behind the weights

    def forward(self, x: Tensor) -> Tensor:
        """The attention's output, without its weights."""
        output: Tensor = self.target(x, x, x)[0]
        return output


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: as people call it.
        build: makes a model with one such layer, named "target".
        inputs: makes a batch of three rows for it.
        package: what must be installed for it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the package that the layer comes from is here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _bitsandbytes_8bit() -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return _quantised(Linear8bitLt(64, 32, has_fp16_weights=False))


def _bitsandbytes_4bit() -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    return _quantised(Linear4bit(64, 32, compute_dtype=torch.float32))


def _quantised(layer: nn.Module) -> nn.Module:
    """Quantise by bitsandbytes' own way: load float weights, then move to a device."""
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Host(layer.to(device))


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=dtype)


LAYER_KINDS = (
    LayerKind("Linear", lambda: Host(nn.Linear(16, 12)), _floats(3, 5, 16)),
    LayerKind(
        "Linear bf16",
        lambda: Host(nn.Linear(16, 12).bfloat16()),
        _floats(3, 5, 16, dtype=torch.bfloat16),
    ),
    LayerKind(
        "Linear fp16",
        lambda: Host(nn.Linear(16, 12).half()),
        _floats(3, 5, 16, dtype=torch.float16),
    ),
    LayerKind("Conv1D GPT-2", lambda: Host(Conv1D(12, 16)), _floats(3, 5, 16)),
    LayerKind("Embedding", lambda: Host(nn.Embedding(20, 12)), lambda: torch.arange(15).reshape(3, 5)),
    LayerKind("Conv1d", lambda: Host(nn.Conv1d(6, 8, 3)), _floats(3, 6, 9)),
    LayerKind("Conv2d", lambda: Host(nn.Conv2d(6, 8, 3)), _floats(3, 6, 9, 9)),
    LayerKind(
        "Attention",
        lambda: AttentionHost(nn.MultiheadAttention(16, 2, batch_first=True)),
        _floats(3, 5, 16),
    ),
    LayerKind("bnb 8-bit", _bitsandbytes_8bit, _floats(3, 64), "bitsandbytes"),
    LayerKind("bnb 4-bit", _bitsandbytes_4bit, _floats(3, 64), "bitsandbytes"),
)
