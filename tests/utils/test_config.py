"""Config sections as dataclasses, as user code for upstream verl asks for them."""

from dataclasses import dataclass, field

import pytest
from omegaconf import OmegaConf

from verl.config import ActorConfig, load_config
from verl.utils.config import omega_conf_to_dataclass


@dataclass
class Inner:
    size: int = 1
    names: list[str] = field(default_factory=list)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    rate: float = 0.5


def test_a_section_of_a_config_is_returned_unchanged():
    actor = load_config().actor_rollout_ref.actor
    assert omega_conf_to_dataclass(actor) is actor
    assert omega_conf_to_dataclass(actor, ActorConfig) is actor


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_a_mapping_becomes_the_dataclass(wrap):
    values = wrap({"_target_": "mine.Outer", "inner": {"size": 3, "names": ["a"]}})
    assert omega_conf_to_dataclass(values, Outer) == Outer(Inner(3, ["a"]), 0.5)


def test_interpolations_are_resolved():
    values = OmegaConf.create({"rate": 2.0, "inner": {"size": "${rate}"}})
    assert omega_conf_to_dataclass(values, Outer) == Outer(Inner(2.0), 2.0)


def test_an_empty_config_has_the_defaults():
    assert omega_conf_to_dataclass({}, Outer) == omega_conf_to_dataclass(None, Outer) == Outer()
    assert omega_conf_to_dataclass(None) is None


def test_what_cannot_be_converted_is_an_error():
    with pytest.raises(ValueError, match="unknown key sice; Inner has size, names"):
        omega_conf_to_dataclass({"inner": {"sice": 3}}, Outer)
    with pytest.raises(TypeError, match="pass a mapping and its dataclass_type"):
        omega_conf_to_dataclass({"rate": 1.0})
    with pytest.raises(TypeError, match=r"is no section of verl\.config"):
        omega_conf_to_dataclass({"inner": [3]}, Outer)
