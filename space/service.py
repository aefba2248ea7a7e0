"""What happens behind the page: questions of several visitors about their uploads, one after the other.

Nothing here knows Gradio. A visit is a key that the caller chooses; what belongs to it (its files, the encodings of its
video) is reached through that key alone and goes away with `forget`.
"""

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import staged_folder
from ..modeling_sa2va_i import EncodedVideo, Sa2VAiModel
from ..overlay import draw_overlay
from ..processing_sa2va_i import IMAGE_TOKEN, Video, segmentation_request
from .results import Files, files_in, writing
from .uploads import Limits, open_upload

MAX_ENCODED = 4  # visits whose video encodings are kept; beyond, the one longest unused is encoded again
MAX_KEPT_FRAMES = 200  # of which SAM 2's features are kept, for each of them: 1.7 GB with Hiera-L in bfloat16
MAX_QUESTION = 500  # characters
MAX_NEW_TOKENS = 256  # of an answer


@dataclass(frozen=True)
class Settings:
    """num_frames: sampled frames; num_prompt_frames: how many of their initial masks are propagated, None for all."""

    num_frames: int = 5
    num_prompt_frames: int | None = None
    decoding: str = "consistent"
    draft_only: bool = False


@dataclass(frozen=True)
class Update:
    """How far an answer is.

    stage: what is being done, for the visitor; done, total: of its steps.
    prediction, past_text: the answer, once it is there.
    num_objects: number of `[SEG]`.
    drafts: the sampled frames with their initial masks, and captions, as far as they are there.
    files: at the end, unless there is no object or only drafts were asked for.
    """

    stage: str
    done: int = 0
    total: int = 0
    prediction: str | None = None
    past_text: str = ""
    num_objects: int = 0
    drafts: tuple[tuple[Image.Image, str], ...] = ()
    files: Files | None = None


class Service:
    """Answers questions with one model. Files go into a temporary folder, which `close` removes.

    Args:
        model: in evaluation mode, on its device.
        limits: of uploads.
    """

    def __init__(self, model: Sa2VAiModel, limits: Limits | None = None):
        self.limits = limits or Limits()
        self._model = model
        self._root = Path(tempfile.mkdtemp(prefix="sa2va-i-demo-"))
        self._folders: dict[str, Path] = {}
        self._encoded: OrderedDict[str, tuple[Path, EncodedVideo]] = OrderedDict()

    def look_at(self, path: str | Path) -> str:
        """Facts about an upload in one line. Raises a ValueError with a message for the visitor."""
        media = open_upload(path, self.limits)
        if isinstance(media, Image.Image):
            return f"Photo, {media.width} x {media.height}"
        height, width = media.original_size
        return f"Video, {media.num_frames} frames, {media.num_frames / media.fps:.1f} s, {width} x {height}"

    def ask(
        self, visit: str, path: str | Path, question: str, past_text: str = "", settings: Settings | None = None
    ) -> Iterator[Update]:
        """Answer a question about an upload; each update takes the place of the one before.

        Stopping the iteration stops the work; nothing of it stays. Questions after the first, with the `past_text` of
        the last update, encode nothing again.

        Raises:
            ValueError: bad question or upload, with a message for the visitor.
        """
        settings = settings or Settings()
        question = question.strip()
        if not question:
            raise ValueError("Please type what to look for.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question)} characters; the limit is {MAX_QUESTION}.")
        if IMAGE_TOKEN in question:
            raise ValueError(f"{IMAGE_TOKEN} is put in by itself; please leave it out.")
        yield Update("Reading the upload")
        media = self._media(visit, Path(path))
        if isinstance(media, Image.Image):
            yield from self._ask_photo(visit, media, question, past_text)
        else:
            yield from self._ask_video(visit, media, question, past_text, settings)

    def forget(self, visit: str) -> None:
        """Remove all that belongs to a visit."""
        self._encoded.pop(visit, None)
        folder = self._folders.pop(visit, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        self._encoded.clear()
        self._folders.clear()
        shutil.rmtree(self._root, ignore_errors=True)

    def _ask_photo(self, visit: str, photo: Image.Image, question: str, past_text: str) -> Iterator[Update]:
        yield Update("Looking and answering")
        text = segmentation_request(question)
        result = self._model.predict_forward(image=photo, text=text, past_text=past_text, max_new_tokens=MAX_NEW_TOKENS)
        update = Update(
            "Done",
            prediction=result["prediction"],
            past_text=result["past_text"],
            num_objects=len(result["prediction_masks"]),
        )
        if update.num_objects:
            folder = self._new_folder(visit)
            with staged_folder(folder) as staged, writing(staged, update.num_objects, fps=None) as writer:
                writer.write(0, photo, np.concatenate(result["prediction_masks"]))
            update = replace(update, files=files_in(folder, fps=None))
        yield update

    def _ask_video(
        self, visit: str, video: EncodedVideo, question: str, past_text: str, settings: Settings
    ) -> Iterator[Update]:
        yield Update(f"Looking at {min(settings.num_frames, video.num_frames)} frames and answering")
        segmentation = self._model.segment(
            video,
            question,
            past_text=past_text,
            sample_num_frames=settings.num_frames,
            max_prompt_frames=settings.num_prompt_frames,
            decoding=settings.decoding,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        update = Update(
            "Done",
            prediction=segmentation.prediction,
            past_text=segmentation.past_text,
            num_objects=segmentation.num_objects,
        )
        if not update.num_objects:
            yield update
            return
        sampled = dict(zip(segmentation.sample_idx, video.frames_at(segmentation.sample_idx), strict=True))
        update = replace(update, stage="Drawing initial masks", total=len(sampled))
        yield update
        for frame_idx, masks in segmentation.initial_masks():
            draft = (draw_overlay(sampled[frame_idx], masks), f"Frame {frame_idx}")
            update = replace(update, drafts=(*update.drafts, draft), done=update.done + 1)
            yield update
        if not settings.draft_only:
            folder = self._new_folder(visit)
            update = replace(update, stage="Tracking", done=0, total=video.num_frames)
            with staged_folder(folder) as staged, writing(staged, update.num_objects, video.fps) as writer:
                for frame, (frame_idx, masks) in zip(video, segmentation, strict=True):
                    writer.write(frame_idx, frame, masks)
                    yield replace(update, done=frame_idx + 1)
            update = replace(update, files=files_in(folder, video.fps))
        yield replace(update, stage="Done", done=0, total=0)

    def _media(self, visit: str, path: Path) -> EncodedVideo | Image.Image:
        """The upload; a video that was asked about before comes with what was encoded of it."""
        if visit in self._encoded and self._encoded[visit][0] == path:
            self._encoded.move_to_end(visit)
            return self._encoded[visit][1]
        media = open_upload(path, self.limits)
        if not isinstance(media, Video):
            return media
        video = self._model.encode_video(media, MAX_KEPT_FRAMES)
        self._encoded[visit] = (path, video)
        self._encoded.move_to_end(visit)
        while len(self._encoded) > MAX_ENCODED:
            self._encoded.popitem(last=False)
        return video

    def _new_folder(self, visit: str) -> Path:
        """A folder that is not there yet, for one answer."""
        if visit not in self._folders:
            self._folders[visit] = Path(tempfile.mkdtemp(dir=self._root))
        return Path(tempfile.mkdtemp(dir=self._folders[visit]))
