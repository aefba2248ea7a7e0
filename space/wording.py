"""Answers and progress as HTML. All text of visitors and models is escaped here."""

import re
from collections.abc import Sequence
from html import escape

from ..overlay import object_color
from ..processing_sa2va_i import SEG
from .service import Update

PHRASE = re.compile(rf"<p>(?P<phrase>.*?)</p>\s*{re.escape(SEG)}|{re.escape(SEG)}", re.DOTALL)
CONTROL_TOKEN = re.compile(r"<\|[^|]*\|>|</?(?:s|p|vp|img)>")


def answer_html(prediction: str) -> str:
    """The answer; each `[SEG]`, with the phrase that it closes, as a mark in the colour of its object."""
    pieces, number, end = [], 0, 0
    for match in PHRASE.finditer(prediction):
        pieces.append(_plain(prediction[end : match.start()]))
        pieces.append(_mark(number, match["phrase"]))
        number, end = number + 1, match.end()
    pieces.append(_plain(prediction[end:]))
    return "".join(pieces).strip()


def conversation_html(turns: Sequence[tuple[str, str]]) -> str:
    """Turns of (question, answer HTML)."""
    return "".join(
        f'<p class="question">{escape(question)}</p><p class="answer">{answer}</p>' for question, answer in turns
    )


def progress_html(update: Update) -> str:
    """What is being done, with a bar where its length is known."""
    if not update.total:
        return f'<div class="stage" role="status">{escape(update.stage)}</div>'
    label = f"{escape(update.stage)} {update.done} of {update.total}"
    bar = f'<progress value="{update.done}" max="{update.total}"></progress>'
    return f'<div class="stage" role="status">{label}{bar}</div>'


def error_html(message: str) -> str:
    return f'<div class="stage error" role="alert">{escape(message)}</div>'


def _plain(text: str) -> str:
    return escape(CONTROL_TOKEN.sub("", text))


def _mark(number: int, phrase: str | None) -> str:
    red, green, blue = object_color(number)
    ink = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#fff"
    label = str(number + 1) if phrase is None else f"{number + 1} {escape(phrase.strip())}"
    return f'<mark style="background:rgb({red},{green},{blue});color:{ink}">{label}</mark>'
