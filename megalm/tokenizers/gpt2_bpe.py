"""GPT-2's byte-level BPE from `vocab.json` and `merges.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.errors import DataError
from megalm.tokenizers.files import digest_of, read_json, write_json
from megalm.tokenizers.huggingface import fast_config

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"


class GPT2BPETokenizer:
    """Ids as GPT-2 gives them; an end-of-text mark inside a text is read as plain characters, as there."""

    def __init__(self, vocab_file: str | Path, merge_file: str | Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        self.vocab_file, self.merge_file = Path(vocab_file), Path(merge_file)
        for path in (self.vocab_file, self.merge_file):
            if not path.is_file():
                raise DataError(f"no file {path}; GPT2BPETokenizer needs --vocab-file and --merge-file")
        vocabulary = read_json(self.vocab_file)
        if END not in vocabulary:
            raise DataError(f"{self.vocab_file} holds no {END}, which ends GPT-2's documents")
        try:
            model = models.BPE(vocabulary, _read_merges(self.merge_file))
        # The library raises its errors as plain Exception.
        except Exception as error:
            raise DataError(f"{self.merge_file} does not fit {self.vocab_file}: {error}") from error
        self.backend: tokenizers.Tokenizer = Tokenizer(model)
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        self._vocab_size = max(vocabulary.values()) + 1
        self._eod_id: int = vocabulary[END]

    @property
    def name(self) -> str:
        """Its type and where it was read from, for logs."""
        return f"GPT2BPETokenizer {self.vocab_file}"

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._vocab_size

    @property
    def eod_id(self) -> int | None:
        """The id of <|endoftext|>."""
        return self._eod_id

    @property
    def digest(self) -> str:
        """sha256 of both files."""
        return digest_of(self.vocab_file, self.merge_file)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts))]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, in which the end-of-text mark is a special token, and its configuration."""
        from tokenizers import Tokenizer

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        saved = Tokenizer.from_str(self.backend.to_str())
        saved.add_special_tokens([END])
        saved.save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", fast_config(END))


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise DataError(f"{path}, line {number}: {line!r} is not two symbols with a space between them")
        merges.append((parts[0], parts[1]))
    return merges
