"""Quantised bases through PEFT's own backends: forward, training, float32 factors, merging where LoRA merges.

The libraries are not part of the development environment (importing one of them changes what torch warns of):
`pip install bitsandbytes torchao` to run these.
"""

from typing import Any

import pytest
import small_models
import torch
from methods import METHODS
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.layer import AdapterLayer

one_of_each_paper = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("cera", "aurora", "stella")], ids=lambda method: method.name
)
mergeable = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("cera-linear", "stella")], ids=lambda m: m.name
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
IDS = small_models.tokens()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model on disk. Hidden size 64: 4-bit blocks hold 64 values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    place = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, max_position_embeddings=64)).save_pretrained(place)
    return place


def bnb_8bit() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bnb_4bit() -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao_int8() -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(params=[bnb_8bit, bnb_4bit, torchao_int8], ids=["bnb-8bit", "bnb-4bit", "torchao-int8"])
def base(request, folder):
    """How to load the model, quantised by transformers."""
    config = request.param()
    return lambda: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapted(method, base):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    return get_peft_model(base(), method.config(**options))


@one_of_each_paper
def test_training_beside_a_quantised_layer(method, base):
    model = adapted(method, base)
    assert all(layer.quantization_backend is not None for layer in model.modules() if isinstance(layer, AdapterLayer))
    plain = logits(base())
    if method.noop_start:
        torch.testing.assert_close(logits(model), plain)
    small_models.train_a_little(model)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    for factor in (m for m in model.modules() if isinstance(m, StiefelLinear)):
        assert factor.weight.dtype == torch.float32
        assert distance_to_stiefel(factor.orthonormal) < 2e-6
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain)


@mergeable
def test_merging_where_loras_merge(method, base):
    model = adapted(method, base)
    small_models.train_a_little(model)
    attached = logits(model)
    lora = get_peft_model(base(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = logits(lora)
    lora.merge_adapter()
    loras_loss = (logits(lora) - before).abs().max()
    model.merge_adapter()
    bound = 3 * loras_loss + 0.05  # the merged weight is quantised again, and so is the unmerged one
    assert (logits(model) - attached).abs().max() < bound
    model.unmerge_adapter()
    assert (logits(model) - attached).abs().max() < bound


def test_a_model_prepared_for_kbit_training_keeps_float32_factors(base):
    model = prepare_model_for_kbit_training(base())
    stella = next(m for m in METHODS if m.name == "stella")
    model = get_peft_model(model, stella.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    small_models.train_a_little(model)
    factors = [m for m in model.modules() if isinstance(m, StiefelLinear)]
    assert max(distance_to_stiefel(factor.orthonormal).item() for factor in factors) < 2e-6
