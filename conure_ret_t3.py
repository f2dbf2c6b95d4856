"""Task 3, retrain: trains the conv weights that task 3 kept until they make up for those it lost.

READS  Data/Session/original_desen_finetune_like_nouserID.csv, Data/Session/index.csv,
       checkpoints/tp_t3.pt
WRITES checkpoints/ret_t3.pt, checkpoints/results.csv
NEXT   python conure_tp_t4.py
"""

from dataclasses import dataclass

from conure import launch, losses, training
from conure.settings import ours

import data_loader
from pruning import Stage


@dataclass
class Hyperparameters:
    data_path: str = "Data/Session/original_desen_finetune_like_nouserID.csv"  # a user a line: item,…,,target,…
    index_path: str = "Data/Session/index.csv"  # ids of the items; conure_tp_t1.py writes it
    checkpoint_dir: str = "checkpoints"  # checkpoints and results.csv, read and written
    seed: int = 10  # of initial values, shuffling, negatives and dropout
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of matrix products in training: float32, bfloat16, or auto: bfloat16 on a GPU alone
    compile: bool = False  # let torch.compile fuse what it can; the first steps take minutes
    batch_size: int = 512  # examples a step
    epochs: int = 100  # passes over the training part
    learning_rate: float = 1e-4  # of Adam
    table_rate: float = 1.0  # how many times as fast the head learns
    decay: bool = False  # let the learning rates fall in a line to 0 at the last step
    beta1: float = 0.9  # of Adam
    loss: str = ours("softmax", original="bpr")  # cross entropy among all targets; bpr: against one negative
    rho: float = 0.3  # of the negatives of bpr: smaller draws popular targets more often
    dropout: float = 0.0  # share of the activations that a step leaves out: items, blocks, states
    l2: float = 0.05  # weight decay of the task's head, as a loss term: l2 * sum(w^2) / 2; informed: w - its start
    test_fraction: float = 0.2  # share of the examples held out: half validation, half test; as in tp
    eval_every: int = 0  # steps between evaluations on validation; 0: once an epoch
    snapshot_minutes: float = 10  # between snapshots that a killed run goes on from; 0: at evaluations only
    top_k: int = 5  # cut-off of MRR, HR and NDCG
    as_original: bool = False  # learn as the published code does: its value wherever another default stands here
    overwrite: bool = False  # do the stage over if it is finished, or was begun with other settings


def main(hp: Hyperparameters) -> None:
    items = data_loader.read_index(hp.index_path)
    data = data_loader.load_examples(hp.data_path, hp.test_fraction, items)
    run = training.Run(hp, Stage(3, "ret"), data)
    run.train(losses.target(hp, data))
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
