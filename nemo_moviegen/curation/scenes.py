"""Where a video's scenes begin, and which seconds of it become clips (s3.2.1, App. B)."""

import math
from dataclasses import dataclass

import numpy as np

from nemo_moviegen.curation.footage import decode, narrowed

VERSION = "3"


@dataclass(frozen=True)
class Span:
    """Seconds of a video, the end exclusive."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


def find_scenes(path, fps, settings) -> tuple[list[Span], tuple[int, ...]]:
    """Scenes of a video in order, without gaps, and a fingerprint that its copies share.

    The last scene ends where the last frame does. Every frame is decoded, so ValueError says where the file
    is damaged. PySceneDetect numbers the frames, their own times make seconds of its cuts: a varying frame
    rate moves none. The fingerprint is the number of frames and which sixteenth of the picture is brightest
    and darkest over the film: re-encoding and scaling leave it alone, nearly always.
    """
    import cv2
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector

    detector = AdaptiveDetector(
        adaptive_threshold=settings.ratio,
        min_content_val=settings.least_change,
        min_scene_len=max(1, round(settings.shortest_seconds * fps)),
    )
    seconds_N, cuts, last, light = [], [], None, np.zeros((4, 4, 3))
    for seconds, frame in decode(path):
        image = narrowed(frame, settings.width_px, "bgr24", is_rough=True)
        cuts += detector.process_frame(FrameTimecode(len(seconds_N), float(fps)), image)
        light += cv2.resize(image, (4, 4), interpolation=cv2.INTER_AREA)
        seconds_N.append(seconds)
        last = frame
    if not seconds_N:
        raise ValueError("no frame of it can be decoded")
    cuts += detector.post_process(FrameTimecode(len(seconds_N), float(fps)))
    shown = float(last.duration * last.time_base) if last.duration else 1 / fps
    starts = [seconds_N[0], *sorted({seconds_N[cut.frame_num] for cut in cuts} - {seconds_N[0]})]
    spans = [Span(a, b) for a, b in zip(starts, [*starts[1:], seconds_N[-1] + shown], strict=True)]
    light = light.sum(axis=-1)
    return spans, (len(seconds_N), int(light.argmax()), int(light.argmin()))


def draw_spans(scenes, settings, random) -> list[Span]:
    """Spans to cut, in order of time: one of each of the longest scenes, at most `clips_per_video`.

    `random(scene)` is the numpy generator of the scene of that number, so that what is drawn from one depends
    on no other. Empty where no scene is long enough.
    """
    usable = [Span(max(scene.start, settings.skip_seconds), scene.end) for scene in scenes]
    # to a millisecond: headers round, and a scene of 1 s should give a clip of 1 s
    long_enough = [n for n, span in enumerate(usable) if span.seconds >= settings.shortest_seconds - 1e-3]

    def preference(number):  # all that allow the longest clip are alike: chance chooses among them
        capped = min(usable[number].seconds, settings.longest_seconds + 1e-3)
        return (-capped, random(number).random())

    chosen = sorted(sorted(long_enough, key=preference)[: settings.clips_per_video])
    return [_draw(usable[number], settings, random(number)) for number in chosen]


def _draw(span, settings, generator):
    _, is_long, length, place = generator.random(4)  # the first is the preference above
    most = min(span.seconds, settings.longest_seconds)
    if most >= settings.long_seconds and is_long < settings.long_share:
        low, high = settings.long_seconds, most
    else:
        low, high = (
            settings.shortest_seconds,
            max(settings.shortest_seconds, min(most, settings.long_seconds)),
        )
    seconds = low + length * (high - low)
    start = span.start + place * max(0.0, span.seconds - seconds)
    start = math.ceil(start * 1000 - 1e-6) / 1000
    return Span(start, math.floor(min(start + seconds, span.end) * 1000 + 1e-6) / 1000)


def generator_of(seed, fingerprint, scene) -> np.random.Generator:
    """Random numbers of one scene of a video: a function of the seed, its fingerprint and the scene's number.

    Not of its name: copies of one video under two names give the same seconds, and so are found alike.
    """
    return np.random.default_rng([seed, scene, *fingerprint])
