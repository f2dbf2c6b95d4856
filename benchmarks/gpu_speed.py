"""Speed at TTL's size on one device, beside the hardware's ceilings: the measuring sections of benchmarks.gpu."""

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from conure import training
from conure.device import can_compile
from conure.ranking import ModelScorer, Ranker

import numpy as np
import torch

from benchmarks import bench, evaluate, train_step
from pruning import Stage

ADAM_BYTES = 7 * 4  # per parameter: reads it, its gradient and both moments; writes all but the gradient
GRADIENT_BYTES = 4  # per parameter: zeroing of the dense gradient in each step
# Kinds of kernels by name; the others are element-wise, gather and fill.
KINDS = {"adam": r"adam", "matrix": r"gemm|nvjet|cutlass|xmma|aten::(add)?mm|aten::bmm"}
NOISE = r"void |at::native::|\(anonymous namespace\)::"  # removed from kernel names


@dataclass
class Session:
    """The settings of benchmarks.gpu, and results that later sections use; NaN until they are measured."""

    hp: Any
    device: torch.device
    gflops: float = math.nan  # matrix-product throughput, GFLOP/s
    bandwidth: float = math.nan  # of memory, bytes read and written per second
    step_seconds: float = math.nan  # mean of the training step

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.hp.precision)

    def shape(self, **changes: Any) -> train_step.Hyperparameters:
        names = ("items", "length", "batch_size", "channels", "dilations", "kernel_size", "negative_fraction")
        same = {name: getattr(self.hp, name) for name in (*names, "precision")}
        return train_step.Hyperparameters(**same | changes)

    def durations(self, what: str, call: Callable[[], Any], count: int, on_device: bool = True) -> np.ndarray:
        """Seconds of each of `count` calls after warm-up, which are queued on the device without synchronisation."""
        on_gpu = on_device and self.device.type == "cuda"
        for _ in range(bench.WARM_UP):
            call()
        synchronize()
        marks = [mark(on_gpu)]
        for _ in range(count):
            call()
            marks.append(mark(on_gpu))
        synchronize()
        seconds = np.array([a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairwise(marks)])
        print(f"RAW what={what} ms={','.join(f'{1e3 * each:.4g}' for each in seconds)}")
        return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark(on_gpu: bool) -> Any:
    """A time stamp: a CUDA event, or the clock of this process."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def report(what: str, **values: Any) -> None:
    """A BENCH line whose values hold no spaces."""
    shown = {name: re.sub(r"\s+", "_", value) if isinstance(value, str) else value for name, value in values.items()}
    bench.report(what, "", **shown)


def spread(seconds: np.ndarray) -> dict[str, float]:
    low, median, high = map(float, np.percentile(seconds, (10, 50, 90)))
    return {"n": len(seconds), "mean": float(seconds.mean()), "median": median, "p10": low, "p90": high}


def ceilings(session: Session) -> None:
    session.gflops = max(bench.matmul_gflops(session.precision, session.hp.matmul_size).values())
    a, b = torch.rand(2, session.hp.copy_mb << 18, device=session.device)  # float32
    seconds = session.durations("copy", lambda: b.copy_(a), 20)
    session.bandwidth = 2 * a.nbytes / float(np.median(seconds))
    report("ceilings", matmul_gflops=session.gflops, precision=session.hp.precision, gb_per_s=session.bandwidth / 1e9)


def step(session: Session) -> None:
    session.step_seconds = time_step(session, "step", session.shape())
    time_step(session, "step_with_dropout", session.shape(dropout=session.hp.dropout))


def compiled_step(session: Session) -> None:
    if not can_compile(session.device):
        raise RuntimeError("torch.compile fails here")
    time_step(session, "step_compiled", session.shape(compile=True))


def make_step(session: Session, shape: train_step.Hyperparameters) -> tuple[torch.nn.Module, Callable[[], None]]:
    torch.manual_seed(10)
    with torch.device(session.device):  # initialises the weights there, which would take a CPU seconds
        model = train_step.make_model(shape)
    return model, train_step.steppers(shape, model, shape.length - 1)["ours"]


def time_step(session: Session, what: str, shape: train_step.Hyperparameters) -> float:
    """Mean seconds of a step; reports them beside both ceilings and the target time."""
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    model, step = make_step(session, shape)
    step()
    synchronize()
    first = time.perf_counter() - began
    seconds = session.durations(what, step, session.hp.steps)
    mean, parameters = float(seconds.mean()), sum(each.numel() for each in model.parameters())
    moved = (ADAM_BYTES + GRADIENT_BYTES) * parameters
    gflops = train_step.operations(shape, shape.length - 1) / mean / 1e9
    report(
        what,
        **spread(seconds),
        seconds_until_first=first,
        precision=shape.precision,
        compile=shape.compile,
        dropout=shape.dropout,
        gflops=gflops,
        share_of_matmul_rate=gflops / session.gflops,
        parameters=parameters,
        adam_and_gradients_gb=moved / 1e9,
        share_of_bandwidth=moved / mean / session.bandwidth,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if session.device.type == "cuda" else bench.peak_rss_mb() / 1e3,
    )
    minutes = mean * session.hp.task_steps / 60
    reached = {"aim_minutes": session.hp.aim_minutes, "reached": str(minutes <= session.hp.aim_minutes).lower()}
    report("projection", of=what, steps=session.hp.task_steps, minutes=minutes, hours=minutes / 60, **reached)
    return mean


def wall(session: Session) -> None:
    """What limits the step: Adam timed alone, and a profile of the kernels by kind and by name."""
    model, step = make_step(session, session.shape())
    step()  # leaves gradients
    adam = training.adam(list(model.parameters()), 1e-4, 0.9)
    seconds = float(np.median(session.durations("adam", adam.step, 20)))
    moved = ADAM_BYTES * sum(each.numel() for each in model.parameters())
    rate = moved / seconds
    shares = {"share_of_step": seconds / session.step_seconds, "share_of_bandwidth": rate / session.bandwidth}
    report("adam", median=seconds, gb=moved / 1e9, gb_per_s=rate / 1e9, **shares)
    kernels = profile(step, session.device, 5)
    kinds = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, taken in kernels.items():
        kinds[next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")] += taken
    kinds["idle"] = max(0.0, session.step_seconds - sum(kinds.values()))  # the device waits for the host
    shares = {f"share_of_{kind}": taken / session.step_seconds for kind, taken in kinds.items()}
    report("wall", wall=max(kinds, key=kinds.get) if kernels else "unknown:_no_profile", **shares)
    for name, taken in sorted(kernels.items(), key=lambda item: -item[1])[:12]:
        report("kernel", ms=1e3 * taken, share_of_step=taken / session.step_seconds, name=re.sub(NOISE, "", name)[:100])


def profile(step: Callable[[], None], device: torch.device, count: int) -> dict[str, float]:
    """Seconds per step by kernel, on a CPU by operator; empty if the profiler records none."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    step()
    synchronize()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(count):
            step()
        synchronize()
    # `Optimizer.…` events contain others, which would count twice.
    events = [event for event in profiler.key_averages() if not event.key.startswith("Optimizer.")]
    if on_gpu:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    return {name: microseconds / 1e6 / count for name, microseconds in times.items()}


def ranking(session: Session) -> None:
    hp = session.hp
    with torch.device(session.device):
        model = train_step.make_model(session.shape())
    data = evaluate.make_data(evaluate.Hyperparameters(rows=hp.rows, items=hp.items, length=hp.length))
    examples = np.arange(hp.rows)
    scorer = ModelScorer(model, data, Stage(1, "inference"), session.device)
    rank = partial(Ranker(scorer, data, "known").rank, examples)
    seconds = session.durations("ranking", rank, 3, on_device=False)  # each call ends with the ranks on the host
    report("ranking", rows=hp.rows, items=hp.items, **spread(seconds), rows_per_s=hp.rows / float(np.median(seconds)))
