"""The loop over row chunks that every loss on top of a linear layer shares. Plain torch: it runs on any device.

Logits exist for one chunk of rows at a time, in one buffer that is used again for the next chunk. A `rows` function turns a
chunk's logits into losses and, in place, into the gradient with respect to them; two products then spend that gradient
before the buffer is overwritten. So the gradient costs three products in all and no second look at the logits (the idea of
Liger Kernel's fused loss, arXiv:2410.10989).

    rows(logits, target, loss, row_scale, with_grad, ignore_index, label_smoothing, z_loss, softcap)
        logits [R, V], of unit stride along V, is overwritten by d(sum_r row_scale[r] * loss[r]) / d(logits) if with_grad;
        row_scale [R] fp32 or None for ones; loss [R] is written. Rows whose target is ignored get 0 in both.
"""

from __future__ import annotations

import torch

# Bytes of logits held at a time. On the CPU one chunk is the fastest (1024 x 8192 in fp32, two cores: 113 ms in one or two
# chunks, 131 in four); on a GPU larger chunks only cost memory once a product fills it.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Elements a row of logits is padded to a multiple of. On a GPU neither a product nor a kernel can use 16-byte accesses on
# rows of, say, 50,257 elements; torch's softmax on the CPU wants them without gaps.
ROW_MULTIPLE = {"cpu": 1, "cuda": 16}


def kind_of(device):
    return "cpu" if device.type == "cpu" else "cuda"


def chunk_rows(n, width, itemsize, device):
    """Rows per chunk: what the budget allows, evened out so that the last chunk is about as long as the others."""
    most = max(1, LOGITS_BYTES[kind_of(device)] // (width * itemsize))
    if most >= n:
        return max(n, 1)
    step = 1 if most < 128 else 128  # whole tiles of a product
    most = most // step * step
    chunks = -(-n // most)
    return min(most, -(-n // (chunks * step)) * step)


def compute_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def logits_of(h, weight, bias, out):
    return torch.mm(h, weight.t(), out=out) if bias is None else torch.addmm(bias, h, weight.t(), out=out)


def add_product(total, a, b, first):
    """total = a b, or total += a b, in total's dtype."""
    if total.dtype == a.dtype:
        return torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    if total.device.type == "cpu":  # has no 16-bit product with an fp32 result
        part = torch.mm(a, b)
        return total.copy_(part) if first else total.add_(part)
    if first:
        return torch.mm(a, b, out_dtype=total.dtype, out=total)
    return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


class Gradients:
    """Gradients of hidden, weight and bias, gathered chunk by chunk; an empty tensor for each that is not needed."""

    def __init__(self, h, weight, bias, chunks, need):
        self.need_dh, self.need_dw, self.need_db = need
        wide = compute_dtype(h.dtype)
        self.weight_dtype = weight.dtype
        self.bias_dtype = weight.dtype if bias is None else bias.dtype
        # A sum over chunks rounded to 16 bits at every chunk loses small terms: fp32 where there is more than one.
        sum_dtype = h.dtype if chunks == 1 and weight.dtype == h.dtype else wide
        self.dh = torch.empty(h.shape if self.need_dh else 0, dtype=h.dtype, device=h.device)
        self.dw = torch.empty(weight.shape if self.need_dw else 0, dtype=sum_dtype, device=h.device)
        self.db = torch.zeros(weight.shape[0] if self.need_db else 0, dtype=wide, device=h.device)
        if h.shape[0] == 0:
            self.dw.zero_()

    def add(self, dlogits, h, weight, start):
        if self.need_dh:
            torch.mm(dlogits, weight, out=self.dh[start : start + h.shape[0]])
        if self.need_dw:
            add_product(self.dw, dlogits.t(), h, start == 0)
        if self.need_db:
            self.db += dlogits.sum(0, dtype=self.db.dtype)

    def result(self, shape):
        dh = self.dh.view(shape) if self.need_dh else self.dh
        return dh, self.dw.to(self.weight_dtype), self.db.to(self.bias_dtype)


def _run(rows, hidden, weight, bias, target, row_scale, need, options):
    """-> loss [N], gradients of `sum(row_scale * loss)` (row_scale None: of the plain sum)."""
    h, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    n, vocabulary = h.shape[0], weight.shape[0]
    w = weight.to(h.dtype)  # once per call, not once per chunk
    b = None if bias is None else bias.to(h.dtype)
    multiple = ROW_MULTIPLE[kind_of(h.device)]
    width = -(-vocabulary // multiple) * multiple
    step = chunk_rows(n, width, h.element_size(), h.device)
    loss = torch.empty(n, dtype=compute_dtype(h.dtype), device=h.device)
    buffer = torch.empty((min(step, n), width), dtype=h.dtype, device=h.device)[:, :vocabulary]
    gradients = Gradients(h, weight, bias, -(-n // step), need)
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        logits = logits_of(h[here], w, b, buffer[: here.stop - start])
        scale = None if row_scale is None else row_scale[here]
        rows(logits, target[here], loss[here], scale, any(need), *options)
        gradients.add(logits, h[here], w, start)
    return loss, gradients.result(hidden.shape)


def forward(rows, hidden, weight, bias, target, ignore_index, label_smoothing, z_loss, softcap, reduction,
            need_dhidden, need_dweight, need_dbias):  # fmt: skip
    """-> loss (0-d, or target's shape for "none"), gradients of the sum of losses, and what they must be multiplied by (0-d).

    "none" has no gradients yet: they depend on the upstream ones.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    need = (need_dhidden, need_dweight, need_dbias) if reduction != "none" else (False, False, False)
    mean = left = torch.empty((), dtype=compute_dtype(hidden.dtype), device=hidden.device).fill_(1.0)
    row_scale = None
    if reduction == "mean":
        # Stays on the device. Without any live token the loss is 0, not 0 / 0.
        mean = 1 / (target != ignore_index).sum().clamp(min=1).to(left.dtype)
        if hidden.dtype == torch.float16:
            left = mean  # probabilities / live tokens would often be below fp16's smallest number
        else:
            row_scale = mean.expand(target.numel()).contiguous()  # so that the products' results are rounded once
    loss, gradients = _run(rows, hidden, weight, bias, target, row_scale, need, options)
    loss = loss.view(target.shape) if reduction == "none" else loss.sum() * mean
    return loss, *gradients, left


def backward(rows, scaled, dloss, hidden, weight, bias, target, dhidden, dweight, dbias, left, ignore_index,
             label_smoothing, z_loss, softcap, reduction, need_dhidden, need_dweight, need_dbias):  # fmt: skip
    """-> gradients of hidden, weight and bias, new tensors. `scaled(t, factor)` multiplies by a 0-d tensor in fp32."""
    if reduction != "none":
        factor = dloss * left
        return tuple(scaled(t, factor) for t in (dhidden, dweight, dbias))
    options = (ignore_index, label_smoothing, z_loss, softcap)
    need = (need_dhidden, need_dweight, need_dbias)
    row_scale = dloss.reshape(-1).contiguous()
    return _run(rows, hidden, weight, bias, target, row_scale, need, options)[1]
