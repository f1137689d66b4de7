"""Text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastlm.errors import UserError
from fastlm.generate.engine import generate
from fastlm.generate.text import TextStream, check_stop_strings


def complete(
    model: Any, tokenizer: Any, prompts: str | Sequence[str], max_new_tokens: int = 128, **options: Any
) -> str | list[str]:
    """The text that follows each prompt, cut before the first stop string and without the end-of-text token.

    Args:
        model, max_new_tokens, options: as for `generate`. Without eos_id and config.eos_ids, tokenizer.eos_id ends a text.
        tokenizer: with encode, decode, eos_id and bos_id, as fastlm.data.load_tokenizer returns it.
        prompts: one text or several. An empty one begins a new text: with the bos or else the end-of-text token.

    Returns:
        A string for a string, else a list.

    Raises:
        UserError: as `generate`; an empty prompt with a tokenizer that has neither of these tokens; a vocabulary larger than the
        model's.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"generate: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; use the model's own"
        )
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [list(tokenizer.encode(text)) or _beginning(tokenizer) for text in texts]
    if options.get("eos_id") is None:
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        options["eos_id"] = model.config.eos_ids or own
    ends = {options["eos_id"]} if isinstance(options["eos_id"], int) else set(options["eos_id"])
    stops = check_stop_strings(options.get("stop_strings", ()))
    outputs = generate(model, ids, max_new_tokens, tokenizer=tokenizer, **options)
    answers = []
    for prompt, output in zip(ids, outputs):
        new = output[len(prompt) :].tolist()
        if new and new[-1] in ends:
            new.pop()
        stream = TextStream(tokenizer, None, stops, prompt)
        for token in new:
            stream.put(token)
        stream.end()
        answers.append(stream.text)
    return answers[0] if isinstance(prompts, str) else answers


def _beginning(tokenizer: Any) -> list[int]:
    for id in (tokenizer.bos_id, tokenizer.eos_id):
        if id is not None:
            return [id]
    raise UserError("generate: the prompt is empty and the tokenizer has no token that begins a text; give a prompt")
