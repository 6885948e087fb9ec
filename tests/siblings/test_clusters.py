"""Who is whose sibling: against a slow oracle in plain Python, and by its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.siblings.clusters import CROWDING, Clusters, reach
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.structures import Detections
from tests.kit.crowds import SMALL, clusters_of, make_crowd
from tests.kit.reference import box_iou
from tests.kit.scenes import seeds

SIZES = [SMALL, SiblingConfig(siblings=1, rivals=1), SiblingConfig(siblings=64, rivals=64)]


def listened_to(clusters: Clusters) -> list[tuple[int, list[int], list[int]]]:
    """Each survivor, its siblings and its rivals, in their order, as rows of the candidates."""
    rivals = clusters.survivors[clusters.rivals]
    return [
        (int(survivor), siblings[is_sibling].tolist(), others[is_rival].tolist())
        for survivor, siblings, is_sibling, others, is_rival in zip(
            clusters.survivors, clusters.siblings, clusters.is_sibling, rivals, clusters.is_rival, strict=True
        )
    ]


def oracle(candidates: Detections, survivors: list[int], config: SiblingConfig) -> list[tuple]:
    """The same by definition, and how crowded it is."""
    boxes, scores, labels = candidates.boxes.tolist(), candidates.scores.tolist(), candidates.labels.tolist()
    expected = []
    for survivor in survivors:
        iou = {
            other: box_iou(boxes[survivor], boxes[other])
            for other in range(len(boxes))
            if other != survivor and labels[other] == labels[survivor]
        }
        siblings = sorted((o for o in iou if iou[o] > 0.15), key=lambda o: -iou[o] * scores[o])
        rivals = sorted((o for o in iou if o in survivors and iou[o] > 0.02), key=lambda o: -iou[o])
        crowd = [math.log(1 + sum(value > at for value in iou.values())) for at in (0.5, 0.7, 0.9)]
        crowd += [sum(iou[other] > at for other in iou if other in survivors) for at in (0.3, 0.5)]
        expected.append((survivor, siblings[: config.siblings], rivals[: config.rivals], crowd))
    return expected


@pytest.mark.parametrize("config", SIZES)
@given(seed=seeds, objects=st.integers(1, 4))
def test_siblings_and_rivals_are_those_of_the_oracle(config, seed, objects):
    candidates, _ = make_crowd(seed, objects=objects, around=7)
    clusters = clusters_of(candidates, config)
    expected = oracle(candidates, clusters.survivors.tolist(), config)
    assert listened_to(clusters) == [row[:3] for row in expected]
    torch.testing.assert_close(clusters.crowding, torch.tensor([row[3] for row in expected]))
    counted = torch.tensor([math.exp(row[3][1]) - 1 for row in expected])
    torch.testing.assert_close(clusters.crowd_above_70, counted, rtol=0, atol=1e-4)
    assert clusters.crowding.shape == (len(clusters), CROWDING)
    assert clusters.siblings.shape == clusters.is_sibling.shape == (len(clusters), config.siblings)
    assert clusters.rivals.shape == clusters.is_rival.shape == (len(clusters), config.rivals)


@given(seed=seeds)
def test_nobody_is_its_own_sibling_and_labels_never_mix(seed):
    candidates, _ = make_crowd(seed, labels=2)
    twice = candidates[torch.arange(len(candidates)).repeat(2)]  # each box has a copy that is not itself
    for survivor, siblings, rivals in listened_to(clusters_of(twice, SiblingConfig(siblings=99))):
        assert survivor not in siblings + rivals
        assert {int(twice.labels[row]) for row in siblings + rivals} <= {int(twice.labels[survivor])}
        assert (survivor + len(candidates)) % len(twice) in siblings


@given(seed=seeds)
def test_the_order_of_the_candidates_does_not_matter(seed):
    candidates, _ = make_crowd(seed)
    clusters = clusters_of(candidates)
    order = torch.randperm(len(candidates))
    moved = candidates[order]
    survivors = order.argsort()[clusters.survivors]  # the same boxes
    again = Clusters.of(moved.boxes, moved.scores, moved.labels, survivors, SMALL)
    back = order.tolist()
    named = [(back[s], [back[o] for o in o1], [back[o] for o in o2]) for s, o1, o2 in listened_to(again)]
    assert named == listened_to(clusters)
    assert torch.equal(again.crowding, clusters.crowding)


@given(seed=seeds, gap=st.integers(0, 2))
def test_of_several_images_in_one_each_is_as_it_is_alone(seed, gap):
    images = [make_crowd(seed + k)[0] for k in range(2)]
    images.insert(gap, images[0][:0])  # and one without candidates
    parts = [clusters_of(image) for image in images]
    together = Clusters.concat(parts, [len(image) for image in images])
    expected, first = [], 0
    for image, part in zip(images, parts, strict=True):
        expected += [
            (first + survivor, [first + o for o in siblings], [first + o for o in rivals])
            for survivor, siblings, rivals in listened_to(part)
        ]
        first += len(image)
    assert listened_to(together) == expected
    assert torch.equal(together.crowding, torch.cat([part.crowding for part in parts]))
    assert int(together.siblings.max()) < first
    assert int(together.rivals.max()) < len(together)


def test_of_no_candidates_there_are_no_clusters():
    none = make_crowd(0)[0][:0]
    clusters = clusters_of(none)
    assert len(clusters) == 0
    assert clusters.siblings.shape == (0, SMALL.siblings)
    assert clusters.crowding.shape == (0, CROWDING)


def test_a_box_alone_hears_nobody():
    clusters = clusters_of(make_crowd(0)[0][:1])
    assert listened_to(clusters) == [(0, [], [])]
    assert not clusters.crowding.any()


def test_an_image_reaches_as_far_as_its_candidates():
    boxes = torch.tensor([[1.0, 2, 30, 40], [5, 6, 20, 90], [0, 0, torch.nan, 700], [0, 0, torch.inf, 800]])
    assert reach(boxes).tolist() == [30, 90, 30, 90]
    assert reach(boxes[2:]).tolist() == reach(boxes[:0]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_heads": 3}, "`attention_heads` must divide `width`, got 3 and 64"),
        ({"siblings": 0}, "`siblings`"),
        ({"rivals": 2.5}, "`rivals`"),
        ({"layers": 17}, "`layers`"),
        ({"width": 10**9}, "`width`"),
        ({"nms_threshold": 1.5}, "`nms_threshold`"),
        ({"most_survivors": float("nan")}, "`most_survivors`"),
    ],
)
def test_an_architecture_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SiblingConfig(**wrong)
