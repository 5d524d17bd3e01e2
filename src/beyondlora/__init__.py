"""CeRA, AuroRA and StelLA as a plug-in to Hugging Face PEFT.

Importing this package is all the integration there is: from then on PEFT knows the types CERA, AURORA and STELLA, and
every torch optimizer takes the Riemannian step on StelLA's factors. The import itself is cheap: torch and PEFT are
loaded when something is used, and the methods are registered the moment PEFT is (at once if it already is).
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import export_lora as export_lora
    from .tuner.hotswap import hotswap_adapter as hotswap_adapter
    from .tuner.methods import AuroraConfig as AuroraConfig
    from .tuner.methods import CeraConfig as CeraConfig
    from .tuner.methods import StellaConfig as StellaConfig

__version__ = "0.1.0.dev0"

_HOME = {
    "AuroraConfig": ".tuner.methods",
    "CeraConfig": ".tuner.methods",
    "StellaConfig": ".tuner.methods",
    "export_lora": ".export",
    "hotswap_adapter": ".tuner.hotswap",
}
__all__ = ["AuroraConfig", "CeraConfig", "StellaConfig", "__version__", "export_lora", "hotswap_adapter"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


class _RegisterWithPeft(MetaPathFinder):
    """Lets the import of `peft` run as ever, and registers the methods right after it.

    It stays until then: transformers and others ask for the spec only to learn whether PEFT is installed.
    """

    looking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft" or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec("peft")
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                execute(module)
                importlib.import_module(".tuner", __name__)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module(".tuner", __name__)
else:
    sys.meta_path.insert(0, _RegisterWithPeft())
