"""How a down-projection reads its input where that is not a row of features: embeddings and convolutions.

Both are linear layers in disguise: an embedding multiplies one-hot rows, a convolution multiplies patches. The weights
stay the matrices that they are beside an `nn.Linear`, with N the number of tokens or the size of a patch, and the core
sees R features in the last dimension as ever.

Legend: N columns of the down-projection, M outputs, R rank, B batch, C channels, K kernel positions, L positions out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Reading:
    """Reads an input with a down-projection's weight (R, N); gives the up-projection's output the layer's layout."""

    drops_features: ClassVar[bool] = True
    picks_columns: ClassVar[bool] = False

    def read(self, x: Tensor, weight_RN: Tensor) -> Tensor:
        """Map an input of the layer to (..., R)."""
        raise NotImplementedError

    def write(self, y: Tensor) -> Tensor:
        """Map (..., M) to the layout of the layer's output."""
        return y


class Lookup(Reading):
    """An embedding: the input is indices, and the down-projection's columns are looked up. There is nothing to drop."""

    drops_features = False
    picks_columns = True

    def read(self, x: Tensor, weight_RN: Tensor) -> Tensor:
        """Map indices (...) to (..., R)."""
        return F.embedding(x, weight_RN.mT)


@dataclass(frozen=True)
class Patches(Reading):
    """A convolution over 1, 2 or 3 dimensions without groups: N = C·K, the kernel is the down-projection's.

    Attributes:
        channels: C of the input.
        kernel_size, stride, dilation: one number a dimension, as the layer has them.
        padding: on both sides of each dimension, in positions, or "same" and "valid".
        padding_mode: "zeros", or the mode of `torch.nn.functional.pad` with `pads`.
        pads: (left, right) of each dimension, last dimension first; for modes other than "zeros".
    """

    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    padding_mode: str = "zeros"
    pads: tuple[int, ...] = ()

    def read(self, x: Tensor, weight_RN: Tensor) -> Tensor:
        """Map (B, C, ...) to (B, L..., R)."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.pads, mode=self.padding_mode), 0  # type: ignore[assignment]
        kernel = weight_RN.to(x.dtype).unflatten(1, (self.channels, *self.kernel_size))
        convolve = _CONVOLUTIONS[len(self.kernel_size)]
        z = convolve(x, kernel, stride=self.stride, padding=padding, dilation=self.dilation)
        return z.movedim(self._channel_axis, -1)

    def write(self, y: Tensor) -> Tensor:
        """Map (B, L..., M) to (B, M, L...)."""
        return y.movedim(-1, self._channel_axis)

    @property
    def _channel_axis(self) -> int:
        return -1 - len(self.kernel_size)  # from the end: a layer takes inputs without a batch, too
