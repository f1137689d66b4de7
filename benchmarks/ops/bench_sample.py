"""sample: a token from logits [B, V] under the usual filters, against a sort and torch.multinomial, and FlashInfer's kernels."""

import torch

from benchmarks.harness import Aot, Bench, Provider, compiled, meta, ours, plain
from fastlm import ops

SETTINGS = {
    "none": {}, "top_k_top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.05},
}  # fmt: skip
SEED = 17


def make(dtype, device, B, V, filters, peak=0.0):
    """logits [B, V] spread as a model's are. peak: how far one token stands above the others, for a draw without a choice."""
    logits = 2.5 * torch.randn(B, V, device=device)
    logits[torch.arange(B), torch.randint(V, (B,))] += peak
    return logits.to(dtype), SETTINGS[filters]


def sample(logits, settings, backend):
    # As floating point: the gate compares numbers.
    return ops.sample(logits, seed=SEED, backend=backend, **settings).double()


def by_hand(logits, settings):
    logits = logits.float() / settings.get("temperature", 1.0)
    if "top_k" in settings:
        logits = logits.masked_fill(logits < logits.topk(settings["top_k"]).values[:, -1:], -torch.inf)
    if "top_p" in settings:
        ordered, order = logits.sort()
        remove = ordered.softmax(-1).cumsum(-1) <= 1 - settings["top_p"]
        remove[:, -1] = False
        logits = logits.masked_fill(remove.scatter(-1, order, remove), -torch.inf)
    p = logits.softmax(-1)
    if "min_p" in settings:
        p = p.masked_fill(p < settings["min_p"] * p.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(p, 1)[:, 0].double()


def flashinfer():
    from flashinfer import sampling

    def fn(logits, settings):
        logits = logits.float() / settings.get("temperature", 1.0)
        if "min_p" in settings:
            return sampling.min_p_sampling_from_probs(logits.softmax(-1), settings["min_p"]).double()
        if "top_k" in settings:
            tokens = sampling.top_k_top_p_sampling_from_logits(
                logits, settings["top_k"], settings["top_p"], filter_apply_order="top_k_first"
            )
            return tokens.double()
        if "top_p" in settings:
            return sampling.top_p_sampling_from_probs(logits.softmax(-1), settings["top_p"]).double()
        return sampling.sampling_from_logits(logits).double()

    return fn


BENCH = Bench(
    op="sample",
    make=make,
    reference=lambda logits, settings: sample(logits, settings, "reference"),
    providers=[*ours("sample", sample), plain(by_hand), compiled(by_hand), Provider("flashinfer", flashinfer)],
    sizes={
        "tiny": [{"B": 2, "V": 500, "filters": "top_k_top_p"}],
        "cpu": [{"B": 4, "V": 32000, "filters": f} for f in SETTINGS],
        "quick": [{"B": b, "V": 128256, "filters": f} for b in (1, 128) for f in ("none", "top_k_top_p", "top_p")],
        "full": [{"B": b, "V": v, "filters": f} for b in (1, 16, 128, 512) for v in (50257, 128256) for f in SETTINGS],
    },
    traffic=lambda mode, logits, settings: logits.nbytes,
    modes=("forward",),
    gate_size=lambda size: size | {"peak": 200.0},
)


def _aot(b, v, each=False, logprobs=False):
    """Without filters, or with every setting of each row."""
    seed, numbers = meta(2, dtype=torch.int64), meta(b, dtype=torch.float32) if each else None
    return Aot("sample:draw", meta(b, v), numbers, numbers, numbers, seed, 0.8, 0.0, logprobs)


AOT = [
    *(_aot(b, v) for b, v in ((1024, 256), (256, 128256), (256, 50257), (1, 128256))),
    *(_aot(b, 128256, True, True) for b in (256, 1)),
]
