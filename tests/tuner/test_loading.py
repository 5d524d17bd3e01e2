"""Stiefel factors on half-precision bases: in float32 and orthonormal after every way an adapter gets onto a model."""

import warnings

import pytest
import small_models
import torch
from methods import METHODS, since_peft_0_21
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import beyondlora
from beyondlora.export.merged import export_merged
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear

STELLA = next(method for method in METHODS if method.name == "stella")
CONFIG = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "task_type": "CAUSAL_LM"}

half_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


def factors(model):
    found = {name: m for name, m in model.named_modules() if isinstance(m, StiefelLinear)}
    assert found
    return found


def check(model) -> None:
    for name, factor in factors(model).items():
        assert factor.weight.dtype == torch.float32, name
        assert distance_to_stiefel(factor.orthonormal) < 1e-5, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained adapter with its base model beside it, as from_pretrained finds them."""
    place = tmp_path_factory.mktemp("stella")
    base = small_models.llama()
    base.save_pretrained(place / "base")
    base.name_or_path = str(place / "base")
    model = get_peft_model(base, STELLA.config(**CONFIG))
    small_models.train_a_little(model)
    model.save_pretrained(place / "adapter")
    return place


def trained(folder):
    return PeftModel.from_pretrained(small_models.llama(), folder / "adapter")


def check_loaded(model, folder) -> None:
    """Bit for bit the factors that were saved."""
    check(model)
    saved = {name.split("model.")[-1]: m.weight for name, m in factors(trained(folder)).items()}
    for name, factor in factors(model).items():
        assert torch.equal(factor.weight, saved[name.split("model.")[-1].replace(".other", ".default")]), name


@half_precision
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_new_adapters(dtype, autocast_adapter_dtype):
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    model = get_peft_model(small_models.llama().to(dtype), STELLA.config(**CONFIG), **options)
    model.add_adapter("other", STELLA.config(**CONFIG), **options)
    check(model)


@half_precision
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_pefts_loading(dtype, autocast_adapter_dtype, low_cpu_mem_usage, folder):
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(small_models.llama().to(dtype), folder / "adapter", **options)
    check_loaded(model, folder)
    model.load_adapter(folder / "adapter", adapter_name="other", **options)
    check_loaded(model, folder)


@half_precision
def test_transformers_add_adapter(dtype, monkeypatch):
    # transformers 5.24 opens this door to peft 0.22 only, which is not out: behind the door it is the same.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    base = small_models.llama().to(dtype)
    base.add_adapter(STELLA.config(**CONFIG))
    check(base)


@half_precision
def test_transformers_load_adapter(dtype, folder):
    other = small_models.llama().to(dtype)
    other.load_adapter(str(folder / "adapter"))
    check_loaded(other, folder)


@half_precision
def test_auto_classes_load_the_base_model_too(dtype, folder):
    check_loaded(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=dtype), folder)


@half_precision
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_injection_and_state_dicts(dtype, low_cpu_mem_usage, folder):
    state = get_peft_model_state_dict(trained(folder), save_embedding_layers=False)
    model = get_peft_model(small_models.llama().to(dtype), STELLA.config(**CONFIG))
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    check_loaded(model, folder)
    injected = inject_adapter_in_model(
        STELLA.config(**CONFIG), small_models.llama().to(dtype), low_cpu_mem_usage=low_cpu_mem_usage
    )
    inner = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(injected, inner, low_cpu_mem_usage=low_cpu_mem_usage)
    check_loaded(injected, folder)


@half_precision
def test_hotswapping_and_sums(dtype, folder):
    model = get_peft_model(small_models.llama().to(dtype), STELLA.config(**CONFIG))
    beyondlora.hotswap_adapter(model, folder / "adapter")
    check_loaded(model, folder)
    model.add_weighted_adapter(["default"], [0.3], "sum")
    check(model)


@half_precision
def test_a_model_converted_afterwards(dtype, folder):
    for convert in (lambda model: model.to(dtype), lambda model: model.bfloat16(), lambda model: model.half()):
        check_loaded(convert(trained(folder)), folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_checkpoint_that_somebody_rounded_to_bfloat16(low_cpu_mem_usage, folder):
    """Rounding moves an entry by up to 2^-9 of itself: the nearest orthonormal factor is not further away."""
    state = get_peft_model_state_dict(trained(folder), save_embedding_layers=False)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    off = max(distance_to_stiefel(t if len(t) > t.shape[1] else t.mT) for n, t in rounded.items() if "_S" not in n)
    assert off > 1e-4
    model = get_peft_model(small_models.llama(), STELLA.config(**CONFIG))
    set_peft_model_state_dict(model, rounded, low_cpu_mem_usage=low_cpu_mem_usage)
    check(model)
    for name, factor in factors(model).items():
        saved = state[name.replace(".default", ".weight")]
        torch.testing.assert_close(factor.weight, saved, rtol=0, atol=2 * saved.abs().max().item() * 2**-9)


def test_a_checkpoint_that_was_never_orthonormal_is_loaded_as_it_is_with_a_warning(folder):
    state = get_peft_model_state_dict(trained(folder), save_embedding_layers=False)
    name = next(name for name in state if "stella_U" in name)
    state[name] = 1.2 * state[name]
    model = get_peft_model(small_models.llama(), STELLA.config(**CONFIG))
    with pytest.warns(UserWarning, match=r"off by 0.44: the checkpoint was not trained on the Stiefel manifold"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(factors(model)[name.replace(".weight", ".default")].weight, state[name])


def moved(folder, by):
    """A trained adapter of which somebody has changed a factor in a way that no counter sees."""
    model = trained(folder)
    name, factor = next(iter(factors(model).items()))
    factor.weight.data.mul_(1 + by)
    return model, name, factor


@since_peft_0_21
def test_what_is_saved_a_little_off_is_brought_back_and_said_so(folder, tmp_path):
    model, _, _ = moved(folder, 1e-3)
    with pytest.warns(UserWarning, match="left the manifold by .*brought back"):
        model.save_pretrained(tmp_path)
    check(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*manifold")
        model.save_pretrained(tmp_path)  # nothing more to say
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        if "stella_U" in name or "stella_Vt" in name:
            assert distance_to_stiefel(value if value.shape[0] > value.shape[1] else value.mT) < 1e-6, name


@since_peft_0_21
def test_weights_gathered_from_elsewhere_are_looked_at_too(folder, tmp_path):
    model = trained(folder)
    state = {name: value * 1.5 if "stella_U" in name else value for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="off the manifold"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("door", [pytest.param("save", marks=since_peft_0_21), "merge", "export", "export merged"])
def test_what_is_far_off_is_neither_saved_nor_merged_nor_exported(door, folder, tmp_path):
    model, _, _ = moved(folder, 0.5)
    doors = {
        "save": lambda: model.save_pretrained(tmp_path / "out"),
        "merge": lambda: model.merge_and_unload(),
        "export": lambda: beyondlora.export_lora(model, tmp_path / "out"),
        "export merged": lambda: export_merged(
            model, tmp_path / "out", base_model="", processor=None, reload=lambda path: model, batches=[]
        ),
    }
    with pytest.raises(ValueError, match=r"off the manifold by 1\.[23].*Load a good checkpoint"):
        doors[door]()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_optimizer_over_two_adapters_steps_the_active_one_alone(folder):
    model = trained(folder)
    model.add_adapter("second", STELLA.config(**CONFIG))
    every = [p for p in model.parameters() if any(p is factor.weight for factor in factors(model).values())]
    optimizer = torch.optim.AdamW(every, lr=0.05)
    for active, other in (("second", "default"), ("default", "second")):
        model.set_adapter(active)
        before = {name: factor.weight.detach().clone() for name, factor in factors(model).items()}
        for seed in range(2):
            ids = small_models.tokens(seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, factor in factors(model).items():
            assert torch.equal(factor.weight, before[name]) == (f".{other}" in name), name
        check(model)
