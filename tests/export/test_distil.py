"""The nearest linear map: against NumPy's least squares on all tokens, and against everything near it."""

import numpy as np
import pytest
import small_models
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForMaskedLM

import beyondlora
from beyondlora.export.distil import distil
from beyondlora.export.lora import adapted_layers

PATH = "model.layers.1.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")


def cera(r=6, targets=("q_proj", "down_proj"), **options):
    model = get_peft_model(
        small_models.llama(),
        beyondlora.CeraConfig(r=r, target_modules=list(targets), task_type="CAUSAL_LM", lora_alpha=12, **options),
    )
    small_models.train_a_little(model, steps=8)
    return model


def batches(rows=48, seed=5):
    ids = small_models.tokens(rows, seed=seed)
    mask = torch.ones_like(ids)
    mask[::3, 8:] = 0
    return [{"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8]} for i in range(0, rows, 8)]


def inputs_and_outputs(model, data, path=PATH):
    """Every token's input and branch output of one layer, in float64: what the code under test never keeps."""
    layer, seen = model.base_model.model.get_submodule(path), []
    handle = layer.register_forward_hook(
        lambda module, args, out: seen.append((args[0], out - module.base_layer(*args)))
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    keep = torch.cat([batch["attention_mask"] for batch in data]).bool()
    x, y = (torch.cat([pair[i] for pair in seen])[keep].double().numpy() for i in (0, 1))
    return x, y


def best_map(x, y, rank):
    """Reduced-rank regression by the book: least squares on all tokens, then the SVD of the fitted values."""
    W = np.linalg.lstsq(x, y, rcond=None)[0].T
    _, _, Vt = np.linalg.svd(x @ W.T, full_matrices=False)
    return Vt[:rank].T @ Vt[:rank] @ W


def albert():
    """One layer's weights, called twice; the adapter's inputs differ."""
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = AlbertForMaskedLM(AlbertConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=64, **sizes))
    model = get_peft_model(base.eval(), beyondlora.CeraConfig(r=6, target_modules=["query"], lora_alpha=12))
    small_models.train_a_little(model, steps=8)
    return model


def residual(x, y, W):
    return np.linalg.norm(y - x @ W.T)


def test_a_layer_called_twice_is_fitted_on_what_reaches_it_both_times():
    model, ids = albert(), small_models.tokens(16)
    adapted = adapted_layers(model)
    (path,) = adapted
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    B, A = distil(model, adapted, data)[path]
    layer, seen = adapted[path][0], []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out - layer.base_layer(*args))))
    with torch.no_grad():
        model(**data[0])
    handle.remove()
    assert len(seen) == 2
    x, y = (torch.cat([pair[i] for pair in seen]).flatten(0, 1).double().numpy() for i in (0, 1))
    assert residual(x, y, (B @ A).numpy()) == pytest.approx(residual(x, y, best_map(x, y, 6)), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6, None])
def test_it_is_the_textbooks_reduced_rank_regression(rank):
    model, data = cera(), batches()
    B, A = distil(model, adapted_layers(model), data, rank=rank)[PATH]
    assert B.shape == (32, rank or 6)
    assert A.shape == (rank or 6, 32)
    x, y = inputs_and_outputs(model, data)
    ours, theirs = residual(x, y, (B @ A).numpy()), residual(x, y, best_map(x, y, rank or 6))
    assert ours == pytest.approx(theirs, rel=1e-6)  # y here passed through float32 on its way
    np.testing.assert_allclose((B @ A).numpy(), best_map(x, y, rank or 6), rtol=0, atol=1e-4 * np.abs(y).max())


def test_no_map_of_that_rank_nearby_is_better():
    model, data = cera(), batches()
    B, A = (factor.numpy() for factor in distil(model, adapted_layers(model), data, rank=2)[PATH])
    x, y = inputs_and_outputs(model, data)
    best, draw = residual(x, y, B @ A), np.random.default_rng(0)
    for scale in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other = (B + scale * draw.normal(size=B.shape)) @ (A + scale * draw.normal(size=A.shape))
            assert residual(x, y, other) > best


def test_a_linear_branch_is_found_again():
    """On inputs where every bottleneck unit is positive, ReLU is the identity, and the nearest map is B·A itself."""
    model = get_peft_model(small_models.Perceptron(), beyondlora.CeraConfig(r=3, target_modules=["first"]))
    adapter = model.base_model.model.first.adapters["default"]
    adapter.core.activation = torch.nn.ReLU()
    torch.manual_seed(0)
    with torch.no_grad():
        adapter.down.weight.abs_()
        adapter.up.weight.normal_()
    B, A = distil(model.eval(), adapted_layers(model), [{"x": torch.rand(400, 16)}])["first"]
    torch.testing.assert_close((B @ A).float(), adapter.up.weight @ adapter.down.weight, rtol=1e-4, atol=1e-4)


def test_inputs_that_span_only_a_part_of_the_space():
    """Directions that the data never take are left at zero instead of being filled with noise."""
    model = get_peft_model(small_models.Perceptron(), beyondlora.CeraConfig(r=3, target_modules=["first"]))
    with torch.no_grad():
        model.base_model.model.first.adapters["default"].up.weight.normal_()
    x = torch.randn(400, 16)
    x[:, 10:] = 0
    _, A = distil(model.eval(), adapted_layers(model), [{"x": x}])["first"]
    assert A[:, 10:].abs().max() < 1e-9
    assert A[:, :10].abs().max() < 10


def test_the_batches_can_be_cut_anywhere():
    model = cera()
    data = batches()
    whole = [{name: torch.cat([batch[name] for batch in data]) for name in data[0]}]
    for left, right in zip(
        distil(model, adapted_layers(model), data).values(),
        distil(model, adapted_layers(model), whole).values(),
        strict=True,
    ):
        torch.testing.assert_close(left[0] @ left[1], right[0] @ right[1], rtol=1e-4, atol=1e-6)


def test_a_distilled_folder_is_nearer_than_nothing_and_says_how_near(tmp_path):
    model, data = cera(), batches()
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model="b", batches=data, distil_on=data)
    x, y = inputs_and_outputs(model, data)
    assert record["form"] == "distilled"
    assert record["layers"][PATH] == pytest.approx(residual(x, y, best_map(x, y, 6)) / np.linalg.norm(y), rel=1e-3)
    assert 0 < record["layers"][PATH] < 1
    assert 0 < record["adapter_relative"] < 1
    loaded = PeftModel.from_pretrained(small_models.llama(), str(tmp_path / "lora"))
    with torch.no_grad():
        live, distilled = (network(input_ids=small_models.tokens()).logits for network in (model, loaded))
    assert (live - distilled).abs().max() > 1e-4


def test_dropout_plays_no_part(tmp_path):
    """A model left in training mode is distilled as it is at inference."""
    model, data = cera(lora_dropout=0.5), batches()
    written = []
    for mode in (False, True):
        model.train(mode)
        beyondlora.export_lora(model, tmp_path / "lora", base_model="b", batches=data, distil_on=data)
        written.append(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_brings_nothing(rank):
    model = cera()
    with pytest.raises(ValueError, match=rf"rank={rank}: .*Give 1 to 6"):
        distil(model, adapted_layers(model), batches(), rank=rank)


def test_too_few_tokens():
    model = cera(targets=["down_proj"])
    with pytest.raises(ValueError, match=r"down_proj has 48 inputs and the data hold 24 tokens"):
        distil(model, adapted_layers(model), [{"input_ids": small_models.tokens()}])


def test_no_data_at_all():
    model = cera()
    with pytest.raises(ValueError, match="the data hold 0 tokens"):
        distil(model, adapted_layers(model), [])
