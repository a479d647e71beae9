"""A SentencePiece model as a `tokenizer.json`, so that transformers gives the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"
UNIGRAM, BPE = 1, 2


def to_tokenizers(processor: Any) -> tokenizers.Tokenizer:
    """The same tokenizer in the `tokenizers` library.

    Raises: DataError for what the library does not have: normalisation tables, squeezed white space, user symbols.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model_type, dummy_prefix = _settings(processor.serialized_model_proto())
    size = processor.GetPieceSize()
    pieces = [(processor.IdToPiece(id), processor.GetScore(id)) for id in range(size)]
    byte_fallback = any(processor.IsByte(id) for id in range(size))
    unknown = processor.unk_id()
    if model_type == UNIGRAM:
        model: Any = models.Unigram(pieces, unknown, byte_fallback)
    else:
        vocabulary = {piece: id for id, (piece, _) in enumerate(pieces)}
        merges = _merges(processor, vocabulary)
        model = models.BPE(vocabulary, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=byte_fallback)
    result = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if dummy_prefix else []
    result.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    result.decoder = decoders.Sequence([*decoding, *([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])])
    controls = [pieces[id][0] for id in range(size) if processor.IsControl(id)]
    result.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    return result


def _merges(processor: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces whose product is a piece, the best score first: what the model does, spelled out."""
    found = []
    for piece, id in vocabulary.items():
        if processor.IsByte(id) or processor.IsControl(id) or processor.IsUnknown(id):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-processor.GetScore(id), vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _settings(model: bytes) -> tuple[int, bool]:
    """(model type, whether a space goes before the text), from the model file."""
    model_type, dummy_prefix, squeeze = UNIGRAM, True, True
    for number, value in _fields(model):
        if number == 2 and isinstance(value, bytes):
            model_type = next((int(kind) for field, kind in _fields(value) if field == 3), model_type)
        elif number == 3 and isinstance(value, bytes):
            normaliser = dict(_fields(value))
            if normaliser.get(2):
                raise DataError("this SentencePiece model normalises characters, which tokenizer.json cannot express")
            dummy_prefix = bool(normaliser.get(3, True))
            squeeze = bool(normaliser.get(4, True))
    if model_type not in (UNIGRAM, BPE):
        raise DataError(f"SentencePiece model type {model_type} is neither unigram nor BPE")
    if squeeze:
        raise DataError("this SentencePiece model removes white space, which tokenizer.json cannot express")
    return model_type, dummy_prefix


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol-buffer message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
        else:
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            yield number, message[at : at + size]
            at += size
