"""Finds near-duplicate source files by MinHash over token shingles.

Knows texts as sets of hashed five-token shingles and nothing of packages, licences or splits: whoever calls says
in which order files are offered, and the first of a family of near-duplicates is the one that stays.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

PERMUTATIONS = 128
ROWS_PER_BAND = 4
SHINGLE_TOKENS = 5

_TOKEN = re.compile(r"\w+|[^\w\s]")
_draw = np.random.default_rng(20240229)
_MULTIPLIERS = _draw.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_OFFSETS = _draw.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)
_PLACES = _draw.integers(1, 2**63, SHINGLE_TOKENS, dtype=np.uint64) | np.uint64(1)
_seen_tokens: dict[str, int] = {}


def signature(text: str) -> np.ndarray:
    """MinHash signature of one text: uint32[PERMUTATIONS].

    Two texts agree at each place with a probability equal to the Jaccard similarity of their sets of shingles
    (Broder, "On the resemblance and containment of documents", 1997). Whitespace does not count.
    """
    hashes = []
    for token in _TOKEN.findall(text):
        value = _seen_tokens.get(token)
        if value is None:
            value = _seen_tokens[token] = zlib.crc32(token.encode("utf-8", "surrogatepass"))
        hashes.append(value)
    if len(hashes) < SHINGLE_TOKENS:
        hashes += [0] * (SHINGLE_TOKENS - len(hashes))
    tokens = np.array(hashes, dtype=np.uint64)
    count = len(tokens) - SHINGLE_TOKENS + 1
    with np.errstate(over="ignore"):
        shingles = np.zeros(count, dtype=np.uint64)
        for place in range(SHINGLE_TOKENS):
            shingles += tokens[place : place + count] * _PLACES[place]
        shingles ^= shingles >> np.uint64(29)
        shingles = np.unique(shingles)
        smallest = np.empty(PERMUTATIONS, dtype=np.uint32)
        for first in range(0, PERMUTATIONS, 8):
            part = slice(first, first + 8)
            mixed = shingles[None, :] * _MULTIPLIERS[part, None] + _OFFSETS[part, None]
            smallest[part] = (mixed >> np.uint64(32)).min(axis=1).astype(np.uint32)
    return smallest


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Estimated Jaccard similarity of two signatures, in steps of 1 / PERMUTATIONS."""
    return float((one == other).mean())


def near_duplicates(signatures: Sequence[np.ndarray], threshold: float) -> dict[int, int]:
    """Maps each file to drop to the earlier file that it repeats, judged at `threshold` (0..1) of similarity.

    Candidates come from locality-sensitive hashing in bands of ROWS_PER_BAND rows (Indyk and Motwani, 1998), which
    finds a pair of similarity 0.8 with a probability above 0.999999; each candidate is then checked on its whole
    signature.
    """
    buckets: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(PERMUTATIONS // ROWS_PER_BAND)]
    dropped: dict[int, int] = {}
    for index, own in enumerate(signatures):
        keys = [own[band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].tobytes() for band in range(len(buckets))]
        candidates = sorted({other for bucket, key in zip(buckets, keys) for other in bucket.get(key, ())})
        for other in candidates:
            if similarity(own, signatures[other]) >= threshold:
                dropped[index] = other
                break
        else:
            for bucket, key in zip(buckets, keys):
                bucket[key].append(index)
    return dropped


def resembling(references: Sequence[np.ndarray], signatures: Sequence[np.ndarray], threshold: float) -> set[int]:
    """Indexes of `signatures` within `threshold` of similarity of any reference: every pair is compared."""
    found: set[int] = set()
    if not references or not signatures:
        return found
    stacked = np.stack(list(signatures))
    for reference in references:
        found.update(np.flatnonzero((stacked == reference).mean(axis=1) >= threshold).tolist())
    return found
