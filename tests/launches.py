"""How many kernels a piece of code would launch on an accelerator, counted on any device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that are no views.

    >>> with Launches() as launches:
    ...     step()
    >>> launches.count
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        name = function.overloadpacket.__name__
        self.count += not (function.is_view or name in ("_unsafe_view", "unbind") or "empty" in name)
        return function(*args, **kwargs or {})
