"""Adapters out of this package: as a plain LoRA that any server loads, or as a merged model, measured before it counts.

>>> export_lora(model, "lora_out")["layer_gap"]["largest"]
    9.7e-08
"""

from .lora import export_lora as export_lora
from .lora import lora_gap as lora_gap
from .run import export as export
