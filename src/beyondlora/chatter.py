"""Keeps off the screen what libraries say of their own accord whenever PEFT is imported or an 8-bit layer is called.

Importing this module does it, for the whole process; to be imported before PEFT. The command line does, and so does the
server that the workers of `compare` and `demo` are forked from; a program that imports beyondlora keeps its loggers.
"""

import logging

CHATTY = (
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",  # that 8 bits compute in half precision, once a call
    "torchao",
)

for _name in CHATTY:
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)  # of its own lines, no child's
