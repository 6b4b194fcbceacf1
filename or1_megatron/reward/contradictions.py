r"""What Math-Verify overlooks in a pair it takes for equal: units, brackets, bounds, names, letter case, dots,
rows and the order of letters.

It reads `12\text{ m}` as 12, `\{1,2\}` as `(1,2)`, `\le 5` as 5, `a` as `A` and `5\ldots` as 5. The rules look at the
text alone and say only that two answers differ, never that they agree; what they cannot read contradicts nothing.
"""

from __future__ import annotations

import math
import re

from or1_megatron.reward.units import WORDS, units

_LOOKS = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\[,;:! ]|[~\s$]")
_SEPARATOR = re.compile(r",?(?<![A-Za-z])(?:and|or)(?![A-Za-z])|;")
_NAMED = re.compile(r"(?:^|(?<=,))(\\?[A-Za-z]+)(?:_(?:\w|\{\w+\}))?'*(=|\\in(?![A-Za-z]))")
_BOUND = re.compile(r"\\n?(?:[lg](?:eq?|eqslant|eqq|t)|e|eq|eg)(?![A-Za-z])|\\not(?![A-Za-z])|[<>≤≥≠]")
_DOTS = re.compile(r"\\(?:[lc]?dots|dots[cbmio])|\.\.\.|…")
_CUT = re.compile(rf"(?:{_DOTS.pattern})[ .;]*$")
_DECIMAL = re.compile(r"(\d*)\.(\d+)")
_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d+)?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_LETTERS = re.compile(r"[A-Za-z](?:,[A-Za-z])*")
_SCALED = re.compile(r"\.(\d+) ?(?:\\times|\\cdot|×) ?10\^\{?-(\d{1,3})(?!\d)")
_ORDER = re.compile(r"[A-Z]{4,}")  # ABC may be an angle, ab a product
_SCALE = re.compile(
    r"\d[}$]*(?:\\[,;:! ]|\\(?:text|mathrm|mbox)\{|[~\s])*(thousand|(?:m|b|tr)illion)s?(?![A-Za-z])", re.IGNORECASE
)
_ASIDE = re.compile(r"\([^()]*\)")
_CONNECTIVE = re.compile(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\{(\w*matrix|array)\}.*?\\end\{\1\}", re.DOTALL)
_ALTERNATIVE = re.compile(r"\\(?:lor|vee)(?![A-Za-z])")
# \\frac is \frac in an answer that was escaped once too often.
_ROW_END = re.compile(r"\\\\(?![A-Za-z]{2})(?:\[[^]]*\])?")
_ROW_LOOKS = re.compile(r"\\(?:begin|end)\{[^}]*\}|\\q?quad(?![A-Za-z])|&")
_UNEQUAL = re.compile(r"\\neq?(?![A-Za-z])|\\not\s*=|≠")


def contradicts(gold: str, answer: str) -> bool:
    """Whether `answer` says something else than `gold` in what Math-Verify leaves out."""
    if (
        _units_differ(gold, answer)
        or _is_cut_short(gold, answer)
        or _has_rivals(gold, answer)
        or _connectives_differ(gold, answer)
        or _scales(gold) != _scales(answer)
    ):
        return True
    gold, answer = _plain(gold), _plain(answer)
    return (
        _is_a_bound(gold, answer)
        or _is_untrue(answer)
        or _case_differs(gold, answer)
        or _letters_are_moved(gold, answer)
        or _order_differs(gold, answer)
        or _brackets_differ(gold, answer)
    )


def decimals(gold: str, answer: str, value: float | None) -> int:
    """Decimals that have to agree: of a decimal gold answer its own, at least Math-Verify's six. Of an exact one twelve
    digits, whatever their place, since that is what a right decimal has; 1.41421356 is not the root of 2.

    value: of the gold answer where it is one number, else None; the digits in the answer tell its size then.
    """
    own = [len(fraction) for _, fraction in _DECIMAL.findall(gold)]
    if own:
        return max(6, *own, *(len(fraction) + int(power) for fraction, power in _SCALED.findall(gold)))
    if value and math.isfinite(value):
        return max(6, 11 - math.floor(math.log10(abs(value))))
    return max(6, 12 - max((len(whole.lstrip("0")) for whole, _ in _DECIMAL.findall(answer)), default=0))


def _plain(answer: str) -> str:
    """Without spaces, sizes of brackets and \\text; `and` and `or` are commas, outer braces stay."""
    return _LOOKS.sub("", _SEPARATOR.sub(",", WORDS.sub(r" \1 ", answer))).rstrip(".")


def _units_differ(gold: str, answer: str) -> bool:
    wanted, given = units(gold), units(answer)
    return len(wanted) == len(given) and any(
        power != other or not names & others for (names, power), (others, other) in zip(wanted, given, strict=True)
    )


def _is_cut_short(gold: str, answer: str) -> bool:
    """`5\\ldots` for 5; dots behind decimals only say that these go on."""
    return bool(_CUT.search(answer)) and not _DECIMAL.search(answer) and not _DOTS.search(gold)


def _has_rivals(gold: str, answer: str) -> bool:
    """`x=17 \\lor x=23`, or two rows with other numbers for x, for 23: Math-Verify takes the last."""
    if _ALTERNATIVE.search(answer) and not _ALTERNATIVE.search(gold):
        return True
    if _ROW_END.search(gold):
        return False
    numbers: dict[str, set[str]] = {}
    for row in _ROW_END.split(_MATRIX.sub("", answer)):
        name, equals, value = _LOOKS.sub("", _ROW_LOOKS.sub("", row)).rpartition("=")
        if _NUMBER.fullmatch(value) and (name or not equals):  # what begins with = goes on with the row before
            numbers.setdefault(name, set()).add(value)
    return any(len(values) > 1 for values in numbers.values())


def _connectives_differ(gold: str, answer: str) -> bool:
    """`x<1` or `x>2` for both; of equations people say `and` where they mean `or`."""
    words = [set(_CONNECTIVE.findall(text)) for text in (gold, answer) if _BOUND.search(_UNEQUAL.sub("", text))]
    return sorted(map(sorted, words)) == [["and"], ["or"]]


def _scales(text: str) -> set[str]:
    """What a number is multiplied by; not what is said of it beside, as `2,000,000 (two million)`."""
    return {name.lower() for name in _SCALE.findall(_ASIDE.sub("", text))}


def _is_a_bound(gold: str, answer: str) -> bool:
    """`\\le 5` for 5."""
    return bool(_BOUND.match(answer)) and not _BOUND.search(gold) and not re.search("more|less|most|least", gold)


def _is_untrue(answer: str) -> bool:
    """`5=6`, of which Math-Verify takes the last number."""
    numbers = answer.split("=")
    return len(numbers) > 1 and all(map(_NUMBER.fullmatch, numbers)) and len(set(map(float, numbers))) > 1


def _case_differs(gold: str, answer: str) -> bool:
    """`a` for `A`, of single letters: yes is Yes."""
    is_letters = _LETTERS.fullmatch(gold) and _LETTERS.fullmatch(answer)
    return bool(is_letters) and sorted(gold) != sorted(answer) and sorted(gold.lower()) == sorted(answer.lower())


def _letters_are_moved(gold: str, answer: str) -> bool:
    """`ABCD` for `DCAB`, an order of four, which Math-Verify multiplies. A polygon may be read from any corner, and the
    other way round."""
    if not (_ORDER.fullmatch(gold) and _ORDER.fullmatch(answer)) or sorted(gold) != sorted(answer):
        return False
    return gold not in 2 * answer and gold not in 2 * answer[::-1]


def _order_differs(gold: str, answer: str) -> bool:
    """`2,1` for `x=1,y=2`, with brackets or without."""
    names = [name for name, _ in _NAMED.findall(gold)]
    parts = gold.split(",")
    if len(names) != len(parts) or len(set(names)) == 1 or "=" in answer:
        return False
    wanted = [part.partition("=")[2] for part in parts]
    given = answer.replace("\\{", "(").replace("\\}", ")").strip("()[]").split(",")
    return wanted != given and sorted(wanted) == sorted(given)


def _brackets_differ(gold: str, answer: str) -> bool:
    """A set is no tuple or interval, nor is a list without brackets; a tuple may be given without its brackets."""
    return (_kind(gold), _kind(answer)) in {("set", "ordered"), ("ordered", "set"), ("list", "ordered")}


def _kind(text: str) -> str | None:
    names = {name for name, _ in _NAMED.findall(text)}
    text = _NAMED.sub("", text) if len(names) == 1 else text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set" if _closes_at_the_end(text.replace("\\", "")) and not set("([") & set(text) else None
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        inside = text[1:-1]
        if not _closes_at_the_end(text) or set("([{") & set(_commands_out(inside)) or "," not in inside:
            return None
        as_a_list = text[0] + text[-1] == "[]" and inside.count(",") > 1  # no interval: three members
        return None if as_a_list or _LETTERS.fullmatch(inside) else "ordered"
    is_list = "," in _THOUSANDS.sub("", text) or text.startswith(r"\pm")
    return "list" if is_list and not set("=()[]<>") & set(text) else None


def _commands_out(text: str) -> str:
    """Without the braces of \\frac{1}{2} and \\sqrt{2}."""
    return text.replace("{", "").replace("\\", "")


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False
