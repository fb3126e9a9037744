"""DataProto: operations on rows and columns, changes in place, pickle, and files."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from verl.protocol import DataProto, DataProtoConfig, DataProtoItem, pad_dataproto_to_divisor, unpad_dataproto
from verl.utils import atomic_io


def make(rows: int = 6, seed: int = 0) -> DataProto:
    generator = torch.Generator().manual_seed(seed)
    return DataProto.from_dict(
        {
            "ids": torch.arange(rows).unsqueeze(1) * 10 + torch.arange(3),
            "scores": torch.randn(rows, 2, generator=generator, dtype=torch.float32),
            "half": torch.randn(rows, generator=generator).to(torch.bfloat16),
            "flag": torch.arange(rows) % 2 == 0,
        },
        {"uid": [f"u{i}" for i in range(rows)], "chat": [[{"role": "user", "content": str(i)}] for i in range(rows)]},
        {"temperature": 1.0},
    )


def rows_of(data: DataProto) -> list[tuple]:
    """Every row as Python values, in the order of the column names."""
    tensors = {} if data.batch is None else {key: data.batch[key].float().tolist() for key in data.batch.keys()}  # noqa: SIM118
    columns = tensors | {key: list(column) for key, column in data.non_tensor_batch.items()}
    return [tuple((key, repr(columns[key][i])) for key in sorted(columns)) for i in range(len(data))]


def assert_same(a: DataProto, b: DataProto) -> None:
    assert rows_of(a) == rows_of(b)
    assert a.meta_info == b.meta_info
    dtypes = [{} if x.batch is None else {k: v.dtype for k, v in x.batch.items()} for x in (a, b)]
    assert dtypes[0] == dtypes[1]


# ---- construction and access-----------------------------------------------------------------------------------------


def test_from_single_dict_sorts_columns_by_type():
    data = DataProto.from_single_dict({"a": torch.zeros(2, 3), "b": np.array(["x", "y"], dtype=object)}, {"k": 1})
    assert set(data.batch.keys()) == {"a"} and set(data.non_tensor_batch) == {"b"} and data.meta_info == {"k": 1}
    with pytest.raises(ValueError, match=r"data\['c'\] is a list"):
        DataProto.from_single_dict({"c": [1, 2]})


def test_lists_of_equal_length_stay_one_cell_each():
    data = DataProto.from_dict(non_tensors={"ids": [[1, 2], [3, 4]]})
    assert data.non_tensor_batch["ids"].shape == (2,) and data.non_tensor_batch["ids"][1] == [3, 4]
    assert data.batch is None and len(data) == 2


def test_empty_table():
    data = DataProto()
    assert len(data) == 0 and list(data) == [] and len(DataProto.from_dict({}, {}, {"a": 1})) == 0
    assert pad_dataproto_to_divisor(data, 4) == (data, 0)


@pytest.mark.parametrize(
    ("tensors", "columns", "words"),
    [
        ({"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(2)}, {}, ["'c': 2", "'a', 'b'", "3 rows"]),
        ({"a": torch.zeros(3), "b": torch.zeros(3)}, {"uid": ["x", "y"]}, ["'uid': 2", "3 rows"]),
        ({}, {"uid": ["x"], "vid": ["x"], "n": ["x", "y"]}, ["'n': 2", "1 rows"]),
        ({"a": [1, 2]}, {}, ["tensors['a'] is a list"]),
        ({"a": torch.tensor(1.0)}, {}, ["tensors['a'] is a 0-d tensor"]),
        ({}, {"uid": "text"}, ["non_tensor_batch['uid'] is a str", "numpy array"]),
    ],
)
def test_error_names_inconsistent_columns(tensors, columns, words):
    with pytest.raises(ValueError) as error:
        DataProto.from_dict(tensors, columns)
    for word in words:
        assert word in str(error.value)


def test_columns_assigned_later_are_checked_when_pickled():
    data = make(4)
    data.non_tensor_batch["late"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"'late': 3"):
        pickle.dumps(data)
    del data.non_tensor_batch["late"]
    data.batch = TensorDict({"a": torch.zeros(4, 2)}, batch_size=[4, 2])
    with pytest.raises(ValueError, match=r"batch_size=\[4, 2\]"):
        data.check_consistency()


def test_getitem_returns_items_and_tables():
    data = make(6)
    item = data[np.int64(-1)]
    assert isinstance(item, DataProtoItem) and item.non_tensor_batch["uid"] == "u5"
    assert item.batch["ids"].tolist() == [50, 51, 52] and item.batch.batch_size == torch.Size([])
    assert [one.non_tensor_batch["uid"] for one in data] == [f"u{i}" for i in range(6)]

    def uids(index):
        return data[index].non_tensor_batch["uid"].tolist()

    assert uids(slice(1, 4)) == ["u1", "u2", "u3"]
    assert uids(slice(None, None, -2)) == ["u5", "u3", "u1"]
    assert uids([2, -6, 2]) == uids(np.array([2, 0, 2])) == uids(torch.tensor([2, 0, 2])) == ["u2", "u0", "u2"]
    mask = [True, False, True, False, False, False]
    assert uids(mask) == uids(np.array(mask)) == uids(torch.tensor(mask)) == ["u0", "u2"]
    assert data[[3, 1]].batch["ids"][:, 0].tolist() == [30, 10]
    assert len(data[[]]) == 0
    for wrong, kind in ((6, IndexError), ([0, -7], IndexError), ([True], IndexError), ("uid", TypeError)):
        with pytest.raises(kind):
            data[wrong]
    with pytest.raises(TypeError):
        data[[0.5]]


def test_slices_are_views_and_indices_are_copies():
    data = make(4)
    data[1:3].batch["ids"][0, 0] = -1
    data[[2]].batch["ids"][0, 0] = -2
    assert data.batch["ids"][:, 0].tolist() == [0, -1, 20, 30]
    data[0:2].meta_info["new"] = 1
    assert "new" not in data.meta_info


# ---- columns --------------------------------------------------------------------------------------------------------


def test_select_shares_columns_unless_deepcopy():
    data = make(3)
    some = data.select(batch_keys=["ids"], non_tensor_batch_keys=["uid"], meta_info_keys=[])
    assert list(some.batch.keys()) == ["ids"] and list(some.non_tensor_batch) == ["uid"] and some.meta_info == {}
    some.batch["ids"][0, 0] = 7
    some.batch["new"] = torch.zeros(3)
    assert data.batch["ids"][0, 0] == 7 and "new" not in data.batch.keys()  # noqa: SIM118
    whole = data.select()
    whole.batch["new"] = torch.zeros(3)
    assert "new" not in data.batch.keys()  # noqa: SIM118
    deep = data.select(deepcopy=True)
    deep.batch["ids"][0, 0] = 9
    deep.non_tensor_batch["chat"][0][0]["content"] = "changed"
    assert data.batch["ids"][0, 0] == 7 and data.non_tensor_batch["chat"][0][0]["content"] == "0"
    with pytest.raises(KeyError, match="idz"):
        data.select(batch_keys=["idz"])


def test_pop_removes_and_returns_columns():
    data = make(3)
    popped = data.pop(["ids"], ["uid"], ["temperature"])
    assert list(popped.batch.keys()) == ["ids"] and popped.non_tensor_batch["uid"].tolist() == ["u0", "u1", "u2"]
    assert popped.meta_info == {"temperature": 1.0} and data.meta_info == {}
    assert "ids" not in data.batch.keys() and "uid" not in data.non_tensor_batch  # noqa: SIM118
    with pytest.raises(KeyError, match="uid"):
        data.pop(["scores"], ["uid"])
    assert "scores" in data.batch.keys()  # noqa: SIM118
    assert data.pop(non_tensor_batch_keys=["chat"]).batch is None


def test_pop_of_none_removes_nothing_of_that_kind():
    data = make()
    popped = data.pop(["ids"], None, None)
    assert set(popped.batch.keys()) == {"ids"} and not popped.non_tensor_batch and not popped.meta_info
    assert "ids" not in data.batch and set(data.non_tensor_batch) == {"uid", "chat"} and data.meta_info
    assert set(data.pop(None, ["uid", "uid"]).non_tensor_batch) == {"uid"}


IN_PLACE_FAILURES = {
    "pop: unknown array": lambda d: d.pop(["ids"], ["absent"]),
    "pop: unknown meta value": lambda d: d.pop(["ids"], ["uid"], ["absent"]),
    "pop: one str": lambda d: d.pop(["ids"], "uid"),
    "pop: no name": lambda d: d.pop(["ids"], 3),
    "rename: unknown": lambda d: d.rename(["ids", "absent"], ["a", "b"]),
    "rename: duplicate new": lambda d: d.rename(["ids", "uid"], ["a", "a"]),
    "rename: duplicate old": lambda d: d.rename(["ids", "ids"], ["a", "b"]),
    "union: other rows": lambda d: d.union(make(3)),
    "union: other values": lambda d: d.union(DataProto.from_dict({"new": torch.zeros(6), "scores": torch.ones(6, 2)})),
    "union: other meta value": lambda d: d.union(
        DataProto.from_dict({"new": torch.zeros(6)}, {}, {"temperature": 2.0})
    ),
    "reorder: no permutation": lambda d: d.reorder([0, 0, 1, 2, 3, 4]),
    "padding: candidate": lambda d: d.padding(2, "middle"),
    "padding: negative": lambda d: d.padding(-1),
}


@pytest.mark.parametrize("call", IN_PLACE_FAILURES.values(), ids=IN_PLACE_FAILURES.keys())
def test_a_method_that_fails_leaves_the_table_unchanged(call):
    data = make()
    with pytest.raises((KeyError, ValueError, TypeError, IndexError)):
        call(data)
    assert_same(data, make())


def test_rename_is_in_place():
    data = make(3)
    ids = data.batch["ids"]
    assert data.rename(["ids", "uid"], ["tokens", "name"]) is data
    assert data.batch["tokens"] is ids and data.non_tensor_batch["name"][0] == "u0"
    assert data.rename("tokens", "ids").batch["ids"] is ids
    data.rename(["ids", "scores"], ["scores", "ids"])
    assert data.batch["scores"] is ids
    with pytest.raises(KeyError, match="nope"):
        data.rename("nope", "x")
    with pytest.raises(ValueError, match="duplicate name"):
        data.rename("ids", "name")
    with pytest.raises(ValueError, match="1 old names and 2"):
        data.rename(["ids"], ["a", "b"])


def test_union_is_in_place_and_requires_equal_values():
    data, other = make(3), make(3).select(["ids"], ["uid"])
    other.batch["extra"] = torch.tensor([1.0, float("nan"), 3.0])
    other.non_tensor_batch["n"] = np.array([1.0, np.nan, 3.0])
    assert data.union(other) is data
    assert "extra" in data.batch.keys() and "scores" in data.batch.keys() and "n" in data.non_tensor_batch  # noqa: SIM118
    data.union(other.select(deepcopy=True))  # NaN equals NaN
    with pytest.raises(ValueError, match="'extra' with different values"):
        data.union(DataProto.from_dict({"extra": torch.tensor([1.0, float("nan"), 4.0])}))
    for change in (
        DataProto.from_dict({"ids": torch.zeros(3, 3, dtype=torch.int64), "more": torch.zeros(3)}),
        DataProto.from_dict({"more": torch.zeros(3)}, {"uid": ["u0", "u1", "other"]}),
        DataProto.from_dict({"more": torch.zeros(3)}, meta_info={"temperature": 0.5}),
        DataProto.from_dict({"more": torch.zeros(4)}),
    ):
        before = rows_of(data)
        with pytest.raises(ValueError, match=r"union: .*(ids|uid|temperature|3 rows and 4)"):
            data.union(change)
        assert rows_of(data) == before
    only_text = DataProto.from_dict(non_tensors={"t": ["a", "b"]})
    tensors = DataProto.from_dict({"x": torch.zeros(2)})
    only_text.union(tensors).batch["y"] = torch.ones(2)
    assert "y" not in tensors.batch.keys()  # noqa: SIM118


# ---- rows -----------------------------------------------------------------------------------------------------------

ROWS = st.integers(min_value=1, max_value=12)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 4), chunks=st.integers(1, 5))
def test_concat_restores_chunks(size, chunks):
    data = make(size * chunks)
    parts = data.chunk(chunks)
    assert [len(part) for part in parts] == [size] * chunks
    assert_same(DataProto.concat(parts), data)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, size=st.integers(1, 13))
def test_concat_restores_splits_and_only_the_last_part_is_short(rows, size):
    data = make(rows)
    parts = data.split(size)
    assert all(len(part) == size for part in parts[:-1]) and 1 <= len(parts[-1]) <= size
    assert_same(DataProto.concat(parts), data)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reorder_has_an_inverse(draw):
    rows = draw.draw(ROWS)
    order = draw.draw(st.permutations(range(rows)))
    data = make(rows)
    assert data.reorder(torch.tensor(order)) is data
    assert rows_of(data) == [rows_of(make(rows))[i] for i in order]
    assert_same(data.reorder(np.argsort(order)), make(rows))


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, times=st.integers(0, 3), interleave=st.booleans())
def test_repeat_copies_rows_in_order(rows, times, interleave):
    data = make(rows)
    rows_once = rows_of(data)
    expected = [row for row in rows_once for _ in range(times)] if interleave else rows_once * times
    repeated = data.repeat(times, interleave=interleave)
    assert rows_of(repeated) == expected
    assert repeated.batch["ids"].shape == (rows * times, 3)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_sample_level_repeat_copies_each_row_by_its_count(counts):
    data = make(len(counts))
    expected = [row for row, n in zip(rows_of(data), counts, strict=True) for _ in range(n)]
    assert rows_of(data.sample_level_repeat(counts)) == expected
    assert rows_of(data.sample_level_repeat(torch.tensor(counts))) == expected


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, divisor=st.integers(1, 9))
def test_padding_repeats_from_the_first_row_and_unpadding_removes_it(rows, divisor):
    data = make(rows)
    padded, pad = pad_dataproto_to_divisor(data, divisor)
    assert len(padded) % divisor == 0 and 0 <= pad < divisor
    assert rows_of(padded) == [rows_of(data)[i % rows] for i in range(rows + pad)]
    assert_same(unpad_dataproto(padded, pad), data)


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, chunks=st.integers(1, 9))
def test_auto_padding_cuts_any_number_of_rows(rows, chunks):
    data = DataProto.from_dict({"a": torch.arange(rows)}, {"b": list(range(rows))}, auto_padding=True)
    parts = data.chunk(chunks)
    assert [len(part) for part in parts][: -(-rows // -(-rows // chunks))] == [
        len(x) for x in torch.arange(rows).chunk(chunks)
    ]
    assert len(parts) == chunks
    assert torch.cat([part.batch["a"] for part in parts]).tolist() == list(range(rows))


def test_auto_padding_of_the_process(monkeypatch):
    with pytest.raises(ValueError, match="7 rows"):
        make(7).chunk(2)
    monkeypatch.setattr(DataProtoConfig, "auto_padding", True)
    assert [len(part) for part in make(7).chunk(2)] == [4, 3]


def test_slice_and_select_idxs_are_the_index():
    data = make()
    assert_same(data.slice(1, 5, 2), data[1:5:2])
    assert_same(data.slice(), data)
    mask = torch.tensor([True, False, True, False, False, True])
    for rows in ([0, 2, 5], np.array([0, 2, 5]), torch.tensor([0, 2, 5]), mask, mask.numpy(), mask.tolist()):
        assert_same(data.select_idxs(rows), data[[0, 2, 5]])


@pytest.mark.parametrize(("candidate", "row"), [("first", 0), ("last", 5), ("", 5)])
def test_padding_appends_copies_of_one_row(candidate, row):
    data = make()
    data.padding(2, candidate)
    assert rows_of(data) == rows_of(make()) + rows_of(make())[row : row + 1] * 2
    data.padding(0)
    assert len(data) == 8


def test_make_iterator_visits_every_row_once_per_epoch():
    data = make()
    batches = list(data.make_iterator(2, epochs=2))
    assert [rows_of(batch) for batch in batches] == [rows_of(data)[i : i + 2] for i in (0, 2, 4)] * 2
    assert batches[0].meta_info == {"temperature": 1.0}
    uids = [
        [
            uid
            for batch in data.make_iterator(3, 2, seed=seed, dataloader_kwargs={"shuffle": True})
            for uid in batch.non_tensor_batch["uid"]
        ]
        for seed in (1, 1, 2)
    ]
    assert uids[0] == uids[1] != uids[2]
    for epoch in (uids[0][:6], uids[0][6:]):
        assert sorted(epoch) == sorted(data.non_tensor_batch["uid"]) and epoch != list(data.non_tensor_batch["uid"])
    with pytest.raises(ValueError, match="mini_batch_size=4 must divide the 6 rows"):
        data.make_iterator(4, 1)


def test_unfold_column_chunks_cuts_the_named_columns_and_repeats_the_others():
    pairs = np.array([["a", "b"], ["c", "d"]], dtype=object)
    data = DataProto.from_dict(
        {"x": torch.arange(8).reshape(2, 4), "y": torch.tensor([1, 2])}, {"z": pairs, "u": ["p", "q"]}
    )
    unfolded = data.unfold_column_chunks(2, ["x", "z"])
    assert unfolded.batch["x"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and unfolded.batch["y"].tolist() == [
        1,
        1,
        2,
        2,
    ]
    assert unfolded.non_tensor_batch["z"].tolist() == [["a"], ["b"], ["c"], ["d"]]
    assert unfolded.non_tensor_batch["u"].tolist() == ["p", "p", "q", "q"]
    with pytest.raises(ValueError, match="column 'x'"):
        data.unfold_column_chunks(3, ["x"])
    with pytest.raises(KeyError, match="absent"):
        data.unfold_column_chunks(2, ["absent"])


def test_sizes_are_described(capsys):
    make().print_size("batch")
    assert capsys.readouterr().out.startswith("batch, size of batch: 0.0000")
    assert (
        "batch.ids: (6, 3) torch.int64" in make().get_data_info()
        and "meta_info.temperature: float" in make().get_data_info()
    )


def test_row_operations_reject_invalid_arguments():
    data = make(6)
    with pytest.raises(ValueError, match=r"6 rows cannot be cut into 4.*pad_dataproto_to_divisor"):
        data.chunk(4)
    with pytest.raises(ValueError, match="split_size=0"):
        data.split(0)
    with pytest.raises(ValueError, match="permutation"):
        data.reorder([0, 1, 2, 3, 4, 4])
    with pytest.raises(ValueError, match="repeat_times=-1"):
        data.repeat(-1)
    with pytest.raises(ValueError, match="one non-negative count"):
        data.sample_level_repeat([1, 2])
    with pytest.raises(ValueError, match="size_divisor=0"):
        pad_dataproto_to_divisor(data, 0)
    with pytest.raises(ValueError, match="pad_size=7"):
        unpad_dataproto(data, 7)


def test_concat_merges_metrics_and_checks_all_other_values():
    parts = make(6).chunk(3)
    parts[0].meta_info["metrics"] = {"loss": 1.0, "a": 5}
    parts[1].meta_info["metrics"] = [{"loss": 2.0}, {"loss": 3.0}]
    parts[2].meta_info["metrics"] = {"loss": [4.0, 5.0]}
    joined = DataProto.concat(parts)
    assert joined.meta_info == {"temperature": 1.0, "metrics": {"loss": [1.0, 2.0, 3.0, 4.0, 5.0], "a": [5]}}
    parts[2].meta_info["temperature"] = 0.5
    with pytest.raises(ValueError, match=r"meta_info\['temperature'\] is 1.0 .* 0.5 in part 2"):
        DataProto.concat(parts)
    with pytest.raises(ValueError, match=r"\['flag', 'half', 'scores'\].*0 and 1"):
        DataProto.concat([make(2), make(2).select(["ids"])])
    with pytest.raises(ValueError, match=r"'ids' differ .*\(3,\), 'torch.int64'.*\(4,\)"):
        wide = make(2)
        wide.batch["ids"] = torch.zeros(2, 4, dtype=torch.int64)
        DataProto.concat([make(2), wide])
    with pytest.raises(ValueError, match="no DataProto"):
        DataProto.concat([])


# ---- pickle and files -----------------------------------------------------------------------------------------------


def test_tensordict_round_trip():
    data = make(4)
    assert_same(DataProto.from_tensordict(data.to_tensordict()), data)
    text = DataProto.from_dict(non_tensors={"t": ["a", "b"]}, meta_info={"k": {"x": [1]}})
    assert_same(DataProto.from_tensordict(text.to_tensordict()), text)
    with pytest.raises(ValueError, match="uid"):
        data.union(DataProto(meta_info={"uid": 1})).to_tensordict()
    with pytest.raises(ValueError, match="exactly one batch dimension"):
        DataProto.from_tensordict(TensorDict({}, batch_size=[2, 2]))


def test_from_tensordict_takes_meta_values():
    table = make().select([], []).to_tensordict()
    assert DataProto.from_tensordict(table, {"step": 3}).meta_info == {"temperature": 1.0, "step": 3}
    with pytest.raises(ValueError, match="temperature"):
        DataProto.from_tensordict(table, {"temperature": 2.0})


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle_round_trip(protocol):
    for data in (make(5), make(5)[1:3], make(0), DataProto(), DataProto.from_dict(non_tensors={"t": ["a"]})):
        copy = pickle.loads(pickle.dumps(data, protocol=protocol))
        assert_same(copy, data)
        copy.check_consistency()


def test_pickle_does_not_copy_tensors_and_sends_only_the_rows_of_a_view():
    data = DataProto.from_dict({"x": torch.zeros(64, 1024)})
    buffers = []
    stream = pickle.dumps(data[:8], protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 2000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 8 * 1024 * 4
    same = np.frombuffer(buffers[0].raw(), dtype=np.float32)
    data.batch["x"][0, 0] = 7
    assert same[0] == 7  # the buffer shares the memory of the tensor


def test_columns_unpickled_from_read_only_memory_are_writable():
    data = DataProto.from_dict({"x": torch.arange(8.0)}, {"n": np.arange(8)})
    buffers = []
    stream = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    frozen = [bytes(buffer.raw()) for buffer in buffers]
    copy = pickle.loads(stream, buffers=frozen)
    copy.batch["x"] += 1
    copy.non_tensor_batch["n"] += 1
    assert copy.batch["x"].tolist() == [1.0 + i for i in range(8)]
    again = pickle.loads(stream, buffers=frozen)
    assert again.batch["x"].tolist() == [float(i) for i in range(8)]


def test_save_and_load_round_trip(tmp_path):
    data = make(5)
    data.non_tensor_batch["n"] = np.arange(10, dtype=np.int32).reshape(5, 2)
    data.non_tensor_batch["s"] = np.array(["a", "bb", "c", "d", "é"])
    data.non_tensor_batch["mixed"] = np.array([None, 1, 2.5, {"a": [True]}, "x"], dtype=object)
    data.batch["view"] = data.batch["ids"][:, 1:]
    path = tmp_path / "deeper" / "batch.safetensors"
    data.save_to_disk(path)
    loaded = DataProto.load_from_disk(path)
    assert_same(loaded, data)
    for key, column in data.non_tensor_batch.items():
        assert loaded.non_tensor_batch[key].dtype == column.dtype
    assert list(loaded.non_tensor_batch) == list(data.non_tensor_batch)
    assert [p.name for p in path.parent.iterdir()] == ["batch.safetensors"]
    for other in (DataProto(), make(3)[2:], DataProto.from_dict(non_tensors={"t": ["a"]})):
        other.save_to_disk(path)
        assert_same(DataProto.load_from_disk(path), other)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((1, 2), r"non_tensor_batch\['x'\], row 1 is a tuple"),
        ({"a": [{1: 2}]}, r"row 1\['a'\]\[0\] is a dict with keys that are not str"),
        (np.float32(1), "float32"),
        (object(), "object"),
    ],
)
def test_save_rejects_values_that_json_changes_and_keeps_the_old_file(tmp_path, value, words):
    path = tmp_path / "batch.safetensors"
    make(2).save_to_disk(path)
    column = np.empty(2, dtype=object)
    column[1] = value
    with pytest.raises(ValueError, match=words):
        DataProto.from_dict(non_tensors={"x": column}).save_to_disk(path)
    with pytest.raises(ValueError, match=r"meta_info\['m'\]"):
        DataProto(meta_info={"m": value}).save_to_disk(path)
    assert_same(DataProto.load_from_disk(path), make(2))


def test_load_rejects_damaged_and_foreign_files(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "batch.safetensors"
    make(50).save_to_disk(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"batch.safetensors: the DataProto file is damaged"):
        DataProto.load_from_disk(path)
    save_file({"a": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="did not write"):
        DataProto.load_from_disk(path)
    with pytest.raises(FileNotFoundError):
        DataProto.load_from_disk(tmp_path / "absent")


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "batch.safetensors"
    make(3).save_to_disk(path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_io, "fsync_path", full)
    with pytest.raises(OSError, match="No space"):
        make(4).save_to_disk(path)
    assert_same(DataProto.load_from_disk(path), make(3))
    assert len(list(tmp_path.iterdir())) == 1
