"""A rank that cannot write its files: all ranks raise the same named error, and none waits for it."""

import errno

import pytest

from fixtures.engine_cases import failed_writes_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.workers.engine.rank_errors import RankErrors, RankFilesError

CONTENTS = ["model", "optimizer", "extra"]


def block(path):
    """Put a directory where a file is to be written."""
    path.mkdir(parents=True)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_failed_write_of_one_rank_is_an_error_of_all(tmp_path, lora_rank):
    source = write_tiny_model(tmp_path / "source", dtype="bfloat16")
    # Path of the file that cannot be written, by the ranks that write it.
    blocked = {
        "rng_rank_1.pt": 1,
        "rng_rank_0.pt": 0,
        "engine.json": 0,
        "model/__1_0.distcp": 1,
        "optimizer/__1_0.distcp": 1,
        "optimizer/.metadata": 0,
    } | ({"lora_adapter/adapter_config.json": 0} if lora_rank else {})
    exported = {"config.json": 0, "part-0.safetensors": 0, "model.safetensors": 0}
    saves, exports = [(str(tmp_path / "good"), CONTENTS)], [str(tmp_path / "hf_good")]
    for number, name in enumerate(blocked):
        block(tmp_path / f"save_{number}" / name)
        saves.append((str(tmp_path / f"save_{number}"), CONTENTS))
    for number, name in enumerate(exported):
        block(tmp_path / f"hf_{number}" / name)
        exports.append(str(tmp_path / f"hf_{number}"))
    full = str(tmp_path / "full")
    arguments = (str(source), [*saves, saves[0]], [*exports, exports[0]], full, {"lora_rank": lora_rank})
    errors = run_ranks(2, failed_writes_program, *arguments)
    assert errors[0] == errors[1]
    expected = [None, *blocked.values(), None, None, *exported.values(), None, 1]
    names = ["", *blocked, "", "", *exported, "", ""]
    for (kind, text, number), rank, name in zip(errors[0], expected, names, strict=True):
        if rank is None:
            assert (kind, text, number) == ("", "", None)
        else:
            assert kind == "RankFilesError" and f"rank {rank}: " in text and name in text, (name, text)
            assert f"rank {1 - rank}: " not in text
    assert errors[0][-1][2] in (None, errno.EFBIG)


def test_a_directory_that_cannot_be_created_is_an_error_of_all_ranks(tmp_path):
    source = write_tiny_model(tmp_path / "source")
    (tmp_path / "file").write_text("")
    saves = [(str(tmp_path / "file" / "actor"), CONTENTS)]
    arguments = (str(source), saves, [str(tmp_path / "file" / "hf")], str(tmp_path / "full"), {})
    for errors in run_ranks(2, failed_writes_program, *arguments):
        assert [kind for kind, *_ in errors] == ["RankFilesError"] * 3
        assert "rank 0: NotADirectoryError" in errors[0][1] and "rank 1: NotADirectoryError" in errors[0][1]
        assert errors[0][2] == errno.ENOTDIR


def test_the_first_error_is_raised_with_its_errno():
    def program(rank):
        errors = RankErrors()
        errors.raise_together()
        for number in (errno.ENOSPC, errno.EIO):
            with errors.collect():
                raise OSError(number, "text")
        with pytest.raises(RankFilesError, match=r"rank 0: OSError: \[Errno 28\] text") as caught:
            errors.raise_together()
        assert caught.value.errno == errno.ENOSPC and caught.value.__cause__ is errors.first

    run_ranks(1, program)
