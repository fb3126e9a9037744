"""`verl export` on checkpoints that engines of two ranks wrote."""

import pytest
import torch
from safetensors.torch import load_file

from fixtures.engine_cases import save_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.cli.entry import main
from verl.config import PPOConfig
from verl.config.record import write_record
from verl.trainer.ppo.checkpoint import CheckpointStore
from verl.utils.checkpoint_files import TRACKER

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path, request):
    """The checkpoint of a trained model, whose `huggingface` the run itself wrote."""
    rank = getattr(request, "param", 0)
    source = write_tiny_model(tmp_path / "source", dtype="bfloat16")
    config = PPOConfig()
    config.actor_rollout_ref.model.path, config.actor_rollout_ref.model.lora_rank = str(source), rank
    # As if ranks had shared the layers; the files of a checkpoint do not depend on that.
    config.actor_rollout_ref.actor.fsdp_config.tensor_parallel_size = 1 if rank else 2
    with CheckpointStore(tmp_path / "run").writing(3) as directory:
        run_ranks(2, save_program, str(source), str(directory / "actor"), ["model"], {"lora_rank": rank})
        write_record(config, directory)
    return tmp_path / "run" / "global_step_3"


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("checkpoint", [0, 2], indirect=True)
def test_the_export_equals_that_of_the_run(checkpoint, capsys):
    assert main(["export", str(checkpoint)]) == 0
    target = checkpoint.parent / "huggingface" / "global_step_3"
    assert capsys.readouterr().out == f"{target}\n"
    adapter = checkpoint / "actor" / "lora_adapter"
    expected = files(checkpoint / "actor" / "huggingface")
    if adapter.is_dir():
        expected |= {target.joinpath("lora_adapter", name).relative_to(target): b for name, b in files(adapter).items()}
    assert files(target) == expected
    trained, source = load_file(target / "model.safetensors"), checkpoint.parents[1] / "source" / "model.safetensors"
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in load_file(source).items())


def test_dtype_output_and_a_moved_model(checkpoint, tmp_path):
    (tmp_path / "source").rename(tmp_path / "moved")
    words = ["export", str(checkpoint.parent), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    assert main([*words, "--model", str(tmp_path / "moved")]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_the_choice_among_several_checkpoints_is_named(checkpoint, capsys):
    """Only the choice is tested, so the later checkpoints have no weights."""
    for name in ("global_step_4", "global_step_5"):
        (checkpoint.parent / name).mkdir()

    def note(*words):
        main(["export", str(checkpoint.parent), *words])
        return capsys.readouterr().err.splitlines()[0]

    later = "later ones exist: global_step_4, global_step_5"
    assert note() == f"verl export: using global_step_3, which {TRACKER} names; {later}"
    tracker = checkpoint.parent / TRACKER
    tracker.write_text("")
    assert note() == f"verl export: {tracker} is empty; using the newest checkpoint, global_step_5"


def test_errors_name_the_fault(checkpoint, tmp_path, capsys):
    def fails(*words):
        assert main(["export", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "exists; choose a new or empty directory" in fails(checkpoint, "--out", checkpoint)
    assert "no such directory" in fails(tmp_path / "nothing")
    assert "not a checkpoint" in fails(tmp_path)
    assert "critic: holds no weights" in fails(checkpoint, "--critic", "--model", tmp_path / "source")
    file = checkpoint / "config.yaml"
    file.write_bytes(file.read_bytes().replace(b"seed: 0", b"seed: 1"))
    assert f"{file} is damaged: its bytes" in fails(checkpoint)
    assert not (tmp_path / "run" / "huggingface").exists()
