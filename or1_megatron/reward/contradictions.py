r"""What Math-Verify overlooks in a pair it takes for equal: units, brackets, bounds, names, letter case, dots.

It reads `12\text{ m}` as 12, `\{1,2\}` as `(1,2)`, `\le 5` as 5, `a` as `A` and `5\ldots` as 5. The rules look at the
text alone and say only that two answers differ, never that they agree: a unit they do not know, or one that a side
leaves out, contradicts nothing.
"""

from __future__ import annotations

import re

_BLANK = re.compile(r"(?:\\[ ,;:!]|[~\s])+")
_UNIT = re.compile(
    r"(?:\\(?:text|textrm|mathrm|mbox) ?\{([^{}]*)\}|(?<=[\d ])([A-Za-z]+(?:/[a-z]+)?)(?![A-Za-z]))"
    r" ?(?:\^[ {]*(\d)|([²³]))?"
)
_POWERS = {"square": 2, "sq": 2, "squared": 2, "²": 2, "cubic": 3, "cubed": 3, "³": 3}
_UNITS = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres",
        "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres",
        "km kilometer kilometers kilometre kilometres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "s sec second seconds",
        "min minute minutes",
        "h hr hour hours",
        "day days",
        "week weeks",
        "month months",
        "year years",
        "mg milligram milligrams",
        "g gram grams",
        "kg kilogram kilograms",
        "oz ounce ounces",
        "lb lbs pound pounds",
        "ml mL milliliter milliliters",
        "l L liter liters litre litres",
        "cent cents",
        "dollar dollars",
        "m/s",
        "km/h kmh kph",
        "mph mi/h",
        "degree degrees",
        "radian radians",
        "thousand",
        "million",
        "billion",
    )
    for name in names.split()
}
_BOUND = re.compile(r"\\(?:leq?|geq?|neq?|neg|lt|gt)(?![A-Za-z])|[<>≤≥≠]")
_DOTS = re.compile(r"(?:\\[lc]?dots|\.\.\.|…)\s*$")
_DECIMAL = re.compile(r"\.\d")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[,;:! ]|\s")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def contradicts(gold: str, answer: str) -> bool:
    """Whether `answer` says something else than `gold` in what Math-Verify leaves out."""
    return (
        _units_differ(gold, answer)
        or _letters_differ(gold.strip(), answer.strip())
        or _is_cut_short(gold, answer)
        or _is_a_bound(gold, answer)
        or _order_differs(gold, answer)
        or _brackets_differ(gold, answer)
    )


def is_exact(gold: str) -> bool:
    """Whether the gold answer is not a decimal, so that only decimals that go on like it are equal to it."""
    return not _DECIMAL.search(gold)


def _units_differ(gold: str, answer: str) -> bool:
    wanted, given = _units(gold), _units(answer)
    return len(wanted) == len(given) and wanted != given


def _units(answer: str) -> list[tuple[str, int]]:
    """The units that are known, with their powers; degrees and dollars also as signs. Sorted: a sum has no order."""
    text = _BLANK.sub(" ", answer).strip()
    found = [("degree", 1)] if text.endswith((r"^\circ", r"^{\circ}")) else []
    if text.startswith(r"\$") or (text.startswith("$") and text.count("$") == 1):
        found.append(("dollar", 1))
    for inside, bare, power, sign in _UNIT.findall(text):
        words = [*(inside or bare).replace(".", " ").split(), *sign]
        named = [_UNITS.get(word) or _UNITS.get(word.lower()) for word in words if word not in _POWERS]
        if len(named) == 1 and named[0] is not None:
            found.append((named[0], int(power or next((_POWERS[word] for word in words if word in _POWERS), 1))))
    return sorted(found)


def _letters_differ(gold: str, answer: str) -> bool:
    return len(gold) == len(answer) == 1 and gold != answer and gold.lower() == answer.lower()


def _is_cut_short(gold: str, answer: str) -> bool:
    """`5\\ldots` for 5; dots behind decimals only say that these go on."""
    return bool(_DOTS.search(answer)) and not _DECIMAL.search(answer) and not _DOTS.search(gold)


def _is_a_bound(gold: str, answer: str) -> bool:
    """`\\le 5` for 5."""
    return bool(_BOUND.match(answer.strip())) and not _BOUND.search(gold)


def _order_differs(gold: str, answer: str) -> bool:
    """`2,1` for `x=1,y=2`."""
    names, equals, wanted = zip(*(part.partition("=") for part in _SIZES.sub("", gold).split(",")), strict=True)
    if not all(equals) or len(set(names)) == 1:
        return False
    given = tuple(_SIZES.sub("", answer).split(","))
    return wanted != given and sorted(wanted) == sorted(given)


def _brackets_differ(gold: str, answer: str) -> bool:
    """A set is no tuple or interval, nor is a list without brackets; a tuple may be given without its brackets."""
    return (_kind(gold), _kind(answer)) in {("set", "ordered"), ("ordered", "set"), ("list", "ordered")}


def _kind(answer: str) -> str | None:
    text = _SIZES.sub("", answer)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set" if _closes_at_the_end(text.replace("\\", "")) else None
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        return "ordered" if _closes_at_the_end(text) and "," in text else None
    return "list" if "," in _THOUSANDS.sub("", text) and not set("=()[]{}<>") & set(text) else None


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False
