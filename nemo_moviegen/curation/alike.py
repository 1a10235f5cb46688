"""Clips that look alike: near-duplicates, and clusters that are sampled evenly (s3.2.1, App. B)."""

import numpy as np

_BLOCK = 1024
_EXACT_UP_TO = 100_000


def distinct(embedding_ND, order_N, cosine, exact_up_to=_EXACT_UP_TO) -> np.ndarray:
    """bool [N]: the rows that stay, so that no two of them have a cosine of `cosine` or more.

    Rows are taken in `order_N`, the best first; one that is too close to a row that stays is dropped, so
    each dropped row has a twin that stays. A row of zeros is like no other. Exact up to `exact_up_to` rows;
    beyond, twins are sought in the nearest of many cells, and one in a far cell can be missed.
    """
    vectors_ND = _normalised(embedding_ND)
    stays_N = np.zeros(len(vectors_ND), bool)
    index = _index(vectors_ND, exact_up_to)
    for start in range(0, len(vectors_ND), _BLOCK):
        rows = order_N[start : start + _BLOCK]
        block = vectors_ND[rows]
        nearest = index.search(block, 1)[0][:, 0] if index.ntotal else np.full(len(rows), -1.0)
        among = block @ block.T >= cosine
        chosen = np.zeros(len(rows), bool)
        for place in range(len(rows)):
            chosen[place] = nearest[place] < cosine and not (among[place, :place] & chosen[:place]).any()
        if chosen.any():
            index.add(block[chosen])
        stays_N[rows[chosen]] = True
    return stays_N


def clusters(embedding_ND, count, merge_cosine, seed) -> np.ndarray:
    """int [N]: cluster of each row by spherical k-means, clusters with centres that alike being one.

    `count` before merging; 0 = the square root of N.
    """
    import faiss

    vectors_ND = _normalised(embedding_ND)
    count = min(count or round(len(vectors_ND) ** 0.5), len(vectors_ND))
    if count <= 1:
        return np.zeros(len(vectors_ND), np.int64)
    kmeans = faiss.Kmeans(
        vectors_ND.shape[1], count, niter=25, seed=seed, spherical=True, min_points_per_centroid=1
    )
    kmeans.train(vectors_ND)
    label_N = kmeans.index.search(vectors_ND, 1)[1][:, 0]
    return _merged(kmeans.centroids, merge_cosine)[label_N]


def balanced(label_N, share, chance_N) -> np.ndarray:
    """bool [N]: the rows that stay when a cluster of n keeps min(n, k sqrt(n)), `share` of all rows in sum.

    So a row's probability is min(1, k / sqrt(n)). Counts are whole numbers that add up; within a cluster the
    rows of the lowest `chance_N` stay.
    """
    _, label_N, size_C = np.unique(label_N, return_inverse=True, return_counts=True)
    total = round(share * len(label_N))
    wanted_C = _root_shares(size_C, total)
    quota_C = np.floor(wanted_C + 1e-9).astype(np.int64)
    rest = np.argsort(quota_C - wanted_C, kind="stable")[: total - quota_C.sum()]
    quota_C[rest] += 1
    order_N = np.lexsort((chance_N, label_N))
    starts_C = np.cumsum(size_C) - size_C
    rank_N = np.empty(len(label_N), np.int64)
    rank_N[order_N] = np.arange(len(label_N)) - starts_C[label_N[order_N]]
    return rank_N < quota_C[label_N]


def _root_shares(size_C, total):
    """min(n, k sqrt(n)) for the k that makes them add up to `total`."""
    low, high = 0.0, float(np.sqrt(size_C.max()))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.minimum(size_C, middle * np.sqrt(size_C)).sum() < total else (low, middle)
        )
    return np.minimum(size_C, high * np.sqrt(size_C))


def _merged(centre_CD, cosine):
    """int [C]: one number for the centres that chains of likeness join."""
    label_C = np.arange(len(centre_CD))
    unit_CD = _normalised(centre_CD)
    for first, second in np.argwhere(np.triu(unit_CD @ unit_CD.T >= cosine, 1)):
        label_C[label_C == label_C[second]] = label_C[first]
    return label_C


def _index(vectors_ND, exact_up_to):
    import faiss

    size = vectors_ND.shape[1]
    if len(vectors_ND) <= exact_up_to:
        return faiss.IndexFlatIP(size)
    cells = max(1, round(len(vectors_ND) ** 0.5))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors_ND[:: max(1, len(vectors_ND) // (64 * cells))])
    index.nprobe = max(1, cells // 64)
    return index


def _normalised(embedding_ND):
    embedding_ND = np.ascontiguousarray(embedding_ND, np.float32)
    return embedding_ND / np.linalg.norm(embedding_ND, axis=1, keepdims=True).clip(1e-12)
