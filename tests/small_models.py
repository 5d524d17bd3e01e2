"""Small randomly initialised models of several families, for tests that need a model but not a trained one."""

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)


def llama(seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Hidden size 32, 2 layers, grouped-query attention (k and v are 16×32), MLP 48."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Width 32, 2 layers; its linear layers are transformers' Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def bert(seed: int = 0) -> BertForSequenceClassification:
    """Hidden size 32, 2 layers, a classification head with 3 labels."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


MIXTURE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


def mixtral(seed: int = 0, experts: int = 4) -> MixtralForCausalLM:
    """Width 16, 2 layers of experts (12 wide) of which a token goes to two; their weights are parameters (E, M, N)."""
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**MIXTURE, "num_local_experts": experts})).eval()


def gpt_oss(seed: int = 0) -> GptOssForCausalLM:
    """The same sizes; weights as (E, N, M), biases, and gates of its own."""
    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**MIXTURE, layer_types=["full_attention", "full_attention"])).eval()
    for name, weight in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(weight, std=0.3)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids (rows, length) from the vocabulary of the models above."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


class Perceptron(nn.Module):
    """Two linear layers with biases, 16 → 24 → 10; no config, no hidden size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 24)
        self.act = nn.ReLU()
        self.second = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))


def train_a_little(model: nn.Module, *, steps: int = 3, learning_rate: float = 0.05, seed: int = 2) -> None:
    """Move every trainable weight of a causal language model, so that no adapter is at its start any more."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for step in range(steps):
        ids = tokens(seed=seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
