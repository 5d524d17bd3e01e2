"""One row a method: what drives every shared suite. A new method costs one row here."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from peft import PeftConfig

import beyondlora
from beyondlora.tuner.config import METHODS_SAY_WHAT_IS_SAVED


@dataclass(frozen=True)
class Method:
    """A configuration of a method and what must be true of it.

    merge: "exact" (merged = attached), "static" (merges another function, and says so) or "refused".
    noop_start: an untrained adapter leaves the base model's output as it is.
    """

    name: str
    config_cls: type[PeftConfig]
    letters: tuple[str, ...]
    merge: str
    noop_start: bool
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return self.config_cls.method + "_"

    def config(self, **overrides: Any) -> PeftConfig:
        """A config with a rank that fits small layers."""
        return self.config_cls(**{"r": 4, **self.options, **overrides})


METHODS = [
    Method("cera", beyondlora.CeraConfig, ("A", "B"), "refused", True),
    Method("cera-linear", beyondlora.CeraConfig, ("A", "B"), "exact", True, {"cera_activation": "identity"}),
    Method("aurora", beyondlora.AuroraConfig, ("A", "B", "H", "spline"), "static", True),
    Method(
        "aurora-static", beyondlora.AuroraConfig, ("A", "B", "H", "spline"), "exact", True, {"aurora_mode": "static"}
    ),
    Method("aurora-fixed", beyondlora.AuroraConfig, ("A", "B", "H"), "static", True, {"aurora_learnable": False}),
    Method("stella", beyondlora.StellaConfig, ("U", "S", "Vt"), "exact", False),
    Method("stella-diag", beyondlora.StellaConfig, ("U", "S", "Vt"), "exact", False, {"stella_diag_s": True}),
    Method("stella-zero", beyondlora.StellaConfig, ("U", "S", "Vt"), "exact", True, {"init_lora_weights": "zero"}),
]

since_peft_0_21 = pytest.mark.skipif(
    not METHODS_SAY_WHAT_IS_SAVED, reason="peft 0.20 decides by itself what it saves of a method from outside"
)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
one_of_each_paper = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("cera", "aurora", "stella")], ids=lambda method: method.name
)
