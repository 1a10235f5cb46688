"""The report: one file that shows what a demo folder holds and asks nobody for anything."""

import base64
import json
from html.parser import HTMLParser

import pytest
import torch
from browser import needs_chromium, told_by

from nemo_moviegen.data.clips import read_manifest, write_manifest
from nemo_moviegen.data.synthetic import ShapeSpec, render, write_moving_shapes
from nemo_moviegen.recipe import Bucket
from nemo_moviegen.report import quarantined_files, stage_rows, write_report
from nemo_moviegen.report_charts import read_metrics, running_mean, series
from nemo_moviegen.report_samples import captioned_clips, real_and_rebuilt
from nemo_moviegen.tae.model import Posterior
from nemo_moviegen.video_files import read_frames, write_mp4


class Page(HTMLParser):
    """Tags with their attributes, and the text, of an HTML page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def quarantine(folder, path, reason):
    folder.mkdir(parents=True)
    row = {"clip_id": "x", "path": path, "reason": reason}
    (folder / "quarantine.jsonl").write_text(json.dumps(row) + "\n")


def write_metrics(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def demo(tmp_path):
    """What a demo leaves, but for the autoencoder's weights."""
    demo = tmp_path / "demo"
    clips = write_moving_shapes(demo / "clips", 3, progress=False)
    write_manifest(demo / "clips" / "manifest.parquet", clips)
    quarantine(demo / "tae", "broken.mp4", "not a video")
    write_metrics(
        demo / "t2iv",
        [
            {
                "step": i,
                "train/loss": 2 / i,
                "train/is_image": int(i % 11 == 10),
                "speed/step_seconds": 0.25,
                "speed/tokens_per_second": 4096.0,
            }
            for i in range(1, 60)
        ],
    )
    generated = demo / "generated"
    write_mp4(torch.zeros(16, 3, 64, 64), generated / "000-a.mp4", fps=16)
    settings = {
        "recipe": "tiny.t2iv",
        "num_frames": 16,
        "height_px": 64,
        "width_px": 64,
        "fps": 16,
        "schedule": "linear-quadratic, 50 Euler steps emulating 250",
        "guidance_scale": 3.0,
        "seed": 0,
        "sampling_seconds": 1.5,
        "samples": [{"prompt": "a <b>red</b> circle", "file": "000-a.mp4"}],
    }
    (generated / "settings.json").write_text(json.dumps(settings))
    stages = [
        {
            "name": "shapes",
            "command": "python -m nemo_moviegen shapes",
            "seconds": 30.0,
            "peak_bytes": 2**30,
            "finished": True,
        },
        {
            "name": "train",
            "command": "python -m nemo_moviegen train",
            "seconds": 120.0,
            "peak_bytes": 3 * 2**30,
            "finished": True,
        },
        {
            "name": "generate",
            "command": "python -m nemo_moviegen generate",
            "seconds": 0.0,
            "peak_bytes": 0,
            "finished": False,
        },
    ]
    (demo / "stages.json").write_text(json.dumps({"scale": 0.5, "stages": stages}))
    return demo


def test_the_page_asks_for_nothing_outside_itself(demo):
    page = Page(write_report(demo, demo / "report.html"))
    sources = [tag[key] for _, tag in page.tags for key in ("src", "href", "poster") if key in tag]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not page.all("script")
    assert "url(" not in page.source


def test_generated_videos_play_inline_and_keep_their_frames(demo, tmp_path):
    page = Page(write_report(demo, demo / "report.html"))
    (video,) = page.all("video")
    assert {"loop", "muted", "autoplay", "playsinline"} <= video.keys()
    (tmp_path / "inline.mp4").write_bytes(base64.b64decode(video["src"].partition(",")[2]))
    frames = read_frames(tmp_path / "inline.mp4")
    assert frames.shape == (16, 64, 64, 3)
    assert abs(frames.astype(int) - 128).max() < 6


def test_numbers_of_the_run_are_on_the_page(demo):
    page = Page(write_report(demo, demo / "report.html"))
    for text in (
        "0.25 s",
        "4,096",
        "2 min 30 s",
        "3.00 GiB",
        "scale 0.5",
        "broken.mp4: not a video",
        "1 quarantined",
    ):
        assert text in page.text, text
    charts = [image for image in page.all("img") if image["src"].startswith("data:image/svg+xml")]
    assert len(charts) == 1, "images and clips share a chart"
    svg = base64.b64decode(charts[0]["src"].partition(",")[2]).decode()
    assert "squared velocity error" in svg
    assert ">step<" in svg
    assert ">clips, mean of 3<" in svg
    assert ">images<" in svg


def test_a_prompt_is_text_not_markup(demo):
    page = Page(write_report(demo, demo / "report.html"))
    assert "a <b>red</b> circle" in page.text


def test_a_report_of_a_half_finished_demo_shows_what_is_there(demo):
    for path in ("generated/settings.json", "t2iv/metrics.jsonl", "clips/manifest.parquet"):
        (demo / path).unlink()
    page = Page(write_report(demo, demo / "report.html"))
    assert "2 min 30 s" in page.text
    assert not page.all("video")


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of .*stages\.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_unfinished_stages_are_left_out_and_bars_are_relative():
    stages = [
        {"name": n, "command": n, "seconds": s, "peak_bytes": 0, "finished": s > 0}
        for n, s in zip("abc", (10, 40, 0), strict=True)
    ]
    assert [(row["name"], row["share"]) for row in stage_rows({"stages": stages})] == [
        ("a", 25.0),
        ("b", 100.0),
    ]


def test_a_resumed_run_counts_each_step_once_and_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logged = [
        '{"step": 1, "heldout/loss": 5}',
        '{"step": 1, "train/loss": 4}',
        '{"step": 2, "train/loss": 3}',
        '{"step": 2, "train/loss": 2}',
    ]
    path.write_text("\n".join([*logged, '{"step": 3, "tra']))
    rows = read_metrics(tmp_path)
    assert series(rows, "train/loss") == ([1, 2], [4, 2])
    assert series(rows, "heldout/loss") == ([1], [5])
    path.write_text('torn\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


def test_a_running_mean_keeps_a_straight_line_and_flattens_noise():
    line = [3.0 * i for i in range(20)]
    assert running_mean(line, 5) == pytest.approx(line)
    assert running_mean([0.0, 9.0, 0.0, 9.0, 0.0, 9.0, 0.0], 3)[1:-1] == pytest.approx([3, 6, 3, 6, 3])


def test_a_quarantined_file_named_by_two_stages_counts_once(tmp_path):
    quarantine(tmp_path / "tae", "bad.mp4", "empty")
    quarantine(tmp_path / "latents", "bad.mp4", "the file is empty")
    assert quarantined_files(tmp_path) == ["bad.mp4: the file is empty"]


class HalfGray(torch.nn.Module):
    """Decodes to half the contrast of what it was given: a reconstruction that is not the original."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode(self, video_BTCHW):
        return Posterior(video_BTCHW, video_BTCHW)

    def decode(self, latent_BTCHW, num_frames):
        return latent_BTCHW[:, :num_frames] * self.weight / 2


def test_the_real_clip_and_its_reconstruction_are_those_of_the_prompt(demo):
    clips = read_manifest(demo / "clips" / "manifest.parquet")
    wanted = clips[2]  # rows alternate: clip, its image
    found = captioned_clips(demo, [wanted.caption, "no such caption"], "video")
    assert [clip.clip_id for clip in found] == [wanted.clip_id]
    known = real_and_rebuilt(found, Bucket(num_frames=16, height_px=64, width_px=64, fps=16), HalfGray())
    split, real, rebuilt = known[wanted.caption]
    assert split == "train"
    rendered = render(ShapeSpec(**json.loads(wanted.attributes)))
    assert real.shape == rebuilt.shape == rendered.shape
    assert abs(real.astype(int) - rendered).mean() < 3
    assert abs(rebuilt.astype(int) - (127.5 + (real - 127.5) / 2)).max() <= 1


def test_a_prompt_without_a_clip_says_so(demo):
    page = Page(write_report(demo, demo / "report.html"))
    assert page.text.count("no clip has this caption") == 2


@needs_chromium
@pytest.mark.parametrize("width_px", [500, 1200], ids=["phone", "desk"])
def test_a_browser_plays_the_videos_and_nothing_sticks_out(demo, tmp_path, width_px):
    """Seen to catch: a table that is wider than a phone; a video that no browser decodes."""
    page = write_report(demo, demo / "report.html")
    script = """
    const root = document.documentElement;
    const videos = [...document.querySelectorAll("video")].map((v) => [v.videoWidth, v.duration, v.error]);
    tell({ inner: innerWidth, needed: root.scrollWidth, videos });
    """
    found, problems = told_by(page, script, tmp_path / "reader", width_px)
    assert not problems
    assert found["inner"] == width_px and found["needed"] <= width_px
    assert found["videos"] and all(video == [64, 1, None] for video in found["videos"])
