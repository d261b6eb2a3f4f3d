"""From examples to tokens, and from tokens to a left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from zo_dist.tasks.base import Example

if TYPE_CHECKING:  # the package is imported without transformers, which takes a second
    from transformers import PreTrainedTokenizerBase

# Characters of a text in an error message.
_SHOWN = 60


@dataclass(frozen=True)
class EncodedRow:
    """One example as tokens: for each option the whole sequence and how many of its last are it.

    `label`, `also_right`, `answers`: as in Example. `prompt`: what a generated text continues, shorter than
    the longest input by the tokens that it may have.
    """

    sequences: tuple[tuple[int, ...], ...]
    option_lengths: tuple[int, ...]
    label: int
    also_right: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    prompt: tuple[int, ...] = ()


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_new_tokens: int = 0,
) -> tuple[list[EncodedRow], int]:
    """Tokenise every option as the continuation of its prompt; also count the truncated rows.

    As MeZO does (large_models/utils.py encode_prompt): prompt + option is tokenised as one text,
    and the option's tokens are the last ones, as many as the prompt alone is shorter. A sequence
    beyond `max_length` loses the start of its prompt, never a token that the tokenizer puts before
    every text (BOS), never a part of the option. A token that it puts after a text (EOS) is left
    out: nothing follows an option. Messages are tokenised as the chat template writes them, which has its
    own BOS, and the answer with what the template puts after it.

    A prompt by itself, for a text of up to `max_new_tokens`, is cut to leave room for that.

    ValueError, naming the example: an option that adds no token, or leaves the prompt no room; messages
    without a chat template.
    """
    bos = _tokens_before(tokenizer)
    texts = [text for number, example in enumerate(examples) for text in _texts(number, example, tokenizer)]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    rows, num_truncated = [], 0
    for number, example in enumerate(examples):
        before = bos if isinstance(example.prompt, str) else ()
        # What predicts the option's first token is the BOS or else at least one token of the prompt.
        longest_option = max_length - max(1, len(before))
        prompt = next(encoded)
        prompt_length = len(prompt)
        sequences, lengths, truncated = [], [], False
        for option in example.options:
            tokens = next(encoded)
            length = len(tokens) - prompt_length
            if length < 1 or length > longest_option or prompt_length + len(before) < 1:
                shown = option if len(option) <= _SHOWN else f"{option[:_SHOWN]}..."
                raise ValueError(
                    f"{example.where or f'example {number}'}: the option {shown!r} adds {length} tokens to a "
                    f"prompt of {prompt_length}; it must add 1 to {longest_option} to at least one token "
                    f"(max_length is {max_length}): raise data.max_length, or leave the row out"
                )
            room = max_length - len(before)
            truncated |= len(tokens) > room
            sequences.append((*before, *tokens[-room:]))
            lengths.append(length)
        num_truncated += truncated
        kept = (*before, *prompt[-max(1, max_length - max_new_tokens - len(before)) :])
        rows.append(
            EncodedRow(
                *(tuple(sequences), tuple(lengths), example.label, example.also_right, example.answers),
                prompt=kept if example.answers else (),
            )
        )
    return rows, num_truncated


def single_token(rows: Sequence[EncodedRow]) -> bool:
    """Can this data set take the fast form of `collate`?

    Yes if every option is one token, the options of a row share their prompt's tokens, and all
    rows have equally many options, two or more, of which one is right. Decide once for a whole data set,
    so that all ranks agree.
    """
    return len({len(row.sequences) for row in rows}) == 1 and all(
        len(row.sequences) > 1
        and set(row.option_lengths) == {1}
        and len({tokens[:-1] for tokens in row.sequences}) == 1
        and not row.also_right
        for row in rows
    )


def collate(
    rows: Sequence[EncodedRow], pad_id: int, *, fast: bool, pad_to_multiple: int = 1
) -> dict[str, Tensor]:
    """Batch R rows, padded on the left; dim 0 of every tensor counts rows.

    Both forms have input_ids and attention_mask (int64) and label [R] (int64).

    - fast (needs `single_token(rows)`): input_ids [R, T] holds the prompts alone, and
      option_ids [R, O] int64 the one token of each option: one sequence per row.
    - general: input_ids [R, O, T] holds prompt and option. option_mask [R, O, K] bool tells which
      of the last K tokens are the option's. A row with fewer than O options is filled up with
      copies of its first one, for which option_valid [R, O] is False. option_right [R, O] bool: the
      label's option and those that are right too.

    `pad_to_multiple` rounds T up. ValueError: fast rows that are not single-token.
    """
    if not fast:
        return _collate_general(rows, pad_id, pad_to_multiple)
    if not single_token(rows):
        raise ValueError("the fast form needs rows for which single_token(rows) holds")
    prompts = [row.sequences[0][:-1] for row in rows]
    input_ids, attention_mask = _pad_left(prompts, pad_id, pad_to_multiple)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "option_ids": torch.tensor([[tokens[-1] for tokens in row.sequences] for row in rows]),
        "label": torch.tensor([row.label for row in rows]),
    }


def collate_prompts(rows: Sequence[EncodedRow], pad_id: int) -> dict[str, Any]:
    """Batch R prompts, padded on the left, for texts to be generated: input_ids and attention_mask [R, T].

    `answers` is a list of R tuples of strings: what counts as right.
    """
    input_ids, attention_mask = _pad_left([row.prompt for row in rows], pad_id, 1)
    answers = [row.answers for row in rows]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "answers": answers}


def _collate_general(rows: Sequence[EncodedRow], pad_id: int, pad_to_multiple: int) -> dict[str, Tensor]:
    num_options = max(len(row.sequences) for row in rows)
    # For each row the options that fill its O places: 0, 1, ..., then 0 again as the filling.
    places = [[option if option < len(row.sequences) else 0 for option in range(num_options)] for row in rows]
    sequences = [row.sequences[i] for row, place in zip(rows, places, strict=True) for i in place]
    lengths = torch.tensor(
        [[row.option_lengths[i] for i in place] for row, place in zip(rows, places, strict=True)]
    )
    input_ids, attention_mask = _pad_left(sequences, pad_id, pad_to_multiple)
    longest = int(lengths.max())
    from_end = torch.arange(longest, 0, -1)  # the last token is number 1 from the end
    valid = [[option < len(row.sequences) for option in range(num_options)] for row in rows]
    right = [[option in (row.label, *row.also_right) for option in range(num_options)] for row in rows]
    return {
        "input_ids": input_ids.view(len(rows), num_options, -1),
        "attention_mask": attention_mask.view(len(rows), num_options, -1),
        "option_mask": from_end <= lengths[..., None],
        "option_valid": torch.tensor(valid),
        "option_right": torch.tensor(right),
        "label": torch.tensor([row.label for row in rows]),
    }


def _pad_left(sequences: Sequence[Sequence[int]], pad_id: int, multiple: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [N, T] int64."""
    longest = max(len(tokens) for tokens in sequences)
    width = -(-longest // multiple) * multiple
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(sequences):
        input_ids[row, width - len(tokens) :] = torch.tensor(tokens)
        attention_mask[row, width - len(tokens) :] = 1
    return input_ids, attention_mask


def _texts(number: int, example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt, then prompt + option for each option."""
    if isinstance(example.prompt, str):
        if example.as_is:
            # A blank at the prompt's end is most often one token with the word after it.
            return [example.prompt.rstrip(" "), *(example.prompt + option for option in example.options)]
        # Outer spaces go, as in MeZO.
        prompt = example.prompt.lstrip()
        return [text.rstrip(" ") for text in (prompt, *(prompt + option for option in example.options))]
    messages = [dict(message) for message in example.prompt]
    try:
        prompt = _templated(tokenizer, messages, asks=True)
        answers = [{"role": "assistant", "content": option} for option in example.options]
        # What a template puts after the mark of the answer's end is not for the model to say.
        wholes = [_templated(tokenizer, [*messages, answer]).rstrip() for answer in answers]
    except (ValueError, TemplateError) as error:
        raise ValueError(f"example {number}: no chat template for these messages: {error}") from error
    if not all(whole.startswith(prompt) for whole in wholes):
        raise ValueError(
            f"example {number}: the tokenizer's chat template writes the messages in another way once they "
            "are answered, so that where the answer begins is not known; give prompt and completion as text"
        )
    return [prompt, *wholes]


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], asks: bool = False) -> str:
    """The template's text; one that `asks` ends where the assistant's answer begins."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))


def _tokens_before(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text: BOS, or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next(i for i in starts if whole[i : i + len(bare)] == bare)])
