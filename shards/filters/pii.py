"""Personal data in text: e-mail and IP addresses, telephone, card and account numbers, national identity numbers, names.

A text without an `@`, a colon between hexadecimal digits or a longer run of digits is looked through at memory speed;
only what stands around those is looked at closely.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple

from shards.common.errors import SpecError
from shards.common.optional import need
from shards.filters import check_digits
from shards.filters.settings import Pii

PLACEHOLDERS = {
    "email": "<EMAIL>",
    "phone": "<PHONE>",
    "ip": "<IP>",
    "card": "<CARD>",
    "iban": "<IBAN>",
    "national_id": "<ID>",
    "name": "<NAME>",
}

_LOCAL = re.compile(r"[\w.!#$%&'*+/=?^`{|}~-]{1,64}\Z")
_DOMAIN = re.compile(r"(?:\w(?:[\w-]{0,61}\w)?\.)+[^\W\d_]{2,63}")
_OPENERS = ".!#$%&'*/=?^`{|}~"  # allowed in an address by RFC 5322, but at its start mostly what stands before it
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_HEX = "0123456789abcdefABCDEF:."
# Digits and capitals with at most two separators between; all numbers below begin with two digits at the latest after
# six letters, so a run and what stands directly before it hold them.
_RUN = re.compile(r"[0-9][ .\-/()]{0,2}[0-9](?:[ .\-/()]{0,2}[0-9A-Z])+")
_SHORTEST = 6  # characters of a run; an address such as 1.1.1.1 has 7, with the first digits before a letter fewer
_BEFORE = 12  # characters looked at before a run, for +, ( and letters

_IPV4 = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
_CARD = re.compile(r"(?<![\w.\-])[2-6][0-9]{3}(?:[ -]?[0-9]{2,6}){2,4}(?![\w\-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{1,4}){3,8}")
_PHONE = re.compile(r"(?<![\w.+/-])(?:\+ ?[0-9]|\(?[0-9])[0-9 .\-/()]{5,20}[0-9](?![\w]|[.\-][0-9])")
_CALL = re.compile(r"(?i)(?:tel|phone|fax|call|mobile|cell|whatsapp|contact)[^\n0-9]{0,24}\Z")
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}[./ -]?[0-9]{2}[./ -]?[0-9]{2}(?![0-9])"
    r"|[0-9]{1,2}([./-])[0-9]{1,2}\1[0-9]{2,4}(?![0-9])"
    r"|[0-9]{4}[-/ ][0-9]{4}\Z"  # years
)


class Rule(NamedTuple):
    """A national number: how it is written, its check, and words of which one must stand shortly before a bare one."""

    pattern: re.Pattern[str]
    check: Callable[[str], bool]
    context: re.Pattern[str] | None = None


def _rule(pattern: str, check: Callable[[str], bool], context: str = "") -> Rule:
    near = re.compile(rf"(?i)(?:{context})[^\n]{{0,30}}\Z") if context else None
    return Rule(re.compile(rf"(?<![\w.\-]){pattern}(?![\w\-])"), check, near)


_NATIONAL = (
    _rule(r"[0-9]{3}-[0-9]{2}-[0-9]{4}", check_digits.us_ssn),
    _rule(r"[0-9]{9}", check_digits.us_ssn, "ssn|social security"),
    _rule(r"[A-Z]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]", check_digits.uk_nino),
    _rule(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", check_digits.brazilian_cpf),
    _rule(r"[0-9]{11}", check_digits.brazilian_cpf, "cpf"),
    _rule(r"[0-9]{2} [0-9]{3} [0-9]{3} [0-9]{3}", check_digits.german_tax_id),
    _rule(r"[0-9]{11}", check_digits.german_tax_id, "steuer|idnr|tax id|tin"),
    _rule(r"[1-478] [0-9]{2} [0-9]{2} [0-9][0-9AB] [0-9]{3} [0-9]{3} ?[0-9]{2}", check_digits.french_nir),
    _rule(r"[1-478][0-9]{5}[0-9AB][0-9]{8}", check_digits.french_nir),
    _rule(r"(?:[0-9]{8}|[XYZ]-?[0-9]{7})-?[A-Z]", check_digits.spanish_dni),
    _rule(r"[A-Z]{6}[0-9]{2}[A-EHLMPRST][0-9]{2}[A-Z][0-9]{3}[A-Z]", check_digits.italian_code),
    _rule(r"[2-9][0-9]{3} [0-9]{4} [0-9]{4}", check_digits.indian_aadhaar),
    _rule(r"[2-9][0-9]{11}", check_digits.indian_aadhaar, "aadhaar|aadhar|uidai"),
)
_SEPARATORS = str.maketrans("", "", " .-/()")


class Finding(NamedTuple):
    """One piece of personal data."""

    kind: str
    start: int  # in the text, characters
    end: int


class Finder:
    """Finds personal data of the kinds asked for; SpecError where a library or model for that is missing."""

    def __init__(self, settings: Pii) -> None:
        self.settings = settings
        self._kinds = frozenset(settings.kinds)
        self._phones: Any = need("phonenumbers", "finding telephone numbers") if "phone" in self._kinds else None
        self._names = _name_model(settings.names) if settings.names else None

    def find(self, text: str) -> list[Finding]:
        """All findings, in the order of the text, none within another."""
        found: list[Finding] = []
        if "email" in self._kinds and "@" in text:
            found += _emails(text)
        if "ip" in self._kinds and ":" in text:
            found += _ipv6(text)
        if self._kinds - {"email"}:
            for match in _RUN.finditer(text):
                if match.end() - match.start() >= _SHORTEST:
                    found += self._numbers(text, max(0, match.start() - _BEFORE), match.end() + 1)
        if self._names is not None:
            found += [
                Finding("name", entity.start_char, entity.end_char) for entity in self._names(text).ents if entity.label_ in _PEOPLE
            ]
        return _apart(found)

    def apply(self, text: str) -> tuple[str, dict[str, int], str]:
        """The text as kept (redacted, in that mode), counts by kind, and why it is refused, or ""."""
        found = self.find(text)
        if not found:
            return text, {}, ""
        counts = dict(sorted(Counter(finding.kind for finding in found).items()))
        if self.settings.mode == "drop":
            return text, counts, f"pii: {max(counts, key=lambda kind: counts[kind])}" if len(found) >= self.settings.drop_at else ""
        parts, at = [], 0
        for finding in found:
            parts += [text[at : finding.start], PLACEHOLDERS[finding.kind]]
            at = finding.end
        return "".join([*parts, text[at:]]), counts, ""

    def _numbers(self, text: str, start: int, end: int) -> Iterator[Finding]:
        """Numbers of a run of digits and what stands before it; the surest first, since the first of overlapping ones stays."""
        if "ip" in self._kinds:
            for match in _IPV4.finditer(text, start, min(end + 12, len(text))):
                if _is_public(match.group()) and not _is_version(text, match.start()):
                    yield Finding("ip", *match.span())
        if "iban" in self._kinds:
            for match in _IBAN.finditer(text, start, min(end + 1, len(text))):
                if (length := _iban_length(match.group())) and not text[
                    match.start() + length : match.start() + length + 1
                ].isalnum():
                    yield Finding("iban", match.start(), match.start() + length)
        if "card" in self._kinds:
            for match in _CARD.finditer(text, start, end):
                digits = match.group().translate(_SEPARATORS)
                if 13 <= len(digits) <= 19 and check_digits.card(digits):
                    yield Finding("card", *match.span())
        if "national_id" in self._kinds:
            for rule in _NATIONAL:
                for match in rule.pattern.finditer(text, start, end):
                    near = rule.context is None or rule.context.search(text, max(0, match.start() - 48), match.start())
                    if near and rule.check(match.group().translate(_SEPARATORS)):
                        yield Finding("national_id", *match.span())
        if self._phones is not None:
            for match in _PHONE.finditer(text, start, end):
                if self._is_phone(text, match):
                    yield Finding("phone", *match.span())

    def _is_phone(self, text: str, match: re.Match[str]) -> bool:
        number = match.group()
        digits = sum(map(str.isdigit, number))
        if not 7 <= digits <= 15 or _DATE.match(number):
            return False
        if number[0] != "+":
            bare = number.isdigit() or not 1 < sum(map(number.count, "-. ()/")) < 7
            if not self.settings.region or (bare and not _CALL.search(text, max(0, match.start() - 40), match.start())):
                return False
        try:
            parsed = self._phones.parse(number, self.settings.region or None)
        except self._phones.NumberParseException:
            return False
        return bool(self._phones.is_valid_number(parsed))


_PEOPLE = ("PERSON", "PER")


def _emails(text: str) -> Iterator[Finding]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL.search(text[max(0, at - 64) : at]) if domain else None
        if domain and local:
            name = local.group().lstrip(_OPENERS)
            # git@ is a program's login in an address of a repository.
            if name and name[-1] != "." and name != "git":
                yield Finding("email", at - len(name), domain.end())
        at = text.find("@", domain.end() if domain else at + 1)


def _ipv6(text: str) -> Iterator[Finding]:
    done = 0
    for match in _COLONS.finditer(text):
        if match.start() < done:
            continue
        start, done = match.start(), match.end()
        while start and text[start - 1] in _HEX and match.start() - start < 40:
            start -= 1
        while done < len(text) and text[done] in _HEX and done - start < 64:
            done += 1
        end = done
        while text[end - 1] == "." or (text[end - 1] == ":" and text[end - 2] != ":"):
            end -= 1
        alone = (start == 0 or not text[start - 1].isalnum()) and (end == len(text) or not text[end].isalnum())
        # Of fewer groups are a network such as 2000::/3, and a slice such as [1::2].
        groups = sum(map(bool, text[start:end].split(":")))
        if alone and groups >= 3 and _is_public(text[start:end]):
            yield Finding("ip", start, end)


def _is_public(address: str) -> bool:
    """Whether an address is one of the public internet: not private, documentation, loopback or reserved."""
    try:
        return ip_address(address).is_global and not ip_address(address).is_multicast
    except ValueError:
        return False


_VERSION = re.compile(r"(?i)(?:\bv|version|release|ver\.?|section|§|chapter|oid)[ =:]*\Z")


def _is_version(text: str, start: int) -> bool:
    return _VERSION.search(text, max(0, start - 12), start) is not None


def _iban_length(written: str) -> int:
    """Characters, spaces included, that an IBAN takes of a stretch of text that begins like one; 0 where it is none."""
    size = check_digits.IBAN_LENGTHS.get(written[:2], 0)
    places = [place for place, char in enumerate(written) if char != " "][:size]
    account = "".join(written[place] for place in places)
    return places[-1] + 1 if size and len(account) == size and check_digits.iban(account) else 0


def _apart(found: list[Finding]) -> list[Finding]:
    """Findings in the order of the text; of those that overlap the one found first."""
    kept: list[Finding] = []
    for _, finding in sorted(enumerate(found), key=lambda item: (item[1].start, item[0])):
        if not kept or finding.start >= kept[-1].end:
            kept.append(finding)
    return kept


def _name_model(name: str) -> Any:
    spacy = need("spacy", "finding names")
    try:
        model = spacy.load(name)
    except OSError:
        installed = ", ".join(spacy.util.get_installed_models()) or "none"
        raise SpecError(
            f'pii: names: spaCy has no model "{name}" (installed: {installed}; python -m spacy download {name})'
        ) from None
    if "ner" not in model.pipe_names:
        raise SpecError(f'pii: names: the model "{name}" has no part that finds names (use one such as en_core_web_sm)')
    return model
