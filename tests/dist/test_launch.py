"""The launch scripts: same training under both launchers, no compiler, signals and exit codes passed on."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import time
from pathlib import Path

import pytest

from megalm.topology.ports import free_port
from tests.support.launching import ROOT, environment, finish, losses, processes_of_session, program, run, script, start
from tests.support.tiny_run import write_corpus

pytestmark = [pytest.mark.dist, pytest.mark.slow]

LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
COMPILERS = (
    "cc",
    "c++",
    "gcc",
    "g++",
    "clang",
    "clang++",
    "nvcc",
    "hipcc",
    "icx",
    "ninja",
    "make",
    "cmake",
    "ld",
    "as",
)
# What the scripts themselves call, and no more.
PROGRAMS = ("bash", "env", "dirname", "cat", "grep", "mktemp", "rm", "sed", "uname", "sleep", "setsid")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Losses of the run under torchrun."""
    save = tmp_path_factory.mktemp("torchrun")
    command = script("torchrun.sh", "--nproc-per-node", "4")
    ended = run([*command, *program("--data-path", corpus, "--save", str(save), *LAYOUT)])
    assert ended.code == 0, ended.output
    return losses(save)


def path_without_compilers(folder: Path) -> str:
    """A PATH of one folder with links to the programs that the scripts call."""
    folder.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    return str(folder)


def test_training_under_deepspeed_needs_no_compiler_and_equals_torchrun(
    corpus: str, reference: list[str], tmp_path: Path
) -> None:
    path = path_without_compilers(tmp_path / "bin")
    assert [name for name in COMPILERS if shutil.which(name, path=path)] == []
    extensions = tmp_path / "extensions"  # where torch would leave or find compiled operators
    command = script("deepspeed.sh", "--num_gpus", "4")
    ended = run(
        [str(Path(path, "bash")), *command[1:], *program("--data-path", corpus, "--save", str(tmp_path), *LAYOUT)],
        extra={"PATH": path, "TORCH_EXTENSIONS_DIR": str(extensions), "CC": "", "CXX": "", "CUDA_HOME": ""},
    )
    assert ended.code == 0, ended.output
    assert losses(tmp_path) == reference
    assert not extensions.exists() or not any(path.suffix == ".so" for path in extensions.rglob("*"))


def test_four_processes_reach_the_first_step_within_forty_seconds_of_cpu_time(corpus: str, tmp_path: Path) -> None:
    command = script("deepspeed.sh", "--num_gpus", "4")
    flags = program("--data-path", corpus, "--exit-interval", "1", *LAYOUT)
    ended = run([*command, *flags])
    assert ended.code == 75, ended.output
    # 20 s on two cores. Processor time, since the wall clock of a test machine counts its other work too.
    assert ended.cpu_seconds <= 40


def test_a_signal_to_the_script_saves_once_and_leaves_no_process(corpus: str, tmp_path: Path) -> None:
    layout = ["--tensor-model-parallel-size", "2"]
    flags = program("--data-path", corpus, "--save", str(tmp_path), *layout, "training.train_iters=1_000_000")
    process = start([*script("deepspeed.sh", "--num_gpus", "2"), *flags])
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0):
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    ended = finish(process)
    assert ended.code == 75, ended.output
    assert (tmp_path / "latest").read_text().strip() == f"global_step{len(losses(tmp_path))}"
    assert processes_of_session(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_are_ranks_waits_for_them(number: int, tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    process = start([*script("deepspeed.sh", "--num_gpus", "2"), str(tmp_path / "sleeps.py")])
    while not _has_started_launcher(process.pid):  # Before it there is nothing to end but the script.
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # The launcher is still importing.
    os.kill(process.pid, number)
    ended = finish(process)
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert "a process was ended by signal TERM" in ended.output
    assert processes_of_session(process.pid) == []


def test_ctrl_c_at_a_terminal_reaches_ranks_alone_wherever_their_input_comes_from(tmp_path: Path) -> None:
    (tmp_path / "stops.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(75))\n"
        f"open(os.path.join({str(tmp_path)!r}, 'rank_' + os.environ['RANK']), 'w').close()\n"
        "time.sleep(600)\n"
    )
    command = [*script("deepspeed.sh", "--num_gpus", "2"), str(tmp_path / "stops.py")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(ROOT)
        os.execvpe(command[0], command, environment())
    for _ in range(1200):
        if len(list(tmp_path.glob("rank_*"))) == 2:
            break
        time.sleep(0.1)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


def _has_started_launcher(pid: int) -> bool:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        with contextlib.suppress(OSError):  # It has ended.
            if b"deepspeed.launcher.runner" in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
    return False


def test_a_configuration_that_cannot_be_obeyed_exits_with_its_code_and_one_paragraph(corpus: str) -> None:
    flags = program("--data-path", corpus, "--tensor-model-parallel-size", "3")
    ended = run([*script("deepspeed.sh", "--num_gpus", "3"), *flags])
    assert ended.code == 2, ended.output
    assert ended.output.count("ConfigError") == 1, ended.output
    assert "Traceback" not in ended.output


def test_a_hostfile_that_is_not_there_is_refused_and_not_replaced_by_this_host(tmp_path: Path) -> None:
    ended = run([*script("deepspeed.sh", "--hostfile", str(tmp_path / "hosts")), "pretrain_gpt.py", "--help"])
    assert ended.code == 2
    assert f"{tmp_path}/hosts: there is no such file" in ended.output


def test_a_slurm_task_joins_the_other_tasks(corpus: str, reference: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    flags = program("--data-path", corpus, "--save", str(tmp_path), *LAYOUT)
    tasks = [
        start(
            [*script("slurm/task.sh"), *flags],
            extra={
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": "4",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(4)
    ]
    ended = [finish(task) for task in tasks]
    assert [task.code for task in ended] == [0] * 4, "\n".join(task.output for task in ended)
    assert losses(tmp_path) == reference
