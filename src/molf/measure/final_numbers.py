"""The final number of a solution, by value: `1,000` equals `1000.0`, and `3/4` equals `0.75`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

_MARKER = re.compile(r"(?:answer is[ \t]*:?|####)\s*", re.IGNORECASE)
_NEXT_QUESTION = "\nQuestion:"
_MOST_CHARACTERS = 100  # of a number; int() refuses thousands of digits

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?![0-9])(?:\.[0-9]+)?|\.[0-9]+)"
# "-" after a letter, a digit or a bracket is a subtraction or a hyphen.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_])(?<![0-9]\.)(?P<minus>(?<![)\]}])-)?"
    rf"(?:(?P<whole>[0-9]+) (?P<part>[0-9]+/[0-9]+)"
    rf"|(?P<top>{_DECIMAL})(?: ?/ ?(?P<bottom>{_DECIMAL}))?)"
)
_FRACTION = re.compile(
    rf"(?P<before>[0-9]?)\\[dt]?frac *(?:\{{ *(?P<top>-?{_DECIMAL}) *\}}"
    rf" *\{{ *(?P<bottom>{_DECIMAL}) *\}}|(?P<digits>[0-9]{{2}}))"
)
_BOXED = re.compile(r"\\boxed *\{([^{}]*)\}")
_CURRENCY = re.compile(r"(-?) *[$£€] *")


def stated_number(solution: str) -> Fraction | None:
    r"""Return the number after the last `The answer is:` or `####`; None if it is no number.

    The line must be a number alone, up to currency, `%` and `\boxed{}`.
    """
    places = list(_MARKER.finditer(solution))
    if not places:
        return None
    line = _plain(solution[places[-1].end() :]).strip().partition("\n")[0].strip(" .%")
    if boxed := _BOXED.fullmatch(line):
        line = boxed[1].strip(" .%")
    found = _NUMBER.fullmatch(line)
    return None if found is None else _value(found)


def final_number(text: str) -> Fraction | None:
    r"""Return the number that a generated text gives as its answer, or None.

    The first that exists of: the first number after `The answer is` or `####` and before the end
    of the line; the last number in `\boxed{}`; the last number. The text ends where it repeats
    the prompt's `Question:` on a new line.
    """
    text = _plain(_own_part(text))
    for line, _ in _marked_lines(text):
        if numbers := _numbers(line):
            return numbers[0]
    for part in (*reversed(_BOXED.findall(text)), text):
        if numbers := _numbers(part):
            return numbers[-1]
    return None


def is_final(text: str) -> bool:
    """Return whether more text cannot change the result of `final_number`."""
    if _NEXT_QUESTION in text:
        return True
    # A line that has not ended may still get digits.
    return any(is_ended and _numbers(line) for line, is_ended in _marked_lines(_plain(text)))


def shown(number: Fraction) -> str:
    """Return a number as text, equal for equal numbers: `18`, `-0.75`, `1/3`."""
    if number.denominator == 1:
        return str(number.numerator)
    for places in range(1, 13):
        scaled = number * 10**places
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(places + 1, "0")
            sign = "-" if number < 0 else ""
            return f"{sign}{digits[:-places]}.{digits[-places:]}"
    return f"{number.numerator}/{number.denominator}"


def _marked_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the texts from the markers to the ends of their lines, and whether the lines end."""
    end = 0
    for marker in _MARKER.finditer(text):
        if marker.end() <= end:
            continue  # the text from the marker before includes it
        newline = text.find("\n", marker.end())
        end = len(text) if newline < 0 else newline
        yield text[marker.end() : end], newline >= 0


def _own_part(text: str) -> str:
    """Return the text before a next question that a model invents."""
    return text.partition(_NEXT_QUESTION)[0]


def _plain(text: str) -> str:
    """Replace LaTeX's spelling of numbers, currency signs and the Unicode minus; keep the lines."""
    text = text.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    for command, plain in ((r"\$", "$"), (r"\%", "%"), (r"\!", ""), (r"\,", "")):
        text = text.replace(command, plain)
    return _CURRENCY.sub(r" \1", _FRACTION.sub(_as_quotient, text))


def _as_quotient(found: re.Match[str]) -> str:
    r"""Return `\frac{3}{4}` as `3/4`, and behind a digit as the fraction of a mixed number."""
    top, bottom = tuple(found["digits"] or ()) or (found["top"], found["bottom"])
    before = f"{found['before']} " if found["before"] else ""
    return f"{before}{top}/{bottom}"


def _numbers(text: str) -> list[Fraction]:
    values = [_value(found) for found in _NUMBER.finditer(text)]
    return [value for value in values if value is not None]


def _value(found: re.Match[str]) -> Fraction | None:
    """Return the value of a match; None for a division by zero or a very long number."""
    if len(found[0]) > _MOST_CHARACTERS:
        return None
    try:
        if found["whole"]:
            value = int(found["whole"]) + Fraction(found["part"])
        else:
            top, bottom = (x.replace(",", "") for x in (found["top"], found["bottom"] or "1"))
            value = Fraction(top) / Fraction(bottom)
    except ZeroDivisionError:
        return None
    return -value if found["minus"] else value
