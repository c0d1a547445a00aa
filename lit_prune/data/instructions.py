"""Instructions as text: the tokenizer's chat template, or the Alpaca prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from lit_prune.data.sources import Example
from lit_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENING = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."


class Rendered(NamedTuple):
    """An example as text; `end` is a token id that follows the answer, if any."""

    prompt: str
    answer: str
    end: int | None


def render(tokenizer: PreTrainedTokenizerBase, example: Example) -> Rendered:
    """Renders an instruction, split where the loss begins.

    Args:
        tokenizer: Its chat template is used where it has one.
        example: The instruction.

    Returns:
        Prompt and answer: their concatenation is the whole row's text.

    Raises:
        UserError: The chat template refuses a plain question and answer.
    """
    if tokenizer.chat_template:
        return _chat(tokenizer, example)
    end = cast("int | None", tokenizer.eos_token_id)
    return Rendered(alpaca_prompt(example), example.output, end)


def alpaca_prompt(example: Example) -> str:
    """Returns the prompt of Stanford Alpaca (Taori et al. 2023) for an instruction."""
    if example.input:
        return (
            f"{_OPENING}, paired with an input that provides further context. {_REQUEST}\n\n"
            f"### Instruction:\n{example.instruction}\n\n### Input:\n{example.input}\n\n"
            "### Response:\n"
        )
    return f"{_OPENING}. {_REQUEST}\n\n### Instruction:\n{example.instruction}\n\n### Response:\n"


def _chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> Rendered:
    question = "\n\n".join(text for text in (example.instruction, example.input) if text)
    messages = [{"role": "user", "content": question}]
    answered = [*messages, {"role": "assistant", "content": example.output}]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except Exception as error:
        # a template may raise anything; it is data that came with the tokenizer
        raise UserError(
            "expected a chat template that takes one question and one answer, got an error from "
            f"the tokenizer's: {error}; use another tokenizer"
        ) from error
    prompt, whole = str(prompt), str(whole)
    if whole.startswith(prompt):
        cut = len(prompt)
    else:
        # a template that opens a generation otherwise than it writes a finished turn
        pairs = enumerate(zip(prompt, whole, strict=False))
        cut = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
        answer = whole.rfind(example.output.strip())
        cut = min(cut, answer) if answer >= 0 else cut
    return Rendered(whole[:cut], whole[cut:], None)
