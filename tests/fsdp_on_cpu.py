"""`beyondlora` with an accelerate that takes processes on a CPU for such as FSDP is there for.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 tests/fsdp_on_cpu.py train recipe.yaml

By itself accelerate answers the request with data parallel there; torch's FSDP2 runs on any device. With DIES_AT the
first process kills itself as soon as it makes a folder with this in its name.
"""

import os
import signal
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from beyondlora.cli import main

begin = state.AcceleratorState.__init__


def begin_as_accelerators(self: state.AcceleratorState, *args: object, **kwargs: object) -> None:
    """Say MULTI_XPU, which no CPU contradicts, while it is decided how processes share a model."""
    processes = state.PartialState()
    if processes.distributed_type == DistributedType.MULTI_CPU:
        processes._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    begin(self, *args, **kwargs)


def die(event: str, arguments: tuple[Any, ...]) -> None:
    """Be killed."""
    if event == "os.mkdir" and os.environ["DIES_AT"] in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    state.AcceleratorState.__init__ = begin_as_accelerators
    if os.environ.get("DIES_AT") and os.environ["RANK"] == "0":
        sys.addaudithook(die)
    main()
