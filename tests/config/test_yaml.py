import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl.config import PPOConfig
from verl.config.schema import key_of, walk
from verl.config.write_reference import reference
from verl.config.write_yaml import FOLDER, SECTIONS, files


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def test_the_composed_yaml_agrees_with_the_dataclasses_key_by_key():
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.config", version_base="1.3"):
        composed = OmegaConf.to_container(compose("ppo_trainer"), resolve=False)
    expected = flat(dataclasses.asdict(PPOConfig()))
    assert list(flat(composed)) and set(flat(composed)) == set(expected)
    for name, value in flat(composed).items():
        assert value == expected[name] and type(value) is type(expected[name]), name


@pytest.mark.parametrize("place", SECTIONS)
def test_each_section_s_file_agrees_by_itself(place):
    values = OmegaConf.to_container(OmegaConf.load(FOLDER / "sections" / f"{place.rsplit('.', 1)[-1]}.yaml"))
    assert values == dataclasses.asdict(SECTIONS[place]())


def test_the_files_are_as_written():
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python3 -m verl.config.write_yaml"
    assert {path for path in files() if path.parent.name == "sections"} == set((FOLDER / "sections").glob("*.yaml"))


def test_the_reference_is_as_written():
    page = Path(__file__).resolve().parents[2] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == reference(), "run python3 -m verl.config.write_reference"


def test_the_reference_holds_every_key_once():
    rows, section = set(), ""
    for line in reference().splitlines():
        if line.startswith("## "):
            section = "" if line.startswith("## Keys without") else line.removeprefix("## ") + "."
        elif line.startswith("| `"):
            name = section + line.split("`")[1]
            assert name not in rows
            rows.add(name)
    assert rows == {name for name, _, _ in walk(PPOConfig())}


UNITS = {
    "prompts", "samples", "tokens", "seconds", "MiB", "training steps", "epochs", "processes", "ranks", "devices",
    "characters", "buckets", "updates",
}  # fmt: skip


def test_every_key_has_help_and_every_size_a_unit():
    for name, field, _ in walk(PPOConfig()):
        key = key_of(field)
        assert key.help, name
        assert key.unit in UNITS | {""}, name
        sizes = (
            "batch_size",
            "_length",
            "_tokens",
            "token_len",
            "_steps",
            "_freq",
            "_megabytes",
            "timeout",
            "max_model_len",
        )
        if any(part in name.rsplit(".", 1)[-1] for part in sizes) and key.only is None and "ratio" not in name:
            assert key.unit or isinstance(field.default, bool), name
