"""Task 4, retrain: trains the conv weights that task 4 kept until they make up for those it lost.

READS  Data/Session/original_desen_gender.csv, Data/Session/index.csv,
       checkpoints/tp_t4.pt
WRITES checkpoints/ret_t4.pt, checkpoints/results.csv
NEXT   python evaluate.py
"""

from dataclasses import dataclass

from conure import launch, losses, training
from conure.settings import ours

import data_loader
from pruning import Stage


@dataclass
class Hyperparameters:
    data_path: str = "Data/Session/original_desen_gender.csv"  # a user a line: item,…,,class
    index_path: str = "Data/Session/index.csv"  # ids of the items; conure_tp_t1.py writes it
    checkpoint_dir: str = "checkpoints"  # checkpoints and results.csv, read and written
    seed: int = 10  # of initial values, shuffling, negatives and dropout
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of matrix products in training: float32, bfloat16, or auto: bfloat16 on a GPU alone
    compile: bool = False  # let torch.compile fuse what it can; the first steps take minutes
    batch_size: int = 512  # examples a step
    epochs: int = 50  # passes over the training part
    learning_rate: float = 1e-4  # of Adam
    table_rate: float = 1.0  # how many times as fast the head learns
    decay: bool = False  # let the learning rates fall in a line to 0 at the last step
    beta1: float = 0.9  # of Adam
    loss: str = ours("softmax", original="bce")  # cross entropy among all targets; bce: against one uniform negative
    dropout: float = 0.0  # share of the activations that a step leaves out: items, blocks, states
    l2: float = 0.02  # weight decay of the task's head, as a loss term: l2 * sum(w^2) / 2; informed: w - its start
    test_fraction: float = 0.2  # share of the examples held out: half validation, half test; as in tp
    eval_every: int = 0  # steps between evaluations on validation; 0: once an epoch
    snapshot_minutes: float = 10  # between snapshots that a killed run goes on from; 0: at evaluations only
    top_k: int = 1  # a prediction is right if the class is among so many best; 1: accuracy as usual
    as_original: bool = False  # learn as the published code does: its value wherever another default stands here
    overwrite: bool = False  # do the stage over if it is finished, or was begun with other settings


def main(hp: Hyperparameters) -> None:
    items = data_loader.read_index(hp.index_path)
    data = data_loader.load_examples(hp.data_path, hp.test_fraction, items)
    run = training.Run(hp, Stage(4, "ret"), data, metric="accuracy")
    run.train(losses.target(hp, data))
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
