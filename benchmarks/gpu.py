"""Tests and benchmarks that need a GPU: correctness checks, then speed at TTL's size beside the hardware's ceilings.

Prints CHECK and BENCH lines, and RAW lines with every timed call; `bash benchmarks/gpu.sh` runs it and keeps a log. The
sections come in order of importance. A section is skipped if it would not end in time, or cannot run on this device.
Exits with 1 if a check fails.
"""

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from conure import launch
from conure.device import pick_device
from conure.errors import InputError
from conure.settings import Below1, Count, Device, Dilations, KernelSize, Length, Positive, Range, UpTo1, Width

import torch

from benchmarks import bench, gpu_checks, gpu_speed
from benchmarks.gpu_checks import Check
from benchmarks.gpu_speed import Session, report


@dataclass
class Hyperparameters:
    device: Device = "auto"  # auto: cuda if there is a GPU
    minutes: Positive = 8.7  # time limit; a section that would exceed it is skipped
    skip: tuple[str, ...] = ()  # a section to skip; may be repeated
    items: Annotated[int, Range(3)] = 645_974  # in the catalogue, as in TTL
    length: Length = 100  # of the sequences in the file, in items; the model reads one less
    batch_size: Count = 32  # sequences a step
    channels: Width = 256  # width of the embedding and of every layer
    dilations: Dilations = (1, 4, 1, 4, 1, 4, 1, 4)  # one residual block each
    kernel_size: KernelSize = 3  # taps of every convolution
    negative_fraction: UpTo1 = 0.2  # share of the items sampled as negatives in a step
    dropout: Below1 = 0.3  # dropout probability of the step with dropout; elsewhere 0
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products
    steps: Count = 200  # timed steps
    task_steps: Count = 147_000  # training steps of task 1 on TTL, 4 epochs, to project the time for
    aim_minutes: Positive = 60  # target for the projected time
    rows: Annotated[int, Range(10)] = 16_384  # to rank
    matmul_size: Count = 8192  # side of the square matrices that measure the matrix-product throughput
    copy_mb: Count = 2048  # MB copied to measure the memory bandwidth
    check_items: Annotated[int, Range(3)] = 5000  # in the catalogue of the checks
    users: Count = 400  # of the demo data that the scripts learn from


def agreement(session: Session) -> Iterator[Check]:
    return gpu_checks.agreement(session.device, session.shape(items=session.hp.check_items))


def scripts(session: Session) -> Iterator[Check]:
    return gpu_checks.scripts(session.device, session.hp.users)


def export(session: Session) -> Iterator[Check]:
    return gpu_checks.export(session.device, session.shape(items=session.hp.check_items))


CHECKS = (agreement, scripts, export)
# In order of importance, with an upper bound of the seconds on a GPU.
SECTIONS = {
    gpu_speed.ceilings: 20,
    gpu_speed.step: 60,
    agreement: 30,
    scripts: 100,
    export: 30,
    gpu_speed.wall: 30,
    gpu_speed.ranking: 30,
    gpu_speed.compiled_step: 120,
}


def run_section(section: Callable, session: Session) -> list[Check]:
    """Prints the section's lines and returns its checks.

    An exception is reported and the next sections run, because a GPU may be available for one call only.
    """
    checks = []
    try:
        for check in section(session) or ():
            print_check(check)
            checks.append(check)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"[:200]
        if section in CHECKS:
            checks.append(Check(section.__name__, False, {"error": re.sub(r"\s+", "_", reason)}))
            print_check(checks[-1])
        else:
            report(section.__name__, unavailable=reason)
    return checks


def print_check(check: Check) -> None:
    values = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in check.detail.items()}
    shown = (f"{name}={value}" for name, value in values.items())
    print(f"CHECK name={check.name} ok={str(check.ok).lower()}", *shown)


def main(hp: Hyperparameters) -> int:
    began, names = time.monotonic(), [section.__name__ for section in SECTIONS]
    unknown = sorted({*hp.skip} - {*names})
    if unknown:
        raise InputError(f"--skip {unknown[0]} is no section: give one of {', '.join(names)}")
    if hp.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch initialises CUDA; hides GPUs from the scripts too
    session, checks = Session(hp, pick_device(hp.device)), []
    torch.manual_seed(10)
    about = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda), "threads": torch.get_num_threads()}
    report("machine", device=session.device.type, machine=bench.machine(), **about)
    for section, expected in SECTIONS.items():
        elapsed = time.monotonic() - began
        if section.__name__ in hp.skip or elapsed + expected > hp.minutes * 60:
            reason = "asked for" if section.__name__ in hp.skip else "no time left"
            report("skipped", section=section.__name__, reason=reason)
            continue
        checks += run_section(section, session)
        report("section", name=section.__name__, seconds=time.monotonic() - began - elapsed)
    failed = [check.name for check in checks if not check.ok]
    print(f"CHECKS run={len(checks)} failed={','.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    launch.run(main, Hyperparameters, __doc__)
