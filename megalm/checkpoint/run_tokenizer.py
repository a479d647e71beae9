"""The tokenizer that goes with a checkpoint's model, held against what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable

from megalm.checkpoint import layout
from megalm.checkpoint.source import Source
from megalm.config.root import Config
from megalm.data.build import corpus_prefixes
from megalm.data.same_tokenizer import TokenizerFacts, another_made
from megalm.errors import DataError
from megalm.tokenizers.build import build_tokenizer, data_fields, tokenizer_in
from megalm.tokenizers.probe import probe_ids
from megalm.tokenizers.protocol import Tokenizer


def tokenizer_of_run(
    source: Source, config: Config | None, *, given: str | None = None, warn: Callable[[str], None] | None = None
) -> Tokenizer | None:
    """The tokenizer folder `given`, otherwise the one that the run was configured with; None where neither is known.

    A checkpoint without a run has the tokenizer that an import put beside it. `warn` hears where nothing tells whether
    the one given made the run's corpora.

    Raises: DataError if it cannot be read, has ids that the model has no row for, or did not make the run's corpora.
    """
    if given is not None:
        tokenizer = tokenizer_in(given)
    elif config is not None:
        tokenizer = build_tokenizer(config.data, vocab_size=_ids_of_null(source))
    else:
        beside = source.folder.resolve().parent / layout.TOKENIZER
        if not data_fields(beside):
            return None
        tokenizer = tokenizer_in(str(beside))
    check_rows(tokenizer, source.shape.vocab_rows)
    prefixes = corpus_prefixes(config.data) if config is not None else []
    told = not prefixes or _check_corpora(tokenizer, prefixes)
    if given is not None and not told and warn is not None:
        warn(
            f"nothing here tells whether {tokenizer.name} made the run's corpora: there is no {prefixes[0]}.meta.json "
            "that names theirs"
        )
    return tokenizer


def check_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Refuse a tokenizer with ids that a model of so many rows of word embedding cannot look up.

    Raises: DataError.
    """
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"{tokenizer.name} has {tokenizer.vocab_size:,} ids, and the model has {rows:,} rows of word embedding\n"
            "  name the tokenizer that the model was trained with: --tokenizer-name-or-path"
        )


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """What tells whether a corpus was made with this tokenizer."""
    return TokenizerFacts(tokenizer.name, tokenizer.vocab_size, tokenizer.digest, probe_ids(tokenizer))


def _ids_of_null(source: Source) -> int | None:
    """What NullTokenizer was given: the ids that the model counts, less the end of document, which it adds."""
    counted = source.manifest.model.get("vocab_size")
    return counted - 1 if isinstance(counted, int) else None


def _check_corpora(tokenizer: Tokenizer, prefixes: list[str]) -> bool:
    """The corpora of a run were made with one tokenizer: the first that tells of it decides. Whether one did."""
    facts = tokenizer_facts(tokenizer)
    for prefix in prefixes:
        another = another_made(prefix, facts)
        if another:
            raise DataError(
                f"{tokenizer.name} makes other ids of the same text than the tokenizer of the run's {prefix}\n"
                f"  tokenizer of the corpus: in {prefix}.meta.json\n"
                "  name that one: --tokenizer-name-or-path"
            )
        if another is False:
            return True
    return False
