"""TRL's SFTTrainer with each config: `peft_config=` is all a user changes."""

import pytest
import torch
from datasets import Dataset
from methods import METHODS

from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear

trl = pytest.importorskip("trl")
one_of_each_paper = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("cera", "aurora", "stella")], ids=lambda method: method.name
)
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@one_of_each_paper
def test_sfttrainer_takes_each_config(method, house, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(house / "base", dtype=torch.float32)
    rows = Dataset.from_dict({"text": [f"{number} is followed by {number + 1}." for number in range(16)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        max_steps=3,
        learning_rate=0.02,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_length=32,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(house / "base"),
        peft_config=method.config(target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert before
    assert all(f".{method.prefix}" in name for name in before)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    for factor in (m for m in trainer.model.modules() if isinstance(m, StiefelLinear)):
        assert factor.weight.dtype == torch.float32
        assert distance_to_stiefel(factor.orthonormal) < 2e-6
