"""The result on disk: analysis.json, layers.csv, spectra.csv and the pictures, each written atomically."""

import csv
import io
from pathlib import Path
from typing import Any

from ..curves import can_draw
from ..progress import Progress
from ..run_folder import check_writable, write_json, write_text
from .pictures import PICTURES, draw_all
from .summary import FIGURES

RESULT = "analysis.json"
LAYER_COLUMNS = ("rank", "tokens", *FIGURES)
LAYERS_HEADER = ("adapter", "layer", *LAYER_COLUMNS, "update_effective_rank")
SPECTRA_HEADER = ("adapter", "layer", "of", "index", "singular_value")


def check_out(out: Path) -> None:
    """Refuse a place where the result cannot go, or where it would lie among files of another kind."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / RESULT).exists():
        raise FileExistsError(f"--out {out} holds other files; name a new folder, or that of an earlier analysis.")
    check_writable(out / RESULT)


def write(out: Path, result: dict[str, Any], progress: Progress) -> None:
    """Write everything; analysis.json last, so that its presence says that the rest is there."""
    write_text(out / "layers.csv", _csv(LAYERS_HEADER, _layer_rows(result)))
    write_text(out / "spectra.csv", _csv(SPECTRA_HEADER, _spectrum_rows(result)))
    for name in PICTURES:  # of an earlier analysis, where this one has nothing to draw
        (out / name).unlink(missing_ok=True)
    if can_draw():
        draw_all(result, out)
    else:
        progress.say("The pictures are skipped: matplotlib is not installed (pip install 'beyondlora[plots]').")
    write_json(out / RESULT, result)


def _csv(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _layer_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (
            adapter["label"],
            layer["name"],
            *(layer[name] for name in LAYER_COLUMNS),
            layer["update"] and layer["update"]["effective_rank"],
        )
        for adapter in result["adapters"]
        for layer in adapter["layers"]
    ]


def _spectrum_rows(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for adapter in result["adapters"]:
        for layer in adapter["layers"]:
            spectra = {"outputs": layer["singular_values"]}
            if layer["update"]:
                spectra["update"] = layer["update"]["singular_values"]
            for of, values in spectra.items():
                rows += [(adapter["label"], layer["name"], of, i, value) for i, value in enumerate(values, start=1)]
    return rows
