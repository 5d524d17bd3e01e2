"""The configs: LoRA's names, the defaults of the design, JSON round trips, and refusals that say what to do."""

import json

import pytest
from methods import every_method
from peft import LoraConfig, PeftConfig

from beyondlora import AuroraConfig, CeraConfig, StellaConfig

LORA_FIELDS = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "init_lora_weights",
    "trainable_token_indices",
]


@every_method
def test_configs_take_loras_field_names(method):
    config, lora = method.config(), LoraConfig()
    for name in LORA_FIELDS:
        assert hasattr(config, name), name
        assert hasattr(lora, name), name


def test_the_defaults_are_those_of_the_papers():
    cera, aurora, stella = CeraConfig(), AuroraConfig(), StellaConfig()
    assert (cera.r, cera.lora_alpha, cera.lora_dropout, cera.cera_activation) == (64, None, 0.1, "silu")
    assert (aurora.r, aurora.lora_alpha, aurora.lora_dropout) == (2, 4, 0.0)
    assert (aurora.aurora_mode, aurora.aurora_spline, aurora.aurora_activation) == ("dynamic", "pooled", "tanh")
    assert (aurora.aurora_grid_size, aurora.aurora_spline_order, aurora.aurora_grid_range) == (5, 3, (-1.0, 1.0))
    assert (stella.r, stella.lora_alpha, stella.lora_dropout) == (8, 8, 0.0)
    assert (stella.stella_retraction, stella.stella_diag_s, stella.stella_grad_scaling) == ("polar", False, True)
    assert (stella.stella_geometry, stella.init_lora_weights) == ("stiefel", True)


@every_method
def test_configs_survive_a_json_round_trip(method, tmp_path):
    config = method.config(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert isinstance(loaded.target_modules, set)
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config_cls", "fields", "message"),
    [
        (CeraConfig, {"r": 0}, "r=0 is not a rank"),
        (CeraConfig, {"r": 2.5}, "r=2.5 is not a rank"),
        (StellaConfig, {"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1 is not a rank"),
        (AuroraConfig, {"lora_alpha": 0}, "lora_alpha=0 scales the adapter away"),
        (CeraConfig, {"lora_dropout": 1.0}, r"lora_dropout=1.0 is not a probability in \[0, 1\)"),
        (CeraConfig, {"lora_dropout": -0.1}, "lora_dropout=-0.1 is not a probability"),
        (CeraConfig, {"bias": "lora_only"}, "bias='lora_only' is unknown; choose one of .*cera_only"),
        (CeraConfig, {"layers_pattern": "layers"}, "give layers_to_transform"),
        (CeraConfig, {"init_lora_weights": "svd_major"}, r"init_lora_weights='svd_major' is unknown.*\[True, False\]"),
        (CeraConfig, {"cera_activation": "gelu"}, r"activation='gelu' is unknown; .*\['identity', 'relu', 'silu'\]"),
        (AuroraConfig, {"aurora_mode": "both"}, r"aurora_mode='both' is unknown; .*\['dynamic', 'static'\]"),
        (AuroraConfig, {"aurora_spline": "sum"}, r"spline='sum' is unknown; .*\['per_dim', 'pooled'\]"),
        (AuroraConfig, {"aurora_activation": "relu"}, "activation='relu' is unknown; choose one of .*leaky_relu"),
        (AuroraConfig, {"aurora_fixed": False, "aurora_learnable": False}, "leave nothing of the nonlinear layer"),
        (AuroraConfig, {"aurora_grid_size": 0}, "at least 1 interval"),
        (AuroraConfig, {"aurora_spline_order": -1}, "order .degree. must be 0 or more"),
        (AuroraConfig, {"aurora_grid_range": (1.0, 1.0)}, "is not an interval"),
        (AuroraConfig, {"aurora_grid_range": (0.0, float("inf"))}, "is not an interval"),
        (AuroraConfig, {"aurora_grid_range": (0.0, 1.0, 2.0)}, "is not an interval"),
        (StellaConfig, {"stella_retraction": "qr"}, r"retraction='qr' is unknown; .*\['exp_map', 'polar'\]"),
        (StellaConfig, {"stella_geometry": "sphere"}, "geometry='sphere' is unknown; choose one of"),
        (
            StellaConfig,
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' is unknown; choose one of .*svd_minor",
        ),
        (StellaConfig, {"stella_grad_scaling": -1.0}, "stella_grad_scaling=-1.0 is no dimension"),
        (
            CeraConfig,
            {"modules_to_save": "head"},
            r"modules_to_save='head' is of no use .* a list \(text each\) or None",
        ),
        (StellaConfig, {"rank_pattern": 3}, "rank_pattern=3 is of no use there; give a mapping to a whole number"),
        (CeraConfig, {"target_modules": [5]}, r"target_modules=\{5\} is of no use there; give a list \(text each\)"),
        (CeraConfig, {"target_modules": 5}, r"target_modules=5 .* give a list \(text each\) or text or None"),
        (AuroraConfig, {"lora_alpha": "x"}, "lora_alpha='x' is of no use there; give a number or None"),
        (AuroraConfig, {"lora_alpha": True}, "lora_alpha=True is of no use there"),
        (CeraConfig, {"lora_dropout": None}, "lora_dropout=None is of no use there; give a number"),
        (CeraConfig, {"use_rslora": "maybe"}, "use_rslora='maybe' is of no use there; give True or False"),
        (AuroraConfig, {"aurora_grid_size": 1.5}, "aurora_grid_size=1.5 is of no use there; give a whole number"),
        (AuroraConfig, {"aurora_grid_range": ["a", "b"]}, r"aurora_grid_range=.* give a list \(a number each\)"),
        (CeraConfig, {"layers_to_transform": "x"}, "layers_to_transform='x' is of no use there"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_values_are_refused_when_the_config_is_made(config_cls, fields, message):
    with pytest.raises(ValueError, match=message) as refusal:
        config_cls(**fields)
    assert config_cls.__name__ in str(refusal.value)


def test_what_yaml_and_json_know_no_type_for_is_taken():
    config = AuroraConfig(aurora_grid_range=[-1, 1], target_modules=("q", "v"), rank_pattern={"q": 2}, lora_alpha=4)
    assert (list(config.aurora_grid_range), config.lora_alpha) == ([-1, 1], 4)
    CeraConfig(layers_to_transform=range(2), target_modules={"q"}, trainable_token_indices={"embed": [1]})
    with pytest.raises(ValueError, match=r"'embed': 'x'.* of no use"):
        CeraConfig(trainable_token_indices={"embed": "x"})


def test_the_json_of_the_authors_folders_is_understood(tmp_path):
    """The config fields of METHODS.md under the authors' type, name for name."""
    fields = {
        "peft_type": "STELLA",
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "stella_retraction": "polar",
        "stella_diag_s": False,
        "stella_grad_scaling": True,
        "init_lora_weights": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, StellaConfig)
    assert config.stella_grad_scaling is True


def test_scaling_follows_alpha_rank_and_rslora():
    assert CeraConfig(r=4).scaling_for(4, None) == 1.0
    assert CeraConfig(r=4, lora_alpha=8).scaling_for(4, 8) == 2.0
    assert StellaConfig(r=4, use_rslora=True).scaling_for(4, 8) == 4.0


def test_yamls_word_for_none_is_told():
    with pytest.raises(
        ValueError, match=r"lora_alpha='None' is of no use there; give a number or None \(null, in YAML\)"
    ):
        StellaConfig(lora_alpha="None")
