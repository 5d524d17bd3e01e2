"""A plain LoRA folder that the strictest readers take: vLLM, SGLang, llama.cpp's converter, ollama, PEFT.

What each of them insists on, all at once:

    keys        base_model.model.<path>.lora_A.weight and .lora_B.weight, nothing else in the file (llama.cpp stops at
                any other name; vLLM and SGLang find the layer by cutting these ends off)
    rank        one for all layers (ollama and vLLM read a single r): smaller ones are padded with zeros
    lora_alpha  a whole number equal to r, with the scaling in lora_B (llama.cpp takes alpha / rank of each tensor)
    patterns    none; no rsLoRA, DoRA, bias, modules_to_save (vLLM refuses them, others drop them silently)
    targets     a list of ends of names, no regular expression. A layer that such an end also fits, and that has no
                adapter, gets a LoRA of zeros
    base model  named
    experts     of a mixture: as PEFT holds them (`experts.py`)

Legend: N inputs, M outputs, R rank.
"""

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..run_folder import check_writable, write_json, write_text
from ..targets import fits, shortest_targets
from .experts import parted, stacked, target_parameters

RECORD = "export.json"
PREFIX = "base_model.model."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank takes

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer path in the base model → (B (M, R), scaling folded in; A (R, N))."""


def vllm_rank(rank: int) -> int:
    """The smallest rank that vLLM can be told to serve and that holds `rank`. Raises: ValueError above its largest."""
    if rank > VLLM_RANKS[-1]:
        raise ValueError(
            f"The adapter has rank {rank} and vLLM serves at most {VLLM_RANKS[-1]}: export it merged (--to merged)."
        )
    return next(size for size in VLLM_RANKS if size >= rank)


def write_lora(
    folder: Path,
    factors: Factors,
    base: nn.Module,
    *,
    base_model: str,
    task_type: str | None = None,
    rank: int | None = None,
) -> LoraConfig:
    """Write adapter_model.safetensors and adapter_config.json into a folder that exists.

    Args:
        factors: of each adapted layer.
        base: the model without adapters; says which other layers a target's name fits.
        base_model: name or folder of the base model, for adapter_config.json.
        task_type: PEFT's, or None.
        rank: of the whole folder; None = that of the largest layer.

    Returns: the config as written.
    Raises: ValueError for factors that are not finite.
    """
    modules = dict(base.named_modules())
    _check_finite(factors)
    layers, stacks = parted(factors, modules)
    rank = rank or max(A_RN.shape[0] for _, A_RN in factors.values())
    targets = shortest_targets(layers, modules)
    complete = layers | {path: _zeros(modules[path]) for path in modules if path not in layers and fits(path, targets)}
    tensors = {}
    for path, (B_MR, A_RN) in complete.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = _padded(A_RN, (rank, A_RN.shape[1]))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = _padded(B_MR, (B_MR.shape[0], rank))
    parameters = target_parameters(stacks, base)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in stacked(stacks, parameters, base, rank).items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        target_parameters=parameters or None,
        task_type=task_type,
        base_model_name_or_path=base_model,
        fan_in_fan_out=bool(complete) and all(isinstance(modules[path], Conv1D) for path in complete),
        inference_mode=True,
    )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.target_modules = targets  # a list, sorted: LoraConfig keeps a set, whose order changes from run to run
    config.save_pretrained(str(folder))
    return config


def _check_finite(factors: Factors) -> None:
    for path, pair in factors.items():
        if not all(torch.isfinite(matrix).all() for matrix in pair):
            raise ValueError(f"{path}: the adapter's weights are not finite (nan or infinity); it is broken.")


def _zeros(layer: Any) -> tuple[Tensor, Tensor]:
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return torch.zeros(outputs, 1), torch.zeros(1, inputs)


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix in float32 on the CPU, with rows or columns of zeros added."""
    padded = torch.zeros(shape)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix.detach()
    return padded


def serving_command(folder: Path, *, base_model: str, rank: int | None, experts: bool = False) -> str:
    """The command that serves a LoRA folder (of a rank) or a merged model (rank None) with vLLM.

    Args:
        experts: whether there is a LoRA of a mixture's experts, whose form vLLM has to be told.
    """
    place, base_model = shlex.quote(str(folder)), shlex.quote(base_model)
    if rank is None:
        return f"vllm serve {place}"
    if rank > VLLM_RANKS[-1]:
        return f"llama-server --model {base_model} --lora {place}  # after conversion: vLLM serves ranks to 512 only"
    served = f"{shlex.quote(folder.name)}={place}"
    if experts:
        about = {"name": folder.name, "path": str(folder), "is_3d_lora_weight": True}
        served = f"{shlex.quote(json.dumps(about))} --enable-mixed-moe-lora-format"
    return f"vllm serve {base_model} --enable-lora --max-lora-rank {vllm_rank(rank)} --lora-modules {served}"


# --- what stands beside the weights ----------------------------------------------------------------------------------


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write export.json and the model card."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    write_json(folder / RECORD, record | {"versions": versions})
    kind = "library_name: transformers" if record["rank"] is None else "library_name: peft\ntags:\n- lora"
    write_text(
        folder / "README.md",
        f"---\nbase_model: {record['base_model']}\n{kind}\n---\n\n"
        f"Exported by beyondlora from a {record['made_from']} adapter ({record['form']} form); how far it is from that "
        f"adapter stands in {RECORD}.\n\n    {record['serve']}\n",
    )


def check_free(folder: Path) -> None:
    """Refuse to replace anything but an older export. Raises: FileExistsError; see also `check_writable`."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists()):
        raise FileExistsError(f"{folder} holds something that no export wrote; name another folder.")
    check_writable(folder.resolve())


def as_text(value: Any) -> str | None:
    """The word of a str-Enum such as PEFT's types and tasks."""
    return None if value is None else str(getattr(value, "value", value))
