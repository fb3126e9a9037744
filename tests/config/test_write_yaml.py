"""The YAML files of the config."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.config.write_yaml import FOLDER, SECTIONS, files


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_composed_yaml_equals_the_dataclasses():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.config", version_base="1.3"):
        composed = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)
    expected = flat(dataclasses.asdict(PPOConfig()))
    assert list(flat(composed)) and set(flat(composed)) == set(expected)
    for name, value in flat(composed).items():
        assert value == expected[name] and type(value) is type(expected[name]), name


@pytest.mark.parametrize("name", SECTIONS)
def test_file_of_each_section_equals_its_dataclass(name):
    values = OmegaConf.to_container(OmegaConf.load(FOLDER / "sections" / f"{name.rsplit('.', 1)[-1]}.yaml"))
    assert values == dataclasses.asdict(SECTIONS[name]())


def test_files_are_up_to_date():
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python3 -m verl.config.write_yaml"
    assert {path for path in files() if path.parent.name == "sections"} == set((FOLDER / "sections").glob("*.yaml"))
