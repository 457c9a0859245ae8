"""The ssh backend: an agent on each host, started by the operator's own ssh and left running when ssh ends.

What an agent must keep to itself, its key, goes to it over ssh's standard input. An agent that is there already is found again, so
starting twice is harmless.
"""

from __future__ import annotations

from launcher.backends.base import FIRST_SECONDS, Started, StartError, started
from midwatch.journal import entries as j
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths
from midwatch.transport.ssh import Ssh, SshError, remote_command
from midwatch.transport.tls_identity import RunKeys

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
