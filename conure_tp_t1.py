"""Task 1, train and prune: learns the next item at every position, then keeps the largest 30 % of the conv weights.

READS  Data/Session/original_desen_pretrain.csv
WRITES checkpoints/tp_t1.pt, checkpoints/results.csv, Data/Session/index.csv
NEXT   python conure_ret_t1.py
"""

from dataclasses import dataclass

from conure import launch, losses, training
from conure.settings import (
    Below1,
    Count,
    Dilations,
    KernelSize,
    LeaveOut,
    Positive,
    Running,
    Seed,
    Share,
    SplitSeed,
    Tied,
    UpTo1,
    Width,
    ours,
)

import data_loader
from data_loader import Split
from pruning import Stage


@dataclass
class Hyperparameters(Running):
    data_path: str = "Data/Session/original_desen_pretrain.csv"  # a user a line: item,…
    seed: Seed = 10  # of initial weights, shuffling, negative sampling and dropout
    batch_size: Count = 32  # sequences a step
    epochs: Count = 4  # passes over the training examples
    learning_rate: Positive = 1e-3  # of Adam
    table_rate: Positive = ours(10.0, original=1.0)  # learning-rate multiplier of item embedding and head
    decay: bool = ours(True, original=False)  # decay the learning rates linearly to 0 at the last step
    average_last: Below1 = 0.0  # share of the steps, at the end, over which weights are averaged
    beta1: Below1 = 0.9  # of Adam
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: KernelSize = 3  # taps of every convolution
    positional_embedding: bool = False  # add a learned position embedding to the item embedding
    spectral: bool = ours(True, original=False)  # initialise the item embedding by co-occurrence, not at random
    tied: Tied = ours("auto", original="no")  # tie the head to the item embedding; auto: unless items recur
    negative_fraction: UpTo1 = 0.2  # share of the items sampled as negatives in a step; 1: full softmax
    padding_in_loss: bool = ours(False, original=True)  # have a loss for padding as next item too
    dropout: Below1 = ours(0.3, original=0.0)  # dropout probability of embeddings, residual blocks and hidden states
    prune_ratio: Share = 0.7  # share of the free conv weights that stays free for later tasks
    test_fraction: Share = 0.2  # share of the examples held out, half for validation, half for test
    split_seed: SplitSeed = 10  # of the choice of held-out examples
    top_k: Count = 5  # k of MRR@k, HR@k and NDCG@k
    all_positions: bool = ours(True, original=False)  # evaluate at every position of a row, not at the last alone
    leave_out: LeaveOut = ours("auto", original="nothing")  # known: a row's items are no candidates; auto: if few recur
    as_original: bool = False  # train as the published code does: take each value called `original`


def main(hp: Hyperparameters) -> None:
    data = data_loader.load_sequences(hp.data_path, Split(hp.test_fraction, hp.split_seed))
    run = training.Run(hp, Stage(1, "tp"), data)
    run.train(losses.next_item(hp, data))
    run.prune()
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
