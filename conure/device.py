"""The device of a run, its precision, and determinism."""

import os

from conure.errors import InputError

import torch


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; InputError for cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # float32 convolutions on a GPU would be TF32, with 10 bits of mantissa
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """auto, float32 or bfloat16 → float32 or bfloat16, the dtype of matrix products in training.

    auto takes bfloat16 if the hardware has instructions for it. Weights, sums and losses stay float32.
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
    """Makes results bit-identical from run to run on the same device, which resuming relies on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out by a trial; prints the reason if not."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        print(f"training without torch.compile, which fails here: {str(error).splitlines()[0]}")
        return False
    return True
