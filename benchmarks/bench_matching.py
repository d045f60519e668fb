"""The matcher on candidate pairs, on the CPU: seconds and encoder passes a pair, against plain forward passes.

    plain      the released algorithm: a forward pass of both pictures for each of a pair's views (1, or 35 with local
               crops), all of a pair in one batch; its views are cut before the clock starts
    shared     `score_pairs`, from files: each picture encoded once for all of its pairs

`alone` is a pair whose pictures are in no other pair, `2x2` all pairs of 2 queries and 2 references. Both give the same
scores before the clock of `shared` starts. The clock counts processor time, one thread: other work on the machine does
not slow it much. `encoder_passes`, `fusion_passes` and `seconds` are those of a pair.

    pytest benchmarks/bench_matching.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from copynce.data import Manifest
from copynce.data.synthetic import make_pictures
from copynce.models import Matcher, build_matcher
from copynce.retrieval.crops import lce_forwards, lce_query, lce_reference, one_of_one
from copynce.retrieval.matching import score_pairs
from dali_pipelines import CropLoader, LoaderOptions

SIZE = 112
PICTURES = 4  # the first half are queries


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    torch.manual_seed(0)
    return build_matcher("vit_small_patch14_dinov2", img_size=SIZE).eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_pictures(tmp_path_factory.mktemp("pictures"), PICTURES, seed=1)


def views(paths: list[Path], cuts: object) -> torch.Tensor:
    """[N, V, 3, S, S]."""
    options = LoaderOptions(size=SIZE, batch_size=1)
    loader = CropLoader(paths, cuts, options, on_broken=lambda path, why: None)  # type: ignore[arg-type]
    return torch.cat([found for _, found in loader])


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("kind", ["vanilla", "local_crops"])
@pytest.mark.parametrize("pairs", ["alone", "2x2"])
@pytest.mark.parametrize("way", ["plain", "shared"])
def test_pairs(benchmark, matcher: Matcher, pictures: list[Path], kind: str, pairs: str, way: str) -> None:  # type: ignore[no-untyped-def]
    count = 1 if pairs == "alone" else PICTURES // 2
    names = [str(i) for i in range(count)]
    sides = pictures[:count], pictures[PICTURES // 2 :][:count]
    query_list, reference_list = (Manifest(names, paths, paths[0].parent) for paths in sides)
    each = [(q, r) for q in range(count) for r in range(count)]
    columns = np.array(each).astype(str).astype(object)
    crops = kind == "local_crops"
    cuts = (lce_query, lce_reference) if crops else (one_of_one, one_of_one)
    query, reference = (views(paths, cut) for paths, cut in zip(sides, cuts, strict=True))
    forwards = torch.tensor(lce_forwards() if crops else [(0, 0)])
    facts = {"encoder_passes": 2.0 * len(forwards), "fusion_passes": float(len(forwards))}

    def plain() -> np.ndarray:
        with torch.inference_mode():
            logits = [matcher(query[q][forwards[:, 0]], reference[r][forwards[:, 1]]) for q, r in each]
        return torch.stack(logits).sigmoid().amax(1).numpy()

    def shared() -> np.ndarray:
        pairs = columns[:, 0], columns[:, 1]
        found = score_pairs(matcher, pairs, query_list, reference_list, local_crops=crops, precision="fp32", threads=1)
        facts.update(encoder_passes=found.encodings / len(each), fusion_passes=found.fusions / len(each))
        return found.scores

    if way == "shared":
        np.testing.assert_allclose(shared(), plain(), atol=1e-5)
    benchmark.pedantic(plain if way == "plain" else shared, rounds=2)
    benchmark.extra_info.update(facts)
    if benchmark.enabled:
        benchmark.extra_info["seconds"] = round(benchmark.stats.stats.min / len(each), 4)
