"""Every score of curation sees what it is for, and nothing where that is not."""

from pathlib import Path

import numpy as np
import pytest
from films import blurred, film, letterboxed, pan, shaky, slideshow, still, titled, zoom

import recipes
from nemo_moviegen.curation.embedding import embedding
from nemo_moviegen.curation.footage import read_facts
from nemo_moviegen.curation.look import look_at
from nemo_moviegen.curation.motion import camera_motion, motion_score, motion_vectors
from nemo_moviegen.curation.picture import aesthetics, border_share, quality
from nemo_moviegen.curation.recipe import Looking, Sampling, Scenes
from nemo_moviegen.curation.scenes import Span, draw_spans, find_scenes, generator_of
from nemo_moviegen.curation.text import text_score
from nemo_moviegen.data.synthetic import draw_spec, render

LIMIT = {entry.column: entry for entry in recipes.get_curation("curation.high_res").filters}


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """The function that looks at frames as they come back from a file."""

    def seen(frames_THWC, fps=16, **options):
        path = film(tmp_path_factory.mktemp("film"), "film.mp4", frames_THWC, fps=fps, **options)
        return look_at(path, Span(0, len(frames_THWC) / fps), fps, Looking())

    return seen


def scenes_of(folder, frames_THWC, fps=16, **settings):
    path = film(folder, "film.mp4", frames_THWC, fps=fps)
    return find_scenes(path, read_facts(path)[0].fps, Scenes(**settings))[0]


@pytest.mark.parametrize(("text", "size"), [("SUBSCRIBE NOW", 26), ("channel seven", 16)])
def test_burnt_in_text_is_over_the_limit_and_a_plain_film_is_not(look, text, size):
    limit = LIMIT["text_score"].high
    assert text_score(look(titled(pan(1), text, size))) >= limit > text_score(look(pan(1)))


def test_text_on_one_sampled_frame_is_enough(look):
    frames_THWC = pan(1, num_frames=16)
    frames_THWC[6:10] = titled(frames_THWC[6:10])
    assert text_score(look(frames_THWC)) >= LIMIT["text_score"].high


def test_moving_shapes_are_no_text(look):
    shapes = render(draw_spec(0, 3))
    assert text_score(look(shapes)) < LIMIT["text_score"].high


@pytest.mark.parametrize(("share", "color"), [(0.1, 0), (0.3, 0), (0.1, 255), (0.2, 60)])
def test_bars_are_measured_to_a_line(look, share, color):
    found = border_share(look(letterboxed(pan(2), share, color)))
    assert found == pytest.approx(share, abs=2.1 / 136)
    assert found > LIMIT["border_share"].high


def test_bars_at_the_sides_count_too(look):
    turned = letterboxed(pan(2).transpose(0, 2, 1, 3), 0.2).transpose(0, 2, 1, 3)
    assert border_share(look(turned)) == pytest.approx(0.2, abs=0.02)


def test_bars_are_found_behind_a_fade_and_a_dark_start(look):
    """With the median over frames, bars were lost as soon as half of the frames were dark."""
    frames_THWC = pan(2).copy()
    frames_THWC[:20] //= 16
    assert border_share(look(letterboxed(frames_THWC, 0.2))) == pytest.approx(0.2, abs=0.02)


def test_plain_grounds_and_skies_are_no_bars(look):
    sky = pan(3).copy()
    sky[:, :60] = np.linspace(200, 235, 60, dtype=np.uint8)[None, :, None, None]
    assert border_share(look(sky)) == 0
    # the base of a triangle is half as wide as the frame, and plain ground lies below it
    for index in range(12):
        assert border_share(look(render(draw_spec(0, index)))) == 0
    assert border_share(look(np.zeros((8, 64, 64, 3), np.uint8))) == 0


def test_aesthetics_and_quality_fall_with_every_fault_and_stay_in_range(look):
    good = look(pan(1))
    faults = {
        "blurred": blurred(pan(1)),
        "dark": pan(1) // 8,
        "black": pan(1) * 0,
        "white": pan(1) // 16 + 239,
        "flat": (pan(1) // 6 + 100),
    }
    scores = {name: aesthetics(look(frames)) for name, frames in faults.items()}
    assert all(0 <= score < LIMIT["aesthetics"].low for score in scores.values()), scores
    assert LIMIT["aesthetics"].low < aesthetics(good) <= 10
    noise = np.random.default_rng(0).normal(scale=20, size=pan(1).shape)
    noisy = (pan(1) + noise).clip(0, 255).astype(np.uint8)
    assert quality(look(noisy)) < quality(good) - 3
    assert quality(look(blurred(pan(1)))) < quality(good) - 3
    assert quality(look(noisy)) >= 0 and quality(good) <= 10


def test_coding_blocks_cost_quality(look):
    whole = look(pan(1))
    height, width = whole.frames_THWC.shape[1:3]
    blocks = whole.frames_THWC.astype(np.float32)
    rng = np.random.default_rng(0)
    steps = rng.normal(scale=12, size=(height // 8, width // 8))
    blocks += np.kron(steps, np.ones((8, 8)))[None, :height, :width, None]
    blocky = type(whole)(blocks.clip(0, 255).astype(np.uint8), whole.pairs_P2HW)
    assert quality(blocky) < quality(whole) - 1


def test_a_still_picture_does_not_move_and_a_pan_does(look):
    low = LIMIT["motion_score"].low
    assert motion_score(look(still(1))) < 0.1 < low < motion_score(look(pan(1)))
    assert motion_vectors(look(still(1))) < 0.1
    slow = look(pan(1, x=0.1))
    assert motion_vectors(slow) < LIMIT["motion_vectors"].low < motion_vectors(look(pan(1, x=1)))


@pytest.mark.parametrize("px", [0.5, 2.0, 6.0])
def test_motion_vectors_are_the_px_of_a_frame_768_wide(look, px):
    assert motion_vectors(look(pan(1, x=px))) == pytest.approx(px * 768 / 240, rel=0.05, abs=0.07 * 768 / 240)


def test_motion_of_too_much_is_over_the_limit(look):
    assert motion_vectors(look(pan(1, x=8))) > LIMIT["motion_vectors"].high


@pytest.mark.parametrize(
    ("label", "frames_THWC"),
    [
        ("pan right", pan(1)),
        ("pan left", pan(2, x=-2)),
        ("tilt down", pan(3, x=0, y=1.5)),
        ("tilt up", pan(4, x=0, y=-1.5)),
        ("zoom in", zoom(5)),
        ("zoom out", zoom(6, growth=1 / 1.02)),
        ("static shot", still(7)),
        ("handheld shot", shaky(8)),
        ("", render(draw_spec(0, 0))),  # a thing moves on plain ground: nothing to tell a camera by
        ("", np.concatenate([pan(9, 16), pan(9, 16, x=-2)])),  # there and back
    ],
)
def test_the_camera_is_told_where_flow_tells_it(look, label, frames_THWC):
    assert camera_motion(look(frames_THWC))[0] == label


def test_cuts_are_found_where_they_are_and_a_pan_has_none(tmp_path):
    scenes = scenes_of(tmp_path, slideshow(1, 5, 16))
    assert [scene.start for scene in scenes] == pytest.approx([0, 1, 2, 3, 4], abs=1e-6)
    assert scenes[-1].end == pytest.approx(5)
    for frames_THWC in (pan(1), zoom(2), pan(3, x=6), still(4)):
        assert scenes_of(tmp_path, frames_THWC) == [Span(0.0, 2.0)]


def test_a_slideshow_has_too_many_shots_a_second(tmp_path):
    assert len(scenes_of(tmp_path, slideshow(1, 8, 8))) / 4 > LIMIT["shots_per_second"].high
    assert len(scenes_of(tmp_path, slideshow(1, 2, 32))) / 4 < LIMIT["shots_per_second"].high


def test_spans_follow_the_paper():
    """App. B: one or two clips of 4 to 16 s, scenes longer than 16 s first, more than half 15 to 16 s."""
    scenes = [Span(0, 5), Span(5, 30), Span(30, 33), Span(33, 60), Span(60, 100)]
    drawn = [draw_spans(scenes, Sampling(), lambda n, k=k: generator_of(0, (k,), n)) for k in range(400)]
    assert {len(spans) for spans in drawn} == {2}
    spans = [span for pair in drawn for span in pair]
    owner = [next(i for i, s in enumerate(scenes) if s.start <= span.start < s.end) for span in spans]
    assert set(owner) == {1, 3, 4}  # the three long ones, all of them
    assert all(span.end <= scenes[n].end for span, n in zip(spans, owner, strict=True))
    seconds = np.array([span.seconds for span in spans])
    assert seconds.min() >= 4 and seconds.max() <= 16
    assert 0.5 < (seconds >= 15).mean() < 0.7
    assert (seconds < 8).any() and ((seconds > 8) & (seconds < 15)).any()


def test_the_first_second_of_a_video_is_in_no_clip():
    for k in range(50):
        (span,) = draw_spans([Span(0, 8.5)], Sampling(), lambda n, k=k: generator_of(0, (k,), n))
        assert span.start >= 1.0 and 4 <= span.seconds <= 7.5
    assert draw_spans([Span(0, 4.9)], Sampling(), lambda n: generator_of(0, (1,), n)) == []


def test_copies_of_a_video_draw_the_same_seconds(tmp_path):
    frames_THWC = pan(5, num_frames=48)
    settings = Sampling(shortest_seconds=1, long_seconds=1, longest_seconds=1, skip_seconds=0)
    drawn = []
    for name, options in {"a.mp4": {}, "b.webm": {}, "c.mp4": {"codec": "libx264"}}.items():
        path = film(tmp_path, name, frames_THWC, **options)
        scenes, fingerprint = find_scenes(path, 16, Scenes())
        drawn += draw_spans(scenes, settings, lambda n, f=fingerprint: generator_of(0, f, n))
    assert [span.start for span in drawn] == pytest.approx([drawn[0].start] * 3, abs=2e-3)


def test_embeddings_of_copies_are_alike_and_of_other_films_are_not(look):
    film_1 = embedding(look(pan(1)))
    assert np.linalg.norm(film_1) == pytest.approx(1)
    small = np.stack([frame[::2, ::2] for frame in pan(1)])
    for copy in (look(pan(1), codec="libx264"), look(small), look(blurred(pan(1), 1.0))):
        assert film_1 @ embedding(copy) >= 0.99
    others = [
        pan(2),
        pan(1)[:, :, ::-1],
        pan(1)[::-1],
        pan(1, x=-2, y=1),
        titled(pan(1)),
        pan(1)[:, 34:, 60:],
    ]
    for other in others:
        assert film_1 @ embedding(look(np.ascontiguousarray(other))) < 0.97
    unrelated = np.array([embedding(look(pan(seed, num_frames=6))) for seed in range(10, 22)])
    cosines = (unrelated @ unrelated.T)[np.triu_indices(12, 1)]
    assert abs(cosines.mean()) < 0.1 and cosines.max() < 0.7
    assert not embedding(look(np.full((8, 64, 64, 3), 90, np.uint8))).any()


def test_a_look_is_of_the_span_alone(tmp_path):
    """Frames come from the span and no other, whatever the key frames are."""
    frames_THWC = np.repeat(np.arange(48, dtype=np.uint8)[:, None, None, None] * 5, 64, axis=1)
    path = film(tmp_path, "grey.mp4", np.repeat(np.repeat(frames_THWC, 64, axis=2), 3, axis=3))
    seen = look_at(path, Span(1.0, 2.0), 16, Looking())
    grey = seen.frames_THWC.mean(axis=(1, 2, 3)) / 5
    assert grey == pytest.approx([17.6 - 0.1, 20.8 + 0.2, 24, 27.2 - 0.2, 30.4 - 0.4], abs=0.9)
    steps = seen.pairs_P2HW.mean(axis=(2, 3)) / 5
    assert len(steps) == 8 and steps.min() >= 15.6 and steps.max() <= 32.4
    assert np.diff(steps, axis=1).ravel() == pytest.approx(np.ones(8), abs=0.4)


def test_a_look_at_nothing_says_so(tmp_path):
    path = film(tmp_path, "film.mp4", pan(0, num_frames=16))
    with pytest.raises(ValueError, match=r"no frame between 3.0 and 4.0 s"):
        look_at(Path(path), Span(3.0, 4.0), 16, Looking())
