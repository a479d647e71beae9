"""The parts of the launch scripts that decide something, without what they would start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.errors import LossSpikeError
from tests.support.tiny_run import MODEL_FLAGS, TRAINING_FLAGS

ROOT = Path(__file__).resolve().parents[2]


class Cluster:
    """Slurm as far as a job's script sees it: srun ends with the code of the test, scontrol keeps what is queued."""

    def __init__(self, folder: Path) -> None:
        self.save = folder / "save"
        self._queued = folder / "queued"
        self._programs = folder / "bin"
        self._programs.mkdir()
        self.started = folder / "started"
        self._program("srun", f'echo "$@" >"{self.started}"; exit "$CODE"')
        self._program("scontrol", f'if [ "$1" = requeue ]; then echo "$2" >>"{self._queued}"; else echo localhost; fi')

    def _program(self, name: str, body: str) -> None:
        path = self._programs / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def latest(self, step: int) -> None:
        """A checkpoint is published."""
        self.save.mkdir(exist_ok=True)
        (self.save / "latest").write_text(f"global_step{step}")

    def hang(self, seconds_from_now: float) -> None:
        """A watchdog writes stacks."""
        stacks = self.save / "hangs" / "step6" / "rank_0.txt"
        stacks.parent.mkdir(parents=True, exist_ok=True)
        stacks.touch()
        os.utime(stacks, (time.time() + seconds_from_now,) * 2)

    def ends(self, code: int, *, job: int = 17, saves: bool = True, restarts: int = 0) -> tuple[bool, str]:
        """Let the job end with a code: whether it is queued again, and what the script says."""
        before = self._queued.read_text() if self._queued.exists() else ""
        flags = [*MODEL_FLAGS, *TRAINING_FLAGS, "--data-path", "corpus", *(("--save", str(self.save)) if saves else ())]
        ended = subprocess.run(
            ["bash", str(ROOT / "launch/slurm/bloom.slurm"), *flags],
            env={
                **os.environ,
                "PATH": f"{self._programs}:{os.environ['PATH']}",
                "MEGALM_PYTHON": sys.executable,
                "SLURM_SUBMIT_DIR": str(ROOT),
                "SLURM_JOB_ID": str(job),
                "SLURM_JOB_NODELIST": "localhost",
                "SLURM_RESTART_COUNT": str(restarts),
                "CODE": str(code),
            },
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        queued = self._queued.read_text() if self._queued.exists() else ""
        assert queued in (before, f"{before}{job}\n")
        return queued != before, ended.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_run_that_went_back_before_a_spike_is_queued_again(cluster: Cluster) -> None:
    assert cluster.ends(LossSpikeError.exit_code)[0]


@pytest.mark.parametrize("cores, share", [(192, 24), (12, 1), (4, 1), (None, 1)])
def test_tasks_share_the_cores_of_their_host(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, cores: int | None, share: int
) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if cores is not None:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(cores))
    cluster.ends(0)
    words = cluster.started.read_text().split()
    assert f"--cpus-per-task={share}" in words
    assert words[words.index("bash") :][:3] == ["bash", "launch/slurm/task.sh", "pretrain_gpt.py"]


def test_a_third_hang_at_one_checkpoint_is_the_last_and_a_new_job_counts_anew(cluster: Cluster) -> None:
    cluster.latest(120)
    assert cluster.ends(8)[0]
    again, said = cluster.ends(8)
    assert again
    assert "hang 2 of at most 3 at global_step120" in said
    assert cluster.ends(75)[0]  # The time limit between them is no progress.
    again, said = cluster.ends(8)
    assert not again
    assert "job 17 hung 3 times at global_step120 and is not queued again" in said
    assert f"{cluster.save}/hangs say which ranks" in said
    assert (cluster.save / "hangs" / "job_17").read_text() == "global_step120 3\n"
    assert cluster.ends(8, job=18)[0]


def test_a_job_that_saves_between_its_hangs_is_queued_for_ever(cluster: Cluster) -> None:
    for step in (0, 10, 20, 30, 40):
        if step:
            cluster.latest(step)
        assert cluster.ends(8)[0]


def test_a_stopped_process_that_was_killed_is_part_of_a_hang_by_its_stacks(cluster: Cluster) -> None:
    assert not cluster.ends(137)[0]
    cluster.hang(-60.0)  # In an earlier start.
    assert not cluster.ends(137)[0]
    cluster.hang(60.0)
    assert [cluster.ends(137)[0] for _ in range(3)] == [True, True, False]


def test_without_a_folder_the_restarts_of_the_job_count(cluster: Cluster) -> None:
    assert [cluster.ends(8, saves=False, restarts=restarts)[0] for restarts in (1, 2)] == [True, False]


@pytest.mark.parametrize("code", [0, 1, 5, 139])
def test_other_ends_are_ends(cluster: Cluster, code: int) -> None:
    cluster.hang(60.0)
    assert not cluster.ends(code)[0]
