"""Many nodes with GPUs for the screen, of which some misbehave; the same each time."""

from __future__ import annotations

import numpy as np

from midwatch import protocol as p
from tests.tui.stage import NOW, replace, snapshot

GB = 10**9


def machines(nodes: int = 64, gpus: int = 8, shift: int = 0, wrong: bool = True) -> p.Snapshot:
    """A run on so many nodes, 16 a rack. `shift` changes the figures of the first node alone."""
    random = np.random.default_rng(5)
    busy = np.clip(random.normal(0.93, 0.04, (nodes, gpus)), 0, 1)
    heat = random.normal(61, 5, (nodes, gpus))
    own = random.normal(0.412, 0.006, (nodes, gpus))
    busy[0] = (busy[0] + 0.13 * shift) % 1
    views = [_node(number, busy[number], heat[number], own[number]) for number in range(nodes)]
    stragglers: tuple[p.Straggler, ...] = ()
    if wrong:
        stragglers = _spoil(views)
    return replace(
        snapshot(),
        run="big",
        nodes=tuple(views),
        world=nodes * gpus,
        stragglers=stragglers,
        step=1_180,
        events=(p.JournalLine(index=1, time=NOW - 40, term=1, kind="note", author="", text="rank 34 is slow", level="warning"),),
    )


def name_of(number: int) -> str:
    return f"r{number // 16 + 1}n{number % 16 + 1:02}"


def _node(number: int, busy: np.ndarray, heat: np.ndarray, own: np.ndarray) -> p.NodeView:
    count = len(busy)
    first = number * count
    gpus = tuple(
        p.Gpu(
            index=place,
            name="NVIDIA H100 80GB HBM3",
            utilisation=round(float(busy[place]), 3),
            memory_used=int((58 + place) * GB),
            memory_total=80 * GB,
            temperature=round(float(heat[place])),
            power=round(380 + 300 * float(busy[place]), 1),
            power_limit=700.0,
            slowdown=90.0,
            clock=1_755,
            clock_most=1_980,
            sm=round(float(busy[place]) * 0.9, 3),
            tensor=round(float(busy[place]) * 0.4, 3),
            links=(18, 18),
            bus=f"0000:{place + 24:02X}:00.0",
            processes=(p.GpuProcess(4_000 + place, (58 + place) * GB, number * count + place),),
        )
        for place in range(count)
    )
    return p.NodeView(
        name=name_of(number),
        state="up",
        ranks=count,
        first_rank=number * count,
        stats=p.NodeStats(
            node=name_of(number),
            time=NOW,
            cpus=(0.3,) * 8,
            memory_used=200 * GB,
            memory_total=1_000 * GB,
            gpus=gpus,
            disk_free=900 * GB,
            generation=2,
            ranks=tuple(p.RankBeat(first + at, 4_000 + at, 1_180, NOW - 0.3, "training", float(own[at])) for at in range(count)),
        ),
    )


def _spoil(views: list[p.NodeView]) -> tuple[p.Straggler, ...]:
    """Faults of every kind, as far as there are nodes for them."""

    def spoil(number: int, place: int, **changes: object) -> None:
        if number < len(views):
            stats = views[number].stats
            assert stats is not None
            gpus = list(stats.gpus)
            gpus[place] = replace(gpus[place], **changes)
            views[number] = replace(views[number], stats=replace(stats, gpus=tuple(gpus)))

    nothing = dict.fromkeys(("utilisation", "memory_used", "temperature", "power", "sm", "tensor", "clock"))
    lost = p.Fault("lost", "it is lost: it has fallen off the bus", NOW - 95)
    spoil(3, 5, **nothing, faults=(lost,), processes=())
    spoil(9, 2, faults=(p.Fault("xid", "XID 79: it has fallen off the bus", NOW - 190),))
    spoil(12, 0, faults=(p.Fault("ecc", "2 uncorrected ECC errors since the driver was loaded", NOW - 4000),))
    spoil(20, 7, temperature=91.0, faults=(p.Fault("throttle", "slowed down by heat", NOW - 12),))
    spoil(33, 1, faults=(p.Fault("nvlink", "NVLink 3: 40 replays, 2 recoveries in 10 minutes", NOW - 30),), links=(17, 18))
    spoil(40, 4, stale=NOW - 25)
    spoil(41, 6, power=None)
    states = ((50, "gone", "the agent of r4n03 died"), (51, "out of reach", ""), (52, "drained", "by anna"),
              (53, "quarantined", "failed 3 times, the last time: XID 79"), (54, "spare", ""))  # fmt: skip
    for number, state, note in states:
        if number < len(views):
            idle = 0 if state in ("spare", "drained", "quarantined") else views[number].ranks
            failures = 3 if state == "quarantined" else 0
            views[number] = replace(views[number], state=state, note=note, ranks=idle, failures=failures)
    return (p.Straggler(34, name_of(4), 0.689, 0.412, NOW - 41),)
