"""Frame rate and visual text of prompts (Movie Gen s3.1.4). Marks are code points, as the files are ASCII."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_moviegen.prompts import quoted_text, with_fps

CASES = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ('a neon sign that reads "OPEN"', "OPEN"),
        ("a shop called 'Open Late', at night", "Open Late"),
        ("a \u201cGrand Hotel\u201d at dusk", "Grand Hotel"),
        ("a \u2018Grand Hotel\u2019 at dusk", "Grand Hotel"),
        ("ein Schild: \u201eZum Hirsch\u201c.", "Zum Hirsch"),
        ("une enseigne \u00ab Caf\u00e9 \u00bb", "Caf\u00e9"),
        ("\u770b\u677f\u300c\u55b6\u696d\u4e2d\u300d\u306e", "\u55b6\u696d\u4e2d"),
        ("\u5199\u7740\u201c\u4f60\u597d\u201d\u7684\u724c\u5b50", "\u4f60\u597d"),
        ('\u5199\u7740"\u4f60\u597d"\u7684\u724c\u5b50', "\u4f60\u597d"),
        ('two doors, "IN" and "OUT"', "IN OUT"),
        ('"Hello, world!" on a cake', "Hello, world!"),
        ('a plate "Route 66" on a wall', "Route 66"),
        ('a banner "party \U0001f389"', "party \U0001f389"),
    ],
)
def test_text_in_quotation_marks_is_found(prompt, expected):
    assert quoted_text(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle moves to the right",
        "",
        "a dog's toy that doesn't squeak",
        "the dogs' bowls and the cats' beds",
        "a dog\u2019s toy that doesn\u2019t squeak",
        "'tis winter in the '90s, isn't it",
        'a 5" screen on a 6\'2" stand',
        'a sign "OPEN',
        "a sign 'OPEN",
        "a sign \u201cOPEN",
        'a sign OPEN"',
        'nothing "" between',
        "nothing '   ' between",
    ],
)
def test_what_is_no_quotation_is_left_alone(prompt):
    assert quoted_text(prompt) == ""


def test_apostrophes_inside_a_quotation_do_not_end_it():
    assert quoted_text("a sign 'Don't walk' blinks") == "Don't walk"
    assert quoted_text("a sign \u2018Don\u2019t walk\u2019 blinks") == "Don\u2019t walk"
    assert quoted_text("the owner's sign \"Joe's Bar\"") == "Joe's Bar"


def test_a_mark_without_a_partner_does_not_hide_a_later_quotation():
    assert quoted_text("an '80s style 'NEON' sign") == "NEON"
    assert quoted_text('a 5" screen that shows "HI"') == "HI"
    assert quoted_text('"IN" and "OUT') == "IN"


def test_the_outer_of_nested_quotations_is_taken():
    assert quoted_text("a page: \u201cshe said \u2018no\u2019 twice\u201d") == "she said \u2018no\u2019 twice"


@CASES
@given(prompt=st.text(alphabet=st.characters(), max_size=40))
def test_any_text_is_safe_and_quoted_text_stands_in_the_prompt(prompt):
    for piece in quoted_text(prompt).split():
        assert piece in prompt


@CASES
@given(
    before=st.text(alphabet="abc d\u00e9\U0001f600", max_size=10),
    inside=st.text(alphabet="abc d\u00e9'\U0001f600", min_size=1, max_size=10).filter(str.strip),
)
def test_whatever_stands_between_double_marks_is_returned(before, inside):
    assert quoted_text(f'{before} "{inside}" {before}') == inside.strip()


def test_frames_per_second_lead_the_prompt():
    assert with_fps("a red circle", 16) == "FPS-16 a red circle"
    assert with_fps("a red circle", 16.0) == "FPS-16 a red circle"
    assert with_fps("a red circle", 24000 / 1001) == "FPS-24 a red circle"
    assert with_fps("", 24) == "FPS-24"


@pytest.mark.parametrize("fps", [0, -16, float("nan"), float("inf")])
def test_an_impossible_frame_rate_is_refused(fps):
    with pytest.raises(ValueError, match="frames per second"):
        with_fps("a red circle", fps)
