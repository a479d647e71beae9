"""Where tokens come from and in which order."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.option import option

SAMPLE_ORDERS = ("bigscience", "megatron-core")
TOKENIZERS = ("PretrainedFromHF", "GPT2BPETokenizer", "SentencePieceTokenizer", "NullTokenizer")
OTHER_TOKENIZER_NAMES = {
    "HuggingFaceTokenizer": "PretrainedFromHF",
    "HFTokenizer": "PretrainedFromHF",
    "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
}
"""Names that Megatron-LM and Microsoft's Megatron-DeepSpeed have for what is read here."""
REFUSED_TOKENIZERS = {
    "bertwordpiecelowercase": "pass --tokenizer-type PretrainedFromHF with a folder that holds BERT's tokenizer.json",
    "bertwordpiececase": "pass --tokenizer-type PretrainedFromHF with a folder that holds BERT's tokenizer.json",
    "llama2tokenizer": "pass --tokenizer-type SentencePieceTokenizer, which adds no begin token, or PretrainedFromHF",
    "tiktokenizer": "convert the vocabulary to a tokenizer.json and pass --tokenizer-type PretrainedFromHF",
    "multimodaltokenizer": "documents here are text: pass the tokenizer of the text",
    "nullmultimodaltokenizer": "documents here are text: pass --tokenizer-type NullTokenizer",
    "sfttokenizer": "apply the conversation template before, and pass the tokenizer of the text",
}
"""Types of theirs that are not read, in lower case, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, split, sample length, tokenizer."""

    data_path: tuple[str, ...] = option(
        (), doc="A corpus prefix, or WEIGHT PREFIX pairs to blend. The prefix is the .bin path without its suffix."
    )
    train_weighted_split_paths: tuple[str, ...] = option(
        (), doc='Training groups, each "NAME: W START:END PATH, W START:END PATH". Excludes data_path and split.'
    )
    valid_weighted_split_paths: tuple[str, ...] = option((), doc="Validation groups, in the same form.")
    test_weighted_split_paths: tuple[str, ...] = option((), doc="Test groups, in the same form.")
    split: str = option("969, 30, 1", doc="Proportions of training, validation and test in every corpus of data_path.")
    seq_length: int = option(doc="Tokens of one sample, s.")
    num_workers: int = option(2, doc="Threads that read samples ahead, for each rank that reads; 0 reads in the loop.")
    cache_path: str | None = option(None, doc="Folder of the sample maps; beside each corpus when not given.")
    eod_mask_loss: bool = option(False, doc="No loss on predicting the token after an end of document.")
    reset_position_ids: bool = option(False, doc="Positions start again after each end of document.")
    reset_attention_mask: bool = option(False, doc="A token attends only within its document.")
    tokenizer_type: str = option(
        "PretrainedFromHF",
        doc="Which tokenizer class reads the tokenizer's files.",
        choices=TOKENIZERS,
        spellings=OTHER_TOKENIZER_NAMES,
        instead=REFUSED_TOKENIZERS,
    )
    tokenizer_path: str | None = option(
        None, doc="Tokenizer folder or tokenizer.json; a .model file for SentencePiece."
    )
    vocab_file: str | None = option(None, doc="GPT2BPETokenizer: its vocab.json.")
    merge_file: str | None = option(None, doc="GPT2BPETokenizer: its merges.txt.")
    valid_num_workers: int | None = option(
        None, doc="Threads that read validation and test samples ahead; num_workers when not given."
    )
    sample_order: str = option(
        "bigscience",
        doc="Which trainer's order samples come in, so that its runs can go on here.",
        choices=SAMPLE_ORDERS,
    )
    allow_changed_order: bool = option(
        False,
        doc="Go on from a checkpoint though the samples come in another order than it was trained with, so that some "
        "are read again and others never.",
    )
    verify_data: bool = option(
        False, doc="Before training, read every corpus whole and compare it with the hashes beside it."
    )
