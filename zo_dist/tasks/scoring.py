"""Losses and scores of language models: one number per row, in float32.

A loss function returns either the losses of the rows [R], each of weight 1, or a pair
(sums [R], weights [R]) whose totals over all rows and ranks are divided. Each calls the model once.

Every function asks the model for logits only in the last columns where they are needed, if its
`forward` takes `logits_to_keep`: the projection to a vocabulary of 50,000 or 150,000 words is
otherwise among the largest costs of a forward pass.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zo_dist.composite import Composite

Batch = Mapping[str, Any]

# The most elements of logits turned to float32 at once (256 MiB).
_FLOAT32_ELEMENTS = 2**26


def option_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Score every option of every row of a `collate` batch; the highest is the model's answer.

    Returns [R, O] float32. General form: the mean log-probability of the option's tokens, as MeZO
    scores (-inf where option_valid is False). Fast form: the logit of the option's one token, which
    is its log-probability up to the softmax's normaliser. That is the same for all options of a row
    and changes neither their order nor a cross-entropy over them, so the pass over the whole
    vocabulary is saved, and mostly the product with the other words: `_option_logits`.
    """
    if "option_ids" in batch:
        return _option_logits(model, batch)
    nll, num_tokens = _option_nll(
        model,
        batch["input_ids"].flatten(0, 1),
        batch["attention_mask"].flatten(0, 1),
        batch["option_mask"].flatten(0, 1),
    )
    valid = batch["option_valid"]
    return (-nll / num_tokens).view_as(valid).masked_fill(~valid, -torch.inf)


def choice_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy over the options of each row (MeZO's train_as_classification): [R] float32."""
    return F.cross_entropy(option_scores(model, batch), batch["label"], reduction="none")


def option_margins(model: nn.Module, batch: Batch) -> Tensor:
    """By how much the other options of each row outweigh the right one: [R, 1] float32.

    The logarithm of the ratio of their probabilities, cut at -100. Its softplus is `choice_loss`.
    """
    scores, label = option_scores(model, batch), batch["label"][:, None]
    others = scores.scatter(1, label, -torch.inf).logsumexp(1, keepdim=True)
    # A row of one option has no other: -inf, of which there is no difference.
    return (others - scores.gather(1, label)).clamp(min=-100.0)


# `choice_loss`, to rounding, by an output that says the same of every row, whichever its right option is.
choice_margin = Composite(option_margins, lambda margins, _: F.softplus(margins[:, 0]), width=1)
# By `Task.loss`: of these a jacobian learns more than of the loss by itself.
COMPOSITES = {"choice": choice_margin}


def option_nll_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the right option, and its number of tokens: two [R] float32.

    Totals divided give the mean over option tokens, as MeZO trains Copa. Only the right option of
    each row is run through the model.
    """
    label = batch["label"]
    if "option_ids" in batch:
        logits = _last_logits(model, batch["input_ids"], batch["attention_mask"], 1)
        nll = _token_nll(logits, batch["option_ids"].gather(1, label[:, None]))[:, 0]
        return nll, torch.ones_like(nll)
    rows = torch.arange(len(label), device=label.device)
    return _option_nll(
        model,
        batch["input_ids"][rows, label],
        batch["attention_mask"][rows, label],
        batch["option_mask"][rows, label],
    )


def causal_lm_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's labelled tokens, and their number: two [R] float32.

    batch: input_ids [R, T]; attention_mask [R, T], all ones if absent; labels [R, T], -100 where
    there is none (transformers' convention: labels[:, t] is predicted from the tokens before t).
    Without labels, every real token that follows a real one is a label. A row with none gives
    (0, 0).
    """
    input_ids = batch["input_ids"]
    attention_mask = batch.get("attention_mask")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if "labels" in batch:
        targets = batch["labels"][:, 1:]
    else:
        real = attention_mask.bool()
        targets = input_ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    # The smallest window of last columns that holds all labels. The model runs in any case: on a
    # sharded model the other ranks wait for this one to take part in the gathering of weights.
    columns = (targets != -100).any(0).nonzero()
    window = targets.shape[1] - int(columns[0]) if len(columns) else 0
    targets = targets[:, targets.shape[1] - window :]
    logits = _last_logits(model, input_ids, attention_mask, window + 1)[:, :-1]
    return _token_nll(logits, targets).sum(1), (targets != -100).sum(1).float()


def option_accuracy(scores: Tensor, batch: Batch) -> Tensor:
    """Is the best-scored option of each row a right one: [R] float32. scores [R, O] from `option_scores`."""
    best = scores.argmax(1)
    right: Tensor = best == batch["label"]
    if "option_right" in batch:
        right = batch["option_right"].gather(1, best[:, None])[:, 0]
    return right.float()


def accuracy_score(model: nn.Module, batch: Batch) -> Tensor:
    """`option_accuracy` of the model's scores: what `zo_dist.Objective` makes a loss without slope of."""
    return option_accuracy(option_scores(model, batch), batch)


def evaluation_loss(scores: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy over the options: [R] float32; of a single option the mean NLL of its tokens.

    scores [R, O] from `option_scores` on the same batch; with a single option in the general form.
    """
    if scores.shape[1] == 1:
        return -scores[:, 0]
    return F.cross_entropy(scores, batch["label"], reduction="none")


def _option_nll(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, option_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the NLL of each sequence's option tokens, and their number: two [N] float32.

    input_ids, attention_mask [N, T]; option_mask [N, K] over the last K tokens.
    """
    window = option_mask.shape[1]
    logits = _last_logits(model, input_ids, attention_mask, window + 1)[:, :-1]
    targets = input_ids[:, -window:].masked_fill(~option_mask, -100)
    return _token_nll(logits, targets).sum(1), option_mask.sum(1).float()


def _token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL of targets [N, K] under logits [N, K, V]: [N, K] float32, 0 where a target is -100."""
    # A float32 copy of all logits at once could be larger than the model.
    rows = max(1, _FLOAT32_ELEMENTS // max(1, logits[0].numel()))
    parts = [
        F.cross_entropy(part.flatten(0, 1).float(), target.flatten(), reduction="none")
        for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts).view_as(targets)


def _last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """The model's logits in the last `keep` columns: [N, keep, V] in the model's dtype."""
    accepted = inspect.signature(base_model(model).forward).parameters
    options: dict[str, object] = {}
    if "position_ids" in accepted:
        # Counted from the first real token: with learned positions, as in GPT-2, a row's result
        # would otherwise depend on its padding, that is on the other rows of the batch.
        options["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    with contiguous_head_input(head_of(base_model(model))):
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
    logits: Tensor = output.logits
    return logits[:, -keep:]


# Does a model hand on what its head gives, as it is? Found out by the first forward that could use it.
_HANDS_ON: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# How far apart two ways to compute a logit may be, in the largest: in 16 bits a few roundings of it.
_ROUNDING = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-16}


def _option_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of options of one token [R, O] float32, without those of other words where that can be.

    It cannot where the head is no plain Linear, where its forward is another's (as while it is perturbed),
    where ranks hold parts of it, and where the model does more with what its head gives.
    """
    module, words, own = base_model(model), batch["option_ids"], list[Tensor]()
    head = head_of(module)
    with _only(words, head, own):
        logits = _last_logits(model, batch["input_ids"], batch["attention_mask"], 1)[:, 0]
    if head is not None and own and _HANDS_ON.get(head):
        return own[0]
    chosen = logits.gather(1, words).float()
    if head is None or not own:
        return chosen
    caps = getattr(getattr(module, "config", None), "final_logit_softcapping", None)
    # A plan has no values to compare.
    near = type(chosen) is not Tensor or chosen.is_meta or _near(own[0], chosen, logits.dtype)
    _HANDS_ON[head] = near and caps is None
    return own[0] if _HANDS_ON[head] else chosen


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    size = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=size * _ROUNDING.get(dtype, 0.0), equal_nan=True)


@contextmanager
def _only(words: Tensor, head: nn.Module | None, own: list[Tensor]) -> Iterator[None]:
    """Inside, a head puts its logits of these words into `own`; once it may, it gives no other."""
    if type(head) is not nn.Linear or "forward" in head.__dict__ or _HANDS_ON.get(head) is False:
        yield
        return
    whole = head.forward

    def forward(x: Tensor) -> Tensor:
        if isinstance(head.weight, DTensor) or x.ndim != 3 or len(x) != len(words):
            return whole(x)
        logits = (x[:, -1:].float() * head.weight[words].float()).sum(2)
        own.append(logits if head.bias is None else logits + head.bias[words].float())
        return own[0].unsqueeze(1) if _HANDS_ON.get(head) else whole(x)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]


def head_of(module: nn.Module) -> nn.Module | None:
    """The vocabulary projection of a language model, where it says which that is."""
    find_head = getattr(module, "get_output_embeddings", None)
    return find_head() if callable(find_head) else None


@contextmanager
def contiguous_head_input(head: nn.Module | None) -> Iterator[None]:
    """Inside, the vocabulary projection gets its input in one piece.

    Models hand it a slice of the hidden states, for which torch 2.13 leaves the fast 16-bit path on
    a CPU: 21 s instead of 22 ms for 64 rows and 49,152 words.
    """
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: tuple(arg.contiguous() for arg in args))
    try:
        yield
    finally:
        hook.remove()


def base_model(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP, a DeepSpeed engine, torch.compile and PEFT.

    Wrappers pass every keyword on without naming it: only the module itself tells what it takes.
    """
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):  # DDP and DeepSpeed; torch.compile
            model = inner
        elif callable(peel := getattr(model, "get_base_model", None)):  # PEFT
            model = peel()
        else:
            return model
