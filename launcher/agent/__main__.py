"""`python -P -m launcher.agent RUN --node NAME`: holds this node's ranks for the controller.

With `--detach` it reads its keys from standard input, leaves for the background, and says on standard output which process it is;
an agent that is there already is named instead. `--step` does the same and stays in the foreground, for a step of Slurm's. With
`--join` it finds a controller that knows nothing of it, by a key file.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import msgspec

from launcher.agent.agent import Agent
from launcher.agent.place import Place
from midwatch.recipe import RecipeError, load_recipe
from midwatch.run_directory import PRIVATE_FILE, RunPaths, runtime_directory
from midwatch.signals import ignore_stray
from midwatch.transport.addresses import NetworkError
from midwatch.transport.node_join import NodeJoin, await_controller, read_key_file
from midwatch.transport.tls_identity import KeysError, TlsIdentity, store_identity
from shards.common.terminal import Parser, log_to_stderr, write_error, write_out

log = logging.getLogger("launcher.agent")


def main() -> int:
    ignore_stray()  # before anything is started: ranks and what forks them inherit it
    parser = Parser(prog="midwatch-agent", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--node", required=True)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--join", default="")
    parser.add_argument("--key-file", type=Path)
    arguments = parser.parse_args()
    paths, node = RunPaths(arguments.run), arguments.node
    log_file = paths.logs / node / "agent.log"
    try:
        keys: TlsIdentity | None = None
        joining: NodeJoin | None = None
        if arguments.join:
            key = read_key_file(arguments.key_file)
            keys = key.identity
            joining = NodeJoin(arguments.join, key.run_key)
        elif arguments.detach or arguments.step:
            keys = TlsIdentity.decode(sys.stdin.buffer.readline())
        recipe = load_recipe(paths.recipe)
        place = Place(paths, node)
        if not place.take():
            holder = place.holder()
            words = msgspec.json.encode(holder).decode() if holder is not None else "another agent is still starting"
            write_out(words, flush=True)
            return 0
        identity = _keep(keys, place) if keys is not None else None  # the agent before this one has deleted its own by now
        if arguments.detach:
            _leave_for_the_background(log_file, place)
        elif arguments.step:
            write_out(place.sign(), flush=True)
            _write_to(log_file)
        else:
            place.sign()
        log_to_stderr("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        if joining is not None and identity is not None:
            await_controller(joining, paths, identity)
        agent = Agent(paths, node, recipe, identity, joining, leaves=lambda: place.sign(leaving=True))
    except (RecipeError, KeysError, NetworkError, OSError, ValueError) as error:
        write_error(error)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.leave_when_told() if arguments.step else agent.leave())
    return agent.run()


def _keep(identity: TlsIdentity, place: Place) -> Path:
    """Puts the keys into a file that only this user reads. Raises KeysError."""
    file = runtime_directory() / f"{place.name}.identity"
    store_identity(identity, file)
    return file


def _leave_for_the_background(log_file: Path, place: Place) -> None:
    """Goes on in a child of its own session; the parent says which, and ends."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        said = os.read(read, 1000)
        write_out(said.decode(errors="replace"), flush=True)
        os._exit(0 if said else 1)
    os.close(read)
    os.setsid()
    os.write(write, place.sign().encode())
    os.close(write)
    _write_to(log_file)


def _write_to(log_file: Path) -> None:
    """Everything said from now on goes there."""
    log_file.parent.mkdir(exist_ok=True)
    out = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE_FILE)
    null = os.open(os.devnull, os.O_RDONLY)
    for handle, number in ((null, 0), (out, 1), (out, 2)):
        os.dup2(handle, number)
    os.chdir("/")


if __name__ == "__main__":
    sys.exit(main())
