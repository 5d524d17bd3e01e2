"""One training step of a whole Llama, all seven linear layers of every block adapted: LoRA beside the three methods.

    python benchmarks/model_step.py --rounds 21 --out docs/results/model-step.md
    python benchmarks/model_step.py --checkpointing            # or --dtype bfloat16; --layers 2 for a quick look

Forward, backward, AdamW with its hooks (StelLA's Riemannian step among them), gradients freed; random weights, random
tokens, one thread, CPU time. "base" is the frozen model with gradients down to the embeddings' output and no optimizer.
CeRA has its bottleneck dropout (0.1); "+drop" is a dropout of 0.05 on the input.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from side_by_side import compare, machine, peak_bytes, publish
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

VOCABULARY = 1000
METHODS: dict[str, Any] = {
    "LoRA": lambda **kw: LoraConfig(lora_alpha=8, **kw),
    "LoRA again": lambda **kw: LoraConfig(lora_alpha=8, **kw),
    "LoRA+drop": lambda **kw: LoraConfig(lora_alpha=8, lora_dropout=0.05, **kw),
    "base": None,
    "CeRA": lambda **kw: CeraConfig(**kw),
    "AuroRA": lambda **kw: AuroraConfig(**kw),
    "AuroRA+drop": lambda **kw: AuroraConfig(lora_dropout=0.05, **kw),
    "StelLA": lambda **kw: StellaConfig(lora_alpha=8, **kw),
    "StelLA+drop": lambda **kw: StellaConfig(lora_alpha=8, lora_dropout=0.05, **kw),
}


class Step:
    """A model of one method, and one training step of it."""

    def __init__(self, method: str, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=arguments.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        model: Any = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).requires_grad_(False)
        make = METHODS[method]
        if make is not None:
            model = get_peft_model(model, make(r=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
        if arguments.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model: nn.Module = model.train()
        weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4) if weights else None
        self.tokens = torch.randint(VOCABULARY, (arguments.tokens // arguments.length, arguments.length))

    def __call__(self) -> None:
        """Once."""
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512, help="of one sequence")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, help="the Markdown file; default: standard output only")
    parser.add_argument("--date", default="", help="date to record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {method: Step(method, arguments) for method in METHODS}
    peaks = {method: peak_bytes(step) for method, step in steps.items()}
    ratios = compare(steps, "LoRA", arguments.rounds)
    shown = {key: value for key, value in vars(arguments).items() if key not in ("out", "date")}
    lora, dropping = "LoRA", "LoRA+drop"
    lines = [
        "# A training step of a whole Llama",
        "",
        f"`python benchmarks/model_step.py`, {', '.join(f'{key} {value}' for key, value in shown.items())}.",
        f"{arguments.date} {machine()}.",
        "",
        "Time is the median over the rounds of time / LoRA's time in the same round (quartiles); memory the peak of",
        "tensor bytes during the step beyond weights and optimizer state.",
        "",
        "| method | time / LoRA | / LoRA+drop | ms | memory / LoRA | / LoRA+drop | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {ratio} | {ratio.median / ratios[dropping].median:.2f} | {ratio.seconds * 1e3:.0f} | "
        f"{peaks[method] / peaks[lora]:.2f} | {peaks[method] / peaks[dropping]:.2f} | {peaks[method] / 2**20:.0f} |"
        for method, ratio in ratios.items()
    ]
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
