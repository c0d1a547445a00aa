"""What models write, for a look beside the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_prune.modes import evaluating

#: Texts to go on with: any language model can, trained for chats or not.
PROMPTS = (
    "The most important thing about the sea is",
    "Once upon a time, in a small village,",
    "To make a good soup, first",
)
NEW_TOKENS = 40


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, str]:
    """How a model goes on with some texts: its most likely tokens, `NEW_TOKENS` at most.

    Nothing is drawn, and modes and configuration stay as they are.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        prompts: The texts.

    Returns:
        Prompt -> what the model adds.
    """
    return {prompt: _continuation(model, tokenizer, prompt) for prompt in prompts}


@torch.no_grad()
def _continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """One text, without a batch's padding, which would change the figures.

    It is a loop of its own since `generate` mixes in what a checkpoint's generation config asks,
    such as a penalty for repetition, which hides what pruning does.
    """
    device = next(model.parameters()).device
    tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    limit = getattr(model.config, "max_position_embeddings", None) or tokens.shape[1] + NEW_TOKENS
    found: list[int] = []
    inputs, cache = tokens, None
    with evaluating(model):
        for _ in range(min(NEW_TOKENS, limit - tokens.shape[1])):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            inputs, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            if inputs.item() == tokenizer.eos_token_id:
                break
            found.append(int(inputs))
    return tokenizer.decode(found, skip_special_tokens=True)
