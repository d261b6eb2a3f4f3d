"""The tutorials do what they say: their files are written, their commands run, in order, in one folder.

A block with a title is a file. A bash block without one is run; after `<!-- checked, not run -->` only its
syntax is checked. Every page may use what the first one made.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment
from workers import needs_deepspeed

import zo_dist

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
_BLOCK = re.compile(
    r"^(?P<marker><!-- checked, not run -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[dict[str, str | None]]:
    text = (DOCS / "tutorials" / f"{page}.md").read_text()
    found = [match.groupdict() for match in _BLOCK.finditer(text)]
    # Each fence is one of these forms: none is passed over.
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), page
    return found


TUTORIALS = sorted(path.stem for path in (DOCS / "tutorials").glob("*.md") if blocks(path.stem))


def run(page: str, folder: Path) -> None:
    more = {"PATH": f"{Path(sys.executable).parent}:{folder}/bin:/usr/bin:/bin"}
    for block in blocks(page):
        language, title, text = block["language"], block["title"], block["text"]
        assert text is not None
        if title is not None:
            (folder / title).write_text(text)
            continue
        assert language == "bash", f"{page}: a block of {language} without a title is never run"
        options = ["-n"] if block["marker"] else ["-euo", "pipefail"]
        done = subprocess.run(
            ["bash", *options, "-c", text],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=400,
            env=environment() | more,
            check=False,
        )
        assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new user's, after the first tutorial."""
    folder = tmp_path_factory.mktemp("try")
    if not Path(sys.executable).with_name("zo-dist").exists():
        # The package is on PYTHONPATH alone. launch/test.sh looks at the installed command.
        (folder / "bin").mkdir()
        (folder / "bin" / "zo-dist").write_text('#!/bin/bash\nexec python -m zo_dist "$@"\n')
        (folder / "bin" / "zo-dist").chmod(0o755)
    run("first_run", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=needs_deepspeed) if p == "deepspeed" else p for p in TUTORIALS]
)
def test_a_tutorial_does_what_it_says(folder: Path, page: str) -> None:
    if page != "first_run":
        run(page, folder)
    saved = {"first_run": "runs/two/last/model.safetensors", "fsdp2": "saved/model.safetensors"}
    saved |= {"lora": "merged/model.safetensors", "deepspeed": "runs/zero3/best/model.safetensors"}
    if page in saved:
        assert (folder / saved[page]).stat().st_size > 0


def test_what_troubleshooting_quotes_is_said() -> None:
    table = (DOCS / "tutorials" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(quoted) > 20
    said = [
        node.value
        for path in (REPOSITORY / "zo_dist").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [text for text in quoted if not any(text in each for each in said)] == []


def test_the_api_page_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text()
    assert [name for name in zo_dist.__all__ if f"::: zo_dist.{name}\n" not in page] == []
