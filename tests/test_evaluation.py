"""Exact evaluation: a metric over a data set that no world size divides is that of one process, on real scans."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, log_loss, roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff
from tests.support.worlds import world_of

pytestmark = pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
NUM, BATCH_SIZE = 359, 32  # a prime number of scans, as many as examples/digits.py holds out
WORLDS = (1, 2, 3, 4)
PRECISIONS = ("32-true", "64-true")


ranks = world_of("processes", 4)


def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class RowByRow(nn.Module):
    """The net on every scan by itself: matrix products of other numbers of rows differ in their last bits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.cat([self.net(row) for row in x.split(1)])


def scans(dtype):
    digits = load_digits()
    images = torch.tensor(digits.images[:NUM], dtype=dtype) / 16
    return images, torch.tensor(digits.target[:NUM])


def fitted(dtype):
    """A net that is right now and then, and the scans."""
    images, labels = scans(dtype)
    net = make_net().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net, images, labels


def right(net, batches):
    """(right answers, samples) over all batches of this rank."""
    pairs = [((net(x).argmax(dim=1) == y).sum(), len(y)) for x, y in batches]
    return sum(count for count, _ in pairs), sum(seen for _, seen in pairs)


def cross_entropy(net, batches):
    """(sum of the losses in float64, samples) over all batches of this rank."""
    pairs = [(F.cross_entropy(net(x), y, reduction="none").double().sum(), len(y)) for x, y in batches]
    return sum(total for total, _ in pairs), sum(seen for _, seen in pairs)


def evaluate(rt, net, images, labels):
    """What a user computes over a whole data set, in three manners."""
    model = ff.eval_mode(ff.setup_model(rt, net))
    loader = ff.setup_dataloader(rt, DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE))
    accuracy = ff.value(rt, right, weighted=True)(model, ff.batches(rt, loader))
    loss = ff.value(rt, cross_entropy, weighted=True)(model, list(ff.batches(rt, loader)))

    parts = [ff.all_gather(rt, (ff.apply(rt, model, x), y), uneven=True) for x, y in ff.batches(rt, loader)]
    logits, found = (torch.cat(column) for column in zip(*parts, strict=True))

    own = [(ff.apply(rt, model, x), y) for x, y in ff.batches(rt, loader)]
    at_once = ff.all_gather(rt, tuple(torch.cat(column) for column in zip(*own, strict=True)), uneven=True)
    assert len(parts) > 1
    return {"accuracy": accuracy, "loss": loss, "in order": (logits, found), "at once": at_once}


def ranked(logits, labels):
    """Metrics that need all predictions, by scikit-learn; the order of the rows does not matter to them."""
    scores = logits.double().softmax(dim=1).numpy()
    area = roc_auc_score(labels, scores, multi_class="ovr")
    return area, f1_score(labels, logits.argmax(dim=1), average="macro")


def mean_loss(logits, labels):
    """The mean of the rows' losses, rounded once: fsum does not depend on the order."""
    return math.fsum(F.cross_entropy(logits, labels, reduction="none").double().tolist()) / len(labels)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", WORLDS)
def test_metrics_over_a_data_set_that_no_world_divides_are_those_of_one_process(ranks, world_size, precision):
    net, images, labels = fitted(ff.Precision.parse(precision).param_dtype)
    net = RowByRow(net)
    with torch.no_grad():
        logits = net(images)
    num_right = (logits.argmax(dim=1) == labels).sum().item()
    exact = mean_loss(logits, labels)
    assert 0.5 * NUM < num_right < NUM, "a metric that could be wrong"
    options = {"world_size": world_size, "strategy": "ddp", "precision": precision}
    for found in ranks.run(evaluate, net, images, labels, **options):
        assert found["accuracy"].dtype is found["loss"].dtype is torch.float64
        assert found["accuracy"].item() == num_right / NUM
        assert abs(found["loss"].item() - exact) <= math.ulp(exact)
        # Gathered batch by batch it stands in the data's own order, so that every function of it has the same bits.
        assert torch.equal(found["in order"][0], logits)
        assert torch.equal(found["in order"][1], labels)
        assert log_loss(labels, found["in order"][0].double().softmax(dim=1)) == log_loss(
            labels, logits.double().softmax(dim=1)
        )
        assert ranked(*found["at once"]) == ranked(logits, labels)
        assert mean_loss(*found["at once"]) == exact


def test_gathering_once_restores_the_order_by_a_column_of_places(ranks):
    """At four ranks the rows stand rank by rank; the places that travelled along put them back."""
    net, images, labels = fitted(torch.float64)
    for rows, expected in ranks.run(restored, RowByRow(net), images, labels, strategy="ddp", precision="64-true"):
        assert not torch.equal(rows, torch.arange(NUM))
        assert torch.equal(expected, RowByRow(net)(images))


def restored(rt, net, images, labels):
    model = ff.eval_mode(ff.setup_model(rt, net))
    data = TensorDataset(images, torch.arange(NUM))
    loader = ff.setup_dataloader(rt, DataLoader(data, batch_size=BATCH_SIZE))
    own = [(ff.apply(rt, model, x), places) for x, places in ff.batches(rt, loader)]
    columns = tuple(torch.cat(column) for column in zip(*own, strict=True))
    logits, places = ff.all_gather(rt, columns, uneven=True)
    return places, logits[places.argsort()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_net_as_it_is_evaluates_alike_but_for_the_last_bits_of_its_own_outputs(ranks, world_size, precision):
    net, images, labels = fitted(ff.Precision.parse(precision).param_dtype)
    with torch.no_grad():
        logits = net(images)
    rounding = torch.finfo(logits.dtype).eps
    options = {"world_size": world_size, "strategy": "ddp", "precision": precision}
    for found in ranks.run(evaluate, net, images, labels, **options):
        torch.testing.assert_close(found["in order"][0], logits, rtol=0, atol=64 * rounding)
        assert ranked(*found["in order"]) == ranked(*found["at once"]) == ranked(logits, labels)
        assert found["accuracy"].item() == (logits.argmax(dim=1) == labels).sum().item() / NUM
        assert found["loss"].item() == pytest.approx(mean_loss(logits, labels), rel=4 * rounding, abs=0)


def evaluate_by_hand(rt, net, images, labels):
    """The naive mean of the batches' means: what these functions are there to avoid."""
    model = ff.eval_mode(ff.setup_model(rt, net))
    loader = ff.setup_dataloader(rt, DataLoader(TensorDataset(images, labels), batch_size=BATCH_SIZE))
    means = [F.cross_entropy(ff.apply(rt, model, x), y).double() for x, y in ff.batches(rt, loader)]
    return ff.all_reduce(rt, sum(means) / len(means), op="mean").item()


def test_a_mean_of_means_is_wrong_on_the_same_data(ranks):
    net, images, labels = fitted(torch.float64)
    exact = F.cross_entropy(net(images), labels).item()
    (found, *_) = ranks.run(evaluate_by_hand, net, images, labels, world_size=2, strategy="ddp", precision="64-true")
    assert abs(found - exact) > 1e-4 * exact
