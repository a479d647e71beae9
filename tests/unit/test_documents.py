"""What the documentation says is there: files, links, commands and their options."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.config.parse import parse_command_line

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Words that stand for what the reader puts there, and what runs leave behind.
PLACEHOLDER = re.compile(r"\.\.\.|\b[A-Z]\b|[A-Z]{2,}|^runs/|^\.venv")
TOP_LEVEL = ("megalm", "tools", "configs", "launch", "tests", "docs", "benchmarks", ".ci")


def commands(document: Path) -> list[str]:
    """The commands of the bash blocks, lines joined, comments left out, and those within a sentence."""
    text = document.read_text(encoding="utf-8")
    spans = re.findall(r"`(?:\w+=\w+ )*(python (?:tools|benchmarks)/[^`\n]+)`", text)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    joined = "".join(blocks).replace("\\\n", " ")
    lines = [*joined.splitlines(), *spans]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def tool_help(tool: str) -> str:
    """The help text of a tool."""
    done = subprocess.run(
        [sys.executable, str(ROOT / tool), "--help"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_code_spans_exist(document: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE))
    paths = [word for span in spans for word in span.split() if word.split("/")[0] in TOP_LEVEL and "/" in word]
    named = [path for path in paths if not PLACEHOLDER.search(path)]
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/,:")))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_programs_and_options_that_exist(document: Path) -> None:
    for command in commands(document):
        words = shlex.split(command)
        program = words[1] if words[0] in {"python", "bash"} else words[0]
        if program.startswith(("tools/", "launch/", "tests/", "benchmarks/")):
            assert (ROOT / program).is_file(), command
        if program.startswith(("tools/", "benchmarks/")) and program.endswith(".py"):
            unknown = [word for word in words if word.startswith("--") and word not in tool_help(program)]
            assert unknown == [], command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_training_commands_are_understood(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(document):
        words = shlex.split(command)
        if "pretrain_gpt.py" in words and "--help" not in words and "..." not in words:
            config = parse_command_line(words[words.index("pretrain_gpt.py") + 1 :])
            assert config.training.lr > 0


def test_the_readme_shows_training_tokenizing_and_exporting() -> None:
    text = "\n".join(commands(ROOT / "README.md"))
    for program in ("launch/quickstart.sh", "tests/run.sh", "tools/preprocess_data.py", "tools/export_hf.py"):
        assert program in text
    assert "--hostfile" in text


def test_the_readme_tree_lists_every_folder() -> None:
    tree = re.search(r"^pretrain_gpt\.py .*?^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert tree is not None
    listed = set(re.findall(r"^ *([a-z_]+)/ ", tree.group(), re.MULTILINE))
    packages = {path.parent.name for path in (ROOT / "megalm").glob("*/__init__.py")}
    assert listed == packages | {"megalm", "tools", "configs", "launch", "tests", "benchmarks", "docs"}


def test_presets_named_in_the_launch_scripts_exist() -> None:
    for path in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/slurm/*")]:
        for preset in re.findall(r"configs/[\w/.-]+\.yaml", path.read_text()):
            assert (ROOT / preset).is_file(), f"{path.name} names {preset}"


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("launch/**/*.s*"), ROOT / "tests/run.sh", ROOT / ".ci/run"]), ids=str
)
def test_scripts_are_valid_bash(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
