r"""Units of an answer in LaTeX or plain words, e.g. `18\text{ cm}^2`, `18 square cm`, `\$5`, `30^\circ C`, `3 p.m.`"""

from __future__ import annotations

import re

Unit = tuple[frozenset[str], int]  # what the name may mean, and the power

_LONGEST = 200  # characters; nothing longer is a few numbers with units
WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_BLANK = re.compile(r"(?:\\[ ,;:!]|[~\s$])+")
_DEGREES = re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|°")
_MEMBERS = re.compile(r",(?!\d{3}(?!\d))|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_MEASURE = re.compile(r"(?:\\[A-Za-z]+|[^A-Za-z\\])+? ?([A-Za-z][A-Za-z./ ]*?)? ?(?:\^ ?\{? ?(\d) ?\}?|([²³]))?")
_POWERS = {"square": 2, "sq": 2, "squared": 2, "²": 2, "cubic": 3, "cubed": 3, "³": 3}
_MEANINGS: dict[str, set[str]] = {}
_NAMES = """
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yard yards
mi mile miles
s sec secs second seconds
min m mins minute minutes
h hr hrs hour hours
day days
week weeks
month months
year years
am
pm
mg milligram milligrams
g gram grams
kg kilogram kilograms
t ton tons
oz ounce ounces
lb lbs pound pounds
ml milliliter milliliters
l liter liters litre litres
gal gallon gallons
qt quart quarts
acre acres
cent cents
dollar dollars
euro euros
m/s
km/h kmh kph
mph mi/h
degree degrees
radian radians rad
thousand
million
billion
"""
for _line in _NAMES.strip().splitlines():
    for _name in _line.split():
        _MEANINGS.setdefault(_name, set()).add(_line.split()[0])
_SCALES = {"c": "celsius", "celsius": "celsius", "f": "fahrenheit", "fahrenheit": "fahrenheit"}


def units(answer: str) -> list[Unit]:
    """The unit of each member of a list, sorted. [] unless every member is a number with a unit that is known.

    A letter that does not follow a number and nothing else is a variable: `2m-1` and `(2m)^3` have no unit.
    """
    if len(answer) > _LONGEST:
        return []
    money = answer.lstrip().startswith(r"\$") or (answer.lstrip().startswith("$") and answer.count("$") == 1)
    text = WORDS.sub(r" \1 ", answer.replace(r"\$", ""))
    text = _BLANK.sub(" ", _DEGREES.sub(" degree ", text)).strip(" .;")
    found = [_unit(part.strip(), money) for part in _MEMBERS.split(text)]
    known = [unit for unit in found if unit]
    return sorted(known, key=lambda unit: (sorted(unit[0]), unit[1])) if len(known) == len(found) else []


def _unit(measure: str, money: bool) -> Unit | None:
    parts = _MEASURE.fullmatch(measure)
    if not parts:
        return None
    spelled, digit, sign = parts.groups(default="")
    words = [*spelled.replace(".", "").split(), *sign]
    power = int(digit) if digit else next((_POWERS[word] for word in words if word in _POWERS), 1)
    *rest, name = [word for word in words if word not in _POWERS] or [""]
    if rest:
        scale = _SCALES.get(name.lower()) if rest in (["degree"], ["degrees"]) else None
        return (frozenset({scale}), 1) if scale else None
    if money:
        return (frozenset({"dollar"}), 1) if name in ("", "dollar", "dollars") else None
    meanings = _MEANINGS.get(name) or _MEANINGS.get(name.lower())
    if meanings == {"ml"}:
        return frozenset({"cm"}), 3
    return (frozenset(meanings), power) if meanings else None
