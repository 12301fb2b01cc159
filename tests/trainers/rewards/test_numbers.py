"""Numbers are read exactly, whatever their formatting, and different numbers never agree."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_svf.playground import generate_problems
from peft_svf.trainers.rewards import number_reward
from peft_svf.trainers.rewards.number_answer import stated_numbers
from peft_svf.trainers.rewards.numbers import Quantity, find_numbers, parse_number, plain


quick = settings(max_examples=120, deadline=None, derandomize=True)
decimals = st.tuples(st.integers(-(10**12), 10**12), st.integers(0, 5)).map(lambda p: Fraction(p[0], 10 ** p[1]))


def decimal(value: Fraction, separator: str = "") -> str:
    """The finite decimal expansion, with `separator` between groups of three digits."""
    places = next(p for p in range(12) if (value * 10**p).denominator == 1)
    digits = str(abs(value.numerator * 10**places // value.denominator)).rjust(places + 1, "0")
    whole = f"{int(digits[: len(digits) - places]):,}".replace(",", separator)
    return ("-" if value < 0 else "") + whole + (f".{digits[len(digits) - places :]}" if places else "")


STYLES = {
    "bare": decimal,
    "commas": lambda v: decimal(v, ","),
    "latex commas": lambda v: decimal(v, "{,}"),
    "thin commas": lambda v: decimal(v, r",\!"),
    "spaces": lambda v: decimal(v, " "),
    "thin spaces": lambda v: decimal(v, r"\,"),
    "no-break spaces": lambda v: decimal(v, "\u202f"),
    "real minus": lambda v: decimal(v, ",").replace("-", "−"),
    "dollars": lambda v: decimal(v, ",").replace("-", "-$", 1) if v < 0 else "$" + decimal(v, ","),
    "latex dollars": lambda v: r"\$" + decimal(v),
    "euros": lambda v: decimal(v, ",") + " €",
    "bold": lambda v: f"**{decimal(v, ',')}**",
    "inline math": lambda v: rf"\({decimal(v)}\)",
    "dollar math": lambda v: f"${decimal(v)}$",
    "sentence end": lambda v: decimal(v, ",") + ".",
    "apples": lambda v: decimal(v, ",") + " apples",
    "text unit": lambda v: decimal(v) + r"\text{ cm}",
    "speed": lambda v: decimal(v) + " km/h",
    "percent": lambda v: decimal(v) + r"\%",
    "fraction": lambda v: f"{v.numerator}/{v.denominator}",
    "latex fraction": lambda v: rf"\frac{{{v.numerator}}}{{{v.denominator}}}",
    "sign before": lambda v: ("-" if v < 0 else "") + rf"\dfrac{{{abs(v.numerator)}}}{{{v.denominator}}}",
    "scientific": lambda v: (
        decimal(v / 10**6 if v.denominator == 1 else v * 10**6) + ("e6" if v.denominator == 1 else "e-6")
    ),
    "times ten": lambda v: decimal(v * 10**6) + r" \times 10^{-6}",
    "in words": lambda v: decimal(v).replace("-", "negative "),
}


@pytest.mark.parametrize("style", STYLES)
@given(value=decimals)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_every_style_of_a_number_reads_back_exactly(style: str, value: Fraction) -> None:
    read = parse_number(STYLES[style](value))
    assert read is not None
    assert read.value == value


@given(decimals, decimals, st.sampled_from(sorted(STYLES)), st.sampled_from(sorted(STYLES)))
@quick
def test_different_numbers_never_agree_without_percent(
    one: Fraction, other: Fraction, style: str, gold_style: str
) -> None:
    stated, gold = parse_number(STYLES[style](one)), parse_number(STYLES[gold_style](other))
    assert stated is not None and gold is not None
    if not (stated.percent or gold.percent) and one != other:
        assert not stated.equals(gold)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500))
@quick
def test_mixed_numbers_read_back(whole: int, top: int, extra: int) -> None:
    bottom = top + extra
    value = whole + Fraction(top, bottom)
    for text in (rf"{whole}\frac{{{top}}}{{{bottom}}}", f"{whole} {top}/{bottom}", f"{whole} and {top}/{bottom}"):
        assert parse_number(text) == Quantity(value)
        assert parse_number(f"-{text}") == Quantity(-value)


@given(
    st.text()
    | st.text("0123456789,.-+/ \\${}^%()frac*e×", max_size=60)
    | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape"))
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_reading_never_raises(text: str) -> None:
    parse_number(text)
    list(find_numbers(plain(text)))


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("$2,500.00", 2500, "dollar"), (r"\$16,\!386.16", Fraction(1638616, 100), "dollar"), ("US$5", 5, "dollar"),
        ("-$0.50", Fraction(-1, 2), "dollar"), ("$-0.50", Fraction(-1, 2), "dollar"), ("5 bucks", 5, "dollar"),
        ("3½", Fraction(7, 2), ""), ("½ cup", Fraction(1, 2), "cup"), (r"\frac 54", Fraction(5, 4), ""),
        (r"6\frac15", Fraction(31, 5), ""), (".5", Fraction(1, 2), ""), ("10⁶", 10**6, ""),
        ("2 million", 2 * 10**6, ""), (r"39^\circ", 39, "degree"), ("20°", 20, "degree"),
        (r"864 \mbox{ inches}^2", 864, "inch^2"), (r"12\text{ square units}", 12, "unit^2"),
        (r"9\text{ a.m.}", 9, "a.m."), (r"\text{13}", 13, ""), (r"18\text{ ways.}", 18, ""),
        (r"11,\! 111,\! 111,\! 100", 11111111100, ""), (r"\frac{12}{5,\!525}", Fraction(12, 5525), ""),
        ("- 3", -3, ""), ("minus 3", -3, ""), ("(3)", 3, ""), ("2 125", 2125, ""),
    ],
)  # fmt: skip
def test_reads(text: str, value: Fraction, unit: str) -> None:
    assert parse_number(text) == Quantity(Fraction(value), unit=unit)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "two", "2x", "2 x", r"2\pi", "2i", "5!", "5²", "2^{10}", "2112_6", "12:30", "3:1", "1,5", "0,125",
        "1,2345", "12,34", "3 or 4", "3, 4", "5 - 3", "16 -3", "3*4", r"3 \cdot 4", "3rd", "5k", "42 ab", "3-4",
        "3 and a half", "1/0", r"\frac{1}{0}", "3 4/2", "1e999999", "9" * 401, "9" * 100_000, "x = 5", "(1,234)",
        "٣", "\x00", "\ud800", "{" * 1000, "1.2.3", "3 squared", "1/2/3", "NaN", "inf", "0x10", "1_000",
    ]
)  # fmt: skip
def test_what_is_no_single_number_is_not_read_as_one(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("stated", "gold", "equal"),
    [
        ("50%", r"50\%", True), ("50 percent", r"50\%", True), ("50", r"50\%", True), ("50%", "50", True),
        ("50%", r"\frac{1}{2}", True), ("50%", "0.5", True), ("0.5", r"50\%", False), ("5000", r"50\%", False),
        ("5000%", "50", False), ("0.5%", "50", False), ("0.5%", "0.5", False), ("0.5%", r"\frac{1}{2}", False),
        ("50", "0.5", False), ("0.5", "50", False), ("100%", "1", False), ("3 m", "3 cm", False),
        ("3 cm", "3", True), ("3", "3 cm", True), ("3 centimeters", r"3\text{ cm}", True),
        ("9 p.m.", r"9\text{ a.m.}", False), ("50 cents", r"\$50", False), ("5 widgets", r"5\text{ meals}", True),
    ],
)  # fmt: skip
def test_units_and_percent(stated: str, gold: str, equal: bool) -> None:
    one, other = parse_number(stated), parse_number(gold)
    assert one is not None and other is not None
    assert one.equals(other) is equal


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("3+8=11, 2+1+1=4, so 41", 41),
        ("2+1=3, so 31 apples.", 31),
        ("3*4=12, thus, $13", 13),
        ("5*3=15, so 3 boxes hold 15", 15),  # the conclusion does not begin with its number
        ("5*3=15, so not 16", 15),
    ],
)
def test_a_conclusion_after_an_equation_is_the_answer(completion: str, value: int) -> None:
    assert [quantity.value for quantity in stated_numbers(completion)] == [value]


def test_the_careful_answers_of_the_playground_are_read_as_they_are_meant() -> None:
    for problem in generate_problems("math", "test", 50):
        assert number_reward([problem.careful], answer=[problem.answer]) == [1.0]
