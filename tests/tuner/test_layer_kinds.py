"""Adapters beside embeddings and convolutions: linear layers on one-hot rows and on patches, which is the oracle."""

import copy

import pytest
import small_models
import torch
from methods import METHODS, every_method
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from beyondlora import CeraConfig, StellaConfig
from beyondlora.adapters.aurora import StaticAuroraAdapter
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.tuner.base_layers import reading_of
from beyondlora.tuner.config import LayerSpec
from beyondlora.tuner.layer import AdapterLayer

mergeable = pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "exact"], ids=lambda m: m.name)

CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 6, 4, stride=2, padding=1), (5, 3, 11)),
    "2d": (nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (5, 3, 8, 9)),
    "2d-same": (nn.Conv2d(3, 6, 3, padding="same"), (5, 3, 8, 9)),
    "2d-reflect": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), (5, 3, 8, 9)),
    "2d-unbatched": (nn.Conv2d(3, 6, 3), (3, 8, 9)),
    "3d": (nn.Conv3d(3, 6, 2), (2, 3, 4, 5, 3)),
}
every_convolution = pytest.mark.parametrize("kind", CONVOLUTIONS)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.tail = copy.deepcopy(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(x)


def adapted(method, layer, **options):
    torch.manual_seed(0)
    model = get_peft_model(
        One(layer), method.config(target_modules=["tail"], init_lora_weights=False, **options)
    ).eval()
    adapter_layer = model.base_model.model.tail
    with torch.no_grad():  # away from every start: S is not the identity, B not zero
        for module in adapter_layer.adapters["default"].parts().values():
            if not isinstance(module, StiefelLinear):
                module.weight.add_(0.1 * torch.randn_like(module.weight))
    return model, adapter_layer


def static_aurora(adapter) -> bool:
    return type(adapter).__name__ == "StaticAuroraAdapter"


def branch_on_rows(adapter, rows: torch.Tensor) -> torch.Tensor:
    """The branch as a composition of its parts on rows (..., N): what the adapter would be beside an nn.Linear."""
    down = adapter.static_down_weight() if static_aurora(adapter) else adapter.down.weight
    z = F.linear(rows, down)
    return adapter.scaling * F.linear(z if static_aurora(adapter) else adapter.core(z), adapter.up.weight)


def patches(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Every patch of the input as a row, (B, L..., N): the layer itself, with the identity for its kernel."""
    twin = copy.deepcopy(layer)
    size = layer.weight[0].numel()
    twin.weight = nn.Parameter(torch.eye(size).reshape(size, *layer.weight.shape[1:]))
    twin.bias = None
    return twin(x).movedim(-1 - len(layer.kernel_size), -1)


@every_method
@every_convolution
def test_a_convolutions_adapter_is_the_linear_one_on_every_patch(method, kind):
    convolution, shape = CONVOLUTIONS[kind]
    model, layer = adapted(method, convolution)
    x = torch.randn(shape)
    rows = branch_on_rows(layer.adapters["default"], patches(convolution, x))
    expected = convolution(x) + rows.movedim(-1, -1 - len(convolution.kernel_size))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)  # float32, sums of 24 products
    assert not torch.allclose(model(x), convolution(x), atol=1e-3)


@every_method
def test_an_embeddings_adapter_is_the_linear_one_on_one_hot_rows(method):
    embedding = nn.Embedding(11, 7)
    model, layer = adapted(method, embedding, lora_dropout=0.5)
    ids = torch.tensor([[0, 3, 10], [4, 4, 1]])
    expected = embedding(ids) + branch_on_rows(layer.adapters["default"], F.one_hot(ids, 11).float())
    torch.testing.assert_close(model(ids), expected)


@mergeable
@every_convolution
def test_convolutions_merge(method, kind):
    convolution, shape = CONVOLUTIONS[kind]
    model, layer = adapted(method, convolution)
    x = torch.randn(shape)
    attached = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), attached, rtol=1e-4, atol=1e-5)
    assert not torch.equal(layer.get_base_layer().weight, convolution.weight)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, convolution.weight)


@every_method
def test_embeddings_merge_exactly_whatever_the_core(method):
    """A nonlinear core, too, and without a warning: on one-hot rows it only ever sees columns of the projection."""
    model, _ = adapted(method, nn.Embedding(11, 7), lora_dropout=0.5)
    ids = torch.arange(11)
    attached = model(ids)
    merged = model.train().merge_and_unload()  # dropout is no part of a weight
    assert isinstance(merged.tail, nn.Embedding)
    torch.testing.assert_close(merged(ids), attached)


@pytest.mark.parametrize("layer", [nn.Embedding(11, 7), nn.Conv2d(3, 6, 3)], ids=["embedding", "conv"])
def test_stiefel_factors_of_kernels_and_tables_take_the_riemannian_step(layer):
    model, adapter_layer = adapted(next(m for m in METHODS if m.name == "stella"), layer)
    adapter = adapter_layer.adapters["default"]
    assert adapter.down.weight.shape == (4, 11 if isinstance(layer, nn.Embedding) else 27)
    before = adapter.down.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x = torch.arange(11) if isinstance(layer, nn.Embedding) else torch.randn(2, 3, 5, 5)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(adapter.down.weight, before, atol=1e-3)
    assert max(distance_to_stiefel(f.orthonormal).item() for f in (adapter.up, adapter.down)) < 2e-6


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@every_method
def test_a_language_models_embedding_saves_and_loads(method, tmp_path):
    config = method.config(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(small_models.llama(), config)
    small_models.train_a_little(model)
    with torch.no_grad():
        logits = model(small_models.tokens()).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(small_models.llama(), tmp_path).eval()
        torch.testing.assert_close(loaded(small_models.tokens()).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("method", [m for m in METHODS if "cera" not in m.name], ids=lambda m: m.name)
def test_an_index_is_never_dropped(method):
    model, _ = adapted(method, nn.Embedding(11, 7), lora_dropout=0.9)
    ids = torch.arange(11)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids), model.eval()(ids), rtol=0, atol=0)


@every_method
def test_an_embedding_that_scales_its_output_scales_the_adapters(method):
    class Scaled(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(11, 7)
            self.register_buffer("embed_scale", torch.tensor(3.0))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    scaled = Scaled()
    model, layer = adapted(method, scaled)
    ids = torch.arange(11)
    torch.testing.assert_close(model(ids), scaled(ids) + 3 * layer.adapters["default"](ids))


def test_all_linear_leaves_adapted_embeddings_and_convolutions_alone():
    base = small_models.Perceptron()
    base.table, base.filter = nn.Embedding(9, 5), nn.Conv1d(2, 3, 2)
    model = get_peft_model(base, CeraConfig(r=2, target_modules=["table", "filter", "first"]))
    model.add_adapter("second", CeraConfig(r=2, target_modules="all-linear"))
    with_second = {n for n, m in model.named_modules() if isinstance(m, AdapterLayer) and "second" in m.adapters}
    assert with_second == {"base_model.model.first", "base_model.model.second"}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"tail is a Conv2d: it has groups=2.*no grouped kernel"),
        (nn.ConvTranspose1d(3, 3, 2), r"tail is a ConvTranspose1d: adapters go beside nn.Linear"),
        (nn.MultiheadAttention(16, 2), r"tail is a MultiheadAttention: .*reads its projections' weights"),
        (nn.LayerNorm(4), r"tail is a LayerNorm: .*modules_to_save"),
    ],
    ids=["groups", "transposed", "attention", "norm"],
)
def test_layers_without_a_true_adapter_are_refused_with_the_reason(layer, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(One(layer), StellaConfig(r=1, target_modules=["tail"]))


def test_weights_that_are_elsewhere_are_not_read_as_if_they_were_here():
    """accelerate leaves meta tensors where it has moved weights to the disk, and a convolution takes them."""
    adapter = CeraConfig(r=2, target_modules=["0"]).make_adapter(
        LayerSpec(4, 3, 2, 1.0, None, lambda: torch.empty(3, 4), reading_of(nn.Conv1d(4, 3, 1)))
    )
    adapter.down.weight = nn.Parameter(torch.empty_like(adapter.down.weight, device="meta"))
    with pytest.raises(ValueError, match="have been offloaded"):
        adapter(torch.randn(2, 4, 5))


def test_a_static_form_reads_no_weights_that_are_elsewhere():
    adapter = StaticAuroraAdapter(4, 3, 2)
    adapter.down.weight = nn.Parameter(torch.empty_like(adapter.down.weight, device="meta"))
    with pytest.raises(ValueError, match="have been offloaded"):
        adapter(torch.randn(2, 4))
