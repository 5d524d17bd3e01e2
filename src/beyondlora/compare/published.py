"""Runs in the result format of PEFT's own method_comparison, so that they can stand beside its published ones.

What that format asks for and a run here does not measure: the average and the 99th percentile of accelerator memory
(the peak stands for both, an upper bound; 0 without an accelerator), and, for a task without one, "test accuracy"
(null). "train total tokens" is the number of training rows times their mean length.
"""

import platform
import re
from pathlib import Path
from typing import Any

from ..run_folder import RunFolder, write_json
from .arms import Outcome
from .runs import Line

ACCURACY = "accuracy"


def publish(outcome: Outcome, folder: Path) -> None:
    """Write one file a run that an arm is judged by."""
    for arm in outcome.arms:
        for line in arm.lines:
            write_json(folder / f"{_slug(line['method'])}--{line['run']}.json", as_published(line))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def as_published(line: Line) -> dict[str, Any]:
    """A line of results.jsonl in PEFT's format."""
    recipe, environment = line["recipe"], line["environment"]
    on_accelerator = environment["device"] != "cpu"
    memory = line["peak_memory_bytes"] if on_accelerator else 0
    return {
        "run_info": {
            "created_at": environment["started"],
            "total_time": line["total_seconds"],
            "experiment_name": f"{_slug(line['method'])}/{line['run']}",
            "peft_branch": "",
            "train_config": _train_config(recipe),
            "peft_config": recipe["adapter"],
            "error_msg": line["error"],
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": line["train_seconds"],
            "file_size": line["adapter_bytes"],
            "num_trainable_params": line["trainable_parameters"],
            "num_total_params": line["total_parameters"],
            "status": "success",
            "metrics": [*_evaluations(recipe), _tested(line)],
        },
        "meta_info": {
            "model_info": {"sha": line["base_sha256"], "created_at": None},
            "dataset_info": {recipe["dataset_name"]: {"sha": line["data_sha256"], "created_at": None}},
            "package_info": _packages(environment["versions"]),
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": environment["device"] if on_accelerator else "",
            },
            "pytorch_info": "",
        },
    }


def _train_config(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_id": recipe["model_name_or_path"],
        "dtype": recipe["dtype"],
        "max_seq_length": recipe["max_length"],
        "batch_size": recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"],
        "batch_size_eval": recipe["per_device_eval_batch_size"],
        "max_steps": recipe["max_steps"],
        "eval_steps": recipe["eval_steps"],
        "compile": False,
        "use_gc": recipe["gradient_checkpointing"],
        "query_template": "",
        "seed": recipe["seed"],
        "grad_norm_clip": recipe["max_grad_norm"],
        "optimizer_type": recipe["optim"],
        "optimizer_kwargs": {"lr": recipe["learning_rate"], "weight_decay": recipe["weight_decay"]},
        "lr_scheduler": recipe["lr_scheduler_type"],
        "use_amp": recipe["bf16"],
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _evaluations(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"step": row["step"], "valid accuracy": row.get("eval_accuracy"), "valid loss": row["eval_loss"]}
        for row in RunFolder(recipe["output_dir"]).rows()
        if row.get("eval_loss") is not None
    ]


def _tested(line: Line) -> dict[str, Any]:
    recipe = line["recipe"]
    samples = line["steps"] * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    figures = {f"test {name}": score["value"] for name, score in line["test"].items()}
    return {
        "step": line["steps"],
        f"test {ACCURACY}": None,
        **figures,
        "train loss": line["train_loss"],
        "train samples": samples,
        "train total tokens": round(samples * line["tokens_per_row"]),
    }


def _packages(versions: dict[str, str | None]) -> dict[str, str | None]:
    names = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    keys = [(f"{name}-version", versions.get(name)) for name in names]
    hashes: list[tuple[str, str | None]] = [(f"{name}-commit-hash", None) for name in names]
    return dict([*keys, *hashes, ("beyondlora-version", versions.get("beyondlora"))])
