"""What PEFT's tests run for: one of PEFT's own methods, and ours. A column of the table each."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

# Options of LoRA's test rows that are LoRA's alone: rows with one of them set are nobody's but LoRA's.
SHARED = {field.name for field in dataclasses.fields(CeraConfig)} & {
    field.name for field in dataclasses.fields(LoraConfig)
}


class OnlyLoraError(Exception):
    """A test row that uses what only LoRA has."""


@dataclass(frozen=True)
class Column:
    """A method as PEFT's tests see it.

    Attributes:
        config_cls: its config.
        options: what its rows set besides the row's own options. PEFT's matrices ask for a start that is a no-op.
        largest_rank: in the tests' custom models, where the method has a bound: one of them has a 1×5 layer.
    """

    config_cls: type[PeftConfig]
    options: dict[str, Any] = field(default_factory=dict)
    largest_rank: int | None = None

    def row_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a LoRA row, for this method. Raises: OnlyLoraError."""
        for name, value in options.items():
            if name not in SHARED and not name.startswith("total_"):
                raise OnlyLoraError(name)
            if name == "init_lora_weights" and not isinstance(value, bool):
                raise OnlyLoraError(f"{name}={value!r}")
        merged = {**self.options, **options}
        if options.get("init_lora_weights") is True:  # the start that is a no-op
            merged["init_lora_weights"] = self.options.get("init_lora_weights", True)
        if self.largest_rank is not None:
            merged["r"] = min(merged.get("r", self.largest_rank), self.largest_rank)
        return merged

    def config(self, **options: Any) -> PeftConfig:
        """A config, as PEFT's tests make one with a method's class."""
        if "init_weights" in options:  # the name of the same option in most of PEFT's methods
            options["init_lora_weights"] = options.pop("init_weights")
        return self.config_cls(**self.row_options(options))

    def translated(self, lora: LoraConfig) -> PeftConfig:
        """The config of a LoRA row that holds an instance. Raises: OnlyLoraError."""
        plain = LoraConfig()
        changed = {
            name: value
            for name, value in vars(lora).items()
            if value != getattr(plain, name, None) and name != "peft_type"
        }
        return self.config(**{name: value for name, value in changed.items() if not name.startswith("_")})


COLUMNS = {
    "lora": Column(LoraConfig),
    "cera": Column(CeraConfig, {"r": 8, "lora_dropout": 0.0}),  # some tests compare outputs in training mode
    "aurora": Column(AuroraConfig),
    "aurora-static": Column(AuroraConfig, {"aurora_mode": "static", "r": 8}),
    "stella": Column(StellaConfig, largest_rank=1),
    "stella-zero": Column(StellaConfig, {"init_lora_weights": "zero"}, largest_rank=1),
}
