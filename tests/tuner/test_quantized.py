"""Quantised bases through PEFT's own backends: forward, training, float32 factors, merging where LoRA merges.

HQQ and AQLM are not part of the development environment (importing the one takes seconds, the other brings a compiler):
`pip install hqq 'aqlm[cpu]'` to run their tests.
"""

from collections import OrderedDict
from typing import Any

import pytest
import small_models
import torch
from methods import METHODS, one_of_each_paper
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.layer import AdapterLayer
from beyondlora.tuner.packing import keep_unpacked

mergeable = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.name in ("cera-linear", "stella")], ids=lambda m: m.name
)
# torchao 0.17 warns of the form that 0.18 has dropped, and peft 0.20 knows no other.
pytestmark = pytest.mark.filterwarnings("ignore:.*pytorch/ao/issues/2752:UserWarning")
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


def loaded(folder, config: Any = None) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


def bnb_8bit(folder) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    return loaded(folder, BitsAndBytesConfig(load_in_8bit=True))


def bnb_4bit(folder) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return loaded(folder, nf4)


def torchao_int8(folder) -> nn.Module:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return loaded(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def hqq_4bit(folder) -> nn.Module:
    quantize = pytest.importorskip("hqq.core.quantize")
    model = loaded(folder).requires_grad_(False)  # transformers 5 does not load with HQQ: by its own means
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            quantised = quantize.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, quantised)
    return model


@pytest.fixture(params=[bnb_8bit, bnb_4bit, torchao_int8, hqq_4bit], ids=lambda load: load.__name__)
def base(request, folder):
    """How to load the model quantised."""
    return lambda: request.param(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def plain(base) -> nn.Module:
    model = base()
    keep_unpacked(model)  # as an adapter does
    return model


def adapted(method, base):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
    return get_peft_model(base(), method.config(**options))


@one_of_each_paper
def test_training_beside_a_quantised_layer(method, base):
    model = adapted(method, base)
    assert all(layer.quantization_backend is not None for layer in model.modules() if isinstance(layer, AdapterLayer))
    before = logits(plain(base))
    if method.noop_start:
        torch.testing.assert_close(logits(model), before)
    small_models.train_a_little(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    for factor in (m for m in model.modules() if isinstance(m, StiefelLinear)):
        assert factor.weight.dtype == torch.float32
        assert distance_to_stiefel(factor.orthonormal) < 2e-6
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)


@mergeable
@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear may get different:UserWarning")
def test_merging_where_loras_merge(method, base, folder):
    model = adapted(method, base)
    small_models.train_a_little(model)
    attached = logits(model)
    model.merge_adapter()
    quantising_costs = (logits(plain(base)) - logits(loaded(folder))).abs().max()
    bound = 2 * quantising_costs  # the merged weight is quantised again, and so is the unmerged one
    assert (logits(model) - attached).abs().max() < bound < 0.5 * (attached - logits(plain(base))).abs().max()
    model.unmerge_adapter()
    assert (logits(model) - attached).abs().max() < bound


def test_a_weight_packed_by_an_evaluation_before_is_neither_trained_beside_nor_merged_into(folder):
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 only")
    base = bnb_4bit(folder)
    logits(base)
    stella = next(m for m in METHODS if m.name == "stella")
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match=r"packed this layer's 4-bit weight.*nothing before it would learn"):
        get_peft_model(base, stella.config(**options))
    model = get_peft_model(base, stella.config(**options, inference_mode=True))
    attached = logits(model)
    with pytest.raises(ValueError, match="packed this layer's 4-bit weight"):
        model.merge_adapter()
    assert torch.equal(logits(model), attached)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # PEFT calls it
def test_a_model_prepared_for_kbit_training_keeps_float32_factors(base):
    model = prepare_model_for_kbit_training(base(), gradient_checkpointing_kwargs={"use_reentrant": False})
    stella = next(m for m in METHODS if m.name == "stella")
    model = get_peft_model(model, stella.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    small_models.train_a_little(model)
    factors = [m for m in model.modules() if isinstance(m, StiefelLinear)]
    assert max(distance_to_stiefel(factor.orthonormal).item() for factor in factors) < 2e-6


# A backend whose weights cannot be written again ---------------------------------------------------------------------


def aqlm_model() -> nn.Module:
    """A layer of one codebook that any CPU can read; AQLM computes no gradient of its input there."""
    aqlm = pytest.importorskip("aqlm")
    torch.manual_seed(0)
    shape = {"in_group_size": 8, "out_group_size": 1, "num_codebooks": 1, "nbits_per_codebook": 8}
    layer = aqlm.QuantizedLinear(32, 24, **shape, bias=False).requires_grad_(False)
    layer.codebooks.copy_(torch.randn_like(layer.codebooks))
    layer.codes.copy_(torch.randint(-128, 127, layer.codes.shape))
    layer.scales.fill_(0.3)
    return nn.Sequential(OrderedDict(quantised=layer, head=nn.Linear(24, 4)))


@one_of_each_paper
def test_beside_a_layer_that_can_only_be_read_an_adapter_trains_and_refuses_to_merge(method):
    base, x = aqlm_model(), torch.randn(5, 32)
    before = base(x)
    model = get_peft_model(base, method.config(target_modules=["quantised"], lora_dropout=0.0))
    if method.noop_start:
        torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    first = model(x).square().sum()
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x)
    assert trained.square().sum() < 0.5 * first
    reason = "nonlinear" if method.name == "cera" else "Cannot merge into a QuantizedLinear"
    with pytest.raises(ValueError, match=reason):
        model.merge_adapter()
    torch.testing.assert_close(model(x), trained)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), before)
