"""The networks and losses that Conure is compared with."""

import copy

from conure import ranking
from conure.losses import ALONE
from conure.metrics import Protocol
from conure.vocabulary import Vocabulary

import numpy as np
import pytest
import torch
from conftest import batch_of

import data_loader
import pruning
from data_loader import Batch
from nextitnet import NextItNet
from pruning import Stage
from tools.comparisons import networks
from tools.comparisons.sasrec import SASRec


@pytest.fixture
def network() -> NextItNet:
    """A network of 30 items, with a head of 7 targets for task 2 and of 5 for task 3."""
    torch.manual_seed(1)
    model = NextItNet(30, channels=8, dilations=(1,), kernel_size=3)
    model.add_head(2, 7)
    model.add_head(3, 5, bias=True)
    for task in (2, 3):
        model.add_readout(task, rank=4)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


def sasrec_of(positions: int) -> SASRec:
    torch.manual_seed(1)
    model = SASRec(30, channels=8, dilations=(1,), kernel_size=3, positions=positions, padding=7).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_self_attention_sees_no_later_item_and_no_padding():
    model, stage, ids = sasrec_of(12), Stage(1, "tp"), torch.randint(8, 30, (3, 9))
    ids[0, :4] = 7  # padding
    states, changed = model(ids, stage), ids.clone()
    changed[:, 6] = 8 + (ids[:, 6] - 7) % 22
    after = model(changed, stage)
    assert torch.equal(after[:, :6], states[:, :6]) and (after[:, 6:] != states[:, 6:]).any(dim=2).all()
    longer = model(torch.nn.functional.pad(ids, (3, 0), value=7), stage)
    torch.testing.assert_close(longer[:, 7:], states[:, 4:])
    torch.testing.assert_close(model(ids, stage, last_only=True), states[:, -1:])
    with torch.no_grad():
        model.embedding.weight[7] += 1.0
    torch.testing.assert_close(model(ids, stage)[:, 4:], states[:, 4:])


def test_self_attention_depends_on_the_order_of_items():
    model, stage, ids = sasrec_of(9), Stage(1, "tp"), torch.randint(8, 30, (3, 9))
    swapped = ids[:, [1, 0, *range(2, 9)]]
    assert (model.user_representation(swapped, stage) != model.user_representation(ids, stage)).any(dim=1).all()


def test_sasrec_ties_the_head_of_task_1_to_the_item_embedding():
    model = sasrec_of(9)
    assert model.head(1).weight is model.embedding.weight
    again = SASRec(**model.architecture)
    again.load_state_dict(model.state_dict())
    assert again.head(1).weight is again.embedding.weight
    ids = torch.randint(8, 30, (3, 9))
    torch.testing.assert_close(again.eval().scores(ids, Stage(1, "tp")), model.scores(ids, Stage(1, "tp")))
    trained = model.train_only(Stage(1, "tp"))
    gradients = torch.autograd.grad(model.scores(ids, Stage(1, "tp")).square().sum(), trained)
    assert all(gradient.any() for gradient in gradients) and len(trained) == len(list(model.parameters()))


def test_only_heads_initialised_from_task_1_are_frozen():
    model = networks.FrozenHead(30, channels=8, dilations=(1,), kernel_size=3)
    model.add_head(2, 7)
    convs = {layer.weight for layer in pruning.owned_weights(model)}
    assert set(model.train_only(Stage(2, "tp"))) == convs | {model.head(2).weight}
    model.anchors[2] = model.head(2).weight.detach().clone()
    for mode in ("tp", "ret"):
        assert set(model.train_only(Stage(2, mode))) == convs


@pytest.mark.parametrize(
    "kind, left_alone",
    [
        (networks.Unprotected, {"heads.1.bias", "heads.3.weight"}),
        (networks.AllHeads, set()),
        (networks.Joint, set()),
    ],
)
def test_a_network_that_is_not_protected_trains_all_but_what_other_tasks_own(kind, left_alone):
    model = kind(30, channels=8, dilations=(1,), kernel_size=3, tied=True)
    model.add_head(2, 7)
    model.add_head(3, 5)
    trained = set(model.train_only(Stage(2, "tp")))
    assert {name for name, each in model.named_parameters() if each not in trained} == left_alone


@pytest.mark.parametrize("kind, trains", [(networks.HeadOnly, "heads.2.weight"), (networks.Adapted, ".adapter.")])
def test_a_network_with_a_frozen_backbone_trains_the_head_and_its_adapters(kind, trains):
    model = kind(30, channels=8, dilations=(1,), kernel_size=3)
    model.add_head(2, 7)
    expected = {name for name, _ in model.named_parameters() if trains in name} | {"heads.2.weight"}
    model.train_only(Stage(2, "tp"))
    assert {name for name, each in model.named_parameters() if each.requires_grad} == expected


class Nothing:
    """A loss of 0 that records the stages and batches of its calls."""

    def __init__(self):
        self.given = []

    def __call__(self, model, stage, batch, generator, shard):
        self.given.append((stage, batch))
        return torch.zeros(())


def test_distillation_penalises_changed_scores_of_earlier_tasks(network):
    before, inputs = copy.deepcopy(network), torch.randint(30, (5, 6))
    batch = Batch(np.arange(5), inputs, torch.tensor([0, 1, 1, 2, 3, 4, 4]), torch.ones(7).long())
    loss, rest = networks.DistilledLoss(Nothing(), before), (Stage(3, "tp"), batch, None, ALONE)
    heads = [network.head(task).weight for task in (1, 2, 3)]

    def gradients() -> list[torch.Tensor | None]:
        network.zero_grad(set_to_none=True)
        loss(network, *rest).backward()
        return [weight.grad for weight in heads]

    first, second, own = gradients()
    assert own is None and first.abs().max() < 1e-6 and second.abs().max() < 1e-6, "the model answers as before"
    with torch.no_grad():
        heads[1][4, 0] += 5.0
    first, second, own = gradients()
    assert own is None and first.abs().max() < 1e-6 and second[4].abs().max() > 1e-3 and not second[0].any()
    expected = 0.0
    for task, seen in ((1, inputs[:, :-1]), (2, inputs)):  # task 1 has no separator
        now, then = (model.scores(seen, Stage(task, "tp"))[:, 1:] / 2 for model in (network, before))
        expected -= (then.softmax(dim=1) * now.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss(network, *rest), expected)


def examples_of(batch: Batch) -> set[tuple[int, ...]]:
    inputs = batch.inputs[batch.row_of].tolist()
    return {(*row, target) for row, target in zip(inputs, batch.targets.tolist())}


def test_joint_training_draws_from_the_memory_of_one_other_task(network, tiny):
    own, others = Nothing(), (Nothing(), Nothing())
    kept = np.array([1, 3]), np.array([0, 2, 5])
    memories = [networks.Memory(task, *each, 4) for task, *each in zip((1, 2), tiny, others, kept)]
    batch = batch_of(torch.randint(3, (2, 5)), torch.ones(2).long())
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        networks.JointLoss(own, memories)(network, Stage(3, "tp"), batch, generator, ALONE)
    assert len(own.given) == 30 == len(others[0].given) + len(others[1].given)
    assert 5 < len(others[0].given) < 25
    for task, data, other, examples in zip((1, 2), tiny, others, kept):
        pairs = {(*row.tolist(), target) for row, target in zip(data.rows[data.users], data.targets.tolist())}
        wanted = examples_of(data.batch(examples))
        assert set().union(*(examples_of(batch) for _, batch in other.given)) == wanted < pairs
        assert all(stage == Stage(task, "tp") and len(batch.targets) == 4 for stage, batch in other.given)


def test_zero_shot_scores_a_target_as_its_item(tmp_path, network):
    (tmp_path / "2.csv").write_text("a,b,b,,b,x\na,b,c,,a\n0,c,a,,c,x\n0,0,b,,c\n")
    items = Vocabulary(["<UNK>", "0", "a", "b", "c"])
    data = data_loader.load_examples(str(tmp_path / "2.csv"), data_loader.Split(0.5), items)
    networks.add_item_head(network.eval(), data, 4)
    inputs, stage = torch.from_numpy(data.rows).long(), Stage(4, "inference")
    of_targets, of_items = (network.scores(inputs, Stage(task, "inference")) for task in (4, 1))
    for token in "abc":
        place, item = data.target_vocabulary.ids[token], items.ids[token]
        torch.testing.assert_close(of_targets[:, place], of_items[:, item])
    ranks = ranking.rank(network, data, np.arange(len(data.targets)), stage, torch.device("cpu"), Protocol())
    no_item = ranks.targets == data.target_vocabulary.ids["x"]
    assert (ranks.ranks[no_item] == len(data.target_vocabulary)).all() and (ranks.ranks[~no_item] <= 3).all()
