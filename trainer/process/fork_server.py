"""Ranks without the seconds that `import torch` takes: one process a node imports everything once and forks them from itself.

It serves the agent through a socket of whole packets. For each order, a JSON object with a rank's arguments and environment, it
forks and answers with the child's number; of each child that ends it tells the status. It touches no GPU and starts no thread, so
that a child is as good as a process started anew. Where the code on disk is no longer the code it has read it says so and leaves,
and the agent starts another; when its agent or it itself dies, so do its children.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import selectors
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.common.linux import kill_with_parent, name_process

MOST_BYTES = 1 << 20
OURS = ("trainer", "midwatch", "shards")
NAME = "rank-forks"
"""What `top` and `ps -o comm` call it."""


def serve(handle: int, rank: Callable[[list[str]], int]) -> int:
    """Works until the other end of the socket is closed, or the code has changed.

    `rank` is called in each child, with its arguments, and gives its exit status.
    """
    agent = socket.socket(fileno=handle)
    name_process(NAME)
    import trainer.process.rank  # noqa: F401  # for what it imports

    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"):
        __import__(module)  # what ranks import late
    code = _code()
    gc.collect()
    gc.freeze()  # what is shared stays shared
    children: dict[int, int] = {}
    _tell(agent, {"ready": True})
    with selectors.DefaultSelector() as selector:
        selector.register(agent, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not agent:
                    selector.unregister(key.fileobj)
                    _tell(agent, _reap(children, key.fd))
                    continue
                order = agent.recv(MOST_BYTES)
                if not order:
                    return 0
                if _code() != code:
                    _tell(agent, {"stale": True})
                    return 0 if not children else _outlast(agent, children)
                pid = os.fork()
                if not pid:
                    _become(rank, json.loads(order), agent, selector, children)
                children[descriptor := os.pidfd_open(pid)] = pid
                selector.register(descriptor, selectors.EVENT_READ)
                _tell(agent, {"pid": pid})


def _outlast(agent: socket.socket, children: dict[int, int]) -> int:
    """Tells how the last children end; their death would follow from ours."""
    for descriptor in list(children):
        _tell(agent, _reap(children, descriptor))
    return 0


def _reap(children: dict[int, int], descriptor: int) -> dict[str, int]:
    pid = children.pop(descriptor)
    os.close(descriptor)
    _, status = os.waitpid(pid, 0)
    return {"ended": pid, "status": os.waitstatus_to_exitcode(status)}


def _become(
    rank: Callable[[list[str]], int],
    order: Mapping[str, Any],
    agent: socket.socket,
    selector: selectors.BaseSelector,
    children: Mapping[int, int],
) -> None:
    """In the child: a rank, which does not return."""
    status = 1
    try:
        kill_with_parent()
        os.setsid()
        selector.close()
        agent.close()
        for descriptor in children:
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv[1:] = order["arguments"]
        status = rank(order["arguments"])
    except BaseException:
        logging.getLogger("trainer").exception("this rank ends on an error:")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _code() -> dict[str, int]:
    """When each file of the code that has been read was last changed."""
    files = {
        str(m.__file__) for name, m in list(sys.modules.items()) if name.split(".")[0] in OURS and getattr(m, "__file__", None)
    }
    changed = {}
    for file in files:
        try:
            changed[file] = Path(file).stat().st_mtime_ns
        except OSError:
            changed[file] = 0
    return changed


def _tell(agent: socket.socket, what: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone, and the next look at its end of the socket will show it
        agent.send(json.dumps(what).encode())
