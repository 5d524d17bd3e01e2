"""Two processes share an evaluation out and find what one finds; what stops one of them stops both."""

import json
import multiprocessing
import os
import sys
import types
from pathlib import Path

import pytest
import small_runs
import torch
from two_processes import free_port

from beyondlora import processes

QUESTIONS = [
    {"prompt": f"{word} {number}? answer format: cat/dog", "completion": f"it is {('cat', 'dog')[number % 2]}"}
    for number, word in enumerate(["who ran", "who sat on the mat", "and who"] * 7)
]
POISONED = 3  # the training step at which one process's loss is no number


def asked(house, output, **changes):
    return small_runs.recipe(
        house,
        **{
            "output_dir": str(output),
            "dataset_name": str(Path(output).parent / "questions.jsonl"),
            "prompt_field": "prompt",
            "completion_field": "completion",
            "completion_separator": " ",
            "answer_field": "answer",
            "metrics": ["multiple_choice", "exact_match"],
            "forgetting_dataset_name": str(house / "text.txt"),
            "eval_fraction": 0.5,
            "max_length": 64,
            "max_new_tokens": 6,
            "per_device_eval_batch_size": 3,
            "max_steps": 4,
        }
        | changes,
    )


def work(rank: int, world: int, port: int, house: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    from accelerate import PartialState

    from beyondlora.evaluate import evaluate
    from beyondlora.train import train

    PartialState(cpu=True)
    assert processes.count() == world
    mine = processes.share(7)
    assert processes.gathered(torch.tensor(mine) * 10, 7).tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert processes.gathered_list([str(number) for number in mine], 7) == list("0123456")
    assert processes.anywhere(torch.tensor(rank == 1))
    assert not processes.anywhere(torch.tensor(False))

    passed: list[tuple[int, int]] = []
    kept = folder / "kept.jsonl"
    found = evaluate(folder / "run", on_batch=lambda *numbers: passed.append(numbers), keep=kept)
    result = {"share": mine, "metrics": found["metrics"], "rows": passed[0][1], "stopped": ""}
    recipe = asked(house, folder / "poisoned", metrics=None, forgetting_dataset_name=None, max_steps=8)
    poison(rank)
    try:
        train(recipe)
    except FloatingPointError as error:
        result["stopped"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(result))


def poison(rank: int) -> None:
    """Let the loss of the second process become nan at one step."""
    from transformers import LlamaForCausalLM

    forward, calls = LlamaForCausalLM.forward, iter(range(1_000_000))

    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and rank == 1 and next(calls) == POISONED:
            output.loss = output.loss * float("nan")
        return output

    LlamaForCausalLM.forward = poisoned


@pytest.fixture(scope="module")
def results(house, tmp_path_factory):
    """What one process found, and each of two."""
    from accelerate.state import AcceleratorState

    from beyondlora.train import train

    folder = tmp_path_factory.mktemp("shared")
    rows = [row | {"answer": row["completion"][6:]} for row in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = train(asked(house, folder / "run"))["metrics"]
    AcceleratorState._reset_state(reset_partial_state=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["beyondlora.cli", "beyondlora.train", "matplotlib.figure", "small_runs"])
    port = free_port()
    workers = [context.Process(target=work, args=(rank, 2, port, house, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
        waiting = worker.is_alive()
        worker.kill()
        assert not waiting, "a process waits for one that has stopped"
    return folder, alone, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_alone_everything_is_ones_own():
    assert processes.share(3) == [0, 1, 2]
    assert processes.gathered_list(["a", "b"], 2) == ["a", "b"]
    assert torch.equal(processes.gathered(torch.arange(6).view(3, 2), 3), torch.arange(6).view(3, 2))
    assert processes.anywhere(torch.tensor(True))


class Cut(torch.nn.Parameter):
    """As ZeRO 3 leaves a weight: nothing of it on the module, this process's part beside it."""

    def __new__(cls, part):
        weight = super().__new__(cls, torch.empty(0))
        weight.ds_id, weight.ds_tensor = 0, part
        return weight

    def partition(self):
        self.data = torch.empty(0)


class GatheredParameters:
    """As DeepSpeed's, for one process, which has all of every weight."""

    def __init__(self, weights, modifier_rank):
        self.weights, self.modifier_rank = weights, modifier_rank

    def __enter__(self):
        for weight in self.weights:
            weight.data = weight.ds_tensor.clone()

    def __exit__(self, *error):
        for weight in self.weights:
            if self.modifier_rank is not None:
                weight.ds_tensor = weight.detach().clone()
            weight.partition()


@pytest.fixture
def zero(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime", types.ModuleType("deepspeed.runtime"))
    module = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero", module)


def test_weights_that_are_cut_up_are_whole_for_the_time_being(zero):
    cut, plain = Cut(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([plain, cut])
    for together, after in ((processes.whole, torch.ones(3)), (processes.writable, torch.zeros(3))):
        with torch.no_grad(), together(model):
            assert cut.shape == (3,)
            cut.zero_()
        assert cut.shape == (0,)
        assert torch.equal(cut.ds_tensor, after)
    assert torch.equal(plain, torch.ones(2))


def test_what_a_process_keeps_of_a_weight_can_be_put_back():
    for weight in (torch.nn.Parameter(torch.ones(3)), Cut(torch.ones(3))):
        kept = processes.part_here(weight).clone()
        processes.part_here(weight).zero_()
        if isinstance(weight, Cut):
            weight.data = torch.zeros(3)  # whole at the moment, as small ones stay
        processes.put_back(weight, kept)
        assert torch.equal(processes.part_here(weight), torch.ones(3))
        assert weight.shape == ((0,) if isinstance(weight, Cut) else (3,))


def test_every_process_takes_its_share_and_gets_the_figures_of_all(results):
    folder, alone, found = results
    assert [one["share"] for one in found] == [[0, 2, 4, 6], [1, 3, 5, 6]]  # as many for each: a row is seen twice
    assert [one["rows"] for one in found] == [5, 5]  # of 10
    assert found[0]["metrics"] == found[1]["metrics"]
    for name, score in alone.items():
        assert found[0]["metrics"][name]["value"] == pytest.approx(score["value"], rel=1e-6), name
        assert found[0]["metrics"][name]["n"] == score["n"]
    kept = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert kept == [json.loads(line) for line in (folder / "run" / "generations.jsonl").read_text().splitlines()]
    assert [record["row"] for record in kept] == list(range(1, 11))


def test_a_nan_in_one_process_stops_all(results):
    folder, _, found = results
    assert all(f"stopped at step {POISONED + 1}: the loss became" in one["stopped"] for one in found)
    assert "nan" in found[1]["stopped"]
    assert small_runs.weights(folder / "poisoned" / "last")
