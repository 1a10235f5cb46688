"""FID, FVD and CLIP score of a folder of samples: the right numbers, from the right frames, or a reason."""

import json
import string

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from nemo_moviegen.__main__ import main
from nemo_moviegen.data.clips import write_manifest
from nemo_moviegen.data.dali import ClipLoader
from nemo_moviegen.data.synthetic import caption, draw_spec, render, write_moving_shapes
from nemo_moviegen.evaluation.features import find_features
from nemo_moviegen.evaluation.frechet import fid
from nemo_moviegen.evaluation.sample_metrics import find_metrics, measure_samples
from nemo_moviegen.evaluation.spans import whole_file
from nemo_moviegen.inputs import Bucket
from nemo_moviegen.video_files import write_mp4

NUMBER, FRAMES = 4, 16


def write_samples(folder, render_of=render, seed=0):
    """What `generate` leaves: videos of prompts and their settings."""
    samples = []
    for number in range(NUMBER):
        spec = draw_spec(seed, number)
        frames = torch.from_numpy(render_of(spec)).permute(0, 3, 1, 2) / 127.5 - 1
        write_mp4(frames, folder / f"{number:03}.mp4", fps=16)
        samples.append({"number": number, "prompt": caption(spec), "file": f"{number:03}.mp4"})
    settings = {"num_frames": FRAMES, "height_px": 64, "width_px": 64, "fps": 16.0, "samples": samples}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    return write_manifest(folder / "manifest.parquet", write_moving_shapes(folder, 5, seed=3, progress=False))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP with random weights whose tokens are letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 40}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16})
    CLIPModel(config).save_pretrained(folder)
    shape = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=shape)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def frames_of(folder):
    """The frames of every video as the loader of real clips has them."""
    clips = [whole_file(path, path.name) for path in sorted(folder.glob("*.mp4"))]
    bucket = Bucket(num_frames=FRAMES, height_px=64, width_px=64, fps=16)
    loader = ClipLoader(clips, bucket, batch_size=1, order=range(len(clips)))
    return [((video[0].permute(0, 2, 3, 1) + 1) * 127.5).round() for video, _ in loader]


def test_fid_and_fvd_are_those_of_all_frames_and_of_whole_clips(samples, real, tmp_path):
    found = measure_samples(samples, find_metrics(fid="random", fvd="random"), tmp_path, real)
    of_samples, of_real = frames_of(samples), frames_of(real.parent)
    frame_features, clip_features = find_features("random"), find_features("random", clips=True)

    def features(videos, of_clips):
        videos = [video.permute(0, 3, 1, 2) / 127.5 - 1 for video in videos]
        if of_clips:
            return clip_features(torch.stack([video.transpose(0, 1) for video in videos]))
        return frame_features(torch.cat(videos))

    metrics = found["metrics"]
    for name, of_clips in (("fid", False), ("fvd", True)):
        expected = fid(features(of_real, of_clips), features(of_samples, of_clips))
        assert metrics[name]["value"] == pytest.approx(expected, rel=1e-3) and expected > 1e-5
        assert metrics[name]["is_comparable"] is False
    assert metrics["fid"]["of"] == {"samples": NUMBER * FRAMES, "real": 5 * FRAMES}
    assert metrics["fvd"]["of"] == {"samples": NUMBER, "real": 5}
    assert json.loads((tmp_path / "metrics.json").read_text()) == found


def test_fvd_sees_that_time_stands_still_and_fid_does_not(tmp_path, real):
    """Every clip shuffled in time has the frames it had."""
    rng = np.random.default_rng(0)
    first = write_samples(_made(tmp_path / "a"))
    shuffled = write_samples(_made(tmp_path / "b"), lambda spec: render(spec)[rng.permutation(FRAMES)])
    values = [
        measure_samples(folder, find_metrics(fid="random", fvd="random"), tmp_path / "out", first)["metrics"]
        for folder in (first, shuffled)
    ]
    assert values[0]["fvd"]["value"] < 1e-6 and values[0]["fid"]["value"] < 1e-6, "itself"
    assert values[1]["fvd"]["value"] > 100 * values[1]["fid"]["value"]


def _made(folder):
    folder.mkdir()
    return folder


def test_the_clip_score_is_the_cosine_of_prompt_and_frames(samples, clip_folder, tmp_path):
    found = measure_samples(samples, find_metrics(clip=str(clip_folder)), tmp_path)["metrics"]["clip"]
    model, processor = (kind.from_pretrained(clip_folder) for kind in (CLIPModel, CLIPProcessor))
    scores = []
    for number, video in enumerate(frames_of(samples)):
        prompt = caption(draw_spec(0, number))
        inputs = processor(text=[prompt], images=list(video.permute(0, 3, 1, 2).byte()), return_tensors="pt")
        with torch.no_grad():
            cut = {name: inputs[name][:, :40] for name in ("input_ids", "attention_mask")}
            text, frames = model.get_text_features(**cut), model.get_image_features(inputs["pixel_values"])
        scores.append(max(0.0, 100 * float(torch.cosine_similarity(text, frames).mean())))
    assert found["value"] == pytest.approx(np.mean(scores), abs=1e-3) and max(scores) > 0
    assert found["of"] == {"samples": NUMBER, "prompts cut": NUMBER}, "letters are tokens here: none fits 40"
    other = write_samples(_made(tmp_path / "other"), lambda spec: render(spec)[..., ::-1].copy())
    assert (
        measure_samples(other, find_metrics(clip=str(clip_folder)), tmp_path)["metrics"]["clip"]["value"]
        != found["value"]
    )


def test_networks_for_clips_come_from_files_that_rescale_and_resize(samples, real, tmp_path):
    class Means(torch.nn.Module):
        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            if not (rescale and resize and return_features):
                return x.float().flatten(1)
            return torch.stack((x.float().mean(dim=(1, 2, 3, 4)), x.float().std(dim=(1, 2, 3, 4))), dim=1)

    torch.jit.script(Means()).save(tmp_path / "means.pt")
    found = measure_samples(samples, find_metrics(fvd=str(tmp_path / "means.pt")), tmp_path, real)
    assert found["metrics"]["fvd"]["network"].startswith("means.pt ")
    stacked = [torch.stack(frames_of(folder)).double().flatten(1) for folder in (real.parent, samples)]
    expected = fid(*(torch.stack((x.mean(1), x.std(1)), dim=1) for x in stacked))
    assert found["metrics"]["fvd"]["value"] == pytest.approx(expected, rel=1e-3)


def test_the_command_prints_and_writes(samples, real, tmp_path, capsys):
    words = ["evaluate", "samples", str(samples), "--real", str(real), "--fid", "random"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "fid" in told and "not comparable" in told and str(tmp_path / "metrics.json") in told


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "no metric is asked for: give --fid, --fvd or --clip"),
        (["--fid", "random"], "fid compares with real clips: give --real"),
        (["--fvd", "i3d.pt", "--real", "REAL"], "no such file; use random"),
        (["--clip", "nowhere"], "CLIP folder nowhere does not exist"),
        (["--clip", "SAMPLES"], "no CLIP model with its processor"),
        (["--fid", "random", "--real", "nothing.parquet"], "no such file or folder"),
    ],
)
def test_what_can_not_be_measured_is_said(more, words, samples, real, tmp_path, capsys):
    more = [{"REAL": str(real), "SAMPLES": str(samples)}.get(word, word) for word in more]
    assert main(["evaluate", "samples", str(samples), *more, "--output", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a folder that `moviegen generate` has finished"):
        measure_samples(tmp_path, find_metrics(fid="random"), tmp_path)
