"""Near copies within a set of images, by their thumbnails. Pure arithmetic.

Two thumbnails are compared as `images.near_copies` compares them. Comparing all pairs would take time quadratic in the
number of images, so that only pairs whose hashes agree in part are looked at (locality-sensitive hashing).

Axes: N images, T thumbnail pixels (144), B bands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# On which sides of random hyperplanes a thumbnail lies: two that correlate by c lie on the same side of one with
# probability 1 - arccos(c) / pi (Charikar 2002, section 3), and share at least one of 16 bands of 32 with probability
# 0.9991 for c = 0.995, 0.99999 for 0.9975, 0.984 for 0.99 and 0.87 for 0.98.
_BANDS = 16
_BAND_BITS = 32
# A row is compared with the best so many of a bucket: without a limit, a lake of images that are all alike to the hash
# and different to the comparison would take quadratic time.
_MOST_COMPARED = 128
_FLAT_STD = 1.0  # grey levels; what varies less is rounding, and two of those are equal by accident
_ROUNDING = 1e-9
_CHUNK_ROWS = 8192


def near_duplicates(
    thumbnails_NT: npt.NDArray[np.uint8], best_first_N: Any, correlation: float
) -> npt.NDArray[np.bool_]:
    """Which images are near copies of a better one that stays.

    Greedy, from the best to the worst: an image is dropped if its thumbnail correlates at least this much with that of
    an image kept before it. What resembles only dropped ones stays, so that a chain of small changes is thinned out and
    not eaten up. Dropped images are always near copies; a near copy may be missed, with the probability that their
    hashes differ in every band (0.0009 for a correlation of 0.995, and less for closer copies), or if more than 128
    better images share its bucket in each of the bands that they share. A flat image resembles nothing.

    The sums are exact: the answer depends neither on the order of the rows nor on the machine. Memory is about half a
    kilobyte an image; time grows with N, plus the time for comparing what falls into one bucket.

    Args:
        thumbnails_NT: Greyscale miniatures, uint8 [N, 144].
        best_first_N: The rows' positions from the best to the worst, int [N], a permutation.
        correlation: Pearson's, in (0, 1], from which on two are copies. Below 0.98 many are missed.

    Returns:
        bool [N], true for what is to be dropped, in the order of the rows.

    Raises:
        ValueError: The order is not a permutation of the rows.
    """
    best_first = np.asarray(best_first_N, np.int64)
    count, pixels = thumbnails_NT.shape
    if not np.array_equal(np.sort(best_first), np.arange(count)):
        raise ValueError(f"best_first must be a permutation of the {count} rows")
    sums_N, deviations_N = _moments(thumbnails_NT)
    ranked = best_first[deviations_N[best_first] > _FLAT_STD * pixels]
    ranked_NT, sums_N, deviations_N = thumbnails_NT[ranked], sums_N[ranked], deviations_N[ranked]
    order_BN, first_BN, place_BN = _buckets(ranked_NT, sums_N)
    # Whatever has no better one in any of its buckets stays, and is settled before the loop.
    kept_N = (first_BN == place_BN).all(axis=0)
    for row in np.flatnonzero(~kept_N):
        better = _better(order_BN, first_BN[:, row], place_BN[:, row])
        better = better[kept_N[better]]
        # Sums of 144 products of bytes are whole numbers below 2**24, which float32 holds exactly.
        products = ranked_NT[better].astype(np.float32) @ ranked_NT[row].astype(np.float32)
        covariances = pixels * products.astype(np.float64) - sums_N[better] * sums_N[row]
        least = (correlation - _ROUNDING) * deviations_N[better] * deviations_N[row]
        kept_N[row] = not (covariances >= least).any()
    dropped_N = np.zeros(count, bool)
    dropped_N[ranked[~kept_N]] = True
    return dropped_N


def _moments(thumbnails_NT: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of the pixels, and their standard deviations times T, float64 [N] each."""
    sums_N = thumbnails_NT.sum(axis=1, dtype=np.int64)
    squares_N = np.empty_like(sums_N)
    for start in range(0, len(thumbnails_NT), _CHUNK_ROWS):
        wide = thumbnails_NT[start : start + _CHUNK_ROWS].astype(np.int64)
        squares_N[start : start + _CHUNK_ROWS] = (wide * wide).sum(axis=1)
    deviations_N: npt.NDArray[np.float64] = np.sqrt(thumbnails_NT.shape[1] * squares_N - sums_N * sums_N)
    return sums_N.astype(np.float64), deviations_N


def _buckets(
    ranked_NT: npt.NDArray[np.uint8], sums_N: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows bucket by bucket, the better first; where each row's bucket begins; where the row is. int32 [B, N] each."""
    keys_NB = _hashes(ranked_NT, sums_N)
    shape = (_BANDS, len(ranked_NT))
    order_BN, first_BN, place_BN = (np.empty(shape, np.int32) for _ in range(3))
    places = np.arange(len(ranked_NT), dtype=np.int32)
    for band in range(_BANDS):
        order = np.argsort(keys_NB[:, band], kind="stable")
        keys = keys_NB[order, band]
        begins = np.ones(len(keys), bool)
        begins[1:] = keys[1:] != keys[:-1]
        order_BN[band] = order
        first_BN[band, order] = np.maximum.accumulate(np.where(begins, places, 0))
        place_BN[band, order] = places
    return order_BN, first_BN, place_BN


def _hashes(ranked_NT: npt.NDArray[np.uint8], sums_N: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """On which sides of the hyperplanes each centred thumbnail lies, one number for each band, uint32 [N, B]."""
    pixels = ranked_NT.shape[1]
    generator = np.random.default_rng(0)
    # Signs instead of normal numbers: the products are whole numbers below 2**24 then, and exact whatever adds them up.
    planes = generator.integers(0, 2, (pixels, _BANDS * _BAND_BITS)).astype(np.float32) * 2 - 1
    keys_NB = np.empty((len(ranked_NT), _BANDS), np.uint32)
    for start in range(0, len(ranked_NT), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        centred = pixels * ranked_NT[chunk].astype(np.float32) - sums_N[chunk, None].astype(np.float32)
        keys_NB[chunk] = np.packbits(centred @ planes > 0, axis=1).view(np.uint32)
    return keys_NB


def _better(
    order_BN: npt.NDArray[np.int32], first_B: npt.NDArray[np.int32], place_B: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Better rows that share a bucket with one, the best of each bucket; those of several buckets are repeated."""
    shared = np.flatnonzero(first_B < place_B)
    ends = np.minimum(place_B, first_B + _MOST_COMPARED)
    return np.concatenate([order_BN[band, first_B[band] : ends[band]] for band in shared])
