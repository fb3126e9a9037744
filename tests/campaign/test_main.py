"""The command line of the campaign, and a part of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from campaign.__main__ import all_cases, main
from campaign.config_keys import KINDS, PER_KEY
from verl.config import PPOConfig
from verl.config.schema import walk

ROOT = Path(__file__).resolve().parents[2]
# A case of each kind of value and of most kinds of damage.
SUBSET = (
    "config/actor_rollout_ref.actor.optim.lr",
    "config/data.train_batch_size/zero",
    "config/actor_rollout_ref.model.path/unknown-user",
    "config/actor_rollout_ref.model.path/long-path",
    "config/trainer.logger/list",
    "model/train/config.json/bytes-cut",
    "model/train/config.json/hidden_size/nan",
    "model/check/config.json/num_hidden_layers/digits",
    "model/train/model.safetensors/bytes-one-byte-short",
    "model/train/model.safetensors/header-huge-shape",
    "model/train/model.safetensors.index.json/map-missing-file",
    "model/describe/config.json/place-missing",
    "data/train/train.parquet/bytes-noise",
    "data/check/train.jsonl/bytes-cut",
    "quantization/train/description.json/json-list",
    "checkpoint/export/manifest.json/bytes-cut",
    "report/metrics.jsonl/bytes-cut",
)


def test_every_key_has_cases_and_their_names_differ():
    names = [case.name for case in all_cases(1, PER_KEY)]
    assert len(names) == len(set(names)) >= 1000
    keys = {name.split("/")[1] for name in names if name.startswith("config/") and name.count("/") == 2}
    assert keys == {name for name, *_ in walk(PPOConfig())}


def test_the_seed_decides_the_cases():
    def commands(seed):
        return {case.name: case.words for case in all_cases(seed, PER_KEY)}

    assert commands(1) == commands(1)
    assert commands(1) != commands(2)


def test_all_kinds_of_values_are_used():
    used = {
        case.name.split("/")[2]
        for case in all_cases(1, PER_KEY)
        if case.name.startswith("config/") and case.name.count("/") == 2
    }
    assert used == set(KINDS)


def test_an_unknown_case_is_an_error(capsys):
    assert main(["input", "--only", "config/no.such.key"]) == 2
    assert "no such case; --list prints the names" in capsys.readouterr().err


def test_results_are_not_measured_twice_and_violations_are(tmp_path, capsys, monkeypatch):
    ran = []

    def run(cases, *_, **__):
        ran.append([case.name for case in cases])
        return iter(())

    monkeypatch.setattr("campaign.__main__.run", run)
    first, second = (case.name for case in all_cases(1, PER_KEY)[:2])
    lines = [
        {"case": name, "area": "a", "kind": kind, "violations": [], "seconds": 1.0, "said": ""}
        for name, kind in ((first, "refused"), (second, "violation"))
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "cut o')
    assert main(["input", "--results", str(file)]) == 1
    assert first not in ran[0]
    assert second in ran[0]
    assert "| all   | 2     | 1       | 0        | 1          | 1.0 s        |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_of_the_campaign_has_no_violation():
    words = [word for name in SUBSET for word in ("--only", name)]
    command = [sys.executable, "-m", "campaign", "input", "--seed", "1", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-5000:]
    total = next(line for line in ended.stdout.splitlines() if line.startswith("| all"))
    assert int(total.split("|")[2]) >= 40
