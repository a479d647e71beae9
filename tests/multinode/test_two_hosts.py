"""Training over two hosts gives the losses of one host, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multinode.hosts import INTERFACE, Hosts, Unavailable, install_programs
from tests.support.launching import losses, program, run, script
from tests.support.ranks import run_ranks
from tests.support.tiny_run import train_tiny, write_corpus

pytestmark = [pytest.mark.multinode, pytest.mark.dist, pytest.mark.slow]

LAYOUT = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, or a skip that says why there are none."""
    try:
        install_programs()
        folder = tmp_path / "hosts"
        folder.mkdir(mode=0o700)
        with Hosts(folder) as made:
            yield made
            left = made.processes()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert len(left) == made.num_hosts, f"more runs on the hosts than their sshds: {left}"


def test_tp2_pp2_over_two_hosts_has_the_losses_of_one_host(hosts: Hosts, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=2\n" for address in hosts.addresses))
    across, alone = tmp_path / "two_hosts", tmp_path / "one_host"

    options = ["--no_ssh_check", "--hostfile", str(hostfile), "--master_addr", hosts.addresses[0]]
    launch = script("deepspeed.sh", *options)
    ended = run(
        hosts.command_on(0, [*launch, *program("--data-path", corpus, "--save", str(across), *LAYOUT)]),
        extra={"PDSH_SSH_ARGS_APPEND": hosts.ssh_options, "GLOO_SOCKET_IFNAME": INTERFACE},
    )
    assert ended.code == 0, ended.output
    assert all(f"{address}: " in ended.output for address in hosts.addresses), ended.output

    run_ranks(train_tiny, 4, ["--data-path", corpus, "--save", str(alone), *LAYOUT])
    assert len(losses(alone)) == 20
    assert losses(across) == losses(alone)


def test_a_rank_that_fails_on_another_host_fails_the_launch(hosts: Hosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    options = ["--no_ssh_check", "--hostfile", str(hostfile), "--master_addr", hosts.addresses[0]]
    ended = run(
        hosts.command_on(
            0, [*script("deepspeed.sh", *options), *program("--data-path", str(tmp_path / "no_such_corpus"))]
        ),
        extra={"PDSH_SSH_ARGS_APPEND": hosts.ssh_options, "GLOO_SOCKET_IFNAME": INTERFACE},
    )
    assert ended.code == 3, ended.output
    for address in hosts.addresses:
        assert ended.output.count(f"{address}: DataError: no corpus at ") <= 1, ended.output
    assert "DataError: no corpus at " in ended.output
