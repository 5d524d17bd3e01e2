"""Several short trainings at once, each in a process of its own on one thread.

A model this small gains nothing from a second thread (a run takes 8.3 s with one and 11.6 s with two, on a busy
machine even minutes), two runs side by side do.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ..progress import Progress

_steps: Any = None  # in a worker: the array it shares with the parent, one entry a task


class Workers:
    """A pool of processes that tell how far each of their tasks is.

    >>> with workers(count=2, tasks=20) as pool:
    ...     results = pool.run(train_one, recipes, progress)
    """

    def __init__(self, pool: ProcessPoolExecutor, steps: Any) -> None:
        self._pool, self._steps = pool, steps

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], progress: Progress) -> list[Any]:
        """Call `function(*task, progress)` in a worker for every task; return the results in order."""
        futures: list[Future[Any]] = [
            self._pool.submit(_call, number, function, task) for number, task in enumerate(tasks)
        ]
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.5)
            finished = len(futures) - len(waiting)
            progress.advance(sum(self._steps), f"{finished} of {len(futures)} runs finished")
        return [future.result() for future in futures]


@contextmanager
def workers(*, tasks: int, count: int | None = None) -> Iterator[Workers]:
    """Start the processes, one a core unless `count` says otherwise; on Ctrl-C or an error, end them at once."""
    # A fork server loads the libraries once for all workers; Windows has none.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["beyondlora.demo.run"])
    steps = context.Array("i", tasks)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(count or os.cpu_count() or 1, tasks), mp_context=context, initializer=_start, initargs=(steps,)
    )
    try:
        yield Workers(pool, steps)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()
        raise


def _start(steps: Any) -> None:
    import torch

    global _steps
    _steps = steps
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent answers it
    torch.set_num_threads(1)


def _call(number: int, function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(*task, _Told(number))


class _Told(Progress):
    """A worker's training steps, told through shared memory."""

    def __init__(self, number: int) -> None:
        self.number, self.training = number, False

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember whether the steps that follow are training steps."""
        self.training = what == "training"

    def advance(self, done: int, note: str = "") -> None:
        """Tell the parent."""
        if self.training:
            _steps[self.number] = done
