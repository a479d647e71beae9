"""Two hosts on one machine: network namespaces joined by a bridge, with an sshd in each.

Nothing outside is touched: the bridge lies in a namespace of its own, keys and configuration in a temporary folder,
and everything started is stopped by its process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = {
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
}
SUBNET = "10.77.0"
INTERFACE = "eth0"
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin"])
DENY_SERVICES = Path("/usr/sbin/policy-rc.d")


class Unavailable(Exception):
    """This machine cannot make hosts; the message says why."""


def find(program: str) -> str | None:
    """Path of a program, also where an ordinary user's PATH has no sbin."""
    return shutil.which(program, path=SEARCH_PATH)


def install_programs() -> None:
    """Install what is missing with apt, without letting it start an sshd of its own.

    Raises: Unavailable if something is missing and cannot be installed.
    """
    missing = sorted({package for program, package in PACKAGES.items() if find(program) is None})
    if not missing:
        return
    if os.geteuid() != 0 or find("apt-get") is None:
        raise Unavailable(f"{', '.join(missing)} not installed, and only root can install with apt-get")
    deny = not DENY_SERVICES.exists()
    if deny:
        DENY_SERVICES.write_text("#!/bin/sh\nexit 101\n")
        DENY_SERVICES.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", *missing]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise Unavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    finally:
        if deny:
            DENY_SERVICES.unlink()


@dataclass
class Hosts:
    """Namespaces that exist between `__enter__` and `__exit__`; host i has the address SUBNET.(i+1)."""

    folder: Path
    num_hosts: int = 2
    _sshds: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _namespaces: list[str] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """One address a host."""
        return [f"{SUBNET}.{i + 1}" for i in range(self.num_hosts)]

    @property
    def ssh_options(self) -> str:
        """What ssh needs to reach the hosts; for PDSH_SSH_ARGS_APPEND."""
        return (
            f"-F /dev/null -i {self.folder}/key -o IdentitiesOnly=yes -o BatchMode=yes "
            f"-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        )

    def command_on(self, host: int, command: list[str]) -> list[str]:
        """The command that runs `command` on a host."""
        return [_program("ip"), "netns", "exec", self._namespaces[host], *command]

    def __enter__(self) -> Hosts:
        """Make the namespaces and start the sshds. Raises: Unavailable, with everything taken down again."""
        try:
            self._make_network()
            self._make_keys()
            for host in range(self.num_hosts):
                self._start_sshd(host)
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        """Stop what runs in the namespaces, by process id, and remove them."""
        for sshd in self._sshds:
            sshd.terminate()
        for sshd in self._sshds:
            sshd.wait(10)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if pids := self.processes():
                _signal_all(pids, number)
                time.sleep(1.0)
        for name in self._namespaces:
            subprocess.run([_program("ip"), "netns", "delete", name], capture_output=True)
        self._namespaces.clear()
        self._sshds.clear()

    def processes(self) -> list[int]:
        """Ids of the processes in the namespaces: ours alone, since nobody else knows these names."""
        pids: list[int] = []
        for name in self._namespaces:
            listed = subprocess.run([_program("ip"), "netns", "pids", name], capture_output=True, text=True)
            pids += [int(line) for line in listed.stdout.split()]
        return pids

    def _make_network(self) -> None:
        if os.geteuid() != 0:
            raise Unavailable("network namespaces need root")
        names = [f"megalm-{os.getpid()}-{i}" for i in range(self.num_hosts)]
        switch = f"megalm-{os.getpid()}-switch"
        for name in [*names, switch]:
            _ip("netns", "add", name)
            self._namespaces.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for name, address in zip(names, self.addresses, strict=True):
            port = f"port{address.rpartition('.')[2]}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")

    def _make_keys(self) -> None:
        for name in ("key", "host_key"):
            command = [_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        authorized = self.folder / "authorized_keys"
        authorized.write_text((self.folder / "key.pub").read_text())
        authorized.chmod(0o600)

    def _start_sshd(self, host: int) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation wants it
        config = self.folder / f"sshd_config{host}"
        config.write_text(
            f"ListenAddress {self.addresses[host]}:22\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\n"
        )
        log = self.folder / f"sshd{host}.log"
        command = [_program("sshd"), "-D", "-f", str(config), "-E", str(log)]
        sshd = subprocess.Popen(self.command_on(host, command), stdin=subprocess.DEVNULL)
        self._sshds.append(sshd)
        check = [_program("ssh"), *self.ssh_options.split(), f"root@{self.addresses[host]}", "true"]
        deadline = time.monotonic() + 15
        while subprocess.run(self.command_on(host, check), capture_output=True).returncode != 0:
            if sshd.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"the sshd of host {host} does not answer: {log.read_text()[-500:]}")
            time.sleep(0.2)


def _program(name: str) -> str:
    path = find(name)
    if path is None:
        raise Unavailable(f"{name} is not installed")
    return path


def _ip(*arguments: str) -> None:
    done = subprocess.run([_program("ip"), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"network namespaces are not permitted here: ip {' '.join(arguments)}: {done.stderr.strip()}")


def _signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
