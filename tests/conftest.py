"""Fixtures of the tests that run the main job."""

import multiprocessing
import signal

import pytest


def pytest_configure():
    """A shell that starts the tests in its background has Ctrl-C ignored in them, and in all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A small base model with its tokenizer, a page of text, labelled sentences: see small_runs."""
    import small_runs

    return small_runs.house(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="session")
def process():
    """Run a function in a process of its own, with everything imported already; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["beyondlora.cli", "beyondlora.train", "matplotlib.figure", "small_runs"])

    def run(function, *arguments):
        child = context.Process(target=function, args=arguments)
        child.start()
        child.join(timeout=300)
        return child.exitcode

    return run


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state a process: a run in bfloat16 would set the precision of the next one."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def reads_images():
    """Skip where transformers needs torchvision to read images: 5.14 does, 5.24 does not."""
    from shared_data import VIT
    from transformers import AutoImageProcessor

    try:
        AutoImageProcessor.from_pretrained(VIT)
    except ImportError as error:
        pytest.skip(f"this transformers reads images by a package that is not here: {' '.join(str(error).split())}")
