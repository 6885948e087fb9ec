"""What a network over siblings is trained on: joined, seen in a mirror, thinned."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.siblings.clusters import Clusters
from iou_refiner.stage.nms import nms
from iou_refiner.structures import Detections
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.samples import Targets
from tests.kit.crowds import LIMIT, SMALL, WIDTH, make_crowd, make_net
from tests.kit.scenes import seeds


def samples_of(seed: int, **options: Any) -> ClusterSamples:
    return ClusterSamples.of(*reordered(make_crowd(seed, **options)), SMALL)


def reordered(crowd: tuple[Detections, Targets]) -> tuple[Detections, torch.Tensor, Targets]:
    return crowd[0], LIMIT, crowd[1]


def same(ours: Clusters, theirs: Clusters) -> None:
    for field in fields(Clusters):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_the_survivors_are_those_of_the_networks_suppression() -> None:
    candidates, targets = make_crowd(0)
    few = replace(SMALL, most_survivors=3)
    samples = ClusterSamples.of(candidates, LIMIT, targets, few)
    keep = nms(candidates.boxes, candidates.scores, candidates.labels, threshold=0.7)
    assert len(keep) > 3
    assert torch.equal(samples.clusters.survivors, keep[:3])
    assert samples.survivors == (3,)
    assert torch.equal(samples.limits, LIMIT.expand(len(candidates), 4))


def test_boxes_without_a_size_and_numbers_that_are_not_finite_are_left_out() -> None:
    candidates, targets = make_crowd(0)
    boxes, scores = candidates.boxes.clone(), candidates.scores.clone()
    boxes[0], boxes[1, 2], scores[2] = torch.nan, boxes[1, 0], torch.nan
    samples = ClusterSamples.of(candidates.replace(boxes=boxes, scores=scores), LIMIT, targets, SMALL)
    expected = ClusterSamples.of(candidates[torch.arange(len(boxes)) > 2], LIMIT, targets, SMALL)
    assert torch.equal(samples.boxes, expected.boxes)
    same(samples.clusters, expected.clusters)


def test_several_images_in_one() -> None:
    parts = [samples_of(0), samples_of(1)]
    together = ClusterSamples.concat(parts)
    for name in ("boxes", "scores", "labels", "limits"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(part, name) for part in parts]))
    same(together.clusters, Clusters.concat([part.clusters for part in parts], [len(part.boxes) for part in parts]))
    assert together.survivors == tuple(len(part.clusters) for part in parts)
    assert together.targets == tuple(part.targets[0] for part in parts)
    assert together.embedding is None
    seen = [replace(part, embedding=torch.randn(len(part.clusters), 2)) for part in parts]
    embedding = ClusterSamples.concat(seen).embedding
    assert embedding is not None
    assert torch.equal(embedding, torch.cat([part.embedding for part in seen if part.embedding is not None]))


@given(seed=seeds)
def test_a_mirror_in_a_mirror_shows_the_image(seed: int) -> None:
    samples = samples_of(seed)
    seen = samples.mirrored()
    again = seen.mirrored()
    torch.testing.assert_close(again.boxes, samples.boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.targets[0].gt_boxes, samples.targets[0].gt_boxes, rtol=0, atol=1e-4)
    assert (seen.boxes[:, 2:] > seen.boxes[:, :2]).all()
    torch.testing.assert_close(seen.boxes[:, 0], WIDTH - samples.boxes[:, 2])
    torch.testing.assert_close(seen.boxes[:, 1::2], samples.boxes[:, 1::2])
    for name in ("scores", "labels", "limits"):
        assert torch.equal(getattr(seen, name), getattr(samples, name))
    same(seen.clusters, samples.clusters)


@given(seed=seeds)
def test_in_a_mirror_boxes_fit_as_well_and_are_siblings_as_before(seed: int) -> None:
    samples = samples_of(seed)
    seen = samples.mirrored()
    ours, theirs = (s.targets[0].true_iou(s.boxes, s.labels) for s in (seen, samples))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    clusters = Clusters.of(seen.boxes, seen.scores, seen.labels, seen.clusters.survivors, SMALL)
    # An overlap may differ by rounding, and with it who is last: the evidence of the siblings is the same.
    torch.testing.assert_close(clusters.is_sibling.sum(1), samples.clusters.is_sibling.sum(1))
    torch.testing.assert_close(clusters.crowding, samples.clusters.crowding)


def test_in_a_mirror_crowds_stay_where_they_are_in_the_image() -> None:
    candidates, targets = make_crowd(0)
    crowd = torch.tensor([[10.0, 20, 110, 220]])
    targets = replace(targets, ignored_boxes=crowd, ignored_labels=torch.zeros(1, dtype=torch.int64))
    seen = ClusterSamples.of(candidates, LIMIT, targets, SMALL).mirrored()
    assert seen.targets[0].ignored_boxes.tolist() == [[WIDTH - 110, 20, WIDTH - 10, 220]]


@torch.no_grad()
def test_an_embedding_is_not_that_of_the_mirror() -> None:
    samples = samples_of(0)
    with_embedding = replace(samples, embedding=torch.randn(len(samples.clusters), 3))
    assert with_embedding.mirrored().embedding is None
    net = make_net()
    verdicts = [net(s.boxes, s.scores, s.limits, s.clusters) for s in (samples, samples.mirrored())]
    assert not torch.allclose(verdicts[0].share_logits, verdicts[1].share_logits)  # it is another image


@given(share=st.floats(0, 1), seed=seeds)
def test_thinned_leaves_some_of_the_siblings(share: float, seed: int) -> None:
    samples = samples_of(3)
    thinned = samples.thinned(share, torch.Generator().manual_seed(seed))
    heard = thinned.clusters.is_sibling
    assert not (heard & ~samples.clusters.is_sibling).any()
    assert torch.equal(thinned.clusters.is_rival, samples.clusters.is_rival)
    assert torch.equal(thinned.clusters.siblings, samples.clusters.siblings)
    again = samples.thinned(share, torch.Generator().manual_seed(seed))
    assert torch.equal(again.clusters.is_sibling, heard)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.6, 1.0])
def test_thinned_by_a_share(share: float) -> None:
    samples = ClusterSamples.concat([samples_of(seed, objects=8) for seed in range(60)])
    before = samples.clusters.is_sibling.sum()
    assert before > 3000
    heard = samples.thinned(share, torch.Generator().manual_seed(0)).clusters.is_sibling.sum() / before
    assert float(heard) == pytest.approx(1 - share, abs=0.03)
