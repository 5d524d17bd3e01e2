"""The environment at hand: versions, processors, devices, processes."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from ..run_folder import PACKAGES

OPTIONAL = (
    "trl",
    "bitsandbytes",
    "torchao",
    "hqq",
    "schedulefree",
    "deepspeed",
    "matplotlib",
    "scikit-learn",
    "scipy",
    "pillow",
)


def describe_environment() -> dict[str, Any]:
    """Versions (None: not installed), threads, accelerator and distributed state of this process."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    distributed = torch.distributed.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": None if accelerator is None else _accelerator(accelerator),
        "distributed": {
            "available": distributed,
            "backends": [name for name in ("gloo", "nccl", "mpi") if distributed and _has_backend(name)],
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "rank": int(os.environ.get("RANK", "0")),
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _accelerator(device: torch.device) -> dict[str, Any]:
    named = torch.cuda.get_device_name(0) if device.type == "cuda" else device.type
    return {"type": device.type, "name": named, "count": torch.accelerator.device_count()}


def _has_backend(name: str) -> bool:
    return bool(getattr(torch.distributed, f"is_{name}_available")())
