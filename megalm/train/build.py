"""The one place that wires a run: configuration in, `Run` out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed

from megalm.config.deepspeed_json import effective_zero_stage
from megalm.config.root import Config
from megalm.config.show import notes, num_processes
from megalm.data.batches import Batch
from megalm.errors import DeviceMemoryError
from megalm.models.flops import flops_per_token, parameter_count
from megalm.parallel.random import RngStreams
from megalm.telemetry.console import Console
from megalm.topology.agree import exchange, lines_of_all, together
from megalm.topology.start import SECONDS_TO_PART, allow_collectives, meet, start, stop
from megalm.topology.topology import Topology
from megalm.train.assembly import assemble_engine, assemble_module
from megalm.train.compile import compile_blocks
from megalm.train.continuing import check_save_folder, only_saver
from megalm.train.cuda_graph import MicroBatchGraph, choose_cuda_graph
from megalm.train.loop import Run
from megalm.train.prepare import Plan
from megalm.train.reading import evaluator, feed, open_datasets
from megalm.train.replica_check import ReplicaCheck
from megalm.train.samples import TRAINING_SET, check_same_samples, check_samples_left, sample_orders
from megalm.train.saver import Saver
from megalm.train.schedule import BatchSize, LearningRate
from megalm.train.sinks import build_profiler, open_sinks
from megalm.train.spikes import SpikeWatch
from megalm.train.stop import StopRequest
from megalm.train.stragglers import Stragglers
from megalm.train.watchdog import Watchdog, build_watchdog

NO_HOST_MEMORY = "DefaultCPUAllocator"
"""What torch says, in a plain RuntimeError, where a CPU's allocation fails."""


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[Run]:
    """Join the other processes, build the run, and take both down again however it ends."""
    console = Console(plan.launch.rank == 0, plan.config.output.log_level)
    watchdog = build_watchdog(plan.config, plan.launch, board=meet(plan.launch, warn=console.warning))
    with watchdog.watching():
        watchdog.starts("joining the other ranks")
        topology = _join(plan, watchdog)
        patience: float | None = SECONDS_TO_PART  # Unless all went well, the others may not be on their way out.
        try:
            with only_saver(plan.config, topology):
                run = build(plan, topology, watchdog=watchdog)
                # Ranks that have compiled wait in a collective for one that still does.
                _allow_collectives(watchdog, starting=run.compile_watch.listens)
                try:
                    with run.stragglers.counting():
                        yield run
                finally:
                    watchdog.ends("closing its records")
                    run.profiler.close()
                    for sink in run.sinks:
                        sink.close()
            patience = None
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and NO_HOST_MEMORY not in str(error):
                raise
            raise DeviceMemoryError(_memory_used_up(plan.config, topology, error)) from error
        finally:
            watchdog.ends("leaving the other ranks")
            stop(patience_seconds=patience)


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
    datasets = together(topology, partial(open_datasets, plan, verifies=topology.local_rank == 0, log=console.info))
    for line in datasets.report:
        console.info(line)
    orders = sample_orders(datasets)
    for line in lines_of_all(datasets.warnings, topology.world):
        console.warning(line)
    check_same_samples(exchange(orders, topology.world))
    watchdog.starts("building the model")
    streams = RngStreams(config.training.seed, tp=topology.tp, pp=topology.pp, dp=topology.dp, device=topology.device)
    module, attention = assemble_module(plan, topology, streams, console)
    graph = None
    if choose_cuda_graph(config, topology, attention=attention, console=console):
        graph = partial(MicroBatchGraph, console=console)
    watchdog.starts("building the engine")
    engine = assemble_engine(config, module, topology, console, graph=graph)
    compile_watch = compile_blocks(
        module,
        requested=config.output.compile,
        device=topology.device,
        zero_stage=config.parallel.zero_stage,
        console=console,
        watchdog=watchdog,
    )
    trained = None if config.training.eval_only else datasets.train
    sample_order = None if trained is None else orders[TRAINING_SET]
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
        return feed(plan, topology, datasets.train, consumed_samples=consumed_samples)

    return Run(
        config=config,
        topology=topology,
        engine=engine,
        state=state,
        batch_size=batch_size,
        learning_rate=LearningRate.from_config(config.training),
        batches=batches_from(state.consumed_samples),
        batches_from=batches_from,
        validation=evaluator(plan, topology, datasets.valid),
        test=evaluator(plan, topology, datasets.test),
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
