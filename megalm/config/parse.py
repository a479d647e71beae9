"""The command line: defaults, then presets, then flags, then dotted overrides; every failure in one error."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalm.config.failures import Failure, nearest, raise_if_any
from megalm.config.flags import Flag, find_flag, flag_table
from megalm.config.root import SECTIONS, Config, option_table
from megalm.config.settings import Settings
from megalm.config.values import EXPECTED, from_text

OVERRIDE = re.compile(r"(?P<path>(?P<section>[a-z]+)\.(?P<name>\w+))=(?P<value>.*)", re.DOTALL)
PATHS_PATH = re.compile(r"--(?P<split>train|valid|test)-weighted-split-paths-path")
INSTEAD_OF_A_CORPUS = ("--mock-data",)
# The steps that `--train-tokens T` asks for can be told only where the sample length is known.
IN_TOKENS = {
    "--train-tokens": "--train-samples",
    "--lr-decay-tokens": "--lr-decay-samples",
    "--lr-warmup-tokens": "--lr-warmup-samples",
}


class HelpRequested(Exception):  # noqa: N818  (nothing went wrong)
    """--help was given; `text` is what to print."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True)
class Given:
    """One flag as it stood on the command line, with the words that belong to it."""

    flag: Flag
    words: tuple[str, ...]


def parse_command_line(
    argv: Sequence[str], *, otherwise: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
) -> Config:
    """The Config of a command line (without the program's name).

    `otherwise` tells, from the fields that were set, the values of others: for a program that is no run.

    Raises: HelpRequested for --help; ConfigError with every flag, value and combination that cannot be obeyed and that
    does not need the processes or the tokenizer to tell.
    """
    from megalm.config.checks import NO_CORPUS, static_failures

    given, overrides, failures = split_command_line(argv)
    if any(one.flag.name == "--help" for one in given):
        from megalm.config.show import help_text

        raise HelpRequested(help_text())
    settings = Settings(failures=failures)
    for one in given:
        if one.flag.name == "--config":
            _load_presets(one.words, settings)
    _apply_flags(given, settings)
    for path, text in overrides:
        _apply_text(path, _listed(path, text), f"the argument {path}={text}", settings)
    for one in given:
        if one.flag.name in ("--deepspeed_config", "--deepscale_config"):
            from megalm.config.deepspeed_json import load_deepspeed_file

            load_deepspeed_file(one.words[0], settings)
    _with_tokenizer_of_two_files(settings)
    settings.failures += [
        Failure(f"{one.flag.name}: {one.flag.unless.note}", "", one.flag.unless.remedy)
        for one in given
        if one.flag.unless and settings.value(one.flag.unless.path) == one.flag.unless.value
    ]
    _with_sample_counts(settings)
    for path, value in (otherwise(settings.values) if otherwise is not None else {}).items():
        if path not in settings.values:
            settings.set(path, value, "this program")
    missing = settings.missing()
    failures = [*settings.failures, *missing]
    if not missing:
        config = settings.build(dry_run=any(one.flag.name == "--dry-run" for one in given))
        answered = any(PATHS_PATH.fullmatch(one.flag.name) or one.flag.name in INSTEAD_OF_A_CORPUS for one in given)
        failures += [failure for failure in static_failures(config) if not (answered and failure == NO_CORPUS)]
        failures += [failure for one in given if one.flag.equals for failure in _unequal(one, config)]
        raise_if_any(failures)
        return config
    raise_if_any(failures)
    raise AssertionError("unreachable: a missing field is a failure")


def split_command_line(argv: Sequence[str]) -> tuple[list[Given], list[tuple[str, str]], list[Failure]]:
    """Flags with their words, dotted overrides, and what could not be understood. Names must be exact."""
    given: list[Given] = []
    overrides: list[tuple[str, str]] = []
    failures: list[Failure] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        override = _override(word)
        if override:
            overrides.append((override["path"], override["value"]))
        elif word.startswith("--") or word == "-h":
            name, has_value, inline = word.partition("=")
            flag = find_flag("--help" if name == "-h" else name)
            limit = _most_words(flag)
            words = [inline] if has_value else []
            while not has_value and position < len(argv) and len(words) < limit and not _is_flag(argv[position]):
                words.append(argv[position])
                position += 1
            if flag is None:
                failures.append(_unknown(name))
            else:
                _keep(flag, tuple(words), given, failures)
        else:
            failures.append(_stray(word))
    return given, overrides, failures


def _most_words(flag: Flag | None) -> float:
    return float("inf") if flag is None else {"0": 0, "?": 1, "1": 1, "+": float("inf"), "*": float("inf")}[flag.arity]


def _is_flag(word: str) -> bool:
    return word.startswith("--") or word == "-h" or _override(word) is not None


def _override(word: str) -> re.Match[str] | None:
    """`section.field=VALUE`, also where the section or the field is misspelled, but not both."""
    found = OVERRIDE.fullmatch(word)
    if found is None or found["section"] in SECTIONS:
        return found
    meant = nearest(found["section"], list(SECTIONS))
    return found if any(f"{section}.{found['name']}" in option_table() for section in meant) else None


def _unknown(name: str) -> Failure:
    alike = [other for other in flag_table() if other.replace("_", "-") == name.replace("_", "-")]
    if alike:
        return Failure(f"{name} is not a flag", "on the command line", f"it is written {alike[0]}")
    # What changes nothing or is refused is no remedy, nor is the opposite.
    opposite = name.replace("--no-", "--", 1) if name.startswith("--no-") else name.replace("--", "--no-", 1)
    obeyed = [
        flag.name for flag in flag_table().values() if flag.action in ("set", "command") and flag.name != opposite
    ]
    near = nearest(name, obeyed)
    return Failure(
        f"{name} is not a flag", "on the command line", f"nearest: {', '.join(near)}" if near else "see --help"
    )


def _stray(word: str) -> Failure:
    path = word.partition("=")[0]
    near = nearest(path, list(option_table())) if "=" in word else []
    remedy = (
        f"nearest: {', '.join(near)}" if near else "an override reads section.field=VALUE, for example training.lr=1e-3"
    )
    return Failure(f"{word!r} belongs to no flag", "on the command line", remedy)


def _keep(flag: Flag, words: tuple[str, ...], given: list[Given], failures: list[Failure]) -> None:
    """Accept a flag that has as many words as it takes."""
    if flag.arity == "0" and words:
        failures.append(
            Failure(f"{flag.name} takes no value, got {words[0]!r}", "on the command line", f"pass {flag.name}")
        )
    elif flag.arity in ("1", "+") and not words:
        expected = EXPECTED[option_table()[flag.target].kind] if flag.target else flag.note
        failures.append(Failure(f"{flag.name} needs a value: {expected}", "on the command line"))
    else:
        given.append(Given(flag, words))


def _load_presets(paths: Sequence[str], settings: Settings) -> None:
    from megalm.config.yaml_file import load_file

    for path in paths:
        load_file(path, settings)


def _apply_flags(given: Sequence[Given], settings: Settings) -> None:
    """Apply flags in their order. One flag given twice counts once, the last; two flags of one field must agree."""
    setters: dict[str, dict[str, Any]] = {}
    refusals: dict[tuple[str, str], list[str]] = {}
    for one in given:
        flag = one.flag
        if flag.action == "refuse":
            refusals.setdefault((flag.note, flag.remedy), []).append(" ".join((flag.name, *one.words)))
        elif flag.action == "noop":
            if flag.allowed and not set(one.words) <= set(flag.allowed):
                refusals.setdefault((flag.note, flag.remedy), []).append(" ".join((flag.name, *one.words)))
        elif flag.action == "set":
            if flag.arity == "0":
                settings.set(flag.target, flag.constant, flag.name)
            else:
                words = list(one.words) or ["true"]
                _apply_text(flag.target, words, flag.name, settings, words_map=flag.words)
            if settings.source(flag.target) == flag.name:
                setters.setdefault(flag.target, {})[flag.name] = settings.values[flag.target]
        else:
            _apply_paths_file(one, settings, setters)
    settings.failures += [_refused(flags, note, remedy) for (note, remedy), flags in refusals.items()]
    for path, by_flag in setters.items():
        if any(value != settings.values[path] for value in by_flag.values()):
            listed = ", ".join(f"{name} ({value})" for name, value in by_flag.items())
            settings.failures.append(Failure(f"{path} is set differently by {listed}", "", "keep one of these flags"))


def _refused(flags: Sequence[str], note: str, remedy: str) -> Failure:
    """One failure for flags, with their words, that are refused for one reason."""
    distinct = list(dict.fromkeys(flags))
    several = remedy.replace("remove it", "remove them", 1) if len(distinct) > 1 else remedy
    return Failure(f"{', '.join(distinct)}: {note}", "", several)


def _unequal(one: Given, config: Config) -> Iterator[Failure]:
    """A failure if a flag that asks for what is so anyway asks for another number."""
    section, name = one.flag.equals.split(".")
    try:
        value = getattr(getattr(config, section), name)
    except ZeroDivisionError:  # By what is a failure of its own.
        return
    if one.words != (str(value),):
        yield Failure(f"{one.flag.name} {' '.join(one.words)}: {one.flag.equals} is {value}", "", one.flag.remedy)


def _apply_text(
    path: str, words: Sequence[str], source: str, settings: Settings, *, words_map: Mapping[str, Any] | None = None
) -> None:
    """Set a path from text, or record why it cannot be."""
    info = option_table().get(path)
    if info is None:
        settings.fail_unknown(path, source)
        return
    translated = words_map or {}
    try:
        value = translated[words[0]] if words[0] in translated else from_text(info, words)
    except ValueError as error:
        spelled = f" ({source} takes {', '.join(translated)})" if translated else ""
        settings.failures.append(Failure(f"{path} = {' '.join(words)}: {error}{spelled}", f"set by {source}", info.doc))
        return
    settings.set(path, value, source)


def _listed(path: str, text: str) -> list[str]:
    """The words of an override: those of a list stand in one, in quotes where they hold spaces."""
    info = option_table().get(path)
    if info is None or info.kind != "strings":
        return [text]
    try:
        if path.endswith("_weighted_split_paths"):
            return (list(read_groups(text)) if '"' in text else []) or [text]
        words = list(_shell_words(text)) or [text]
        return words if path != "data.data_path" or _is_blend(words) else [text]
    except ValueError:
        return [text]


def _shell_words(text: str) -> Iterator[str]:
    """Words with spaces between them, or in quotes; a backslash is a character. Raises: ValueError."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="")
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    return iter(lexer)


def _is_blend(words: Sequence[str]) -> bool:
    """Whether these are weights and prefixes in turn, and not the parts of a path with spaces."""
    return len(words) % 2 == 0 and all(re.fullmatch(r"[0-9.]+(e-?\d+)?", weight) for weight in words[::2])


def _apply_paths_file(one: Given, settings: Settings, setters: dict[str, dict[str, Any]]) -> None:
    """The groups of a weighted-split file: one line, each group in double quotes."""
    match = PATHS_PATH.fullmatch(one.flag.name)
    if match is None:
        return
    path = f"data.{match['split']}_weighted_split_paths"
    try:
        with open(one.words[0], encoding="utf-8") as file:
            groups = read_groups(file.read())
    except OSError as error:
        settings.failures.append(Failure(f"cannot read {one.words[0]}: {error.strerror}", f"named by {one.flag.name}"))
        return
    except ValueError as error:
        settings.failures.append(
            Failure(
                f"{one.words[0]}: {error}", f"named by {one.flag.name}", 'write: "NAME: W START:END PATH" "NAME: ..."'
            )
        )
        return
    settings.set(path, groups, one.flag.name)
    setters.setdefault(path, {})[one.flag.name] = groups


def read_groups(text: str) -> tuple[str, ...]:
    """The double-quoted groups of a `*-weighted-split-paths-path` file. Raises: ValueError."""
    if not re.fullmatch(r'\s*("[^"]+"\s*)+', text):
        raise ValueError("the file must hold one or more groups, each in double quotes")
    return tuple(group.strip() for group in re.findall(r'"([^"]+)"', text))


def _with_tokenizer_of_two_files(settings: Settings) -> None:
    """--vocab-file and --merge-file without a type are of GPT2BPETokenizer, the type that the originals then take."""
    values = settings.values
    both = "data.vocab_file" in values and "data.merge_file" in values
    if both and "data.tokenizer_type" not in values and "data.tokenizer_path" not in values:
        settings.set("data.tokenizer_type", "GPT2BPETokenizer", settings.source("data.merge_file"))


def _with_sample_counts(settings: Settings) -> None:
    """Turn the remedy of a duration in tokens into the number of samples to pass, where seq_length is known."""
    seq_length = settings.values.get("data.seq_length")
    for index, failure in enumerate(settings.failures):
        name, _, rest = failure.rule.partition(" ")
        tokens = rest.partition(":")[0]
        if name in IN_TOKENS and seq_length and tokens.replace("_", "").isdigit():
            remedy = (
                f"pass {IN_TOKENS[name]} {int(tokens) // seq_length}: {int(tokens)} tokens / seq_length {seq_length}"
            )
            settings.failures[index] = replace(failure, remedy=remedy)
