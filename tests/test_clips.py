"""The clip manifest, probing a file, and cutting a video into rows."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_moviegen.data.clips import (
    BIG_BUCK_BUNNY,
    Clip,
    Clips,
    read_manifest,
    sample_id,
    write_manifest,
)
from nemo_moviegen.data.cutting import cut_clips, probe_video, write_video


def a_clip(clip_id="a", path="a.mp4", **changes):
    facts = {"kind": "video", "start_seconds": 0.0, "end_seconds": 1.0, "source_fps": 16.0, "width_px": 64}
    facts |= {"height_px": 64, "codec": "vp9", "caption": "a thing", "split": "train", "attributes": ""}
    return Clip(clip_id=clip_id, path=str(path), **(facts | changes))


def test_a_manifest_read_back_equals_what_was_written(tmp_path):
    clips = [
        a_clip("a", tmp_path / "v" / "a.mp4"),
        a_clip("b", "/elsewhere/b.mp4", split="heldout", caption="two"),
    ]
    assert read_manifest(write_manifest(tmp_path / "manifest.parquet", clips)) == clips


def test_a_data_set_can_be_moved_with_its_manifest(tmp_path):
    write_manifest(tmp_path / "old" / "manifest.parquet", [a_clip("a", tmp_path / "old" / "clips" / "a.mp4")])
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "manifest.parquet")[0].path == str(
        tmp_path / "new" / "clips" / "a.mp4"
    )


def test_a_wrong_manifest_is_refused_by_name(tmp_path):
    path = tmp_path / "manifest.parquet"
    with pytest.raises(ValueError, match=r"no clip manifest at .*manifest.parquet; write one with `moviegen"):
        read_manifest(path)
    path.write_text("clip_id,path")
    with pytest.raises(ValueError, match=r"manifest.parquet is not a readable Parquet manifest"):
        read_manifest(path)
    write_manifest(path, [a_clip()])
    pq.write_table(pq.read_table(path).drop_columns(["caption", "codec"]), path)
    with pytest.raises(ValueError, match="lacks the columns codec, caption"):
        read_manifest(path)


def test_two_clips_with_one_id_are_refused_and_the_old_manifest_stays(tmp_path):
    path = write_manifest(tmp_path / "manifest.parquet", [a_clip("old")])
    with pytest.raises(ValueError, match="two clips are called 'twin'"):
        write_manifest(path, [a_clip("twin"), a_clip("twin")])
    assert [clip.clip_id for clip in read_manifest(path)] == ["old"]


def many_clips(tmp_path):
    """Seven clips of three files and two sources, one of them an image."""
    clips = [
        a_clip(
            f"c{n}",
            tmp_path / f"{n // 3}.mp4",
            start_seconds=float(n),
            end_seconds=n + 1.5,
            source="ab"[n % 2],
        )
        for n in range(6)
    ]
    return [
        *clips,
        a_clip("still", "/b.mp4", kind="image", start_seconds=2.0, end_seconds=2.0, split="heldout"),
    ]


def test_clips_of_a_manifest_are_used_like_a_list_of_them(tmp_path):
    written = many_clips(tmp_path)
    clips = read_manifest(write_manifest(tmp_path / "manifest.parquet", written))
    assert len(clips) == 7 and list(clips) == written and [clips[n] for n in range(7)] == written
    assert (clips[-1], clips[np.int64(2)], clips[1:5:2]) == (written[-1], written[2], written[1:5:2])
    assert clips + [a_clip("new")] == [*written, a_clip("new")]
    assert clips != written[:-1] and clips != written[::-1] and clips != "clips"
    assert written[3] in clips and clips[:0] == [] and not clips[:0]
    with pytest.raises(IndexError, match="row 7 of 7 clips"):
        clips[7]


def test_columns_choose_clips(tmp_path):
    clips = Clips.of(many_clips(tmp_path))
    assert clips.column("start_seconds").tolist() == [0, 1, 2, 3, 4, 5, 2]
    assert [c.clip_id for c in clips.select(clips.column("kind") == "image")] == ["still"]
    assert [c.clip_id for c in clips.select(clips.column("source") == "b")] == ["c1", "c3", "c5"]
    assert [c.clip_id for c in clips.select([5, 0, 5])] == ["c5", "c0", "c5"]
    assert clips.select([]) == [] and Clips.of(clips) is clips


def test_chosen_and_joined_clips_are_written_like_any_others(tmp_path):
    path, copy = tmp_path / "manifest.parquet", tmp_path / "copy.parquet"
    clips = read_manifest(write_manifest(path, many_clips(tmp_path)))
    write_manifest(copy, clips.select([6, 0]) + clips[1:2] + [a_clip("new", tmp_path / "new.mp4")])
    assert [c.clip_id for c in read_manifest(copy)] == ["still", "c0", "c1", "new"]
    assert pq.read_table(copy)["path"].to_pylist() == ["/b.mp4", "0.mp4", "0.mp4", "new.mp4"]
    assert read_manifest(write_manifest(path, [])) == []


def changed(path, name, row, value):
    """The manifest with one value changed, as another tool might write it."""
    table = pq.read_table(path)
    values = table[name].to_pylist()
    values[row] = value
    kind = pa.binary() if isinstance(value, bytes) else None
    column = pa.array([v.encode() if kind and isinstance(v, str) else v for v in values], kind)
    if kind:  # text that is none: the bytes are not looked at
        column = pa.Array.from_buffers(pa.string(), len(column), column.buffers())
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("kind", "gif", "clip c3: kind is 'gif'; use video or image"),
        ("split", "test", "clip c3: split is 'test'; use train or heldout"),
        ("end_seconds", 3.0, "clip c3: seconds 3.0..3.0 are no video"),
        ("end_seconds", 2.0, "clip c3: seconds 3.0..2.0 are no video"),
        ("end_seconds", float("inf"), "clip c3: seconds 3.0..inf are no video"),
        ("start_seconds", float("nan"), "clip c3: seconds nan..4.5 are no video"),
        ("start_seconds", -1.0, "clip c3: seconds -1.0..4.5 are no video"),
        ("kind", "image", "clip c3: seconds 3.0..4.5 are no image"),
        ("clip_id", "c1", "two clips are called 'c1'; give each its own clip_id"),
        ("caption", None, "row 3 has no caption; write an empty text"),
        ("width_px", None, "row 3 has no width_px"),
        ("caption", b"caf\xe9", "column caption cannot be used: .*[Uu][Tt][Ff]"),
    ],
)
def test_a_manifest_with_one_bad_row_is_refused_in_one_line_that_names_it(tmp_path, name, value, reason):
    path = write_manifest(tmp_path / "manifest.parquet", many_clips(tmp_path))
    changed(path, name, 3, value)
    with pytest.raises(ValueError, match=rf"manifest .*manifest.parquet: {reason}") as error:
        read_manifest(path)
    assert "\n" not in str(error.value)


def test_columns_of_other_types_are_refused_or_read(tmp_path):
    path = write_manifest(tmp_path / "manifest.parquet", many_clips(tmp_path))
    table = pq.read_table(path)
    index = table.column_names.index("start_seconds")
    whole = pa.array([0, 1, 2, 3, 4, 5, 2], pa.int32())
    pq.write_table(table.set_column(index, "start_seconds", whole), path)
    assert read_manifest(path) == many_clips(tmp_path)
    pq.write_table(table.set_column(index, "start_seconds", pa.array(["early"] * 7)), path)
    with pytest.raises(ValueError, match=r"manifest.parquet: column start_seconds cannot be used: "):
        read_manifest(path)


def test_a_caption_that_is_no_text_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"clip 'a': caption 'caf\\udce9' is not text; give it in UTF-8"):
        write_manifest(
            tmp_path / "manifest.parquet", [a_clip(caption=b"caf\xe9".decode(errors="surrogateescape"))]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"kind": "gif"}, {"split": "test"}, {"end_seconds": 0.0}, {"start_seconds": -1.0}, {"kind": "image"}],
)
def test_a_clip_that_makes_no_sense_is_refused(changes):
    with pytest.raises(ValueError, match="clip a: "):
        a_clip(**changes)


def test_sample_ids_fit_an_int64_and_never_change():
    ids = [sample_id(f"clip-{n}") for n in range(10_000)]
    assert len(set(ids)) == len(ids)
    assert min(ids) >= 0 and max(ids) < 2**63
    # `printf clip-0 | b2sum -l 64`, without the last bit: latents on disk are keyed by it
    assert ids[0] == 0x6B7CDAD9A4F2BD18 >> 1


def test_probing_reads_the_header(tmp_path):
    info = probe_video(BIG_BUCK_BUNNY)
    assert (info.codec, info.width_px, info.height_px, info.fps) == ("h264", 1280, 720, 25.0)
    assert info.duration_seconds == pytest.approx(5.28)
    path = write_video(tmp_path / "a.webm", np.zeros((8, 32, 48, 3), np.uint8), fps=8)
    info = probe_video(path)
    assert (info.codec, info.width_px, info.height_px, info.fps) == ("vp9", 48, 32, 8.0)
    assert info.duration_seconds == pytest.approx(1.0)


def test_probing_a_bad_file_names_it(tmp_path):
    bad = {"missing.mp4": None, "empty.mp4": b"", "text.mp4": b"not a video " * 100}
    bad["cut.mp4"] = BIG_BUCK_BUNNY.read_bytes()[:5000]
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            probe_video(tmp_path / name)


def test_cutting_gives_whole_clips_that_do_not_overlap():
    clips = cut_clips(BIG_BUCK_BUNNY, 1.5, caption="a rabbit")
    assert [(c.start_seconds, c.end_seconds) for c in clips] == [(0, 1.5), (1.5, 3), (3, 4.5)]
    assert {(c.kind, c.caption, c.codec, c.source_fps) for c in clips} == {
        ("video", "a rabbit", "h264", 25.0)
    }
    assert len({c.clip_id for c in clips}) == 3


def test_cutting_with_images_adds_the_middle_frame_of_each_clip():
    clips = cut_clips(BIG_BUCK_BUNNY, 2.0, caption=["first", "second"], images=True)
    assert [(c.kind, c.start_seconds, c.caption) for c in clips] == [
        ("video", 0.0, "first"),
        ("image", 1.0, "first"),
        ("video", 2.0, "second"),
        ("image", 3.0, "second"),
    ]
    assert replace(clips[1], clip_id="") == replace(clips[1], clip_id="", end_seconds=clips[1].start_seconds)


def test_cutting_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"5.28 s is shorter than one clip of 9"):
        cut_clips(BIG_BUCK_BUNNY, 9)
    with pytest.raises(ValueError, match=r"2 clips of 2.0 s, but 1 captions"):
        cut_clips(BIG_BUCK_BUNNY, 2.0, caption=["only one"])
    with pytest.raises(ValueError, match="give a length above zero"):
        cut_clips(BIG_BUCK_BUNNY, 0)


def test_the_real_video_comes_with_its_attribution():
    text = (BIG_BUCK_BUNNY.parent / "ATTRIBUTION").read_text()
    assert "Blender Foundation" in text and "CC BY 3.0" in text
