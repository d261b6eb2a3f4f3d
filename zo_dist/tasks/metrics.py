"""How a generated answer is compared with those that count as right: SQuAD's F1 and exact match."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

# One number for a text and the answers that count as right.
TextMetric = Callable[[str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, then without articles, words one space apart.

    As SQuAD evaluates (Rajpurkar et al., arXiv 1606.05250), so that "the U.S.!" is "us".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(text: str, answers: Sequence[str]) -> float:
    """The F1 of the words that `text` shares with an answer, in [0, 1]: the best over `answers`.

    Words after `normalise_answer`; a repeated one counts as often as both have it. 0 without answers.
    """
    return max(
        (_f1(normalise_answer(text).split(), normalise_answer(a).split()) for a in answers), default=0.0
    )


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 if `text` is one of `answers` after `normalise_answer`, else 0."""
    return float(normalise_answer(text) in map(normalise_answer, answers))


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    shared = (Counter(words) & Counter(wanted)).total()
    return 2.0 * shared / (len(words) + len(wanted)) if shared else 0.0


# How generated texts are scored, by the names that tasks and `train.objective` use.
TEXT_METRICS: dict[str, TextMetric] = {"f1": f1, "em": exact_match}
