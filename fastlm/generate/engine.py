"""Generation: prefill the prompts in one call, then one token a row and step behind a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm.errors import UserError
from fastlm.generate.cpu import CpuDecoder, reason_against
from fastlm.generate.sampling import Draws, SamplingConfig
from fastlm.generate.text import TextStream, check_stop_strings

# On a GPU, reading tokens on the host makes it wait; without a stream that happens only every so many steps, and a text may
# run on unseen for as long.
_GPU_LOOK = 8


@torch.no_grad()
def generate(
    model: Any,
    tokens: Tensor | Sequence[Any],
    max_new_tokens: int = 128,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    eos_id: int | Iterable[int] | None = None,
    pad_id: int | None = None,
    stop_strings: str | Iterable[str] = (),
    tokenizer: Any = None,
    stream: Callable[[str], None] | None = None,
    fast: bool = True,
) -> Tensor | list[Tensor]:
    """Continues prompts.

    A row ends with its end-of-text token, before a stop string, after max_new_tokens, or when prompt and new tokens fill the
    model's max_positions. Prompts of a batch do not see each other: under temperature 0 each gets the tokens it gets alone.

    Args:
        model: a fastlm.models.Transformer.
        tokens: int64 [B, S], or a list of prompts of any lengths, each int64 [S_b] or a list of ints.
        max_new_tokens: at most this many new tokens a row.
        temperature, top_k, top_p, min_p, seed: see SamplingConfig and `fastlm.ops.sample`, which draws; temperature 0 is greedy.
            Equal seeds give equal texts; what a row draws depends on the seed, its logits and its place in the batch, not on the
            other rows.
        eos_id: token or tokens that end a row; None for the model's config.eos_ids, () for none.
        pad_id: fills up rows of a tensor that end early; None for config.pad_id, else the end-of-text token, else 0.
        stop_strings: texts that end a row. They may begin and end inside tokens; a row then keeps the tokens that hold the text
            before the stop string, so that its last token may hold a few characters too many.
        tokenizer: with `decode(ids) -> str`; needed for stop_strings and stream.
        stream: called with each piece of new text as soon as it is settled, e.g. print_piece. For one prompt.
        fast: False keeps to model.hidden. True lets a CPU decode up to three rows by CpuDecoder, which is two to three times
            faster and, for bf16 and fp16 weights, holds an fp32 copy of them meanwhile: twice their memory.

    Returns:
        Prompt + new tokens, end-of-text token included: int64 [B, S + N] for a tensor, N being the longest row's new tokens; for
        a list, a list of int64 tensors without padding. On the device of the model.

    Raises:
        UserError: an empty prompt or batch, a prompt that leaves no room within max_positions, a token outside the vocabulary,
        stop_strings or stream without tokenizer, a number out of range, logits to draw from that are NaN.
    """
    config = SamplingConfig(temperature, top_k, top_p, min_p, seed)
    device, limits = model.head_weight.device, model.config
    prompts = _check_prompts(tokens, limits)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise UserError(f"generate: max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    stops = check_stop_strings(stop_strings)
    if (stops or stream) and tokenizer is None:
        raise UserError("generate: stop_strings and stream need the tokenizer; give tokenizer=")
    if stream and len(prompts) > 1:
        raise UserError(f"generate: stream takes one prompt, got {len(prompts)}; generate them one by one")
    ends = set(limits.eos_ids if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    rows = []
    for prompt in prompts:
        text = TextStream(tokenizer, stream, stops, prompt) if stops or stream else None
        rows.append(_Row(prompt, min(max_new_tokens, limits.max_positions - len(prompt)), ends, text))
    if max(row.limit for row in rows) > 0:
        _run(model, rows, config, fast, look=1 if stream or device.type == "cpu" else _GPU_LOOK)
    for row in rows:
        row.finish()
    if not isinstance(tokens, Tensor):
        return [torch.tensor(row.prompt + row.new, device=device) for row in rows]
    pad = next((p for p in (pad_id, limits.pad_id, *sorted(ends)) if p is not None), 0)
    longest = max(len(row.new) for row in rows)
    padded = [row.prompt + row.new + [pad] * (longest - len(row.new)) for row in rows]
    return torch.tensor(padded, device=device)


class _Row:
    """A prompt and what became of it. `text` is a TextStream where somebody looks at the text."""

    def __init__(self, prompt: list[int], limit: int, ends: set[int], text: TextStream | None) -> None:
        self.prompt, self.limit, self.ends, self.text = prompt, limit, ends, text
        self.new: list[int] = []
        self.done = limit == 0

    def accept(self, token: int) -> None:
        """Takes the next token, unless the row has ended."""
        if self.done:
            return
        if token < 0:
            raise UserError(
                f"generate: the logits behind {len(self.prompt) + len(self.new)} tokens are NaN or all -infinity; "
                "check the model's weights, or its dtype for overflow"
            )
        self.new.append(token)
        if token in self.ends:
            self.done = True
            return
        if self.text is not None:
            self.text.put(token)
        if len(self.new) == self.limit or (self.text is not None and self.text.stopped):
            self.done = True

    def finish(self) -> None:
        """Settles the end of the text and drops the tokens behind a stop string."""
        if self.text is not None:
            self.text.end()
            if self.text.stopped:
                del self.new[self.text.tokens_before_stop() :]


def _run(model: Any, rows: list[_Row], config: SamplingConfig, fast: bool, look: int) -> None:
    """Generates until every row is done. The host reads the new tokens every `look` steps."""
    device = model.head_weight.device
    steps = max(row.limit for row in rows)
    draws = Draws(config, steps, device)
    # Making a CpuDecoder costs about as much as two tokens save.
    one_by_one = fast and steps > 2 and reason_against(model, len(rows)) is None
    decoder = (_OneByOne if one_by_one else _Together)(model, rows)
    logits = decoder.prefill()
    unread: list[Tensor] = []
    for step in range(1, steps + 1):
        token = draws(logits)
        unread.append(token)
        if step % look == 0 or step == steps:
            columns = [token.tolist()] if look == 1 else torch.stack(unread).tolist()
            for column in columns:
                for row, id in zip(rows, column):
                    row.accept(id)
            unread.clear()
            if all(row.done for row in rows):
                return
        # -1, of NaN, is seen when the tokens are read.
        logits = decoder.step(token if look == 1 else token.clamp_min(0))


class _Together:
    """All rows in one call of the model."""

    def __init__(self, model: Any, rows: list[_Row]) -> None:
        self.model, self.rows = model, rows
        self.lengths = [len(row.prompt) for row in rows]
        self.cache = model.make_cache(len(rows), max(n + row.limit for n, row in zip(self.lengths, rows)))
        self.steps = 0

    def prefill(self) -> Tensor:
        """Logits [B, V] of each prompt's last token, the prompts right-padded."""
        device, longest = self.model.head_weight.device, max(self.lengths)
        padded = torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in self.rows], device=device)
        hidden = self.model.hidden(padded, cache=self.cache)
        if min(self.lengths) < longest:
            self.cache.set_lengths(self.lengths)
        last = torch.tensor(self.lengths, device=device) - 1
        return F.linear(hidden[torch.arange(len(last), device=device), last], self.model.head_weight)

    def step(self, token: Tensor) -> Tensor:
        """Logits [B, V] behind one more token [B] a row."""
        self.steps += 1
        if any(row.limit == self.steps for row in self.rows):
            # Rows at their limit go on unread from the start of the cache, for behind its end is no room.
            live = [self.steps < row.limit for row in self.rows]
            self.cache.set_lengths([n + self.steps - 1 if go else 0 for n, go in zip(self.lengths, live)])
        hidden = self.model.hidden(token[:, None], cache=self.cache)
        return F.linear(hidden[:, -1], self.model.head_weight)


class _OneByOne:
    """Each row by itself from the prompt on: its numbers are bit for bit those it gets alone."""

    def __init__(self, model: Any, rows: list[_Row]) -> None:
        self.model, self.rows = model, rows
        self.caches = [model.make_cache(1, len(row.prompt) + row.limit) for row in rows]

    def prefill(self) -> Tensor:
        """Logits [B, V] of each prompt's last token."""
        hidden = [
            self.model.hidden(torch.tensor([row.prompt]), cache=cache) for row, cache in zip(self.rows, self.caches)
        ]
        logits = torch.cat([F.linear(states[:, -1], self.model.head_weight) for states in hidden])
        self.decoder = CpuDecoder(self.model, self.caches)
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Logits [B, V] behind one more token [B] a row; those of finished rows are 0."""
        return self.decoder.step(token.tolist(), [b for b, row in enumerate(self.rows) if not row.done])


def _check_prompts(tokens: Any, config: Any) -> list[list[int]]:
    """The prompts as lists of ints."""
    if isinstance(tokens, Tensor) and (tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise UserError(
            f"generate: tokens must be integers [batch, sequence] or a list of prompts, got {tokens.dtype} {list(tokens.shape)}"
        )
    prompts = []
    for i, prompt in enumerate(tokens.tolist() if isinstance(tokens, Tensor) else tokens):
        if isinstance(prompt, Tensor):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or not all(isinstance(t, int) for t in prompt):
            raise UserError(
                f"generate: prompt {i} must be a list or 1-D tensor of token ids, got {type(prompt).__name__}; put a single "
                "prompt into a list"
            )
        prompts.append(list(prompt))
        _check_prompt(i, prompts[-1], config)
    if not prompts:
        raise UserError("generate: there is no prompt; give at least one")
    return prompts


def _check_prompt(i: int, prompt: list[int], config: Any) -> None:
    if not prompt:
        raise UserError(f"generate: prompt {i} is empty; begin with at least one token, such as the end-of-text token")
    if len(prompt) >= config.max_positions:
        raise UserError(
            f"generate: prompt {i} has {len(prompt)} tokens, the model's context is {config.max_positions} with the new "
            "tokens; shorten the prompt"
        )
    wrong = next((t for t in prompt if not 0 <= t < config.vocab_size), None)
    if wrong is not None:
        raise UserError(
            f"generate: prompt {i} holds token {wrong}, outside the vocabulary of {config.vocab_size}; use the model's tokenizer"
        )
