"""What a run takes of each corpus, told before training: samples asked, samples there, epochs, samples seen again."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megalm.data.indexed import shown, tokens_path

MOST_ROWS = 12
"""Corpora of one set that are listed one by one; of more, a summary and the most repeated."""
MOST_NAMED = 5


@dataclass(frozen=True)
class Draw:
    """One corpus in one set of samples."""

    set_name: str
    split: str
    """train, valid or test."""
    prefix: str
    weight: float
    """Normalised: the weights of a set add up to 1."""
    sequences: tuple[int, int]
    """Begin and end of the part of the corpus."""
    num_sequences: int
    """Sequences of the whole corpus."""
    tokens: int
    """Tokens of the part."""
    seq_length: int
    asked: int
    """Samples that the run reads of it."""

    @property
    def place(self) -> str:
        """The part of the corpus, for people."""
        begin, end = self.sequences
        part = "" if end - begin == self.num_sequences else f", sequences {begin:,} to {end - 1:,}"
        return f"{shown(self.prefix)}{part}, {self.tokens:,} tokens"

    @property
    def available(self) -> int:
        """Whole samples of one epoch."""
        return max(0, (self.tokens - 1) // self.seq_length)

    @property
    def epochs(self) -> float:
        """How often the tokens of the part are read."""
        return self.asked * self.seq_length / self.tokens

    @property
    def seen_again(self) -> int:
        """Samples beyond the first epoch."""
        return max(0, self.asked - self.available)


def table(draws: Sequence[Draw]) -> list[str]:
    """Lines about one set: one of a single corpus; of a blend a row for each, or a summary with the most repeated."""
    first, total = draws[0], sum(draw.asked for draw in draws)
    start = f"{first.set_name}: {total:,} samples of {first.seq_length:,} tokens from"
    if len(draws) == 1:
        more = f", {first.seen_again:,} samples are seen again" if first.seen_again else ""
        return [f"{start} {first.place}, {first.available:,} in an epoch: {first.epochs:.3g} epochs{more}"]
    lines = [f"{start} {len(draws):,} corpora"]
    rows: Sequence[Draw] = draws
    if len(draws) > MOST_ROWS:
        again = [draw for draw in draws if draw.seen_again]
        lines.append(
            f"  {sum(draw.asked > 0 for draw in draws) - len(again):,} corpora are read once or less, {len(again):,} "
            f"more than once ({sum(draw.seen_again for draw in again):,} samples are seen again), "
            f"{sum(not draw.asked for draw in draws):,} not at all; the most repeated:"
        )
        rows = sorted(draws, key=lambda draw: -draw.epochs)[:MOST_NAMED]
    lines.append("   weight      samples    one epoch  epochs   seen again  corpus")
    lines += (
        f"  {draw.weight:7.4g} {draw.asked:12,} {draw.available:12,} {draw.epochs:7.3g} {draw.seen_again:12,}  "
        f"{draw.place}"
        for draw in rows
    )
    return lines


def shortfalls(draws: Sequence[Draw]) -> list[str]:
    """Warnings about one set: corpora that give nothing, and evaluations that read samples again."""
    first, total = draws[0], sum(draw.asked for draw in draws)
    found = []
    unread = [draw for draw in draws if not draw.asked]
    if unread:
        names = _named([f"{shown(draw.prefix)} (weight {draw.weight:.3g})" for draw in unread])
        found.append(
            f"{first.set_name}: {total:,} samples are too few to draw one of {names}\n"
            "  nothing of it is read: give it more weight, or leave it out"
        )
    again = sorted((draw for draw in draws if draw.seen_again), key=lambda draw: -draw.epochs)
    if again and first.split != "train":
        names = _named([f"{shown(draw.prefix)} ({draw.asked:,} asked, {draw.available:,} there)" for draw in again])
        found.append(
            f"{first.set_name}: too small, so that every evaluation reads samples again: {names}\n"
            "  give it a larger share of the corpus, or evaluate less with --eval-iters"
        )
    return found


def duplicates(draws: Sequence[Draw]) -> list[str]:
    """Warnings about sequences that one set holds twice, under whatever names."""
    first = draws[0]
    return [
        f"{first.set_name}: {count:,} sequences of {shown(prefix)} are in it twice"
        for prefix, count in _shared(draws, draws, within=True)
    ]


def leaks(trained: Sequence[Draw], evaluated: Sequence[Draw]) -> list[str]:
    """Warnings about sequences that are trained on and evaluated on."""
    return [
        f"{evaluated[0].set_name}: {count:,} sequences of {shown(prefix)} are in {trained[0].set_name} too, "
        "so that what is learned by heart counts as learned"
        for prefix, count in _shared(trained, evaluated, within=False)
    ]


def _shared(ones: Sequence[Draw], others: Sequence[Draw], *, within: bool) -> list[tuple[str, int]]:
    """(corpus, sequences) that two lists of parts have in common; `within` one list, a part does not meet itself."""
    by_file: dict[str, list[tuple[int, Draw]]] = defaultdict(list)
    for at, draw in enumerate(ones):
        by_file[_file(draw)].append((at, draw))
    counts: dict[str, int] = defaultdict(int)
    for at, draw in enumerate(others):
        for other_at, other in by_file.get(_file(draw), ()):
            if within and other_at >= at:
                continue
            counts[draw.prefix] += max(
                0, min(draw.sequences[1], other.sequences[1]) - max(draw.sequences[0], other.sequences[0])
            )
    return [(prefix, count) for prefix, count in counts.items() if count]


def _file(draw: Draw) -> str:
    """One name for one file, through links and dots."""
    return os.path.realpath(tokens_path(draw.prefix))


def _named(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - MOST_NAMED:,} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more
