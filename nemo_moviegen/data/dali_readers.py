"""DALI's own readers over latents, for the benchmark to compare with: nothing trains from them.

Neither takes given rows nor checks what it read; `latents.py` says what follows from that.
"""


def webdataset_batches(shards, endings, batch_size):
    """Endless passes over tars, each an iterator over batches: a tensor list of bytes for each ending."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None, prefetch_queue_depth=2)
    def members():
        found = fn.readers.webdataset(
            paths=shards, ext=endings, dtypes=[types.UINT8] * len(endings), random_shuffle=True, name="reader"
        )
        return tuple(found) if isinstance(found, (list, tuple)) else found

    return _passes(members, batch_size)


def numpy_batches(folder, files, batch_size):
    """Endless passes over .npy files, each an iterator over batches: lists of one tensor list."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None, prefetch_queue_depth=2)
    def arrays():
        return fn.readers.numpy(
            file_root=str(folder),
            files=files,
            random_shuffle=True,
            cache_header_information=True,
            name="reader",
        )

    return _passes(arrays, batch_size)


def _passes(define, batch_size):
    pipeline = define()
    pipeline.build()
    while True:
        yield (list(pipeline.run()) for _ in range(pipeline.epoch_size("reader") // batch_size))
