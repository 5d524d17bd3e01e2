"""The fast path against the plain definition, y + adapter(x), on fresh random inputs; and where it must step aside.

Legend of the shape suffixes: T tokens, N inputs, M outputs, R rank.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters.rows import ROWS, Row
from launches import Launches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from beyondlora.adapters import Adapter, CeraAdapter, dropout, products
from beyondlora.adapters.dropout import Drawn, draw_mask
from beyondlora.adapters.fused import Beside, Down, Middle

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
some_rows = pytest.mark.parametrize("name", ["lora", "cera-silu", "aurora-pooled-tanh", "stella-dense"])
# float64: rounding of sums in another order. float32 and bfloat16: a few units in the last place of values around ten.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.2}


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs take the way of large ones."""
    monkeypatch.setattr(dropout, "FEW", 0)


def fresh(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(torch.seed() % 2**31))


def plain(adapter: Adapter, y_TM: Tensor, x_TN: Tensor) -> Tensor:
    return y_TM + adapter(x_TN)


def fast(adapter: Adapter, y_TM: Tensor, x_TN: Tensor) -> Tensor:
    return adapter.add_to(y_TM, x_TN, overwrite=True)


def results(add: Callable[..., Tensor], adapter: Adapter, x: Tensor, W0: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of every weight of a layer with the adapter beside W0."""
    adapter, x = copy.deepcopy(adapter), x.clone().requires_grad_()
    y = add(adapter, nn.functional.linear(x, W0), x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in adapter.parameters())]


@every_row
@pytest.mark.parametrize("lead", [(7,), (), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_definition(row: Row, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    adapter = row.build(6, 5, 3).to(dtype)
    arguments = adapter, fresh(*lead, 6, dtype=dtype), fresh(5, 6, dtype=dtype), fresh(*lead, 5, dtype=dtype)
    for mine, definition in zip(results(fast, *arguments), results(plain, *arguments), strict=True):
        torch.testing.assert_close(mine, definition, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@some_rows
def test_an_input_that_lies_transposed_is_dropped_by_one_kernel_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does, whose kernel lays out mask and result as the input lies."""
    x = fresh(2, 6, 4).mT.requires_grad_()
    mask = torch.rand_like(x) > 0.3
    for module in (products, dropout):
        monkeypatch.setattr(module, "DROPPING", {"cpu"})
    monkeypatch.setattr(torch, "native_dropout", lambda x, p, train: (x * mask / (1 - p), mask))
    adapter, base = ROWS[name].build(6, 5, 3), nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    if name != "cera-silu":  # whose dropout is elsewhere
        adapter.dropout = nn.Dropout(0.3)
    dropped = x * mask / 0.7 if name != "cera-silu" else x
    expected = base(x) + adapter.write(adapter.up(adapter.core(adapter.read(dropped)))) * adapter.scaling
    for compute in (lambda: adapter.beside(base, x), lambda: adapter.add_to(base(x), x, overwrite=True)):
        torch.testing.assert_close(compute(), expected)
        (mine,), (theirs,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (compute(), expected))
        torch.testing.assert_close(mine, theirs)


@every_row
def test_says_without_memory_what_it_would_make(row: Row) -> None:
    """As PEFT's LoRA does: shapes, dtypes and memory of a model are planned on the meta device."""
    adapter = row.build(6, 5, 3).to("meta")
    x, W0, upstream = (torch.empty(size, device="meta", dtype=torch.float64) for size in ((4, 6), (5, 6), (4, 5)))
    shapes = [result.shape for result in results(fast, adapter, x, W0, upstream)]
    assert shapes == [(4, 5), (4, 6), *(weight.shape for weight in adapter.parameters())]


def test_a_mask_is_drawn_at_once_where_launches_cost() -> None:
    with Launches() as launches:
        draw_mask(torch.empty(4096, 64, device="meta"), 0.1)
    assert launches.count == 2


@some_rows
def test_is_the_fast_path_and_writes_over_y(name: str) -> None:
    adapter, x = ROWS[name].build(6, 5, 3), fresh(2, 4, 6)
    y = nn.functional.linear(x, fresh(5, 6))
    address = y.data_ptr()
    added = fast(adapter, y, x)
    assert type(added.grad_fn).__name__ == "AddProductBackward"
    assert added.data_ptr() == address
    with torch.no_grad():
        assert fast(adapter, y, x).data_ptr() == address


@some_rows
def test_leaves_y_alone_unless_given_away(name: str) -> None:
    adapter, x, y = ROWS[name].build(6, 5, 3), fresh(4, 6), fresh(4, 5)
    before = y.clone()
    torch.testing.assert_close(adapter.add_to(y, x), before + adapter(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(y, before)


def test_somebody_who_saved_y_is_told() -> None:
    adapter, x = ROWS["lora"].build(6, 5, 3), fresh(4, 6).requires_grad_()
    y = nn.functional.linear(x, fresh(5, 6))
    squared = y.square()  # saves y
    added = fast(adapter, y, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squared.sum() + added.sum()).backward()


@pytest.mark.parametrize(
    "y", [fresh(4, 5).requires_grad_(), fresh(5, 4).mT, nn.Parameter(fresh(4, 5))], ids=["leaf", "strided", "parameter"]
)
def test_what_must_not_be_overwritten_is_not(y: Tensor) -> None:
    adapter, x, before = ROWS["cera-silu"].build(6, 5, 3), fresh(4, 6), y.detach().clone()
    torch.testing.assert_close(fast(adapter, y, x), y + adapter(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(y.detach(), before)


def test_a_hook_on_the_up_projection_is_called() -> None:
    adapter, seen = ROWS["lora"].build(6, 5, 3), []
    adapter.up.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y, x = fresh(4, 5), fresh(4, 6)
    torch.testing.assert_close(fast(adapter, y.clone(), x), y + adapter(x), rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


SMOOTH = {name: row for name, row in ROWS.items() if not row.kinks.size}


@pytest.mark.parametrize("row", SMOOTH.values(), ids=SMOOTH)
def test_gradcheck(row: Row) -> None:
    adapter, x, W0 = row.build(4, 3, 2, seed=2), fresh(3, 4).requires_grad_(), fresh(3, 4)
    names = [name for name, _ in adapter.named_parameters()]
    values = [p.detach().requires_grad_() for p in adapter.parameters()]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adapter = adapter

        def forward(self, x: Tensor) -> Tensor:
            return fast(self.adapter, nn.functional.linear(x, W0), x)

    layer = Layer()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = {f"adapter.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values))


# ------------------------------------------------------------------------------------------------ input dropout


each_mask = pytest.mark.parametrize("p", [0.1, 0.4], ids=["positions", "bits"])


def kept(like: Tensor, mask: Tensor) -> Tensor:
    """What a mask keeps, as ones and zeros of the input's shape."""
    if mask.dtype == torch.bool:
        return mask.view(like.shape).double()
    ones = torch.ones(like.numel(), dtype=torch.float64)
    ones[mask.long()] = 0
    return ones.view(like.shape)


@each_mask
@pytest.mark.parametrize("lead", [(3,), (), (2, 300), (0, 4)])
def test_dropped_linear_equals_the_equation_with_its_mask(lead: tuple[int, ...], p: float) -> None:
    x, W, upstream = fresh(*lead, 6).requires_grad_(), fresh(2, 6).requires_grad_(), fresh(*lead, 2)
    mask, share = draw_mask(x, p)
    z = Down.apply(x, W, mask, share)
    expected = (x * kept(x, mask) / share) @ W.mT
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(z, (x, W), upstream), torch.autograd.grad(expected, (x, W), upstream)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def beside(x: Tensor, W0: Tensor, b: Tensor | None, W: Tensor, V: Tensor, mask: Tensor, share: float) -> Tensor:
    """x W0ᵀ + b + 0.7 · (x ∘ mask / share) Wᵀ Vᵀ, in one."""
    y: Tensor = Beside.apply(x, W0, b, W, V, W.dtype, 0.7, Drawn(mask, share), Middle())
    return y


@each_mask
@pytest.mark.parametrize("lead", [(3,), (2, 300)])
def test_a_dropping_branch_beside_its_layer_equals_the_equation_with_the_mask(lead: tuple[int, ...], p: float) -> None:
    x, W0, b, upstream = fresh(*lead, 6).requires_grad_(), fresh(5, 6), fresh(5), fresh(*lead, 5)
    W, V = fresh(2, 6).requires_grad_(), fresh(5, 2).requires_grad_()
    mask, share = draw_mask(x, p)
    mine = beside(x, W0, b, W, V, mask, share)
    expected = x @ W0.mT + b + 0.7 * (x * kept(x, mask) / share) @ W.mT @ V.mT
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(mine, (x, W, V), upstream), torch.autograd.grad(expected, (x, W, V), upstream)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-11)


@each_mask
def test_a_narrower_input_is_dropped_from_too(p: float) -> None:
    """A bfloat16 layer with a float32 adapter: sums in float32, y and the gradient of x in bfloat16."""
    x, W0 = fresh(600, 6).bfloat16().requires_grad_(), torch.zeros(5, 6).bfloat16()
    W, V = fresh(2, 6).float().requires_grad_(), fresh(5, 2).float().requires_grad_()
    mask, share = draw_mask(x, p)
    mine = beside(x, W0, None, W, V, mask, share)
    expected = 0.7 * (x.float() * kept(x, mask).float() / share) @ W.mT @ V.mT
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.float(), expected, rtol=1e-2, atol=1e-5)
    upstream = fresh(600, 5).bfloat16()
    gradients = (
        torch.autograd.grad(mine, (x, W, V), upstream),
        torch.autograd.grad(expected, (x, W, V), upstream.float()),
    )
    assert gradients[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(gradients[0][1:], gradients[1][1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("few", [0, 2**21], ids=["many", "few"])
@pytest.mark.parametrize("p", [0.001, 0.05, 0.2, 0.5, 0.99])
def test_the_mask_keeps_its_share_independently(p: float, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "FEW", few)
    torch.manual_seed(0)
    x = torch.empty(1000, 1001)
    mask, share = draw_mask(x, p)
    keep, n = kept(x, mask), x.numel()
    assert share == pytest.approx(1 - p, abs=2**-17)
    assert keep.mean().item() == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    neighbours = torch.corrcoef(keep.view(-1)[: n // 8 * 8].view(-1, 8).mT)  # eight entries share two random words
    assert (neighbours - torch.eye(8)).abs().max() < 5 * (8 / n) ** 0.5


@pytest.mark.parametrize(("n", "p"), [(1, 0.2), (2, 0.2), (7, 0.05), (40, 0.1)])
def test_every_position_is_dropped_as_often_as_another(n: int, p: float) -> None:
    torch.manual_seed(0)
    times, rounds = torch.zeros(n), 20_000
    for _ in range(rounds):
        times[draw_mask(torch.empty(n), p)[0].long()] += 1
    assert ((times / rounds - p).abs() < 5 * (p * (1 - p) / rounds) ** 0.5).all()


def test_positions_are_drawn_until_the_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the gaps drawn at first: here all of them are, and positions one after the other."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "uniform_", Tensor.zero_)
        assert draw_mask(torch.empty(1000), 0.01)[0].tolist() == list(range(1000))
    assert draw_mask(torch.empty(0, 4), 0.01)[0].tolist() == []
    assert len(draw_mask(torch.empty(1000), 1e-300)[0]) == 0


def test_positions_say_what_int32_cannot() -> None:
    huge = torch.empty(1).expand(2**31)
    mask, _ = draw_mask(huge, 1e-6)
    assert mask.dtype == torch.int64
    assert len(mask) == pytest.approx(2**31 * 1e-6, abs=5 * 2147**0.5)
    assert mask.diff().min() > 0
    assert draw_mask(huge[1:], 1e-6)[0].dtype == torch.int32


def test_dropout_follows_torchs_seed_and_stops_in_eval() -> None:
    adapter, x = ROWS["stella-dense"].build(6, 5, 3, dropout=0.4).train(), fresh(20, 6)
    y = torch.zeros(20, 5, dtype=torch.float64)
    torch.manual_seed(1)
    first = adapter.add_to(y, x)
    torch.manual_seed(1)
    assert torch.equal(adapter.add_to(y, x), first)
    assert not torch.equal(adapter.add_to(y, x), first)
    torch.testing.assert_close(adapter.eval().add_to(y, x), adapter(x), rtol=1e-12, atol=1e-12)


@each_mask
def test_dropout_has_a_second_derivative(p: float) -> None:
    x, W0 = fresh(4, 6).requires_grad_(), fresh(5, 6)
    W, V = fresh(2, 6).requires_grad_(), fresh(5, 2).requires_grad_()
    mask, share = draw_mask(x, p)
    assert torch.autograd.gradgradcheck(lambda x, W: Down.apply(x, W, mask, share), (x, W))
    assert torch.autograd.gradgradcheck(lambda x, W, V: beside(x, W0, None, W, V, mask, share), (x, W, V))


@pytest.mark.parametrize(("p", "mask_bytes"), [(0.4, 100 * 64 + 1), (0.05, 4 * 100 * 64 * 0.08)])
def test_dropout_keeps_no_second_copy_of_the_input(p: float, mask_bytes: float) -> None:
    adapter = Adapter(down=nn.Linear(64, 2, bias=False), up=nn.Linear(2, 8, bias=False), dropout=p).train()
    x, saved = torch.randn(100, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter.add_to(torch.zeros(100, 8), x, overwrite=True)
    extra = sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr())
    assert extra < mask_bytes + 4 * (2 * 100 + 2 * 64 + 2 * 8 + 2 * 100)  # and what is R wide


# ------------------------------------------------------------------------------------------------ PyTorch's other modes


@some_rows
def test_autocast(name: str) -> None:
    adapter, x, W0 = ROWS[name].build(6, 5, 3).float(), fresh(4, 6).float(), fresh(5, 6).float()
    upstream = fresh(4, 5).bfloat16()

    def under_autocast(add: Callable[..., Tensor]) -> list[Tensor]:
        def call(adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return add(adapter, nn.functional.linear(x, W0), x)

        return results(call, adapter, x, W0, upstream)

    for mine, definition in zip(under_autocast(fast), under_autocast(plain), strict=True):
        assert mine.dtype == definition.dtype
        torch.testing.assert_close(mine, definition, rtol=0.05, atol=ROUNDING[torch.bfloat16])


@some_rows
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_dropout_again(name: str, reentrant: bool) -> None:
    adapter, x = ROWS[name].build(6, 5, 3, dropout=0.3).train(), fresh(4, 6)
    W0, upstream = fresh(5, 6), fresh(4, 5)

    def stored(adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fast(adapter, nn.functional.linear(x, W0), x)

    def recomputed(adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        layer = lambda x: fast(adapter, nn.functional.linear(x, W0), x)  # noqa: E731
        return checkpoint(layer, x, use_reentrant=reentrant)

    pairs = zip(*(results(way, adapter, x, W0, upstream) for way in (recomputed, stored)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_selective_checkpointing_finds_its_cached_product_unchanged() -> None:
    adapter, x, W0 = ROWS["cera-silu"].build(6, 5, 3), fresh(4, 6), fresh(5, 6)

    def selected(adapter: Adapter, y: Tensor, x: Tensor) -> Tensor:
        layer = lambda x: fast(adapter, nn.functional.linear(x, W0), x)  # noqa: E731
        contexts = lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default])  # noqa: E731
        return checkpoint(layer, x, use_reentrant=False, context_fn=contexts)

    pairs = zip(*(results(way, adapter, x, W0, fresh(4, 5) * 0 + 1) for way in (selected, plain)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use, in forward mode


@forward_mode
@some_rows
def test_function_transforms(name: str) -> None:
    adapter, x, y = ROWS[name].build(6, 5, 3), fresh(4, 6), fresh(4, 5)
    weights = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in adapter.named_parameters()}

    def through(add: Callable[..., Tensor]) -> list[Any]:
        layer = lambda x, y: add(adapter, y * 1, x)  # noqa: E731
        ensemble = nn.Module()
        ensemble.adapter = adapter
        ensemble.forward = lambda x: add(adapter, y * 1, x)  # type: ignore[method-assign]
        call = lambda w: torch.func.functional_call(ensemble, {f"adapter.{k}": v for k, v in w.items()}, (x,))  # noqa: E731
        return [
            torch.func.vmap(layer)(x, y),
            torch.func.vmap(call)(weights),
            torch.func.jacrev(layer)(x, y),
            torch.func.jvp(layer, (x, y), (x, y)),
            torch.func.grad(lambda x: layer(x, y).square().sum())(x),
        ]

    torch.testing.assert_close(through(fast), through(plain), rtol=1e-12, atol=1e-12)


@every_row
@pytest.mark.parametrize("rows", [4, 3000])
def test_gradients_are_mapped_over(row: Row, rows: int) -> None:
    """As `torch.autograd.functional.jacobian` and `hessian` do where they are to vectorize, and vmap of a gradient."""
    adapter, x, base = row.build(6, 5, 3), fresh(rows, 6).requires_grad_(), nn.Linear(6, 5, dtype=torch.float64)
    base.requires_grad_(False)
    wanted, directions = [x, *adapter.parameters()], fresh(2, rows, 5)

    def mapped(y: Tensor) -> list[Any]:
        gradients = lambda upstream: torch.autograd.grad(y, wanted, upstream, retain_graph=True)  # noqa: E731
        batched = torch.autograd.grad(y, wanted, directions, is_grads_batched=True, retain_graph=True)
        return [batched, torch.func.vmap(gradients)(directions)]

    expected = mapped(plain(adapter, base(x), x))
    for y in (fast(adapter, base(x), x), adapter.beside(base, x)):
        if y is not None:
            torch.testing.assert_close(mapped(y), expected, rtol=1e-10, atol=1e-11)


@forward_mode
@some_rows
def test_forward_mode_differentiation(name: str) -> None:
    from torch.autograd import forward_ad

    adapter, x, y = ROWS[name].build(6, 5, 3), fresh(4, 6), fresh(4, 5)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(add(adapter, y.clone(), forward_ad.make_dual(x, x))).tangent for add in (fast, plain)
        ]
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)


@some_rows
def test_compiles_into_one_graph(name: str) -> None:
    adapter, x = ROWS[name].build(6, 5, 3), fresh(4, 6).requires_grad_()
    W0 = fresh(5, 6)
    layer = lambda x: fast(adapter, nn.functional.linear(x, W0), x)  # noqa: E731
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(adapter, x @ W0.mT, x), rtol=1e-12, atol=1e-12)
    compiled(x).sum().backward()


def test_inference_mode() -> None:
    adapter = ROWS["cera-silu"].build(6, 5, 3)
    with torch.inference_mode():
        x, y = fresh(4, 6), fresh(4, 5)
        expected = y + adapter(x)
        torch.testing.assert_close(fast(adapter, y, x), expected, rtol=1e-12, atol=1e-12)


def test_mixed_dtypes_are_what_plus_makes_of_them_or_stay_in_ys_memory() -> None:
    adapter, y = ROWS["lora"].build(6, 5, 3).float(), fresh(4, 5).bfloat16()
    x = fresh(4, 6).float()
    expected = y + adapter(x)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(adapter.add_to(y, x), expected, rtol=1e-5, atol=1e-6)
    written = fast(adapter, y, x)
    assert written.data_ptr() == y.data_ptr()
    torch.testing.assert_close(written, expected.bfloat16(), rtol=2**-7, atol=0)


# ------------------------------------------------------------------------------------------------ with the base layer


def frozen(out: int, inputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(inputs, out, bias=bias, dtype=dtype).requires_grad_(False)


def together(adapter: Adapter, base: nn.Linear, x: Tensor) -> Tensor:
    y = adapter.beside(base, x)
    assert y is not None
    return y


def one_by_one(adapter: Adapter, base: nn.Linear, x: Tensor) -> Tensor:
    return (base(x) + adapter(x.to(adapter.down.weight.dtype))).to(x.dtype)


def gradients(
    way: Callable[..., Tensor], adapter: Adapter, base: nn.Linear, x: Tensor, upstream: Tensor
) -> list[Tensor]:
    adapter, x = copy.deepcopy(adapter), x.clone().requires_grad_()
    y = way(adapter, base, x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in adapter.parameters())]


DYNAMIC = {name: row for name, row in ROWS.items() if row.build(6, 5, 3).beside(frozen(5, 6), fresh(4, 6)) is not None}


def test_all_but_ablations_and_the_static_form_go_at_once() -> None:
    assert set(DYNAMIC) == {
        *("lora", "cera-silu", "cera-relu", "cera-identity", "aurora-pooled-tanh", "aurora-per_dim-tanh"),
        *("stella-dense", "stella-diagonal", "stella-euclidean", "stella-exp_map"),
    }


@pytest.mark.parametrize("row", DYNAMIC.values(), ids=DYNAMIC)
@pytest.mark.parametrize("lead", [(7,), (), (2, 3), (2, 0, 3), (300,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_base_and_branch_at_once_equal_the_definition(
    row: Row, lead: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    adapter, base = row.build(6, 5, 3).to(dtype), frozen(5, 6, bias=bias, dtype=dtype)
    arguments = adapter, base, fresh(*lead, 6, dtype=dtype), fresh(*lead, 5, dtype=dtype)
    for mine, definition in zip(gradients(together, *arguments), gradients(one_by_one, *arguments), strict=True):
        torch.testing.assert_close(mine, definition, rtol=ROUNDING[dtype], atol=10 * ROUNDING[dtype])


@some_rows
def test_a_float32_branch_beside_a_bfloat16_layer(name: str) -> None:
    adapter, base = ROWS[name].build(6, 5, 3).float(), frozen(5, 6, bias=True, dtype=torch.bfloat16)
    arguments = adapter, base, fresh(2, 300, 6).bfloat16(), fresh(2, 300, 5).bfloat16()
    mine, definition = gradients(together, *arguments), gradients(one_by_one, *arguments)
    assert [t.dtype for t in mine] == [t.dtype for t in definition]
    for a, b in zip(mine, definition, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * b.abs().max().item())
    # The weights' gradients are sums in float32 on both sides, from a bfloat16 input and the same upstream.
    for a, b in zip(mine[2:], definition[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


@some_rows
def test_nothing_of_the_inputs_or_the_outputs_size_is_kept_but_x(name: str) -> None:
    adapter, base = ROWS[name].build(64, 48, 3).float(), frozen(48, 64, dtype=torch.bfloat16)
    x, kept = torch.randn(1000, 64, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = together(adapter, base, x)
    assert all(t.numel() < 1000 * 40 for t in kept if t.data_ptr() != x.data_ptr())
    assert y.dtype == torch.bfloat16


def test_the_input_gets_one_gradient_and_not_two() -> None:
    adapter, base, x = ROWS["cera-silu"].build(6, 5, 3), frozen(5, 6), fresh(4, 6).requires_grad_()
    y = together(adapter, base, x)  # torch 2.9 forgets the function of a result that is gone
    assert type(y.grad_fn).__name__ == "BesideBackward"
    assert [type(f).__name__ for f, _ in y.grad_fn.next_functions if f].count("AccumulateGrad") == 3  # x, A and B


@each_mask
def test_bottleneck_dropout_equals_the_equation_with_its_mask(p: float) -> None:
    adapter, base, x = CeraAdapter(6, 5, 3, dropout=p, noop_start=False).double().train(), frozen(5, 6), fresh(400, 6)
    upstream = fresh(400, 5)

    def by_equation(adapter: Adapter, base: nn.Linear, x: Tensor) -> Tensor:
        z = adapter.down(x)
        mask, share = draw_mask(z, p)
        return base(x) + adapter.up(nn.functional.silu(z) * kept(z, mask) / share) * adapter.scaling

    def seeded(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: [torch.manual_seed(6), way(*arguments)][1]

    mine = gradients(seeded(together), adapter, base, x, upstream)
    expected = gradients(seeded(by_equation), adapter, base, x, upstream)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "most"), [("cera-silu", 1.2), ("stella-dense", 1.01), ("stella-diagonal", 1.01)])
def test_of_what_is_as_wide_as_the_rank_one_array_is_kept(name: str, most: float) -> None:
    """As beside PEFT's LoRA: at large R that is what an adapter costs."""
    adapter, base = ROWS[name].build(64, 48, 32, dropout=0.1).float().train(), frozen(48, 64).float()
    x, saved = torch.randn(1000, 64, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        together(adapter, base, x)
    own = {x.data_ptr(), *(p.data_ptr() for module in (adapter, base) for p in module.parameters())}
    mask_bytes = 0 if name == "cera-silu" else max(t.nbytes for t in saved.values() if t.dtype == torch.int32)
    extra = sum(t.nbytes for pointer, t in saved.items() if pointer not in own) - mask_bytes
    assert extra <= most * 4 * 1000 * 32


@pytest.mark.parametrize("name", ["cera-silu", "stella-dense"])
@pytest.mark.parametrize("still", ["down", "core", "up", "down core", "core up", "down core up"])
def test_weights_that_are_frozen_get_no_gradient_and_the_others_theirs(name: str, still: str) -> None:
    adapter, base, x, upstream = ROWS[name].build(6, 5, 3), frozen(5, 6), fresh(4, 6), fresh(4, 5)
    for part in still.split():
        getattr(adapter, part).requires_grad_(False)
    for way in (together, one_by_one):
        x.grad = None
        adapter.zero_grad()
        way(adapter, base, x.requires_grad_()).backward(upstream)
        found = [None if p.grad is None else p.grad.clone() for p in (x, *adapter.parameters())]
        if way is together:
            mine = found
    assert [a is None for a in mine] == [b is None for b in found]
    both = [(a, b) for a, b in zip(mine, found, strict=True) if a is not None]
    torch.testing.assert_close([a for a, _ in both], [b for _, b in both], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "watched"),
    [("cera-silu", "core"), ("cera-silu", "activation"), ("stella-dense", "core"), ("aurora-pooled-tanh", "core")]
    + [("aurora-pooled-tanh", f"core.{part}") for part in ("H", "spline")],
)
def test_a_watched_core_is_called(name: str, watched: str) -> None:
    adapter, seen = ROWS[name].build(6, 5, 3), []
    adapter.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
    base, x = frozen(5, 6), fresh(4, 6)
    assert adapter.beside(base, x) is None
    fast(adapter, base(x), x).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("row", SMOOTH.values(), ids=SMOOTH)
def test_gradcheck_at_once(row: Row) -> None:
    adapter, x, base = row.build(4, 3, 2, seed=2), fresh(3, 4).requires_grad_(), frozen(3, 4, bias=True)
    call = lambda x, *weights: adapter.beside(base, x) if adapter.beside(base, x) is not None else x.sum()  # noqa: E731
    weights = [p.requires_grad_() for p in adapter.parameters()]
    assert torch.autograd.gradcheck(call, (x, *weights))
    assert torch.autograd.gradgradcheck(call, (x, *weights))


@pytest.mark.parametrize("row", DYNAMIC.values(), ids=DYNAMIC)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_that_can_be_differentiated_are_the_same_gradients(row: Row, dropout: float) -> None:
    """Which gradgradcheck cannot tell: it holds what they are made of against their own derivative."""
    adapter, base, upstream = row.build(6, 5, 3, dropout=dropout).train(), frozen(5, 6), fresh(4, 5)
    sources = [fresh(4, 6).requires_grad_(), *adapter.parameters()]
    found = []
    for differentiable in (False, True):
        torch.manual_seed(0)
        y = adapter.beside(base, sources[0])
        found.append(torch.autograd.grad(y, sources, upstream, create_graph=differentiable))
    for plain, differentiable in zip(*found, strict=True):
        torch.testing.assert_close(differentiable, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "circumstance",
    ["trains", "trains its bias", "hook", "replaced forward", "no gradients", "down hook", "dropout hook"],
)
def test_where_somebody_watches_or_trains_they_are_called_one_by_one(circumstance: str) -> None:
    adapter, base, x = ROWS["lora"].build(6, 5, 3, dropout=0.2).train(), frozen(5, 6, bias=True), fresh(4, 6)
    assert adapter.beside(base, x) is not None
    if circumstance == "trains":
        base.weight.requires_grad_()
    elif circumstance == "trains its bias":
        base.bias.requires_grad_()
    elif circumstance == "hook":
        base.register_forward_hook(lambda *_: None)
    elif circumstance == "down hook":
        adapter.down.register_forward_hook(lambda *_: None)
    elif circumstance == "dropout hook":
        adapter.dropout.register_forward_hook(lambda *_: None)
    elif circumstance == "replaced forward":
        base.forward = base.forward  # type: ignore[method-assign]
    elif circumstance == "no gradients":
        adapter.eval()  # with dropout at work it is the way in any case
    with torch.set_grad_enabled(circumstance != "no gradients"):
        assert adapter.beside(base, x) is None


@some_rows
def test_at_once_under_autocast(name: str) -> None:
    adapter, base, x = ROWS[name].build(6, 5, 3).float(), frozen(5, 6, bias=True).float(), fresh(4, 6).float()

    def under(way: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return way(*arguments)

        return call

    upstream = fresh(4, 5).bfloat16()
    plainly = lambda adapter, base, x: base(x) + adapter(x)  # noqa: E731
    mine, definition = (gradients(under(way), adapter, base, x, upstream) for way in (together, plainly))
    for a, b in zip(mine, definition, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=ROUNDING[torch.bfloat16])
