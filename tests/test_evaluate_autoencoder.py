"""Evaluation of autoencoders: which frames, the same for all runs and ranks; what is written of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks

from nemo_moviegen import __main__ as cli
from nemo_moviegen.data.clips import Clip, Clips, read_manifest, write_manifest
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.synthetic import write_moving_shapes
from nemo_moviegen.evaluation import autoencoder as evaluation
from nemo_moviegen.evaluation.autoencoder import evaluate_autoencoder
from nemo_moviegen.evaluation.features import find_features
from nemo_moviegen.evaluation.frechet import fid
from nemo_moviegen.evaluation.metrics import outlier_norms, psnr, ssim
from nemo_moviegen.evaluation.pictures import Shown, shortened, shown_frames, side_by_side
from nemo_moviegen.evaluation.rows import shown_rows
from nemo_moviegen.evaluation.spans import choose_spans, read_source
from nemo_moviegen.recipe import AutoencoderSize, Bucket, ClipData, Optim, TaeRecipe
from nemo_moviegen.tae.model import TemporalAutoencoder
from nemo_moviegen.training.autoencoder_weights import CHECKPOINT_FILE, load_autoencoder
from nemo_moviegen.training.record import write_recipe
from nemo_moviegen.video_files import read_frames

FPS = 8
BUCKET = Bucket(num_frames=8, height_px=32, width_px=32, fps=FPS)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Clips to train on, and held-out ones of 1 s and 1.5 s, with images."""
    folder = tmp_path_factory.mktemp("clips")
    shapes = {"size_px": 32, "fps": FPS, "progress": False}
    clips = write_moving_shapes(folder, 2, num_frames=8, **shapes)
    clips += write_moving_shapes(folder, 2, num_frames=8, split="heldout", **shapes)
    clips += write_moving_shapes(folder, 1, num_frames=12, split="heldout", seed=1, **shapes)
    return str(write_manifest(folder / "manifest.parquet", clips))


def write_run(folder, seed=0, **size):
    """A run folder of an autoencoder that was trained for no step."""
    sizes = {"base_width": 4, "multipliers": (1, 1, 2, 2), "blocks_per_level": 1, **size}
    recipe = TaeRecipe(
        name="test.tae",
        cluster="cpu_2",
        autoencoder=AutoencoderSize(**sizes),
        data=ClipData(manifest="manifest.parquet", bucket=BUCKET),
        optim=Optim(learning_rate=1e-3, warmup_steps=1, weight_decay=0.0, decay="cosine"),
        global_batch=4,
        micro_batch=2,
        num_steps=1,
        output=str(folder),
    )
    folder.mkdir()
    write_recipe(recipe)
    torch.manual_seed(seed)
    model = TemporalAutoencoder(recipe.autoencoder)
    torch.save({"autoencoder": model.state_dict()}, folder / CHECKPOINT_FILE)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An 8x8x8 autoencoder and one that takes each frame alone, with fewer channels."""
    folder = tmp_path_factory.mktemp("runs")
    frame_wise = {"inflation": "2D", "temporal_compression": 1, "latent_channels": 8}
    return [write_run(folder / "tae"), write_run(folder / "frame_wise", seed=1, **frame_wise)]


@pytest.fixture(scope="module")
def evaluated(manifest, runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    return evaluate_autoencoder(runs[0], manifest, output, against=runs[1:]), output


@pytest.fixture
def no_pictures(monkeypatch):
    """For what needs none: encoding the video takes longer than the rest."""
    monkeypatch.setattr(evaluation, "_write", lambda *_: None)


def clip(name, seconds, start=0.0, **changes):
    fields = {"path": f"{name}.mp4", "kind": "video", "source_fps": 24.0, "width_px": 64, "height_px": 64}
    fields |= {"codec": "h264", "caption": "", "split": "heldout"}
    return Clip(clip_id=name, start_seconds=start, end_seconds=start + seconds, **fields | changes)


def test_numbers_are_those_of_the_metrics_on_the_same_frames(evaluated, manifest, runs):
    """Decoded by the training loader, coded at once, averaged by hand; a clip counts once, however long.
    Seen to catch: means over frames, colours from 0 to 1, a run measured with the other's weights, features
    of the last clip only."""
    metrics, output = evaluated
    assert json.loads((output / "metrics.json").read_text()) == metrics
    clips = read_manifest(manifest)
    clips = [c for c in clips if c.split == "heldout" and c.kind == "video"]
    network = find_features("random")
    rows = {row["run"]: row for row in metrics["rows"] if row["group"] == "whole clips"}
    for folder, label in zip(runs, ("tae", "frame_wise"), strict=True):
        model, expected, features = load_autoencoder(folder), [], ([], [])
        for one in clips:
            bucket = replace(BUCKET, num_frames=round((one.end_seconds - one.start_seconds) * FPS))
            (video, _), *_ = ClipLoader([one], bucket, batch_size=1, order=[0])
            with torch.no_grad():
                latent = model.encode(video).mean_BTCHW
                rebuilt = model.decode(latent, num_frames=bucket.num_frames).clamp(-1, 1)[0]
            norms = outlier_norms(latent)
            expected.append(
                [
                    float(value)
                    for value in (psnr(rebuilt, video[0]).mean(), ssim(rebuilt, video[0]).mean(), norms.max())
                ]
            )
            features[0].append(network(video[0]))
            features[1].append(network(rebuilt))
        row = rows[label]
        assert (row["num_clips"], row["num_frames"]) == (3, 8 + 8 + 12)
        psnr_db, similarity, _ = np.mean(expected, axis=0)
        assert row["psnr_db"] == pytest.approx(psnr_db, abs=1e-4)
        assert row["ssim"] == pytest.approx(similarity, abs=1e-5)
        assert row["largest_norm"] == pytest.approx(max(one[2] for one in expected), rel=1e-4)
        assert row["fid"] == pytest.approx(fid(*map(torch.cat, features)), rel=1e-3)
        assert row["frames_per_second"] > 0
    assert rows["tae"]["psnr_db"] != rows["frame_wise"]["psnr_db"]
    assert rows["tae"]["compression"] == "8x8x8, 16 ch"
    assert rows["frame_wise"]["compression"] == "1x8x8, 8 ch"


def test_durations_no_clip_has_are_told(evaluated):
    """Seen to catch: rows without clips left out."""
    metrics, _ = evaluated
    groups = list(dict.fromkeys(row["group"] for row in metrics["rows"]))
    assert groups == ["2 s", "4 s", "6 s", "8 s", "whole clips", "images"]
    assert metrics["rows"][0]["note"] == "no clip that long; the longest has 1.50 s"
    assert shown_rows(metrics)[0] == ["2 s", "no clip that long"]
    assert metrics["rows"][4]["note"] == "whole clips of 8 to 12 frames: none reaches 2 s"
    assert metrics["rows"][-1]["num_frames"] == 3
    assert metrics["settings"]["drawn_from"] == "the 6 held-out of 10 rows"


def test_spans_do_not_overlap_and_come_from_every_clip_first():
    """Seen to catch: spans that start at the file's start and not the clip's, a clip drawn twice before
    another once, frames of a duration rounded down."""
    clips = Clips.of([clip("a", 6.0), clip("b", 4.1, start=10.0), clip("c", 1.9)])
    two, four, six, images = choose_spans(clips, (4, 2, 6.5), fps=24, limit=200, seed=0)
    assert [group.name for group in (two, four, six, images)] == ["2 s", "4 s", "6.5 s", "images"]
    assert {span.clip_id for span in two.spans[:2]} == {"a", "b"}
    found = {(span.clip_id, span.start_seconds, span.end_seconds) for span in two.spans}
    assert found == {("a", 0, 2), ("a", 2, 4), ("a", 4, 6), ("b", 10, 12), ("b", 12, 14)}
    assert sorted(span.clip_id for span in four.spans) == ["a", "b"] and four.num_frames == [96, 96]
    assert not six.spans and "the longest has 6.00 s" in six.note
    assert not images.spans and images.note == "none among the clips"
    assert len(choose_spans(clips, (2,), fps=24, limit=3, seed=0)[0].spans) == 3
    assert choose_spans(clips, (0.33,), fps=24, limit=1, seed=0)[0].num_frames == [8]


def test_the_seed_chooses_the_clips():
    clips = Clips.of([clip(f"{i}", 5.0) for i in range(50)])
    one, again, other = (
        [span.clip_id for span in choose_spans(clips, (2,), 16, 5, seed)[0].spans] for seed in (0, 0, 1)
    )
    assert one == again != other and len(set(one)) == 5


def test_without_held_out_clips_all_are_taken_and_it_says_so(tmp_path):
    clips = [clip("a", 3.0, split="train"), clip("i", 0.0, kind="image", split="train")]
    source = read_source(write_manifest(tmp_path / "m.parquet", clips), tmp_path / "out")
    assert len(source.clips) == 2 and source.told.startswith("all 2 rows, seen in training perhaps")
    groups = choose_spans(source.clips, (2,), 16, 5, 0)
    assert [len(group.spans) for group in groups] == [1, 1]
    only = choose_spans(source.clips.select([1]), (2,), 16, 5, 0)
    assert only[0].note == "no clip, only images" and len(only[1].spans) == 1


def test_a_video_and_a_folder_of_videos_are_cut(runs, tmp_path, no_pictures):
    """The folder's files are one clip each; the output inside it is none."""
    folder = tmp_path / "videos"
    write_moving_shapes(folder, 2, num_frames=20, size_px=32, fps=FPS, images=False, progress=False)
    video = next(folder.glob("*.mp4"))
    (folder / "out").mkdir()
    shutil.copy(video, folder / "out" / "side_by_side.mp4")
    metrics = evaluate_autoencoder(runs[0], folder, folder / "out", seconds=(1,))
    assert [row["num_clips"] for row in metrics["rows"]] == [4, 0]  # 20 frames are two seconds and a half
    assert metrics["settings"]["drawn_from"] == "all 2 videos of the folder"
    metrics = evaluate_autoencoder(runs[0], video, tmp_path / "out", seconds=(1, 2), limit=1)
    assert [row["num_frames"] for row in metrics["rows"] if row["num_clips"]] == [8, 16]


def evaluate_on_rank(run, against, manifest, limit=200):
    """What rank 0 writes: metrics and pictures."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_write", lambda output, *what: written.append(what))
        evaluate_autoencoder(run, manifest, "", against=[against], seconds=(1,), limit=limit)
    return written


def test_two_ranks_find_what_one_finds(manifest, runs):
    """Numbers and pictures. Seen to catch: both ranks taking the clips of rank 0, moments of rank 0 only,
    clips or pictures left in the order of ranks, frames kept without regard to their norms."""
    ((metrics, found),) = evaluate_on_rank(*runs, manifest)
    ((of_two, found_of_two),), nothing = run_on_ranks(evaluate_on_rank, *runs, manifest)
    assert nothing == [] and len(metrics["clips"]) == len(of_two["clips"]) == 2 * 6
    for name in ("rows", "clips"):
        for one, two in zip(metrics[name], of_two[name], strict=True):
            for key in one.keys() - {"frames_per_second", "coding_seconds"}:
                same = (
                    pytest.approx(one[key], rel=1e-6, abs=1e-9) if isinstance(one[key], float) else one[key]
                )
                assert two[key] == same, key
    assert [one.title for one in found.shown] == [two.title for two in found_of_two.shown]
    assert [one.title for one in found.dots] == [two.title for two in found_of_two.dots]
    for one, two in zip(found.shown, found_of_two.shown, strict=True):
        assert all(map(np.array_equal, one.panels, two.panels))
    for one, two in zip(found.dots, found_of_two.dots, strict=True):
        assert all(map(np.array_equal, (one.original, *one.rebuilt), (two.original, *two.rebuilt)))


def test_tasks_of_an_array_find_what_one_finds_and_measure_nothing_twice(
    manifest, runs, tmp_path, monkeypatch
):
    """Seen to catch: a task that takes the clips of another, parts put together in their own order."""
    ((metrics, found),) = evaluate_on_rank(*runs, manifest)
    written = []
    monkeypatch.setattr(evaluation, "_write", lambda output, *what: written.append(what))
    settings = {"against": runs[1:], "seconds": (1,)}

    def task(index, **changed):
        return evaluate_autoencoder(runs[0], manifest, tmp_path, task=(index, 3), **settings | changed)

    assert task(1) is None and task(2) is None and not written
    assert task(0) is not None
    ((of_three, found_of_three),) = written
    assert [clip["job"] for clip in of_three["clips"]] == [clip["job"] for clip in metrics["clips"]]
    for one, three in zip(metrics["rows"], of_three["rows"], strict=True):
        for key in one.keys() - {"frames_per_second", "coding_seconds"}:
            is_number = isinstance(one[key], float)
            assert three[key] == (pytest.approx(one[key], rel=1e-6, abs=1e-9) if is_number else one[key]), key
    assert [one.title for one in found.shown] == [three.title for three in found_of_three.shown]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "measure", lambda *_: pytest.fail("measured again"))
        assert task(2)["rows"] == of_three["rows"]
    with pytest.raises(ValueError, match="was measured with another seed"):
        task(2, seed=1)


def test_more_ranks_than_clips_share_the_tiles_of_each(manifest, runs):
    """Two clips, three ranks. Seen to catch: a rank without clips that leaves the others in their gather."""
    ((metrics, _),) = evaluate_on_rank(*runs, manifest, 1)
    ((shared, _),), *nothing = run_on_ranks(evaluate_on_rank, *runs, manifest, 1, world_size=3)
    assert nothing == [[], []] and len(metrics["clips"]) == len(shared["clips"]) == 2 * 2
    for one, three in zip(metrics["clips"], shared["clips"], strict=True):
        assert three | {"coding_seconds": 0} == one | {"coding_seconds": 0}


def test_a_size_without_whole_latents_is_refused_or_cropped_in_the_middle(
    manifest, runs, tmp_path, monkeypatch, no_pictures
):
    """Seen to catch: frames resized to the cropped size."""
    with pytest.raises(ValueError, match=r"44x32 px .*use --size 40x32 or 48x32, or --fit to crop .* 40x32"):
        evaluate_autoencoder(runs[0], manifest, tmp_path, size=(44, 32))
    seen, real = [], evaluation.measure
    monkeypatch.setattr(evaluation, "measure", lambda *a: seen.append((a[3], a[4])) or real(*a))
    metrics = evaluate_autoencoder(
        runs[0], manifest, tmp_path, size=(44, 32), fit=True, seconds=(1,), limit=1
    )
    assert (metrics["settings"]["height_px"], metrics["settings"]["read_height_px"]) == (40, 44)
    one, video = seen[0]
    (whole, _), *_ = ClipLoader([one], replace(BUCKET, height_px=44), batch_size=1, order=[0])
    torch.testing.assert_close(video, whole[0, :, :, 2:42], rtol=0, atol=1e-6)


def test_a_diverged_run_is_named(manifest, runs, tmp_path):
    broken = write_run(tmp_path / "broken")
    state = torch.load(tmp_path / "broken" / CHECKPOINT_FILE)
    for value in state["autoencoder"].values():
        value[...] = float("nan")
    torch.save(state, tmp_path / "broken" / CHECKPOINT_FILE)
    with pytest.raises(ValueError, match=r"broken: clip shapes-heldout-.* comes out as NaN or infinity"):
        evaluate_autoencoder(runs[0], manifest, tmp_path / "out", against=[broken])


def test_runs_of_one_name_are_told_apart(manifest, runs, tmp_path, no_pictures):
    (tmp_path / "before").mkdir()
    other = write_run(tmp_path / "before" / "tae", seed=2)
    metrics = evaluate_autoencoder(runs[0], manifest, tmp_path / "out", against=[other], limit=1)
    assert list(metrics["settings"]["runs"].values()) == [runs[0], other]
    assert list(metrics["settings"]["runs"])[1] == "before/tae"
    with pytest.raises(ValueError, match="given twice"):
        evaluate_autoencoder(runs[0], manifest, tmp_path / "out", against=[f"{runs[0]}/."])


def test_the_video_shows_clips_and_names_side_by_side(evaluated):
    """32 px enlarged to whole pixels; the original at its place, a line of text above and below."""
    metrics, output = evaluated
    frames = read_frames(output / "side_by_side.mp4")
    order = list(dict.fromkeys(clip["clip_id"] for clip in metrics["clips"]))
    assert len(frames) == 8 + 8 + 12 + FPS  # three clips, and an image for a second
    assert frames.shape[1:3] == (384 + 44, 3 * 384 + 2 * 4)
    clips = {c.clip_id: c for c in read_manifest(metrics["settings"]["clips"])}
    original = read_frames(clips[order[0]].path)[0]
    shown = frames[0, 22 : 22 + 384, :384].reshape(32, 12, 32, 12, 3).mean(axis=(1, 3))
    assert np.abs(shown - original).mean() < 4
    assert frames[0, :22, :384].max() > 200 and frames[0, :22, 388:772].max() > 200  # white on black


def test_long_names_lose_their_middle():
    assert shortened("abcdefghij", 10, len) == "abcdefghij"
    assert shortened("abcdefghijk", 10, len) == "abc...hijk"


def test_large_frames_are_shrunk_to_fit_beside_each_other(tmp_path):
    video = torch.rand(2, 3, 600, 800) * 2 - 1
    panel = shown_frames(video, num_panels=5)
    assert panel.shape == (2, 192, 256, 3)
    shown = Shown(job=0, title="a", panels=[panel, panel])
    frames = read_frames(
        side_by_side([shown], ["a name too long for its panel" * 3, "b"], tmp_path / "v.mp4", 8)
    )
    assert frames.shape == (2, 192 + 44, 2 * 256 + 4, 3)


def test_the_page_is_whole_and_names_the_features(evaluated):
    _, output = evaluated
    html = (output / "report.html").read_text()
    assert "http" not in html and html.count("data:video/mp4") == 1 and html.count("data:image/png") == 1
    assert "FID (random)" in html and "not comparable with published FID" in html
    assert "no clip that long; the longest has 1.50 s" in html
    assert Image.open(output / "latent_dots.png").size[0] > 1000


def test_the_command_prints_the_table(manifest, runs, tmp_path, capsys):
    output = str(tmp_path / "out")
    arguments = ["evaluate", "tae", runs[0], manifest, "--against", runs[1], "--seconds", "1", "2"]
    assert cli.main([*arguments, "--limit", "1", "--output", output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("FID (random)" in line for line in lines)
    assert any(line.split()[:4] == ["1", "s", "tae", "1"] for line in lines)
    assert any("no clip that long" in line for line in lines)
    assert lines[-1] == f"{output}/report.html"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "nowhere"}, "nowhere is no run folder of an autoencoder"),
        ({"clips": "nowhere.mp4"}, "no such file or folder"),
        ({"clips": __file__}, "not a video that can be opened"),
        ({"more": ["--size", "33x32"]}, "use --size 32x32 or 40x32"),
        ({"more": ["--features", "inception.pt"]}, "no such file; use random"),
        ({"more": ["--seconds", "0"]}, "give seconds above 0"),
        ({"more": ["--limit", "0"]}, "1 clip or more"),
        ({"damage": True}, "cannot be read as a video"),
    ],
)
def test_a_mistake_is_one_line(change, words, manifest, runs, tmp_path, capsys):
    if change.get("damage"):
        path = tmp_path / "bad.mp4"
        path.write_bytes(b"x" * 500)
        clips = str(write_manifest(tmp_path / "bad.parquet", [clip("bad", 2.0, path=str(path))]))
    else:
        clips = change.get("clips", manifest)
    run = change.get("run", runs[0])
    arguments = ["evaluate", "tae", run, clips, "--output", str(tmp_path / "out"), *change.get("more", [])]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert words in captured.err
