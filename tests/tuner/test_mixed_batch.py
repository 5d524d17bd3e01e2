"""Batches that mix adapters: each row must come out as from a model with that row's adapter alone."""

import pytest
import small_models
import torch
from methods import METHODS, every_method, one_of_each_paper
from peft import get_peft_model
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from beyondlora import CeraConfig, StellaConfig
from beyondlora.tuner.layer import AdapterLayer

IDS = small_models.tokens(rows=5)
NAMES = ["one", "__base__", "two", "one", "two"]


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    )
    return BartForConditionalGeneration(config).eval()


def with_two(method, base: nn.Module, **options):
    """A model with random adapters "one" on q and v, "two" on v alone: layers differ in what they know."""
    torch.manual_seed(1)
    options = {"init_lora_weights": False, **options}
    model = get_peft_model(base, method.config(target_modules=["q_proj", "v_proj"], **options), adapter_name="one")
    model.add_adapter("two", method.config(target_modules=["v_proj"], **options | {"r": 2}))
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            for adapter in module.adapters.values():
                adapter.scaling = 400.0  # far from the base model's output
    return model.eval()


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def row_by_row(model, run, names=NAMES):
    """The oracle: each row from a run of its own, with the one adapter set, or none."""
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(row))
        else:
            model.set_adapter(name)
            rows.append(run(row))
    return rows


@every_method
def test_every_row_gets_its_own_adapter_and_no_other(method):
    model = with_two(method, small_models.llama(), task_type="CAUSAL_LM")
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, lambda row: model(IDS[row : row + 1]).logits))
        mixed = model(IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)  # float32, other batch sizes
    assert not torch.allclose(model(IDS).logits, mixed, atol=1e-2)


@one_of_each_paper
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [small_models.llama, bart], ids=["decoder", "encoder-decoder"])
def test_generation_of_mixed_batches(method, beams, family):
    task = "CAUSAL_LM" if family is small_models.llama else "SEQ_2_SEQ_LM"
    model = with_two(method, family(), task_type=task)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}

    def generate(ids, **more):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)

    expected = row_by_row(model, lambda row: generate(IDS[row : row + 1]))
    assert torch.equal(generate(IDS, adapter_names=NAMES), torch.cat(expected))
    assert len({tuple(row.flatten().tolist()) for row in expected}) > 1
    assert hooks(model) == 0


@every_method
def test_modules_to_save_follow_the_row(method):
    model = with_two(method, small_models.llama(), task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    with torch.no_grad():
        for index, copied in enumerate(model.base_model.model.lm_head.modules_to_save.values()):
            copied.weight.mul_(index + 2)
        expected = torch.cat(row_by_row(model, lambda row: model(IDS[row : row + 1]).logits))
        torch.testing.assert_close(model(IDS, adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-4)


@every_method
def test_half_precision_and_convolutions(method):
    base = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 5)).to(torch.bfloat16)
    options = {"init_lora_weights": False, "r": 2}
    model = get_peft_model(base, method.config(target_modules=["0", "2"], **options), adapter_name="one")
    model.add_adapter("two", method.config(target_modules=["0"], **options))
    x = torch.randn(5, 2, 5, 5, dtype=torch.bfloat16)
    model.eval()
    with torch.no_grad():
        expected = torch.cat(row_by_row(model, lambda row: model(x[row : row + 1])))
        mixed = model(x, adapter_names=NAMES)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, expected, rtol=2e-2, atol=7e-2)  # two roundings of bfloat16 values up to 8


def perceptron(**options):
    options = {"r": 2, "target_modules": ["first"], **options}
    model = get_peft_model(small_models.Perceptron(), StellaConfig(**options), adapter_name="one")
    model.add_adapter("two", StellaConfig(**options))
    return model.eval()


def test_an_exception_in_forward_leaves_no_hook_behind():
    model = perceptron()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 7), adapter_names=["one", "two"])
    assert hooks(model) == 0
    model(torch.randn(2, 16))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one", "three", "__base__"], r"Trying to infer with non-existing adapter\(s\): three. Known are .*'one'"),
        (["one"], "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 3"),
        ("one", "adapter_names is a str; give a list"),
    ],
)
def test_names_that_fit_nothing_are_refused(names, message):
    model = perceptron()
    with pytest.raises((ValueError, TypeError), match=message):
        model(torch.randn(3, 16), adapter_names=names)
    assert hooks(model) == 0


def test_training_and_merged_adapters_are_refused_with_the_way_out():
    model = perceptron()
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
        model(torch.randn(2, 16), adapter_names=["one", "two"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match=r"training mode. Call model.eval\(\) first"):
        model(torch.randn(2, 16), adapter_names=["one", "two"])


def test_disabled_adapters_stay_disabled():
    model, x = perceptron(), torch.randn(2, 16)
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=["one", "two"]), small_models.Perceptron()(x))


def test_one_adapter_for_all_rows_is_the_plain_forward():
    for method in METHODS:
        model = with_two(method, small_models.llama(), task_type="CAUSAL_LM")
        model.set_adapter("one")
        with torch.no_grad():
            torch.testing.assert_close(model(IDS, adapter_names=["one"] * 5).logits, model(IDS).logits)


def test_a_plain_forward_pays_for_no_hook():
    model = get_peft_model(small_models.Perceptron(), CeraConfig(r=2, target_modules=["first"]))
    model(torch.randn(2, 16))
    assert hooks(model) == 0
