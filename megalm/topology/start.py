"""From the launcher's environment variables, which nothing else in megalm reads, to a `Topology`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from megalm.errors import MegalmError, TopologyError
from megalm.program import EXIT_INTERRUPTED
from megalm.topology.board import StoreBoard
from megalm.topology.layout import Layout
from megalm.topology.meeting import Meeting
from megalm.topology.ports import free_port

if TYPE_CHECKING:
    from megalm.topology.topology import Topology

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS_TO_SPEAK = 3.0
PATIENCE_MINUTES = 30.0
"""What ranks that join give each other, as torch does on CPUs."""
SECONDS_TO_PART = 10.0
"""What a rank that ends with an error gives the others to leave with it."""


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read what `deepspeed`, `torchrun` or launch/slurm/task.sh set; a process without is a run of one process.

        Raises: TopologyError if some of the variables are there and others are not, one is no number, or srun started
        several processes that would each be a run of its own.
        """
        present = [name for name in LAUNCHER_VARIABLES if name in environment]
        if "RANK" not in present and "WORLD_SIZE" not in present:
            tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
            if tasks != "1" and "SLURM_PROCID" in environment:
                raise TopologyError(
                    f"srun started {tasks} tasks and names no RANK, so that each would be a run of one process\n"
                    "  start them with: srun bash launch/slurm/task.sh pretrain_gpt.py ..."
                )
            return cls(rank=0, world_size=1, local_rank=0)
        missing = [name for name in LAUNCHER_VARIABLES if name not in environment]
        if missing:
            raise TopologyError(
                f"the launcher set {', '.join(present)} but not {', '.join(missing)}\n"
                "  start with launch/deepspeed.sh or launch/torchrun.sh; for one process, unset all of them"
            )
        try:
            rank, world_size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError as error:
            raise TopologyError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
        return cls(rank=rank, world_size=world_size, local_rank=local_rank)


def device_type() -> str:
    """ "cuda" where torch sees a GPU and DS_ACCELERATOR does not say cpu, otherwise "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"


def name_device_to_deepspeed() -> None:
    """Tell DeepSpeed what `device_type` found, as `launch/` does: left to find it, it warns of a missing GPU.

    To be called before DeepSpeed is imported.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type())


def meet(launch: Launch, *, warn: Callable[[str], None], limit_minutes: float = PATIENCE_MINUTES) -> StoreBoard | None:
    """Wait until all processes are there; what they tell each other from then on, None where there is one.

    To be called before `start`, whose own limit names nobody.
    Raises: HangError with the ranks that do not come; TopologyError if another program has the port.
    """
    if launch.world_size == 1:
        return None
    meeting = Meeting(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank=launch.rank,
        world_size=launch.world_size,
        # Under torchrun its agent serves, one start of the processes after the other.
        serves=launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True),
        prefix=f"megalm/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )
    return meeting.board(limit_seconds=60.0 * limit_minutes, warn=warn)


def start(launch: Launch, *, tp: int, pp: int, backend: str = "auto", timeout_minutes: float | None = None) -> Topology:
    """Join the other processes and lay the axes over them. `timeout_minutes` is what collectives get.

    Raises: TopologyError if tp * pp does not divide the world, or the backend cannot work on this device. Both are
    known before any process waits for another one, so all of them stop. Likewise where a process has no GPU of its own,
    of which the others hear by its end alone.
    """
    layout = Layout.of_world(launch.world_size, tp=tp, pp=pp)
    import torch

    from megalm.topology.topology import Topology

    on_gpu = device_type() == "cuda"
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    if backend == "nccl" and not on_gpu:
        raise TopologyError(
            "parallel.backend = nccl needs a GPU, and this process sees none\n"
            "  parallel.backend set by --distributed-backend\n"
            "  values that fit: gloo, auto"
        )
    if launch.world_size == 1:
        _complete_environment_of_one_process()
    device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        _check_own_gpu(launch, num_gpus=torch.cuda.device_count())
        torch.cuda.set_device(device)  # before NCCL, whose groups take the current one where they are not told
    else:
        _keep_freed_memory()
    _join(backend, timeout_minutes or PATIENCE_MINUTES)
    return Topology.build(layout, rank=launch.rank, local_rank=launch.local_rank, device=device)


def allow_collectives(minutes: float) -> None:
    """Give collectives so long, of all groups that there are and of those to come, in place of torch's 10 minutes on
    GPUs and 30 on CPUs: the watchdog is to speak before torch ends one process without a word about the others."""
    from torch.distributed import distributed_c10d

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if isinstance(getattr(distributed_c10d, name, None), timedelta):
            setattr(distributed_c10d, name, timedelta(minutes=minutes))
    groups = getattr(distributed_c10d, "_world", None)
    # Public since torch 2.15, where the other one warns.
    set_timeout = getattr(distributed_c10d, "set_timeout", None) or getattr(distributed_c10d, "_set_pg_timeout", None)
    if groups is not None and set_timeout is not None:
        for group in list(groups.pg_map):
            set_timeout(timedelta(minutes=minutes), group)


def report_failure(error: MegalmError) -> int:
    """Print an error once on every host and return the exit code that it stands for.

    What befell this rank alone is printed by it.
    The launchers end all processes of a host when the first one exits, so the others wait until the one that speaks
    has spoken.
    """
    if error.is_of_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"\n{type(error).__name__}: {error}\n", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_TO_SPEAK)
    return error.exit_code


def report_interruption() -> int:
    """Say once on every host that Ctrl-C came outside of training, and return the exit code for it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("\ninterrupted, not while training", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED


def leave(exit_code: int) -> NoReturn:
    """End this process with `exit_code`, whatever torch's threads are doing.

    The interpreter's own end is not safe under torch.distributed: a thread of gloo that asks for the interpreter while
    it is being taken down is unwound through C++ that forbids it, and the process dies with SIGABRT ("terminate called
    without an active exception") in place of its exit code. What the interpreter would do for us comes first: other
    threads finish, exit handlers run, and output is written.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # idle threads of pools wait for this call, joining hangs
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader is gone, as with `| head`
            pass
    os._exit(exit_code)


def stop(*, patience_seconds: float | None = None) -> None:
    """Leave the process group, so that no rank dies with a connection open.

    NCCL's ranks leave together: one that has failed alone would wait for others that wait for it in a collective, and
    never say what befell it. After an error `patience_seconds` is what they get.
    """
    import torch.distributed

    if not torch.distributed.is_initialized():
        return
    if patience_seconds is None:
        torch.distributed.destroy_process_group()
        return

    def destroy() -> None:
        with contextlib.suppress(Exception):  # The error that ends this rank is the one to tell.
            torch.distributed.destroy_process_group()

    leaving = threading.Thread(target=destroy, name="megalm leaving", daemon=True)
    leaving.start()
    leaving.join(patience_seconds)


def _check_own_gpu(launch: Launch, *, num_gpus: int) -> None:
    """DeepSpeed gives each process the GPU of its LOCAL_RANK.

    Raises: TopologyError if the process does not see that many.
    """
    if launch.local_rank < num_gpus:
        return
    error = TopologyError(
        f"the process of LOCAL_RANK {launch.local_rank} takes the GPU of that number, and sees {num_gpus} in all\n"
        "  LOCAL_RANK set by the launcher; CUDA_VISIBLE_DEVICES, or Slurm's --gpus-per-task and --gpu-bind, may hide "
        "the others\n"
        "  start as many processes on a host as it has GPUs, and let each see all of them (--gpus-per-node)"
    )
    error.is_of_one_rank = True  # The first one of the host has a GPU, and waits for this one.
    raise error


def _complete_environment_of_one_process() -> None:
    """DeepSpeed reads these variables itself; without a launcher they name this one process on a free port."""
    port = str(free_port())
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of handing it back to Linux, which clears every page again.

    A step frees and takes the same large tensors over and over: 9 % of the quickstart's step (docs/log.md).
    """
    mmap_threshold, trim_threshold = -3, -1  # names of mallopt(3), and the largest threshold that glibc takes
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl and macOS have none
        mallopt(mmap_threshold, 32 * 1024 * 1024)
        mallopt(trim_threshold, 1024 * 1024 * 1024)


def _join(backend: str, timeout_minutes: float) -> None:
    """Initialise torch.distributed through DeepSpeed, without the compiler that DeepSpeed's CPU path asks for."""
    import deepspeed
    import deepspeed.ops

    # On CPUs init_distributed builds the op deepspeed_shm_comm with g++ and ninja (40 s, or a failure). The op serves
    # inference_all_reduce alone, which training never calls. DeepSpeed 0.19 asks a table for what can be built, and
    # fills it at the first question by trying the compiler for every op; a table that is there already is taken.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(minutes=timeout_minutes)
    )
