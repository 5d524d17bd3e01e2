"""Registration with PEFT: the only lines that touch its private state.

PEFT has no plug-in door: a PEFT type is a member of an enum, and the registry refuses names outside it. A member is
therefore added in place, with everything a member has (look-up by name, value and attribute, iteration, pickling).
"""

from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a method known to PEFT under a lower-case name. Doing it again is harmless.

    Raises: ImportError if somebody else has registered the name.
    """
    member = _peft_type(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if registered is config_cls:
        return
    if registered is not None:
        raise ImportError(
            f"PEFT type {name.upper()} is already registered by {registered.__module__}.{registered.__qualname__}, so "
            "beyondlora cannot register its own. If this is PEFT itself, it now ships the method: use PEFT's, or pin "
            "an older peft. If it is the method authors' package, do not import it beside beyondlora: its adapter "
            "folders load with beyondlora alone."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")


def _peft_type(name: str) -> PeftType:
    """The enum member of this name, added if it is missing."""
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member
