"""The PEFT glue, and the only package that subclasses PEFT. Importing it registers the methods."""

from .methods import METHODS
from .register import register

for _config_cls, _model_cls in METHODS.items():
    register(_config_cls.method, _config_cls, _model_cls)
