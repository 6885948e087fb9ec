"""The network over siblings: its laws, what it makes of the worst that can come in, and where it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.siblings.clusters import Clusters
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet, Verdict
from iou_refiner.structures import Detections
from tests.kit.crowds import LIMIT, SMALL, clusters_of, limits_of, make_crowd, make_net
from tests.kit.scenes import seeds

EMBEDDING = 6


@torch.no_grad()
def judge(net: SiblingNet, candidates: Detections, clusters: Clusters | None = None, **changes: Any) -> Verdict:
    """The verdict on one image."""
    columns = {"boxes": candidates.boxes, "scores": candidates.scores, "limits": limits_of(candidates)} | changes
    return net(**columns, clusters=clusters_of(candidates) if clusters is None else clusters)


def same(ours: Verdict, theirs: Verdict) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def some(verdict: Verdict, rows: Tensor) -> Verdict:
    return Verdict(*(column[rows] for column in verdict))


def test_what_it_gives_has_shapes_and_ranges():
    candidates, _ = make_crowd(0)
    verdict, count = judge(make_net(), candidates), len(clusters_of(candidates))
    assert [tuple(column.shape) for column in verdict] == [(count,), (count, 4), (count, 10)]
    assert all(column.dtype == torch.float32 for column in verdict)
    for column in (verdict.iou, verdict.scores):
        assert column.shape == (count,)
        assert ((column >= 0) & (column <= 1)).all()
        assert column.std() > 0.01
    torch.testing.assert_close(verdict.scores, torch.stack([row.sigmoid().mean() for row in verdict.share_logits]))


# ---- Laws. ----


@given(seed=seeds)
def test_the_verdict_does_not_depend_on_other_images(seed):
    net, images = make_net(), [make_crowd(seed + k)[0] for k in range(3)]
    images[1] = images[1][:0]
    columns = {name: torch.cat([getattr(image, name) for image in images]) for name in ("boxes", "scores", "labels")}
    parts = [clusters_of(image) for image in images]
    clusters = Clusters.concat(parts, [len(image) for image in images])
    together = judge(net, Detections(**columns), clusters)
    for part, image in zip(together_split(together, parts), images, strict=True):
        same(part, judge(net, image))


def together_split(verdict: Verdict, parts: list[Clusters]) -> list[Verdict]:
    return [Verdict(*columns) for columns in zip(*(c.split([len(p) for p in parts]) for c in verdict), strict=True)]


@given(seed=seeds)
def test_the_verdict_does_not_depend_on_other_labels(seed):
    net, (candidates, _) = make_net(), make_crowd(seed, labels=2)
    together, clusters = judge(net, candidates), clusters_of(candidates)
    labels = candidates.labels[clusters.survivors]
    for label in labels.unique():
        same(some(together, labels == label), judge(net, candidates[candidates.labels == label]))


@given(seed=seeds)
def test_the_verdict_does_not_depend_on_the_order_of_the_candidates(seed):
    net, (candidates, _) = make_net(), make_crowd(seed)
    order = torch.randperm(len(candidates))
    same(judge(net, candidates[order]), judge(net, candidates))  # survivors come by score


@given(seed=seeds, factor=st.floats(0.05, 200))
def test_boxes_and_limits_times_a_number_give_the_same_verdict(seed, factor):
    net, (candidates, _) = make_net(), make_crowd(seed)
    inside = ((candidates.boxes > 25) & (candidates.boxes < LIMIT - 25)).all(1)  # touch no border at any scale
    sizes = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).amin(1)
    candidates = candidates[inside & (sizes > 1)]
    clusters = clusters_of(candidates)
    larger = judge(net, candidates, clusters, boxes=candidates.boxes * factor, limits=limits_of(candidates) * factor)
    same(larger, judge(net, candidates, clusters))


def test_touching_the_border_is_seen():
    candidates = Detections(torch.tensor([[50.0, 50, 90, 90]]), torch.tensor([0.5]), torch.zeros(1, dtype=torch.int64))
    net, verdicts = make_net(), []
    for limit in ([90.5, 480, 90.5, 480], [91.5, 480, 91.5, 480]):
        verdicts.append(judge(net, candidates, limits=torch.tensor([limit])))
    assert (verdicts[0].share_logits - verdicts[1].share_logits).abs().min() > 0.01


def test_every_kind_of_evidence_is_heard():
    """Siblings, rivals, crowding and scores: take one away, and the verdict differs."""
    net, (candidates, _) = make_net(), make_crowd(3, objects=2, around=20, labels=1)
    clusters = clusters_of(candidates)
    before = judge(net, candidates)
    assert clusters.is_rival.any()
    changes = {
        "is_sibling": torch.zeros_like(clusters.is_sibling),
        "is_rival": torch.zeros_like(clusters.is_rival),
        "crowding": torch.zeros_like(clusters.crowding),
    }
    for name, value in changes.items():
        without = judge(net, candidates, Clusters(**{**vars(clusters), name: value}))
        assert all((ours - theirs).abs().max() > 0.01 for ours, theirs in zip(without, before, strict=True)), name
    others = judge(net, candidates, clusters, scores=1 - candidates.scores)
    assert (others.share_logits - before.share_logits).abs().max() > 0.01


# ---- The worst that can come in. ----

_edge = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 320.0, 640.0, -40.0, 1e6, 1e30])
_row = st.tuples(_edge, _edge, _edge, _edge, st.sampled_from([0.0, 1e-12, 0.5, 1.0]), st.integers(0, 1))


@given(rows=st.lists(_row, min_size=1, max_size=9), embedding=st.booleans())
def test_it_stays_finite(rows, embedding):
    columns = torch.tensor(rows, dtype=torch.float64)
    boxes = torch.cat([columns[:, :4].view(-1, 2, 2).amin(1), columns[:, :4].view(-1, 2, 2).amax(1)], 1)
    candidates = Detections(boxes.float(), columns[:, 4].float(), columns[:, 5].long())
    net, clusters = make_net(EMBEDDING), clusters_of(candidates)
    seen = torch.randn(len(clusters), EMBEDDING) if embedding else None
    verdict = judge(net, candidates, clusters, embedding=seen)
    for column in (*verdict, verdict.iou, verdict.scores):
        assert torch.isfinite(column).all()


def test_of_no_candidates_there_is_no_verdict():
    none = make_crowd(0)[0][:0]
    verdict = judge(make_net(), none)
    assert [tuple(column.shape) for column in verdict] == [(0,), (0, 4), (0, 10)]
    assert verdict.scores.shape == (0,)


# ---- With features and without. ----


def test_the_embedding_joins_in_where_it_is_given():
    net, (candidates, _) = make_net(EMBEDDING), make_crowd(0)
    count = len(clusters_of(candidates))
    seen = torch.randn(count, EMBEDDING)
    without, given, half = (judge(net, candidates, embedding=e) for e in (None, seen, seen.half()))
    assert (without.share_logits - given.share_logits).abs().amin(1).min() > 0
    for one, other in zip(given, half, strict=True):  # as it is stored
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    blind = make_net()  # a network without features does not look at them
    same(judge(blind, candidates, embedding=seen), judge(blind, candidates))


# ---- Where it starts. ----


@pytest.mark.parametrize("embedding", [0, EMBEDDING])
def test_a_new_network_orders_as_the_class_score_does_and_hardly_moves(embedding):
    torch.manual_seed(1)
    net, (candidates, _) = SiblingNet(SiblingConfig(), embedding=embedding).eval(), make_crowd(0, objects=12, around=20)
    clusters = clusters_of(candidates, net.config)
    assert len(clusters) > 30
    seen = torch.randn(len(clusters), embedding) if embedding else None
    verdict, scores = judge(net, candidates, clusters, embedding=seen), candidates.scores[clusters.survivors]
    ranks = torch.stack([scores.argsort().argsort(), verdict.scores.argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.99
    torch.testing.assert_close(verdict.scores, scores, rtol=0, atol=0.1)
    # The siblings vote from the start, each box for itself and all others: a move to their mean, never beyond them.
    boxes, size = candidates.boxes, candidates.boxes[:, 2:] - candidates.boxes[:, :2]
    for row, survivor in enumerate(clusters.survivors):
        others = boxes[clusters.siblings[row][clusters.is_sibling[row]]]
        farthest = ((others - boxes[survivor]).abs() / size[survivor].repeat(2)).max() if len(others) else 0
        assert verdict.deltas[row, :2].abs().max() <= farthest + 0.05


def test_the_settings_are_small_enough_for_the_tests_of_bounds():
    clusters = clusters_of(make_crowd(0)[0])
    assert clusters.is_sibling.all(1).any()
    assert SMALL.siblings < 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_box_whose_features_are_not_finite_is_judged_without_them(bad):
    candidates, _ = make_crowd(0, labels=1)
    clusters = clusters_of(candidates)
    embedding = torch.randn(len(clusters), EMBEDDING, generator=torch.Generator().manual_seed(1))
    net = make_net(EMBEDDING)
    embedding[0] = bad
    verdict = judge(net, candidates, clusters, embedding=embedding)
    assert all(torch.isfinite(column).all() for column in verdict)
    embedding[:] = bad
    same(judge(net, candidates, clusters, embedding=embedding), judge(net, candidates, clusters))
