"""Groups of copies by complete link: every two members of a group are a pair by themselves.

Nobody is in a group by a chain of weak links: two crops of one picture that share no pixel are both its copies and not
each other's, and only one of them stands in its group. SciPy has complete linkage for a dense matrix [N, N]; here what
is not listed is no pair, so that 10^5 pictures with a few pairs each take a second.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike


def complete_groups(count: int, pairs: ArrayLike, probabilities: ArrayLike, threshold: float) -> list[list[int]]:
    """The groups of two and more of `count` pictures, members ascending, ordered by the first.

    pairs: int [P, 2], two different places below `count` each, no pair twice in either order. probabilities: float [P],
    of being copies; a pair that is not listed has none. The two groups whose least probable pair is the most probable
    become one, again and again, as long as that pair reaches `threshold` (above 0); of equal ones those whose first
    members come first. Raises ValueError for pairs that are none.

    >>> complete_groups(4, [[0, 1], [1, 2], [0, 2], [2, 3]], [0.99, 0.97, 0.96, 0.98], 0.95)
    [[0, 1], [2, 3]]
    """
    ends, given = np.asarray(pairs, np.int64).reshape(-1, 2), np.asarray(probabilities, np.float64)
    if given.shape != (len(ends),):
        raise ValueError(f"probabilities must be [P] = [{len(ends)}] as the pairs, got {list(given.shape)}")
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold}")
    if len(ends) and not (ends.min() >= 0 and ends.max() < count and np.all(ends[:, 0] != ends[:, 1])):
        raise ValueError(f"pairs must be two different places from 0 to {count - 1} each")
    if len(np.unique(np.sort(ends, axis=1), axis=0)) < len(ends):
        raise ValueError("a pair is listed twice")
    # A group goes by its first member. links[a][b]: the least probable pair between a and b, where all of them are
    # pairs; of those in the heap that say something else a merge has made other links.
    links: dict[int, dict[int, float]] = {}
    members: dict[int, list[int]] = {}
    for (one, other), probability in zip(ends.tolist(), given.tolist(), strict=True):
        if probability >= threshold:
            links.setdefault(one, {})[other] = links.setdefault(other, {})[one] = probability
            members[one], members[other] = [one], [other]
    heap = [(-probability, a, b) for a, others in links.items() for b, probability in others.items() if a < b]
    heapq.heapify(heap)
    while heap:
        negative, a, b = heapq.heappop(heap)
        if links[a].get(b) != -negative:
            continue
        members[a] += members.pop(b)
        mine, others = links[a], links[b]
        links[b] = {}
        for c in {*mine, *others} - {a, b}:
            old, new = mine.pop(c, None), others.get(c)
            links[c].pop(a, None)
            links[c].pop(b, None)
            if old is None or new is None:
                continue
            mine[c] = links[c][a] = min(old, new)
            if new < old:
                heapq.heappush(heap, (-new, min(a, c), max(a, c)))
        mine.pop(b, None)
    return sorted(sorted(group) for group in members.values() if len(group) > 1)
