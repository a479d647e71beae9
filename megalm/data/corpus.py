"""A corpus that every machine has: sources, documentation and docstrings of the installed Python and its packages."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import DataError

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
# The base interpreter's own packages lie inside its standard library; a virtual environment does not use them.
SKIPPED_FOLDERS = frozenset({"__pycache__", ".git", "node_modules", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


@dataclass(frozen=True)
class CorpusReport:
    """What was gathered. Bytes count the UTF-8 text, without JSON's own."""

    num_documents: int
    text_bytes: int
    num_duplicates: int
    num_skipped: int


def installed_folders() -> list[Path]:
    """The folders of the standard library and of this environment's packages, each once."""
    paths = sysconfig.get_paths()
    folders = {Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")}
    return sorted(folder for folder in folders if folder.is_dir())


def text_files(folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Each file of source or documentation below `folders`, with its name relative to them, in a fixed order.

    Raises: DataError if one is no folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder\n  --folder names one with source or documentation below it")
    for folder in folders:
        for parent, names, files in os.walk(folder):
            names[:] = sorted(name for name in names if name not in SKIPPED_FOLDERS)
            for name in sorted(files):
                path = Path(parent, name)
                if name.endswith(SUFFIXES) and not path.is_symlink():
                    yield path, path.relative_to(folder).as_posix()


def builtin_docstrings() -> Iterator[Document]:
    """The documentation of modules that have no source to read: those compiled into the interpreter."""
    for name in sorted(sys.builtin_module_names):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for member in sorted(vars(module)):
            doc = inspect.getdoc(getattr(module, member))
            if doc and not member.startswith("_"):
                parts.append(f"{name}.{member}\n\n{doc}")
        yield Document(text="\n\n".join(parts), source=f"builtin/{name}")


def gather_documents(folders: Sequence[Path], *, min_bytes: int, max_bytes: int) -> tuple[list[Document], int, int]:
    """Distinct texts of between `min_bytes` and `max_bytes`, and the numbers of duplicates and of unfit files."""
    seen: set[bytes] = set()
    documents: list[Document] = []
    num_duplicates = num_skipped = 0
    for document in _candidates(folders, max_bytes):
        text = document.text.strip()
        if not min_bytes <= len(text.encode()) <= max_bytes:
            num_skipped += 1
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            num_duplicates += 1
            continue
        seen.add(digest)
        documents.append(Document(text=text, source=document.source))
    return documents, num_duplicates, num_skipped


def _candidates(folders: Sequence[Path], max_bytes: int) -> Iterator[Document]:
    for path, source in text_files(folders):
        try:
            if path.stat().st_size <= 2 * max_bytes:
                yield Document(text=path.read_text(encoding="utf-8"), source=source)
        except (OSError, UnicodeDecodeError):
            continue
    yield from builtin_docstrings()


def write_corpus(
    output: Path,
    folders: Sequence[Path],
    *,
    seed: int,
    target_bytes: int,
    required_bytes: int,
    min_bytes: int = 200,
    max_bytes: int = 200_000,
) -> CorpusReport:
    """Write shuffled, distinct documents as jsonl until their text reaches `target_bytes`; whole file or none.

    Files above `max_bytes` are tables rather than text and are left out. The same installation and seed give the
    same file.
    Raises: DataError if the machine has less than `required_bytes` of text, or the file cannot be written.
    """
    documents, num_duplicates, num_skipped = gather_documents(folders, min_bytes=min_bytes, max_bytes=max_bytes)
    random.Random(seed).shuffle(documents)
    temporary = output.with_name(output.name + ".tmp")
    num_documents = text_bytes = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for document in documents:
                if text_bytes >= target_bytes:
                    break
                file.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
                num_documents += 1
                text_bytes += len(document.text.encode())
        if text_bytes < required_bytes:
            temporary.unlink()
            raise DataError(
                f"the corpus has {text_bytes / 1e6:.1f} MB of text, and {required_bytes / 1e6:.1f} MB are needed\n"
                f"  gathered from {', '.join(map(str, folders))}\n"
                "  install more packages, name more folders with --folder, or lower --min-mb"
            )
        os.replace(temporary, output)
    except OSError as error:
        raise DataError(f"cannot write the corpus {output}: {error}\n  choose another --output") from error
    return CorpusReport(num_documents, text_bytes, num_duplicates, num_skipped)
