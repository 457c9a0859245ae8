"""Personal data: planted values are found in real text, and what only looks like them is left alone."""

from __future__ import annotations

import random
import re
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SpecError
from shards.filters import check_digits
from shards.filters.pii import Finder, Finding
from shards.filters.settings import Pii

pytest.importorskip("phonenumbers", reason="phonenumbers is not installed (make setup)")
FINDER = Finder(Pii())


def kinds(text: str) -> list[tuple[str, str]]:
    return [(found.kind, text[found.start : found.end]) for found in FINDER.find(text)]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("email", "jane.doe+news@mail.example-site.co.uk"),
        ("email", "josé@müller.de"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "(212) 555-0143"),
        ("phone", "+49 (30) 901820"),
        ("phone", "+91-98765-43210"),
        ("ip", "81.2.69.142"),
        ("ip", "2a00:1450:4009:80b::200e"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5500-0055-5555-5559"),
        ("card", "378282246310005"),
        ("card", "6011000990139424"),
        ("card", "3530111333300000"),
        ("iban", "GB82 WEST 1234 5698 7654 32"),
        ("iban", "DE89370400440532013000"),
        ("iban", "FR14 2004 1010 0505 0001 3M02 606"),
        ("national_id", "536-90-4399"),
        ("national_id", "AB 12 34 56 C"),
        ("national_id", "86 095 742 719"),
        ("national_id", "1 85 05 78 006 084 91"),
        ("national_id", "185052A00608435"),
        ("national_id", "12345678Z"),
        ("national_id", "X1234567L"),
        ("national_id", "RSSMRA85T10A562S"),
        ("national_id", "111.444.777-35"),
        ("national_id", "2341 2341 2346"),
    ],
)
@pytest.mark.parametrize("around", ["It is {}, as said.", "({})", "x: {}\nnext", "{}"])
def test_each_kind_is_found_whole(kind: str, value: str, around: str) -> None:
    assert kinds(around.format(value)) == [(kind, value)]


@pytest.mark.parametrize(
    "text",
    [
        "import @decorator and user@localhost, git@github.com:a/b.git, a @ b.c",
        "127.0.0.1 10.1.2.3 192.168.0.1 192.0.2.7 198.51.100.3 203.0.113.9 255.255.255.255 ::1 fe80::1 2001:db8::5",
        "version 4.5.6.7, x[1::2], 12:30:45, std::ios::in, ab::cd, 2000::/3, a::b::c",
        "2024-01-02 10:11:12, 01/02/2024, 1999-2024, ISBN 978-0-13-468599-1, 20240102",
        "4111 1111 1111 1112, 1234 5678 9012 3456, 0x4111111111111111",
        "GB82 WEST 1234 5698 7654 33, XX82 WEST 1234 5698 7654 32",
        "000-12-3456, 666-12-3456, 900-12-3456, 078-05-1120, 12-345-6789",
        "12345678A, X1234567A, RSSMRA85T10A562T, 111.444.777-36, 2341 2341 2347, 1 85 05 78 006 084 92",
        "86095742719 and 2025550143 are numbers that nothing near explains",
        "3.14159265358979 2.71828182845905 1e-10 100,000,000 0.0001 5 000 000",
        "sha 0123456789abcdef0123456789abcdef, id 550e8400-e29b-41d4-a716-446655440000",
    ],
)
def test_what_only_looks_like_it_is_left(text: str) -> None:
    assert kinds(text) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Steuer-IdNr. 86095742719", "national_id"),
        ("CPF: 11144477735", "national_id"),
        ("Aadhaar no. 234123412346", "national_id"),
        ("her SSN is 536904399", "national_id"),
        ("Tel. 2125550143", "phone"),
    ],
)
def test_bare_digits_need_a_word_that_explains_them(text: str, kind: str) -> None:
    assert [found for found, _ in kinds(text)] == [kind]
    assert kinds(re.sub(r"[A-Za-z].*[a-zA-Z.:] ", "", text)) == []


def test_redacting_leaves_placeholders_and_tells_counts() -> None:
    text = "Ask a@b.org or c@d.net (81.2.69.142)."
    assert FINDER.apply(text) == ("Ask <EMAIL> or <EMAIL> (<IP>).", {"email": 2, "ip": 1}, "")


def test_dropping_gives_the_text_back_with_the_most_frequent_kind_as_reason() -> None:
    text = "Ask a@b.org or c@d.net (81.2.69.142)."
    assert Finder(Pii(mode="drop")).apply(text) == (text, {"email": 2, "ip": 1}, "pii: email")
    assert Finder(Pii(mode="drop", drop_at=4)).apply(text) == (text, {"email": 2, "ip": 1}, "")


def test_only_the_kinds_asked_for_are_looked_for() -> None:
    assert Finder(Pii(kinds=("ip",))).apply("a@b.org 81.2.69.142")[0] == "a@b.org <IP>"


def test_a_model_of_names_that_is_not_there_is_an_error_that_says_how_to_get_it() -> None:
    with pytest.raises(SpecError, match=r"spacy.*pip install|no model \"xx_no_such\""):
        Finder(Pii(names="xx_no_such"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [(Pii(kinds=("emails",)), 'kinds has "emails"'), (Pii(region="usa"), 'region is "usa"'), (Pii(drop_at=0), "drop_at is 0")],
)
def test_settings_that_cannot_work_are_refused(settings: Pii, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        settings.check("recipe.toml: data.pii")


def planted(draw: random.Random) -> tuple[str, str]:
    def digits(count: int) -> str:
        return "".join(draw.choice("0123456789") for _ in range(count))

    def completed(head: str, check: object) -> str:
        return next(head + last for last in "0123456789" if check(head + last))  # type: ignore[operator]

    kind = draw.choice(["email", "phone", "ip", "card", "iban", "national_id"])
    if kind == "email":
        person, domain = draw.choice(["ann", "b.smith", "x_9", "li-wei"]), draw.choice(["mail.org", "post.co.uk"])
        return kind, f"{person}{digits(2)}@{domain}"
    if kind == "phone":
        return kind, draw.choice([f"+1 212-{draw.randint(200, 999)}-{digits(4)}", f"+44 20 7{digits(3)} {digits(4)}"])
    if kind == "ip":
        return kind, f"{draw.choice([8, 23, 81, 151])}.{draw.randint(0, 255)}.{draw.randint(0, 255)}.{draw.randint(1, 254)}"
    if kind == "card":
        number = completed("4" + digits(14), check_digits.luhn)
        return kind, draw.choice([number, " ".join(number[place : place + 4] for place in range(0, 16, 4))])
    if kind == "iban":
        account = digits(18)
        return kind, f"DE{98 - int(account + '131400') % 97:02}{account}"
    return kind, f"{draw.randint(1, 665):03}-{draw.randint(1, 99):02}-{draw.randint(1, 9999):04}"


def real_text() -> str:
    """Prose without numbers of its own."""
    from pydoc_data.topics import topics

    return "\n".join(re.sub(r"[0-9@]|::", "x", topics[name]) for name in sorted(topics))


def test_recall_and_precision_on_values_planted_in_real_text() -> None:
    draw = random.Random(6)
    pieces = re.split(r"(?<=[a-z]) (?=[a-z])", real_text())
    truth: list[Finding] = []
    text = ""
    for place in range(0, 40_000, 40):
        kind, value = planted(draw)
        text += " ".join(pieces[place : place + 40]) + " "
        truth.append(Finding(kind, len(text), len(text) + len(value)))
        text += value + draw.choice([" ", ", ", ". "])
    found = FINDER.find(text)
    right = set(found) & set(truth)
    assert len(truth) == 1000
    assert len(right) / len(truth) >= 0.995
    assert len(right) / len(found) >= 0.995


def test_real_text_has_few_numbers_that_are_taken_for_personal_data() -> None:
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]
    text = "\n".join(path.read_text(errors="replace") for path in paths)
    wrong = [text[found.start : found.end] for found in FINDER.find(text) if found.kind in ("card", "iban", "national_id", "phone")]
    assert len(text) > 500_000
    assert len(wrong) <= len(text) / 200_000


def test_text_without_candidates_goes_by_fast() -> None:
    text = real_text() * 8
    FINDER.find(text)
    began = time.process_time()
    FINDER.find(text)
    assert len(text) / 1e6 / (time.process_time() - began) > 50  # MB/s; about 200 on a quiet core


@given(text=st.text(alphabet="0123456789 .-/()+@:abcdefXYZ\n", max_size=300) | st.text(max_size=200))
def test_nothing_breaks_it_and_findings_never_overlap(text: str) -> None:
    found = FINDER.find(text)
    assert all(0 <= finding.start < finding.end <= len(text) for finding in found)
    assert all(one.end <= other.start for one, other in pairwise(found))


def test_a_megabyte_of_digits_is_not_quadratic() -> None:
    for text in ("1234567890 " * 90_000, "1" * 1_000_000, "1." * 500_000, "a@" * 400_000, ":a" * 400_000, "A" * 1_000_000):
        began = time.process_time()
        FINDER.find(text)
        assert time.process_time() - began < 8
