"""JSON-lines files of generated samples."""

import json

import numpy as np
import pytest

from verl.trainer.rollouts.sample_files import dump_generations


def test_dump_generations_writes_one_json_line_per_sample(tmp_path):
    rows = [
        {
            "input": "cat",
            "output": "t\u00e4c\n",
            "gts": {"a": np.int64(3)},
            "score": np.float32(0.5),
            "acc": float("nan"),
        },
        {"acc": True, "score": 1, "gts": None, "output": "", "input": "dog"},
    ]
    path = dump_generations(tmp_path / "val", 7, rows)
    assert path == tmp_path / "val" / "7.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"input": "cat", "output": "t\u00e4c\n", "gts": {"a": 3}, "score": 0.5, "step": 7, "acc": None},
        {"input": "dog", "output": "", "gts": None, "score": 1, "step": 7, "acc": True},
    ]
    assert all(list(line)[:5] == ["input", "output", "gts", "score", "step"] for line in lines)
    with pytest.raises(ValueError, match=r"rows\[0\] lacks \['gts'\]"):
        dump_generations(tmp_path / "val", 7, [{"input": "", "output": "", "score": 0}])
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["7.jsonl"]


def test_half_a_character_in_a_sample_is_replaced(tmp_path):
    row = {"input": "a\ud83d", "output": "b", "gts": "\udc80", "score": 1.0, "extra": {"\ud83d": "\ud83d"}}
    path = dump_generations(tmp_path, 1, [row])
    (read,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert read["input"] == "a\ufffd" and read["gts"] == "\ufffd" and read["extra"] == {"\ufffd": "\ufffd"}
