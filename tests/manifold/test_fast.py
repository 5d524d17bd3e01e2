"""The fast float32 step lands where the definition of algorithm 1 lands, for steps of every size."""

import threading
from collections.abc import Iterator
from operator import attrgetter

import numpy as np
import pytest
import torch
from launches import Launches
from torch import Tensor

from beyondlora.manifold import StiefelLinear, distance_to_stiefel, fast
from beyondlora.manifold.moves import Group, Stack, refused_steps
from beyondlora.precise import has_float64

# torch 2.9 says so in a CUDA build of its older functions, which are some of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")

SHAPES = [(512, 8), (1024, 32), (200, 128), (16, 16), (64, 1), (515, 3), (1536, 24)]
SIZES = [1e-7, 5e-4, 1e-2, 0.1, 10.0, 1e6]
every_shape = pytest.mark.parametrize(("M", "R"), SHAPES)
every_size = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(autouse=True)
def fresh_input() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    torch.manual_seed(seed)
    print(f"seed {seed}")  # noqa: T201


def literal(Y: Tensor, after: Tensor, scale: float) -> Tensor:
    """Steps 3 to 5 as the paper writes them, in NumPy float64 with an SVD."""
    before, step = Y.double().numpy(), (after.double() - Y.double()).numpy() * scale
    H = before.T @ step
    U, _, Vt = np.linalg.svd(before + step - before @ (H + H.T) / 2, full_matrices=False)
    return torch.from_numpy(U @ Vt)


def points(M: int, R: int, size: float, count: int = 1) -> tuple[Tensor, Tensor]:
    Y = torch.linalg.qr(torch.randn(count, M, R, dtype=torch.float64))[0].float()
    return Y, Y + size * torch.randn(count, M, R).sign()


@every_shape
@every_size
@pytest.mark.parametrize("scale", [1.0, 0.53, 2.0])
@pytest.mark.parametrize("stored", ["tall", "wide"])
def test_matrices_land_on_the_papers_polar_factor(M: int, R: int, size: float, scale: float, stored: str) -> None:
    before, after = (list(stack) for stack in points(M, R, size, count=2))
    if stored == "wide":
        before, after = ([matrix.mT.contiguous().mT for matrix in matrices] for matrices in (before, after))
    expected = [literal(Y, Z, scale) for Y, Z in zip(before, after, strict=True)]
    kept = [Y.clone() for Y in before]
    assert fast.retract_(before, after, scale, torch.empty_like(after[0]))
    for Y, Z, unmoved, polar in zip(before, after, kept, expected, strict=True):
        assert torch.equal(Y, unmoved)
        assert distance_to_stiefel(Z) <= 1e-6
        torch.testing.assert_close(Z.double(), polar, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("M", "R"), [(200, 128), (900, 64), (1000, 32)])
def test_the_gram_matrix_of_a_small_matrix_is_summed_in_blocks_too(M: int, R: int) -> None:
    """In one go the worst of ten is off by 6e-7 to 8e-7, and a step that uses it by more than 1e-6 now and then."""
    stack, _ = points(M, R, 0.0, count=10)
    assert max((fast.gram(Y).double() - Y.double().mT @ Y.double()).abs().max() for Y in stack) <= 4.5e-7


def test_one_too_long_step_leaves_the_others_fast_and_right() -> None:
    before, after = (list(stack) for stack in points(256, 8, 1e-2, count=3))
    after[1] += 30 * torch.randn(256, 8)
    expected = [literal(Y, Z, 1.0) for Y, Z in zip(before, after, strict=True)]
    assert fast.retract_(before, after, 1.0, torch.empty_like(after[0]))
    for Z, polar in zip(after, expected, strict=True):
        torch.testing.assert_close(Z.double(), polar, rtol=0, atol=2e-6)


@every_shape
@pytest.mark.parametrize("kept", [-0.5, 0.0, 1.9, 2.5])
def test_steps_along_the_normal_do_not_add_up(M: int, R: int, kept: float) -> None:
    """As an L2 term makes them, or a large step scale: an error in YᵀY grew by the square of their length."""
    (Y,), _ = points(M, R, 0.0)
    for _ in range(40):
        after = kept * Y + 1e-3 * torch.randn(M, R)
        assert fast.retract_([Y], [after], 1.0, torch.empty_like(Y))
        Y = after
    assert distance_to_stiefel(Y) <= 1e-6


def test_a_device_without_memory_is_not_one_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu", 7)  # nobody else asks about it

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as short:
        short.setattr(torch, "ones", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            has_float64(device)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    assert has_float64(device)


@pytest.mark.parametrize(("M", "R"), [(14336, 8), (14337, 8), (14336, 2), (8191, 32)])
@pytest.mark.parametrize("stored", ["tall", "wide"])
def test_long_sums_keep_float32s_digits(M: int, R: int, stored: str) -> None:
    Y = points(M, R, 0.0)[0][0]
    if stored == "wide":
        Y = Y.mT.contiguous().mT
    assert (fast.gram(Y).double() - Y.double().mT @ Y.double()).abs().max() <= 3e-7
    torch.testing.assert_close(fast.inner(Y, Y).double(), Y.double().mT @ Y.double(), rtol=0, atol=1e-5)


def retract_stacked(before: Tensor, after: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """As `Stack.end`, of one share."""
    gram = before.new_empty(len(before), before.shape[2], before.shape[2])
    fast.project_stacked_(before, after, scale, gram)
    root, moved = fast.inverse_roots_blind(gram, allowed)
    fast.replace_stacked_(before, after, root, moved)
    return moved


@every_shape
@every_size
def test_a_stack_lands_there_too(M: int, R: int, size: float) -> None:
    Y, after = points(M, R, size, count=3)
    expected = torch.stack([literal(a, b, 0.53) for a, b in zip(Y, after, strict=True)])
    start = Y.clone()
    moved = retract_stacked(Y, after, 0.53, torch.ones(3, dtype=torch.bool))
    assert moved.all() or size > 1  # an absurd step may be refused; it never leaves the manifold
    assert distance_to_stiefel(Y).max() <= 1e-6
    torch.testing.assert_close(Y[moved].double(), expected[moved], rtol=0, atol=2e-6)
    assert torch.equal(Y[~moved], start[~moved])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_in_a_stack_what_cannot_step_stays_and_the_others_do(poison: float) -> None:
    Y, after = points(64, 8, 1e-2, count=3)
    start, expected = Y.clone(), literal(Y[0], after[0], 1.0)
    after[1, 3, 2] = poison
    moved = retract_stacked(Y, after, 1.0, torch.tensor([True, True, False]))
    assert moved.tolist() == [True, False, False]
    assert torch.equal(Y[1:], start[1:])
    torch.testing.assert_close(Y[0].double(), expected, rtol=0, atol=2e-6)


def test_a_huge_step_of_low_rank_stays_on_the_manifold() -> None:
    Y, _ = points(64, 8, 0.0)
    after = Y + 1e7 * torch.outer(torch.randn(64), torch.randn(8))
    moved = retract_stacked(Y.clone(), after.clone(), 1.0, torch.ones(1, dtype=torch.bool))
    assert fast.retract_([Y[0]], [after[0]], 1.0, torch.empty_like(Y[0]))
    assert distance_to_stiefel(after[0]) <= 1e-6
    assert not moved.any()  # the stack, which cannot look, leaves it


@every_shape
def test_gradients_are_converted_as_edelman_and_others_define(M: int, R: int) -> None:
    Y, G = points(M, R, 1.0, count=2)
    expected = G.double() - Y.double() @ G.double().mT @ Y.double()
    one, stack = G[0].clone(), G.clone()
    assert torch.isfinite(fast.convert_gradient_(Y[0], one))
    product = Y.new_empty(2, R, R)
    fast.convert_gradients_stacked_(Y, stack, product)
    torch.testing.assert_close(product.double(), G.double().mT @ Y.double(), rtol=0, atol=2e-5)
    # Entries of YᵀG are sums of M terms of size 1/sqrt(M).
    torch.testing.assert_close(one.double(), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(stack.double(), expected, rtol=0, atol=2e-5)
    one[0, 0] = float("nan")
    assert not torch.isfinite(fast.convert_gradient_(Y[0], one))


@pytest.mark.parametrize("transposed", ["gradient", "point", "both"])
@pytest.mark.parametrize("R", [1, 2, 8, 16])
def test_matrices_may_lie_transposed(R: int, transposed: str) -> None:
    """As the gradients that torch.autograd.grad returns may; thin matrices are seen with several rows side by side."""
    (Y,), (G,) = points(512, R, 1.0)
    Y, G = Y.contiguous(), G.contiguous()
    if transposed != "point":
        G = G.mT.contiguous().mT
    if transposed != "gradient":
        Y = Y.mT.contiguous().mT
    expected = G.double() - Y.double() @ G.double().mT @ Y.double()
    fast.convert_gradient_(Y, G)
    torch.testing.assert_close(G.double(), expected, rtol=0, atol=2e-5)
    after = Y + 0.01 * G
    polar = literal(Y, after, 0.53)
    assert fast.retract_([Y], [after], 0.53, torch.empty_like(after))
    torch.testing.assert_close(after.double(), polar, rtol=0, atol=2e-6)


KINDS = [((8, 64), 0.7)] * 7 + [((8, 64), 1.0)] * 2 + [((64, 8), 0.7)] * 3 + [((8, 200), 0.7)]


def test_a_stack_of_layers_steps_as_the_layers_one_by_one() -> None:
    """The CUDA form, run on a CPU: tall and wide layers of several shapes and scales, in shares."""
    layers, twins = ([StiefelLinear(*sizes, step_scale=scale) for sizes, scale in KINDS] for _ in range(2))
    for layer, twin in zip(layers, twins, strict=True):
        twin.load_state_dict(layer.state_dict())
        layer.weight.grad = torch.randn_like(layer.weight)
        twin.weight.grad = layer.weight.grad.clone()
    poisoned, absurd = 3, 10
    layers[poisoned].weight.grad[0, 0] = float("nan")
    refused_steps()
    stack = Stack(layers)
    moves = [stack, *(Group([twin], torch.empty_like) for twin in twins)]
    assert len(stack.shares) > len(set(KINDS))
    starts = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for move in moves:
            move.begin()
        assert moves[0].is_still()
        for layer in [*layers, *twins]:
            layer.weight -= 0.1 * layer.weight.grad.nan_to_num(0.5)
        assert not moves[0].is_still()
        layers[absurd].weight += 1e7 * torch.outer(*(torch.randn(size) for size in layers[absurd].weight.shape))
        for move in moves:
            move.end()
    for i, (layer, twin, start) in enumerate(zip(layers, twins, starts, strict=True)):
        if i in (poisoned, absurd):
            assert torch.equal(layer.weight, start)
        else:
            torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=1e-6)
    assert refused_steps() == 2


def test_a_stack_goes_back_to_where_it_was() -> None:
    layers = [StiefelLinear(*sizes) for sizes, _ in KINDS]
    starts = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.weight.grad = torch.randn_like(layer.weight)
    stack = Stack(layers)
    with torch.no_grad():
        stack.begin()
        for layer in layers:
            layer.weight.mul_(float("nan"))
        stack.undo()
    assert all(torch.equal(layer.weight, start) for layer, start in zip(layers, starts, strict=True))


@pytest.mark.parametrize("rank", [1, 2, 8, 32, 128])
def test_the_rounds_suffice_for_every_matrix_that_is_relied_on(rank: int) -> None:
    """Down to the most uneven ones there are: all eigenvalues alike but one, or one large and all others small."""
    uneven = torch.logspace(0, 6, 60, dtype=torch.float64)[:, None]
    ones = torch.ones(60, rank, dtype=torch.float64)
    for spectra in (torch.cat([1 / uneven, ones[:, 1:]], 1), torch.cat([uneven, ones[:, 1:]], 1)):
        Q = torch.linalg.qr(torch.randn(60, rank, rank, dtype=torch.float64))[0]
        root, moved = fast.inverse_roots_blind((Q * spectra[:, None]) @ Q.mT, torch.ones(60, dtype=torch.bool))
        even = spectra.mean(1) * (1 / spectra).mean(1)
        assert moved[even < 0.999 * fast.UNEVEN].all()
        assert not moved[even > 1.001 * fast.UNEVEN].any()
        torch.testing.assert_close(root[moved], ((Q * spectra[:, None].rsqrt()) @ Q.mT)[moved], rtol=0, atol=1e-9)
        assert (root[~moved] == torch.eye(rank)).all()


def test_the_buffers_are_the_factors_bytes_and_a_fifth() -> None:
    layers = [StiefelLinear(8, 640) for _ in range(10)]
    stack = Stack(layers)
    factors = sum(layer.weight.nbytes for layer in layers)
    buffers = stack.flat.nbytes + stack.grams.nbytes + sum(share.before.nbytes for share in stack.shares)
    assert factors < buffers + 4 * factors / stack.ROOTS <= 1.2 * factors  # four arrays of R×R work at a time


def test_a_stack_is_stepped_in_few_launches() -> None:
    """A twentieth of what a loop over the factors would take; it grows with shapes and shares, not with factors."""
    layers = [StiefelLinear(*sizes) for sizes in ((8, 640), (8, 1280), (640, 8)) for _ in range(80)]
    for layer in layers:
        layer.weight.grad = torch.randn_like(layer.weight)
    stack = Stack(layers)
    with torch.no_grad(), Launches() as launches:
        stack.begin()
        stack.end()
    assert launches.count <= 300


@pytest.fixture
def untouched_settings() -> Iterator[None]:
    """As torch begins, and afterwards again."""

    def begin() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = torch.backends.mkldnn.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"

    begin()
    yield
    begin()


LOWERED = [  # by torch's older functions and by its newer ones, which must not be asked about one another
    'set_float32_matmul_precision("high")',
    'set_float32_matmul_precision("medium")',
    "backends.cuda.matmul.allow_tf32 = True",
    'backends.fp32_precision = "tf32"',  # as transformers for tf32=True
    'backends.cuda.matmul.fp32_precision = "tf32"',
    'backends.mkldnn.fp32_precision = "bf16"',
    'backends.mkldnn.matmul.fp32_precision = "tf32"',
]


def precisions() -> dict[str, object]:
    """What every one of torch's settings says, old and new; some raise beside others."""
    found: dict[str, object] = {}
    for setting in ("backends", "backends.cuda.matmul", "backends.mkldnn", "backends.mkldnn.matmul"):
        found[setting] = attrgetter(f"{setting}.fp32_precision")(torch)
    for name in ("get_float32_matmul_precision", "_C._get_cublas_allow_tf32"):
        try:
            found[name] = attrgetter(name)(torch)()
        except RuntimeError:
            found[name] = "refused"
    return found


@pytest.mark.usefixtures("untouched_settings")
@pytest.mark.parametrize("lowered", LOWERED)
def test_lowered_matmul_precision_is_kept_out_and_put_back(lowered: str) -> None:
    exec(f"torch.{lowered}", {"torch": torch})
    before = precisions()
    layer = StiefelLinear(4, 64)
    layer.weight.grad = torch.randn_like(layer.weight)
    with fast.full_precision(["cpu"]):
        with fast.full_precision(["cpu"]):
            pass
        for setting in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            assert setting.fp32_precision in ("ieee", "none")
        torch.optim.SGD(layer.parameters(), 0.1).step()
        assert torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")
    assert precisions() == before
    assert distance_to_stiefel(layer.orthonormal) <= 1e-6


@pytest.mark.usefixtures("untouched_settings")
def test_a_precision_that_follows_another_setting_still_follows_it_afterwards() -> None:
    torch.backends.fp32_precision = "tf32"
    with fast.full_precision(["cpu"]):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"


@pytest.mark.usefixtures("untouched_settings")
def test_precision_stays_full_until_the_last_thread_is_through() -> None:
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fast.full_precision(["cpu"]):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with fast.full_precision(["cpu"]):
        thread.start()
        entered.wait(10)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("types", [["cuda", "cpu"], ["cpu", "cuda"]], ids="-".join)
def test_autocast_is_kept_away_from_factors_on_every_device(types: list[str]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with fast.full_precision(types):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("circumstance", ["autocast", "high", "medium"])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("retraction", ["polar", "exp_map"])
def test_a_step_under_lowered_precision_is_the_same_step(
    circumstance: str, implementation: dict[str, bool], retraction: str
) -> None:
    def steps(precision: str = "highest", autocast: bool = False) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [StiefelLinear(*sizes, retraction=retraction) for sizes in ((16, 256), (300, 16), (1, 64))]
        optimizer = torch.optim.AdamW([layer.weight for layer in layers], 0.01, **implementation)
        for _ in range(2):
            for layer in layers:
                layer.weight.grad = torch.randn_like(layer.weight)
            torch.set_float32_matmul_precision(precision)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                optimizer.step()
            torch.set_float32_matmul_precision("highest")
        return [layer.weight.detach() for layer in layers]

    lowered = steps(autocast=True) if circumstance == "autocast" else steps(precision=circumstance)
    assert all(map(torch.equal, lowered, steps()))


@pytest.mark.parametrize("circumstance", ["autocast", "medium"])
def test_lowered_precision_would_reach_the_products_of_a_step(circumstance: str) -> None:
    """What the test above would see if nothing kept it out."""
    Y = points(4096, 64, 0.0)[0][0]
    exact = Y.mT @ Y
    torch.set_float32_matmul_precision("medium" if circumstance == "medium" else "highest")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=circumstance == "autocast"):
            lowered = Y.mT @ Y
    finally:
        torch.set_float32_matmul_precision("highest")
    if circumstance == "medium" and torch.equal(lowered, exact):
        pytest.skip("this CPU multiplies float32 in float32 whatever it is asked")
    assert not torch.equal(lowered.float(), exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_the_step_never_waits_for_the_device() -> None:
    layers = [StiefelLinear(32, 1024, device="cuda") for _ in range(5)]
    optimizer = torch.optim.AdamW([layer.weight for layer in layers], 1e-3, foreach=True)
    for step in range(3):
        for layer in layers:
            layer.weight.grad = torch.randn_like(layer.weight)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert max(distance_to_stiefel(layer.orthonormal).item() for layer in layers) <= 1e-6


@pytest.mark.parametrize("change", [{"step_scale": 0.5}, {"retraction": "exp_map"}], ids=str)
def test_a_changed_layer_steps_by_what_it_is_now(change: dict[str, object]) -> None:
    layer, fresh = StiefelLinear(4, 64), StiefelLinear(4, 64)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (layer, fresh)]
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizers[0].step()
    fresh.load_state_dict(layer.state_dict())
    gradient = torch.randn_like(layer.weight)
    for each, optimizer in zip((layer, fresh), optimizers, strict=True):
        vars(each).update(change)
        each.weight.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(layer.weight, fresh.weight)
