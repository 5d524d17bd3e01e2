"""An adapted model as one program (torch.export, ONNX): for what cannot be merged, the way to run without PEFT."""

import subprocess
import sys
import warnings

import pytest
import small_models
import torch
from methods import one_of_each_paper
from peft import get_peft_model
from torch import Tensor, nn

LOADED = """
import sys, torch
tokens, expected = torch.load(sys.argv[1])
given = torch.export.load(sys.argv[2]).module()(tokens)
assert not {"beyondlora", "peft", "transformers"} & set(sys.modules)
torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
"""


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture
def adapted(method):
    config = method.config(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(small_models.llama(), config)
    small_models.train_a_little(model)
    return Logits(model.eval())


SHAPES = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
OTHERS = small_models.tokens(rows=3, length=9)


@one_of_each_paper
def test_a_program_needs_neither_peft_nor_us(method, adapted, tmp_path):
    program = torch.export.export(adapted, (small_models.tokens(),), dynamic_shapes=SHAPES)
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save((OTHERS, adapted(OTHERS)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "expected.pt"), str(tmp_path / "model.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@one_of_each_paper
def test_onnx_runtime_gives_the_live_models_logits(method, adapted, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            adapted,
            (small_models.tokens(),),
            tmp_path / "model.onnx",
            dynamo=True,
            dynamic_shapes=SHAPES,
            input_names=["input_ids"],
        )
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {"input_ids": OTHERS.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(given), adapted(OTHERS), rtol=1e-5, atol=1e-5)
