from __future__ import annotations

import random

import pytest

from megalm.config.checks import check
from megalm.config.flags import flag_table
from megalm.config.parse import HelpRequested, parse_command_line
from megalm.config.root import option_table
from megalm.config.yaml_file import config_from_yaml, config_to_yaml
from megalm.errors import ConfigError
from tests.unit.config.arguments import SMALLEST

WORDS = (
    "0", "-1", "1", "2", "3", "7", "10_000_000_000_000", "0.5", "1e-300", "inf", "nan", "", " ", "none", "true",
    "alibi", "full", "type:x", "a b", "969,30,1", ":", "=", "--", "-", "x=1", "training.lr=", "é", "#", "'",
)  # fmt: skip


def random_line(chance: random.Random) -> list[str]:
    """The smallest command line with a few random flags, values and overrides around it."""
    words = list(SMALLEST)
    for _ in range(chance.randint(1, 6)):
        value = chance.choice(WORDS)
        kind = chance.random()
        if kind < 0.6:
            words += [chance.choice(list(flag_table())), *chance.sample(WORDS, chance.randint(0, 3))]
        elif kind < 0.9:
            words.append(f"{chance.choice(list(option_table()))}={value}")
        else:
            words.insert(chance.randint(0, len(words)), value)
    return words


@pytest.mark.parametrize("seed", range(5))
def test_any_command_line_is_obeyed_or_refused_in_words(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(30):
        words = random_line(chance)
        try:
            config = parse_command_line(words)
            assert config_from_yaml(config_to_yaml(config)) == config, words
            check(
                config,
                world_size=chance.choice([1, 2, 6, 384]),
                device_type="cpu",
                vocab_size=chance.choice([None, 1, 999]),
            )
        except (HelpRequested, ConfigError):
            continue
