"""The page: a Gradio app over `Service`."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..processing_sa2va_i import is_image_file
from .results import Files
from .service import Service, Settings, Update
from .wording import answer_html, conversation_html, error_html, progress_html

logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_QUESTIONS = (
    ("shapes.mp4", "the circle moving right"),
    ("shapes.mp4", "all red shapes"),
)
QUEUE_LENGTH = 20
MINUTE = 60  # seconds
TITLE = "Sa2VA-i: say what to find in a video, get its masks"
STYLE = """
.question { font-weight: 600; margin: .8em 0 .2em; }
.answer { margin: 0 0 .4em; }
.answer mark { border-radius: .3em; padding: .05em .45em; }
.stage { padding: .4em 0; }
.stage progress { display: block; width: 100%; height: .5em; margin-top: .4em; accent-color: var(--color-accent); }
.error { color: var(--error-text-color, #b91c1c); }
footer { display: none !important; }
"""

Turn = tuple[str, str]
Wrapper = Callable[[Callable[..., Iterator[Update]]], Callable[..., Iterator[Update]]]


def build_page(service: Service, about: str, on_gpu: Wrapper = lambda ask: ask) -> gr.Blocks:
    """The page, with its queue.

    Args:
        about: one line of Markdown on the model.
        on_gpu: wraps the function that runs the model (`spaces.GPU` on ZeroGPU, whose worker takes plain values alone).
    """
    ask = on_gpu(service.ask)

    def look_at(path: str | None) -> tuple[Any, ...]:
        """A new upload: what it is, and everything of the one before away."""
        cleared = ("", [], "", *_overlays(None), gr.Gallery(None, visible=False), *_downloads(None))
        if path is None:
            return (*_previews(None), progress_html(Update("")), *cleared)
        try:
            facts = service.look_at(path)
        except Exception as error:
            return (*_previews(None), error_html(_message(error)), *cleared)
        return (*_previews(path), progress_html(Update(facts)), *cleared)

    def answering(draft_only: bool) -> Callable[..., Iterator[tuple[Any, ...]]]:
        def answer(
            path: str | None,
            question: str,
            turns: list[Turn],
            past_text: str,
            num_frames: int,
            num_prompt_frames: int,
            decoding: str,
            request: gr.Request,
        ) -> Iterator[tuple[Any, ...]]:
            """Updates as values of the outputs; the conversation grows by a turn when its answer is there."""
            settings = Settings(int(num_frames), int(num_prompt_frames) or None, decoding, draft_only)
            shown = _Shown(turns, past_text)
            yield shown.values(Update("Waiting"), question)
            try:
                if path is None:
                    raise ValueError("Please drop in a video or a photo first.")
                for update in ask(request.session_hash, path, question, past_text, settings):
                    yield shown.values(update, question)
            except Exception as error:
                yield shown.error(_message(error))

        return answer

    def leave(request: gr.Request) -> None:
        service.forget(request.session_hash)

    # uploads and results are removed an hour after they were made
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(10 * MINUTE, 60 * MINUTE)) as page:
        gr.Markdown(f"# Sa2VA-i\nSay what to find in a video, get its masks. {about}")
        turns, past_text = gr.State([]), gr.State("")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                upload = gr.File(label="Video or photo", file_types=["video", "image"], elem_id="upload", height=120)
                video_preview = gr.Video(visible=False, interactive=False, show_label=False, height=260, buttons=[])
                photo_preview = gr.Image(visible=False, interactive=False, show_label=False, height=260, buttons=[])
                question = gr.Textbox(
                    label="What to find", placeholder="the dog that jumps first", max_length=500, elem_id="question"
                )
                with gr.Row():
                    segment = gr.Button("Segment", variant="primary", elem_id="segment", scale=2, min_width=90)
                    draft = gr.Button("Draft", elem_id="draft", min_width=70)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=70)
                with gr.Accordion("Settings", open=False):
                    num_frames = gr.Slider(1, 12, 5, step=1, label="Sampled frames", info="Seen by the language model.")
                    num_prompt_frames = gr.Slider(
                        0, 12, 0, step=1, label="Prompt frames", info="Initial masks that are tracked; 0: all."
                    )
                    decoding = gr.Radio(
                        ["consistent", "memory"], value="consistent", label="Decoding", info="memory: Sa2VA before it."
                    )
            with gr.Column(scale=3, min_width=320):
                status = gr.HTML(progress_html(Update("")), elem_id="status")
                conversation = gr.HTML("", elem_id="conversation")
                overlay_video = gr.Video(
                    label="Masks", visible=False, autoplay=True, loop=True, elem_id="overlay", buttons=[]
                )
                overlay_photo = gr.Image(label="Masks", visible=False, buttons=["fullscreen"])
                drafts = gr.Gallery(
                    label="Initial masks",
                    visible=False,
                    columns=5,
                    height=170,
                    object_fit="contain",
                    elem_id="drafts",
                    buttons=[],
                )
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(label, visible=False, size="sm", min_width=90, elem_id=f"download-{name}")
                        for label, name in (
                            ("↓ Overlay", "overlay"),
                            ("↓ PNG masks", "masks"),
                            ("↓ RLE masks", "codes"),
                        )
                    ]
        gr.Examples([[str(EXAMPLES / name), text] for name, text in EXAMPLE_QUESTIONS], [upload, question])
        gr.Markdown(f"Limits: {service.limits}. Up to {QUEUE_LENGTH} questions wait. Uploads are removed after use.")
        outputs = [status, conversation, turns, past_text, overlay_video, overlay_photo, drafts, *downloads]
        inputs = [upload, question, turns, past_text, num_frames, num_prompt_frames, decoding]
        cleared = [conversation, turns, past_text, overlay_video, overlay_photo, drafts, *downloads]
        runs = [
            gr.on(
                triggers,
                answering(draft_only),
                inputs,
                outputs,
                show_progress="hidden",
                api_name=name,
                concurrency_limit=1,
                concurrency_id="model",
            )
            for triggers, draft_only, name in (
                ([segment.click, question.submit], False, "segment"),
                ([draft.click], True, "draft"),
            )
        ]
        upload.change(
            look_at,
            upload,
            [video_preview, photo_preview, status, *cleared],
            cancels=runs,
            show_progress="hidden",
            api_name="look_at",
        )
        stop.click(None, cancels=runs)
        stop.click(lambda: progress_html(Update("Stopped")), None, status, show_progress="hidden", queue=False)
        page.unload(leave)
    return page.queue(max_size=QUEUE_LENGTH)


class _Shown:
    """What the outputs show of one question: the conversation before it, and how far its answer is.

    What did not change since the last update is not sent again.
    """

    def __init__(self, turns: list[Turn], past_text: str):
        self._turns, self._past_text = turns, past_text
        self._last: Update | None = None

    def values(self, update: Update, question: str) -> tuple[Any, ...]:
        last, self._last = self._last, update
        stage = update
        if update.prediction is not None and not update.num_objects:
            stage = Update("The answer points at nothing, so there are no masks.")
        return (
            progress_html(stage),
            *(
                self._conversation(update, question)
                if last is None or last.prediction != update.prediction
                else _skip(3)
            ),
            *(_overlays(update.files) if last is None or last.files != update.files else _skip(2)),
            self._drafts(update) if last is None or len(last.drafts) != len(update.drafts) else gr.skip(),
            *(_downloads(update.files) if last is None or last.files != update.files else _skip(3)),
        )

    def error(self, message: str) -> tuple[Any, ...]:
        return (error_html(message), *_skip(9))

    def _conversation(self, update: Update, question: str) -> tuple[str, list[Turn], str]:
        if update.prediction is None:
            return conversation_html(self._turns), self._turns, self._past_text
        turns = [*self._turns, (question, answer_html(update.prediction))]
        return conversation_html(turns), turns, update.past_text

    @staticmethod
    def _drafts(update: Update) -> gr.Gallery:
        return gr.Gallery(list(update.drafts), visible=bool(update.drafts))


def _message(error: Exception) -> str:
    """What a visitor is told of an error; what is not their doing goes to the log alone."""
    if isinstance(error, ValueError):
        return str(error)
    logger.error("A request failed.", exc_info=error)
    return "Something went wrong with this request; nothing else is affected. Please try again."


def _skip(number: int) -> list[Any]:
    return [gr.skip()] * number


def _previews(path: str | None) -> tuple[gr.Video, gr.Image]:
    is_photo = path is not None and is_image_file(path)
    is_video = path is not None and not is_photo
    return gr.Video(path if is_video else None, visible=is_video), gr.Image(
        path if is_photo else None, visible=is_photo
    )


def _overlays(files: Files | None) -> tuple[gr.Video, gr.Image]:
    return _previews(None if files is None else str(files.overlay))


def _downloads(files: Files | None) -> list[gr.DownloadButton]:
    paths = (None,) * 3 if files is None else (str(files.overlay), str(files.masks), str(files.codes))
    return [gr.DownloadButton(value=path, visible=path is not None) for path in paths]


def start(page: gr.Blocks, service: Service, **options) -> str:
    """Serve the page from threads of its own; returns its address.

    Args:
        options: for Gradio's `launch`: `server_name`, `server_port`, `inbrowser`, ...
    """
    _, address, _ = page.launch(
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        max_file_size=service.limits.num_bytes,
        allowed_paths=[str(EXAMPLES)],
        footer_links=[],
        ssr_mode=False,
        show_error=False,
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    return address


def serve(page: gr.Blocks, service: Service, **options) -> None:
    """`start`, until the process is told to stop; then everything that visitors left is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # else the process ends without cleaning up
    try:
        print(f"Sa2VA-i is at {start(page, service, **options)} (Ctrl+C stops it)", flush=True)
        page.block_thread()
    finally:
        service.close()
