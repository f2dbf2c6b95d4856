"""Write the user representation of every row of a data file, in file order.

READS  a serving file, from tools.export; a data file of any task, or any file of `item,item,…` lines
WRITES output, by its ending:  .npy      float32 (rows, channels), rows in the order of the data file
                               .csv      user, then a column for each channel
                               .parquet  the same; needs pyarrow
NEXT   your own model, nearest-neighbour index or dashboard

For representations of users as of today, give rows of whole histories: python -m tools.recommend --help says how.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import BinaryIO

from conure import launch
from conure.device import pick_device
from conure.errors import InputError
from conure.files import whole_file

import numpy as np
import pandas as pd

from tools.serving.served import Served, Source

BLOCKS_A_GROUP = 64  # per row group of a parquet file: 16,384 rows

Blocks = Iterator[tuple[list[str], np.ndarray]]  # users, and their representations (B, C) float32


@dataclass
class Hyperparameters(Source):
    output: str = "users.npy"  # file to write: .npy, .csv or .parquet


def write_npy(file: BinaryIO, blocks: Blocks) -> None:
    """Writes the header first without, and at the end with the number of rows; its size is the same."""
    count, header = 0, {"descr": "<f4", "fortran_order": False}
    for _, block in blocks:
        if count == 0:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (0, block.shape[1])})
        file.write(np.ascontiguousarray(block, "<f4").tobytes())
        count += len(block)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, block.shape[1])})


def tables(blocks: Blocks) -> Iterator[pd.DataFrame]:
    for users, block in blocks:
        table = pd.DataFrame(block, columns=[f"v{channel}" for channel in range(block.shape[1])])
        table.insert(0, "user", users)
        yield table


def write_csv(file: BinaryIO, blocks: Blocks) -> None:
    for number, table in enumerate(tables(blocks)):
        table.to_csv(file, index=False, header=number == 0)


def write_parquet(file: BinaryIO, blocks: Blocks) -> None:
    """Writes row groups of many blocks, because the writer keeps the metadata of each group in memory."""
    import pyarrow
    import pyarrow.parquet

    writer, waiting = None, tables(blocks)
    while parts := list(itertools.islice(waiting, BLOCKS_A_GROUP)):
        group = pyarrow.Table.from_pandas(pd.concat(parts, ignore_index=True))
        writer = writer or pyarrow.parquet.ParquetWriter(file, group.schema, use_dictionary=False)
        writer.write_table(group)
    writer.close()


WRITERS = {".npy": write_npy, ".csv": write_csv, ".parquet": write_parquet}


def writer_of(path: str) -> Callable[[BinaryIO, Blocks], None]:
    """The writer for the file's ending; InputError for another ending, or if pyarrow is missing."""
    ending = os.path.splitext(path)[1]
    if ending not in WRITERS:
        raise InputError(f"--output {path}: the name must end with {', '.join(WRITERS)}")
    if ending == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(".parquet needs pyarrow: .venv/bin/python -m pip install pyarrow")
    return WRITERS[ending]


def main(hp: Hyperparameters) -> None:
    write = writer_of(hp.output)
    hp.check_output(hp.output)
    served = Served(hp, pick_device(hp.device))
    batches = served.batches(hp.data_path, hp.ids)
    with whole_file(hp.output) as file:
        write(file, ((users, served.represent(ids).cpu().numpy()) for users, ids in batches))
    print(served.summary())
    print(f"wrote {hp.output}: {served.rows:,} rows, {served.channels} channels")


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
