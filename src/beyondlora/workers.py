"""Several short trainings at once, each in a process of its own on one thread.

A model this small gains nothing from a second thread (a run takes 8.3 s with one and 11.6 s with two, on a busy
machine even minutes), two runs side by side do. A process a task: what one of them does to itself, whether it runs out
of memory or is killed, is the result of that task and of no other.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import connection
from typing import Any

from .interrupts import held_back
from .progress import Progress

NOT_BEGUN = -1  # in place of the number of steps taken
NOT_BEGUN_MESSAGE = (
    "A worker process could not begin (exit code {code}; its own error stands above). Every worker loads the script "
    'that was started: call this in it beneath `if __name__ == "__main__":`, and not in one read from standard input.'
)


class WorkerDiedError(RuntimeError):
    """A worker ended without a result: it was killed, or ran out of memory."""


def side_by_side(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    *,
    count: int | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[int, Any]]:
    """Call `function(*task, progress)` in a process for every task; yield (task number, result) as they finish.

    A task that raised yields its exception instead of a result. Closing the iterator, Ctrl-C and errors end the
    workers at once; a worker whose parent is killed ends itself.

    Args:
        count: processes at a time; None = one a core.
        progress: told how many training steps all tasks together have taken.

    Raises: RuntimeError, where a worker ended before it got to its task: it would with every task.

    >>> for number, result in side_by_side(train_one, [(recipe,) for recipe in recipes], count=2):
    ...     ...
    """
    # A fork server loads the function's module, and with it the libraries, once for all workers; Windows has none.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([f"{__package__}.chatter", function.__module__])
    steps = context.Array("i", [NOT_BEGUN] * max(len(tasks), 1))
    waiting = list(range(len(tasks)))[::-1]
    running: dict[Any, tuple[int, Any]] = {}  # its end of the pipe -> (task number, process)
    try:
        while waiting or running:
            while waiting and len(running) < (count or os.cpu_count() or 1):
                number = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(sender, steps, number, function, tasks[number]))
                with held_back():  # a worker that is begun and not yet known could not be ended
                    process.start()
                    sender.close()
                    running[receiver] = (number, process)
            for receiver in connection.wait(list(running), timeout=0.5):
                number, process = running.pop(receiver)
                yield number, _result(receiver, process, begun=steps[number] != NOT_BEGUN)
            if progress is not None:
                finished = len(tasks) - len(waiting) - len(running)
                progress.advance(sum(max(taken, 0) for taken in steps), f"{finished} of {len(tasks)} runs finished")
    finally:
        for _, process in running.values():
            process.terminate()
        for receiver, (_, process) in running.items():
            process.join()
            receiver.close()


def _result(receiver: Any, process: Any, begun: bool) -> Any:
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        if code > 0 and not begun:
            raise RuntimeError(NOT_BEGUN_MESSAGE.format(code=code)) from None
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        result = WorkerDiedError(f"the process ended without a result ({how}); it may have run out of memory")
    except Exception as error:  # a result that does not unpickle here
        result = RuntimeError(f"a worker's result could not be read ({type(error).__name__}: {error})")
    finally:
        receiver.close()
    process.join()
    return result


def _work(sender: Any, steps: Any, number: int, function: Callable[..., Any], task: tuple[Any, ...]) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    steps[number] = 0
    try:
        result = function(*task, _Told(steps, number))
        sender.send(result)
    except Exception as error:
        sender.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """The exception, or its words where it would not arrive: one that needs arguments pickles and does not unpickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """Two processes must not write one run: where the parent is gone, its command may have been given again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _Told(Progress):
    """A worker's training steps, told through shared memory."""

    def __init__(self, steps: Any, number: int) -> None:
        self.steps, self.number, self.training = steps, number, False

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember whether the steps that follow are training steps."""
        self.training = what == "training"

    def advance(self, done: int, note: str = "") -> None:
        """Tell the parent."""
        if self.training:
            self.steps[self.number] = done


def results(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], *, progress: Progress | None = None
) -> list[Any]:
    """The results of `side_by_side` in the order of the tasks; raises what the first task to fail raised."""
    found: dict[int, Any] = {}
    with contextlib.closing(side_by_side(function, tasks, progress=progress)) as finished:
        for number, result in finished:
            if isinstance(result, Exception):
                raise result
            found[number] = result
    return [found[number] for number in range(len(tasks))]
