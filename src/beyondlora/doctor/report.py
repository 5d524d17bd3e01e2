"""What the probes found, for people (Markdown, which a terminal shows as well) and for machines (JSON)."""

from typing import Any

from .answer import Answer
from .probes import FEATURES

SIGNS = {"yes": "yes", "approximate": "≈", "refused": "–", "wrong": "✗", "absent": "?"}
LEGEND = (
    "yes: done and checked; ≈: done, differs, and a warning says so; –: refused with a reason; ✗: ran with a false "
    "result; ?: needs a package that is not installed."
)
Matrix = dict[str, dict[str, dict[str, Answer]]]


def as_json(environment: dict[str, Any], matrix: Matrix, optimizers: dict[str, Answer]) -> dict[str, Any]:
    """Everything as plain mappings; an answer is {"state": ..., "why": ...}."""
    return {
        "environment": environment,
        "methods": {
            method: {
                layer: {feature: vars(answer) for feature, answer in features.items()}
                for layer, features in layers.items()
            }
            for method, layers in matrix.items()
        },
        "optimizers": {name: vars(answer) for name, answer in optimizers.items()},
    }


def as_markdown(environment: dict[str, Any], matrix: Matrix, optimizers: dict[str, Answer]) -> str:
    """One table a method, one of optimizers, and under them why something does not work."""
    features = "\n".join(f"- **{name}**: {(probe.__doc__ or '').strip()}" for name, probe in FEATURES.items())
    parts = [_environment(environment), "What is asked of each method and layer:", features, LEGEND]
    for method, layers in matrix.items():
        parts += [f"## {method}", _table(layers), _reasons(layers)]
    parts += ["## Optimizers, each on Stiefel factors", _optimizers(optimizers)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    missing = ", ".join(name for name, version in environment["versions"].items() if not version)
    accelerator = environment["accelerator"]
    device = f"{accelerator['count']} × {accelerator['name']}" if accelerator else "no accelerator"
    distributed = environment["distributed"]
    processes = f"{distributed['processes']} process(es), backends {', '.join(distributed['backends']) or 'none'}"
    return (
        f"Python {environment['python']}, {versions}; not installed: {missing or 'nothing'}. "
        f"{environment['cpus']} processors, {environment['torch_threads']} torch threads, {device}; {processes}."
    )


def _table(layers: dict[str, dict[str, Answer]]) -> str:
    features = list(next(iter(layers.values())))
    lines = [_row(["layer", *features]), _row(["---"] * (len(features) + 1))]
    lines += [_row([layer, *(SIGNS[found[name].state] for name in features)]) for layer, found in layers.items()]
    return "\n".join(lines)


def _reasons(layers: dict[str, dict[str, Answer]]) -> str:
    """Each reason once, with what it is the reason of."""
    places: dict[str, list[tuple[str, str]]] = {}
    for layer, features in layers.items():
        for feature, answer in features.items():
            if answer.why:
                places.setdefault(answer.why, []).append((layer, feature))
    return "\n".join(f"- {_places(where, layers)}: {why}" for why, where in places.items())


def _places(where: list[tuple[str, str]], layers: dict[str, dict[str, Answer]]) -> str:
    """Say "layer" where all of its features share the reason, else "layer (features)"."""
    by_layer: dict[str, list[str]] = {}
    for layer, feature in where:
        by_layer.setdefault(layer, []).append(feature)
    names: dict[str, list[str]] = {}
    for layer, features in by_layer.items():
        names.setdefault("" if len(features) == len(layers[layer]) else f" ({', '.join(features)})", []).append(layer)
    return "; ".join(", ".join(group) + features for features, group in names.items())


def _optimizers(optimizers: dict[str, Answer]) -> str:
    lines = [_row(["optimizer", "works", "why not"]), _row(["---"] * 3)]
    return "\n".join([*lines, *(_row([name, SIGNS[found.state], found.why]) for name, found in optimizers.items())])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
