"""Padding of prompts and responses."""

import numpy as np

from verl.agent_loop.padding import pad_right, pad_samples


def test_prompts_are_padded_on_the_left_and_responses_on_the_right():
    columns = pad_samples([[1, 2, 3], [4]], [[5], [6, 7]], 9)
    expected = {
        "prompts": [[1, 2, 3], [9, 9, 4]],
        "responses": [[5, 9], [6, 7]],
        "input_ids": [[1, 2, 3, 5, 9], [9, 9, 4, 6, 7]],
        "attention_mask": [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]],
    }
    assert {name: column.tolist() for name, column in columns.items()} == expected
    assert all(column.dtype == np.int64 and column.flags.c_contiguous for column in columns.values())


def test_empty_responses_have_one_column():
    columns = pad_samples([[1], [2, 3]], [[], []], 0)
    assert columns["responses"].shape == (2, 1)
    assert columns["attention_mask"].tolist() == [[0, 1, 0], [1, 1, 0]]


def test_rows_of_numbers_get_a_dtype_and_a_filler():
    padded = pad_right([[0.5], [], [1.0, 2.0]], 2, -1, np.float32)
    assert padded.tolist() == [[0.5, -1], [-1, -1], [1, 2]] and padded.dtype == np.float32
