"""Task 1, train and prune: learns the next item at every position, then keeps the strongest 30 % of the conv weights.

READS  Data/Session/original_desen_pretrain.csv
WRITES checkpoints/tp_t1.pt, checkpoints/results.csv, Data/Session/index.csv
NEXT   python conure_ret_t1.py
"""

from dataclasses import dataclass

from conure import launch, losses, training
from conure.settings import ours

import data_loader
from pruning import Stage


@dataclass
class Hyperparameters:
    data_path: str = "Data/Session/original_desen_pretrain.csv"  # a user a line: item,…
    index_path: str = "Data/Session/index.csv"  # ids of the items; this script writes it
    checkpoint_dir: str = "checkpoints"  # where checkpoints and results.csv are written
    seed: int = 10  # of initial values, shuffling, negatives and dropout
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of matrix products in training: float32, bfloat16, or auto: bfloat16 on a GPU alone
    compile: bool = False  # let torch.compile fuse what it can; the first steps take minutes
    batch_size: int = 32  # sequences a step
    epochs: int = 4  # passes over the training part
    learning_rate: float = 1e-3  # of Adam
    table_rate: float = ours(10.0, original=1.0)  # how many times as fast the item embedding and the head learn
    decay: bool = ours(True, original=False)  # let the learning rates fall in a line to 0 at the last step
    beta1: float = 0.9  # of Adam
    channels: int = 256  # width of the embedding and of every layer
    dilations: tuple[int, ...] = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: int = 3  # taps of every convolution
    positional_embedding: bool = False  # add a learned vector for each position to the items
    negative_fraction: float = 0.2  # share of the items sampled as negatives each step; 1: full softmax
    padding_in_loss: bool = ours(False, original=True)  # also learn to predict padding
    dropout: float = ours(0.3, original=0.0)  # share of the activations that a step leaves out: items, blocks, states
    prune_ratio: float = 0.7  # share of the free weights that stays free for later tasks
    test_fraction: float = 0.2  # share of the examples held out: half validation, half test
    eval_every: int = 0  # steps between evaluations on validation; 0: once an epoch
    snapshot_minutes: float = 10  # between snapshots that a killed run goes on from; 0: at evaluations only
    top_k: int = 5  # cut-off of MRR, HR and NDCG
    as_original: bool = False  # learn as the published code does: its value wherever another default stands here
    overwrite: bool = False  # do the stage over if it is finished, or was begun with other settings


def main(hp: Hyperparameters) -> None:
    data = data_loader.load_sequences(hp.data_path, hp.test_fraction)
    run = training.Run(hp, Stage(1, "tp"), data)
    run.train(losses.next_item(hp, data))
    run.prune()
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
