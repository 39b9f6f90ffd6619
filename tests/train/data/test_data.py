"""Data: what is listed, in which order, how it is cut and what is said of it; everything a pure function of its number."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe.errors import NumericalError, UsageError
from train.data.cache import Cache, key_of
from train.data.captions import caption_of
from train.data.check import check_data
from train.data.dataset import Data, Dataset
from train.data.geometry import bucket_sizes, draw, nearest
from train.data.order import Order, stream
from train.data.source import Columns, open_source


def picture(path: Path, size: tuple[int, int] = (16, 16), shade: int = 0, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([shade, *size]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **more)
    return path


def photos(folder: Path, count: int = 5, size: tuple[int, int] = (16, 16)) -> Path:
    for i in range(count):
        picture(folder / f"p{i}.png", size, i)
        (folder / f"p{i}.txt").write_text(f"number {i}, red, round")
    return folder


# --- order


@pytest.mark.parametrize("group", [1, 4])
def test_every_pass_of_a_bucket_visits_each_sample_once(group: int) -> None:
    order = Order([list(range(6)), list(range(6, 16))], group)
    seen = [order.at(3, i) for i in range(16 * group * 5)]
    for rows in (range(6), range(6, 16)):
        mine = [v for v in seen if v.row in rows]
        for k in range(len(mine) // len(rows)):
            part = mine[k * len(rows) : (k + 1) * len(rows)]
            assert sorted(v.row for v in part) == list(rows)
            assert {v.visit for v in part} == {k}
    assert len({(v.row, v.visit) for v in seen}) == len(seen)


def test_a_group_lies_in_one_bucket_and_buckets_have_their_share() -> None:
    order = Order([[0, 1, 2], [], list(range(3, 12))], 4)
    seen = [order.at(0, i) for i in range(4 * 400)]
    assert all(len({v.bucket for v in seen[i : i + 4]}) == 1 for i in range(0, len(seen), 4))
    counts = Counter(v.row for v in seen)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_order_and_streams_are_pure_and_apart() -> None:
    one, two = Order([list(range(50))]), Order([list(range(50))])
    two.at(1, 999)
    rows = [[o.at(1, i).row for i in range(100)] for o in (one, two)]
    assert rows[0] == rows[1]
    assert rows[0][:50] != rows[0][50:]
    assert rows[0] != [one.at(2, i).row for i in range(100)]
    draws = {stream(*key).random() for key in [(0, "a", 1, 0), (0, "a", 1, 1), (0, "a", 2, 0), (0, "b", 1, 0), (1, "a", 1, 0)]}
    assert len(draws) == 5


# --- geometry


def test_buckets_are_as_large_as_they_go_and_no_larger() -> None:
    sizes = bucket_sizes(512, 64, 2.0)
    assert (512, 512) in sizes
    assert {(h, w) for w, h in sizes} >= {s for s in sizes if s[0] == s[1]}
    for w, h in sizes:
        assert w % 64 == h % 64 == 0
        assert w * h <= 512 * 512 < w * (h + 64)
        assert max(w / h, h / w) <= 2
    assert nearest((1600, 900), sizes) == min(sizes, key=lambda s: abs(np.log(s[0] / s[1] / (16 / 9))))
    assert nearest((900, 1600), sizes) == min(sizes, key=lambda s: abs(np.log(s[0] / s[1] / (9 / 16))))


@pytest.mark.parametrize("original", [(40, 20), (20, 40), (7, 90), (16, 16), (33, 31)])
def test_a_cut_is_covered_and_image_mask_and_condition_agree(original: tuple[int, int]) -> None:
    ramp = np.stack(np.broadcast_arrays(np.arange(original[0]), np.arange(original[1])[:, None]), -1).astype(np.uint8)
    image = Image.fromarray(np.concatenate([ramp, ramp[..., :1] * 0], -1))
    for k in range(6):
        cut = draw(original, (16, 8), stream(0, "g", k), random_crop=True, flip=True)
        assert cut.resized[0] >= 16
        assert cut.resized[1] >= 8
        assert 0 <= cut.left <= cut.resized[0] - 16
        assert 0 <= cut.top <= cut.resized[1] - 8
        assert cut.apply(image).size == (16, 8)
        assert np.array_equal(np.asarray(cut.apply(image)), np.asarray(cut.apply(image.copy())))


def test_time_ids_follow_the_cut_and_the_mirror() -> None:
    cut = draw((64, 32), (16, 16), stream(0, "g", 3), random_crop=True)
    assert cut.time_ids == (32, 64, cut.top, cut.left, 16, 16)
    mirrored = cut._replace(flip=True)
    assert mirrored.time_ids[3] == cut.resized[0] - 16 - cut.left
    whole = Image.fromarray(np.arange(32 * 16 * 3, dtype=np.uint8).reshape(16, 32, 3))
    seen = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((mirrored.time_ids[3], 0, mirrored.time_ids[3] + 16, 16))
    assert np.array_equal(np.asarray(seen), np.asarray(mirrored.apply(whole)))


def test_settings_do_not_shift_each_others_draws() -> None:
    crops = [draw((64, 32), (16, 16), stream(0, "g", k), True, flip=f) for k in range(20) for f in (False, True)]
    assert all(a._replace(flip=b.flip) == b for a, b in zip(crops[::2], crops[1::2], strict=True))
    assert 3 < sum(c.flip for c in crops) < 17


# --- captions


def test_captions_are_dropped_chosen_and_shuffled_at_their_rates() -> None:
    said = Counter(caption_of(("a", "b"), stream(0, "c", i), dropout=0.2) for i in range(2000))
    assert 0.17 < said[""] / 2000 < 0.23
    assert 0.9 < said["a"] / said["b"] < 1.1
    mixed = {caption_of(("me, x, y, z",), stream(0, "c", i), shuffle=True, keep=1) for i in range(200)}
    assert len(mixed) == 6
    assert all(m.startswith("me, ") and sorted(m) == sorted("me, x, y, z") for m in mixed)
    assert caption_of((), stream(0, "c", 0)) == ""


# --- sources


def test_sidecars_masks_and_conditions(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    picture(tmp_path / "sub" / "deep.jpg")
    (tmp_path / "sub" / "deep.txt").write_text("\ufeffline one\nline two\n", encoding="utf-8")
    picture(tmp_path / "p0.mask.png")
    picture(tmp_path / "p0.condition.png")
    (tmp_path / "lonely.txt").write_text("nothing")
    source = open_source(str(tmp_path))
    assert [r.name for r in source.rows] == ["p0.png", "p1.png", "sub/deep.jpg"]
    assert source.rows[2].captions == ("line one line two",)
    assert (source.rows[0].mask, source.rows[0].condition) == ("p0.mask.png", "p0.condition.png")
    assert [(f.where, f.fatal) for f in source.faults] == [("lonely.txt", False)]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_name_the_line_of_every_fault(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    if kind == "jsonl":
        lines = ['{"file_name": "a.png", "text": ["one", "two"]}', '{"file_name": "gone.png", "text": "x"}', "{broken",
                 '{"text": "no name"}', '{"file_name": "a.png", "text": "again"}', "",
                 '{"file_name": "../a.png", "text": "x"}', '{"file_name": "b.png", "caption": "bee"}']  # fmt: skip
    else:
        lines = ["file_name,text", "a.png,one", "gone.png,x", ",no name", "a.png,again", "../a.png,x", "b.png,bee"]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines))
    source = open_source(str(tmp_path))
    assert [(r.name, r.captions[0]) for r in source.rows] == [("a.png", "one"), ("b.png", "bee")]
    found = {f.where for f in source.faults}
    first = f"metadata.{kind}"
    expected = (2, 3, 4, 5, 7) if kind == "jsonl" else (3, 4, 5, 6)
    assert found == {f"{first}:{n}" for n in expected} | {"c.png"}


def test_columns_of_a_table_can_be_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"picture": "a.png", "title": "one", "text": "two"}\n')
    source = open_source(str(tmp_path), Columns("picture", "title"))
    assert [(r.name, r.captions) for r in source.rows] == [("a.png", ("one",))]
    data = Data(str(tmp_path), side=16, image_column="picture", caption_column="title")
    assert Dataset.open(data, 0, 8).rows[0].captions == ("one",)
    assert "has no file_name; its fields are picture, title, text" in open_source(str(tmp_path)).faults[0].words


def test_what_no_table_should_hold_is_a_fault_and_no_crash(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    deep = "[" * 100_000
    lines = ['{"file_name": "a\\u0000.png"}', '{"file_name": "' + "x" * 5000 + '.png"}', deep, '{"file_name": "a.png"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path))
    assert [r.name for r in source.rows] == ["a.png"]
    assert sorted(f.where for f in source.faults) == [f"metadata.jsonl:{n}" for n in (1, 2, 3)]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    assert "is not CSV: field larger" in open_source(str(tmp_path)).faults[0].words


def test_shards_are_listed_once_and_read_at_their_places(tmp_path: Path) -> None:
    photos(tmp_path / "flat", 4)
    picture(tmp_path / "flat" / "p1.mask.png", shade=9)
    shards = tmp_path / "shards"
    shards.mkdir()
    for k in range(2):
        with tarfile.open(shards / f"s{k}.tar", "w") as tar:
            for file in sorted((tmp_path / "flat").glob(f"p[{2 * k}{2 * k + 1}]*")):
                tar.add(file, file.name)
    flat, source = open_source(str(tmp_path / "flat")), open_source(str(shards))
    assert [r.captions for r in source.rows] == [r.captions for r in flat.rows]
    assert [source.digest(r.name) for r in source.rows] == [flat.digest(r.name) for r in flat.rows]
    assert source.rows[1].mask.endswith("p1.mask.png")
    kept = shards / ".s0.tar.index.json"
    before = kept.stat().st_mtime_ns
    assert open_source(str(shards)).rows == source.rows
    assert kept.stat().st_mtime_ns == before
    picture(tmp_path / "new.png", shade=77)
    with tarfile.open(shards / "s0.tar", "a") as tar:
        tar.add(tmp_path / "new.png", "new.png")
    assert len(open_source(str(shards)).rows) == 5  # a changed shard is listed anew
    whole = (shards / "s1.tar").read_bytes()
    (shards / "s1.tar").write_bytes(whole[:700])
    with pytest.raises(UsageError, match=r"s1\.tar"):
        open_source(str(shards))


# --- dataset


def test_a_visit_is_a_pure_function_of_its_number(tmp_path: Path) -> None:
    photos(tmp_path, 5, (30, 20))
    data = Data(str(tmp_path), side=16, crop="random", flip=True, shuffle=True, cache="")
    one, two = (Dataset.open(data, 0, 8) for _ in range(2))
    two.seen(0, 57)
    assert [one.seen(0, i) for i in range(20)] == [two.seen(0, i) for i in range(20)]
    assert [one.seen(0, i) for i in range(20)] != [one.seen(1, i) for i in range(20)]
    cuts = {one.seen(0, i).geometry for i in range(60) if one.seen(0, i).row == 2}
    assert len(cuts) > 3
    cached = Dataset.open(Data(str(tmp_path), side=16, crop="random", flip=True, variants=2), 0, 8)
    assert len({cached.seen(0, i).geometry for i in range(60) if cached.seen(0, i).row == 2}) <= 2


def test_rotation_alpha_and_depth_are_settled_before_the_cut(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture(tmp_path / "turned.jpg", (32, 16), exif=exif.tobytes())
    Image.fromarray(np.zeros((16, 16, 4), dtype=np.uint8)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((16, 16), 65535, dtype=np.uint16)).save(tmp_path / "deep.png")
    data = Dataset.open(Data(str(tmp_path), side=16, allow_missing=True, buckets=False), 0, 8)
    assert dict(zip([r.name for r in data.rows], data.originals, strict=True))["turned.jpg"] == (16, 32)
    seen = {data.name(s): data.picture(s) for s in (data.seen(0, i) for i in range(3))}
    assert np.asarray(seen["clear.png"]).min() == 255
    assert np.asarray(seen["deep.png"]).min() == 255
    upright = data.source.picture("turned.jpg")
    assert upright.size == (16, 32)


def test_a_changed_folder_has_other_facts(tmp_path: Path) -> None:
    photos(tmp_path)
    data = Data(str(tmp_path), side=16)
    first = Dataset.open(data, 0, 8).facts
    assert Dataset.open(data, 0, 8).facts == first
    (tmp_path / "p0.txt").write_text("other")
    assert Dataset.open(data, 0, 8).facts != first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "p1.txt").unlink(), "1 of 5 pictures have no caption, first 'p1.png'"),
        (lambda f: (f / "p1.txt").write_text(" \n"), "no caption"),
        (lambda f: (f / "p1.txt").write_bytes(b"ab\n\xff"), "p1.txt:2 is not UTF-8"),
        (lambda f: (f / "p1.png").write_bytes(b"no"), "'p1.png' cannot be read"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no pictures"),
    ],
)
def test_a_fault_stops_a_training_by_name(tmp_path: Path, change: Any, words: str) -> None:
    change(photos(tmp_path))
    with pytest.raises(UsageError) as error:
        Dataset.open(Data(str(tmp_path), side=16), 0, 8)
    assert words in str(error.value)


def test_sides_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiples of 8"):
        Data(str(tmp_path), side=20).sizes(0, 8)
    for wrong in ({"dropout": 1.5}, {"variants": 0}):
        with pytest.raises(UsageError):
            Data("x", **wrong)


# --- check


def test_check_lists_every_fault_at_once(tmp_path: Path) -> None:
    photos(tmp_path, 6)
    (tmp_path / "p0.txt").unlink()
    (tmp_path / "p1.txt").write_text("")
    (tmp_path / "p2.txt").write_bytes(b"\xff\xfe bad")
    whole = (tmp_path / "p3.png").read_bytes()
    (tmp_path / "p3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p5.png").write_bytes((tmp_path / "p4.png").read_bytes())
    (tmp_path / "p5.txt").write_text("a caption of rather many words")
    (tmp_path / "stray.txt").write_text("x")
    faults = check_data(Data(str(tmp_path)), [(32, 32)], 8, length=lambda c: len(c.split()), window=4)
    text = {f.where: f.words for f in faults if "enlarged" not in f.words}
    assert "no caption" in text["p0.txt"]
    assert "no caption" in text["p1.txt"]
    assert any(f.where == "p2.txt:1" and "UTF-8" in f.words for f in faults)
    assert "whole" in text["p3.png"]
    assert any(f.where == "p5.png" and "'p4.png'" in f.words for f in faults)
    assert "2 token(s)" in text["p5.txt"]
    assert "without a picture" in text["stray.txt"]
    assert "several times in one step; a smaller job.batch" in text["bucket 32x32"]
    assert sum("enlarged 2 times" in f.words for f in faults) == 5
    fatal = {f.where for f in faults if f.fatal}
    assert fatal == {"p0.txt", "p1.txt", "p2.txt", "p2.txt:1", "p3.png"}


def test_check_is_silent_where_nothing_is_wrong(tmp_path: Path) -> None:
    photos(tmp_path, 6)
    assert check_data(Data(str(tmp_path)), [(16, 16)], 6, length=len, window=99) == []
    (tmp_path / "empty").mkdir()
    assert "no steps" in check_data(Data(str(tmp_path / "empty")), [(16, 16)], 6)[0].words
    assert "not a folder" in check_data(Data(str(tmp_path / "gone")), [(16, 16)], 6)[0].words


# --- cache


def test_the_cache_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    made: list[int] = []

    def make(items: Any) -> dict[str, torch.Tensor]:
        made.extend(items)
        return {"value": torch.tensor([[float(i)] for i in items])}

    cache = Cache(tmp_path, "latents")
    wanted = {key_of(item=i): i for i in range(5)}
    assert cache.fill(wanted, make, batch=2) == 5
    assert cache.fill({**wanted, key_of(item=9): 9}, make) == 1
    assert made == [0, 1, 2, 3, 4, 9]
    assert cache.get(key_of(item=3))["value"].item() == 3  # type: ignore[index]
    broken = cache.path(key_of(item=3))
    broken.write_bytes(broken.read_bytes()[:-1])
    assert cache.get(key_of(item=3)) is None
    assert cache.fill(wanted, make) == 1
    with pytest.raises(NumericalError):
        cache.fill({key_of(item=99): 99}, lambda items: {"value": torch.full((1, 1), float("nan"))})
    assert cache.get(key_of(item=99)) is None


def test_every_part_of_a_key_counts() -> None:
    base = {"weights": "w", "content": "c", "geometry": [1, 2], "dtype": "fp16"}
    keys = {key_of(**base)} | {key_of(**{**base, k: "other"}) for k in base}
    assert len(keys) == 5
    assert key_of(a="ab", b="c") != key_of(a="a", b="bc")
