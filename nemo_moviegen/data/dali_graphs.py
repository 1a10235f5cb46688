"""The two DALI graphs of the clip loader, and what goes in and comes out. The only file that imports DALI."""

import numpy as np
import torch

from nemo_moviegen.data.fit import WHITE


def normalise(bucket, batch_size, num_threads, device_id):
    """The graph for clips that PyAV decoded and fitted."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1)
    def clips():
        pictures = fn.external_source(
            name="pictures", dtype=types.UINT16, ndim=4, layout="FCHW", no_copy=True
        )
        return fn.crop_mirror_normalize(
            pictures, mean=[WHITE / 2] * 3, std=[WHITE / 2] * 3, output_layout="FCHW", dtype=types.FLOAT
        )

    pipeline = clips()
    pipeline.build()
    return pipeline


def decode_and_fit(bucket, batch_size, num_threads, device_id):
    """The graph for clips that DALI decodes: NVDEC's on a GPU, its own decoder's on a CPU."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        enable_conditionals=True,
        prefetch_queue_depth=1,  # the loader's own queue holds what is ahead
    )
    def clips():
        packets = fn.external_source(name="packets", dtype=types.UINT8, ndim=1)
        frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        # read on the host also for a GPU, where they are arguments and conditions
        angle = fn.external_source(name="angle", dtype=types.FLOAT, ndim=0)
        mirrored = fn.external_source(name="mirrored", dtype=types.INT32, ndim=0)
        video = fn.decoders.video(packets, device="cpu" if device_id is None else "mixed", frames=frames)
        # float between the steps: rounding to whole levels twice would show
        video = fn.resize(video, size=size, antialias=True, dtype=types.FLOAT)
        upright = video
        if angle != 0:
            upright = fn.rotate(video, angle=angle, interp_type=types.INTERP_NN)
        return fn.crop_mirror_normalize(
            upright,
            crop=(bucket.height_px, bucket.width_px),
            rounding="truncate",
            mirror=mirrored,
            mean=[127.5] * 3,
            std=[127.5] * 3,
            output_layout="FCHW",
            dtype=types.FLOAT,
        )

    pipeline = clips()
    pipeline.build()
    return pipeline


def decoded(read):
    """What `normalise` takes."""
    return {"pictures": [clip.pictures_TCHW for clip in read]}


def to_decode(read):
    """What `decode_and_fit` takes: packets, frame numbers, and where the pixels go."""
    turns = [_turn(clip.fit) for clip in read]
    return {
        "packets": [clip.packets for clip in read],
        "frames": [clip.frames for clip in read],
        "size": [
            np.array([clip.fit.scaled_height_px, clip.fit.scaled_width_px], np.float32) for clip in read
        ],
        "angle": [np.array(angle, np.float32) for angle, _ in turns],
        "mirrored": [np.array(mirrored, np.int32) for _, mirrored in turns],
    }


def _turn(fit):
    """(degrees counterclockwise, whether columns then change places) that are the fit's three steps."""
    # a transposed picture is one turned by a quarter and mirrored; mirrored both ways is half a circle
    angle = {(False, False): 0, (False, True): 180, (True, False): 270, (True, True): 90}
    return (
        angle[fit.transposed, fit.mirrored_rows],
        (fit.transposed ^ fit.mirrored_rows ^ fit.mirrored_columns),
    )


def from_gpu(tensor, device_id):
    """A batch on the GPU, copied out of DALI's memory: it uses it again."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    video = torch.empty(tensor.shape(), dtype=torch.float32, device=f"cuda:{device_id}")
    feed_ndarray(tensor, video, cuda_stream=torch.cuda.current_stream(device_id))
    return video


def dali_reason(error):
    """What went wrong, out of DALI's long message."""
    text = str(error).rpartition("encountered:")[2].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or "DALI cannot decode it"
