"""Training tokenizers: byte-level BPE as a Hugging Face folder, SentencePiece models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megalm.errors import DataError
from megalm.tokenizers.files import write_json
from megalm.tokenizers.huggingface import fast_config

END = "<|endoftext|>"
NUM_BYTES = 256
LONGEST_WORD = 2048
"""Characters without white space that the trainer gets at once: its time grows with their square, and a line of base64
or DNA would take minutes."""


def train_byte_level_bpe(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, end_of_text: str = END, min_frequency: int = 2
) -> int:
    """Train byte-level BPE on texts and write a folder that AutoTokenizer and megalm read. Returns its vocabulary size.

    The end-of-text mark has id 0, the bytes come next, then the merges in order of frequency. The result is the same
    for the same texts in the same order.
    Raises: DataError for a vocabulary without room for the bytes, a mark that is text, or without texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    target = Path(folder)
    _check_mark(end_of_text)
    if min_frequency < 0:
        raise DataError(f"min_frequency = {min_frequency} must not be negative")
    if vocab_size <= NUM_BYTES:
        raise DataError(f"vocab_size = {vocab_size} has no room for {NUM_BYTES} bytes and {end_of_text}\n  use more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(_with_short_words(texts))
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.num_texts:
        raise DataError("there is no text to train a tokenizer on")
    try:
        target.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(target / "tokenizer.json"))
        write_json(target / "tokenizer_config.json", fast_config(end_of_text))
        write_json(target / "special_tokens_map.json", {"eos_token": end_of_text})
    except OSError as error:
        raise DataError(f"cannot write the tokenizer to {target}: {error.strerror}") from error
    return int(tokenizer.get_vocab_size(with_added_tokens=True))


def _with_short_words(texts: Iterable[str]) -> Iterator[str]:
    """Texts with a line feed in longer words than `LONGEST_WORD`."""
    for text in texts:
        if len(text) > LONGEST_WORD and max(map(len, text.split()), default=0) > LONGEST_WORD:
            yield re.sub(rf"\S{{{LONGEST_WORD}}}(?=\S)", r"\g<0>\n", text)
        else:
            yield text


def train_sentencepiece(
    texts: Iterable[str], prefix: str | Path, *, vocab_size: int, model_type: str, end_of_text: str = END
) -> int:
    """Train a SentencePiece model and write `PREFIX.model`. Returns its vocabulary size.

    Bytes stand in for characters that are no piece, white space and line feeds are kept as they are: any text survives.
    Raises: DataError if the trainer refuses, most often because the texts are too few for the vocabulary.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError("SentencePiece models need the sentencepiece package\n  pip install 'megalm[hf]'") from error
    if model_type not in ("bpe", "unigram"):
        raise DataError(f"SentencePiece model type {model_type!r} does not exist\n  types that do: bpe, unigram")
    _check_mark(end_of_text)
    target = Path(prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    counted = _Counted(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_prefix=str(target),
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            split_digits=True,
            eos_piece=end_of_text,
            bos_id=-1,
            minloglevel=2,
        )
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"SentencePiece cannot train {vocab_size} pieces on {counted.num_texts} texts: {error}"
        ) from error
    Path(f"{prefix}.vocab").unlink(missing_ok=True)
    return vocab_size


def _check_mark(end_of_text: str) -> None:
    """Refuse a mark that texts hold by themselves: each would end a document there."""
    if len(end_of_text.strip()) < 2:
        raise DataError(f"end_of_text = {end_of_text!r} must be no character that text holds\n  for example: {END}")


class _Counted:
    """Texts that are not empty, and how many there were."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_texts = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if text:
                self.num_texts += 1
                yield text
