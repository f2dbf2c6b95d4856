"""Task 1, retrain: trains the conv weights that pruning kept, to recover what it cost.

READS  Data/Session/original_desen_pretrain.csv, Data/Session/index.csv,
       checkpoints/tp_t1.pt
WRITES checkpoints/ret_t1.pt, checkpoints/results.csv
NEXT   python conure_tp_t2.py
"""

from dataclasses import dataclass

from conure import launch, losses, training, vocabulary
from conure.settings import Below1, Count, LeaveOut, Positive, Running, Seed, Share, SplitSeed, UpTo1, ours

import data_loader
from data_loader import Split
from pruning import Stage


@dataclass
class Hyperparameters(Running):
    data_path: str = "Data/Session/original_desen_pretrain.csv"  # a user a line: item,…
    seed: Seed = 10  # of initial weights, shuffling, negative sampling and dropout
    batch_size: Count = 32  # sequences a step
    epochs: Count = 10  # passes over the training examples
    learning_rate: Positive = 1e-3  # of Adam
    table_rate: Positive = ours(10.0, original=1.0)  # learning-rate multiplier of the head; if tied, of its bias
    decay: bool = ours(True, original=False)  # decay the learning rates linearly to 0 at the last step
    average_last: Below1 = 0.0  # share of the steps, at the end, over which weights are averaged
    beta1: Below1 = 0.9  # of Adam
    negative_fraction: UpTo1 = 0.2  # share of the items sampled as negatives in a step; 1: full softmax
    padding_in_loss: bool = ours(False, original=True)  # have a loss for padding as next item too
    dropout: Below1 = ours(0.3, original=0.0)  # dropout probability of embeddings, residual blocks and hidden states
    test_fraction: Share = 0.2  # share of the examples held out, half for validation, half for test; as in tp
    split_seed: SplitSeed = 10  # of the choice of held-out examples
    top_k: Count = 5  # k of MRR@k, HR@k and NDCG@k
    all_positions: bool = ours(True, original=False)  # evaluate at every position of a row, not at the last alone
    leave_out: LeaveOut = ours("auto", original="nothing")  # known: a row's items are no candidates; auto: if few recur
    as_original: bool = False  # train as the published code does: take each value called `original`


def main(hp: Hyperparameters) -> None:
    items = vocabulary.read_index(hp.index_path)
    data = data_loader.load_sequences(hp.data_path, Split(hp.test_fraction, hp.split_seed), items)
    run = training.Run(hp, Stage(1, "ret"), data)
    run.train(losses.next_item(hp, data))
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
