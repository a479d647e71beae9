"""A configuration that was checked as far as one process can."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.checks import check
from megalm.config.root import Config
from megalm.errors import DataError
from megalm.models.gpt.plan import DocumentRules
from megalm.tokenizers.build import build_tokenizer
from megalm.tokenizers.protocol import Tokenizer
from megalm.topology.start import Launch, device_type


@dataclass(frozen=True)
class Plan:
    """A configuration that was checked against the launch and the tokenizer, before any process met another one."""

    config: Config
    launch: Launch
    tokenizer: Tokenizer

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.launch.world_size // (self.config.parallel.tp * self.config.parallel.pp)

    @property
    def document_rules(self) -> DocumentRules | None:
        """What ends with a document; the model finds the ends itself, in the tokens.

        Raises: DataError if the tokenizer has no token that ends a document.
        """
        data = self.config.data
        if not (data.reset_position_ids or data.reset_attention_mask):
            return None
        return DocumentRules(
            eod_id=self.end_of_document,
            reset_positions=data.reset_position_ids,
            reset_attention=data.reset_attention_mask,
        )

    @property
    def end_of_document(self) -> int:
        """The token that ends a document.

        Raises: DataError if the tokenizer has none.
        """
        eod_id = self.tokenizer.eod_id
        if eod_id is None:
            raise DataError(
                f"{self.tokenizer.name} names no token that ends a document\n"
                "  --eod-mask-loss, --reset-position-ids and --reset-attention-mask need one: set eos_token in the "
                "tokenizer's folder"
            )
        return eod_id


def prepare(config: Config) -> Plan:
    """Everything that one process can find out alone.

    Raises: DataError if the tokenizer cannot be read; ConfigError with every option that does not fit.
    """
    launch = Launch.from_environment()
    tokenizer = build_tokenizer(config.data, vocab_size=config.model.vocab_size)
    if config.model.vocab_size is None or config.data.tokenizer_type == "NullTokenizer":
        config = config.with_vocab_size(tokenizer.vocab_size)
    check(config, world_size=launch.world_size, device_type=device_type(), vocab_size=tokenizer.vocab_size)
    return Plan(config, launch, tokenizer)
