"""Reading of data files, and the errors of missing and damaged files."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.data_files import data_config, jsonl, parquet, row
from verl.utils.dataset.files import column_names, count_rows, read_rows, row_name
from verl.utils.dataset.rl_dataset import RLHFDataset


def both(path, tokenizer):
    """The fast count and the full read, which must give the same error for a damaged file."""
    return [lambda: count_rows(path), lambda: RLHFDataset(path, tokenizer, data_config())]


def test_count_rows_sums_all_files(tmp_path):
    paths = [parquet(tmp_path / "a.parquet", [row("a")] * 3), jsonl(tmp_path / "b.jsonl", [row("b")] * 2)]
    assert count_rows(paths) == 5 and count_rows(str(paths[1])) == 2


def test_missing_and_unsupported_files_are_errors(tmp_path, tokenizer):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "dir.parquet").mkdir()
    for path, kind, words in (
        (tmp_path / "no.parquet", FileNotFoundError, r"no\.parquet does not exist"),
        (tmp_path / "dir.parquet", FileNotFoundError, "is a directory; list its files"),
        (tmp_path / "x.csv", ValueError, r"'\.csv' is not supported; use one of \.parquet, \.json, \.jsonl"),
        ([], ValueError, r"no data file is given: set data\.train_files"),
        (None, ValueError, "no data file is given"),
    ):
        for read in both(path, tokenizer):
            with pytest.raises(kind, match=words):
                read()


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_empty_files_are_errors(tmp_path, tokenizer, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"")
    for read in both(path, tokenizer):
        with pytest.raises(ValueError, match=rf"x\.{suffix} is empty \(0 bytes\)"):
            read()
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row("a")]).slice(0, 0), path)
    else:
        path.write_text("[]" if suffix == "json" else "\n\n")
    for read in both(path, tokenizer):
        with pytest.raises(ValueError, match=rf"x\.{suffix} has no rows"):
            read()


@pytest.mark.parametrize("keep", [2, 100, -1, -20])
def test_error_names_a_truncated_parquet_file(tmp_path, tokenizer, keep):
    path = parquet(tmp_path / "cut.parquet", [row("a", i) for i in range(100)])
    path.write_bytes(path.read_bytes()[:keep])
    for read in both(path, tokenizer):
        with pytest.raises(ValueError, match=r"cut\.parquet \(\d+ bytes\) is not a complete Parquet file.*again"):
            read()


def test_error_names_a_parquet_file_with_zeroed_bytes(tmp_path, tokenizer):
    path = parquet(tmp_path / "hole.parquet", [row("abc" * (i % 7), i) for i in range(100)])
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"hole\.parquet .* not a complete Parquet file"):
        RLHFDataset(path, tokenizer, data_config())


def test_error_names_the_line_of_invalid_json(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row("a")) + '\n\n{"prompt": [{"ro')
    for read in both(path, tokenizer):
        with pytest.raises(ValueError, match=r"x\.jsonl: line 3 is not valid JSON"):
            read()
    path.write_text('[{"prompt": 1},\n{"prom')
    with pytest.raises(ValueError, match=r"invalid JSON at line 2"):
        RLHFDataset(path, tokenizer, data_config())
    path.write_text('{"prompt": []}\n3\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, row 1 .*: is a JSON int"):
        RLHFDataset(path, tokenizer, data_config())
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"x\.jsonl: not UTF-8"):
        RLHFDataset(path, tokenizer, data_config())


def test_files_module_imports_neither_torch_nor_transformers():
    code = "import sys, verl.utils.dataset.files; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_not_part_of_the_data(tmp_path, tokenizer, suffix, end):
    rows = [row("a"), row("b", 1)]
    text = json.dumps(rows) if suffix == "json" else end.join(map(json.dumps, rows)) + end
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert count_rows(path) == 2 and column_names(path) == list(row("a"))
    assert [item["raw_prompt"] for item in RLHFDataset(path, tokenizer, data_config())] == [
        one["prompt"] for one in rows
    ]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_that_python_cannot_read_is_an_error(tmp_path, text, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data file .*x\.json"):
        read_rows(path)


def json_column(path, rows):
    columns = {key: pa.array([json.dumps(one[key]) for one in rows]) for key in rows[0]}
    pq.write_table(
        pa.table({key: pa.ExtensionArray.from_storage(pa.json_(), column) for key, column in columns.items()}), path
    )
    return path


@pytest.mark.parametrize("write", [jsonl, json_column])
def test_half_a_character_becomes_u_fffd_with_one_warning(tmp_path, tokenizer, caplog, write):
    rows = [row("a"), row("b\ud83d", 1), row("c", 2, data_source="\udc80"), row("d\ud83d\ude00", 3)]
    path = write(tmp_path / f"x.{'jsonl' if write is jsonl else 'parquet'}", rows)
    items = list(RLHFDataset(path, tokenizer, data_config()))
    assert [item["raw_prompt"][0]["content"] for item in items] == ["a", "b\ufffd", "c", "d\U0001f600"]
    assert items[1]["reward_model"]["ground_truth"] == "\ufffdb" and items[2]["data_source"] == "\ufffd"
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [row_name(path, 1)]


def test_escaped_characters_in_pairs_are_no_half_characters(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_text(json.dumps(row("\U0001f600")))
    assert read_rows(tmp_path / "x.jsonl")[0]["prompt"][0]["content"] == "\U0001f600" and not caplog.records


def test_the_head_of_a_parquet_file_has_its_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("verl.utils.dataset.files._ROWS_PER_BATCH", 2)
    path = parquet(tmp_path / "a.parquet", [row("ab", ability=str(i)) for i in range(5)])
    head = read_rows(path, head=True)
    assert [head[i]["ability"] for i in range(len(head))] == ["0", "1"]
    assert len(read_rows(path)) == 5


@pytest.mark.parametrize("zone", ["Mars/Phobos", "../etc"])
def test_a_time_of_an_unknown_zone_is_named(tmp_path, zone):
    path = tmp_path / "data.parquet"
    times = pa.array([None, 1_000_000], pa.timestamp("us", zone))
    pq.write_table(pa.table({"prompt": ["a", "b"], "made": times}), path)
    rows = read_rows(path)
    with pytest.raises(
        ValueError, match=r"row 1 .*column 'made' \(timestamp.*cannot be read .*; correct it, or remove"
    ):
        list(rows.read(0, 2, rows.columns))


@pytest.mark.parametrize(
    ("text", "place"), [('{"a": 1}\n{"a": 1, "a": 2}\n', "line 2"), ('[{"a": 1, "a": 2}]', "JSON")]
)
def test_a_column_that_stands_twice_in_json_is_an_error(tmp_path, text, place):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{place}.*the key 'a' stands twice"):
        read_rows(path)
