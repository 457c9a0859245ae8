"""The ssh backend: an agent on each host, started by the operator's own ssh and left running when ssh ends.

What an agent must keep to itself, its key, goes to it over ssh's standard input. An agent that is there already is found again, so
starting twice is harmless.
"""

from __future__ import annotations

import msgspec

from launcher.backends import FIRST_SECONDS, Started, StartError
from midwatch.journal import journal as j
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths
from midwatch.transport.ssh import SILENT, Ssh, SshError, remote_command
from midwatch.transport.tls_identity import RunKeys
from shards.common.decoding import Count, DecodeError, json_as

START_SECONDS = 60.0


class SshBackend:
    """Agents on the recipe's hosts."""

    patience, lacking = FIRST_SECONDS, ""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._cluster = paths, cluster
        self._ssh = Ssh(cluster.ssh_options)
        self._hosts = cluster.host_names

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._hosts

    async def start(self, node: str) -> Started:
        identity = RunKeys.ensure(self._paths).issue("agent", node)
        words = ["-P", "-m", "launcher.agent", str(self._paths.root.resolve()), "--node", node, "--detach"]
        try:
            result = await self._ssh.run(node, remote_command(self._cluster, words), identity.encode() + b"\n", START_SECONDS)
        except SshError as error:
            raise StartError(f"{node}: {error}", out_of_reach=error.out_of_reach) from None
        return started(node, result.status, result.stdout, result.stderr)

    def alive(self, agent: j.AgentStarted) -> bool | None:
        return None


class _SshOutput(msgspec.Struct):
    pid: Count
    birth: str


def started(node: str, status: int, stdout: str, stderr: str) -> Started:
    """What `launcher.agent --detach` has said. Raises StartError where that is no agent."""
    for line in reversed(stdout.splitlines()):  # login scripts may have said something before
        try:
            said = json_as(line, _SshOutput)
        except DecodeError:
            continue
        return Started(said.pid, said.birth)
    words = [line.strip() for line in stderr.splitlines() if line.strip()]
    raise StartError(f"{node}: the agent does not start (status {status}): {words[-1] if words else SILENT}")
