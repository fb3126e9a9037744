"""Config sections as mappings, as user code of upstream verl reads them."""

import dataclasses
import pickle

import pytest

from verl.config import PPOConfig
from verl.config.rollout_correction import Correction
from verl.config.schema import ConfigSection


def sections(config, name):
    yield name, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value, f"{name}.{field.name}")


SECTIONS = {**dict(sections(PPOConfig(), "config")), "config.actor.rollout_correction of a loss": Correction()}


@pytest.mark.parametrize("config", SECTIONS.values(), ids=SECTIONS.keys())
def test_every_section_is_a_mapping(config):
    names = [field.name for field in dataclasses.fields(config)]
    assert list(config) == names and len(config) == len(names) and isinstance(config, ConfigSection)
    assert not {"get", "keys", "items", "values"} & set(names), "a field hides a method of the mapping"
    for name in names:
        assert name in config and config[name] is getattr(config, name) is config.get(name, "default")
    assert "absent" not in config and config.get("absent") is None and config.get("absent", 0.5) == 0.5
    with pytest.raises(KeyError, match=f"{type(config).__name__} has no key 'absent'"):
        config["absent"]
    assert dict(**config) == {name: getattr(config, name) for name in names}
    assert pickle.loads(pickle.dumps(config)) == config


def test_an_added_attribute_is_an_entry():
    config = dataclasses.replace(PPOConfig().algorithm, gamma=0.5)
    config.added = 3
    assert config["gamma"] == 0.5 and config.get("added") == 3 and "added" in config
