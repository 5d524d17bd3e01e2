"""The methods as adapters of Axolotl: its plug-in door, and the way from Axolotl's words to ours.

    plugins:
      - beyondlora.axolotl.BeyondLoraPlugin
    adapter: <method>          # the method's name in lower case
    lora_r: 16
    lora_target_linear: true
    beyondlora:                # any other field of the method's config
      init_lora_weights: false

Made for Axolotl 0.19 (its `integrations.base.BasePlugin`); Axolotl is no dependency of this package.
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from .attach import config_by_name
from .tuner.methods import METHODS

# Axolotl's name → ours, for what is set. Where no dropout is given Axolotl says 0, and 0 it is.
WORDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
}
# Axolotl does these for its adapters lora and qlora alone: for another they would have no effect, or a wrong one.
LORA_ALONE = (
    "peft_use_dora",
    "peft_layer_replication",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "loraplus_lr_ratio",
    "relora",
    "load_in_8bit",
    "load_in_4bit",
)


class Arguments(BaseModel):
    """What the plug-in adds to Axolotl's recipe."""

    beyondlora: dict[str, Any] | None = None


class BeyondLoraPlugin(BasePlugin):
    """Offers every method of this package as `adapter:`."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the added keys."""
        return f"{__name__}.{Arguments.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The names that `adapter:` takes."""
        return [AdapterCapabilities(name=config.method) for config in METHODS]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """The model with its adapter, new or from `lora_model_dir`, and the config; None if the adapter is not ours.

        Raises: ValueError for what the recipe asks of LoRA alone, and what the method's config refuses.
        """
        if cfg.adapter not in {config.method for config in METHODS}:
            return None
        config: Any = config_by_name(cfg.adapter.upper(), {"task_type": task_of(model)} | settings(cfg))
        if config_only:
            return None, config
        precision = cfg.peft_autocast_adapter_dtype
        more = {} if precision is None else {"autocast_adapter_dtype": precision}
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **more), config
        return get_peft_model(model, config, **more), config


def settings(cfg: Any) -> dict[str, Any]:
    """The fields of a method's config that an Axolotl recipe sets. Raises: ValueError."""
    foreign = [name for name in LORA_ALONE if cfg.get(name)]
    if foreign:
        raise ValueError(f"{', '.join(foreign)}: Axolotl has this for its LoRA alone; leave it out.")
    fields = {ours: cfg.get(theirs) for theirs, ours in WORDS.items() if cfg.get(theirs) not in (None, [], "")}
    if cfg.lora_target_linear:
        fields["target_modules"] = "all-linear"
    return fields | dict(cfg.beyondlora or {})


def task_of(model: Any) -> str:
    """PEFT's name of what the model does, by its class, as Axolotl tells it."""
    name = type(model).__name__
    found = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((task for word, task in found.items() if word in name), "CAUSAL_LM")
