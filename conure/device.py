"""The device of a run, and the precision of its matrix products."""

from conure.errors import InputError

import torch


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; InputError for cuda without a GPU.

    Results there become the same, bit for bit, from run to run, which resuming relies on. A GPU warns of what it cannot
    compute so.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; use --device auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True, warn_only=name == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.allow_tf32 = False  # by default float32 convolutions keep 10 bits of the mantissa
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


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out by a trial; prints the reason if not."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        print(f"training without torch.compile, which fails here: {str(error).splitlines()[0]}")
        return False
    return True
