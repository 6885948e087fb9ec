"""The training of a network over siblings: it learns what siblings tell, and is the same each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes
from iou_refiner.checks import DataError
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.training.candidate_set import candidate_samples
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.shares import true_positives
from iou_refiner.training.sibling_settings import SiblingSettings
from iou_refiner.training.sibling_training import train_siblings
from tests.kit.crowds import LIMIT, SMALL, make_crowd, make_saved

QUICK = SiblingSettings(epochs=2, lr=5e-3)


def make_images(count: int, seed: int = 0) -> list[ClusterSamples]:
    return candidate_samples(*make_saved(count, seed), SMALL, most=count)


def make_network(embedding: int = 0) -> SiblingNet:
    torch.manual_seed(0)
    return SiblingNet(SMALL, embedding=embedding)


def order(scores: Tensor, positive: Tensor) -> float:
    """How often a true positive stands before another detection: 1 always, 0.5 by chance."""
    ahead = scores[positive][:, None] - scores[~positive][None]
    return float(((ahead > 0).double() + (ahead == 0).double() / 2).mean())


@pytest.fixture(scope="module")
def trained() -> tuple[SiblingNet, list[dict[str, float]]]:
    net = make_network()
    history = train_siblings(net, make_images(100), SiblingSettings(epochs=10, lr=5e-3))
    return net, history


@torch.no_grad()
def test_it_learns_what_siblings_tell_and_scores_do_not(trained: Any) -> None:
    net, history = trained
    assert not net.training
    assert [row["epoch"] for row in history] == list(range(1, 11))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    by_class, by_siblings, gain = [], [], []
    for image in make_images(40, seed=1):  # images that it has not seen
        verdict = net(image.boxes, image.scores, image.limits, image.clusters)
        rows, (targets,) = image.clusters.survivors, image.targets
        boxes, labels = image.boxes[rows], image.labels[rows]
        moved = decode_boxes(verdict.deltas, boxes)
        for scores, out in ((image.scores[rows], by_class), (verdict.scores, by_siblings)):
            out.append(order(scores, true_positives(moved, scores, labels, targets)[:, 0] > 0))
        before, after = (targets.true_iou(each, labels) for each in (boxes, moved))
        gain.append((after - before)[before > 0.5])
    means = [float(torch.tensor(values).nanmean()) for values in (by_class, by_siblings)]
    assert means[0] < 0.8  # boxes that are duplicates have lower ones
    assert means[1] > 0.95
    assert torch.cat(gain).mean() > 0.08


def test_the_same_seed_gives_the_same_bytes() -> None:
    images, weights = make_images(9), []
    for seed in (0, 0, 1):
        net = make_network()
        train_siblings(net, images, QUICK, seed=seed)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_progress_counts_every_step() -> None:
    seen: list[tuple[Any, ...]] = []
    train_siblings(make_network(), make_images(9), QUICK, progress=lambda *said: seen.append(said))
    assert seen == [("training on siblings", step, 4) for step in range(1, 5)]


def test_with_embeddings_it_learns_for_both_ways_of_use() -> None:
    """What the embedding tells is learned, and without it the network still knows what siblings tell."""
    images = []
    for image in make_images(60):
        rows, (targets,) = image.clusters.survivors, image.targets
        fits = true_positives(image.boxes[rows], image.scores[rows], image.labels[rows], targets)[:, 0] > 0
        images.append(replace(image, embedding=torch.stack([fits, ~fits], 1).half()))
    net = make_network(embedding=2)
    train_siblings(net, images, SiblingSettings(epochs=8, lr=5e-3, embedding_dropout=0.5))
    batch = ClusterSamples.concat(images)
    with torch.no_grad():
        given = net(batch.boxes, batch.scores, batch.limits, batch.clusters, batch.embedding).scores
        blind = net(batch.boxes, batch.scores, batch.limits, batch.clusters).scores
        lied = net(batch.boxes, batch.scores, batch.limits, batch.clusters, 1 - batch.embedding).scores
    assert batch.embedding is not None
    fits = batch.embedding[:, 0] > 0
    assert order(blind, fits) > 0.8
    assert order(given, fits) > order(blind, fits) > order(lied, fits)


def test_without_embedding_dropout_every_batch_has_its_embedding() -> None:
    seen: list[bool] = []
    net = make_network(embedding=2)
    net.register_forward_pre_hook(lambda _, given: seen.append(given[4] is not None))
    images = [replace(image, embedding=torch.zeros(len(image.clusters), 2)) for image in make_images(16)]
    train_siblings(net, images, replace(QUICK, embedding_dropout=0.0))
    assert seen == [True] * 4
    seen.clear()
    train_siblings(net, images, replace(QUICK, embedding_dropout=1.0))
    assert seen == [False] * 4


def test_images_without_candidates_teach_nothing() -> None:
    images = make_images(3)
    empty = ClusterSamples.of(make_crowd(0)[0][:0], LIMIT, images[0].targets[0], SMALL)
    with pytest.raises(DataError, match="No image has a candidate to learn from"):
        train_siblings(make_network(), [empty, empty], QUICK)
    with pytest.raises(DataError, match="No image has a candidate to learn from"):
        train_siblings(make_network(), [], QUICK)
    ours, theirs = make_network(), make_network()
    train_siblings(ours, [empty, *images], QUICK)
    train_siblings(theirs, images, QUICK)
    assert torch.equal(ours.output.weight, theirs.output.weight)


def test_a_loss_that_is_not_finite_is_named() -> None:
    images = make_images(3)
    boxes = images[1].boxes.clone()
    boxes[images[1].clusters.survivors[0], 2] = torch.nan
    images[1] = replace(images[1], boxes=boxes)
    with pytest.raises(
        DataError, match=r"The loss over siblings is nan. Are the candidates' boxes and scores finite\?"
    ):
        train_siblings(make_network(), images, QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "`epochs`"),
        ({"epochs": 2.5}, "`epochs`"),
        ({"epochs": "many"}, '`epochs` must be a number or "auto"'),
        ({"batch_size": 0}, "`batch_size`"),
        ({"lr": 0}, "`lr`"),
        ({"lr": float("nan")}, "`lr`"),
        ({"weight_decay": -1}, "`weight_decay`"),
        ({"sibling_dropout": 1.5}, "`sibling_dropout`"),
        ({"embedding_dropout": -0.1}, "`embedding_dropout`"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiblingSettings(**wrong)


@pytest.mark.parametrize(("images", "epochs"), [(1, 10), (0, 10), (1600, 10), (3200, 5), (5333, 3), (10**6, 3)])
def test_automatic_epochs_make_as_many_images(images: int, epochs: int) -> None:
    assert SiblingSettings().epochs_of(images) == epochs
    assert SiblingSettings(epochs=7).epochs_of(images) == 7
