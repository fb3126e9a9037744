"""YAML files of users, as `load_config` and the command line read them."""

import os

import pytest

from verl.config import ConfigError, load_config
from verl.config.config_files import FileConfigSource
from verl.trainer import main_ppo

GOOD = "defaults:\n  - ppo_trainer\n  - _self_\n"
FAULTS = {
    "a tab": (GOOD + "data:\n\tshuffle: false\n", "mine.yaml: line 5: .*a tab"),
    "a tag": (GOOD + "data:\n  shuffle: !!python/object:a.b x\n", "mine.yaml: line 5: the tag"),
    "Latin-1": ((GOOD + "data:\n  shuffle: \u00e9\n").encode("latin-1"), "mine.yaml: line 5: .*UTF-8"),
    "a key twice": (GOOD + "data: {}\ndata: {}\n", "mine.yaml: line 5: the key 'data' stands in line 4"),
    "two documents": (GOOD + "---\ndata: {}\n", "mine.yaml: line 4: a second document"),
    "an alias in itself": (GOOD + "data: &a\n  shuffle: *a\n", "mine.yaml: line 5: contains itself|line 4: contains"),
    "a number": ("5\n", "mine.yaml: line 1: '5' is no mapping; write keys"),
    "a list": ("- a\n", "mine.yaml: line 1: a list is no mapping; write keys"),
    "text": ("hello\n", "mine.yaml: line 1: 'hello' is no mapping; write keys"),
    "nothing": ("", "mine.yaml: is empty; write keys"),
    "a comment": ("# data:\n", "mine.yaml: is empty; write keys"),
    "a number as key": (GOOD + "5: 3\n", "mine.yaml: line 4: the key '5' is no text"),
    "null as key": (GOOD + "null: 3\n", "mine.yaml: line 4: the key 'null' is no text"),
    "a number as section": (GOOD + "data: 5\n", "mine.yaml: line 4: data is '5', but it is a section; write its keys"),
    "a list as section": (GOOD + "data: [a]\n", "mine.yaml: line 4: data is a list, but it is a section"),
    "an inner section": (
        GOOD + "actor_rollout_ref:\n  actor: x\n",
        "mine.yaml: line 5: actor_rollout_ref.actor is 'x', but it is a section",
    ),
    "a number as defaults": ("defaults: 5\n", "mine.yaml: line 1: defaults is '5'; it must be a list"),
    "empty defaults": ("defaults:\n", "mine.yaml: line 1: defaults is empty; it must be a list"),
    "a number in defaults": ("defaults:\n  - 5\n", "mine.yaml: line 2: '5' in defaults; an entry"),
    "a list in defaults": ("defaults:\n  - [a]\n", "mine.yaml: line 2: a list in defaults; an entry"),
    "two keys in defaults": ("defaults:\n  - a: b\n    c: d\n", "mine.yaml: line 2: a mapping in defaults; an entry"),
    "itself in defaults": ("defaults:\n  - ppo_trainer\n  - mine\n", "mine.yaml: line 3: .*without end; remove"),
    "a missing file in defaults": ("defaults:\n  - absent\n", "'mine'.*'absent'.*looked in .*; correct"),
    "a broken reference": (GOOD + "data:\n  seed: ${a\n", "mine.yaml: data.seed: .*; correct"),
    "a reference to nothing": (GOOD + "data:\n  seed: ${a.b}\n", "data.seed: .*'a.b' not found; correct"),
    "a wrong key of Hydra": (GOOD + "hydra: 5\n", "--config-name=mine: .*HydraConf.*; correct"),
}


def of_command_line(folder, name, words=()):
    return main_ppo.compose([f"--config-path={folder}", f"--config-name={name}", *words])


def of_program(folder, name, words=()):
    return load_config(words, config_path=folder, config_name=name)


@pytest.mark.parametrize("read", [of_command_line, of_program])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_file_is_one_error(tmp_path, capfd, fault, read):
    content, wanted = FAULTS[fault]
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=wanted) as caught:
        read(tmp_path, "mine")
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("read", [of_command_line, of_program])
def test_a_fault_of_an_included_file_is_named_too(tmp_path, read):
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, team/base, _self_]\n")
    (tmp_path / "team").mkdir()
    (tmp_path / "team/base.yaml").write_text("# @package _global_\ndata:\n\tshuffle: false\n")
    with pytest.raises(ConfigError, match=r"team/base.yaml: line 3: .*tab"):
        read(tmp_path, "mine")


@pytest.mark.parametrize("read", [of_command_line, of_program])
def test_files_that_include_each_other_are_named(tmp_path, read):
    (tmp_path / "one.yaml").write_text("defaults:\n  - team: two\n")
    (tmp_path / "team").mkdir()
    (tmp_path / "team/two.yaml").write_text("defaults:\n  - _self_\n  - /one\n")
    with pytest.raises(ConfigError, match=r"team/two.yaml: line 3: the defaults include the file one without end"):
        read(tmp_path, "one")


def test_problems_of_overrides_stand_beside_that_of_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("- a\n")
    with pytest.raises(ConfigError) as caught:
        of_command_line(tmp_path, "mine", ["~data.shuffle"])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mine2", "there is no file mine2.yaml .*did you mean mine"),
        ("zzz", "there is no file zzz.yaml .*give the name"),
        ("folder", "folder.yaml is a directory"),
        ("", "there is no file"),
    ],
)
def test_a_missing_file_is_named_with_a_similar_one(tmp_path, name, wanted):
    (tmp_path / "mine.yaml").write_text(GOOD)
    (tmp_path / "folder.yaml").mkdir()
    for read in (of_command_line, of_program):
        with pytest.raises(ConfigError, match=f"--config-name={name}: {wanted}"):
            read(tmp_path, name)


def test_a_path_as_name_and_a_file_as_directory_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match="is a path; give its directory in --config-path"):
        main_ppo.compose([f"--config-name={tmp_path}/mine"])
    loaded = main_ppo.compose([f"--config-path={tmp_path}/mine.yaml", "data.seed=3"])
    assert loaded.problems["--config-path"].endswith(f"use --config-path={tmp_path} --config-name=mine")
    assert loaded.config.data.seed == 3
    loaded = main_ppo.compose(["--config-dir", f"{tmp_path}/none"])
    assert "no such directory" in loaded.problems["--config-dir"]


def test_valid_files_are_read_and_hydra_is_left_as_it_was(tmp_path, monkeypatch):
    from hydra._internal.sources_registry import SourcesRegistry

    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, team/base@data.apply_chat_template_kwargs, optional team: absent, _self_]\n"
        "critic:\ndata:\n  seed: 3\n"
    )
    (tmp_path / "team").mkdir()
    (tmp_path / "team/base.yaml").write_text("")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert of_command_line(tmp_path, "mine").config.data.seed == 3
    assert of_program(tmp_path, "mine").data.seed == 3
    assert SourcesRegistry.instance().types["file"] is not FileConfigSource
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
