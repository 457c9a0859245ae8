"""Long documents are made of like ones, never of copies, and tasks need every note from end to end."""

from __future__ import annotations

import re

import pytest

from shards.filters.long_documents import FAMILIES, Family, join_conversations, join_related, make_tasks

pytest.importorskip("rensa", reason="rensa is not installed (make setup)")


def topics() -> list[str]:
    from pydoc_data.topics import topics as texts

    return [texts[name] for name in sorted(texts)]


def subject(kind: str, number: int) -> str:
    said = {
        "sea": "the ship left the harbour before the storm and the crew lashed the sails to the mast",
        "bread": "the baker kneads the dough at night and lets it rise near the oven until the morning",
    }[kind]
    return f"{said} number{number} " + " ".join(f"{kind}{number}word{i}" for i in range(12)) + f" and {said}"


def test_related_documents_come_together_and_others_do_not() -> None:
    texts = [subject("sea" if number % 2 else "bread", number) for number in range(12)]
    made = list(join_related(texts, target=3 * len(texts[0])))
    assert len(made) >= 2
    for long in made:
        assert len({part % 2 for part in long.parts}) == 1
        assert long.label == "related"
        assert long.text == "\n\n".join(texts[part] for part in long.parts)
        assert len(long.text) >= 3 * len(texts[0])


def test_no_document_is_used_twice_and_near_duplicates_never_meet() -> None:
    texts = [subject("sea", number) for number in range(8)]
    made = list(join_related([*texts, *texts], target=3 * len(texts[0])))
    used = [part for long in made for part in long.parts]
    assert len(used) == len(set(used))
    for long in made:
        assert len({part % 8 for part in long.parts}) == len(long.parts)


def test_real_documents_reach_the_target_or_are_left() -> None:
    made = list(join_related(topics(), target=40_000))
    assert made and all(len(long.text) >= 40_000 for long in made)
    assert made == list(join_related(topics(), target=40_000))


def test_conversations_are_joined_whole_and_in_turn() -> None:
    conversations = [[("user", subject("sea", n)), ("assistant", f"aye {n} " + subject("sea", n + 50))] for n in range(6)]
    made = list(join_conversations(conversations, target=2 * len(subject("sea", 1)) * 2 + 1))
    assert made
    for long in made:
        assert long.label == "conversation"
        assert len(long.parts) > 1
        assert long.messages == tuple(message for part in long.parts for message in conversations[part])


def solve(family: Family, text: str) -> str:
    """The answer worked out from the notes in the text, as a reader would."""
    if family == "ledger":
        changes = re.findall(r"\(Ledger: .*? (begins with|pays out|takes in) (\d+) crowns\.\)", text)
        return str(sum(-int(amount) if verb == "pays out" else int(amount) for verb, amount in changes))
    if family == "relay":
        after = dict(re.findall(r"\(Relay: (\w+) runs before (\w+)\.\)", text))
        asked = re.search(r"after (\w+) has begun", text)
        assert asked is not None
        runner = asked.group(1)
        while runner in after:
            runner = after[runner]
        return runner
    begun = re.search(r"\(Harbour rule: .*? is (\d+)\.\)", text)
    assert begun is not None
    value = int(begun.group(1))
    for verb, step in re.findall(r"\(Amendment: .*? is (doubled|raised|lowered)(?: by (\d+))?\.\)", text):
        value = value * 2 if verb == "doubled" else value + int(step) * (1 if verb == "raised" else -1)
    return str(value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tasks_answer_follows_from_its_notes_and_from_no_fewer(family: Family) -> None:
    made = list(make_tasks(topics(), target=15_000, count=6, seed=3, families=[family]))
    assert len(made) == 6
    needed = 0
    for task in made:
        assert task.label == f"task-{family}"
        assert task.text.endswith(f"{task.question}\n\n{task.answer}")
        assert solve(family, task.text) == task.answer.removeprefix("Answer: ")
        notes = [match.span() for match in re.finditer(r"\((?:Ledger|Relay|Harbour rule|Amendment): .*?\.\)", task.text)]
        assert len(notes) == 6
        assert notes[-1][0] - notes[0][0] > len(task.text) / 3
        middle = task.text[: notes[3][0]] + task.text[notes[3][1] :]
        needed += solve(family, middle) != task.answer.removeprefix("Answer: ")
    assert needed == 6 or (family == "amendments" and needed >= 5)


def test_tasks_are_a_pure_function_of_the_seed_and_use_each_text_once() -> None:
    first, again, other = (list(make_tasks(topics(), target=15_000, count=9, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    used = [part for task in first for part in task.parts]
    assert len(used) == len(set(used))


def test_texts_that_do_not_suffice_make_fewer_tasks() -> None:
    assert list(make_tasks(["too short"], target=1000, count=3, seed=0)) == []
    assert len(list(make_tasks(topics(), target=300_000, count=9, seed=0))) <= 1
