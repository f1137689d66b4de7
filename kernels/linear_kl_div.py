"""The divergence of two linear layers' logits, a chunk of rows at a time: the loop, and the Triton rows, those of kl_div.py.

Student's and teacher's logits of a chunk lie in two buffers, used again for the next chunk. A `rows` function

    rows(student, teacher, mask, factor, loss, gradient, beta, temperature, scales, softcaps)

writes the losses [R] and, where `gradient` is a tensor (the student's logits), d(sum(factor * loss)) over them; two products
spend that gradient at once. The teacher's logits are only read. Triton is imported by the Triton launchers alone.
"""

from __future__ import annotations

import torch

from .chunked_loss import ROW_MULTIPLE, Gradients, chunk_rows, compute_dtype, inverse, kind_of, logits_of, row_scales


def _run(rows, student, teacher, mask, factor, options, need):
    """student, teacher: (hidden, weight, bias). -> losses [N], gradients of sum(factor * loss), factor [N] or None for ones."""
    hidden, weight, bias = student
    h, t = (x[0].reshape(x[0].shape[:-1].numel(), x[0].shape[-1]) for x in (student, teacher))
    # Once per call, not once per chunk.
    (w, b), (tw, tb) = (
        (x[1].to(x[0].dtype), None if x[2] is None else x[2].to(x[0].dtype)) for x in (student, teacher)
    )
    beta, temperature, scale, softcap, teacher_scale, teacher_softcap, logits_bytes = options
    n, vocabulary = h.shape[0], weight.shape[0]
    multiple = ROW_MULTIPLE[kind_of(h.device)]
    width = -(-vocabulary // multiple) * multiple
    step = chunk_rows(n, width, h.element_size() + t.element_size(), h.device, logits_bytes)
    loss = torch.empty(n, dtype=compute_dtype(h.dtype), device=h.device)
    x, y = (torch.empty((min(step, n), width), dtype=z.dtype, device=h.device)[:, :vocabulary] for z in (h, t))
    gradients = Gradients(h, weight, bias, -(-n // step), need)
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        a = logits_of(h[here], w, b, x[: here.stop - start])
        c = logits_of(t[here], tw, tb, y[: here.stop - start])
        of_rows = (None if z is None else z[here] for z in (mask, factor))
        rows(
            a, c, *of_rows, loss[here], a if any(need) else None, beta, temperature,
            (scale, teacher_scale), (softcap, teacher_softcap),
        )  # fmt: skip
        if any(need):
            gradients.add(a, h[here], w, start)
    return loss, gradients.result(hidden.shape)


def forward(rows, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, token_weight, denominator,
            beta, temperature, scale, softcap, teacher_scale, teacher_softcap, reduction, logits_bytes,
            need_dhidden, need_dweight, need_dbias):  # fmt: skip
    """-> loss (0-d, or rows for "none"), gradients of the sum of losses, and what they must be multiplied by (0-d).

    "none" has no gradients yet (they depend on the upstream ones) and no token weights. Those and the denominator enter every
    row's gradient before the products sum over rows.
    """
    need = (need_dhidden, need_dweight, need_dbias) if reduction != "none" else (False, False, False)
    mask = None if mask is None else mask.reshape(-1)
    factor, left = row_scales(hidden, token_weight, denominator)
    options = (beta, temperature, scale, softcap, teacher_scale, teacher_softcap, logits_bytes)
    student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    loss, gradients = _run(rows, student, teacher, mask, factor, options, need)
    if reduction == "none":
        return loss.view(hidden.shape[:-1]), *gradients, left
    if token_weight is not None:
        loss = loss * token_weight.reshape(-1).to(loss.dtype)
        loss = loss if mask is None else loss.masked_fill(~mask, 0)
    loss = loss.sum()
    return loss if denominator is None else loss * inverse(denominator, loss.dtype), *gradients, left


def backward(rows, scaled, dloss, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, token_weight,
             denominator, dhidden, dweight, dbias, left, beta, temperature, scale, softcap, teacher_scale, teacher_softcap,
             reduction, logits_bytes, need_dhidden, need_dweight, need_dbias):  # fmt: skip
    """-> gradients of hidden, weight and bias, new tensors. `scaled(t, factor)` multiplies by a 0-d tensor, rounding once."""
    if reduction != "none":
        factor = dloss * left
        return tuple(scaled(t, factor) for t in (dhidden, dweight, dbias))
    options = (beta, temperature, scale, softcap, teacher_scale, teacher_softcap, logits_bytes)
    student, teacher = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    mask = None if mask is None else mask.reshape(-1)
    need = (need_dhidden, need_dweight, need_dbias)
    return _run(rows, student, teacher, mask, dloss.reshape(-1).contiguous(), options, need)[1]


def _triton_rows(student, teacher, mask, factor, loss, gradient, beta, temperature, scales, softcaps):
    from .kl_div import flat_mask, launch

    launch(student, teacher, flat_mask(mask), factor, loss, None, gradient, beta, temperature, scales, softcaps)


def linear_kl_div_fwd(*args):
    """forward with the Triton rows."""
    return forward(_triton_rows, *args)


def linear_kl_div_bwd(*args):
    """backward with the Triton rows."""
    from .linear_cross_entropy import _scaled

    return backward(_triton_rows, _scaled, *args)
