"""Task 3, train and prune: learns the items that a user likes with the free weights, then keeps the largest
30 % of them.

READS  Data/Session/original_desen_finetune_like_nouserID.csv, Data/Session/index.csv,
       checkpoints/ret_t2.pt
WRITES checkpoints/tp_t3.pt, checkpoints/results.csv
NEXT   python conure_ret_t3.py
"""

from dataclasses import dataclass

from conure import launch, losses, training, vocabulary
from conure.settings import (
    Below1,
    Count,
    LeaveOut,
    NonNegative,
    Positive,
    Rank,
    Running,
    Seed,
    Share,
    SplitBy,
    SplitSeed,
    ours,
)

import data_loader
from data_loader import Split
from pruning import Stage


@dataclass
class Hyperparameters(Running):
    data_path: str = "Data/Session/original_desen_finetune_like_nouserID.csv"  # a user a line: item,…,,target,…
    seed: Seed = 10  # of initial weights, shuffling, negative sampling and dropout
    batch_size: Count = 512  # examples a step
    group_by_user: bool = ours(True, original=False)  # keep a user's examples together, so a step encodes the user once
    epochs: Count = 80  # passes over the training examples
    learning_rate: Positive = 1e-4  # of Adam
    table_rate: Positive = 1.0  # learning-rate multiplier of head, update and readout
    decay: bool = False  # decay the learning rates linearly to 0 at the last step
    average_last: Below1 = ours(0.5, original=0.0)  # share of the steps, at the end, over which weights are averaged
    beta1: Below1 = 0.9  # of Adam
    loss: losses.Name = ours("softmax", original="bpr")  # softmax over all targets; bpr: one sampled negative
    rho: Positive = 0.3  # of bpr's negative sampling: the smaller, the more popular the negatives
    informed_head: bool = ours(True, original=False)  # initialise the head from task 1's, or its bias from frequencies
    lora_rank: Rank = ours(16, original=0)  # rank of the task's LoRA update of the item embedding; 0: none
    readout_rank: Rank = ours(64, original=0)  # rank of the item sum in the task's readout; 0: the last hidden state
    dropout: Below1 = 0.0  # dropout probability of embeddings, residual blocks and hidden states
    l2: NonNegative = ours(0.005, original=0.05)  # l2 * |w|^2 / 2 of a head that starts at random
    l2_sp: NonNegative = 0.001  # of a head that starts as task 1's rows: l2_sp * |w - rows|^2 / 2
    prune_ratio: Share = 0.7  # share of the free conv weights that stays free for later tasks
    test_fraction: Share = 0.2  # share of the examples held out, half for validation, half for test
    split_seed: SplitSeed = 10  # of the choice of held-out examples
    split_by: SplitBy = "example"  # hold out examples, or whole users
    top_k: Count = 5  # k of MRR@k, HR@k and NDCG@k
    leave_out: LeaveOut = ours("auto", original="nothing")  # training targets are no candidates; known: nor the row
    as_original: bool = False  # train as the published code does: take each value called `original`


def main(hp: Hyperparameters) -> None:
    items = vocabulary.read_index(hp.index_path)
    data = data_loader.load_examples(hp.data_path, Split(hp.test_fraction, hp.split_seed, hp.split_by), items)
    run = training.Run(hp, Stage(3, "tp"), data)
    run.train(losses.target(hp, data))
    run.prune()
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
