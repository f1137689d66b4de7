"""How much of the machine training uses: floating-point operations a token over a peak.

share of peak = tokens per second * flops_per_token / peak
"""

from __future__ import annotations

import time

import torch

# Dense tensor-core peaks from the data sheets, in FLOP/s, for the share that papers call MFU.
_GPU_PEAKS = {
    "bf16": {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12},
}


def flops_per_token(model: torch.nn.Module, context: int) -> float:
    """Floating-point operations of forward and backward for one token: 6 * N + 12 * L * H * Dh * context.

    N counts the weights that a token is multiplied with: matrices, without an input embedding that is only looked up. The second
    term is attention over the whole context (L layers, H heads of width Dh; causal masks are not discounted), left out for models
    whose config does not name those sizes. Convention: Chowdhery et al., PaLM, 2022, arXiv 2204.02311, appendix B.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    names: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        names[id(p)] = names.get(id(p), 0) + 1
    looked_up = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    config = getattr(model, "config", None)
    tied = bool(getattr(config, "tie_embeddings", False))
    vocabulary = getattr(config, "vocab_size", None)
    for key, weight in looked_up.items():
        is_output_too = names[key] > 1 or (tied and weight.shape[0] == vocabulary)
        if not is_output_too:
            matrices -= weight.numel()
    sizes = [getattr(config, name, None) for name in ("n_layers", "n_heads", "head_dim")]
    attention = 0 if None in sizes else 12 * sizes[0] * sizes[1] * sizes[2] * context
    return 6.0 * matrices + attention


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The peak to compare with, in FLOP/s, and a line that says where it comes from.

    A data-sheet figure for the GPUs of the table above in bf16, else the best matrix product of 1024 x 1024 (4096 on a GPU)
    measured during about 0.2 s. On a machine busy with other work the measured figure is too low, and the share too high.
    """
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        for name, peak in _GPU_PEAKS.get(precision, {}).items():
            if name in gpu:
                return peak, f"{peak / 1e12:.0f} TFLOP/s, {precision} on {gpu} by its data sheet"
    peak = _measured_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return peak, f"{peak / 1e9:,.0f} GFLOP/s, {precision} matrix product measured on this machine's {device.type}"


def _measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    (a @ b)[0, 0].item()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading one number waits for the product
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best if best < float("inf") else 2 * size**3 / (time.perf_counter() - start)
