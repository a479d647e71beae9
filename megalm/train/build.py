"""The one place that wires a run: configuration in, `Run` out."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import nn

from megalm.checkpoint.run_tokenizer import tokenizer_facts
from megalm.config.checks import check
from megalm.config.deepspeed_json import deepspeed_json, effective_zero_stage, engine_clips, passed_on
from megalm.config.root import Config
from megalm.config.show import dry_run_report, notes, num_processes
from megalm.data.batches import Batch
from megalm.data.build import Datasets, build_datasets
from megalm.data.loader import batch_iterator
from megalm.data.order_digest import order_digest
from megalm.data.source import SampleSource
from megalm.errors import ConfigError, DataError, DeviceMemoryError, MegalmError
from megalm.kernels.backend import RUNS_EVERYWHERE, Choice, choose
from megalm.models.blocks.arrangement import Spread
from megalm.models.flops import flops_per_token, parameter_count
from megalm.models.gpt.build import build_model, build_pipeline, choose_kernels, pipeline_stages, plan_gpt
from megalm.models.gpt.plan import DocumentRules
from megalm.models.gpt.weights import FIRST_BLOCK_LAYER
from megalm.parallel.random import RngStreams
from megalm.telemetry.console import Console
from megalm.tokenizers.build import build_tokenizer
from megalm.tokenizers.protocol import Tokenizer
from megalm.topology.agree import exchange, together
from megalm.topology.start import Launch, allow_collectives, device_type, meet, start, stop
from megalm.topology.topology import Topology
from megalm.train.compile import compile_blocks
from megalm.train.contests import Contests
from megalm.train.continuing import check_save_folder, only_saver
from megalm.train.cuda_graph import MicroBatchGraph, choose_cuda_graph
from megalm.train.dry_run import look
from megalm.train.engine import Engine, build_engine
from megalm.train.evaluation import Evaluator
from megalm.train.gradient_sums import GradientSums
from megalm.train.kernel_choice import choose_on_all_ranks
from megalm.train.loop import Run
from megalm.train.optimizer import build_optimizer
from megalm.train.replica_check import ReplicaCheck
from megalm.train.samples import check_samples_left, sample_counts
from megalm.train.saver import Saver
from megalm.train.schedule import BatchSize, LearningRate
from megalm.train.sinks import build_profiler, open_sinks
from megalm.train.spikes import SpikeWatch
from megalm.train.stop import StopRequest
from megalm.train.stragglers import Stragglers
from megalm.train.watchdog import Watchdog, build_watchdog

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What training.dtype names."""
NO_HOST_MEMORY = "DefaultCPUAllocator"
"""What torch says, in a plain RuntimeError, where a CPU's allocation fails."""


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

    def report(self) -> str:
        """What `--dry-run` prints.

        Raises: MegalmError for what the run would stop at: kernels, stages, corpora, a checkpoint, DeepSpeed's keys.
        """
        stages = _stages(self)
        model, seq_length = self.config.model, self.config.data.seq_length
        batch_size = BatchSize.from_config(self.config.training, dp_size=self.dp_size)
        num_parameters = parameter_count(model, seq_length=seq_length)
        steps = batch_size.steps_of(self.config.training)
        more = {
            "steps": f"{steps:,} of {'up to ' if batch_size.increment else ''}{seq_length * batch_size.final:,} tokens",
            "parameters": f"{num_parameters:,}",
            "vocabulary": f"{model.padded_vocab_size:,} rows for {model.vocab_size:,} tokens of {self.tokenizer.name}",
            "operations": f"{flops_per_token(model, seq_length=seq_length):.3e} a token, forward and backward",
            **({"stages": f"of {', '.join(str(len(stage)) for stage in stages)} layers"} if len(stages) > 1 else {}),
            **look(self.config, self.tokenizer, num_parameters=num_parameters, dp_size=self.dp_size),
        }
        return dry_run_report(self.config, world_size=self.launch.world_size, more=more)


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


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[Run]:
    """Join the other processes, build the run, and take both down again however it ends."""
    console = Console(plan.launch.rank == 0, plan.config.output.log_level)
    watchdog = build_watchdog(plan.config, plan.launch, board=meet(plan.launch, warn=console.warning))
    with watchdog.watching():
        watchdog.starts("joining the other ranks")
        topology = _join(plan, watchdog)
        try:
            with only_saver(plan.config, topology):
                run = build(plan, topology, watchdog=watchdog)
                _allow_collectives(watchdog, starting=False)
                try:
                    with run.stragglers.counting():
                        yield run
                finally:
                    watchdog.ends("closing its records")
                    run.profiler.close()
                    for sink in run.sinks:
                        sink.close()
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and NO_HOST_MEMORY not in str(error):
                raise
            raise DeviceMemoryError(_memory_used_up(plan.config, topology, error)) from error
        finally:
            watchdog.ends("leaving the other ranks")
            stop()


def _join(plan: Plan, watchdog: Watchdog) -> Topology:
    parallel = plan.config.parallel
    _allow_collectives(watchdog, starting=True)
    minutes = watchdog.minutes_of_collectives(starting=True)
    return start(plan.launch, tp=parallel.tp, pp=parallel.pp, backend=parallel.backend, timeout_minutes=minutes)


def _allow_collectives(watchdog: Watchdog, *, starting: bool) -> None:
    minutes = watchdog.minutes_of_collectives(starting=starting)
    if minutes is not None:
        allow_collectives(minutes)


def _memory_used_up(config: Config, topology: Topology, error: RuntimeError) -> str:
    sizes, training = topology.layout, config.training
    whose = "GPU" if isinstance(error, torch.OutOfMemoryError) else "host"
    return (
        f"the memory of rank {topology.world.rank}'s {whose} is used up: {' '.join(str(error).split())}\n"
        f"  training.micro_batch_size = {training.micro_batch_size}, parallel.recompute = {config.parallel.recompute}, "
        f"tp {sizes.tp} x pp {sizes.pp} x dp {sizes.dp}, ZeRO-{effective_zero_stage(config)}\n"
        "  a smaller --micro-batch-size, --recompute-granularity activation or full, or more "
        "--tensor-model-parallel-size, --pipeline-model-parallel-size or --zero-stage"
    )


def build(plan: Plan, topology: Topology, *, watchdog: Watchdog) -> Run:
    """The run, at step 0 or where its checkpoint left it. `watchdog` hears which part of it is being built.

    Raises: MegalmError, the same on every rank.
    """
    config = plan.config
    console = Console(topology.world.is_first, config.output.log_level)
    for line in (_summary(plan, topology), *notes(config)):
        console.info(line)
    if config.output.load is None:  # Before minutes go into samples and weights; what is loaded decides otherwise.
        together(topology, partial(check_save_folder, config, None))
    batch_size = BatchSize.from_config(config.training, dp_size=topology.dp.size)
    watchdog.starts("opening the corpora")
    datasets = together(topology, partial(_open_datasets, plan, verifies=topology.local_rank == 0, log=console.info))
    for line in datasets.report:
        console.info(line)
    for line in dict.fromkeys(itertools.chain(*exchange(datasets.warnings, topology.world))):
        console.warning(line)
    watchdog.starts("building the model")
    streams = RngStreams(config.training.seed, tp=topology.tp, pp=topology.pp, dp=topology.dp, device=topology.device)
    module, attention = _build_module(plan, topology, streams, console)
    graph = None
    if choose_cuda_graph(config, topology, attention=attention, console=console):
        graph = partial(MicroBatchGraph, console=console)
    watchdog.starts("building the engine")
    engine = _build_engine(config, module, topology, console, graph=graph)
    compile_watch = compile_blocks(
        module,
        requested=config.output.compile,
        device=topology.device,
        zero_stage=config.parallel.zero_stage,
        console=console,
        watchdog=watchdog,
    )
    trained = None if config.training.eval_only else datasets.train
    sample_order = None if trained is None else order_digest(trained)
    spikes = SpikeWatch.from_config(config.training)
    saver = Saver(config, topology, engine, streams, console, sample_order=sample_order, spikes=spikes)
    watchdog.starts("loading")
    state = saver.restore()
    if trained is not None:
        check_samples_left(config, trained, state, dp_size=topology.dp.size)

    watchdog.starts("opening its records")
    continues_save = saver.saved_step == state.step
    opened = partial(open_sinks, config, topology, console, resumed_step=state.step, continues_save=continues_save)

    def batches_from(consumed_samples: int) -> Iterator[Batch]:
        return _feed(plan, topology, datasets.train, consumed_samples=consumed_samples)

    return Run(
        config=config,
        topology=topology,
        engine=engine,
        state=state,
        batch_size=batch_size,
        learning_rate=LearningRate.from_config(config.training),
        batches=batches_from(state.consumed_samples),
        batches_from=batches_from,
        validation=_evaluator(plan, topology, datasets.valid),
        test=_evaluator(plan, topology, datasets.test),
        total_steps=state.step + batch_size.steps_of(config.training, step=state.step, consumed=state.consumed_samples),
        saver=saver,
        stop=StopRequest(
            exit_interval=config.training.exit_interval,
            duration_minutes=config.training.exit_duration_minutes,
            kill_switch_path=config.training.kill_switch_path,
        ),
        console=console,
        sinks=together(topology, opened),
        watchdog=watchdog,
        stragglers=Stragglers(topology, interval=config.output.straggler_interval),
        replicas=ReplicaCheck(engine.module, config, topology),
        spikes=spikes,
        profiler=build_profiler(config, topology, console),
        compile_watch=compile_watch,
        flops_per_token=flops_per_token(config.model, seq_length=config.data.seq_length),
    )


def _summary(plan: Plan, topology: Topology) -> str:
    """What is trained, where, in one line."""
    config, sizes = plan.config, topology.layout
    parameters = parameter_count(config.model, seq_length=config.data.seq_length)
    return (
        f"{parameters:,} parameters in {config.training.dtype} on {num_processes(topology.world.size)} "
        f"= tp {sizes.tp} x pp {sizes.pp} x dp {sizes.dp} ({topology.device.type})"
    )


def _build_module(plan: Plan, topology: Topology, streams: RngStreams, console: Console) -> tuple[nn.Module, str]:
    """The whole model on one stage for ZeRO-2 and 3, otherwise this rank's pipeline stage; its attention's name."""
    config = plan.config
    documents = _document_rules(plan)
    dtype = TORCH_DTYPES[config.training.dtype]
    contests = Contests(config, topology.device, dtype=dtype)
    kernels, names = choose_on_all_ranks(
        _requested_kernels(config),
        lambda names: choose_kernels(
            config.model,
            device=topology.device,
            dtype=dtype,
            documents=documents,
            gelu_contest=contests.gelu_linear(),
            **names,
        ),
        topology=topology,
        console=console,
    )
    if topology.world.is_first:
        contests.record(names)
    model_plan = plan_gpt(
        config.model,
        seq_length=config.data.seq_length,
        kernels=kernels,
        spread=Spread(
            tp=topology.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            recompute=config.parallel.recompute,
            streams=streams,
        ),
        documents=documents,
        z_loss=config.training.z_loss_coeff,
    )
    if config.parallel.zero_stage >= 2:
        model = build_model(model_plan, seed=config.training.seed, num_threads=_threads_to_draw(topology.device))
        return model, names["attention"]
    pipeline = build_pipeline(
        model_plan,
        layout=topology.layout,
        partition=config.parallel.pipeline_partition,
        seed=config.training.seed,
        num_threads=_threads_to_draw(topology.device),
    )
    for stage, layers in enumerate(pipeline.stages()):
        blocks = sum(0 <= layer - FIRST_BLOCK_LAYER < config.model.num_layers for layer in layers)
        console.info(
            f"stage {stage}: layers {layers.start} to {layers.stop - 1} of the pipeline, {blocks} of them blocks"
        )
    return pipeline, names["attention"]


def _requested_kernels(config: Config) -> dict[str, str]:
    """Operations of the model, and the implementation that is asked for: a name, or `auto`."""
    operations = ("attention", "layer_norm", "bias_gelu", "gelu_linear", "linear", "head", "dropout_add")
    return {operation: str(config.get(f"output.{operation}")) for operation in operations}


def _stages(plan: Plan) -> list[range]:
    """Positions of the layers that each stage will own, without any process but this one; none under ZeRO-2 and 3,
    which have no stages.

    Raises: KernelError if a kernel that is asked for by name cannot run here; ConfigError or DataError if the model
        cannot be dealt to the stages, or no token ends its documents.
    """
    config, documents = plan.config, _document_rules(plan)
    named = {
        operation: RUNS_EVERYWHERE[operation] if name == "auto" else name
        for operation, name in _requested_kernels(config).items()
    }
    device = torch.device(device_type())
    choose("adamw", config.output.adamw, device)
    kernels, _ = choose_kernels(
        config.model,
        device=device,
        dtype=TORCH_DTYPES[config.training.dtype],
        documents=documents,
        gelu_contest=None,
        **named,
    )
    if config.parallel.zero_stage >= 2:
        return []
    model_plan = plan_gpt(config.model, seq_length=config.data.seq_length, kernels=kernels, documents=documents)
    return pipeline_stages(model_plan, partition=config.parallel.pipeline_partition, num_stages=config.parallel.pp)


def _threads_to_draw(device: torch.device) -> int:
    """Threads that draw initial weights: a GPU's share of the host's cores. On CPUs every core has a process."""
    if device.type != "cuda":
        return 1
    return max(1, min(16, len(os.sched_getaffinity(0)) // torch.cuda.device_count()))


def _build_engine(
    config: Config,
    module: nn.Module,
    topology: Topology,
    console: Console,
    *,
    graph: Callable[[Any, GradientSums], MicroBatchGraph] | None,
) -> Engine:
    optimizer = build_optimizer(module, config.training, topology=topology, engine_clips=engine_clips(config))
    kernels: dict[str, Any] = {}
    if config.training.dtype == "bf16" and effective_zero_stage(config) == 1:
        kernels = _choose_update_kernels(config, topology, console)
    settings = deepspeed_json(config, dp_size=topology.dp.size)
    try:
        return build_engine(module, optimizer, settings, topology, **kernels, graph=graph)
    except (MegalmError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # It raises its own, RuntimeError, ValueError and AssertionError.
        keys = passed_on(config)
        if not keys:
            raise
        raise ConfigError(
            f"DeepSpeed cannot set up its engine: {type(error).__name__}: {' '.join(str(error).split())}\n"
            f"  it was given {', '.join(keys)}, set by --deepspeed_config\n"
            "  correct or remove those that this is about"
        ) from error


def _choose_update_kernels(config: Config, topology: Topology, console: Console) -> dict[str, Any]:
    """What adds bf16 gradients to their fp32 sums, and what updates with those, by the operations' names."""

    def choose_them(names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Choice]]:
        choices = {
            operation: choose(
                operation,
                name,
                topology.device,
                hidden_size=config.model.hidden_size,
                contest=contests.adamw() if operation == "adamw" else None,
            )
            for operation, name in names.items()
        }
        return {operation: choice.implementation for operation, choice in choices.items()}, choices

    requested = {"gradient_sum": "auto", "adamw": config.output.adamw}
    contests = Contests(config, topology.device, dtype=TORCH_DTYPES[config.training.dtype])
    kernels, names = choose_on_all_ranks(requested, choose_them, topology=topology, console=console)
    if topology.world.is_first:
        contests.record(names)
    return kernels


def _open_datasets(plan: Plan, *, verifies: bool, log: Callable[[str], None]) -> Datasets:
    """Corpora and sample maps of every split; does not communicate. A rank of each host `verifies`."""
    training = plan.config.training
    datasets = build_datasets(
        plan.config.data,
        num_samples=sample_counts(plan.config, dp_size=plan.dp_size),
        seed=training.seed,
        vocab_size=plan.config.model.padded_vocab_size,
        tokenizer=tokenizer_facts(plan.tokenizer),
        verifies=verifies,
        log=log,
    )
    if datasets.train is None and not training.eval_only:
        raise DataError(
            f"data.split = {plan.config.data.split!r} leaves no sequence to train on\n"
            "  give training a larger share with --split, or a larger corpus"
        )
    return datasets


def _evaluator(plan: Plan, topology: Topology, sources: Mapping[str, SampleSource]) -> Evaluator:
    training = plan.config.training
    final = plan.config.global_batch_size(dp_size=topology.dp.size)
    return Evaluator(
        sources={
            name: partial(_feed, plan, topology, source, consumed_samples=0, evaluating=True)
            for name, source in sources.items()
        },
        num_micro_batches=training.eval_iters * final // (training.micro_batch_size * topology.dp.size),
    )


def _feed(
    plan: Plan, topology: Topology, source: SampleSource | None, *, consumed_samples: int, evaluating: bool = False
) -> Iterator[Batch]:
    """This rank's micro-batches; stages in the middle of the pipeline read nothing."""
    if source is None or not topology.reads_data:
        return iter(())
    data, training = plan.config.data, plan.config.training
    workers = data.num_workers
    if evaluating and data.valid_num_workers is not None:
        workers = data.valid_num_workers
    return batch_iterator(
        source,
        consumed_samples=consumed_samples,
        micro_batch_size=training.micro_batch_size,
        dp_rank=topology.dp.rank,
        dp_size=topology.dp.size,
        num_workers=workers,
        eod_id=_end_of_document(plan) if data.eod_mask_loss else None,
        eod_mask_loss=data.eod_mask_loss,
        pinned_for=topology.device,
    )


def _document_rules(plan: Plan) -> DocumentRules | None:
    """What ends with a document; the model finds the ends itself, in the tokens.

    Raises: DataError if the tokenizer has no token that ends a document.
    """
    data = plan.config.data
    if not (data.reset_position_ids or data.reset_attention_mask):
        return None
    return DocumentRules(
        eod_id=_end_of_document(plan),
        reset_positions=data.reset_position_ids,
        reset_attention=data.reset_attention_mask,
    )


def _end_of_document(plan: Plan) -> int:
    eod_id = plan.tokenizer.eod_id
    if eod_id is None:
        raise DataError(
            f"{plan.tokenizer.name} names no token that ends a document\n"
            "  --eod-mask-loss, --reset-position-ids and --reset-attention-mask need one: set eos_token in the "
            "tokenizer's folder"
        )
    return eod_id
