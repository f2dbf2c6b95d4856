"""The network and the owner map: causality, visible and trained weights of each mode, keep counts, losses."""

from types import SimpleNamespace

from conure import initial_model, losses, matmul, spectral, training
from conure.losses import Objective
from conure.processes import Shard
from conure.samplers import LogUniformSampler, TargetSampler, uniform_probabilities
from conure.snapshot import TrainingState
from conure.vocabulary import Vocabulary

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import batch_of

import pruning
from data_loader import Batch
from nextitnet import CausalConv, Grid, NextItNet, read_by
from pruning import Stage


def small_model(positions: int = 0, tasks: int = 3) -> NextItNet:
    torch.manual_seed(1)
    model = NextItNet(items=50, channels=8, dilations=[1, 4], kernel_size=3, positions=positions)
    for task in range(2, tasks + 1):
        model.add_head(task, 7)
        model.add_update(task, rank=4)
        model.add_readout(task, rank=3)
    return model


def test_no_hidden_state_depends_on_a_later_item():
    model, ids = small_model(positions=12), torch.randint(50, (4, 12))
    hidden = model(ids, Stage(1, "tp"))
    for changed in range(12):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 50
        difference = (model(other, Stage(1, "tp")) != hidden).any(dim=(0, 2))
        assert not difference[:changed].any()
        assert difference[changed]


@pytest.mark.parametrize("kernel_size, dilation", [(1, 1), (2, 3), (3, 1), (5, 2), (3, 40)])
def test_causal_conv_is_torchs_dilated_convolution(kernel_size, dilation):
    conv, x = CausalConv(6, kernel_size), torch.randn(9, 2, 6, requires_grad=True)
    _, geometry = read_by(Grid(9, 1), dilation, kernel_size, 9)
    ours = conv(x, Stage(1, "tp"), geometry)
    weight = conv.weight.transpose(1, 2)  # (C_out, C_in, K); tap 0 is the oldest in both
    padded = F.pad(x.permute(1, 2, 0), ((kernel_size - 1) * dilation, 0))
    theirs = F.conv1d(padded, weight, dilation=dilation).permute(2, 0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    upstream = torch.randn(9, 2, 6)
    gradients = [torch.autograd.grad(out, (x, conv.weight), upstream) for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dilations", [[1, 4, 1, 4], [2, 3], [5, 1, 2], [1], []])
@pytest.mark.parametrize("kernel_size, time", [(3, 51), (3, 7), (2, 40), (1, 5), (4, 1)])
def test_last_only_equals_the_last_of_all_states(dilations, kernel_size, time):
    torch.manual_seed(1)
    model, ids = NextItNet(50, 8, dilations, kernel_size, positions=6), torch.randint(50, (4, time))
    upstream, gradients = torch.randn(4, 8), []
    for hidden in (model(ids, Stage(1, "tp"))[:, -1], model.user_representation(ids, Stage(1, "tp"))):
        model.zero_grad()
        hidden.backward(upstream)
        trained = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        gradients.append([hidden, *trained])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_last_only_computes_1_3_7_15_31_47_positions():
    model, counts = NextItNet(50, 8, (1, 4) * 4, 3), []
    for conv in (module for module in model.modules() if isinstance(module, CausalConv)):
        conv.register_forward_hook(lambda conv, arguments, output: counts.append(len(output)))
    model.user_representation(torch.randint(50, (2, 51)), Stage(1, "tp"))
    assert counts[:9:-1] == [1, 3, 7, 15, 31, 47]
    assert sum(counts) == 614  # of 16 * 51


def test_positions_count_from_the_right_and_repeat_the_first():
    model, ids = small_model(positions=3), torch.randint(50, (2, 5))
    with torch.no_grad():
        model.position.weight.normal_()
    model.blocks = torch.nn.ModuleList()  # so that the output is the sum of item and position embeddings
    order = torch.tensor([0, 0, 0, 1, 2])
    expected = model.embedding(ids) + model.position(order)
    assert torch.equal(model(ids, Stage(1, "tp")), expected)
    assert torch.equal(model(ids[:, :2], Stage(1, "tp")), model.embedding(ids[:, :2]) + model.position(order[-2:]))


def test_initial_weights_follow_the_original():
    torch.manual_seed(0)
    model = NextItNet(items=4000, channels=32, dilations=[1], kernel_size=3)
    model.add_head(2, 4000)
    for weight in (model.embedding.weight, model.blocks[0].conv1.weight, model.head(2).weight):
        assert weight.abs().max() <= 0.04
        assert weight.std().item() == pytest.approx(0.0176, rel=0.05)  # 0.02, truncated at two standard deviations
    assert model.head(1).weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (model.head(1).bias == 0.1).all() and model.head(2).bias is None


def test_visible_and_trained_weights_of_each_mode():
    owner = torch.tensor([0, 1, 2, 3], dtype=torch.uint8)
    expected = {
        Stage(2, "tp"): ([1, 1, 1, 1], [1, 0, 0, 0]),
        Stage(2, "ret"): ([0, 1, 1, 0], [0, 0, 1, 0]),
        Stage(2, "inference"): ([0, 1, 1, 0], [0, 0, 0, 0]),
    }
    for stage, (used, trained) in expected.items():
        masks = pruning.used_and_trained(owner, stage)
        assert [mask.int().tolist() for mask in masks] == [used, trained]


def test_invisible_weights_do_not_change_the_output():
    """The output is bit-identical, whatever the values of weights that the task may not read."""
    model, ids = small_model(), torch.randint(50, (4, 12))
    pruning.prune(model, 1, [0.7])
    before = model(ids, Stage(1, "inference"))
    with torch.no_grad():
        for layer in pruning.owned_weights(model):
            layer.weight[layer.owner == pruning.FREE] *= -1e6
    assert torch.equal(model(ids, Stage(1, "inference")), before)


def test_pruning_keeps_the_free_weights_of_largest_magnitude():
    model, ratios = small_model(), [0.7, 0.5, 0.8]
    for task in (1, 2, 3):
        before = [layer.owner.clone() for layer in pruning.owned_weights(model)]
        pruning.prune(model, task, ratios[:task])
        for layer, owner in zip(pruning.owned_weights(model), before):
            taken, left = layer.owner == task, layer.owner == pruning.FREE
            assert (layer.owner == owner)[~taken].all() and (owner[taken] == pruning.FREE).all()
            assert taken.sum() == pruning.keep_count(owner.numel(), ratios[: task - 1], ratios[task - 1])
            assert layer.weight[taken].abs().min() >= layer.weight[left].abs().max()
    assert sum(pruning.shares(model).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    "size, earlier, ratio, count",
    [(768, [], 0.7, 231), (768, [0.7], 0.7, 162), (768, [0.7, 0.7], 0.7, 113), (10, [], 0.5, 6)],
)
def test_keep_count(size, earlier, ratio, count):
    assert pruning.keep_count(size, earlier, ratio) == count


def test_pruning_twice_or_without_free_weights_is_refused():
    model = small_model()
    pruning.prune(model, 1, [0.7])
    with pytest.raises(ValueError, match="pruned before"):
        pruning.prune(model, 1, [0.7])
    for layer in pruning.owned_weights(model):
        layer.owner.fill_(1)
    with pytest.raises(ValueError, match="no free weights"):
        pruning.prune(model, 2, [0.7, 0.7])


@pytest.mark.parametrize("stage", [Stage(2, "tp"), Stage(2, "ret")])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_changes_only_the_weights_of_its_stage(stage, precision):
    model = small_model()
    pruning.prune(model, 1, [0.7])
    if stage.mode == "ret":
        pruning.prune(model, 2, [0.7, 0.7])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = training.parameter_groups(model.train_only(stage), model.tables(2), table_learning_rate=0.2)
    adam = training.adam(groups, learning_rate=0.1, beta1=0.9)
    loss = losses.PairLoss(losses.bpr, TargetSampler(uniform_probabilities(7)), l2=0.1)
    objective = Objective(loss, model, stage, torch.Generator().manual_seed(1), precision)
    for _ in range(3):
        adam.zero_grad()
        objective(batch_of(torch.randint(50, (4, 12)), torch.randint(1, 7, (4,)))).backward()
        adam.step()
    tables = (f"{table}.{part}" for table in ("updates.2", "readouts.2.table") for part in ("rows", "axes"))
    after, own = model.state_dict(), ("heads.2.weight", *tables)
    for name, value in before.items():
        if name.endswith(("conv1.weight", "conv2.weight")):
            _, trained = pruning.used_and_trained(before[name.replace("weight", "owner")], stage)
            assert torch.equal(after[name][~trained], value[~trained])
            assert (after[name][trained] != value[trained]).any()
        else:
            assert torch.equal(after[name], value) == (name not in own), name


def test_a_task_reads_the_embedding_updates_of_itself_and_earlier_tasks():
    model, ids = small_model(), torch.randint(50, (4, 12))
    stages = [Stage(task, "inference") for task in (1, 2, 3)]
    untouched = [model(ids, stage) for stage in stages]
    assert torch.equal(untouched[0], untouched[2]), "updates are zero at the start"
    torch.nn.init.normal_(model.updates["2"].rows)
    second = [model(ids, stage) for stage in stages]
    assert [torch.equal(*pair) for pair in zip(untouched, second)] == [True, False, False]
    torch.testing.assert_close(second[1], second[2], rtol=0, atol=0)
    torch.nn.init.normal_(model.updates["3"].rows)
    third = [model(ids, stage) for stage in stages]
    assert [torch.equal(*pair) for pair in zip(second, third)] == [True, True, False]
    change = model.updates["2"].rows @ model.updates["2"].axes + model.updates["3"].rows @ model.updates["3"].axes
    with torch.no_grad():
        model.embedding.weight += change
    torch.testing.assert_close(model(ids, stages[0]), third[2], rtol=0, atol=1e-4)


def test_a_readout_sums_the_items_and_normalises():
    """A task has its own, and task 1 none."""
    model, ids = small_model(), torch.randint(50, (4, 12))
    readout, last = model.readouts["2"], model(ids, Stage(2, "inference"))[:, -1]
    torch.nn.init.normal_(readout.table.rows)
    readout.scale.fill_(0.5)
    counts = F.one_hot(ids, 50).sum(dim=1).float()
    expected = F.layer_norm(last + counts @ readout.table.rows @ readout.table.axes / 12**0.5, (8,), eps=1e-8) / 2
    torch.testing.assert_close(model.user_representation(ids, Stage(2, "inference")), expected, rtol=0, atol=1e-4)
    for task, unsummed in ((1, last), (3, F.layer_norm(last, (8,), eps=1e-8))):
        own = model.user_representation(ids, Stage(task, "inference"))
        torch.testing.assert_close(own, unsummed, rtol=0, atol=1e-4)


def test_a_readout_has_the_deviation_asked_for_relative_to_last_states():
    model, rows = small_model(), torch.randint(50, (30, 12))
    data = SimpleNamespace(rows=rows.numpy(), users=np.arange(30), splits={"train": np.arange(20)})
    initial_model.scale_readout(model, data, Stage(2, "tp"), torch.device("cpu"), 0.5)
    states, readouts = model(rows[:20], Stage(2, "tp"))[:, -1], model.user_representation(rows[:20], Stage(2, "tp"))
    sizes = [vectors.std(dim=1, correction=0).mean().item() for vectors in (states, readouts)]
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=1e-4)


def test_a_tied_head_is_the_item_embedding_and_freezes_with_it():
    torch.manual_seed(1)
    model = NextItNet(items=50, channels=8, dilations=[1, 4], kernel_size=3, tied=True)
    model.add_head(2, 7)
    again = NextItNet(**model.architecture)
    for each in (model, again):
        assert each.head(1).weight is each.embedding.weight
    convs = {layer.weight for layer in pruning.owned_weights(model)}
    assert set(model.train_only(Stage(1, "tp"))) == set(model.parameters())
    assert set(model.train_only(Stage(1, "ret"))) == convs | {model.head(1).bias}
    assert set(model.train_only(Stage(2, "tp"))) == convs | {model.head(2).weight}


def test_table_rate_multiplies_the_learning_rate_of_tables():
    model, stage = small_model(), Stage(1, "tp")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = training.parameter_groups(model.train_only(stage), model.tables(1), table_learning_rate=0.05)
    adam = training.adam(groups, learning_rate=0.01, beta1=0.9)
    loss = losses.NextItemLoss(LogUniformSampler(50, 1.0), None)
    loss(model, stage, batch_of(torch.randint(50, (16, 12)), torch.randint(1, 50, (16,))), None).backward()
    adam.step()  # the first step of Adam changes a weight by the learning rate, whatever its gradient
    rates = {"embedding.weight": 0.05, "heads.1.bias": 0.05, "blocks.0.conv1.weight": 0.01, "blocks.0.ln1.bias": 0.01}
    for name, rate in rates.items():
        assert (model.state_dict()[name] - before[name]).abs().max() == pytest.approx(rate, rel=1e-3), name


def test_dropout_is_applied_in_training_only():
    model, ids = small_model(), torch.randint(50, (4, 12))
    whole = model(ids, Stage(1, "tp"))
    model.dropout.p = 0.5
    assert (model(ids, Stage(1, "tp")) != whole).any()
    assert torch.equal(model.eval()(ids, Stage(1, "tp")), whole)


@pytest.mark.parametrize("negative_fraction", [0.5, 1.0])
def test_bfloat16_gradients_are_close_to_float32(negative_fraction):
    model, stage = small_model(tasks=1), Stage(1, "tp")
    torch.manual_seed(1)
    batch = batch_of(torch.randint(1, 50, (16, 12)), torch.randint(1, 50, (16,)))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        loss = losses.NextItemLoss(LogUniformSampler(50, negative_fraction), None)
        objective = Objective(loss, model, stage, torch.Generator().manual_seed(1), precision)
        value = objective(batch)
        found.append([value, *torch.autograd.grad(value, model.train_only(stage))])
    assert all(each.dtype == torch.float32 for each in found[1])
    assert all(0 < (near - exact).norm() <= 0.15 * exact.norm() for exact, near in list(zip(*found))[1:])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)


def test_bfloat16_gradients_vanish_where_the_loss_is_small():
    torch.manual_seed(1)
    weight, labels = torch.randn(50, 32), torch.randint(50, (64,))
    found = []
    for precision in (torch.float32, torch.bfloat16):
        hidden = (weight[labels] / 2).requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            loss = losses.full_softmax(hidden, torch.arange(64), labels, labels[:, None], weight)
        found.append([loss / 64, *torch.autograd.grad(loss, hidden)])
    (loss, exact), (_, near) = found
    assert loss < 0.1 and (near - exact).norm() < 0.02 * exact.norm()


def test_full_softmax_and_ignored_labels():
    model, ids = small_model(), torch.randint(1, 50, (4, 12))
    ids[:, :6] = 7  # padding
    inputs, targets = ids[:, :-1], ids[:, -1]
    loss = losses.NextItemLoss(LogUniformSampler(50, 1.0), ignored_label=7)
    scores = model.head(1)(model(inputs, Stage(1, "tp")))
    expected = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=7)
    torch.testing.assert_close(loss(model, Stage(1, "tp"), batch_of(inputs, targets), None), expected)
    nothing = loss(model, Stage(1, "tp"), batch_of(torch.full((2, 5), 7), torch.full((2,), 7)), None)
    assert nothing == 0


@pytest.mark.parametrize("bias", [False, True])
def test_losses_of_later_tasks_equal_torchs_without_unk(bias):
    model, stage, user = small_model(), Stage(2, "tp"), torch.randint(50, (5, 12))
    model.add_head(2, 7, bias)
    if bias:
        torch.nn.init.normal_(model.head(2).bias)
    targets, penalty = torch.tensor([1, 6, 3, 3, 2]), 0.1 * model.head(2).weight.square().sum() / 2
    scores = model.scores(user, stage)
    ours = losses.TargetLoss(targets[:, None].numpy().__getitem__, 0.1)(model, stage, batch_of(user, targets), None)
    torch.testing.assert_close(ours, F.cross_entropy(scores[:, 1:], targets - 1) + penalty)
    pair = losses.PairLoss(losses.bpr, TargetSampler(uniform_probabilities(7)), 0.1)
    negatives = pair.sampler.draw(targets, torch.Generator().manual_seed(1))
    margin = (scores.gather(1, targets[:, None]) - scores.gather(1, negatives[:, None])).squeeze(1)
    ours = pair(model, stage, batch_of(user, targets), torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, -F.logsigmoid(margin).mean() + penalty)


def test_each_row_of_a_batch_is_encoded_once_with_the_loss_of_every_example():
    """The targets of a row, in the batch or not, are not each other's negatives."""
    model, stage, user = small_model(), Stage(2, "tp"), torch.randint(50, (3, 12))
    model.add_head(2, 9)
    row_of, targets, encoded = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1, 3, 3, 6, 2, 6]), []
    known = np.array([[1, 3, 8, 0], [3, 0, 0, 4], [2, 7, 6, 5]])
    batch = Batch(np.array([4, 6, 9]), user, row_of, targets)
    loss = losses.TargetLoss(lambda rows: known[rows // 3 - 1], 0.1)
    with model.embedding.register_forward_hook(lambda module, ids, output: encoded.append(output.shape[1])):
        ours = loss(model, stage, batch, None)
    assert encoded == [losses.ENCODED_ROWS]  # three rows, padded to this number
    scores = model.scores(user[row_of], stage)
    for example, (row, target) in enumerate(zip(row_of, targets)):
        scores[example, [0, *(set(known[row].tolist()) - {target.item()})]] = -torch.inf
    expected = F.cross_entropy(scores, targets) + 0.1 * model.head(2).weight.square().sum() / 2
    trained = model.train_only(stage)
    found = [[loss, *torch.autograd.grad(loss, trained, retain_graph=True)] for loss in (ours, expected)]
    torch.testing.assert_close(*found)


def test_the_losses_of_shards_sum_to_that_of_the_batch():
    model, stage, user = small_model(), Stage(2, "tp"), torch.randint(50, (3, 12))
    batch = Batch(np.arange(3), user, torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1, 3, 3, 6, 2, 6]))
    loss = losses.TargetLoss(np.array([[1, 3, 0], [3, 0, 0], [2, 6, 0]]).__getitem__, 0.1)
    pair = losses.PairLoss(losses.bpr, TargetSampler(uniform_probabilities(7)), 0.1)
    for each in (loss, pair):
        whole, *shares = (
            each(model, stage, batch, torch.Generator().manual_seed(1), Shard(number, count))
            for number, count in [(0, 1), *((number, 4) for number in range(4))]
        )
        torch.testing.assert_close(sum(shares), whole)


def test_averaging_leaves_frozen_weights_bit_identical():
    """With 10,000 random weights: 7 additions and a division would change many of them by rounding."""
    moving, frozen = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.randn(10_000))
    before, state = frozen.detach().clone(), TrainingState([moving, frozen], None, [])
    with state.averaged():
        assert (moving == 0).all(), "nothing is averaged yet"
    for step in range(7):
        torch.nn.init.constant_(moving, step)
        state.average()
    with state.averaged():
        assert moving.tolist() == pytest.approx([3] * 3) and torch.equal(frozen, before)
        state.keep_if_best(0.5)
    assert (moving == 6).all() and torch.equal(frozen, before)
    state.restore_best()
    assert moving.tolist() == pytest.approx([3] * 3)


@pytest.mark.parametrize("by_user", [False, True])
def test_each_epoch_has_every_example_once_in_a_new_order(by_user):
    users = np.repeat(np.arange(40), np.arange(40) % 7 + 1)
    train = np.random.default_rng(1).permutation(len(users))[:-10]
    data = SimpleNamespace(users=users, rows=np.zeros((40, 3)), splits={"train": train})
    orders = [training.shuffled_examples(data, np.random.default_rng((10, epoch)), by_user) for epoch in range(2)]
    for order in orders:
        assert sorted(order) == sorted(train)
        together = (np.diff(users[order]) != 0).sum() == len(np.unique(users[train])) - 1
        assert together == by_user
    assert (users[orders[0]] != users[orders[1]]).any()
    assert (orders[0] == training.shuffled_examples(data, np.random.default_rng((10, 0)), by_user)).all()


def test_l2_sp_holds_an_informed_head_near_its_start():
    model, stage, user = small_model(), Stage(2, "tp"), torch.randint(50, (5, 12))
    model.add_head(2, 7)
    items = Vocabulary(["<UNK>", *(f"item {id}" for id in range(1, 50))])
    targets = Vocabulary(["<UNK>", "item 4", "no item", "item 9", "item 49", "x", "item 1"])
    initial_model.anchor(model, SimpleNamespace(items=items, target_vocabulary=targets), 2)
    start, weight, wanted = torch.zeros(7, 8), model.head(2).weight, torch.tensor([1, 6, 3, 3, 2])
    start[[1, 3, 4, 6]] = model.head(1).weight[[4, 9, 49, 1]].detach()
    for expected in (0.1 * (weight - start).square().sum() / 2, 0):
        known = wanted[:, None].numpy().__getitem__
        both = (losses.TargetLoss(known, 0.7, l2_sp)(model, stage, batch_of(user, wanted), None) for l2_sp in (0.1, 0))
        with_penalty, without = both
        torch.testing.assert_close(with_penalty, without + expected)
        with torch.no_grad():
            weight.copy_(start)


def rows_of_groups(padding: int) -> np.ndarray:
    """(200, 30): random items of one of five groups a row, 2..11, 12..21, …, after some padding, and then id 0."""
    random = np.random.default_rng(1)
    rows = 2 + 10 * random.integers(5, size=(200, 1)) + random.integers(10, size=(200, 30))
    rows[np.arange(30) < random.integers(0, 20, 200)[:, None]] = padding
    rows[:, -1] = 0
    return rows.astype(np.int32)


def test_leading_eigenvectors_are_those_of_the_normalised_co_occurrence_matrix():
    rows, size = rows_of_groups(padding=1), 60
    matrix = np.zeros((size, size))
    for row in rows.tolist():
        for first, second in ((a, b) for a in range(30) for b in range(30) if 0 < abs(a - b) <= 10):
            matrix[row[first], row[second]] += 1 / abs(first - second)
    matrix[:2] = matrix[:, :2] = 0
    degrees = matrix.sum(axis=1)
    scale = np.divide(1, np.sqrt(degrees), where=degrees > 0, out=np.zeros(size))
    _, expected = np.linalg.eigh(scale[:, None] * matrix * scale)  # by rising eigenvalue
    found = spectral.leading_eigenvectors(rows, size, 5, [0, 1], torch.device("cpu")).numpy()
    overlap = expected[:, -5:].T @ found
    np.testing.assert_allclose(overlap @ overlap.T, np.eye(5), atol=1e-4)
    assert not found[degrees == 0].any() and (degrees == 0).sum() == 10


def test_the_spectral_embedding_is_of_the_items_in_training_rows():
    rows, model = rows_of_groups(padding=51), NextItNet(items=62, channels=8, dilations=[1], kernel_size=3)
    rows[3, 10:20], rows[4, 10:20] = 60, 61  # an item of a training row, and one of a held-out row alone
    train, before = np.delete(np.arange(200), 4), model.embedding.weight.detach().clone()
    data = SimpleNamespace(rows=rows, users=np.arange(200), splits={"train": train}, padding_id=51)
    initial_model.spectral_embedding(model, data)
    changed = (model.embedding.weight != before).any(dim=1)
    assert set(changed.nonzero().squeeze(1).tolist()) == set(np.unique(rows[train]).tolist()) - {0, 51}
    assert model.embedding.weight[changed].square().mean().sqrt().item() == pytest.approx(0.06, rel=0.01)


def plain_sampled_softmax(hidden, labels, left_out, head, negatives, label_counts, negative_counts):
    """losses.sampled_softmax with all logits in one block."""
    own = (hidden * head.weight[labels]).sum(dim=1) + head.bias[labels] - label_counts.log()
    others = hidden @ head.weight[negatives].T + head.bias[negatives] - negative_counts.log()
    hits = (negatives == left_out[:, :, None]).any(dim=1)
    return (torch.cat([own[:, None], others.masked_fill(hits, -torch.inf)], dim=1).logsumexp(dim=1) - own).sum()


@pytest.mark.parametrize(("at_once", "columns"), [(1, 1), (60, 1), (1 << 26, 1), (60, 8)])
def test_sampled_softmax_does_not_depend_on_block_size_and_padding(monkeypatch, at_once, columns):
    monkeypatch.setitem(losses.COLUMNS, "cpu", columns)
    monkeypatch.setitem(losses.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(matmul, "CPU_COLUMNS", 7)
    torch.manual_seed(1)
    head, hidden = small_model().head(1), (5 * torch.randn(9, 8)).requires_grad_()
    labels, negatives = torch.tensor([3, 3, 49, 0, 7, 8, 9, 1, 2]), torch.tensor([7, 3, 20, 21, 22, 23, 1, 24, 25, 49])
    left_out, counts, results = torch.randint(50, (9, 20)), (torch.rand(9), torch.rand(10)), []
    left_out[0] = negatives.repeat(2)  # so that the first position has no negative
    left_out[:, 7] = labels
    for function in (losses.sampled_softmax, plain_sampled_softmax):
        loss = function(hidden, labels, left_out, head, negatives, *counts)
        results.append([loss, *torch.autograd.grad(3 * loss, (hidden, head.weight, head.bias))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_sampled_softmax_over_all_items_equals_full_softmax():
    head, hidden, labels = small_model().head(1), torch.randn(9, 8), torch.randint(50, (9,))
    counts = torch.ones(9), torch.ones(50)
    ours = losses.sampled_softmax(hidden, labels, labels[:, None], head, torch.arange(50), *counts)
    torch.testing.assert_close(ours, F.cross_entropy(head(hidden), labels, reduction="sum"))


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("earlier_items", [True, False])
def test_earlier_items_are_no_negatives_unless_asked(sampled, earlier_items):
    """Over all items, by sampled softmax with equal counts or by full softmax; recurring items stay labels."""
    model, stage, inputs = small_model(), Stage(1, "tp"), torch.randint(1, 20, (3, 12))
    batch, sampler = batch_of(inputs, torch.randint(1, 20, (3,))), LogUniformSampler(50, 1.0)
    if sampled:
        sampler.items += 1  # more than are drawn, so that the softmax is sampled
        sampler.draw = lambda generator: (torch.randperm(50), 50)
        sampler.expected_count = lambda ids, draws: torch.ones(len(ids))
    ours = losses.NextItemLoss(sampler, None, earlier_items)(model, stage, batch, None)
    scores, labels = model.head(1)(model(inputs, stage)), torch.cat([inputs[:, 1:], batch.targets[:, None]], dim=1)
    if not earlier_items:
        for row, place in np.ndindex(3, 12):
            earlier = set(inputs[row, : place + 1].tolist()) - {labels[row, place].item()}
            scores[row, place, list(earlier)] = -torch.inf
    torch.testing.assert_close(ours, F.cross_entropy(scores.flatten(0, 1), labels.flatten()))
