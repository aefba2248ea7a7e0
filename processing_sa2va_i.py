"""What Sa2VA-i sees and reads: prompt text, image tiles, sampled frames, SAM 2 frames, and videos from any source.

The numbers follow the original preprocessing (kumuji/Sa2VA-i, bytedance/Sa2VA): PIL's bicubic resize to 448 px and the
ImageNet mean and std for the language model, to 1024 px and the rounded mean and std for SAM 2.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import is_av_available, requires_backends

if is_av_available():
    import av

Item = TypeVar("Item")

IMAGE_TOKEN = "<image>"  # where the frames or the image stand in the caller's text
IMG_START, IMG_CONTEXT, IMG_END = "<img>", "<IMG_CONTEXT>", "</img>"
REGION_START, REGION_END = "<vp>", "</vp>"
SEG = "[SEG]"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The original rounds SAM 2's mean and std to bfloat16 even when the model is float32; kept, for the same masks.
SAM2_MEAN = (0.484375, 0.455078125, 0.40625)
SAM2_STD = (0.228515625, 0.2236328125, 0.224609375)

# Not all that Pillow can open: .gif and .mpg are videos here
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True)
class Template:
    """One turn of a chat. `instruction` wraps the text, `end` closes the answer; either may end the generation."""

    instruction: str
    end: str
    stop_words: tuple[str, ...]


TEMPLATES = {
    "qwen_chat": Template(
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", ("<|im_end|>", "<|endoftext|>")
    ),
    "internlm2_chat": Template(
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", ("<|im_end|>",)
    ),
    "phi3_chat": Template("<|user|>\n{text}<|end|>\n<|assistant|>\n", "<|end|>", ("<|end|>",)),
}


# Sampling frames


def uniform_frame_indices(num_frames: int, num_samples: int) -> list[int]:
    """Up to `num_samples` frame indices spread evenly over a video, first and last included, increasing.

    The rule of the original, except that a video shorter than `num_samples` gives each frame once instead of
    repeating indices. One sample is the first frame.
    """
    return np.unique(np.linspace(0, num_frames - 1, num_samples, dtype=int)).tolist()


def first_frame_indices(num_frames: int, num_samples: int) -> list[int]:
    """The first `num_samples` frame indices, or all of a shorter video (the original Sa2VA)."""
    return list(range(min(num_frames, num_samples)))


SAMPLERS = {"uniform": uniform_frame_indices, "first": first_frame_indices}


def check_sample_idx(sample_idx: Sequence[int], num_frames: int) -> list[int]:
    """The caller's own sampled frames, increasing and each once. Raises a ValueError where one is not in the video."""
    indices = [int(idx) for idx in sample_idx]
    outside = [idx for idx in indices if not 0 <= idx < num_frames]
    if not indices or outside:
        raise ValueError(
            f"`sample_idx` must name at least one frame, each in 0..{num_frames - 1}. Got {outside or 'none'}."
        )
    return sorted(set(indices))


# Images


def tile_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """(columns, rows) of the grid of `min_tiles`..`max_tiles` tiles nearest to the image's aspect ratio (InternVL).

    Of grids equally near, the larger is taken if the image has more than half as many pixels as its tiles.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles + 1)
        if min_tiles <= columns * rows <= max_tiles
    ]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, best_distance = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        fills_tiles = width * height > 0.5 * tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and fills_tiles):
            best, best_distance = (columns, rows), distance
    return best


def split_into_tiles(
    image: Image.Image, min_tiles: int, max_tiles: int, tile_size: int, use_thumbnail: bool
) -> list[Image.Image]:
    """Square tiles of the image, row by row; a thumbnail of the whole is the last where there are several."""
    columns, rows = tile_grid(*image.size, min_tiles, max_tiles, tile_size)
    resized = image.resize((columns * tile_size, rows * tile_size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((x, y, x + tile_size, y + tile_size))
        for y in range(0, rows * tile_size, tile_size)
        for x in range(0, columns * tile_size, tile_size)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles


def to_pixel_values(images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, size, size) float32: resized (bicubic, aspect ratio not kept), scaled to [0, 1] and normalised."""
    arrays = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def is_image_file(path: str | Path) -> bool:
    """Whether a file is an image by its name: everything else is taken for a video."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def load_image(image: Image.Image | str | Path | np.ndarray) -> Image.Image:
    """RGB image from a PIL image, a file, or a (height, width, 3) uint8 array.

    A file is turned upright if its EXIF data say so; a PIL image is taken as it lies.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, Path)):
        return _read_image(Path(image))
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"An image array must be (height, width, 3) uint8. Got {array.shape} {array.dtype}.")
    return Image.fromarray(array)


def _open_image(path: Path) -> Image.Image:
    """The image as it is stored, without its pixels: PIL decodes it when they are asked for."""
    if not path.is_file():
        raise FileNotFoundError(f"No image file at {path}.")
    try:
        return Image.open(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _read_image(path: Path) -> Image.Image:
    with _open_image(path) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} is broken or truncated: {error}") from error


# Videos


class Video:
    """A video as Sa2VA-i reads it: its size, and its frames in order or by index, one at a time.

    `num_frames` (int), `original_size` (height, width) and `fps` are known before any frame is kept.
    """

    fps: float = 10.0  # of a video that is only frames
    num_frames: int
    original_size: tuple[int, int]

    def __iter__(self) -> Iterator[Image.Image]:
        """Every frame in order, RGB, decoded as it is asked for."""
        raise NotImplementedError

    def frames_at(self, indices: Sequence[int]) -> list[Image.Image]:
        """The frames at increasing `indices`, RGB."""
        raise NotImplementedError


class FrameList(Video):
    """A video given as frames: PIL images, image files, or a (T, height, width, 3) uint8 array."""

    def __init__(self, frames: Sequence):
        if len(frames) == 0:
            raise ValueError("The video has no frames; give at least one.")
        self._frames = frames
        self.num_frames = len(frames)
        sizes = [self._size_of(frame) for frame in frames]
        self.original_size = sizes[0]
        for frame_idx, size in enumerate(sizes):
            if size != self.original_size:
                raise ValueError(
                    f"All frames must have one size. Got (height, width) {self.original_size} for frame 0 and {size} "
                    f"for frame {frame_idx}."
                )

    def __iter__(self) -> Iterator[Image.Image]:
        return (load_image(frame) for frame in self._frames)

    def frames_at(self, indices: Sequence[int]) -> list[Image.Image]:
        return [load_image(self._frames[idx]) for idx in indices]

    @staticmethod
    def _size_of(frame: Image.Image | str | Path | np.ndarray) -> tuple[int, int]:
        if isinstance(frame, (str, Path)):
            with _open_image(Path(frame)) as image:
                width, height = image.size[::-1] if _lies_on_its_side(image) else image.size
        elif isinstance(frame, Image.Image):
            width, height = frame.size
        else:
            height, width = np.shape(frame)[:2]
        return height, width


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether `ImageOps.exif_transpose` would swap its width and height."""
    return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


class VideoFile(Video):
    """A video file, decoded by PyAV frame by frame, every time anew; no frame is kept.

    Opening it decodes it once, without converting a pixel: containers do not tell the number of frames reliably, and a
    truncated or broken file is found before any model runs.
    """

    def __init__(self, path: str | Path):
        requires_backends(self, ["av"])
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"No video file at {self.path}.")
        with self._open() as container:
            stream = container.streams.video[0]
            promised = stream.frames  # 0 where the container does not say
            self.fps = float(stream.average_rate or 25)
        self.num_frames, self.original_size = self._scan()
        if self.num_frames < promised:
            raise ValueError(
                f"The video {path} is truncated: it should have {promised} frames and ends at frame {self.num_frames}."
            )

    def __iter__(self) -> Iterator[Image.Image]:
        for frame in self._decode():
            yield _upright(frame)

    def frames_at(self, indices: Sequence[int]) -> list[Image.Image]:
        wanted, last = set(indices), max(indices)
        frames = []
        for frame_idx, frame in enumerate(self._decode()):
            if frame_idx in wanted:
                frames.append(_upright(frame))
            if frame_idx == last:
                break
        return frames

    def _scan(self) -> tuple[int, tuple[int, int]]:
        num_frames, size = 0, None
        for frame in self._decode():
            frame_size = _upright_size(frame)
            size = size or frame_size
            if frame_size != size:
                raise ValueError(
                    f"All frames must have one size. Got (height, width) {size} for frame 0 of {self.path} and "
                    f"{frame_size} for frame {num_frames}."
                )
            num_frames += 1
        if num_frames == 0:
            raise ValueError(f"The video {self.path} has no frames.")
        return num_frames, size

    def _decode(self) -> Iterator["av.VideoFrame"]:
        num_decoded = 0
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            frames = container.decode(video=0)
            while True:
                try:
                    frame = next(frames, None)
                except av.FFmpegError as error:
                    raise ValueError(
                        f"The video {self.path} cannot be decoded at frame {num_decoded}: {error}"
                    ) from error
                if frame is None:
                    return
                if frame.is_corrupt:
                    raise ValueError(f"The video {self.path} is broken at frame {num_decoded}.")
                yield frame
                num_decoded += 1

    def _open(self) -> "av.container.InputContainer":
        try:
            container = av.open(str(self.path))
        except av.FFmpegError as error:
            raise ValueError(f"{self.path} cannot be read as a video: {error.strerror}") from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self.path} has no video stream.")
        return container


def _upright(frame: "av.VideoFrame") -> Image.Image:
    """RGB image, turned as the file says players should turn it (phones store upright videos lying)."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _upright_size(frame: "av.VideoFrame") -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def open_video(video: "Video | Sequence | np.ndarray | str | Path") -> Video:
    """A `Video` from a path (a video file or a folder of frames), a list of PIL images or of image files, or an array.

    A folder's images are taken in natural order (`2.jpg` before `10.jpg`).

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: no frames, frames of different sizes, an array that is not (T, height, width, 3) uint8, or a file
            that is no video, broken or truncated (the message names the frame).
    """
    if isinstance(video, Video):
        return video
    if isinstance(video, (str, Path)):
        path = Path(video)
        return FrameList(_frame_files(path)) if path.is_dir() else VideoFile(path)
    if isinstance(video, (list, tuple)):
        return FrameList(list(video))
    array = np.asarray(video)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ValueError(f"A video array must be (T, height, width, 3) uint8. Got {array.shape} {array.dtype}.")
    return FrameList(array)


def in_background(items: Iterable[Item], num_ahead: int) -> Iterator[Item]:
    """`items`, in order; a thread of their own makes up to `num_ahead` of them before they are asked for.

    An error in making an item is raised where that item would have come. What is left over when nobody asks any more is
    dropped.
    """
    iterator, end = iter(items), object()
    background = ThreadPoolExecutor(1, thread_name_prefix="frames")
    try:
        ahead = deque(background.submit(next, iterator, end) for _ in range(num_ahead))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(background.submit(next, iterator, end))
            yield item
    finally:
        background.shutdown(cancel_futures=True)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; what is left at the end comes in lists of one, so that there are but two sizes."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield from [batch] if len(batch) == size else ([item] for item in batch)


def _frame_files(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if is_image_file(file)]
    if not files:
        raise ValueError(f"The folder {folder} holds no images.")
    return sorted(
        files, key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
    )


# The processor


class Sa2VAiProcessor(ProcessorMixin):
    r"""Text, images and frames to the tensors Sa2VA-i takes.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the language model's, with `[SEG]` and `<IMG_CONTEXT>` as tokens.
        image_size (`int`): side of a tile in pixels.
        token_grid_size (`int`): side of a tile's grid of visual tokens.
        min_dynamic_patch, max_dynamic_patch, use_thumbnail: see `split_into_tiles`.
        sam2_image_size (`int`): side of SAM 2's input in pixels.
        template (`str`): a key of `TEMPLATES`.

    Raises:
        ValueError: the tokenizer lacks a token, or the template is unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 448,
        token_grid_size: int = 16,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        use_thumbnail: bool = True,
        sam2_image_size: int = 1024,
        template: str = "qwen_chat",
        **kwargs,
    ):
        if template not in TEMPLATES:
            raise ValueError(f"`template` must be one of {sorted(TEMPLATES)}. Got {template!r}.")
        self.image_size = image_size
        self.token_grid_size = token_grid_size
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        self.sam2_image_size = sam2_image_size
        self.template = template
        self.seg_token_id = _token_id(tokenizer, SEG)
        self.img_context_token_id = _token_id(tokenizer, IMG_CONTEXT)
        super().__init__(tokenizer, **kwargs)

    @classmethod
    def from_config(cls, config, tokenizer: PreTrainedTokenizerBase) -> "Sa2VAiProcessor":
        """The processor that goes with a model of `Sa2VAiConfig` `config`."""
        return cls(
            tokenizer,
            image_size=config.image_size,
            token_grid_size=config.token_grid_size,
            min_dynamic_patch=config.min_dynamic_patch,
            max_dynamic_patch=config.max_dynamic_patch,
            use_thumbnail=config.use_thumbnail,
            sam2_image_size=config.sam2_config.image_size,
            template=config.template,
        )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: the template's and the tokenizer's own."""
        stop_ids = {_token_id(self.tokenizer, word) for word in TEMPLATES[self.template].stop_words}
        return sorted(stop_ids | {self.tokenizer.eos_token_id})

    def __call__(
        self,
        text: str,
        image: Image.Image | None = None,
        frames: Sequence[Image.Image] | None = None,
        mask_prompts: Tensor | None = None,
    ) -> BatchFeature:
        """Tensors of one prompt.

        Args:
            text: as `prompt_text` or `next_turn` wrote it; each `<image>` stands for the image or all the frames.
            image: RGB image of any size, cut into tiles. Or:
            frames: sampled frames of a video, RGB, one tile each.
            mask_prompts: (n, height, width) bool regions of the image that the text speaks of.
        Returns:
            `input_ids` (1, L) and `attention_mask` (1, L); with an image or frames also `pixel_values`
            (tiles, 3, image_size, image_size); with `mask_prompts` also `region_masks` (n, grid, grid) bool.
        Raises:
            ValueError: the text speaks of an image and none is given, of several, or of another one than is given.
        """
        if text.count(IMAGE_TOKEN) > 1:
            raise ValueError(f"{IMAGE_TOKEN} may stand once in the text and the turns before it. Got {text!r}.")
        data = {}
        spans = ""
        if image is not None:
            tiles = split_into_tiles(
                image, self.min_dynamic_patch, self.max_dynamic_patch, self.image_size, self.use_thumbnail
            )
            data["pixel_values"] = to_pixel_values(tiles, self.image_size, IMAGENET_MEAN, IMAGENET_STD)
            spans = self._span(len(tiles))
        elif frames is not None:
            data["pixel_values"] = to_pixel_values(frames, self.image_size, IMAGENET_MEAN, IMAGENET_STD)
            spans = "\n".join([self._span(1)] * len(frames))
        elif IMAGE_TOKEN in text:
            raise ValueError(f"The text has {IMAGE_TOKEN} and there is no image and no video: {text!r}.")
        if mask_prompts is not None:
            data["region_masks"] = self._region_masks(mask_prompts)
            spans += _region_text(data["region_masks"])
        tokens = self.tokenizer(text.replace(IMAGE_TOKEN, spans), return_tensors="pt")
        self._check_image_tokens(tokens.input_ids, data)
        return BatchFeature({"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, **data})

    def sam2_pixel_values(self, frames: Sequence[Image.Image]) -> Tensor:
        """(B, 3, sam2_image_size, sam2_image_size) float32 for `Sam2Propagator.encode_images`."""
        return to_pixel_values(frames, self.sam2_image_size, SAM2_MEAN, SAM2_STD)

    def prompt_text(self, text: str, past_text: str = "", has_media: bool = False) -> str:
        """`text` in the chat template, after the turns before it.

        With an image or a video, `<image>` is put first where neither the text nor the past has one; without, it is
        taken out.
        """
        if not has_media:
            text = text.replace(IMAGE_TOKEN, "")
        elif IMAGE_TOKEN not in text and not _has_image(past_text):
            text = IMAGE_TOKEN + text
        return past_text + TEMPLATES[self.template].instruction.format(text=text)

    def past_text(self, prompt_text: str, prediction: str) -> str:
        """What `prompt_text` takes as `past_text` in the next turn: this turn whole. `<image>` stays short in it."""
        end = TEMPLATES[self.template].end
        return prompt_text + prediction.removesuffix(end) + end + "\n"

    def decode(self, token_ids: Tensor) -> str:
        """The answer, special tokens such as `[SEG]` kept."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False).strip()

    def _span(self, num_tiles: int) -> str:
        return IMG_START + IMG_CONTEXT * (num_tiles * self.token_grid_size**2) + IMG_END

    def _check_image_tokens(self, input_ids: Tensor, data: dict[str, Tensor]) -> None:
        """A past turn spelled out by the caller must be about the image or frames that are given now."""
        num_tokens = int((input_ids == self.img_context_token_id).sum())
        expected = 0
        if "pixel_values" in data:
            expected += len(data["pixel_values"]) * self.token_grid_size**2
        if "region_masks" in data:
            expected += int(data["region_masks"].sum())
        if num_tokens != expected:
            raise ValueError(
                f"The text has {num_tokens} {IMG_CONTEXT} tokens, and the given images and regions make {expected}."
            )

    def _region_masks(self, mask_prompts: Tensor) -> Tensor:
        grid = (self.token_grid_size, self.token_grid_size)
        return F.interpolate(mask_prompts[None].float(), size=grid, mode="nearest")[0].bool()


def coco_masks() -> ModuleType:
    """pycocotools.mask; by name, for what a remote-code file imports is asked of every user."""
    try:
        return import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError("Run-length codes need pycocotools: pip install pycocotools") from error


def to_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO run-length code of a (height, width) bool mask, as JSON takes it."""
    code = coco_masks().encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def segmentation_request(text: str) -> str:
    """`text` as a request the model was trained on.

    A sentence that asks already ("... segment ...", or a question, or a prompt with `<image>`) is kept as it is; a bare
    phrase ("the dog that jumps first") becomes "Please segment the dog that jumps first.".
    """
    phrase = text.strip()
    if IMAGE_TOKEN in phrase or phrase.endswith("?") or re.search(r"\bsegment", phrase, re.IGNORECASE):
        return text
    return f"Please segment {phrase.rstrip('.')}."


def check_mask_prompts(mask_prompts: Sequence | np.ndarray | Tensor, original_size: tuple[int, int]) -> Tensor:
    """(n, height, width) bool regions, from these or (as the original takes them) from a list of one such array.

    Raises:
        ValueError: another shape, or a region without a pixel.
    """
    masks = torch.as_tensor(np.stack([np.asarray(mask) for mask in mask_prompts]))
    if masks.ndim == 4 and len(masks) == 1:
        masks = masks[0]
    if masks.ndim != 3 or tuple(masks.shape[1:]) != tuple(original_size):
        height, width = original_size
        raise ValueError(f"`mask_prompts` must be (n, {height}, {width}), as the image is. Got {tuple(masks.shape)}.")
    masks = masks.bool()
    empty = [idx for idx, mask in enumerate(masks) if not mask.any()]
    if empty:
        raise ValueError(f"Every region of `mask_prompts` must have a pixel. Got none in {empty}.")
    return masks


def _region_text(region_masks: Tensor) -> str:
    regions = [
        f"region{number}{REGION_START}{IMG_CONTEXT * int(mask.sum())}{REGION_END}"
        for number, mask in enumerate(region_masks, start=1)
    ]
    return f"\nThere are {len(regions)} part regions in the picture: {', '.join(regions)}.\n"


def _has_image(text: str) -> bool:
    """Whether a past turn holds the image: as `<image>`, or spelled out by a caller of the original."""
    return IMAGE_TOKEN in text or IMG_CONTEXT in text


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no token {token!r}; it is no Sa2VA model's tokenizer."
        )
    return token_id
