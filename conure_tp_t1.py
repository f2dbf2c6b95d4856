"""Task 1, train and prune: learns the next item at every position, then keeps the strongest 30 % of the conv weights.

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
    epochs: Count = 4  # passes over the training part
    learning_rate: Positive = 1e-3  # of Adam
    table_rate: Positive = ours(10.0, original=1.0)  # learning-rate multiplier of the item embedding and the head
    decay: bool = ours(True, original=False)  # decay the learning rates linearly to 0 at the last step
    average_last: Below1 = 0.0  # share of the steps, the last ones, over which weights are averaged
    beta1: Below1 = 0.9  # of Adam
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: KernelSize = 3  # taps of every convolution
    positional_embedding: bool = False  # add a learned embedding of each position to the items'
    tied: Tied = ours("auto", original="no")  # the head's weight is the item embedding; auto: unless items recur
    negative_fraction: UpTo1 = 0.2  # share of the items drawn as negatives at each step; 1: full softmax
    padding_in_loss: bool = ours(False, original=True)  # predict padding too
    dropout: Below1 = ours(0.3, original=0.0)  # dropout probability, of embeddings, residual blocks and last states
    prune_ratio: Share = 0.7  # share of the free weights that stays free for later tasks
    test_fraction: Share = 0.2  # share held out: half validation, half test
    split_seed: SplitSeed = 10  # of which examples are held out
    top_k: Count = 5  # cut-off of MRR, HR and NDCG
    all_positions: bool = ours(True, original=False)  # of held-out rows: score and select by each, not the last alone
    leave_out: LeaveOut = ours("auto", original="nothing")  # known: row's items are no candidates; auto: if few recur
    as_original: bool = False  # train as the published code does: with the value named `original` wherever there is one


def main(hp: Hyperparameters) -> None:
    data = data_loader.load_sequences(hp.data_path, Split(hp.test_fraction, hp.split_seed))
    run = training.Run(hp, Stage(1, "tp"), data)
    run.train(losses.next_item(hp, data))
    run.prune()
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
