"""From the data section of the configuration to the sources of training, validation and test samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megalm.config.data import DataConfig
from megalm.data.blend import Blend, normalised, samples_of_each
from megalm.data.draws import Draw, duplicates, leaks, shortfalls, table
from megalm.data.gpt_dataset import GPTDataset
from megalm.data.indexed import IndexedDataset, shown, sidecar_path
from megalm.data.map_cache import cached_dealing
from megalm.data.order import order_named
from megalm.data.same_tokenizer import TokenizerFacts, check_tokenizer
from megalm.data.sidecar import check_index_hash, read_sidecar
from megalm.data.source import SampleSource
from megalm.data.split import SPLITS, Member, parse_data_path, parse_groups, range_bounds
from megalm.data.verify import verify_corpus
from megalm.errors import DataError

MANY_CORPORA = 100
OF_DOCUMENTS_ENDS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")
"""Fields of the data section that do something where a document ends."""
SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Datasets:
    """The sources of one run; validation and test sets by name."""

    train: SampleSource | None = None
    valid: dict[str, SampleSource] = field(default_factory=dict)
    test: dict[str, SampleSource] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)
    """Lines on what is taken of each corpus, to be logged before training."""
    warnings: list[str] = field(default_factory=list)
    """What a user would want to know or change: repeated or missing samples, caches that were damaged."""


def build_datasets(
    data: DataConfig,
    *,
    num_samples: Mapping[str, int],
    seed: int,
    vocab_size: int | None = None,
    tokenizer: TokenizerFacts | None = None,
    verifies: bool = True,
    log: Callable[[str], None] | None = None,
) -> Datasets:
    """Open the corpora and build the sample maps of every split with `num_samples` ("train", "valid", "test") > 0.

    Every rank may call this at once. `vocab_size` is the number of ids that the model has room for; with `tokenizer`
    corpora of another one are refused. With data.verify_data the processes that pass `verifies` read corpora whole.
    `log` hears how far it is, where there are thousands of corpora.
    Raises: DataError for corpora, splits and weights that cannot be used.
    """
    builder = _Builder(data, seed=seed, vocab_size=vocab_size, tokenizer=tokenizer, verifies=verifies, log=log)
    wanted = {split: num_samples.get(split, 0) for split in SPLITS}
    groups = (data.train_weighted_split_paths, data.valid_weighted_split_paths, data.test_weighted_split_paths)
    if data.data_path and any(groups):
        raise DataError("data_path and the weighted split paths exclude each other; give one of them")
    if data.data_path:
        builder.add_data_path(data.data_path, data.split, wanted)
    elif any(groups):
        for split, texts in zip(SPLITS, groups, strict=True):
            builder.add_groups(split, texts, wanted[split])
    else:
        raise DataError("no corpus is given\n  pass --data-path PREFIX, or --train-weighted-split-paths")
    return builder.datasets


def open_corpora(
    data: DataConfig, *, tokenizer: TokenizerFacts | None = None
) -> tuple[list[IndexedDataset], list[str]]:
    """Every corpus that `data` names, once, and warnings; nothing is built. With data.verify_data they are read whole.

    Raises: DataError for corpora, weights and ranges that cannot be used.
    """
    builder = _Builder(data, seed=0, vocab_size=None, tokenizer=tokenizer, verifies=True, log=None)
    return [builder.indexed(prefix) for prefix in corpus_prefixes(data)], builder.datasets.warnings


def corpus_prefixes(data: DataConfig) -> list[str]:
    """Every corpus that `data` names, once."""
    groups = (data.train_weighted_split_paths, data.valid_weighted_split_paths, data.test_weighted_split_paths)
    members = [*parse_data_path(data.data_path)] if data.data_path else []
    members += [member for texts in groups for group in parse_groups(texts) for member in group.members]
    return list(dict.fromkeys(member.prefix for member in members))


class _Builder:
    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        vocab_size: int | None,
        tokenizer: TokenizerFacts | None,
        verifies: bool,
        log: Callable[[str], None] | None,
    ) -> None:
        self.data = data
        self.seed = seed
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.verifies = verifies
        self.order = order_named(data.sample_order)
        self.log = log
        self.datasets = Datasets()
        self.trained: list[Draw] = []
        self.spoke_at = time.monotonic()
        self._open: dict[str, IndexedDataset] = {}

    def add_data_path(self, words: tuple[str, ...], split_text: str, wanted: Mapping[str, int]) -> None:
        members = parse_data_path(words)
        self._announce(len(members))
        bounds = [self.order.bounds(split_text, self.indexed(member.prefix).num_sequences) for member in members]
        for at, split in enumerate(SPLITS):
            if wanted[split] < 1:
                continue
            parts = [(member, ranges[at]) for member, ranges in zip(members, bounds, strict=True)]
            kept = [(member, part) for member, part in parts if part[1] > part[0]]
            for member, _ in ((member, part) for member, part in parts if part[1] <= part[0]):
                self._warn(f"{split}: no sequence of {shown(member.prefix)} falls in it (split {split_text})")
            if kept:
                self._store(split, split, self.source(split, split, kept, wanted[split], blended=len(words) > 1))
            elif not any(self.indexed(member.prefix).num_sequences for member in members):
                raise DataError(
                    f"data_path names no document: {', '.join(shown(member.prefix) for member in members[:5])} "
                    f"{'are' if len(members) > 1 else 'is'} empty\n"
                    "  tokenize documents with tools/preprocess_data.py, which says how many it wrote"
                )
            elif split != "test":
                off = ", or turn evaluation off with --eval-interval 0" if split == "valid" else ""
                raise DataError(
                    f"the {split} split of data_path is empty, and {wanted[split]} samples are needed\n"
                    f"  data.split = {split_text!r} gives shares to training, validation and test\n"
                    f"  a larger share, as in --split 969,30,1, or a larger corpus{off}"
                )

    def add_groups(self, split: str, texts: tuple[str, ...], wanted: int) -> None:
        groups = parse_groups(texts)
        if split == "train" and len(groups) > 1:
            raise DataError(f"training takes one weighted group, not {len(groups)}; join them with commas")
        if wanted < 1:
            return
        if split == "train" and not groups:
            raise DataError("no training corpus is given\n  pass --train-weighted-split-paths beside the others")
        self._announce(sum(len(group.members) for group in groups))
        for group in groups:
            parts = [
                (member, range_bounds(member, self.indexed(member.prefix).num_sequences)) for member in group.members
            ]
            self._store(split, group.name, self.source(group.name, split, parts, wanted, blended=len(parts) > 1))

    def source(
        self,
        name: str,
        split: str,
        parts: Sequence[tuple[Member, tuple[int, int]]],
        num_samples: int,
        *,
        blended: bool,
    ) -> SampleSource:
        for member, _ in parts:
            if not member.weight > 0:
                raise DataError(f"corpus {shown(member.prefix)} has weight {member.weight}; leave it out instead")
        weights = normalised([member.weight for member, _ in parts])
        dealing = cached_dealing(
            weights,
            num_samples,
            prefix=parts[0][0].prefix,
            name=name,
            cache_path=self.data.cache_path,
            log=self._warn,
        )
        used = samples_of_each(dealing.choices, len(parts))
        corpora, draws = [], []
        for (member, split_range), weight, uses in zip(parts, weights, used, strict=True):
            # The surplus of the other trainers is too small for few samples: there they fail and we ask for more.
            asked = max(self.order.share(num_samples, weight), uses) if blended else num_samples
            corpora.append(self._corpus(name, member, split_range, asked))
            draws.append(self._draw(name, split, corpora[-1], weight, uses))
            self._progress(name, len(corpora), len(parts))
        self._tell(draws)
        return Blend(corpora, weights, num_samples, dealing=dealing) if blended else corpora[0]

    def indexed(self, prefix: str) -> IndexedDataset:
        if prefix not in self._open:
            if self.data.verify_data and self.verifies:
                if verify_corpus(prefix, vocab_size=self._num_ids).hashed:
                    self.datasets.report.append(f"verified: {shown(prefix)} is whole and equals its hashes")
                else:
                    self._warn(
                        f"{shown(prefix)} is whole, but no {sidecar_path(prefix).name} is beside it: a changed token "
                        "cannot be told from a right one"
                    )
            indexed = IndexedDataset(prefix)
            check_index_hash(prefix)
            warning = None if self.tokenizer is None else check_tokenizer(indexed, self.tokenizer)
            if warning is not None:
                self._warn(warning)
            asked = [name for name in OF_DOCUMENTS_ENDS if getattr(self.data, name)]
            if asked and (read_sidecar(prefix) or {}).get("append_eod") is False:
                self._warn(
                    f"{shown(prefix)} was tokenized without --append-eod, so that data.{asked[0]} finds no end of a "
                    "document in it"
                )
            self._open[prefix] = indexed
        return self._open[prefix]

    @property
    def _num_ids(self) -> int | None:
        """What --verify-data holds ids against: rows that only pad the vocabulary are no tokenizer's ids."""
        return self.vocab_size if self.tokenizer is None else self.tokenizer.vocab_size

    def _corpus(self, name: str, member: Member, split_range: tuple[int, int], num_samples: int) -> GPTDataset:
        return GPTDataset(
            self.indexed(member.prefix),
            split_range,
            seq_length=self.data.seq_length,
            num_samples=num_samples,
            seed=self.seed,
            name=name,
            order=self.order,
            cache_path=self.data.cache_path,
            vocab_size=self.vocab_size,
            log=self._warn,
        )

    def _draw(self, name: str, split: str, dataset: GPTDataset, weight: float, uses: int) -> Draw:
        return Draw(
            set_name=name,
            split=split,
            prefix=dataset.indexed.prefix,
            weight=weight,
            sequences=dataset.split_range,
            num_sequences=dataset.indexed.num_sequences,
            tokens=dataset.num_tokens,
            seq_length=self.data.seq_length,
            asked=uses,
        )

    def _tell(self, draws: list[Draw]) -> None:
        self.datasets.report += table(draws)
        warnings = [*shortfalls(draws), *duplicates(draws)]
        if draws[0].split == "train":
            self.trained = draws
        elif self.trained:
            warnings += leaks(self.trained, draws)
        for warning in warnings:
            self._warn(warning)

    def _warn(self, message: str) -> None:
        if message not in self.datasets.warnings:
            self.datasets.warnings.append(message)

    def _store(self, split: str, name: str, source: SampleSource) -> None:
        if split == "train":
            self.datasets.train = source
        else:
            getattr(self.datasets, split)[name] = source

    def _announce(self, num_corpora: int) -> None:
        if self.log is not None and num_corpora > MANY_CORPORA:
            self.log(f"opening {num_corpora:,} corpora")

    def _progress(self, name: str, done: int, total: int) -> None:
        """A line now and then, where thousands of maps are built."""
        if self.log is not None and time.monotonic() - self.spoke_at > SECONDS_BETWEEN_LINES:
            self.spoke_at = time.monotonic()
            self.log(f"{name}: sample maps of {done:,} of {total:,} corpora are there")
