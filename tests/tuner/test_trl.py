"""TRL's trainers: `peft_config=` is all a user changes, on a quantised base too; what DPO takes for its reference."""

import copy
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import small_models
import torch
from datasets import Dataset
from methods import every_method, one_of_each_paper
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from beyondlora import StellaConfig
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear

trl = pytest.importorskip("trl")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


BASES = {
    "plain": None,
    "8-bit": BitsAndBytesConfig(load_in_8bit=True),
    "4-bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
}


@one_of_each_paper
@pytest.mark.parametrize("quantised", BASES)
def test_sfttrainer_takes_each_config(method, quantised, house, tmp_path):
    if quantised != "plain":
        pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(
        house / "base", dtype=torch.float32, device_map="cpu", quantization_config=BASES[quantised]
    )
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
    # The trainer rounds what it trains beside a quantised base, and the factors are back when it starts.
    assert {p.dtype for p in before.values()} == {torch.float32 if quantised == "plain" else torch.bfloat16}
    trainer.train()
    assert all(f".{method.prefix}" in name for name in before)
    moved = [(p - before[n]).abs().max() for n, p in trainer.model.named_parameters() if n in before]
    assert max(moved) > 0.01  # three steps of 0.02; rounding to bfloat16 is below
    for factor in (m for m in trainer.model.modules() if isinstance(m, StiefelLinear)):
        assert factor.weight.dtype == torch.float32
        assert distance_to_stiefel(factor.orthonormal) < 2e-6


@pytest.mark.parametrize(("start", "is_reference"), [("zero", True), (True, False)])
def test_a_policy_starts_as_its_reference_only_from_zero(start, is_reference, house, tmp_path):
    """DPO's reference is the model with its adapter disabled; its loss is ln 2 where the two agree."""
    rows = Dataset.from_dict({"prompt": ["a "] * 4, "chosen": ["cat sat"] * 4, "rejected": ["dog ran"] * 4})
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(house / "base", dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(house / "base"),
        peft_config=StellaConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=start),
    )  # fmt: skip
    trainer.train()
    first = trainer.state.log_history[0]["loss"]
    assert (first == pytest.approx(math.log(2), abs=1e-4)) is is_reference


# What an engine that generates for GRPO gets ------------------------------------------------------------------------


def sent_to_vllm(model):
    """The weights that TRL sends to vLLM before it generates; vLLM itself is no part of it."""
    generation = pytest.importorskip("trl.generation.vllm_generation").VLLMGeneration
    sharing = SimpleNamespace(gather_params=lambda weights: nullcontext(), is_fsdp=False)
    sender = SimpleNamespace(model=model, _dist=sharing, _fix_param_name_to_vllm=lambda name, **_: name)
    return {name: weight.clone() for name, weight in generation._iter_named_params(sender)}


@every_method
@pytest.mark.parametrize("targets", [{"target_modules": ["q_proj", "embed_tokens"]}, {"target_parameters": EXPERTS}])
def test_vllm_gets_the_merged_model_and_the_policy_is_what_it_was(method, targets):
    base = small_models.mixtral()
    options = {"target_modules": [], **targets, "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), method.config(**options))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    if method.merge == "refused":
        with pytest.raises(ValueError, match="Cannot merge"):
            sent_to_vllm(model)
    else:
        sent = sent_to_vllm(model)
        merged = copy.deepcopy(model).merge_and_unload()
        assert dict(merged.named_parameters()).keys() == sent.keys()
        for name, weight in merged.named_parameters():
            torch.testing.assert_close(sent[name], weight, rtol=0, atol=1e-6)
        assert any(not torch.equal(sent[name], weight) for name, weight in base.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
