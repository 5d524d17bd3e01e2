"""What a model writes when it is asked."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from .. import processes
from ..data import Question
from ..measure import inference

# What of a generation config has no part in which tokens follow.
NEUTRAL = {
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "compile_config",
    "disable_compile",
    "transformers_version",
}
SEED = 0  # drawn answers are the same every time


def write(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    temperature: float = 0.0,
    batch_size: int = 8,
    bf16: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """The texts that a causal language model continues each prompt with, without special tokens.

    Greedy at temperature 0, else drawn from the whole distribution (neither top-k, top-p nor anything else that the
    model's own generation config says), always the same draws for the same batches. The generators stay as they were.

    Returns: num_return_sequences texts a question.
    """
    how: dict[str, Any] = dict.fromkeys(_own_settings(model.generation_config)) | {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": num_return_sequences,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    how |= {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}  # unused when greedy
    if temperature > 0:
        how |= {"do_sample": True, "temperature": temperature, "top_k": 0}
    mine = [questions[number] for number in processes.share(len(questions))]
    written: list[list[str]] = []
    device = next(model.parameters()).device
    with inference(model), torch.random.fork_rng(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        torch.manual_seed(SEED)
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            ids, mask = _left_padded([question.input_ids for question in batch], tokenizer.pad_token_id)
            answers = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **how)
            texts = tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
            written += [texts[i : i + num_return_sequences] for i in range(0, len(texts), num_return_sequences)]
            if on_batch:
                on_batch(len(written), len(mine))
    return processes.gathered_list(written, len(questions))


def _own_settings(config: GenerationConfig) -> list[str]:
    """The settings of a model's own generation config that decide which tokens follow."""
    plain = vars(GenerationConfig())
    own = [name for name, value in vars(config).items() if name in plain and value != plain[name]]
    return [name for name in own if name not in NEUTRAL and not name.startswith("_")]


def _left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, so that every row's last token is the last of its row."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
