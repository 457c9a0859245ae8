"""Check digits of cards, bank accounts and national identity numbers; every function takes digits and letters without separators.

Sources: Luhn (US patent 2,950,048), ISO 13616 (IBAN), ISO 7064 (mod 11,10), Verhoeff 1969, and each authority's own rule.
"""

from __future__ import annotations

from collections import Counter

_IBANS = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 FR27
GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27
MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23
TN24 TR26 UA29 VA22 VG24 XK20
"""
IBAN_LENGTHS = {item[:2]: int(item[2:]) for item in _IBANS.split()}
"""Characters of an IBAN, by country."""

_DNI = "TRWAGMYFPDXBNJZSQVHLCKE"
_ODD = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True))
_ODD |= dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        strict=True,
    )
)
_TURN = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


def luhn(digits: str) -> bool:
    """Whether the last digit is Luhn's."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) << (place & 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def card(digits: str) -> bool:
    """Whether a number has a card issuer's prefix and length, and Luhn's digit."""
    size, four, six = len(digits), int(digits[:4]), int(digits[:6])
    issued = (
        (digits[0] == "4" and size in (13, 16, 19))  # Visa
        or (size == 16 and (5100 <= four <= 5599 or 2221 <= four <= 2720))  # Mastercard
        or (size == 15 and digits[:2] in ("34", "37"))  # American Express
        or (16 <= size <= 19 and (four == 6011 or 6440 <= four <= 6599 or 622126 <= six <= 622925))  # Discover, UnionPay
        or (16 <= size <= 19 and 3528 <= four <= 3589)  # JCB
        or (14 <= size <= 19 and (digits[:2] in ("36", "38", "39") or 3000 <= four <= 3059))  # Diners Club
    )
    return issued and luhn(digits)


def iban(account: str) -> bool:
    """Whether a country's length and the remainder 1 modulo 97 hold."""
    if IBAN_LENGTHS.get(account[:2]) != len(account):
        return False
    return int("".join(str(int(char, 36)) for char in account[4:] + account[:4])) % 97 == 1


def us_ssn(digits: str) -> bool:
    """Whether the Social Security Administration could have given it out: it has no check digit."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    given = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return given and digits not in ("078051120", "219099999", "123456789")  # printed in advertisements and examples


def uk_nino(number: str) -> bool:
    """Whether the prefix is one of those in use: it has no check digit."""
    first, second, pair = number[0], number[1], number[:2]
    return first not in "DFIQUV" and second not in "DFIQUVO" and pair not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def german_tax_id(digits: str) -> bool:
    """Whether one digit stands twice or thrice among the first ten, and the last is that of ISO 7064 mod 11,10."""
    if digits[0] == "0" or sorted(Counter(digits[:10]).values())[-2:] not in ([1, 2], [1, 3]):
        return False
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def french_nir(number: str) -> bool:
    """Whether the last two digits are 97 less the rest modulo 97; Corsica's 2A and 2B count as 19 and 18."""
    if number[0] not in "123478" or not ("01" <= number[3:5] <= "12" or number[3:5] >= "20"):
        return False
    body = number[:5] + {"2A": "19", "2B": "18"}.get(number[5:7], number[5:7]) + number[7:13]
    return body.isdigit() and 97 - int(body) % 97 == int(number[13:])


def spanish_dni(number: str) -> bool:
    """DNI and NIE: whether the letter is that of the number modulo 23."""
    digits = number[:-1].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return _DNI[int(digits) % 23] == number[-1]


def italian_code(code: str) -> bool:
    """Codice fiscale: whether the last letter is that of the others' values modulo 26."""
    values = (_ODD[char] if place % 2 == 0 else int(char, 36) - 10 * char.isalpha() for place, char in enumerate(code[:15]))
    return chr(65 + sum(values) % 26) == code[15]


def brazilian_cpf(digits: str) -> bool:
    """Whether both last digits are those of the weighted sums modulo 11."""
    if len(set(digits)) == 1:
        return False
    for size in (9, 10):
        total = sum(int(digit) * weight for digit, weight in zip(digits[:size], range(size + 1, 1, -1), strict=True))
        if total * 10 % 11 % 10 != int(digits[size]):
            return False
    return True


def _dihedral(left: int, right: int) -> int:
    """Product in the symmetries of the pentagon: 0 to 4 turn it, 5 to 9 flip it."""
    if left < 5:
        return (left + right) % 5 if right < 5 else 5 + (left + right) % 5
    return 5 + (left - right) % 5 if right < 5 else (left - right) % 5


def verhoeff(digits: str) -> bool:
    """Whether the last digit is Verhoeff's."""
    check = 0
    for place, char in enumerate(reversed(digits)):
        digit = int(char)
        for _ in range(place % 8):
            digit = _TURN[digit]
        check = _dihedral(check, digit)
    return check == 0


def indian_aadhaar(digits: str) -> bool:
    """Whether it could have been given out, by Verhoeff's digit."""
    return digits[0] not in "01" and digits != digits[::-1] and verhoeff(digits)
