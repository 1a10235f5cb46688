"""Which clips are worth training on: the filters of s3.2.1 and their thresholds (App. B, Table 38).

The paper names no threshold for borders, and its aesthetics are LAION's; ours are the classical scores of
`curation/picture.py`. High dynamic range is dropped because nothing behind curation maps its tones.
"""

from dataclasses import replace

from nemo_moviegen.curation.recipe import CurationRecipe, Filter, Sampling

TABLE_38 = (
    Filter(name="duration", column="duration_seconds", low=4, high=120, videos_only=True),
    Filter(name="resolution", column="min_side_px", low=768),
    Filter(name="aspect", column="aspect", low=1),
    Filter(name="range", column="is_hdr", high=0),
    Filter(name="text", column="text_score", high=0.6, is_strict=True),
    Filter(name="border", column="border_share", high=0.02),
    Filter(name="scene", column="clip_seconds", low=12, high=16, videos_only=True),
    Filter(name="aesthetics", column="aesthetics", low=4.0),
    Filter(name="still", column="motion_score", low=2.0, is_strict=True, videos_only=True),
    Filter(name="motion", column="motion_vectors", low=0.5, high=7, is_strict=True, videos_only=True),
    Filter(name="jitter", column="shots_per_second", high=0.85, is_strict=True, videos_only=True),
)


def high_res() -> CurationRecipe:
    """Table 38 (s3.2.1, App. B): landscape, 768 px and more, one clip of 12 to 16 s of one scene.

    Resampling leaves 0.94 / 1.15 of what deduplication leaves.
    """
    return CurationRecipe(
        name="curation.high_res",
        filters=TABLE_38,
        sampling=Sampling(clips_per_video=1, shortest_seconds=12.0),
        keep_share=0.82,
    )


def low_res() -> CurationRecipe:
    """The first subset (s3.2.1): 720 px and more, 60% landscape, clips of 4 to 16 s, milder otherwise."""
    mild = {
        "resolution": {"low": 720},
        "scene": {"low": 4},
        "aesthetics": {"low": 3.5},
        "still": {"low": 1.0},
        "motion": {"low": 0.3, "high": 12},
    }
    return replace(
        high_res(),
        name="curation.low_res",
        filters=tuple(replace(f, **mild.get(f.name, {})) for f in TABLE_38 if f.name != "aspect"),
        sampling=Sampling(),
        landscape_share=0.6,
    )


def tiny() -> CurationRecipe:
    """The funnel (s3.2.1) at toy size: clips of a second, 64 px and more, drawn on plain ground or filmed."""
    fitting = {
        "duration": {"low": 0.9, "high": 60},
        "resolution": {"low": 64},
        "scene": {"low": 0.9, "high": 4},
        "aesthetics": {"low": 1.0},
        "still": {"low": 0.2},
        "motion": {"low": 0.05, "high": 60},
        "jitter": {"high": 2.5},  # one shot of a second is one shot a second
    }
    return replace(
        high_res(),
        name="curation.tiny",
        filters=tuple(replace(f, **fitting.get(f.name, {})) for f in TABLE_38 if f.name != "aspect"),
        sampling=Sampling(shortest_seconds=1.0, long_seconds=1.0, longest_seconds=1.0, skip_seconds=0.0),
        num_chunks=32,
        keep_share=1.0,
        images=True,
        camera_prefix=False,  # captions of Moving Shapes say all there is to say
    )
