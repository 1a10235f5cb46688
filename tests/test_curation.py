"""moviegen curate from end to end: a folder of mixed videos to a manifest, a funnel and a page about it."""

import html
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from films import blurred, film, letterboxed, pan, slideshow, still, titled, zoom

import recipes
from nemo_moviegen import __main__ as cli
from nemo_moviegen.curation.recipe import override
from nemo_moviegen.curation.run import curate
from nemo_moviegen.data.clips import BIG_BUCK_BUNNY, read_manifest
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.inputs import Bucket

TINY = override(recipes.get_curation("curation.tiny"), ["num_chunks=3", "filters.motion.low=0.2"])
SETTINGS = ("seed=3", "num_chunks=3", "filters.motion.low=0.2")
DROPPED = {
    "duration": "short.mp4",
    "resolution": "small.mp4",
    "text": "text.mp4",
    "border": "bars.webm",
    "scene": "slides.mp4",
    "aesthetics": "dark.mp4",
    "still": "still.mp4",
    "motion": "flicker.mp4",
    "jitter": "jumps.mp4",
    "caption": "mute.mp4",
    "dedup": "web/copy.webm",
}
"""The film that each step is to drop."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Films of both codecs, a fault each, and three without."""
    folder = tmp_path_factory.mktemp("films") / "in"
    film(folder, "stock/pan.mp4", pan(1), codec="libx264", caption="a pan")
    film(folder, "web/zoom.webm", zoom(2), caption="a zoom")
    film(folder, "web/copy.webm", blurred(pan(1), 1.5), caption="the pan again")
    film(folder, "text.mp4", titled(pan(3)))
    film(folder, "bars.webm", letterboxed(pan(4)))
    film(folder, "slides.mp4", slideshow(5))
    film(folder, "dark.mp4", pan(6) // 10)
    film(folder, "still.mp4", still(7), codec="libx264")
    film(folder, "mute.mp4", pan(8), caption=None)
    film(folder, "short.mp4", pan(9, 8))
    film(folder, "small.mp4", pan(10)[:, :60, :60])
    brightness = np.where(np.arange(32) % 2, 1.0, 0.9)[:, None, None, None]
    film(folder, "flicker.mp4", (still(11) * brightness).astype(np.uint8))
    film(folder, "jumps.mp4", np.concatenate([pan(12, 20), slideshow(13, 12, 4)]))
    (folder / "broken.mp4").write_text("no film")
    shutil.copy(BIG_BUCK_BUNNY, folder / "bunny.mp4")
    (folder / "bunny.txt").write_text("a rabbit")
    return folder


@pytest.fixture(scope="module")
def output(folder):
    """What `moviegen curate` wrote about them."""
    out = folder.parent / "out"
    assert cli.main(["curate", str(folder), str(out), "--recipe", "curation.tiny", *SETTINGS]) == 0
    return out


def test_each_step_drops_what_it_is_for_and_nothing_else(output):
    clips = read_manifest(output / "manifest.parquet")
    films = [clip.clip_id.split("@")[0] for clip in clips if clip.kind == "video"]
    assert films == ["bunny.mp4", "stock/pan.mp4", "web/zoom.webm"]
    page = (output / "report.html").read_text()
    for step, name in DROPPED.items():
        part = page.split(f"<h3>{step} ")[1].split("</article>")[0]
        dropped, passed = re.split(r"passed</span>|in the same order</span>", part)
        if step == "dedup":
            assert re.findall(r'<figure title="([^" ]+)', passed) == ["stock/pan.mp4"]
        assert re.findall(r'<figure title="([^" ]+)', dropped) == [name], step
        assert "data:image/jpeg" in dropped


def test_the_funnel_counts_what_was_left(output):
    funnel = json.loads((output / "funnel.json").read_text())
    lines = {step["name"]: step for step in funnel["steps"]}
    assert list(lines) == ["readable", *(f.name for f in TINY.filters), "caption", "dedup"]
    assert [line["rows"] for line in lines.values()] == [14, 13, 12, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3]
    assert lines["dedup"]["percent"] == pytest.approx(100 * 3 / 14, abs=1e-3)
    assert lines["dedup"]["clip_seconds"] == pytest.approx(3.0)
    assert set(funnel["refused"]) == {"broken.mp4", "mute.mp4"}
    page = (output / "report.html").read_text()
    for line in lines.values():
        assert f"<code>{html.escape(line['condition'])}</code>" in page
    assert "http" not in re.sub(r"data:[^\"]*|http://www.w3.org", "", page)  # one file, nothing to fetch


def test_clips_say_what_they_show_where_and_where_from(folder, output):
    clips = read_manifest(output / "manifest.parquet")
    by_id = {clip.clip_id.split("@")[0]: clip for clip in clips if clip.kind == "video"}
    bunny, stock = by_id["bunny.mp4"], by_id["stock/pan.mp4"]
    assert (bunny.codec, bunny.width_px, bunny.height_px, bunny.source_fps) == ("h264", 1280, 720, 25.0)
    assert (bunny.caption, bunny.source, stock.caption, stock.source) == ("a rabbit", "", "a pan", "stock")
    assert by_id["web/zoom.webm"].codec == "vp9"
    assert all(clip.path == str(folder / clip.clip_id.split("@")[0]) for clip in clips)
    images = [clip for clip in clips if clip.kind == "image"]
    assert len(images) == 3 and images[0].start_seconds == pytest.approx(bunny.start_seconds + 0.5)


def test_what_was_cut_anywhere_fills_a_bucket_of_its_length(output):
    """A second of 16 frames from 16 and 25 frames a second: a clip a frame shorter would be refused."""
    clips = read_manifest(output / "manifest.parquet")
    videos = [clip for clip in clips if clip.kind == "video"]
    bucket = Bucket(num_frames=16, height_px=64, width_px=64, fps=16)
    loader = ClipLoader(videos, bucket, batch_size=1, order=range(len(videos)))
    shapes = [tuple(video_BTCHW.shape) for video_BTCHW, _ in loader]
    assert shapes == [(1, 16, 3, 64, 64)] * 3 and loader.quarantined == 0


def test_a_threshold_is_changed_without_scoring_again(folder, output, tmp_path, capsys):
    shutil.copytree(output, tmp_path / "out")
    command = [
        "curate",
        str(folder),
        str(tmp_path / "out"),
        "--recipe",
        "curation.tiny",
        *SETTINGS,
    ]
    assert cli.main([*command, "filters.border.high=1", "dedup_cosine=1.01", "images=false"]) == 0
    assert "0 videos scored; " in capsys.readouterr().out
    films = [clip.clip_id.split("@")[0] for clip in read_manifest(tmp_path / "out" / "manifest.parquet")]
    assert films == ["bars.webm", "bunny.mp4", "stock/pan.mp4", "web/copy.webm", "web/zoom.webm"]


def test_camera_motion_leads_the_caption_of_the_clip_not_of_its_image(folder, output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    curate(folder, tmp_path / "out", replace(TINY, seed=3, camera_prefix=True))
    captions = {clip.caption for clip in read_manifest(tmp_path / "out" / "manifest.parquet")}
    assert {"pan right, a pan", "a pan", "zoom in, a zoom", "a zoom"} <= captions


asked = []


def tell(clip):
    """A captioner."""
    asked.append(clip.clip_id)
    return f"the film {clip.clip_id.split('@')[0]}"


def test_a_captioner_is_asked_once_for_what_nobody_captioned(folder, output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    for _ in range(2):
        curate(folder, tmp_path / "out", replace(TINY, seed=3, captioner=f"{__name__}:tell"))
    captions = [clip.caption for clip in read_manifest(tmp_path / "out" / "manifest.parquet")]
    assert captions.count("the film mute.mp4") == 2  # the clip and its image
    assert "a pan" in captions
    assert [name.split("@")[0] for name in asked] == ["mute.mp4"]


def test_clips_of_one_video_are_held_out_together(tmp_path):
    """Two scenes give two clips; half of the videos go, with both."""
    for seed in range(6):
        scenes = np.concatenate([pan(seed, 20), pan(50 + seed, 20)])
        film(tmp_path / "in", f"{seed}.mp4", scenes)
    splits = {}
    curate(tmp_path / "in", tmp_path / "out", replace(TINY, heldout_share=0.5, images=False))
    for clip in read_manifest(tmp_path / "out" / "manifest.parquet"):
        splits.setdefault(clip.clip_id.split("@")[0], []).append(clip.split)
    assert sorted(splits.values()) == sorted(
        [[split] * 2 for split in ("heldout", "train") for _ in range(3)]
    )


def test_moving_shapes_go_through_as_they_were_written(tmp_path):
    rendered = write_moving_shapes(tmp_path / "in", 12, progress=False)
    write_moving_shapes(tmp_path / "in", 3, split="heldout", progress=False)
    curate(tmp_path / "in", tmp_path / "out", TINY)
    clips = read_manifest(tmp_path / "out" / "manifest.parquet")
    train = [clip for clip in clips if clip.split == "train"]
    assert len(clips) == 2 * 15 and len(train) == 2 * 12
    told = {
        clip.path: (clip.caption, clip.attributes, clip.end_seconds)
        for clip in rendered
        if clip.kind == "video"
    }
    assert {
        clip.path: (clip.caption, clip.attributes, clip.end_seconds) for clip in train if clip.kind == "video"
    } == told
    assert {c.caption for c in clips if c.kind == "image"} >= {
        c.caption for c in rendered if c.kind == "image"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["in", "out", "--recipe", "curation.tyni"],
            "no curation recipe 'curation.tyni'; did you mean 'curation.tiny'",
        ),
        (["in", "out", "--recipe", "curation.tiny", "filters.txt.high=1"], "did you mean 'text'"),
        (
            ["in", "out", "--recipe", "curation.tiny", "sampling.shortest=1"],
            "did you mean 'sampling.shortest_seconds'",
        ),
        (["nowhere", "out", "--recipe", "curation.tiny"], "nowhere: no such folder of videos"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["curate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["4/4", "-1/4", "1", "a/b", "1/"])
def test_a_task_that_is_none_says_how_to_write_one(task, capsys):
    with pytest.raises(SystemExit):
        cli.main(["curate", "in", "out", "--recipe", "curation.tiny", f"--task={task}"])
    assert "is no task: write I/N, from 0/4 to 3/4 for four" in capsys.readouterr().err
