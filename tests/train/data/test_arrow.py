"""Parquet files and what `datasets` saves: the same samples as a folder, every one at its number, faults with file and row."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_pipe.errors import UsageError
from train.data.check import check_data
from train.data.dataset import Data, Dataset
from train.data.source import Columns, open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(shade: int, size: tuple[int, int] = (16, 16)) -> bytes:
    pixels = np.random.default_rng([shade, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def cells(count: int, **more: Any) -> dict[str, Any]:
    """Columns as `datasets` writes them."""
    return {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)],
        "text": [f"number {i}" for i in range(count)],
        **more,
    }


def parquet(path: Path, columns: dict[str, Any], group: int = 3, **metadata: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, path, row_group_size=group)
    return path


def saved(folder: Path, *shards: dict[str, Any]) -> Path:
    """The layout of `save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, columns in zip(names, shards, strict=True):
        table = pa.table(columns)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "group of one", "saved", "file form"])
def test_rows_are_read_at_their_numbers_in_any_order(tmp_path: Path, kind: str) -> None:
    if kind == "saved":
        path = saved(tmp_path / "set", cells(4), cells(7))
    elif kind == "file form":
        path = tmp_path / "a.arrow"
        table = pa.table(cells(7))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        path = parquet(tmp_path / "a.parquet", cells(7), 1 if kind == "group of one" else 3)
    source = open_source(str(path))
    assert source.faults == ()
    assert [r.captions for r in source.rows][-7:] == [(f"number {i}",) for i in range(7)]
    last = source.rows[-7:]
    for i in (6, 0, 3, 2, 5, 1, 4, 6):
        assert source.bytes(last[i].name) == png(i)
    assert len({r.name for r in source.rows}) == len(source.rows)
    assert last[3].name.endswith("[3]")
    with pytest.raises(UsageError, match=r"\[7\]' cannot be read"):
        source.bytes(last[6].name.replace("[6]", "[7]"))


def test_a_training_sees_the_samples_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(6):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "flat" / f"{i}.txt").write_text(f"number {i}")
    parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", {k: v[:4] for k, v in cells(6).items()})
    parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", {k: v[4:] for k, v in cells(6).items()})
    one, two = (Dataset.open(Data(str(tmp_path / n), side=16, cache=""), 0, 8) for n in ("flat", "set"))
    assert one.facts == two.facts
    for number in range(9):
        a, b = one.seen(0, number), two.seen(0, number)
        assert a == b
        assert one.picture(a).tobytes() == two.picture(b).tobytes()


def test_workers_that_fork_read_what_is_open(tmp_path: Path) -> None:
    source = open_source(str(parquet(tmp_path / "a.parquet", cells(9))))
    source.bytes(source.rows[0].name)
    for i in range(1, 9):
        child = os.fork()
        if not child:
            os._exit(0 if source.bytes(source.rows[i].name) == png(i) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_masks_conditions_lists_and_named_columns(tmp_path: Path) -> None:
    several = [["one", " two\nlines "], [], ["three"]]
    columns = cells(3, mask=[png(50 + i) for i in range(3)], conditioning_image=[png(60 + i) for i in range(3)])
    source = open_source(str(parquet(tmp_path / "a.parquet", {**columns, "text": several})))
    assert [r.captions for r in source.rows] == [("one", "two lines"), (), ("three",)]
    assert source.bytes(source.rows[1].mask) == png(51)
    assert source.bytes(source.rows[2].condition) == png(62)
    assert source.bytes(source.rows[2].name) == png(2)
    both = {"before": [png(1)], "after": [png(2)], "title": ["a word"], "text": ["other"]}
    path = str(parquet(tmp_path / "b.parquet", both))
    assert "several columns of pictures, before, after; data.image_column" in open_source(path).faults[0].words
    named = open_source(path, Columns("after", "title"))
    assert (named.rows[0].captions, named.bytes(named.rows[0].name)) == (("a word",), png(2))
    for wrong, words in ((Columns("aftr"), "did you mean 'after'"), (Columns("after", "titel"), "did you mean 'title'"),
                         (Columns("title"), "data.image_column")):  # fmt: skip
        assert words in open_source(path, wrong).faults[0].words


def test_class_numbers_are_said_by_their_names(tmp_path: Path) -> None:
    columns = {"img": [png(i) for i in range(3)], "label": [1, 0, 1]}
    told = {"features": {"img": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    source = open_source(str(parquet(tmp_path / "a.parquet", columns, info=told)))
    assert [r.captions for r in source.rows] == [("dog",), ("cat",), ("dog",)]


def test_one_split_is_read_and_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "dict" / split, cells(2 if split == "train" else 1))
        parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", cells(2 if split == "train" else 1))
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("dict", "hub"):
        source = open_source(str(tmp_path / name))
        assert len(source.rows) == 2
        assert [(f.fatal, "train is read" in f.words) for f in source.faults] == [(False, True)]
    assert len(open_source(str(tmp_path / "dict" / "test")).rows) == 1
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(UsageError, match="holds the splits a, b"):
        open_source(str(tmp_path / "dict"))


def test_check_names_file_and_row_of_every_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = png(5)[:200]
    columns = cells(6)
    columns["image"][1] = {"bytes": None, "path": None}
    columns["image"][2] = {"bytes": None, "path": "../secret.png"}
    columns["image"][3] = {"bytes": broken, "path": None}
    columns["image"][5] = columns["image"][4]
    columns["text"][0] = ""
    text = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())
    parquet(tmp_path / "a.parquet", columns)
    parquet(tmp_path / "b.parquet", {"image": [png(i) for i in (10, 11, 12)], "text": text})
    parquet(tmp_path / "d.parquet", {"id": [1], "text": ["no picture"]})
    whole = parquet(tmp_path / "c.parquet", cells(4)).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr("train.data.arrow.LARGEST_GROUP", 100)
    parquet(tmp_path / "e.parquet", {"image": [png(20), png(21)]})
    found: dict[str, list[str]] = {}
    for fault in check_data(Data(str(tmp_path)), [(16, 16)], 1):
        found.setdefault(fault.where, []).append(("" if fault.fatal else "note: ") + fault.words)
    assert "has no caption" in found["a.parquet[0]"][0]
    assert "holds no picture" in found["a.parquet[1]"][0]
    assert "only the path '../secret.png'" in found["a.parquet[2]"][0]
    assert "cannot be read as a picture" in found["a.parquet[3]"][0]
    assert "note: shows the same picture as 'a.parquet[4]'" in found["a.parquet[5]"]
    assert "is not UTF-8 text" in found["b.parquet[1]"]
    assert found["c.parquet"][0].startswith("cannot be read:")
    assert "has no column of pictures" in found["d.parquet"][0]
    assert found["a.parquet"][0].startswith("note: has a row group of 0 MB")
    assert set(found) == {
        *(f"a.parquet[{i}]" for i in (0, 1, 2, 3, 5)),
        "a.parquet",
        "b.parquet",
        "b.parquet[1]",
        "c.parquet",
        "d.parquet",
        "e.parquet",
        "e.parquet[0]",
        "e.parquet[1]",
    }
    assert "has no caption" in found["e.parquet[1]"][0]
    with pytest.raises(UsageError, match=r"\w\.parquet"):
        Dataset.open(Data(str(tmp_path), side=16), 0, 8)


def test_damage_amid_a_file_names_the_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "set", cells(4))
    shard = path / "data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:600])
    assert [(f.where, f.fatal) for f in open_source(str(path)).faults] == [(shard.name, True)]
    shard.unlink()
    assert "No such file" in open_source(str(path)).faults[0].words
    file = parquet(tmp_path / "a.parquet", cells(6), 2)
    source = open_source(str(file))
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    with open(file, "r+b") as out:
        out.seek(start)
        out.write(b"\xff" * 40)
    assert source.bytes(source.rows[0].name) == png(0)
    with pytest.raises(UsageError, match=r"'a\.parquet\[2\]' cannot be read"):
        source.bytes(source.rows[2].name)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_file_that_shrinks_under_a_reader_is_one_line_and_a_new_one_is_read(tmp_path: Path, kind: str) -> None:
    path = parquet(tmp_path / "a.parquet", cells(6), 2) if kind == "parquet" else saved(tmp_path / "set", cells(6))
    source = open_source(str(path))
    assert source.bytes(source.rows[5].name) == png(5)
    file = path if kind == "parquet" else path / "data-00000-of-00001.arrow"
    with open(file, "r+b") as out:
        out.truncate(300)
    for row in (0, 5):
        with pytest.raises(UsageError, match=rf"\[{row}\]' cannot be read"):
            source.bytes(source.rows[row].name)
    if kind == "parquet":
        parquet(file, {"image": [png(9 - i) for i in range(6)], "text": ["x"] * 6}, 2)
        assert source.bytes(source.rows[5].name) == png(4)


def test_without_pyarrow_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", cells(1))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'ldm_pipe\[data\]'"):
        open_source(str(path))


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    records = [{k: v[i] for k, v in cells(5).items()} for i in range(5)]
    made = datasets.Dataset.from_generator(lambda: iter(records), features=features, cache_dir=str(tmp_path / "cache"))
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "a.parquet"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "dict"))
    for name in ("saved", "a.parquet", "dict"):
        source = open_source(str(tmp_path / name))
        assert source.faults == ()
        assert [source.bytes(r.name) for r in source.rows] == [png(i) for i in range(5)]
        assert [r.captions for r in source.rows] == [(t,) for t in cells(5)["text"]]
