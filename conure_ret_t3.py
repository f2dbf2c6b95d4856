"""Task 3, retrain: trains the conv weights that task 3 kept until they make up for those it lost.

READS  Data/Session/original_desen_finetune_like_nouserID.csv, Data/Session/index.csv,
       checkpoints/tp_t3.pt
WRITES checkpoints/ret_t3.pt, checkpoints/results.csv
NEXT   python conure_tp_t4.py
"""

from dataclasses import dataclass

from conure import launch, losses, training, vocabulary
from conure.settings import (
    Below1,
    Count,
    LeaveOut,
    NonNegative,
    Positive,
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
    group_by_user: bool = ours(True, original=False)  # a user's examples follow each other: a step encodes a user once
    epochs: Count = 100  # passes over the training part
    learning_rate: Positive = 1e-4  # of Adam
    table_rate: Positive = 1.0  # learning-rate multiplier of the head
    decay: bool = False  # decay the learning rates linearly to 0 at the last step
    average_last: Below1 = ours(0.5, original=0.0)  # share of the steps, the last ones, over which weights are averaged
    beta1: Below1 = 0.9  # of Adam
    loss: losses.Name = ours("softmax", original="bpr")  # softmax over all targets; bpr: one sampled negative
    rho: Positive = 0.3  # of the negative sampling of bpr: the smaller, the more often popular targets are drawn
    dropout: Below1 = 0.0  # dropout probability, of embeddings, residual blocks and last states
    l2: NonNegative = ours(0.005, original=0.05)  # l2 * sum(w^2) / 2 over the head, of its change if informed
    test_fraction: Share = 0.2  # share held out: half validation, half test; as in tp
    split_seed: SplitSeed = 10  # of which examples are held out
    split_by: SplitBy = "example"  # hold out examples, or users, of whom training then knows nothing
    top_k: Count = 5  # cut-off of MRR, HR and NDCG
    leave_out: LeaveOut = ours("auto", original="nothing")  # no candidates: targets of training; known: row's items too
    as_original: bool = False  # train as the published code does: with the value named `original` wherever there is one


def main(hp: Hyperparameters) -> None:
    items = vocabulary.read_index(hp.index_path)
    data = data_loader.load_examples(hp.data_path, Split(hp.test_fraction, hp.split_seed, hp.split_by), items)
    run = training.Run(hp, Stage(3, "ret"), data)
    run.train(losses.target(hp, data))
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
