"""What happens to a prompt before an encoder reads it: frames per second and visual text (s3.1.4)."""

import math
import re

# As code points, since this file is ASCII. Marks whose two sides differ need no word boundary (Chinese and
# Japanese have no spaces), but for the closing English single one, which is also the apostrophe of don't.
_QUOTES = (
    r'(?<!\d)"([^"]+)"',  # after a digit it means inches: a 5" screen
    r"(?<!\w)'((?:(?!(?<!\w)').)+?)(?<!\s)'(?!\w)",  # around words, never inside or after one: don't, dogs'
    "\u201c([^\u201c\u201d]+)\u201d",  # English and Chinese
    "\u2018([^\u2018]+?)\u2019(?!\\w)",  # English, single
    "\u201e([^\u201e\u201c\u201d]+)[\u201c\u201d]",  # German and Polish
    "\u201a([^\u201a\u2018]+)\u2018",  # German, single
    "\u00ab([^\u00ab\u00bb]+)\u00bb",  # French
    "\u300c([^\u300c\u300d]+)\u300d",  # Japanese
    "\u300e([^\u300e\u300f]+)\u300f",
)
_QUOTED = re.compile("|".join(_QUOTES), re.DOTALL)


def with_fps(prompt, fps) -> str:
    """`FPS-16 ` and the prompt: how the model learns and is told the frame rate (s3.1.4).

    The rate is rounded to whole frames per second, so 23.976 and 24 are one word. ValueError if it is not
    positive.
    """
    if not math.isfinite(fps) or fps < 0.5:
        raise ValueError(
            f"{fps} frames per second cannot be a clip's rate: use a positive number, for example 16"
        )
    return f"FPS-{round(fps)} {prompt}".rstrip()


def quoted_text(prompt) -> str:
    """The visual text of a prompt: all that stands in quotation marks, joined by spaces; "" where none do.

    ByT5 alone reads it (s3.1.4). Straight and typographic marks count; apostrophes, inches and marks without
    a partner do not. Of nested quotes the outer text is taken, with the inner marks.
    """
    found = ("".join(group or "" for group in match.groups()).strip() for match in _QUOTED.finditer(prompt))
    return " ".join(text for text in found if text)
