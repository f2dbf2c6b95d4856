"""Task 2, train and prune: learns the items that a user clicks with the free weights, then keeps the strongest 30 % of
them.

READS  Data/Session/original_desen_finetune_click_nouserID.csv, Data/Session/index.csv,
       checkpoints/ret_t1.pt
WRITES checkpoints/tp_t2.pt, checkpoints/results.csv
NEXT   python conure_ret_t2.py
"""

from dataclasses import dataclass

from conure import launch, losses, training
from conure.settings import ours

import data_loader
from pruning import Stage


@dataclass
class Hyperparameters:
    data_path: str = "Data/Session/original_desen_finetune_click_nouserID.csv"  # a user a line: item,…,,target,…
    index_path: str = "Data/Session/index.csv"  # ids of the items; conure_tp_t1.py writes it
    checkpoint_dir: str = "checkpoints"  # checkpoints and results.csv, read and written
    seed: int = 10  # of initial values, shuffling, negatives and dropout
    device: str = "auto"  # auto, cpu or cuda
    precision: str = "auto"  # of matrix products in training: float32, bfloat16, or auto: bfloat16 on a GPU alone
    compile: bool = False  # let torch.compile fuse what it can; the first steps take minutes
    batch_size: int = 512  # examples a step
    epochs: int = 15  # passes over the training part
    learning_rate: float = 1e-4  # of Adam
    table_rate: float = 1.0  # how many times as fast the head learns
    decay: bool = False  # let the learning rates fall in a line to 0 at the last step
    beta1: float = 0.9  # of Adam
    loss: str = ours("softmax", original="bpr")  # cross entropy among all targets; bpr: against one negative
    rho: float = 0.3  # of the negatives of bpr: smaller draws popular targets more often
    informed_head: bool = ours(True, original=False)  # start the head as task 1's, or with the targets' frequencies
    dropout: float = 0.0  # share of the activations that a step leaves out: items, blocks, states
    l2: float = 0.02  # weight decay of the task's head, as a loss term: l2 * sum(w^2) / 2; informed: w - its start
    prune_ratio: float = 0.7  # share of the free weights that stays free for later tasks
    test_fraction: float = 0.2  # share of the examples held out: half validation, half test
    eval_every: int = 0  # steps between evaluations on validation; 0: once an epoch
    snapshot_minutes: float = 10  # between snapshots that a killed run goes on from; 0: at evaluations only
    top_k: int = 5  # cut-off of MRR, HR and NDCG
    as_original: bool = False  # learn as the published code does: its value wherever another default stands here
    overwrite: bool = False  # do the stage over if it is finished, or was begun with other settings


def main(hp: Hyperparameters) -> None:
    items = data_loader.read_index(hp.index_path)
    data = data_loader.load_examples(hp.data_path, hp.test_fraction, items)
    run = training.Run(hp, Stage(2, "tp"), data)
    run.train(losses.target(hp, data))
    run.prune()
    run.save()


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
