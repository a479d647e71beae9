"""Every error that megalm raises for its user, under one parent.

The form is the same everywhere: the value, the rule it breaks, where the value came from, and what would work.
The command-line programs print such an error as a paragraph and exit with its `exit_code`; a traceback is shown
for everything else, since everything else is a defect of megalm.
"""

from __future__ import annotations

from collections.abc import Sequence


class MegalmError(Exception):
    """Something the user can put right. The message says how."""

    exit_code = 1
    is_of_one_rank = False
    """Whether the other ranks may know nothing of it."""


class ConfigError(MegalmError):
    """A flag, a YAML value or a combination of them that cannot be obeyed."""

    exit_code = 2


class TopologyError(MegalmError):
    """The processes that exist do not fit the layout that was asked for."""

    exit_code = 2


class DataError(MegalmError):
    """A corpus, index, tokenizer or input document that is missing, broken or does not fit."""

    exit_code = 3


class KernelError(MegalmError):
    """A kernel that was asked for by name and cannot run here."""

    exit_code = 4


class DeviceMemoryError(MegalmError):
    """A GPU, or a host, whose memory the run does not fit into."""

    exit_code = 6
    is_of_one_rank = True


class HangError(MegalmError):
    """Ranks that were waited for in vain."""

    exit_code = 8


class DivergedError(MegalmError):
    """A training whose numbers are no longer finite, and which would go on for nothing."""

    exit_code = 7


class ReplicaError(MegalmError):
    """Ranks that should hold equal parameters and do not."""

    exit_code = 9


class LossSpikeError(MegalmError):
    """A training that was taken back to before its loss rose; the next start leaves the data out."""

    exit_code = 10


class CheckpointError(MegalmError):
    """A checkpoint that is missing, incomplete, damaged or made for another model."""

    exit_code = 5


def listed(things: Sequence[object], most: int = 16) -> str:
    """Things in a message: the first so many, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more
