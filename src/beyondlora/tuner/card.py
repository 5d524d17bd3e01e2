"""What a model card says of loading an adapter of ours, which PEFT's own card does not know."""

import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from peft.utils import CONFIG_NAME

# The place that PEFT's template leaves for it.
PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"


def how_to_load(method: str, where: str) -> str:
    """The lines that load an adapter of a method, `where` being its folder or repository."""
    return (
        f"A {method} adapter. PEFT learns the method by an import:\n\n"
        "    import beyondlora\n    from peft import PeftModel\n\n"
        f'    model = PeftModel.from_pretrained(base, "{where}")\n'
    )


def complete_cards(folder: Path, method: str) -> None:
    """Add those lines, and a tag, to the card that PEFT has written for an adapter folder; other READMEs stay.

    For an adapter with a name PEFT writes it into the folder above, unless an adapter lies there: that one's it is.
    """
    _complete(folder / "README.md", method)
    if not (folder.parent / CONFIG_NAME).exists():
        _complete(folder.parent / "README.md", method)


def _complete(path: Path, method: str) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not re.match(r"---\n(?:.*\n)*?library_name: peft\n", text):
        return
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError):  # somebody's own, and no reason to lose an adapter
        return
    lines = how_to_load(method, "path/to/adapter")
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), "beyondlora"})
    if PLACE in card.text:
        card.text = card.text.replace(PLACE, lines, 1)
    elif "import beyondlora" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n## How to load it\n\n{lines}"
    card.save(path)
