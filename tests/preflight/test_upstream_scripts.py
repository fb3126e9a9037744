"""Example scripts of upstream verl: keys that `verl check` rejects, and their replacements, as in docs/migrating.md."""

import re
from pathlib import Path

import pytest
import yaml

from fixtures.public_models import write_config
from fixtures.tiny import write_char_tokenizer
from verl.config import ConfigError, load_config
from verl.preflight.check import examine
from verl.preflight.target import Hardware, Target

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = yaml.safe_load((ROOT / "tests/data/upstream_scripts.yaml").read_text())
# Keys that are replaced by directories of this machine.
_MODELS = ("actor_rollout_ref.model.path", "critic.model.path")


def key_of(override):
    return override.partition("=")[0].lstrip("+")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return `files(model)`: a model directory without weights, and a `train.parquet` that repeats a row of GSM8K."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from verl.utils.dataset.prepare import make_row

    root = tmp_path_factory.mktemp("upstream")
    row = make_row("3+4=", "7", data_source="openai/gsm8k", ability="math", extra_info={"index": 0})
    pq.write_table(pa.Table.from_pylist([row] * 1536), root / "train.parquet")

    def of(model):
        return write_char_tokenizer(write_config(root / model, model)), root / "train.parquet"

    return of


def problems(script, files, changes):
    """Return the errors of a script; `changes` replaces values of keys, None removes a key."""
    model, data = files(script["model"])
    here = {"data.train_files": data, "data.val_files": data, "trainer.default_local_dir": data.parent / "out"}
    here |= dict.fromkeys(_MODELS, model)
    overrides = []
    for override in script["overrides"]:
        key = key_of(override)
        if key not in changes:
            overrides.append(f"{override.partition('=')[0]}={here[key]}" if key in here else override)
    overrides += [f"{key}={value}" for key, value in changes.items() if value is not None]
    hardware = "npu:ascend950" if "trainer.device=npu" in overrides else "cuda:h200"
    try:
        config = load_config(overrides)
    except ConfigError as error:
        return list(error.problems)
    return examine(config, Target(starting=False, hardware=Hardware(hardware)))[1].errors


def head(problem):
    """The key that a problem is about."""
    unknown = re.match(r"unknown keys? '([^']+?)(?:\.\*)?'", problem)
    return unknown[1] if unknown else re.split(r"[=:, ]", problem, maxsplit=1)[0]


def named(script, files):
    """Return all errors by key. Unknown keys hide other errors, so they are removed and the script is checked again."""
    found, changes = {}, {}
    while True:
        now = {head(problem): problem for problem in problems(script, files, changes)}
        new = {key: problem for key, problem in now.items() if key not in found}
        found |= new
        unknown = {key: None for key, problem in new.items() if "unknown key" in problem}
        if not unknown:
            return found
        changes |= unknown


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script["name"])
def test_rejected_keys_are_reported_with_their_replacement(script, files, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = named(script, files)
    assert sorted(found) == sorted(script["refused"])
    for key, problem in found.items():
        assert re.search(r"\b(use|leave|set|give|lower|did you mean)\b", problem), problem
        replaced = script["instead"].get(key)
        if replaced not in (None, "") and "/" not in str(replaced):
            assert str(replaced) in problem or "set it to data." in problem, problem
    if script["instead"]:
        assert problems(script, files, script["instead"]) == []
    given = {key_of(override) for override in script["overrides"]}
    assert {key for key, value in script["instead"].items() if value is None} <= given


def test_each_script_has_a_commit_and_a_path():
    assert len(SCRIPTS) >= 10
    for script in SCRIPTS:
        assert re.fullmatch(r"[0-9a-f]{40}", script["commit"])
        assert script["path"].endswith(".sh")
        keys = [key_of(override) for override in script["overrides"]]
        assert len(keys) == len(set(keys))


def short(text):
    return f"`{text.removeprefix('actor_rollout_ref.')}`"


def rows():
    """Yield the rows of the table in docs/migrating.md."""
    for script in SCRIPTS:
        link = f"https://github.com/{script['repo']}/blob/{script['commit']}/{script['path']}"
        refused = ", ".join(map(short, script["refused"])) or "nothing"
        instead = ", ".join(
            f"no {short(key)}" if value is None else short(f"{key}={value}") for key, value in script["instead"].items()
        )
        yield f"| [{script['name']}]({link}) | {refused} | {instead or 'unchanged'} |"


def test_the_table_in_the_docs_is_current():
    text = (ROOT / "docs/migrating.md").read_text()
    assert "\n".join(rows()) in text


def test_a_config_file_of_another_engine_is_an_error():
    from verl.trainer.main_ppo import split_arguments

    for words in (["--config-name=ppo_megatron_trainer.yaml"], ["-cn", "ppo_megatron_trainer"]):
        options, overrides, problems = split_arguments(["--config-path=config", *words, "algorithm.adv_estimator=grpo"])
        assert (options, overrides) == ([], ["algorithm.adv_estimator=grpo"])
        (problem,) = problems.values()
        assert "FSDP2 is the only supported training engine; leave out --config-path" in problem
