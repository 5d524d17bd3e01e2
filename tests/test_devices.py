"""On an accelerator every method computes what it does on a CPU, without waiting for it, and on Apple's kind as well.

The accelerator is `pretend`: no GPU was at hand. What it cannot show is speed, and how a real one rounds. With `-m gpu`
the same tests run on a real one; nobody has seen them do so.
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device_traffic
import pretend  # skips this file where torch has no such devices
import pytest
import small_models
import small_runs
import torch
from accelerate import PartialState
from methods import Method, every_method, one_of_each_paper
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import TrainingArguments

from beyondlora import StellaConfig
from beyondlora.adapters import cubic, fused
from beyondlora.adapters.aurora import AdaptiveNonlinearLayer
from beyondlora.analyse.profiles import profile
from beyondlora.analyse.run import analyse
from beyondlora.doctor import answer, optimizers, probes
from beyondlora.doctor.layers import LAYER_KINDS, LayerKind
from beyondlora.evaluate import evaluate
from beyondlora.export.distil import distil
from beyondlora.export.lora import adapted_layers
from beyondlora.manifold import distance_to_stiefel
from beyondlora.manifold.guard import check_manifold
from beyondlora.manifold.linear import StiefelLinear
from beyondlora.measure import measure
from beyondlora.train import train as train_recipe

DEVICE = pretend.NAME
FAMILIES = {"llama": small_models.llama, "gpt2": small_models.gpt2}


@pytest.fixture(autouse=True, params=["as CUDA", "as MPS", pytest.param("CUDA", marks=pytest.mark.gpu)])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With all that CUDA has; without float64, factorisations and one-kernel dropout, as Apple's GPUs; a real one."""
    if request.param == "CUDA":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cuda")
        yield request.param
        return
    with pretend.standing_for(request.param.removeprefix("as ").lower()):
        yield request.param


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on everybody takes the device for the one to train on; until `monkeypatch.undo()`."""
    place = TrainingArguments.__dict__["_setup_devices"]

    def setup_devices(arguments: TrainingArguments) -> torch.device:
        place.__get__(arguments)
        arguments._n_gpu = 1
        return torch.device(DEVICE)

    def choose() -> None:
        chosen = torch.device(DEVICE)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: chosen)
        monkeypatch.setattr(PartialState, "default_device", property(lambda state: chosen))
        monkeypatch.setattr(TrainingArguments, "_setup_devices", property(setup_devices))

    return choose


def build(config: Any, family: str = "llama") -> PeftModel:
    model = get_peft_model(FAMILIES[family](), config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a device draws by itself
    return model


def adapted(method: Method, family: str = "llama", **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return build(method.config(target_modules="all-linear", task_type="CAUSAL_LM", **options), family)


def train(model: PeftModel, steps: int = 3, learning_rate: float = 1e-2) -> dict[str, tuple[int, int]]:
    """Take some steps; return for each part of the last one how often it waited for the device, and sent to it."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    for step in range(steps):
        ids = small_models.tokens(seed=step).to(model.device)
        seen = {}

        def done(part: str, seen: dict[str, tuple[int, int]] = seen) -> None:
            seen[part] = (len(pretend.waits), len(pretend.sent))
            pretend.waits.clear()
            pretend.sent.clear()

        done("rows")
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        done("forward")
        loss.backward()
        done("backward")
        optimizer.step()
        done("step")
        optimizer.zero_grad()
    model.eval()
    return seen


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=small_models.tokens().to(model.device), use_cache=False, **inputs).logits.cpu()


@pytest.mark.parametrize("family", FAMILIES)
@every_method
def test_training_is_what_it_is_on_a_cpu_and_waits_for_nothing(method: Method, family: str, kind: str) -> None:
    here, away = adapted(method, family), adapted(method, family).to(DEVICE)
    lora = build(LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family == "gpt2"), family).to(DEVICE)
    train(here)
    ours, theirs = train(away), train(lora)
    for name, weight in here.state_dict().items():
        atol = 2e-2 if kind == "CUDA" else 1e-4  # AdamW makes of a gradient that rounds to another sign another step
        torch.testing.assert_close(away.state_dict()[name].cpu(), weight, rtol=1e-4, atol=atol, msg=name)
    if kind == "as MPS" and method.name.startswith("stella"):
        waits, sent = ours.pop("step")  # its R×R work goes by the CPU, at once for all factors of a rank
        assert (waits - theirs["step"][0], sent) == (2, 2)
    assert ours.items() <= theirs.items()


@one_of_each_paper
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_in_few_passes_is_the_layer_by_definition(
    method: Method, p: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same draws of dropout, too, where the device drops in one kernel, as `nn.Dropout` does."""
    torch.manual_seed(3)
    config = method.config(target_modules=["first", "second"], lora_dropout=p, init_lora_weights=False)
    model = get_peft_model(small_models.Perceptron(), config).to(DEVICE).train()
    x = torch.randn(8, 16).to(DEVICE).requires_grad_()
    wanted = [x, *(weight for weight in model.parameters() if weight.requires_grad)]

    def results() -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        y = model(x)
        return y, *torch.autograd.grad(y.square().sum(), wanted)

    with monkeypatch.context() as patch:
        operations = []
        with pretend.watched(lambda name, *_: operations.append(name)):
            quick = results()
        assert "addmm_" in operations or kind == "CUDA"  # which the definition does not need
        patch.setattr(fused, "is_eager", lambda: False)
        plain = results()
    if p == 0 or kind != "as MPS":
        for ours, theirs in zip(quick, plain, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reading", ["pooled", "per_dim"])
@pytest.mark.parametrize("grid", [(5, (-1.0, 1.0)), (1, (0.0, 0.5)), (9, (-40.0, 7.0))], ids=str)
def test_auroras_layer_is_its_definition_there(
    reading: str, grid: tuple[int, tuple[float, float]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the grid, on its knots, beyond it, and in several pieces; and its second derivative."""
    if kind == "as MPS":
        pytest.skip("a comparison in float64")
    monkeypatch.setattr(cubic, "LARGE_PIECE", 50)
    torch.manual_seed(5)
    (size, (low, high)), rank = grid, 3
    options = {"spline": reading, "grid_size": size, "grid_range": (low, high), "dtype": torch.float64}
    layer = AdaptiveNonlinearLayer(rank, **options).to(DEVICE)
    knots = low + torch.arange(-4, size + 5, dtype=torch.float64) * (high - low) / size
    z = torch.cat(
        [low + (high - low) * (3 * torch.rand(40, rank, dtype=torch.float64) - 1), knots[:, None].repeat(1, 3)]
    )
    z, upstream = z.to(DEVICE).requires_grad_(), torch.randn(len(z), rank, dtype=torch.float64).to(DEVICE)
    results = []
    for compute in (layer.closed_form, layer.by_definition):
        y = compute(z)
        wanted = z, *layer.parameters()
        first = torch.autograd.grad(y, wanted, upstream)
        again = torch.autograd.grad(compute(z), z, upstream, create_graph=True)[0]
        results.append((y, *first, *torch.autograd.grad(again[:40].square().sum(), wanted)))  # a knot has two
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("setting", device_traffic.SETTINGS)
def test_a_layer_moves_fewer_bytes_than_loras_there(setting: str, kind: str) -> None:
    """Counted by benchmarks/device_traffic.py at the widths of LLaMA3-8B."""
    if kind != "as CUDA":
        pytest.skip("counted for CUDA, once")
    with pretend.standing_for("cuda", numbers=False):
        moved = {
            method: device_traffic.count(method, (4096, 4096), 16 if "AuroRA" in method else 32, 4096, setting)[0].bytes
            for method in ("base", "LoRA", "LoRA+drop", "CeRA", "StelLA", "AuroRA", "StelLA+drop", "AuroRA+drop")
        }
    for method in ("CeRA", "StelLA", "AuroRA"):
        assert moved["base"] < moved[method] < 0.9 * moved["LoRA"]
    for method in ("StelLA+drop", "AuroRA+drop"):
        assert moved[method] < 0.95 * moved["LoRA+drop"]


@every_method
def test_an_adapters_life(method: Method, tmp_path: Path) -> None:
    """Made on the device, saved, loaded, switched, mixed, generated with, summed, merged: as on the CPU."""
    torch.manual_seed(3)
    model = get_peft_model(small_models.llama().to(DEVICE), method.config(target_modules="all-linear"))
    train(model)
    model.save_pretrained(tmp_path)
    here = PeftModel.from_pretrained(small_models.llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(here))
    away = PeftModel.from_pretrained(small_models.llama().to(DEVICE), tmp_path)
    assert torch.equal(logits(away), logits(model))
    for each in (away, here):
        torch.manual_seed(4)
        each.add_adapter("second", method.config(target_modules="all-linear", init_lora_weights=False))
        here_or_there = each.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        assert all(weight.device == each.device for weight in here_or_there.parameters())
    away.load_state_dict(here.state_dict())
    torch.testing.assert_close(*(logits(each, adapter_names=["default", "second"]) for each in (away, here)))
    ids = small_models.tokens()
    assert torch.equal(*(each.generate(input_ids=ids.to(each.device), max_new_tokens=4).cpu() for each in (away, here)))
    if method.merge == "exact" and not method.name.startswith("aurora"):
        for each in (away, here):
            each.base_model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "sum")
            each.set_adapter("sum")
        torch.testing.assert_close(logits(away), logits(here))
    if method.merge != "refused":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if method.merge == "static" else "error")
            merged = [copy.deepcopy(each).merge_and_unload(safe_merge=True) for each in (away, here)]
        torch.testing.assert_close(*map(logits, merged))


@pytest.mark.parametrize("start", ["svd_major", "svd_minor", "rando", "zero"])
def test_starts_of_factors_are_made_where_the_model_is(start: str) -> None:
    model = get_peft_model(
        small_models.llama().to(DEVICE), StellaConfig(r=4, target_modules="all-linear", init_lora_weights=start)
    )
    factors = [module for module in model.modules() if isinstance(module, StiefelLinear)]
    assert all(factor.weight.device.type == DEVICE for factor in factors)
    assert max(distance_to_stiefel(factor.orthonormal).item() for factor in factors) < 2e-6


@pytest.mark.parametrize("retraction", ["polar", "exp_map"])
def test_a_factor_made_on_the_device_steps_there(retraction: str) -> None:
    torch.manual_seed(0)
    away = StiefelLinear(4, 64, retraction=retraction, device=DEVICE)
    here = StiefelLinear(4, 64, retraction=retraction)
    here.load_state_dict(away.state_dict())
    gradient = torch.randn(64, 4)
    for layer in (here, away):
        layer.weight.grad = gradient.to(layer.weight.device, copy=True)
        torch.optim.SGD(layer.parameters(), 0.1).step()
    torch.testing.assert_close(away.weight.cpu(), here.weight, rtol=0, atol=1e-6)


def test_a_factor_is_brought_back_loaded_and_refused_there() -> None:
    layer = StiefelLinear(4, 64, device=DEVICE)
    with torch.no_grad():
        layer.weight.mul_(1 + 1e-3)
    with pytest.warns(UserWarning, match="brought back"):
        check_manifold(layer)
    assert distance_to_stiefel(layer.orthonormal).item() < 1e-6
    layer.load_state_dict({"weight": layer.weight.detach().cpu().to(torch.bfloat16)})
    assert distance_to_stiefel(layer.orthonormal).item() < 1e-6
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(ValueError, match="manifold"):
        check_manifold(layer)


def test_a_gradient_that_is_not_finite_is_counted_there_and_said_at_the_next_save() -> None:
    layers = [StiefelLinear(4, 64, device=DEVICE) for _ in range(2)]
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.SGD([layer.weight for layer in layers], 0.1)
    for number, layer in enumerate(layers):
        layer.weight.grad = torch.full_like(layer.weight, float("nan") if number else 0.5)
    optimizer.step()
    assert torch.equal(layers[1].weight.cpu(), before[1].cpu())
    assert not torch.equal(layers[0].weight.cpu(), before[0].cpu())
    with pytest.warns(UserWarning, match="1 steps of single Stiefel factors were refused"):
        check_manifold(nn.ModuleList(layers))


@one_of_each_paper
def test_a_model_over_two_devices_trains_as_on_one(method: Method) -> None:
    """As a `device_map` lays it out: adapters go where their layers are."""
    whole = adapted(method)
    split = adapted(method)
    split.get_base_model().model.layers[1].to(DEVICE)

    def there(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return moved(args, DEVICE), moved(kwargs, DEVICE)

    split.get_base_model().model.layers[1].register_forward_pre_hook(there, with_kwargs=True)
    split.get_base_model().model.layers[1].register_forward_hook(lambda module, args, output: moved(output, "cpu"))
    for model in (whole, split):
        train(model)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name].cpu(), weight, rtol=1e-4, atol=1e-4, msg=name)


def moved(tree: Any, device: str) -> Any:
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


@one_of_each_paper
def test_what_is_measured_there_is_what_is_measured_here(method: Method) -> None:
    """Loss, spectra and the nearest LoRA; each computes in float64, which is fetched where it is lacking."""
    here, away = adapted(method, init_lora_weights=False), adapted(method, init_lora_weights=False).to(DEVICE)
    rows = [{"input_ids": row, "labels": row} for row in small_models.tokens(rows=12).tolist()]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "labels")}

    batches = [{"input_ids": small_models.tokens(seed=seed)} for seed in range(4)]
    losses, layers, distilled = [], [], []
    for model in (here, away):
        data = [moved(batch, str(model.device)) for batch in batches]
        losses.append(measure(model, rows, collate, task="causal-lm")["loss"].value)
        layers.append(profile(model, data))
        distilled.append(distil(model, adapted_layers(model), data))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for ours, theirs in zip(*layers, strict=True):
        torch.testing.assert_close(ours.singular_values, theirs.singular_values.cpu(), rtol=1e-4, atol=1e-5)
    for path, (B, A) in distilled[0].items():
        torch.testing.assert_close(torch.linalg.multi_dot(distilled[1][path]), B @ A, rtol=1e-3, atol=1e-3)


def test_a_method_without_a_bottleneck_is_profiled_by_its_outputs_there() -> None:
    config = LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)
    torch.manual_seed(3)
    here = build(config)
    away = copy.deepcopy(here).to(DEVICE)
    layers = [profile(model, [{"input_ids": small_models.tokens().to(model.device)}]) for model in (here, away)]
    for ours, theirs in zip(*layers, strict=True):
        torch.testing.assert_close(ours.singular_values, theirs.singular_values.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [kind for kind in LAYER_KINDS if kind.package is None], ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", [name for name in probes.methods() if name != "LORA"])
def test_the_doctor_gets_the_same_answers_there(
    method: str, layers: LayerKind, kind: str, choose: Callable[[], None]
) -> None:
    """Beside every kind of layer; but nothing compiles for a device of Python's, and PEFT's conversion takes an SVD."""
    features = [name for name in probes.FEATURES if name not in ("compile", "LoRA" if kind == "as MPS" else "")]
    here = {feature: probes.answer(method, layers, feature) for feature in features}
    choose()
    assert {feature: probes.answer(method, layers, feature) for feature in here} == here


@pytest.mark.parametrize("name", [name for name, _ in optimizers._classes("torch.optim")])
def test_every_optimizer_of_torchs_gets_the_same_answer_there(name: str, choose: Callable[[], None]) -> None:
    optimizer_cls = getattr(torch.optim, name)
    here = answer.ask(lambda: optimizers._train_a_factor(optimizer_cls))
    choose()
    assert answer.ask(lambda: optimizers._train_a_factor(optimizer_cls)) == here


@pytest.mark.filterwarnings("ignore:.pin_memory. argument is set")
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("method", ["aurora", "stella"])
def test_a_recipe_is_trained_evaluated_and_analysed_there(
    method: str, house: Path, tmp_path: Path, choose: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose()
    run = tmp_path / "run"
    summary = train_recipe(small_runs.recipe(house, adapter=small_runs.ADAPTERS[method], output_dir=str(run)))
    there, ranks = evaluate(run)["metrics"]["loss"]["value"], effective_ranks(run)
    assert json.loads((run / "environment.json").read_text(encoding="utf-8"))["device"] == DEVICE
    assert summary["metrics"]["loss"]["value"] == pytest.approx(there, rel=1e-6)
    monkeypatch.undo()
    assert evaluate(run)["metrics"]["loss"]["value"] == pytest.approx(there, rel=1e-6)
    assert ranks == pytest.approx(effective_ranks(run), rel=1e-4)


def effective_ranks(run: Path) -> list[float]:
    return [layer["effective_rank"] for layer in analyse([run])["adapters"][0]["layers"]]
