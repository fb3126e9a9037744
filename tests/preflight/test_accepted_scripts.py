"""Training scripts of upstream verl that are accepted as they are, from the keys and values that they set."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fixtures.accepted_scripts import ROWS
from verl.cli.capture import Command
from verl.cli.check import examine_command
from verl.config.engine_keys import translate
from verl.config.entry_points import ENTRY_POINTS
from verl.preflight.target import Hardware, Target

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("upstream_scripts", ROOT / "scripts/upstream_scripts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "row",
    [row if number % 8 == 0 else pytest.param(row, marks=pytest.mark.slow) for number, row in enumerate(ROWS)],
    ids=lambda row: f"{row['script']}-{row['device'].split(':')[0]}",
)
def test_the_script_is_accepted(row, tmp_path):
    command = Command(tuple(row["words"]), tmp_path, {}, ENTRY_POINTS[row["module"]])
    target = Target(starting=False, hardware=Hardware(row["device"], None), without_files=True)
    assert examine_command(command, translate(command.words), target, written=False).found.errors == []


def test_the_data_covers_devices_and_modules():
    assert len(ROWS) == 40
    assert {row["device"] for row in ROWS} == {"cuda:h100", "npu:ascend950"}
    assert len({row["module"] for row in ROWS}) > 1
    assert not any("/tmp" in word or "/root" in word for row in ROWS for word in row["words"])


@pytest.mark.slow
def test_a_checkout_becomes_a_table(tmp_path):
    script = load_script()
    folder = tmp_path / "examples/grpo_trainer"
    folder.mkdir(parents=True)
    train = "python3 -m verl.trainer.main_ppo actor_rollout_ref.model.path=Qwen/Qwen3-8B"
    sizes = (
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1 algorithm.adv_estimator=grpo "
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1 actor_rollout_ref.rollout.n=2"
    )
    (folder / "good.sh").write_text(f'{train} {sizes} "$@"\n')
    (folder / "both_npu_fsdp.sh").write_text(f"{train} {sizes}\n")
    (folder / "bad.sh").write_text(f"{train} {sizes} actor_rollout_ref.rollout.name=sglang\n")
    (folder / "sft.sh").write_text("torchrun -m verl.trainer.sft_trainer a=1\n")
    results = [
        script.check_script(tmp_path, path, device)
        for path in script.scripts_of(tmp_path)
        for device in script.devices_of(tmp_path, path)
    ]
    by_name = {Path(result.script).stem: result for result in results if result is not None}
    assert {name: result.passes for name, result in by_name.items()} == {
        "good": True,
        "both_npu_fsdp": True,
        "bad": False,
    }
    assert by_name["both_npu_fsdp"].device == "npu:ascend950"
    table = script.table(list(by_name.values()))
    for row in ("| all | 3 | 2 |", "| FSDP | 3 | 2 |", "| NPU and FSDP | 1 | 1 |", "| another rollout engine | 1 |"):
        assert row in table, table
    rows = [json.loads(line) for line in script.passing_data(list(by_name.values()), tmp_path)]
    assert [row["script"] for row in rows] == [
        "examples/grpo_trainer/both_npu_fsdp.sh",
        "examples/grpo_trainer/good.sh",
    ]
    with pytest.raises(FileNotFoundError, match="give a checkout of upstream verl"):
        script.scripts_of(tmp_path / "examples")
