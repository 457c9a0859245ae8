"""A hang is told from slowness by what ranks have taken before, each phase on its own."""

from __future__ import annotations

from launcher.agent.hangs import Hang, HangWatch
from midwatch.protocol import RankBeat


class Ranks:
    """Two ranks that move when told to, and a clock."""

    def __init__(self, floor: float = 2.0, first: float = 100.0) -> None:
        self.now = 0.0
        self.watch = HangWatch(floor, first, clock=lambda: self.now)
        self.beats = {rank: RankBeat(rank, 100 + rank, 0, 0.0, "loading") for rank in (0, 1)}

    def move(self, phase: str, seconds: float, *ranks: int) -> Hang | None:
        self.now += seconds
        for rank in ranks or (0, 1):
            self.beats[rank] = RankBeat(rank, 100 + rank, self.beats[rank].step + 1, self.now, phase)
        return self.look()

    def look(self, seconds: float = 0.0, generation: int = 1) -> Hang | None:
        self.now += seconds
        return self.watch.see(generation, list(self.beats.values()))


def test_a_step_that_takes_five_times_the_longest_is_a_hang_and_names_the_ranks() -> None:
    ranks = Ranks()
    for _ in range(20):
        assert ranks.move("training", 1.0) is None
    assert ranks.look(4.9) is None
    hang = ranks.look(0.2)
    assert hang is not None and (hang.phase, hang.ranks, round(hang.limit)) == ("training", (0, 1), 5)
    assert ranks.move("training", 0.1) is None, "they move again"


def test_only_the_rank_that_stands_still_is_named() -> None:
    ranks = Ranks()
    for _ in range(20):
        ranks.move("training", 0.1)
    for _ in range(30):
        hang = ranks.move("training", 0.1, 1)
    assert hang is not None and hang.ranks == (0,)


def test_one_mishap_does_not_stretch_the_limit() -> None:
    ranks = Ranks()
    for _ in range(20):
        ranks.move("training", 1.0)
    ranks.move("training", 4.0)
    assert ranks.watch.limit("training") == 20.0, "both ranks stood still for it, once"
    for _ in range(200):
        ranks.move("training", 1.0)
    assert ranks.watch.limit("training") == 5.0, "and in time it is forgotten"


def test_a_phase_not_known_yet_has_time_and_each_has_its_own_limit() -> None:
    ranks = Ranks()
    for _ in range(20):
        ranks.move("training", 0.1)
    ranks.move("saving", 0.1)
    assert ranks.look(99.0) is None
    hang = ranks.look(2.0)
    assert hang is not None and (hang.phase, hang.limit) == ("saving", 100.0)
    assert ranks.watch.limit("training") == 2.0, "the floor"


def test_a_new_generation_begins_anew_and_remembers_what_was_learned() -> None:
    ranks = Ranks()
    for _ in range(20):
        ranks.move("training", 1.0)
    assert ranks.look(60.0) is not None
    assert ranks.look(0.0, generation=2) is None
    assert ranks.look(4.0, generation=2) is None
    assert ranks.look(2.0, generation=2) is not None


def test_quick_steps_are_known_after_one_look() -> None:
    ranks = Ranks()
    ranks.move("training", 1.0)
    assert ranks.watch.limit("training") == 100.0, "nothing known"
    for rank in (0, 1):
        ranks.beats[rank] = RankBeat(rank, 100 + rank, 41, 2.0, "training")
    ranks.look(1.0)
    assert ranks.watch.limit("training") == 5.0, "forty steps in one second"
