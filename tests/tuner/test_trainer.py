"""The Riemannian step where users take it: transformers' Trainer, accelerate, gradient accumulation, schedulers."""

import pytest
import small_models
import torch
from accelerate import Accelerator
from datasets import Dataset
from methods import every_method
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from beyondlora import StellaConfig
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def rows(count: int = 16) -> Dataset:
    ids = small_models.tokens(rows=count)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=0.02,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        **options,
    )


def off_manifold(model) -> float:
    factors = [m.orthonormal for m in model.modules() if isinstance(m, StiefelLinear)]
    return max((distance_to_stiefel(factor).item() for factor in factors), default=0.0)


@every_method
def test_trainer_trains_every_method_on_the_manifold(method, tmp_path):
    model = get_peft_model(small_models.llama(), method.config(target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    Trainer(model, arguments(tmp_path, lr_scheduler_type="cosine"), train_dataset=rows()).train()
    assert off_manifold(model) < 2e-6
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"lr_scheduler_type": "linear", "warmup_steps": 2},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_the_trainers_options_keep_the_factors_on_the_manifold(options, tmp_path):
    model = get_peft_model(small_models.llama(), StellaConfig(r=4, target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "stella_U" in name}
    Trainer(model, arguments(tmp_path, **options), train_dataset=rows()).train()
    assert off_manifold(model) < 2e-6
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_an_accelerate_loop_equals_a_plain_loop():
    def run(accelerated: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(small_models.llama(), StellaConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        accelerator = Accelerator(cpu=True)
        if accelerated:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for step in range(4):
            ids = small_models.tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    plain, accelerated = run(False), run(True)
    assert plain.keys() == accelerated.keys()
    assert all(torch.equal(plain[name], accelerated[name]) for name in plain)
