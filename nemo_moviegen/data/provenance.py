"""What latents were made with, as short texts: another autoencoder or text encoder is another text."""

from pathlib import Path

import xxhash

_EDGE = 1 << 20  # bytes at both ends of a file


def weights_fingerprint(model) -> str:
    """Of all numbers a module holds, in their own precision, and their names."""
    import torch

    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(dtype=torch.uint8).numpy().data)
    return digest.hexdigest()


def folder_fingerprint(folder) -> str:
    """Of the files below a folder: names, sizes, and the first and last MiB of each; not all of 20 GB."""
    digest = xxhash.xxh3_128()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - (_EDGE)))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()
