"""Registration with PEFT, checked in fresh processes where the order of imports matters."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from beyondlora.tuner.methods import METHODS
from beyondlora.tuner.register import register

NAMES = [config_cls.method for config_cls in METHODS]


def run_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_peft_type_is_a_genuine_enum_member(name):
    member = getattr(PeftType, name.upper())
    assert member is PeftType(name.upper()) is PeftType[name.upper()]
    assert member in list(PeftType)
    assert member == name.upper()
    assert hash(member) == hash(name.upper())
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_knows_config_model_and_prefix(name):
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name.upper()]]
    assert METHODS[config_cls] is PEFT_TYPE_TO_TUNER_MAPPING[name.upper()]
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name.upper()] == name + "_"
    assert isinstance(PeftConfig.from_peft_type(peft_type=name.upper()), config_cls)


def test_registering_again_is_harmless():
    for config_cls, model_cls in METHODS.items():
        register(config_cls.method, config_cls, model_cls)


def test_a_foreign_class_under_our_name_is_refused():
    class Foreign(PeftConfig):
        pass

    with pytest.raises(ImportError, match="already registered by beyondlora"):
        register("cera", Foreign, METHODS[next(iter(METHODS))])


ORDERS = [
    "import beyondlora, peft",
    "import peft, beyondlora",
    "import beyondlora, importlib.util; importlib.util.find_spec('peft'); import peft",  # transformers asks so first
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order):
    program = f"{order}; print(peft.PeftConfig.from_peft_type(peft_type='STELLA').r, peft.PeftType.CERA.value)"
    assert run_python(program) == "8 CERA"


def test_the_import_is_cheap_until_something_is_used():
    program = (
        "import sys, beyondlora; print([m for m in ('torch', 'peft', 'transformers', 'yaml') if m in sys.modules])"
    )
    assert run_python(program) == "[]"


def test_a_config_pickled_elsewhere_registers_its_method(tmp_path):
    path = tmp_path / "config.pickle"
    run_python(
        "import beyondlora, pickle; "
        f"pickle.dump(beyondlora.CeraConfig(r=3, base_model_name_or_path='x'), open({str(path)!r}, 'wb'))"
    )
    assert run_python(f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')).peft_type.value)") == "CERA"


def test_an_unknown_name_is_an_attribute_error():
    import beyondlora

    with pytest.raises(AttributeError, match="LoraConfig"):
        _ = beyondlora.LoraConfig
    assert {"CeraConfig", "AuroraConfig", "StellaConfig"} <= set(dir(beyondlora))
