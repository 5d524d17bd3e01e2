"""One training step of a whole Llama, all seven linear layers of every block adapted: LoRA beside the three methods.

    python benchmarks/model_step.py --out docs/results/model-step.md
    python benchmarks/model_step.py --checkpointing            # or --dtype bfloat16; --layers 2 for a quick look
    python benchmarks/model_step.py --device cuda --model 1b --dtype bfloat16 --rank 32 --tokens 4096 --length 1024

Forward, backward, AdamW with its hooks (StelLA's Riemannian step among them), gradients freed; random weights, random
tokens. A CPU has one thread, and its time is taken; on an accelerator bfloat16 runs under autocast. "base" is the
frozen model with gradients down to the embeddings' output and no optimizer. CeRA has its bottleneck dropout (0.1);
"+drop" is a dropout of 0.05 on the input.
"""

import argparse
from typing import Any

import torch
from llamas import SIZES, llama
from peft import LoraConfig, get_peft_model
from side_by_side import autocast, command, compare, machine, options, peak_bytes, publish
from torch import nn

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

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
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        model = llama(arguments.model, arguments.layers, self.dtype, arguments.device)
        make = METHODS[method]
        if make is not None:
            model = get_peft_model(model, make(r=arguments.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
        if arguments.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model: nn.Module = model.train()
        weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4) if weights else None
        rows = arguments.tokens // arguments.length
        self.tokens = torch.randint(model.config.vocab_size, (rows, arguments.length)).to(arguments.device)

    def __call__(self) -> None:
        """Once."""
        with autocast(self.tokens.device, self.dtype):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def main() -> None:
    """Measure and write the table."""
    parser = options(__doc__, rounds=21)
    parser.add_argument("--model", choices=list(SIZES), default="small")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512, help="of one sequence")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {method: Step(method, arguments) for method in METHODS}
    peaks = {method: peak_bytes(step, arguments.device) for method, step in steps.items()}
    ratios = compare(steps, "LoRA", arguments.rounds, arguments.device)
    lora, dropping = "LoRA", "LoRA+drop"
    lines = [
        "# A training step of a whole Llama",
        "",
        f"`{command()}`: {arguments.rounds} rounds, {arguments.tokens} tokens, r = {arguments.rank}.",
        f"{machine(arguments.device)}.",
        "",
        "Time is the median over the rounds of time / LoRA's time in the same round (quartiles); memory the peak of",
        "tensor bytes during the step beyond weights and optimizer state.",
        "",
        "| method | time / LoRA | / LoRA+drop | ms | memory / LoRA | / LoRA+drop | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {ratio} | {ratio.median / ratios[dropping].median:.2f} | {ratio.ms} | "
        f"{peaks[method] / peaks[lora]:.2f} | {peaks[method] / peaks[dropping]:.2f} | {peaks[method] / 2**20:.0f} |"
        for method, ratio in ratios.items()
    ]
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
