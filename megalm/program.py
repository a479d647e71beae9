"""How the programs in tools/ end: errors as paragraphs, and the exit codes of docs/exit-codes.md."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

from megalm.errors import MegalmError

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
EXIT_READER_GONE = 141
"""128 + SIGPIPE, as shells report it."""


def program(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate a `main` that takes arguments and returns an exit code.

    A MegalmError becomes a paragraph on stderr and its exit code, Ctrl-C becomes 130, and a reader of stdout who has
    left, as with `| head`, 141. Everything else is a traceback.
    """

    @functools.wraps(main)
    def ending_well(arguments: list[str]) -> int:
        try:
            code = main(arguments)
            sys.stdout.flush()
        except MegalmError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # The interpreter flushes once more as it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_READER_GONE
        return code

    return ending_well
