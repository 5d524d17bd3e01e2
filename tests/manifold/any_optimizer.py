"""Every optimizer at hand on two Stiefel factors and the core between them, under everything that is put around it.

    PYTHONPATH=src:tests/manifold:tests python -m any_optimizer > docs/optimizers.md

An optimizer follows the law where the factors stay orthonormal, every weight moves, the loss falls, and the weights end
where they end on plain parameters whose instance hooks do algorithm 1 literally, in NumPy with an SVD.
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import inspect
import io
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import reference
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from beyondlora.adapters import StellaAdapter
from beyondlora.doctor.answer import Answer, WrongResultError, ask
from beyondlora.doctor.optimizers import HOMES, _classes
from beyondlora.manifold import StiefelLinear, distance_to_stiefel

STEPS, WIDTH, RANK, ROWS = 4, 512, 8, 32  # factors of 4,096 entries: smaller ones have no 8-bit states
SAME, COARSE = 2e-3, 2e-2  # of the way, root mean square: float32's rounding through signs; through few bits
FEW_BITS = ("8bit", "4bit", "Fp8", "Muon")  # Muon orthogonalises in bfloat16
RATES = {
    "SGD": 0.05,
    "RMSprop": 1e-3,
    "ASGD": 0.05,
    "Adadelta": 1.0,
    "Rprop": 1e-3,
    "LARS": 30.0,
    "PytorchLARS": 30.0,
    "LBFGS": 1.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bitsandbytes SGD": {"momentum": 0.5},
    "bitsandbytes LARS": {"momentum": 0.5},
    "bitsandbytes PytorchLARS": {"momentum": 0.5},
    "transformers Adafactor": {"relative_step": False, "scale_parameter": False},
}


class Literal:
    """Algorithm 1 around the steps of one optimizer on plain parameters, word by word."""

    def __init__(self, model: StellaAdapter, optimizer: Optimizer) -> None:
        owned = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        factors = [(model.up.weight, False), (model.down.weight, True)]
        self.factors = [(weight, wide) for weight, wide in factors if id(weight) in owned]
        self.starts: list[np.ndarray] = []
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        self.starts = [upright(weight, wide) for weight, wide in self.factors]
        for (weight, wide), Y in zip(self.factors, self.starts, strict=True):
            if weight.grad is not None:
                with np.errstate(invalid="ignore"):  # of a poisoned gradient
                    G = reference.riemannian_gradient(Y, upright(weight.grad, wide))
                weight.grad.copy_(torch.from_numpy(G.T if wide else G))

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        for (weight, wide), Y in zip(self.factors, self.starts, strict=True):
            xi = reference.tangent_projection(Y, upright(weight, wide) - Y)
            if xi.any():
                Y = reference.polar_retraction(Y, xi)
                weight.copy_(torch.from_numpy(Y.T if wide else Y))


def upright(matrix: Tensor, wide: bool) -> np.ndarray:
    array = matrix.detach().numpy().astype(np.float64)
    return array.T if wide else array


Attach = Callable[[StellaAdapter, Optimizer], object]
Make = Callable[[Any], Optimizer]


class Regression:
    """A branch that is to become another one, the gradients of which are added up before a step."""

    def __init__(self, geometry: Any, make: Make, attach: Attach) -> None:
        torch.manual_seed(0)
        start, goal = (StellaAdapter(WIDTH, WIDTH, RANK) for _ in range(2))
        self.model = StellaAdapter(WIDTH, WIDTH, RANK, geometry=geometry)
        self.model.load_state_dict(start.state_dict())
        self.x = torch.randn(ROWS, WIDTH)
        with torch.no_grad():
            self.y = goal(self.x)
        self.make, self.attach = make, attach
        self.first = self.loss().item()

    def optimizer(self, parameters: Any = None, **options: Any) -> Optimizer:
        """A new optimizer on the model's weights, in training mode."""
        made = self.make(list(self.model.parameters()) if parameters is None else parameters, **options)
        self.attach(self.model, made)
        getattr(made, "train", lambda: None)()  # schedule-free ones have two modes
        return made

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().sum() / ROWS

    def steps(self, optimizer: Any, count: int = STEPS, before: Callable[[], object] = lambda: None) -> None:
        for _ in range(count):
            self.backward(optimizer)
            before()
            step(optimizer, self)

    def backward(self, optimizer: Any) -> None:
        optimizer.zero_grad()
        self.loss().backward()


def step(optimizer: Any, run: Regression) -> None:
    """One step; with a closure where there is no other way."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is None or closure.default is not inspect.Parameter.empty:
        optimizer.step()
        return

    def again() -> Tensor:
        run.backward(optimizer)
        return run.loss()

    optimizer.step(again)


# What is put around it: a function that trains for STEPS steps ---------------------------------------------------


def plain(run: Regression) -> None:
    """`optimizer.step()`, as torch chooses to do it."""
    run.steps(run.optimizer())


def variant(run: Regression, **options: bool) -> None:
    """torch's implementation of that name (loop: `foreach=False`)."""
    check_offered(run, options)
    run.steps(run.optimizer(**options))


def check_offered(run: Regression, options: dict[str, bool]) -> None:
    if not set(options) <= set(inspect.signature(getattr(run.make, "func", run.make)).parameters):
        raise NotOfferedError


def groups(run: Regression) -> None:
    """Parameter groups with learning rates of their own."""
    factors, core = [run.model.up.weight, run.model.down.weight], [run.model.core.weight]
    rate = run.optimizer().param_groups[0]["lr"]
    run.steps(run.optimizer([{"params": factors, "lr": rate / 2}, {"params": core}]))


def accumulated(run: Regression) -> None:
    """Two backward passes a step."""
    optimizer = run.optimizer()
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rows in (slice(0, 12), slice(12, ROWS)):
            run.loss(rows).backward()
        step(optimizer, run)


def clipped(run: Regression) -> None:
    """`clip_grad_norm_` before the step."""
    run.steps(run.optimizer(), before=lambda: nn.utils.clip_grad_norm_(run.model.parameters(), 0.5))


def scheduled(run: Regression) -> None:
    """A learning-rate scheduler."""
    optimizer = run.optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 0.9**count)
    for _ in range(STEPS):
        run.steps(optimizer, 1)
        schedule.step()


def accelerated(run: Regression) -> None:
    """accelerate's `prepare` and `backward`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(run.model, run.optimizer())
    for _ in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward((model(run.x) - run.y).square().sum() / ROWS)
        step(optimizer, run)


def scaled(run: Regression, poisoned: int | None = None, **options: bool) -> None:
    """A gradient scaler."""
    optimizer, scaler = run.optimizer(**options), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for count in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(run.loss()).backward()
        before = [weight.detach().clone() for weight in run.model.parameters()]
        if count == poisoned:
            run.model.up.weight.grad[3, 2] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        still = all(map(torch.equal, run.model.parameters(), before))
        if still != (count == poisoned):
            raise WrongResultError(f"a step {'did nothing' if still else 'that was to be skipped was taken'}")


def skipped(run: Regression, **options: bool) -> None:
    """A gradient scaler that skips a step because of an infinite gradient."""
    check_offered(run, options)
    scaled(run, poisoned=1, **options)


def nested(run: Regression) -> None:
    """An optimizer whose step calls it."""
    run.steps(Outer(run.optimizer()))


class Outer(Optimizer):
    """As Lookahead or torch's ZeroRedundancyOptimizer: an optimizer around an optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([weight for group in inner.param_groups for weight in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def copied(run: Regression) -> None:
    """A deep copy of model and optimizer goes on."""
    optimizer = run.optimizer()
    run.steps(optimizer, STEPS // 2)
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        hooks.clear()  # the literal ones hold the model that is copied
    run.model, optimizer = copy.deepcopy((run.model, optimizer))
    run.attach(run.model, optimizer)
    run.steps(optimizer, STEPS - STEPS // 2)


def reloaded(run: Regression) -> None:
    """The state dicts of model and optimizer go into new ones."""
    optimizer = run.optimizer()
    run.steps(optimizer, STEPS // 2)
    file = io.BytesIO()
    torch.save([run.model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    run.model = copy.deepcopy(run.model)
    [nn.init.zeros_(weight) for weight in run.model.parameters()]
    run.model.load_state_dict(weights)
    optimizer = run.optimizer()
    optimizer.load_state_dict(state)
    run.steps(optimizer, STEPS - STEPS // 2)


def frozen(run: Regression) -> None:
    """U is frozen for two steps in the middle."""
    optimizer, factor = run.optimizer(), run.model.up.weight
    for count in range(STEPS):
        factor.requires_grad_(count not in (1, 2))
        before = factor.detach().clone()
        run.steps(optimizer, 1)
        if torch.equal(factor, before) == factor.requires_grad:
            raise WrongResultError(f"a factor {'stood still' if factor.requires_grad else 'moved while it was frozen'}")


def in_backward(run: Regression) -> None:
    """An optimizer a weight, stepped inside the backward pass."""
    optimizers = {weight: run.optimizer([weight]) for weight in run.model.parameters()}

    def step_at_once(weight: Tensor) -> None:
        step(optimizers[weight], run)
        weight.grad = None

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step_at_once)
    for _ in range(STEPS):
        run.loss().backward()


WRAPPERS: dict[str, Callable[[Regression], None]] = {
    "plain": plain,
    "loop": partial(variant, foreach=False),
    "foreach": partial(variant, foreach=True),
    "fused": partial(variant, fused=True),
    "capturable": partial(variant, capturable=True),
    "groups": groups,
    "accumulated": accumulated,
    "clipped": clipped,
    "scheduled": scheduled,
    "accelerate": accelerated,
    "scaler": scaled,
    "skipped": skipped,
    "skipped, fused": partial(skipped, fused=True),
    "nested": nested,
    "deepcopy": copied,
    "state dict": reloaded,
    "frozen": frozen,
    "in backward": in_backward,
}


class NotOfferedError(BaseException):
    """The optimizer has no such option; no answer to `ask`."""


# The verdict -----------------------------------------------------------------------------------------------------


@cache
def optimizers() -> dict[str, Make]:
    """Name → constructor of every optimizer of the packages at hand."""
    found: dict[str, Make] = {}
    for home, (module, package) in HOMES.items():
        for name, kind in _classes(module) if importlib.util.find_spec(package) else ():
            options = OPTIONS.get(f"{home} {name.removesuffix('32bit').removesuffix('8bit')}", {})
            found[f"{home} {name}"] = partial(kind, **rate(kind), **options)
    return found


def rate(kind: type[Optimizer]) -> dict[str, float]:
    if "lr" not in inspect.signature(kind).parameters:
        return {}
    return {"lr": RATES.get(kind.__name__.removesuffix("32bit").removesuffix("8bit"), 1e-2)}


def verdict(name: str, wrapper: str) -> Answer | None:
    """What came of it; "approximate" is what is not possible with plain weights either, None what is not offered."""
    make, train = optimizers()[name], WRAPPERS[wrapper]
    ours = Regression("stiefel", make, lambda model, optimizer: None)
    literal = Regression("euclidean", make, Literal)
    start = [weight.detach().clone() for weight in ours.model.parameters()]
    try:
        answer = quietly(partial(train, ours))
        if answer.state == "refused" and "Stiefel" in answer.why:
            still = all(map(torch.equal, ours.model.parameters(), start))
            return answer if still else Answer("wrong", "refused after weights had moved")
        plainly = quietly(partial(train, literal))
    except NotOfferedError:
        return None
    if plainly.state != "yes":
        return Answer("approximate", plainly.why)
    if answer.state == "yes" and (faults := "; ".join(broken_laws(ours, literal, start))):
        return Answer("wrong", faults)
    return answer


def quietly(probe: Callable[[], None]) -> Answer:
    """`ask`, without what packages print and warn of, and without a compiler."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        return ask(probe)


def broken_laws(ours: Regression, literal: Regression, start: list[Tensor]) -> Iterator[str]:
    """What is not as it has to be after training."""
    same = COARSE if any(few in ours.make.func.__name__ for few in FEW_BITS) else SAME
    for layer in ours.model.modules():
        if isinstance(layer, StiefelLinear) and not distance_to_stiefel(layer.orthonormal) <= 2e-6:
            yield f"off the manifold by {distance_to_stiefel(layer.orthonormal):.1e}"
    for weight, theirs, before in zip(ours.model.parameters(), literal.model.parameters(), start, strict=True):
        way = (weight - before).square().mean().sqrt()
        if not way > 1e-5:
            yield "a weight did not move"
        elif not (apart := (weight - theirs).square().mean().sqrt() / way) <= same:
            yield f"{apart:.1e} of the way from the literal algorithm"
    if not ours.loss().item() < ours.first:
        yield "the loss did not fall"


# The document ----------------------------------------------------------------------------------------------------

SIGNS = {"yes": "yes", "refused": "–", "approximate": "·", "wrong": "✗"}
HEAD = """\
# Optimizers around StelLA's factors

Every optimizer of the packages at hand, and what is put around it. Made by

    PYTHONPATH=src:tests:tests/manifold python -m any_optimizer > docs/optimizers.md

and held by `tests/manifold/test_any_optimizer.py`, which does it all again. *yes*: after {steps} steps in float32 the
factors are orthonormal to 2e-6, every weight has moved, the loss has fallen, and the weights are where the literal
algorithm 1 (NumPy, SVD) brings plain weights with the same optimizer and the same things around it, to {same:.0e} of
the way ({coarse:.0e} where moments have few bits). *–*: refused by us, before a weight has moved. *·*: impossible with
plain weights too, on a CPU. Blank: there is no such option.

An average of weights (`torch.optim.swa_utils.AveragedModel`, EMA, a soup of checkpoints) lies off the manifold,
whatever trained them. Saving brings its factors back and says so (far off it refuses); that is another model than the
average, so save it, load it, and evaluate what was loaded. With `stella_geometry="euclidean"` there is no manifold to
leave.

{versions}.
"""
Signs = tuple[str, ...]


def signs(name: str) -> tuple[Signs, dict[str, Answer]]:
    """The optimizer's line of the table, and the answers that need a reason."""
    answers = {wrapper: verdict(name, wrapper) for wrapper in WRAPPERS}
    reasons = {wrapper: answer for wrapper, answer in answers.items() if answer and answer.state != "yes"}
    return tuple(SIGNS[answer.state] if answer else " " for answer in answers.values()), reasons


def main() -> None:
    """Print the document."""
    names = ("torch", "transformers", "accelerate", "bitsandbytes", "torchao", "schedulefree")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    lines: dict[tuple[str, Signs], list[str]] = {}
    whys: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for name in optimizers():
        home, kind = name.split()
        found, reasons = signs(name)
        lines.setdefault((home, found), []).append(kind)
        for wrapper, answer in reasons.items():
            why = answer.why.replace(kind, "it")[:120]
            whys.setdefault((SIGNS[answer.state], home, why), {}).setdefault(kind, []).append(wrapper)
    text = [HEAD.format(steps=STEPS, same=SAME, coarse=COARSE, versions=versions)]
    text += ["| package | optimizers | " + " | ".join(WRAPPERS) + " |", "|---" * (len(WRAPPERS) + 2) + "|"]
    text += [f"| {home} | {', '.join(kinds)} | {' | '.join(found)} |" for (home, found), kinds in lines.items()]
    text += ["", "What is put around them:", ""]
    told: dict[str, list[str]] = {}
    for name, wrapper in WRAPPERS.items():
        told.setdefault(getattr(wrapper, "func", wrapper).__doc__ or "", []).append(name)
    text += [f"- **{'; '.join(columns)}**: {what}" for what, columns in told.items()]
    text += ["", "Why not:", ""]
    text += [f"- {sign} {home}: {listed(kinds)}: {why}" for (sign, home, why), kinds in whys.items()]
    print("\n".join(text))  # noqa: T201


def listed(kinds: dict[str, list[str]]) -> str:
    """Which optimizers in which columns, shortened."""
    columns = dict.fromkeys(wrapper for wrappers in kinds.values() for wrapper in wrappers)
    names = ", ".join(kinds) if len(kinds) <= 6 else f"{len(kinds)} optimizers"
    return f"{names} ({', '.join(columns) if len(columns) <= 4 else f'{len(columns)} columns'})"


if __name__ == "__main__":
    main()
