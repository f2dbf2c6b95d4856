"""The device that a run computes on, with its precision and its determinism."""

from conure.errors import InputError

import torch


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; InputError if there is no such one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """auto, float32 or bfloat16 → one of the latter, the dtype of matrix products in training.

    Weights, sums and losses stay float32.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bfloat16" if native else "float32"


def make_deterministic(device: torch.device) -> None:
    """Makes results on the CPU bit-identical from run to run; resuming relies on it."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, shown by a trial; prints why if not."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        print(f"training without torch.compile, which fails here: {str(error).splitlines()[0]}")
        return False
    return True
