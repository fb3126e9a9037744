"""Transactional checkpoints: kills, full disks, replacement, retention, resume."""

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from fixtures.engine_cases import save_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.checkpoint import (
    CheckpointError,
    CheckpointStore,
    check_storable,
    load_driver_state,
    save_driver_state,
)
from verl.utils.checkpoint_files import TRACKER, find_damage, step_of

DEAD_PID = 2**22 + 1  # above Linux' largest process id


def fill(directory: Path, step: int, tag: str = "") -> None:
    (directory / "actor" / "huggingface").mkdir(parents=True)
    (directory / "actor" / "model.pt").write_text(f"{step}{tag}\n" * 50)
    (directory / "actor" / "huggingface" / "config.json").write_text(json.dumps({"step": step, "tag": tag}))


def save(store: CheckpointStore, step: int, tag: str = "") -> None:
    with store.writing(step) as directory:
        fill(directory, step, tag)


def content(checkpoint: Path) -> tuple[int, str]:
    """Return step and tag, after checking that every file exists and belongs to the same save."""
    config = json.loads((checkpoint / "actor" / "huggingface" / "config.json").read_text())
    assert (checkpoint / "actor" / "model.pt").read_text() == f"{config['step']}{config['tag']}\n" * 50
    assert step_of(checkpoint) == config["step"]
    assert find_damage(checkpoint) is None
    return config["step"], config["tag"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_save_is_published_and_found(tmp_path):
    store = CheckpointStore(tmp_path / "a" / "b")
    assert store.latest() is None and store.checkpoints() == []
    with store.writing(3) as directory:
        assert directory.name == f"global_step_3.tmp-{os.getpid()}"
        fill(directory, 3)
        assert store.latest() is None
        assert CheckpointStore(store.root).latest() is None and directory.exists(), "a second store does not touch it"
    assert content(store.latest()) == (3, "")
    assert names(store.root) == ["global_step_3", TRACKER]
    assert (store.root / TRACKER).read_text() == "3"
    files = json.loads((store.latest() / "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        "actor/huggingface/config.json": 22,
        "actor/model.pt": 100,
    }


def test_saving_the_same_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=1)
    save(store, 5, "old")
    save(store, 5, "new")
    assert content(store.latest()) == (5, "new")
    assert names(tmp_path) == ["global_step_5", TRACKER]


def test_a_failed_block_keeps_the_earlier_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    for step in (1, 2):
        with pytest.raises(CheckpointError) as caught, store.writing(step) as directory:
            (directory / "half").write_text("x")
            raise RuntimeError("worker 3 died")
        assert isinstance(caught.value.__cause__, RuntimeError)
        message = str(caught.value)
        for part in (f"global_step_{step} was not saved", "RuntimeError: worker 3 died", "bytes are free"):
            assert part in message
        assert f"{tmp_path / 'global_step_1'} stays usable" in message
        assert content(store.latest()) == (1, "")
        assert names(tmp_path) == ["global_step_1", TRACKER]


def test_a_failed_first_save_reports_no_earlier_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "new")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint") as caught, store.writing(1):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC


def test_ctrl_c_passes_unchanged_and_cleans_up(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writing(1) as directory:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_the_error_can_be_pickled():
    for error in (CheckpointError("text"), CheckpointError(errno.ENOSPC, "text")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is CheckpointError and str(again) == str(error) and again.errno == error.errno


def test_a_root_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = CheckpointStore(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="NotADirectoryError"), store.writing(1):
        pass


# ---------------------------------------------------------------- retention


def test_retention_counts_from_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=2)
    for step in (2, 4, 10, 12):
        save(store, step)
    assert [step_of(path) for path in store.checkpoints()] == [10, 12]
    save(CheckpointStore(tmp_path, max_to_keep=1), 14)
    assert [step_of(path) for path in store.checkpoints()] == [14]


def test_retention_deletes_nothing_before_the_new_checkpoint_is_complete(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=1)
    save(store, 1)
    with pytest.raises(CheckpointError), store.writing(2) as directory:
        fill(directory, 2)
        assert content(store.latest()) == (1, "")
        raise RuntimeError
    assert content(store.latest()) == (1, "")


def test_a_branch_keeps_the_later_checkpoints_of_another_branch(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=2)
    for step in (2, 8, 9):
        save(CheckpointStore(tmp_path), step)
    save(store, 3)
    save(store, 4)
    assert [step_of(path) for path in store.checkpoints()] == [3, 4, 8, 9]
    assert content(store.latest()) == (4, "")


def test_without_a_limit_all_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, max_to_keep=None)
    for step in range(5):
        save(store, step)
    assert len(store.checkpoints()) == 5
    with pytest.raises(ValueError, match="max_actor_ckpt_to_keep=0: must be at least 1"):
        CheckpointStore(tmp_path, max_to_keep=0)


# ---------------------------------------------------------------- lookup


@pytest.mark.parametrize("tracker", ["9", "seven", "", "-1", "\u00b2", None])
def test_an_invalid_tracker_falls_back_to_the_newest_checkpoint(tmp_path, caplog, tracker):
    store = CheckpointStore(tmp_path)
    save(store, 2)
    save(store, 10)
    if tracker is None:
        (tmp_path / TRACKER).unlink()
    else:
        (tmp_path / TRACKER).write_text(tracker, encoding="utf-8")
    (tmp_path / f"global_step_11.tmp-{os.getppid()}").mkdir()
    (tmp_path / "global_step_12").write_text("a file")
    assert content(store.latest()) == (10, "")
    assert "using the newest complete checkpoint" in caplog.text


def test_the_tracker_wins_over_a_later_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 2)
    save(store, 3)
    (tmp_path / TRACKER).write_text("2\n")
    assert content(store.latest()) == (2, "")


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest", "list"])
def test_a_damaged_checkpoint_is_skipped_and_logged(tmp_path, caplog, harm):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2)
    file = tmp_path / "global_step_2" / ("actor/model.pt" if harm in ("truncate", "remove") else "manifest.json")
    if harm == "truncate":
        os.truncate(file, 7)
    elif harm == "remove":
        file.unlink()
    else:
        file.write_text("{" if harm == "manifest" else "[]")
    assert content(store.latest()) == (1, "")
    assert str(file) in caplog.text
    (tmp_path / TRACKER).unlink()
    assert content(store.latest()) == (1, "")
    with pytest.raises(CheckpointError, match=r"resume_from_path=.*; choose another checkpoint"):
        store.resolve("resume_path", tmp_path / "global_step_2")


def flip_byte(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_flipped_byte_in_any_file_is_named_and_the_older_checkpoint_is_used(tmp_path, caplog, lora_rank):
    """The checkpoint is a real one of two ranks, with a Hugging Face directory and the driver's state."""
    source = str(write_tiny_model(tmp_path / "source"))
    root = tmp_path / "run"
    store = CheckpointStore(root)
    save(store, 1)
    with store.writing(2) as directory:
        contents = ["model", "optimizer", "extra"]
        run_ranks(2, save_program, source, str(directory / "actor"), contents, {"lora_rank": lora_rank})
        save_driver_state(directory, {"step": 2, "train_loader": {"samples": 6}})
    checkpoint = root / "global_step_2"
    assert store.latest() == checkpoint
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert len(files) >= 14 and checkpoint / "data.pt" in files
    rng = random.Random(7)
    for file in files:
        original = file.read_bytes()
        if not original:
            continue
        positions = {0, len(original) - 1, *(rng.randrange(len(original)) for _ in range(3))}
        for position in sorted(positions):
            caplog.clear()
            flip_byte(file, position)
            found = store.latest()
            if file.name == "manifest.json" and found == checkpoint:
                assert json.loads(file.read_bytes()) == json.loads(original), "only white space changed"
            else:
                assert content(found) == (1, "") and f"{checkpoint} is skipped" in caplog.text
                assert str(file) in caplog.text or file.name == "manifest.json"
                with pytest.raises(CheckpointError, match=r"resume_from_path=.*choose another checkpoint"):
                    store.resolve("resume_path", checkpoint)
            file.write_bytes(original)
    assert store.latest() == checkpoint


def test_a_damaged_checkpoint_is_not_replaced_by_a_later_one_of_another_branch(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 8, 3):
        save(store, step)
    flip_byte(tmp_path / "global_step_3" / "actor" / "model.pt", 20)
    assert content(store.latest()) == (1, "")


def test_a_run_does_not_start_over_if_every_checkpoint_is_damaged(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        save(store, step)
        flip_byte(tmp_path / f"global_step_{step}" / "actor" / "model.pt", 20)
    with pytest.raises(CheckpointError, match=r"global_step_2/actor/model\.pt is damaged.*global_step_1/.*=disable"):
        store.resolve("auto")
    assert store.resolve("disable") is None
    with pytest.raises(CheckpointError, match="global_step_2 stays usable"), store.writing(3):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_resolve_follows_the_resume_mode(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "run")
    assert store.resolve("auto") is None and store.resolve("disable") is None
    save(store, 1)
    save(store, 2)
    assert store.resolve("auto") == tmp_path / "run" / "global_step_2"
    assert store.resolve("disable") is None
    monkeypatch.chdir(tmp_path)
    assert store.resolve("resume_path", "run/global_step_1") == tmp_path / "run" / "global_step_1"
    for mode, path, kind, text in (
        ("Auto", None, ValueError, "resume_mode='Auto': must be one of"),
        ("resume_path", None, ValueError, "resume_from_path is not set"),
        (
            "resume_path",
            "run/global_step_7",
            FileNotFoundError,
            "path=run/global_step_7: .* does not exist",
        ),
        ("resume_path", "run", ValueError, "resume_from_path=.*run: not a checkpoint; use a directory named"),
    ):
        with pytest.raises(kind, match=text):
            store.resolve(mode, path)
    shutil.move(tmp_path / "run" / "global_step_1", tmp_path / "run" / "global_step_1.tmp-5")
    with pytest.raises(ValueError, match="not a checkpoint"):
        store.resolve("resume_path", "run/global_step_1.tmp-5")


# ---------------------------------------------------------------- leftovers


def test_leftovers_are_removed_only_if_their_process_is_dead(tmp_path):
    save(CheckpointStore(tmp_path), 1)
    kept = [f"global_step_2.tmp-{os.getppid()}", "notes.tmp-1", "global_step_x.tmp-1"]
    for name in (*kept, f"global_step_3.tmp-{DEAD_PID}", f"global_step_4.tmp-{os.getpid()}"):
        (tmp_path / name / "actor").mkdir(parents=True)
    store = CheckpointStore(tmp_path)
    assert names(tmp_path) == sorted(["global_step_1", TRACKER, *kept])
    assert content(store.latest()) == (1, "")


def test_an_interrupted_replacement_is_undone(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    save(store, 2, "old")
    # Between the two renames: the old checkpoint is renamed, the new one is not published yet.
    os.rename(tmp_path / "global_step_2", tmp_path / f"global_step_2.old-{DEAD_PID}")
    fill(tmp_path / f"global_step_2.tmp-{DEAD_PID}", 2, "new")
    assert content(CheckpointStore(tmp_path).latest()) == (2, "old")
    # After both renames: the old checkpoint is a leftover.
    shutil.copytree(tmp_path / "global_step_2", tmp_path / f"global_step_2.old-{DEAD_PID}")
    assert content(CheckpointStore(tmp_path).latest()) == (2, "old")
    assert names(tmp_path) == ["global_step_1", "global_step_2", TRACKER]


SAVER = """
    import json, sys
    from pathlib import Path
    from verl.trainer.ppo.checkpoint import CheckpointStore

    store = CheckpointStore(Path(sys.argv[1]), max_to_keep=2)
    latest = store.latest()
    step = int(latest.name.rpartition("_")[2]) if latest else 0
    for save in range(10_000):
        step += save % 3 != 2  # every third save replaces the previous one
        with store.writing(step) as directory:
            (directory / "actor" / "huggingface").mkdir(parents=True)
            (directory / "actor" / "model.pt").write_text(f"{step}{save}\\n" * 50)
            config = {"step": step, "tag": str(save)}
            (directory / "actor" / "huggingface" / "config.json").write_text(json.dumps(config))
        print(step, save, flush=True)
"""


def test_a_complete_checkpoint_exists_after_sigkill_at_any_time(tmp_path):
    rng = random.Random(20)
    last_step, interrupted = 0, 0
    for _ in range(15):
        command = [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            reported = process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.05))
        finally:
            process.kill()
            reported += process.stdout.read()
            process.wait()
            process.stdout.close()
        step, saved = (int(x) for x in reported.split(b"\n")[-2].split())
        interrupted += any("." in name.removesuffix(".txt") for name in names(tmp_path))
        store = CheckpointStore(tmp_path, max_to_keep=2)
        found_step, found_tag = content(store.latest())
        assert found_step >= last_step
        # The reported save exists, or a later one.
        assert (found_step, int(found_tag)) >= (step, saved)
        for checkpoint in store.checkpoints():
            content(checkpoint)
        # Pruning follows the tracker update, so one checkpoint more than max_to_keep may exist.
        assert len(store.checkpoints()) <= 3
        assert not [name for name in names(tmp_path) if ".tmp-" in name or ".old-" in name]
        last_step = found_step
    assert last_step > 15
    assert interrupted >= 5, "too few kills interrupted a save"


@pytest.mark.slow
def test_a_complete_checkpoint_exists_after_a_stop_before_any_system_call(tmp_path):
    """A random SIGKILL rarely hits short calls, so stop the save before each call that changes the disk."""
    changing = ("rename", "mkdir", "fsync", "rmdir", "unlink")

    def saved_until(count: int, root: Path) -> bool:
        """Save steps 2, 2 and 3 in a child that exits before its count-th change; return True if it finished."""
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1] == 0
        left = count
        for name in changing:
            original = getattr(os, name)

            def call(*args, original=original, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return original(*args, **kwargs)

            setattr(os, name, call)
        try:
            store = CheckpointStore(root, max_to_keep=1)
            for step, tag in ((2, "a"), (2, "b"), (3, "c")):
                save(store, step, tag)
            os._exit(0)
        finally:
            os._exit(1)

    order = {(1, "first"): 0, (2, "a"): 1, (2, "b"): 2, (3, "c"): 3}
    reached, count, done = [], 0, False
    while not done:
        root = tmp_path / str(count)
        save(CheckpointStore(root), 1, "first")
        done = saved_until(count, root)
        store = CheckpointStore(root)
        reached.append(order[content(store.latest())])
        assert (root / TRACKER).read_text() == str(step_of(store.latest())), "the tracker is written last"
        for checkpoint in store.checkpoints():
            content(checkpoint)
        assert not [name for name in names(root) if ".tmp-" in name or ".old-" in name]
        count += 1
    assert reached == sorted(reached) and set(reached) == {0, 1, 2, 3}
    assert count > 40


# ---------------------------------------------------------------- disk full

FULL = """
    import json, sys
    from pathlib import Path
    from verl.trainer.ppo.checkpoint import CheckpointError, CheckpointStore
    store = CheckpointStore(Path(sys.argv[1]), max_to_keep=1)

    def save(step, size):
        with store.writing(step) as directory:
            (directory / "small.txt").write_text(str(step))
            if sys.argv[2] == "torch":
                import torch
                torch.save(torch.zeros(size // 4), directory / "model.pt")
            else:
                (directory / "model.pt").write_bytes(bytes(size))

    save(1, 1000)
    {limit}
    try:
        save(2, 3_000_000)
    except CheckpointError as error:
        names = sorted(path.name for path in store.root.iterdir())
        print(json.dumps([error.errno, str(error), names, str(store.latest())]))
    # Once there is space again, the same store works.
    save(3, 1000)
    print(json.dumps(str(store.latest())))
"""
LIMIT_FILE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"


def run_full(root: Path, writer: str, limit: str, prefix: list[str]) -> tuple[list, str]:
    script = textwrap.dedent(FULL).replace("{limit}", limit)
    command = [*prefix, sys.executable, "-c", script, str(root), writer]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    return first, second


def check_full(root: Path, first: list, second: str, expected_errno: int | None) -> None:
    number, message, found, latest = first
    assert number == expected_errno
    assert f"{root / 'global_step_2'} was not saved" in message and "bytes are free" in message
    assert f"{root / 'global_step_1'} stays usable" in message
    assert found == ["global_step_1", TRACKER]
    assert latest == str(root / "global_step_1")
    assert second == str(root / "global_step_3")


@pytest.mark.parametrize(("writer", "number"), [("bytes", errno.EFBIG), ("torch", errno.EFBIG)])
def test_a_file_above_the_size_limit_fails_the_save(tmp_path, writer, number):
    first, second = run_full(tmp_path / "run", writer, LIMIT_FILE, [])
    check_full(tmp_path / "run", first, second, number)
    assert "File too large" in first[1] if writer == "bytes" else "RuntimeError" in first[1]


def test_a_full_disk_fails_the_save(tmp_path):
    """Use a real 2 MiB file system if a user namespace may mount one, else the file-size limit."""
    root = tmp_path / "disk"
    root.mkdir()
    mount = f'mount -t tmpfs -o size=2m none "{root}" && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        possible = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if possible:
        first, second = run_full(root, "bytes", "", prefix)
        check_full(root, first, second, errno.ENOSPC)
        free = int(first[1].split(" bytes are free")[0].rsplit(" ", 1)[1])
        assert 1_500_000 < free < 2 * 2**20, "measured after the temporary files were removed"
    else:
        first, second = run_full(root, "bytes", LIMIT_FILE, [])
        check_full(root, first, second, errno.EFBIG)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "the quota of this user or project is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "this user may not write there"),
        (errno.EIO, "the disk reports an input/output error"),
    ],
)
def test_a_failed_save_names_the_cause(tmp_path, number, words):
    store = CheckpointStore(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"not saved: {words} \(") as caught, store.writing(2):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number and f"bytes are free on the disk of {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("file", ["rng_rank_1.pt", "model/__1_0.distcp"])
def test_a_rank_that_cannot_write_leaves_the_earlier_checkpoint(tmp_path, file):
    """A directory has the name of the file, so that only this rank's write fails."""
    source = str(write_tiny_model(tmp_path / "source"))
    store = CheckpointStore(tmp_path / "run")
    save(store, 1)
    with pytest.raises(CheckpointError) as caught, store.writing(2) as directory:
        (directory / "actor" / file).mkdir(parents=True)
        run_ranks(2, save_program, source, str(directory / "actor"), ["model", "extra"], {})
    assert caught.value.errno == errno.EISDIR
    message = str(caught.value)
    assert "global_step_2 was not saved: RankFilesError: " in message and "rank 1: " in message and file in message
    assert "rank 0: " not in message and "global_step_1 stays usable" in message
    assert content(store.latest()) == (1, "") and names(store.root) == ["global_step_1", TRACKER]


# ---------------------------------------------------------------- driver state


def test_driver_state_restores_the_loader(tmp_path):
    def loader():
        generator = torch.Generator().manual_seed(1)
        return StatefulDataLoader(TensorDataset(torch.arange(20)), batch_size=3, shuffle=True, generator=generator)

    def values(batches):
        return [batch[0].tolist() for batch in batches]

    uninterrupted = values(loader())
    first = loader()
    batches = iter(first)
    before = values(next(batches) for _ in range(2))
    state = {"dataloader": first.state_dict(), "global_step": 2, "names": ["a"], "none": None, "rng": torch.arange(4)}
    assert save_driver_state(tmp_path, state).name == "data.pt"
    loaded = load_driver_state(tmp_path)
    assert loaded["global_step"] == 2 and loaded["names"] == ["a"] and loaded["rng"].tolist() == [0, 1, 2, 3]
    second = loader()
    second.load_state_dict(loaded["dataloader"])
    assert before + values(second) == uninterrupted


NUMPY = {
    "array": np.arange(3),
    "half": np.ones((2, 2), np.float16),
    "truth": np.array([True, False]),
    "scalar": np.float64(0.5),
    "generator": np.random.RandomState(3).get_state(),
}


def test_driver_state_may_hold_numpy_values(tmp_path):
    save_driver_state(tmp_path, {"mine": NUMPY, "seen": {1, 2}})
    loaded = load_driver_state(tmp_path)
    assert loaded["seen"] == {1, 2} and loaded["mine"]["scalar"] == 0.5
    for name in ("array", "half", "truth"):
        np.testing.assert_array_equal(loaded["mine"][name], NUMPY[name], strict=True)
    expected = np.random.RandomState(3).rand(4)
    resumed = np.random.RandomState(0)
    resumed.set_state(loaded["mine"]["generator"])
    assert resumed.rand(4).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (random.Random(0), "it contains random.Random"),
        (defaultdict(list), "it contains collections.defaultdict"),
        (lambda: 0, "pickle"),
        (np.array(["a"], object), "it contains"),
    ],
)
def test_values_that_a_checkpoint_cannot_hold_are_found_before(value, words):
    check_storable({"fine": [1, "a", None, NUMPY]})
    with pytest.raises(ValueError, match=words):
        check_storable({"mine": value})


def test_driver_state_that_cannot_be_loaded_is_rejected_when_saved(tmp_path):
    with pytest.raises(ValueError, match=r"driver state \['bad'\]: only dicts"):
        save_driver_state(tmp_path, {"bad": random.Random(0)})


@pytest.mark.parametrize("harm", ["missing", "empty", "truncated", "garbage"])
def test_a_damaged_driver_state_names_its_file(tmp_path, harm):
    path = save_driver_state(tmp_path, {"a": torch.zeros(1000)})
    if harm == "missing":
        path.unlink()
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "truncated":
        os.truncate(path, 2000)
    else:
        path.write_bytes(b"garbage" * 100)
    with pytest.raises(CheckpointError, match=r"data\.pt cannot be loaded"):
        load_driver_state(tmp_path)
