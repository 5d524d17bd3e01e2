"""The optimizers at hand, each tried on a factor; the trial must see a factor that drifts or stands still."""

import re
from pathlib import Path

import pytest
import torch

from beyondlora.doctor import optimizers as room
from beyondlora.doctor.optimizers import probe_optimizers
from beyondlora.doctor.report import SIGNS
from beyondlora.manifold import riemannian

CAPABILITIES = Path(__file__).resolve().parents[2] / "docs/capabilities.md"


@pytest.fixture(scope="module")
def found():
    return probe_optimizers()


def test_the_documented_table_is_what_comes_out(found):
    table = CAPABILITIES.read_text(encoding="utf-8").partition("## Optimizers")[2]
    printed = dict(re.findall(r"^\| (\S+ \S+) \| (yes|≈|–|✗|\?) \|", table, re.MULTILINE))
    here = {name: SIGNS[answer.state] for name, answer in found.items() if answer.state != "absent"}
    assert len(printed) > 50
    common = here.keys() & printed.keys()  # other versions have others, and not every package is everywhere
    assert {name: here[name] for name in common} == {name: printed[name] for name in common}


def test_the_libraries_that_people_take_optimizers_from_are_all_asked(found):
    answers = {
        "bitsandbytes AdamW8bit": "yes",
        "torchao AdamW8bit": "yes",
        "schedule-free AdamWScheduleFree": "refused",
    }
    for name, state in answers.items():
        home = name.split()[0]
        if home in found:  # then its package is not installed
            assert found[home].state == "absent"
        else:
            assert found[name].state == state
    assert found["transformers Adafactor"].state == "yes"


def test_torchs_dense_optimizers_work_and_the_others_say_why_not(found):
    for name in ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Rprop", "Muon"):
        assert found[f"torch {name}"].state == "yes", name
    for name in ("torch LBFGS", "torch SparseAdam"):
        assert found[name].state == "refused"
        assert found[name].why


@pytest.mark.parametrize("home", [home for home in room.HOMES if home not in ("torch", "transformers")])
def test_a_package_that_is_not_here_is_named(monkeypatch, home):
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    assert probe_optimizers()[home].state == "absent"


def test_a_package_that_is_here_and_broken_is_an_answer_and_no_end(monkeypatch, tmp_path):
    (tmp_path / "broken_optimizers.py").write_text("raise RuntimeError('libsomething.so is missing.')")
    monkeypatch.syspath_prepend(tmp_path)
    homes = {"broken": ("broken_optimizers", "broken_optimizers"), "transformers": room.HOMES["transformers"]}
    monkeypatch.setattr(room, "HOMES", homes)
    found = probe_optimizers()
    assert (found["broken"].state, found["broken"].why) == ("refused", "libsomething.so is missing.")
    assert found["transformers Adafactor"].state == "yes"


def test_a_factor_that_drifts_is_noticed(monkeypatch):
    monkeypatch.setattr(riemannian, "_begin", lambda *_: None)  # the step is switched off
    found = probe_optimizers()["torch AdamW"]
    assert (found.state, "left the manifold" in found.why) == ("wrong", True)


def test_a_factor_that_stands_still_is_noticed(monkeypatch):
    class Idle(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            return None

    monkeypatch.setattr(room, "_classes", lambda module: iter([("Idle", Idle)]))
    assert "did not move" in probe_optimizers()["torch Idle"].why
