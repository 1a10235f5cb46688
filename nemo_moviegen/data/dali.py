"""Clips as batches of frames, delivered by a DALI pipeline (its graphs: dali_graphs.py).

    on a CPU:    row -> PyAV, several clips at once: decode, resize to cover, crop -> DALI: to [-1, 1], layout
    on a GPU:    row -> packets + frame numbers -> DALI: NVDEC, resize to cover, crop, to [-1, 1], layout

Both read the same frames and fit them alike (frames.py, fit.py). DALI could decode VP8, VP9 and MJPEG on a
CPU too, with decoder="dali": it takes 2.7 times the processor of PyAV (VP9, 640x360 to 256 px, one run of
`moviegen bench loader`), for it makes whole frames RGB before it scales them. That way shows on any machine
that the GPU's graph is right.

No checkpoint of DALI's own is taken: nothing in the graph has a state. Which rows make batch k is a function
of the order, and the order one of seed and step; a loader over the order from step k on delivers the batches
an uninterrupted one would, bit for bit, also after bad files, with `substitute`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nemo_moviegen.data import dali_graphs
from nemo_moviegen.data.ahead import ahead
from nemo_moviegen.data.clips import record_unusable
from nemo_moviegen.data.frames import read_clip
from nemo_moviegen.data.kinds import RowsByKind

READY = 2
"""Finished batches that wait."""


class ClipLoader:
    """Iterates over `(video_BTCHW, rows)`: float32 in [-1, 1], and the indices into `clips` of the batch.

    `order` is an iterable of row indices, finite or not; iterating the loader again starts it anew. A batch
    holds clips of the bucket's length or images (T = 1), never both: it is filled with the next rows of the
    kind its first row has. The last batch of a finite order may be smaller. `fps` is a frame rate for each
    clip; without it, all have the bucket's.

    A file that cannot be used is logged by name, appended to the file `quarantine` (JSON lines: clip_id,
    path, reason), counted in `quarantined` and not tried again. Its place in the batch goes to the next row
    of its kind in the order: every usable row comes as often as ordered. With `substitute` it goes to the
    next usable clip of its kind in `clips` instead, whatever was read before: batches stay those of the
    order, on every rank and after a resume. ValueError where nothing readable is left.

    A thread of its own works ahead; `num_threads` more decode a clip each, and those of the next batch as
    soon as there is room. `most_bytes` says what waits at most; on a CPU beside a GPU batches are pinned.
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
        fps=None,
        decoder=None,
    ):
        if batch_size < 1 or num_threads < 1:
            raise ValueError(f"batch_size {batch_size} and num_threads {num_threads} count from 1")
        if fps is not None and len(fps) != len(clips):
            raise ValueError(f"{len(fps)} frame rates for {len(clips)} clips: give one for each, or none")
        if decoder not in (None, "dali"):
            raise ValueError(f"decoder is {decoder!r}; use dali, or None for the fastest")
        self.clips, self.bucket, self.order, self.fps = clips, bucket, order, fps
        self.batch_size, self.device_id, self.num_threads = batch_size, device_id, num_threads
        self.quarantine, self.substitute = quarantine, substitute
        self.dali_decodes = device_id is not None or decoder == "dali"
        self.bad_rows = set()
        self._pipelines = {}
        self._reading = {}  # row -> future of its clip

    @property
    def quarantined(self) -> int:
        """Clips found unusable so far."""
        return len(self.bad_rows)

    @property
    def most_bytes(self) -> int:
        """Host memory that frames take at most while they wait: it does not grow with a clip's file.

        Finished batches, the one under way (twice where bad files leave gaps) and DALI's own, in float32;
        and the clips read ahead, in 16 bits.
        Not in it: the compressed packets and the few source frames of `num_threads` clips, and what was
        handed out. With a GPU, where frames never wait on the host, it is more than is used.
        """
        pixels = self.bucket.num_frames * 3 * self.bucket.height_px * self.bucket.width_px
        return pixels * (4 * (READY + 3) * self.batch_size + 2 * (self.batch_size + self._num_ahead))

    @property
    def _num_ahead(self):
        return max(self.batch_size, self.num_threads)  # a batch of one still keeps all threads busy

    def __iter__(self):
        return ahead(self._batches(), READY)

    def _batches(self):
        readers = ThreadPoolExecutor(self.num_threads, thread_name_prefix="clip-reader")
        try:
            rows = RowsByKind(self.order, self.clips)
            while batch := self._next_batch(rows, readers):
                yield batch
        finally:
            readers.shutdown(cancel_futures=True)
            self._reading.clear()
            self._pipelines.clear()

    def _next_batch(self, rows, readers):
        """Frames and rows of the next batch; None at the end."""
        while kind := rows.next_kind():
            fill = self._with_substitutes if self.substitute else self._with_next_rows
            if taken := fill(kind, rows, readers):
                return _stack([video_TCHW for video_TCHW, _ in taken]), [row for _, row in taken]
        return None

    def _with_next_rows(self, kind, rows, readers):
        """[(frames, row)] of a batch, refilled until it is whole or its kind has run out."""
        taken = []
        while wanted := self._take(rows, kind, self.batch_size - len(taken)):
            frames = self._load(kind, wanted, rows, readers)
            taken += [(frames[row], row) for row in wanted if row in frames]
        return taken

    def _with_substitutes(self, kind, rows, readers):
        """[(frames, row)] of a batch, every place filled."""
        places = [row for _ in range(self.batch_size) if (row := rows.next_of(kind)) is not None]
        frames, chosen = {}, [self._usable(row) for row in places]
        while missing := [row for row in chosen if row not in frames]:
            frames |= self._load(kind, missing, rows, readers)
            chosen = [self._usable(row) for row in places]
        return [(frames[row], row) for row in chosen]

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

    def _load(self, kind, wanted, rows, readers):
        """Frames [T, C, H, W] by row, of the wanted rows that are usable; starts to read those to come."""
        wanted = list(dict.fromkeys(wanted))
        for row in [*wanted, *rows.coming(rows.next_kind() or kind, self._num_ahead)]:
            if row not in self._reading and row not in self.bad_rows:
                self._reading[row] = readers.submit(self._read, row)
        read = []
        for row in wanted:
            clip = self._reading.pop(row).result()
            if isinstance(clip, ValueError):
                self._reject(row, str(clip))
            else:
                read.append(clip)
        video_BTCHW, kept = self._deliver(kind, read) if read else ((), [])
        return dict(zip(kept, video_BTCHW, strict=True))

    def _read(self, row):
        """The clip, read; the ValueError where it is not usable."""
        fps = self.bucket.fps if self.fps is None else float(self.fps[row])
        if not fps > 0:
            raise ValueError(f"the frame rate of clip {self.clips[row].clip_id} is {fps}; use one above 0")
        try:
            return read_clip(self.clips[row], row, self.bucket, fps, self.dali_decodes)
        except ValueError as error:
            return error

    def _deliver(self, kind, read):
        """Frames and rows of the clips DALI could deliver."""
        try:
            return self._run(kind, read), [clip.row for clip in read]
        except RuntimeError as error:
            # DALI fails the batch as a whole and its pipeline with it: find the culprit one by one
            del self._pipelines[kind]
            if len(read) > 1:
                parts = [self._deliver(kind, [clip]) for clip in read]
                videos = [video for video, kept in parts if kept]
                return (torch.cat(videos) if videos else ()), [row for _, kept in parts for row in kept]
            clip = self.clips[read[0].row]
            self._reject(
                read[0].row, f"clip {clip.clip_id}: {clip.path}: corrupt: {dali_graphs.dali_reason(error)}"
            )
            return (), []

    def _run(self, kind, read):
        if kind not in self._pipelines:
            build = dali_graphs.decode_and_fit if self.dali_decodes else dali_graphs.normalise
            self._pipelines[kind] = build(self.bucket, self.batch_size, self.num_threads, self.device_id)
        pipeline = self._pipelines[kind]
        arrays_of = dali_graphs.to_decode if self.dali_decodes else dali_graphs.decoded
        for name, arrays in arrays_of(read).items():
            pipeline.feed_input(name, arrays)
        (output,) = pipeline.run()
        if self.device_id is not None:
            return dali_graphs.from_gpu(output.as_tensor(), self.device_id)
        delivered = torch.from_numpy(np.asarray(output.as_tensor()))  # DALI's memory: it uses it again
        return _empty(delivered.shape).copy_(delivered)

    def _reject(self, row, reason):
        if row not in self.bad_rows:
            self.bad_rows.add(row)
            record_unusable(self.quarantine, self.clips[row].clip_id, self.clips[row].path, reason)


def _stack(videos):
    """[B, T, C, H, W]; without a copy where the videos are one tensor's, in order."""
    whole = videos[0]._base
    if whole is not None and [v.data_ptr() for v in videos] == [v.data_ptr() for v in whole]:
        return whole
    if videos[0].is_cuda:
        return torch.stack(videos)
    return torch.stack(videos, out=_empty((len(videos), *videos[0].shape)))


def _empty(shape):
    """float32 on the host for a batch; pinned where a GPU will fetch it."""
    if torch.cuda.is_available():
        return torch.empty(shape, dtype=torch.float32, pin_memory=True)
    return torch.from_numpy(np.empty(shape, np.float32))  # numpy asks for large pages: a quarter of the time
