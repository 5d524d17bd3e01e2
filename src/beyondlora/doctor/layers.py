"""The kinds of layer that an adapter is asked to go beside, each as a small model with one of them in it."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..evaluate import device

TARGET = "target"
EIGHT_BITS, FOUR_BITS = 0.03, 0.25  # the grain of quantised weights, which are quantised again


class Host(nn.Module):
    """A model of one layer.

    Attributes:
        additive: the effects of two weight updates on its output add up.
        grain: how far an output moves, relative to the largest entry, when the layer's weight is stored anew; None
            where storing it loses nothing but the dtype's rounding.
    """

    additive = True

    def __init__(self, target: nn.Module, *, grain: float | None = None) -> None:
        super().__init__()
        self.target = target
        self.grain = grain

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


class ExpertsHost(Host):
    """A model of the experts of one layer of a mixture, each token going to two of three by a rule."""

    additive = False  # what one projection adds passes the next one, and an activation

    def forward(self, x: Tensor) -> Tensor:
        """The experts' output."""
        tokens = x.flatten(0, -2)
        index = torch.arange(2 * len(tokens), device=x.device).reshape(-1, 2) % 3
        output: Tensor = self.target(tokens, index, tokens[:, :2].softmax(-1))
        return output.reshape(x.shape)


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: as people call it.
        build: makes a model with one such layer, named "target", on the accelerator or still on the CPU.
        inputs: makes a batch of three rows for it.
        package: what must be installed for it.
        targets: the fields of a config that name it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    package: str | None = None
    targets: dict[str, list[str]] = field(default_factory=lambda: {"target_modules": [TARGET]})

    @property
    def installed(self) -> bool:
        """Whether the package that the layer comes from is here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _experts() -> nn.Module:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=12, num_experts=3)
    config._experts_implementation = "eager"
    host = ExpertsHost(Qwen3MoeExperts(config))
    for weight in host.parameters():
        nn.init.normal_(weight, std=0.3)
    return host


def _bitsandbytes_8bit() -> nn.Module:
    from bitsandbytes.nn.modules import Linear8bitLt

    return _loaded(Linear8bitLt(64, 32, has_fp16_weights=False), EIGHT_BITS, is_loaded_in_8bit=True)


def _bitsandbytes_4bit() -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit

    return _loaded(Linear4bit(64, 32, compute_dtype=torch.float32), FOUR_BITS, is_loaded_in_4bit=True)


def _loaded(layer: nn.Module, grain: float, **marks: bool) -> nn.Module:
    """Quantise by bitsandbytes' own way: load float weights, then move to a device. PEFT's LoRA goes by the marks."""
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    host = Host(layer.to(device()), grain=grain)
    vars(host).update(marks)
    return host


def _torchao_8bit() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from transformers import TorchAoConfig

    host: Any = Host(nn.Linear(64, 32, device=device()), grain=EIGHT_BITS)
    quantize_(host.target, Int8WeightOnlyConfig())
    # PEFT writes merged weights back by the model's own quantisation.
    host.hf_quantizer = SimpleNamespace(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    return host


def _hqq_4bit() -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(64, 32).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return Host(HQQLinear(linear, config, compute_dtype=torch.float32, device=str(device())), grain=FOUR_BITS)


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
    LayerKind(
        "Experts",
        _experts,
        _floats(3, 5, 16),
        targets={"target_modules": [], "target_parameters": [f"{TARGET}.gate_up_proj", f"{TARGET}.down_proj"]},
    ),
    LayerKind("bnb 8-bit", _bitsandbytes_8bit, _floats(3, 64), "bitsandbytes"),
    LayerKind("bnb 4-bit", _bitsandbytes_4bit, _floats(3, 64), "bitsandbytes"),
    LayerKind("torchao 8-bit", _torchao_8bit, _floats(3, 64), "torchao"),
    LayerKind("HQQ 4-bit", _hqq_4bit, _floats(3, 64), "hqq"),
)
