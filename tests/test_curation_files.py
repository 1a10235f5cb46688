"""Files as they come: broken, odd or mislabelled ones are named with their reason and stop no other."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from films import film, pan, zoom

import recipes
from nemo_moviegen.curation import scenes
from nemo_moviegen.curation.footage import decode, read_facts, shrunk
from nemo_moviegen.curation.run import curate
from nemo_moviegen.curation.scenes import find_scenes
from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, read_manifest

TINY = replace(recipes.get_curation("curation.tiny"), num_chunks=4, images=False)


def write(path, frames_THWC, *, codec="libx264", fps=16, pixels="yuv420p", rotation=0, times=None, **options):
    """A film through PyAV, with what `films.film` does not set; `times` are frame times in 1/1000 s."""
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        container.metadata.update(options.pop("metadata", {}))
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pixels
        stream.options = options
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path, seconds=1):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for _ in range(16 * seconds):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def curated(folder, output, recipe=TINY, **changes):
    """Ids of the clips, and reasons by file, of one curation."""
    curate(folder, output, replace(recipe, **changes))
    lines = (output / "quarantine.jsonl").read_text().splitlines()
    reasons = {row["clip_id"]: row["reason"] for row in map(json.loads, lines)}
    return [clip.clip_id for clip in read_manifest(output / "manifest.parquet")], reasons


def test_every_broken_file_is_named_and_none_stops_the_others(tmp_path):
    folder = tmp_path / "in"
    good = film(folder, "good.mp4", pan(1))
    whole = write(tmp_path / "whole.mp4", zoom(2, 48), crf="1", container={"movflags": "faststart"})
    content = whole.read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) * 2 // 3])
    (folder / "no_index.mp4").write_bytes(BIG_BUCK_BUNNY.read_bytes()[:100_000])
    (folder / "damaged.mp4").write_bytes(
        content[: len(content) // 2] + os.urandom(4000) + content[len(content) // 2 + 4000 :]
    )
    (folder / "empty.mp4").touch()
    (folder / "words.mkv").write_text("this is no film " * 50)
    write_sound(folder / "sound.mp4")
    shutil.copy(good, folder / "film.dat")
    (folder / "notes.md").write_text("# hello")
    ids, reasons = curated(folder, tmp_path / "out")
    assert [name.split("@")[0] for name in ids] == ["good.mp4"]
    assert set(reasons) == {
        *("truncated.mp4", "no_index.mp4", "damaged.mp4", "empty.mp4", "words.mkv", "sound.mp4", "film.dat")
    }
    assert "truncated" in reasons["truncated.mp4"]
    assert "corrupt" in reasons["damaged.mp4"]
    assert reasons["empty.mp4"] == "the file is empty"
    assert "no video stream" in reasons["sound.mp4"]
    assert "ends in .dat: rename" in reasons["film.dat"]
    for name in ("words.mkv", "no_index.mp4"):
        assert reasons[name].startswith("not a video that can be opened")
    funnel = json.loads((tmp_path / "out" / "funnel.json").read_text())
    assert funnel["ignored"] == {".dat": 1, ".md": 1}
    assert (funnel["num_files"], funnel["num_unreadable"]) == (7, 6)


def test_a_file_that_ends_between_two_packets_is_truncated(tmp_path):
    """Nothing in it is damaged: only the header knows of more."""
    whole = write(tmp_path / "whole.mp4", pan(1, 48), container={"movflags": "faststart"})
    with av.open(str(whole)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos is not None]
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: sorted(places)[24]])
    with pytest.raises(ValueError, match=r"truncated: its header says 3.00 s, its frames end at 1.[0-9]+ s"):
        list(decode(tmp_path / "cut.mp4"))
    assert len(list(decode(whole))) == 48


def test_a_file_that_ends_in_its_last_packet_is_truncated(tmp_path):
    """Too little is missing for its length to tell."""
    whole = write(tmp_path / "whole.mp4", pan(1, 48), container={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or corrupt: a packet is damaged"):
        list(decode(tmp_path / "cut.mp4"))


def test_a_song_with_a_cover_is_no_video(tmp_path):
    write_sound(tmp_path / "song.m4a")
    add_cover(tmp_path / "song.m4a", tmp_path / "song.mp4")
    with pytest.raises(ValueError, match="no video stream"):
        read_facts(tmp_path / "song.mp4")


def add_cover(sound, path):
    """The sound with a picture marked as its cover."""
    with av.open(str(sound)) as source, av.open(str(path), "w") as target:
        audio = target.add_stream_from_template(source.streams.audio[0])
        cover = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        target.mux(cover.encode(frame))
        target.mux(cover.encode())
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = audio
                target.mux(packet)


def test_words_in_a_header_that_are_not_utf8_harm_nobody(tmp_path):
    path = write(tmp_path / "film.mkv", pan(1, 8), metadata={"title": "CAFE!CAFE!"})
    assert b"CAFE!CAFE!" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"CAFE!CAFE!", b"caf\xe9!caf\xe9!"))
    assert read_facts(path)[0].width_px == 240


def test_what_a_library_does_not_expect_is_one_files_fault(tmp_path, monkeypatch):
    def crash(path, fps, settings):
        if path.name == "odd.mp4":
            raise ZeroDivisionError("in the library")
        return find_scenes(path, fps, settings)

    for name, seed in {"good.mp4": 1, "odd.mp4": 2}.items():
        film(tmp_path / "in", name, pan(seed))
    monkeypatch.setattr(scenes, "find_scenes", crash)
    ids, reasons = curated(tmp_path / "in", tmp_path / "out")
    assert len(ids) == 1 and reasons == {"odd.mp4": "ZeroDivisionError: in the library"}


@pytest.mark.parametrize(
    ("rotation", "corner"), [(0, (0, 0)), (90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))]
)
def test_rotation_metadata_turns_the_picture_and_swaps_its_sides(tmp_path, rotation, corner):
    """The bright corner stands where a player shows it: turned against the clock by the display matrix."""
    frames_THWC = np.zeros((8, 48, 80, 3), np.uint8)
    frames_THWC[:, :12, :12] = 255
    path = write(tmp_path / "film.mp4", frames_THWC, rotation=rotation)
    facts, first_HWC = read_facts(path)
    sides = (80, 48) if rotation % 180 == 0 else (48, 80)
    assert (facts.width_px, facts.height_px) == sides
    assert first_HWC.shape[:2] == sides[::-1]
    corners = {(y, x): first_HWC[y, x].mean() for y in (0, -1) for x in (0, -1)}
    assert max(corners, key=corners.get) == corner


def test_a_varying_frame_rate_moves_no_cut(tmp_path):
    """8 frames in the first second, 32 in the second: the cut lies between them, at 1.0 s."""
    frames_THWC = np.concatenate([pan(1, 8), pan(2, 32)])
    times = [*np.arange(8) * 1000 / 8, *(1000 + np.arange(32) * 1000 / 32)]
    path = write(tmp_path / "film.mkv", frames_THWC, fps=32, times=times)
    facts, _ = read_facts(path)
    assert facts.duration_seconds == pytest.approx(2.0, abs=0.13)
    found, _ = find_scenes(path, facts.fps, TINY.scenes)
    assert [scene.start for scene in found] == pytest.approx([0, 1.0], abs=2e-3)


def test_a_video_of_one_frame_becomes_an_image(tmp_path):
    film(tmp_path / "in", "photo.mp4", pan(1, 1))
    film(tmp_path / "in", "film.mp4", pan(2))
    curate(tmp_path / "in", tmp_path / "out", TINY)
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")
    kinds = {clip.clip_id.split("@")[0]: (clip.kind, clip.end_seconds - clip.start_seconds) for clip in clips}
    assert kinds == {"photo.mp4": ("image", 0.0), "film.mp4": ("video", pytest.approx(1.0))}


def test_odd_sides_and_ten_bits_are_read_as_they_are(tmp_path):
    odd = write(tmp_path / "odd.mkv", pan(1, 8)[:, :93, :121], codec="ffv1", pixels="bgr0")
    facts, first_HWC = read_facts(odd)
    assert (facts.width_px, facts.height_px) == (121, 93) == first_HWC.shape[1::-1]
    frames_THWC = pan(1, 8)
    deep = write(
        tmp_path / "deep.mp4",
        frames_THWC,
        codec="libx265",
        pixels="yuv420p10le",
        **{"x265-params": "log-level=none:lossless=1"},
    )
    facts, first_HWC = read_facts(deep)
    assert (facts.bit_depth, facts.is_hdr, facts.codec) == (10, False, "hevc")
    assert np.abs(first_HWC.astype(int) - frames_THWC[0]).mean() < 4


def test_high_dynamic_range_is_dropped_by_its_filter(tmp_path):
    bright = "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    (tmp_path / "in").mkdir()
    path = write(
        tmp_path / "in" / "hdr.mp4", pan(1), codec="libx265", pixels="yuv420p10le", **{"x265-params": bright}
    )
    path.with_suffix(".txt").write_text("bright")
    assert read_facts(path)[0].is_hdr
    film(tmp_path / "in", "plain.mp4", pan(2))
    ids, reasons = curated(tmp_path / "in", tmp_path / "out")
    assert [name.split("@")[0] for name in ids] == ["plain.mp4"] and not reasons
    steps = json.loads((tmp_path / "out" / "funnel.json").read_text())["steps"]
    assert [step["rows"] for step in steps if step["name"] in ("resolution", "range")] == [2, 1]


def test_a_duration_that_no_header_names_comes_from_the_packets(tmp_path):
    frames_THWC = pan(1, 24)
    bare = write(tmp_path / "film.h264", frames_THWC)
    with pytest.raises(ValueError, match="put it into a container"):
        read_facts(bare)
    live = write(tmp_path / "film.mkv", frames_THWC, container={"live": "1"})
    assert read_facts(live)[0].duration_seconds == pytest.approx(1.5, abs=0.07)


def test_missing_wrong_and_foreign_captions_are_named(tmp_path):
    folder = tmp_path / "in"
    for number, name in enumerate(("none", "latin", "list", "split", "good", "text")):
        film(folder, f"{name}.mp4", pan(number), caption=None)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "list.json").write_text("[1]")
    (folder / "split.json").write_text('{"caption": "x", "split": "test"}')
    (folder / "good.json").write_text('{"caption": "a\\n good  one", "source": "mine", "split": "heldout"}')
    (folder / "text.txt").write_bytes(b"\xef\xbb\xbfwith a mark\n")
    ids, reasons = curated(folder, tmp_path / "out")
    assert [name.split("@")[0] for name in ids] == ["good.mp4", "text.mp4"]
    assert "no caption" in reasons["none.mp4"]
    assert "latin.txt is not UTF-8 (byte 3)" in reasons["latin.mp4"]
    assert "list.json holds no object" in reasons["list.mp4"]
    assert "split is 'test'" in reasons["split.mp4"]
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")
    assert [(c.caption, c.source, c.split) for c in clips] == [
        ("a good one", "mine", "heldout"),
        ("with a mark", "", "train"),
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_table_of_captions_serves_the_folders_below_it(tmp_path, ending):
    """A bad line takes no other with it."""
    folder = tmp_path / "in"
    for number, name in enumerate(("a/1.mp4", "a/b/2.mp4", "a/3.mp4")):
        film(folder, name, pan(number), caption=None)
    if ending == "jsonl":
        lines = [b'{"file": "1.mp4", "caption": "one"}', b"{", b'{"file": "b/2.mp4", "caption": "caf\xe9"}']
    else:
        lines = [b"file,caption", b'1.mp4,"one"', b'b/2.mp4,"caf\xe9"']
    (folder / "a" / f"captions.{ending}").write_bytes(b"\n".join(lines))
    (folder / "captions.jsonl").write_text('{"file": "a/3.mp4", "caption": "three", "split": "train"}\n')
    (folder / "a" / "1.json").write_text('{"split": "heldout"}')  # more about it, its caption is in the table
    ids, reasons = curated(folder, tmp_path / "out")
    assert [name.split("@")[0] for name in ids] == ["a/1.mp4", "a/3.mp4"]
    assert f"captions.{ending}: caption 'caf\\udce9' is not UTF-8" in reasons["a/b/2.mp4"]
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")
    assert [(c.caption, c.split, c.source) for c in clips] == [
        ("one", "heldout", "a"),
        ("three", "train", "a"),
    ]


def test_files_of_one_stem_give_clips_of_different_ids(tmp_path):
    for name, seed in {"a.mp4": 1, "a.webm": 2, "b/a.mp4": 3, "a.mp4@0.000-1.000.mkv": 4}.items():
        film(tmp_path / "in", name, pan(seed), caption=None)
    (tmp_path / "in" / "captions.csv").write_text(
        "file,caption\na.mp4,1\na.webm,2\nb/a.mp4,3\na.mp4@0.000-1.000.mkv,4\n"
    )
    curate(tmp_path / "in", tmp_path / "out", replace(TINY, images=True))
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")  # refuses two of one id
    assert len({clip.clip_id for clip in clips}) == len(clips) == 8


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    good = film(tmp_path / "in", "good.mp4", pan(1))
    shutil.copy(good, os.fsencode(tmp_path / "in") + b"/caf\xe9.mp4")
    ids, reasons = curated(tmp_path / "in", tmp_path / "out")
    assert len(ids) == 1
    assert reasons == {"caf\\udce9.mp4": "its name is not UTF-8: rename the file"}


def test_an_empty_folder_says_what_a_video_is_called(tmp_path):
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match=r"holds no video, only other files \(1 .docx\); .*\.mp4"):
        curate(tmp_path, tmp_path / "out", TINY)
    with pytest.raises(ValueError, match="no such folder"):
        curate(tmp_path / "nowhere", tmp_path / "out", TINY)


def test_frames_are_not_enlarged_and_keep_their_shape(tmp_path):
    path = film(tmp_path, "film.mp4", pan(0, 2))
    _, frame = next(decode(path))
    assert shrunk(frame, 480).shape == (136, 240, 3)
    assert shrunk(frame, 68).shape == (68, 120, 3)
    assert shrunk(frame, 68, "gray").shape == (68, 120)


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path):
    """The limit on file size stands for the disk: a chunk of scores with its embeddings is above 2 KiB."""
    film(tmp_path / "in", "film.mp4", pan(1))
    command = [sys.executable, "-m", "nemo_moviegen", "curate", "in", "out", "--recipe", "curation.tiny"]
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048));"
    limited += "sys.argv = sys.argv[1:]; runpy.run_module('nemo_moviegen', run_name='__main__')"
    full = subprocess.run(
        [sys.executable, "-c", limited, *command[2:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert full.returncode == 2
    assert len(full.stderr.splitlines()) == 1
    assert "chunk-" in full.stderr and "cannot be written" in full.stderr and "make room" in full.stderr
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 videos scored" in again.stdout
    assert len(read_manifest(tmp_path / "out" / "manifest.parquet")) == 2
