#!/usr/bin/env python
"""Join corpora into one, in the order given: the bytes that tokenizing them together would have made.

Of the parts that preprocess_data.py --partitions makes, all must be given, in order, or in one folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalm.data.merge import merge_datasets, partition_order
from megalm.errors import DataError
from megalm.program import program


def parser() -> argparse.ArgumentParser:
    """The command line; names follow BigScience's and Megatron's tools."""
    result = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--input",
        "--datasets",
        dest="input",
        nargs="+",
        required=True,
        help="corpus prefixes, or one folder: all corpora in it, parts by number, others by name",
    )
    result.add_argument("--output-prefix", required=True, help="prefix of the corpus to write")
    result.add_argument("--overwrite", action="store_true", help="replace a corpus of that name")
    result.add_argument("--multimodal", action="store_true", help="refused: an index here has no modes")
    return result


@program
def main(arguments: list[str]) -> int:
    """Run the tool and return its exit code."""
    options = parser().parse_args(arguments)
    if options.multimodal:
        raise DataError(
            "--multimodal: corpora with a mode for each sequence are not read\n  merge them with Megatron's tool"
        )
    merged = merge_datasets(prefixes(options.input), options.output_prefix, overwrite=options.overwrite)
    print(f"wrote {options.output_prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    return 0


def prefixes(inputs: list[str]) -> list[str]:
    """The prefixes given, or those of the corpora in a folder."""
    if len(inputs) == 1 and Path(inputs[0]).is_dir():
        found = sorted({str(path)[:-4] for suffix in ("idx", "bin") for path in Path(inputs[0]).glob(f"*.{suffix}")})
        if not found:
            raise DataError(f"folder {inputs[0]} holds no corpus")
        return partition_order(found)
    return inputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
