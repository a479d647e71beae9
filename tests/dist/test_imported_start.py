"""A Hugging Face folder, imported by the tool, as the start of pre-training through the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.support.tiny_run import SEQ_LENGTH, TRAINING_FLAGS, write_corpus
from tools import import_hf

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

NUM_TOKENS = 97
"""Odd, so that tp 2 needs padding: the 96 ids of the corpus, and the end of document that NullTokenizer adds."""


def first_steps(flags: list[str]) -> dict[str, Any]:
    """Three steps of the program: the tokens of the first, the losses, and the word embedding it started from."""
    from megalm.config.parse import parse_command_line
    from megalm.train.build import running
    from megalm.train.prepare import prepare
    from megalm.train.loop import train
    from tests.support.tiny_run import Collector, local_weights

    config = parse_command_line([*TRAINING_FLAGS, *flags])
    with running(prepare(config)) as run:
        batches = run.batches_from(0)
        first = [next(batches) for _ in range(4)]
        start = local_weights(run)["word_embeddings.weight"][0]
        collector = Collector()
        run.sinks = [*run.sinks, collector]
        train(run)
        return {
            "tokens": torch.cat([batch.tokens for batch in first]).numpy(),
            "labels": torch.cat([batch.labels for batch in first]).numpy(),
            "losses": [m.loss for m in collector.steps],
            "start": start,
        }


def random_bloom(folder: Path) -> Any:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=NUM_TOKENS)
    model = transformers.BloomForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return model


def imported(folder: Path, *, tp_size: int = 1) -> list[str]:
    """Import `folder/hf` by the tool; the flags of a run that goes on from there."""
    sizes = ["--tensor-model-parallel-size", str(tp_size)]
    assert import_hf.main(["--model", str(folder / "hf"), "--save", str(folder / "start"), *sizes]) == 0
    return [
        *("--config", str(folder / "start" / "model.yaml"), "--load", str(folder / "start")),
        *("--data-path", write_corpus(folder), "--seq-length", str(SEQ_LENGTH)),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(NUM_TOKENS - 1)),
        *("--hidden-dropout", "0", "--attention-dropout", "0", "--train-iters", "3", "--lr-decay-iters", "12"),
    ]


@torch.no_grad()
def transformers_loss(model: Any, outcome: dict[str, Any]) -> float:
    logits = model(torch.from_numpy(outcome["tokens"])).logits
    return torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), torch.from_numpy(outcome["labels"]).flatten()
    ).item()


def test_a_run_goes_on_from_an_imported_bloom_at_tp1_with_its_loss(tmp_path: Path) -> None:
    model = random_bloom(tmp_path / "hf")
    (outcome,) = run_ranks(first_steps, 1, imported(tmp_path))
    assert len(outcome["losses"]) == 3
    # The mean of 128 fp32 losses of size 4, through two layers summed in another order.
    assert outcome["losses"][0] == pytest.approx(transformers_loss(model, outcome), rel=1e-6)


def test_a_run_goes_on_from_an_imported_bloom_at_tp2_with_its_loss(tmp_path: Path) -> None:
    """tp 2 needs one more row, which takes part in the softmax: transformers gets the same one."""
    model = random_bloom(tmp_path / "hf")
    flags = [*imported(tmp_path), "--tensor-model-parallel-size", "2", "--pad-vocab-size-to", str(NUM_TOKENS + 1)]
    outcomes = run_ranks(first_steps, 2, flags)
    start = torch.cat([torch.from_numpy(outcome["start"]) for outcome in outcomes])
    assert torch.equal(start[:NUM_TOKENS], model.transformer.word_embeddings.weight)
    model.resize_token_embeddings(NUM_TOKENS + 1)
    with torch.no_grad():
        model.transformer.word_embeddings.weight.copy_(start)
    assert len(outcomes[0]["losses"]) == 3
    assert outcomes[0]["losses"] == outcomes[1]["losses"]
    assert outcomes[0]["losses"][0] == pytest.approx(transformers_loss(model, outcomes[0]), rel=1e-6)
