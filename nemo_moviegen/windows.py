"""Overlapping windows over a length, and weights that blend what was made in each (Movie Gen s3.1.1).

    window 0    0 1 2 3 4 5 6 7                     overlap 4: weights of window 0 over it 1, 3/4, 1/2, 1/4,
    window 1            4 5 6 7 8 9 ...             of window 1 0, 1/4, 1/2, 3/4

Plain numbers: the autoencoder's tiles in time and space use them, on any device.
"""


def windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of windows of `size` that cover 0 .. length - 1, each `overlap` into the one before.

    The last may be shorter, but reaches past its overlap. A size of 0 is one window over everything.
    ValueError where an overlap is longer than half a window: three would meet.
    """
    if length < 1:
        raise ValueError(f"a length of {length} has no windows; give 1 or more")
    if size == 0:
        return [(0, length)]
    if size < 1 or not 0 <= 2 * overlap <= size:
        raise ValueError(
            f"windows of {size} with an overlap of {overlap}: the overlap must be 0 to half of the window, "
            f"so use at most {max(size, 0) // 2}, or larger windows"
        )
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        start = spans[-1][0] + size - overlap
        spans.append((start, min(start + size, length)))
    return spans


def blend_weights(spans: list[tuple[int, int]]) -> list[list[float]]:
    """For each window its weight at each place: linear over an overlap, one elsewhere; they sum to one.

    Place j of N in an overlap has j / N of the later window (s3.1.1, whose index runs the other way).
    """
    weights = [[1.0] * (end - start) for start, end in spans]
    for number in range(1, len(spans)):
        start, overlap = spans[number][0], spans[number - 1][1] - spans[number][0]
        for j in range(overlap):
            weights[number][j] = j / overlap
            weights[number - 1][start + j - spans[number - 1][0]] = 1 - j / overlap
    return weights
