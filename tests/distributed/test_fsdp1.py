"""FSDP1 (`FullyShardedDataParallel`), two gloo processes on a CPU: adapters train as one process trains them.

As accelerate wraps a PEFT model: every module that trains by itself, inside the transformer's blocks, with flat
parameters or with what is here of each weight; and blocks only. FSDP2 is in test_two_processes.py.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from methods import METHODS, Method
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_processes import Skipping, Weights, assert_close, both, join, leave

from beyondlora.manifold import StiefelLinear, distance_to_stiefel
from beyondlora.manifold.guard import check_manifold, check_state

FORMS = {  # use_orig_params, whether modules that train are wrapped by themselves, and how weights are cut
    "flat": (False, True, ShardingStrategy.FULL_SHARD),
    "flat, whole": (False, True, ShardingStrategy.NO_SHARD),
    "parts": (True, True, ShardingStrategy.FULL_SHARD),
    "blocks": (True, False, ShardingStrategy.FULL_SHARD),
    "blocks, recomputed": (True, False, ShardingStrategy.SHARD_GRAD_OP),
}
TRIED = [method for method in METHODS if method.name in ("cera", "aurora", "stella", "stella-diag")]
STEPS = 6


def adapted(method: Method) -> PeftModel:
    torch.manual_seed(3)
    config = method.config(target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    return get_peft_model(small_models.llama().double(), config, autocast_adapter_dtype=False)


def wrapped(model: PeftModel, form: str) -> FullyShardedDataParallel:
    use_orig_params, by_themselves, strategy = FORMS[form]
    policy = fsdp_auto_wrap_policy(model) if by_themselves else ModuleWrapPolicy({LlamaDecoderLayer})
    if "recomputed" in form:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        sharding_strategy=strategy,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)


def backward(model: nn.Module, step: int, rank: int, world: int) -> None:
    ids = small_models.tokens(rows=4, seed=step)[rank::world]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world: int = 1) -> None:
    model.train()
    for step in range(STEPS):
        backward(model, step, rank, world)
        optimizer.step()
        optimizer.zero_grad()


def trained_weights(model: nn.Module) -> Weights:
    weights = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: weights[name].detach().clone() for name in sorted(weights)}


def whole_weights(model: FullyShardedDataParallel) -> Weights:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return trained_weights(model)


# What each of the two processes does ------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: Path) -> None:
    join(rank, port)
    found: dict[str, Any] = {}
    for form in FORMS:
        for method in TRIED:
            model = wrapped(adapted(method), form)
            optimizer = adamw(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(model, optimizer, rank, 2)
                check_manifold(model)
            found[form, method.name] = whole_weights(model)
            found[form, method.name, "said"] = [str(w.message) for w in caught if "Stiefel" in str(w.message)]
            if method.name == "stella":
                found[form, "saved"] = saved(model)
                found[form, "poison"] = poisoned(model, optimizer, rank == 0 or "whole" in form, rank)
                found[form, "moved"] = moved(model, optimizer, rank)
    leave(found, folder / f"{rank}.pt")


def saved(model: FullyShardedDataParallel) -> Weights:
    """The adapter's file, as accelerate gathers it."""
    everywhere = FullStateDictConfig(rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, everywhere):
        state = get_peft_model_state_dict(model, adapter_name="default")
    check_state(model, state)
    return state


def poisoned(model: nn.Module, optimizer: torch.optim.Optimizer, here: bool, rank: int) -> tuple[str, bool]:
    """What a nan in the gradient here does, and whether the factors are where they were. Whole ones are alike."""
    before = whole_weights(model)
    for step, stepping in enumerate((Skipping(optimizer.param_groups), optimizer)):  # a skipped step is no error
        message = ""
        backward(model, step, rank, 2)
        if here:
            largest = max((p for p in model.parameters() if p.grad is not None), key=lambda p: p.grad.numel())
            largest.grad.fill_(float("nan"))
        try:
            stepping.step()
        except FloatingPointError as error:
            message = str(error)
        optimizer.zero_grad()
    after = whole_weights(model)
    # Of what is no factor only the one that got the nan may have moved, and is of no interest.
    same = (torch.allclose(after[name], before[name], rtol=0, atol=1e-14) for name in before if "_S" not in name)
    return message, all(same)


def moved(model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[list[str], float]:
    """What is said of factors that somebody has moved a little, and how far they are off after the next step."""
    optimizer.state.clear()
    with FullyShardedDataParallel.summon_full_params(model), torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, StiefelLinear):
                layer.weight.mul_(1.001)
            elif type(layer).__name__ == "Dense":
                layer.weight.copy_(torch.eye(len(layer.weight)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(model, 0, rank, 2)
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        factors = [layer.orthonormal.detach() for layer in model.modules() if isinstance(layer, StiefelLinear)]
        off = max(distance_to_stiefel(factor).item() for factor in factors)
    return [str(warning.message) for warning in caught if "Stiefel" in str(warning.message)], off


# What is true of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return both(worker, tmp_path_factory.mktemp("fsdp1"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Weights]:
    weights = {}
    for method in TRIED:
        model = adapted(method)
        train(model, adamw(model))
        weights[method.name] = trained_weights(model)
    return weights


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", TRIED, ids=lambda method: method.name)
def test_two_processes_train_as_one_does(method: Method, form: str, found: Any, expected: dict[str, Weights]) -> None:
    for process in found:
        assert_close(process[form, method.name], expected[method.name], atol=1e-9)
        assert process[form, method.name, "said"] == []


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_is_the_adapters_file(form: str, found: Any, expected: dict[str, Weights]) -> None:
    """peft 0.21 itself finds nothing to save of its LoRA."""
    ours = {name.replace(".default", ""): weight for name, weight in expected["stella"].items()}
    for process in found:
        assert_close(dict(sorted(process[form, "saved"].items())), ours, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_of_one_process_is_refused_by_both_and_the_factors_stay(form: str, found: Any) -> None:
    for process in found:
        message, stayed = process[form, "poison"]
        assert "AdamW made Stiefel factors nan or infinite" in message
        assert stayed


@pytest.mark.parametrize("form", FORMS)
def test_a_factor_that_was_moved_is_brought_back_by_both_and_said(form: str, found: Any) -> None:
    for process in found:
        said, off = process[form, "moved"]
        assert said
        assert all("had left the manifold" in warning for warning in said)
        assert off <= 1e-9


def evaluate_few_experts(rank: int, port: int, folder: Path) -> None:
    """Each process has tokens for other experts; every expert's parts are put together when they are called."""
    join(rank, port)
    torch.manual_seed(3)
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"], "init_lora_weights": False}
    config = TRIED[0].config(**options)
    model = get_peft_model(small_models.mixtral(experts=16).double(), config, autocast_adapter_dtype=False).eval()
    ids = small_models.tokens(rows=2, length=3)[rank::2]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        leave([alone, wrapped(model, "flat").eval()(input_ids=ids).logits], folder / f"{rank}.pt")


def test_experts_that_have_tokens_in_one_process_only_are_evaluated(tmp_path: Path) -> None:
    for alone, together in both(evaluate_few_experts, tmp_path):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
