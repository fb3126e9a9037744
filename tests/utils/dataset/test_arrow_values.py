"""Files as pandas, polars, datasets and DuckDB write them: each is read like the plain rows, or refused by name.

pyarrow writes them all: the physical columns, and under `ARROW:schema` the types that the other library would declare.
"""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.data_files import data_config, jsonl
from verl.utils.dataset.files import read_rows
from verl.utils.dataset.rl_dataset import RLHFDataset


def call(**arguments):
    """An assistant's message with a tool call."""
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def row(i, prompt, tools_kwargs):
    return {
        "prompt": prompt,
        "data_source": "words",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"index": i, "tools_kwargs": tools_kwargs},
    }


# The rows differ in the fields of their structs, so Parquet pads each of them with null fields.
PLAIN = [
    row(0, [{"role": "user", "content": "a"}], {"search": {"create_kwargs": {"k": 1}}}),
    row(1, [{"role": "user", "content": "b"}, call(city="rome")], {"calc": {"execute_kwargs": {"n": "x"}}}),
    row(2, [{"role": "user", "content": "c"}, call(expr="1")], {"search": {"create_kwargs": {"depth": 2}}}),
]
TABLE = pa.Table.from_pylist(PLAIN)


def retyped(kind, text=None, sequence=None):
    """Return a type with another type of text and of lists at every depth."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(retyped(field.type, text, sequence)) for field in kind])
    if pa.types.is_list(kind):
        return (sequence or pa.list_)(retyped(kind.value_type, text, sequence))
    return text if text is not None and pa.types.is_string(kind) else kind


def declare(path, physical, **types):
    """Write a table whose Arrow schema, in the metadata, declares other types than the physical columns have."""
    fields = [field.with_type(types.get(field.name, field.type)) for field in physical.schema]
    schema = base64.b64encode(pa.schema(fields).serialize().to_pybytes())
    pq.write_table(physical.replace_schema_metadata({"ARROW:schema": schema}), path, store_schema=False)


def all_retyped(path, text=None, sequence=None):
    declare(path, TABLE, **{field.name: retyped(field.type, text, sequence) for field in TABLE.schema})


def write_pandas(path):
    categorical = TABLE["data_source"].dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
    table = TABLE.set_column(1, "data_source", categorical)
    table = table.append_column("__index_level_0__", pa.array([7, 8, 9]))
    metadata = {"index_columns": ["__index_level_0__"], "columns": [], "pandas_version": "3.0.0"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(metadata)}), path)


def json_text(values):
    return [None if value is None else json.dumps(value) for value in values]


def json_column(values):
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(json_text(values), pa.string()))


def write_json_columns(path, **options):
    """Every nested column as `arrow.json`: `Json()` of datasets, or JSON of DuckDB, which has no Arrow schema."""
    columns = {name: json_column([row[name] for row in PLAIN]) for name in ("prompt", "reward_model", "extra_info")}
    pq.write_table(pa.table(columns | {"data_source": TABLE["data_source"]}), path, **options)


def write_json_parts(path, **options):
    """JSON inside of structs and lists: the ground truth, each message, the tools' keywords (datasets 4.7)."""
    truth = pa.StructArray.from_arrays([pa.array(["rule"] * 3), json_column(["42"] * 3)], ["style", "ground_truth"])
    info = pa.StructArray.from_arrays(
        [pa.array([0, 1, 2]), json_column([row["extra_info"]["tools_kwargs"] for row in PLAIN])],
        ["index", "tools_kwargs"],
    )
    each = json_column([message for row in PLAIN for message in row["prompt"]])
    messages = pa.ListArray.from_arrays(pa.array([0, 1, 3, 5], pa.int32()), each)
    columns = {"prompt": messages, "data_source": TABLE["data_source"], "reward_model": truth, "extra_info": info}
    features = {"prompt": {"feature": {"_type": "Json"}, "_type": "List"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)


def write_maps(path, kind=pa.map_(pa.string(), pa.string())):  # noqa: B008
    """Structs whose values are all text as DuckDB's MAP."""
    truths = pa.array([list(row["reward_model"].items()) for row in PLAIN], kind)
    table = TABLE.set_column(TABLE.column_names.index("reward_model"), "reward_model", truths)
    pq.write_table(table, path, store_schema=False)


WRITERS = {
    "pyarrow": lambda path: pq.write_table(TABLE, path),
    "pyarrow-2.6-pages-v2": lambda path: pq.write_table(TABLE, path, data_page_version="2.0", use_dictionary=False),
    "pyarrow-old-nested-names": lambda path: pq.write_table(TABLE, path, use_compliant_nested_type=False),
    "row-groups-of-1": lambda path: pq.write_table(TABLE, path, row_group_size=1),
    **{
        f"codec-{codec}": lambda path, codec=codec: pq.write_table(TABLE, path, compression=codec)
        for codec in ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
    },
    "pandas": write_pandas,
    "duckdb": lambda path: pq.write_table(TABLE, path, store_schema=False),
    "duckdb-json": lambda path: write_json_columns(path, store_schema=False),
    "duckdb-map": write_maps,
    "duckdb-map-categorical": lambda path: write_maps(
        path, pa.map_(pa.dictionary(pa.int8(), pa.string()), pa.string())
    ),
    "polars": lambda path: all_retyped(path, pa.large_string(), pa.large_list),
    "polars-views": lambda path: all_retyped(path, pa.string_view(), pa.large_list),
    "polars-categorical": lambda path: all_retyped(path, pa.dictionary(pa.int32(), pa.large_string())),
    "list-views": lambda path: all_retyped(path, None, pa.list_view),
    "large-list-views": lambda path: all_retyped(path, None, pa.large_list_view),
    "datasets-json": write_json_columns,
    "datasets-json-parts": write_json_parts,
    "duckdb-json-parts": lambda path: write_json_parts(path, store_schema=False),
}


def items(path, tokenizer):
    data = RLHFDataset(path, tokenizer, data_config())
    return [{name: item[name] for name in (*PLAIN[0], "raw_prompt") if name in item} for item in data]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_equal_to_the_plain_rows(tmp_path, tokenizer, name):
    WRITERS[name](tmp_path / "x.parquet")
    plain = [{**row, "raw_prompt": row["prompt"]} for row in PLAIN]
    for row in plain:
        del row["prompt"]
    found = items(tmp_path / "x.parquet", tokenizer)
    # The fields of other rows remain in extra_info, whose fields are columns, but not in its `tools_kwargs`.
    assert found == plain == items(jsonl(tmp_path / "x.jsonl", PLAIN), tokenizer)


def test_files_of_different_libraries_are_one_dataset(tmp_path, tokenizer):
    paths = [tmp_path / f"{number}.parquet" for number in range(len(WRITERS))]
    for path, write in zip(paths, WRITERS.values(), strict=True):
        write(path)
    assert items(paths, tokenizer) == items(jsonl(tmp_path / "x.jsonl", PLAIN), tokenizer) * len(paths)


def test_fixed_size_lists(tmp_path):
    kind = retyped(TABLE.schema.field("prompt").type, None, lambda item: pa.list_(item, 1))
    first = pa.array([PLAIN[0]["prompt"]], kind)
    pq.write_table(pa.table({"prompt": first}), tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", "prompt")
    assert rows[0] == {"prompt": PLAIN[0]["prompt"]} and rows.first_row("prompt", filled=False) is None


def test_explicit_nulls_of_json_columns_remain(tmp_path):
    prompt = [{"role": "user", "content": "a"}, call(city=None)]
    pq.write_table(pa.table({"prompt": json_column([prompt, [], None])}), tmp_path / "x.parquet")
    rows = read_rows(tmp_path / "x.parquet", "prompt")
    assert rows[0]["prompt"] == prompt and rows.first_row("prompt", filled=False) == 1


def test_null_fields_of_other_columns_remain(tmp_path):
    pq.write_table(pa.table({"prompt": [None], "extra_info": [{"a": None, "b": {"c": None}}]}), tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet", "prompt")[0]["extra_info"] == {"a": None, "b": {"c": None}}


def column(name, values):
    """Write the plain table with another column."""

    def write(path):
        table = TABLE.drop_columns([name]) if name in TABLE.column_names else TABLE
        pq.write_table(table.append_column(name, values), path)

    return write


def sequence_of_dicts(path):
    """`Sequence({"role": ..., "content": ...})` of datasets: a dict of lists."""
    column("prompt", pa.array([{"role": ["user"], "content": ["a"]}] * 3))(path)


def bytes_as_text(values):
    return pa.array(values, pa.binary()).view(pa.string())


BYTES = pa.struct([("style", pa.string()), ("ground_truth", pa.binary())])
REFUSED = {
    "prompt-json-text": (column("prompt", pa.array(json_text([row["prompt"] for row in PLAIN]))), "plain string"),
    "prompt-dict-of-lists": (sequence_of_dicts, r"row 0 .*'prompt' is a dict; it must be a list of messages"),
    "prompt-bytes": (
        column("prompt", pa.array([[{"role": b"user", "content": b"a"}]] * 3)),
        r"prompt\[\]\.role holds bytes, expected text.*BLOB to VARCHAR",
    ),
    "source-bytes": (column("data_source", pa.array([b"words"] * 3)), "data_source holds bytes"),
    "source-categorical-bytes": (
        column("data_source", pa.array([b"words"] * 3).dictionary_encode()),
        "data_source holds bytes",
    ),
    "truth-bytes": (
        column("reward_model", pa.array([{"style": "rule", "ground_truth": b"42"}] * 3, BYTES)),
        r"reward_model\.ground_truth holds bytes",
    ),
    "reward-model-json-text": (
        column("reward_model", pa.array(json_text([row["reward_model"] for row in PLAIN]))),
        r"row 0 .*'reward_model' is a str; it must be a dict",
    ),
    "not-utf8": (
        column("data_source", bytes_as_text([b"words", b"w\xff", b"words"])),
        r"row 1 .*column 'data_source' \(string\) holds a value that cannot be read \('utf-8' codec",
    ),
    "not-json": (
        column("extra_info", pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", "{", "{}"]))),
        r"row 1 .*column 'extra_info' \(extension<arrow\.json>\) holds a value that cannot be read",
    ),
    "nanoseconds": (
        column("seen", pa.array([0, 1, 0], pa.int64()).view(pa.timestamp("ns"))),
        r"row 1 .*column 'seen' \(timestamp\[ns\]\) holds a value that cannot be read",
    ),
    "year-20000": (
        column("seen", pa.array([0, 10**18, 0], pa.int64()).view(pa.timestamp("us"))),
        r"row 1 .*column 'seen' \(timestamp\[us\]\) holds a value that cannot be read",
    ),
    "tools-kwargs-text": (
        column("extra_info", pa.array([{"tools_kwargs": "{"}] * 3)),
        r"row 0 .*tools_kwargs is text but not JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_forms_are_refused_with_file_row_and_way_out(tmp_path, tokenizer, name):
    write, words = REFUSED[name]
    write(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet") as caught:
        items(tmp_path / "x.parquet", tokenizer)
    assert caught.match(words)


def test_two_columns_with_one_name_are_an_error(tmp_path):
    table = pa.Table.from_arrays([TABLE["prompt"], TABLE["prompt"]], ["prompt", "prompt"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: several columns have the name prompt"):
        read_rows(tmp_path / "x.parquet")
