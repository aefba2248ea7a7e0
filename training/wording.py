"""What is asked and answered in training, in words of this package's own. `{}` is the expression or its answer."""

import numpy as np

from ..processing_sa2va_i import IMAGE_TOKEN, SEG

VIDEO_QUESTIONS = (
    "Please segment {}.",
    "Segment {}.",
    "Can you segment {} in this video?",
    "Find {} in the video and segment it.",
    "Which pixels belong to {}? Answer with a segmentation mask.",
    "I am looking for {}. Please segment it in every frame.",
)
IMAGE_QUESTIONS = (
    "Please segment {}.",
    "Segment {}.",
    "Can you segment {} in this image?",
    "Find {} in the picture and segment it.",
    "Which pixels belong to {}? Answer with a segmentation mask.",
    "I am looking for {}. Please segment it.",
)
ANSWERS = (
    f"Sure, it is {SEG}.",
    f"It is {SEG}.",
    f"Here it is: {SEG}.",
    f"{SEG}.",
    f"This is the segmentation: {SEG}.",
    f"Of course. The mask is {SEG}.",
)
NAMED_ANSWER, NAMED_ANSWERS = f"It is {{}} {SEG}.", f"They are {{}} {SEG}."
DESCRIPTION_QUESTIONS = ("What happens in the video?", "Describe the video.", "What can be seen here?")


def question(random: np.random.Generator, expression: str, is_image: bool = False) -> str:
    """A request to segment `expression`."""
    return str(random.choice(IMAGE_QUESTIONS if is_image else VIDEO_QUESTIONS)).format(expression.strip().rstrip("."))


def answer(random: np.random.Generator) -> str:
    """An answer with one `[SEG]`."""
    return str(random.choice(ANSWERS))


def named_answer(names: list[str]) -> str:
    """An answer that says what it is before it points at it: "They are the red circle and the blue star [SEG].\""""
    if len(names) == 1:
        return NAMED_ANSWER.format(names[0])
    return NAMED_ANSWERS.format(", ".join(names[:-1]) + " and " + names[-1])


def with_image(random: np.random.Generator, text: str) -> str:
    """The first question of a conversation, `<image>` before it, with a line break or without."""
    return text if IMAGE_TOKEN in text else IMAGE_TOKEN + str(random.choice(["\n", ""])) + text


def turns_with_image(random: np.random.Generator, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(question, answer) turns, `<image>` in the first question."""
    (first, said), *rest = turns
    return [(with_image(random, first), said), *rest]
