"""Clips as batches of frames, decoded by one DALI pipeline. The only file that imports DALI.

    row -> packets + frame numbers -> decode -> resize to cover -> centre crop -> [-1, 1]
           read_clip, in threads      `------------- DALI, in the background -------------'

On a CPU (device_id=None) DALI decodes VP8, VP9 and MJPEG itself; it has no CPU decoder for H.264, H.265 and
others, so PyAV's frames enter the same pipeline through a conditional. With a GPU, NVDEC decodes everything.
Nothing else differs.
"""

import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nemo_moviegen.data.clips import record_unusable
from nemo_moviegen.data.frames import read_clip

CPU_CODECS = ("vp8", "vp9", "mjpeg")
"""What `fn.decoders.video` decodes without a GPU (DALI 2.4)."""
_NOTHING = np.zeros(1, np.uint8)
_NO_FRAME = np.zeros(1, np.int32)
_NO_PICTURE = np.zeros((1, 1, 1, 3), np.uint8)
_LOOK_AHEAD = 4096  # rows a batch may look ahead for others of its kind: integers only


class ClipLoader:
    """Iterates over `(video_BTCHW, rows)`: float32 in [-1, 1], and the indices into `clips` of the batch.

    `order` is an iterable of row indices, finite or not; iterating the loader again starts it anew. A batch
    holds clips of the bucket's length or images (T = 1), never both: it is filled with the next rows of the
    kind its first row has. The last batch of a finite order may be smaller.

    A file that cannot be used is logged by name, appended to the file `quarantine` (JSON lines: clip_id,
    path, reason), counted in `quarantined` and not tried again. Its place in the batch goes to the next row
    of its kind in the order: every usable row comes as often as ordered. With `substitute` it goes to the
    next usable clip of its kind in `clips` instead, whatever was read before: batches stay those of the
    order, on every rank and after a resume. ValueError where nothing readable is left.

    A thread of its own decodes ahead; two batches wait, no more.
    """

    def __init__(
        self,
        clips,
        bucket,
        *,
        batch_size,
        order,
        device_id=None,
        num_threads=1,
        quarantine=None,
        substitute=False,
    ):
        if batch_size < 1 or num_threads < 1:
            raise ValueError(f"batch_size {batch_size} and num_threads {num_threads} count from 1")
        self.clips, self.bucket, self.order = clips, bucket, order
        self.batch_size, self.device_id, self.num_threads = batch_size, device_id, num_threads
        self.quarantine, self.substitute = quarantine, substitute
        self.bad_rows = set()
        self._pipelines = {}

    @property
    def quarantined(self) -> int:
        """Clips found unusable so far."""
        return len(self.bad_rows)

    def __iter__(self):
        ready, stop = queue.Queue(maxsize=2), threading.Event()
        worker = threading.Thread(target=self._work, args=(ready, stop), name="clip-loader", daemon=True)
        worker.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:  # also when the caller stops early
            stop.set()
            while worker.is_alive():
                _drain(ready)
                worker.join(timeout=0.05)

    def _work(self, ready, stop):
        try:
            with ThreadPoolExecutor(self.num_threads) as readers:
                rows = _RowsByKind(self.order, self.clips)
                while not stop.is_set() and (batch := self._next_batch(rows, readers)):
                    ready.put(batch)
            ready.put(None)
        except Exception as error:  # handed over: it is raised where the loader is iterated
            ready.put(error)

    def _next_batch(self, rows, readers):
        """Frames and rows of the next batch; None at the end."""
        while kind := rows.next_kind():
            fill = self._with_substitutes if self.substitute else self._with_next_rows
            if taken := fill(kind, rows, readers):
                return torch.stack([video_TCHW for video_TCHW, _ in taken]), [row for _, row in taken]
        return None

    def _with_next_rows(self, kind, rows, readers):
        """[(frames, row)] of a batch, refilled until it is whole or its kind has run out."""
        taken = []
        while wanted := self._take(rows, kind, self.batch_size - len(taken)):
            frames = self._load(kind, wanted, readers)
            taken += [(frames[row], row) for row in wanted if row in frames]
        return taken

    def _with_substitutes(self, kind, rows, readers):
        """[(frames, row)] of a batch, every place filled."""
        places = [row for _ in range(self.batch_size) if (row := rows.next_of(kind)) is not None]
        frames = {}
        while missing := [row for row in map(self._usable, places) if row not in frames]:
            frames |= self._load(kind, missing, readers)
        return [(frames[row], row) for row in map(self._usable, places)]

    def _usable(self, row):
        """The row, or the next of its kind not known to be bad."""
        kind = self.clips[row].kind
        for candidate in range(row, row + len(self.clips)):
            candidate %= len(self.clips)
            if candidate not in self.bad_rows and self.clips[candidate].kind == kind:
                return candidate
        raise self._nothing_left(kind)

    def _take(self, rows, kind, count):
        """Up to `count` rows of this kind that are not known to be bad."""
        found, skipped = [], 0
        while len(found) < count and (row := rows.next_of(kind)) is not None:
            if row not in self.bad_rows:
                found.append(row)
            elif (skipped := skipped + 1) > 2 * len(self.clips):
                raise self._nothing_left(kind)
        return found

    def _nothing_left(self, kind):
        where = f"; see {self.quarantine}" if self.quarantine else ""
        return ValueError(f"no readable {kind} is left: all {self.quarantined} tried are bad{where}")

    def _load(self, kind, rows, readers):
        """Frames [T, C, H, W] by row, of the rows that are usable."""
        samples = [sample for sample in readers.map(self._read, dict.fromkeys(rows)) if sample is not None]
        video_BTCHW, kept = self._decode(kind, samples) if samples else ((), [])
        return dict(zip(kept, video_BTCHW, strict=True))

    def _read(self, row):
        try:
            return read_clip(
                self.clips[row], row, self.bucket.num_frames, self.bucket.fps, self._decodes_with_dali
            )
        except ValueError as error:
            return self._reject(row, str(error))

    def _decodes_with_dali(self, codec):
        return self.device_id is not None or codec in CPU_CODECS

    def _decode(self, kind, samples):
        """Frames and rows of the samples DALI could decode."""
        try:
            return self._run(kind, samples), [sample.row for sample in samples]
        except RuntimeError as error:
            # DALI fails the batch as a whole and its pipeline with it: find the culprit one by one
            del self._pipelines[kind]
            if len(samples) > 1:
                parts = [self._decode(kind, [sample]) for sample in samples]
                videos = [video for video, kept in parts if kept]
                return (torch.cat(videos) if videos else ()), [row for _, kept in parts for row in kept]
            clip = self.clips[samples[0].row]
            self._reject(samples[0].row, f"clip {clip.clip_id}: {clip.path}: corrupt: {_dali_reason(error)}")
            return (), []

    def _run(self, kind, samples):
        if kind not in self._pipelines:
            self._pipelines[kind] = _build(self.bucket, self.batch_size, self.num_threads, self.device_id)
        pipeline = self._pipelines[kind]
        by_dali = [sample.packets is not None for sample in samples]
        pipeline.feed_input("packets", [s.packets if s.packets is not None else _NOTHING for s in samples])
        pipeline.feed_input("frames", [s.frames if s.frames is not None else _NO_FRAME for s in samples])
        if self.device_id is None:
            pictures = [s.decoded_THWC if s.decoded_THWC is not None else _NO_PICTURE for s in samples]
            pipeline.feed_input("decoded", pictures)
            pipeline.feed_input("by_dali", [np.array(b) for b in by_dali])
        (output,) = pipeline.run()
        if self.device_id is None:
            return torch.from_numpy(np.array(output.as_tensor()))  # a copy: DALI uses its buffer again
        return _from_gpu(output.as_tensor(), self.device_id)

    def _reject(self, row, reason):
        if row not in self.bad_rows:
            self.bad_rows.add(row)
            record_unusable(self.quarantine, self.clips[row].clip_id, self.clips[row].path, reason)


class _RowsByKind:
    """An order of rows, taken by kind: rows of the other kind wait their turn."""

    def __init__(self, order, clips):
        self._order, self._clips = enumerate(order), clips
        self._waiting = {"video": deque(), "image": deque()}

    def next_kind(self):
        """Kind of the earliest row not taken yet; None at the end."""
        if not any(self._waiting.values()) and not self._pull():
            return None
        return min((deque_[0][0], kind) for kind, deque_ in self._waiting.items() if deque_)[1]

    def next_of(self, kind):
        """The next row of this kind; None where the order, or the look-ahead, holds no more."""
        other = self._waiting["image" if kind == "video" else "video"]
        while not self._waiting[kind]:
            if len(other) >= _LOOK_AHEAD or not self._pull():
                return None
        return self._waiting[kind].popleft()[1]

    def _pull(self):
        for position, row in self._order:
            self._waiting[self._clips[row].kind].append((position, row))
            return True
        return False


def _build(bucket, batch_size, num_threads, device_id):
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device_id is not None

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
        if on_gpu:
            video = fn.decoders.video(packets, device="mixed", frames=frames)
        else:
            decoded = fn.external_source(name="decoded", dtype=types.UINT8, ndim=4, layout="FHWC")
            if fn.external_source(name="by_dali", dtype=types.BOOL, ndim=0):
                video = fn.decoders.video(packets, device="cpu", frames=frames)
            else:
                video = decoded
        size = {"resize_x": bucket.width_px, "resize_y": bucket.height_px}
        # float between the two steps: rounding to whole levels twice would show
        video = fn.resize(video, **size, mode="not_smaller", antialias=True, dtype=types.FLOAT)
        return fn.crop_mirror_normalize(
            video,
            crop=(bucket.height_px, bucket.width_px),
            mean=[127.5] * 3,
            std=[127.5] * 3,
            output_layout="FCHW",
            dtype=types.FLOAT,
        )

    pipeline = clips()
    pipeline.build()
    return pipeline


def _from_gpu(tensor, device_id):
    from nvidia.dali.plugin.pytorch import feed_ndarray

    video = torch.empty(tensor.shape(), dtype=torch.float32, device=f"cuda:{device_id}")
    feed_ndarray(tensor, video, cuda_stream=torch.cuda.current_stream(device_id))
    return video


def _dali_reason(error):
    """What went wrong, out of DALI's long message."""
    text = str(error).rpartition("encountered:")[2].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or "DALI cannot decode it"


def _drain(ready):
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        pass
