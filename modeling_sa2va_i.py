"""Sa2VA-i (arXiv:2509.19082): masks of a video from a sentence.

A language model sees a few frames of the video and answers; every `[SEG]` in its answer stands for one object. The
fine-tuned mask decoder turns the state at `[SEG]` into initial masks of those frames, each on its own, and the original
SAM 2 carries them to all frames.

Words, used everywhere:
    sampled frames      seen by the language model
    prompt frames       sampled frames whose initial masks prompt the propagator (all of them unless limited)
    initial masks       of the sampled frames, from `[SEG]`
    frame_idx           position in the whole video
    logits, masks       float, > 0 is foreground; bool
    original_size       (height, width); PIL's `.size` is (width, height)
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    DynamicCache,
    GenerationMixin,
    InternVLConfig,
    InternVLVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMaskDecoder
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import ModelOutput, is_flash_attn_2_available, logging

from .configuration_sa2va_i import Sa2VAiConfig, check_decoding_options
from .mask_losses_sa2va_i import mask_losses
from .processing_sa2va_i import (
    SAMPLERS,
    Sa2VAiProcessor,
    Video,
    batches,
    check_mask_prompts,
    check_sample_idx,
    coco_masks,
    in_background,
    load_image,
    open_video,
    segmentation_request,
    to_rle,
)
from .sam2_propagator import DecodedMasks, FrameFeatures, ObjectTracker, Sam2Propagator, resize, track_frames

logger = logging.get_logger(__name__)

# What `quantization_config` must leave alone: masks need every bit, and these parts are small.
NEVER_QUANTIZED = ("propagator", "grounding_encoder", "text_hidden_fcs")
# Weights of the mask losses beside the text's (arXiv:2509.19082)
MASK_WEIGHT, DICE_WEIGHT = 2.0, 0.5


@dataclass
class Sa2VAiOutput(ModelOutput):
    """What `Sa2VAiModel.forward` returns.

    loss: `text_loss` + 2.0 `mask_loss` + 0.5 `dice_loss`, as far as there are labels and masks.
    logits: (B, L, vocab_size) of the next token; without labels alone, for they are the largest tensor of a training.
    past_key_values: the language model's cache; without labels alone.
    text_loss, mask_loss, dice_loss: cross-entropy of the labels; cross-entropy and dice of the masks.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    text_loss: Tensor | None = None
    mask_loss: Tensor | None = None
    dice_loss: Tensor | None = None


@dataclass
class Answer:
    """An answer of the language model.

    token_ids: (N,) generated ones; seg_embeddings: (K, C), one SAM 2 prompt per `[SEG]`, in order.
    """

    prediction: str
    past_text: str
    token_ids: Tensor
    seg_embeddings: Tensor


@dataclass
class CallOptions:
    """What one call asks for; see `Sa2VAiConfig` and `Sa2VAiModel.predict_forward`."""

    sample_num_frames: int
    sampling: str
    decoding: str
    max_prompt_frames: int | None
    sample_idx: Sequence[int] | None = None  # the caller's own
    max_new_tokens: int | None = None
    drafts_only: bool = False
    return_rle: bool = False
    max_objects: int | None = None

    def __post_init__(self):
        check_decoding_options(self.sample_num_frames, self.sampling, self.decoding, self.max_prompt_frames)
        if self.max_objects is not None and self.max_objects < 1:
            raise ValueError(f"`max_objects` must be at least 1 or None for all. Got {self.max_objects}.")
        if self.return_rle:
            coco_masks()


class PromptCache:
    """The language model's keys and values of the last prompt with its answer; the next goes on where it differs.

    A conversation goes on after its last answer, another question about the same frames after the frames.
    """

    def __init__(self):
        self._indices: list[int] = []
        self._token_ids = torch.empty(0, dtype=torch.long)
        self._cache = DynamicCache()

    def take(self, indices: Sequence[int], token_ids: Tensor) -> DynamicCache:
        """The cache of what a prompt, (L,) `token_ids` about the frames at `indices`, has in common with the last.

        It is the caller's until `put`: if the answer fails, nothing is kept. The last token is never in common, for
        the state there is what the answer starts from.
        """
        length = min(len(self._token_ids), len(token_ids) - 1)
        differ = (self._token_ids[:length] != token_ids[:length].cpu()).nonzero()
        num_common = int(differ[0]) if len(differ) else length
        if num_common == 0 or list(indices) != self._indices:
            self._cache = DynamicCache()
        elif num_common < len(self._token_ids):
            self._cache.crop(num_common - len(self._token_ids))
        cache, self._cache, self._token_ids = self._cache, DynamicCache(), self._token_ids[:0]
        return cache

    def put(self, indices: Sequence[int], token_ids: Tensor, cache: DynamicCache) -> None:
        """Keep `cache`, of the first of `token_ids`, a prompt with its answer."""
        self._indices, self._cache = list(indices), cache
        self._token_ids = token_ids[: cache.get_seq_length()].cpu()


class EncodedVideo(Video):
    """A video of which one model's encodings are kept for the questions to come.

    Made by `Sa2VAiModel.encode_video`, and given wherever a video is taken. Encodings of frames lie on the CPU.

    prompt_cache: of the last question; None if there is one question alone.
    """

    def __init__(self, video: Video, max_kept_frames: int, prompt_cache: PromptCache | None = None):
        self._video = video
        self.fps, self.num_frames, self.original_size = video.fps, video.num_frames, video.original_size
        self._max_kept_frames = max_kept_frames
        self.prompt_cache = prompt_cache
        self._frames: dict[tuple[int, ...], list[Image.Image]] = {}
        self._image_features: dict[tuple[int, ...], Tensor] = {}
        self._pyramids: dict[int, tuple[Tensor, ...]] = {}

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._video)

    def frames_at(self, indices: Sequence[int]) -> list[Image.Image]:
        """As `Video.frames_at`; decoded once."""
        key = tuple(indices)
        if key not in self._frames:
            self._frames[key] = self._video.frames_at(indices)
        return self._frames[key]

    def image_features(self, indices: Sequence[int], encode: Callable[[], Tensor]) -> Tensor:
        """Visual tokens of the sampled frames at `indices`: those that are kept, or else what `encode` gives."""
        key = tuple(indices)
        if key not in self._image_features:
            self._image_features[key] = encode().cpu()
        return self._image_features[key]

    def feature_pyramid(self, frame_idx: int) -> tuple[Tensor, ...] | None:
        """SAM 2's features of a frame, if they are kept."""
        return self._pyramids.get(frame_idx)

    def keep_pyramid(self, frame_idx: int, pyramid: tuple[Tensor, ...]) -> None:
        """Keep SAM 2's features of a frame, as long as there is room."""
        if len(self._pyramids) < self._max_kept_frames:
            self._pyramids[frame_idx] = tuple(level.cpu() for level in pyramid)


@dataclass
class SampledVideo:
    """A video with its sampled frames: their indices, increasing, and the frames themselves."""

    video: EncodedVideo
    indices: list[int]
    frames: list[Image.Image]

    @classmethod
    def sample(cls, video: Video, options: CallOptions) -> "SampledVideo":
        """`video` keeps no encoding but during the call, unless it is an `EncodedVideo` already."""
        if not isinstance(video, EncodedVideo):
            video = EncodedVideo(video, max_kept_frames=0)
        if options.sample_idx is None:
            indices = SAMPLERS[options.sampling](video.num_frames, options.sample_num_frames)
        else:
            indices = check_sample_idx(options.sample_idx, video.num_frames)
        return cls(video, indices, video.frames_at(indices))

    def __iter__(self) -> Iterator[tuple[int, Image.Image]]:
        return iter(zip(self.indices, self.frames, strict=True))


class VideoSegmentation(Iterator):
    """The answer to one prompt about a video, and an iterator over the masks of its frames.

    Yields `(frame_idx, masks)` for every frame in order, masks (K, height, width) bool, K the number of `[SEG]`;
    nothing where the answer has none. Neither the frames nor the masks of the whole video are held.

    prediction (`str`): the answer, special tokens kept.
    past_text (`str`): pass it to the next call to go on with the conversation.
    sample_idx (`list[int]`): the sampled frames.
    num_objects, num_frames (`int`): K, and the length of the video.
    """

    def __init__(
        self,
        answer: Answer,
        sampled: SampledVideo,
        masks: Iterator[tuple[int, np.ndarray]],
        drafts: Callable[[], Iterator[tuple[int, np.ndarray]]],
    ):
        self.prediction = answer.prediction
        self.past_text = answer.past_text
        self.sample_idx = sampled.indices
        self.num_objects = len(answer.seg_embeddings)
        self.num_frames = sampled.video.num_frames
        self._masks = masks
        self._drafts = drafts

    def __next__(self) -> tuple[int, np.ndarray]:
        return next(self._masks)

    def initial_masks(self) -> Iterator[tuple[int, np.ndarray]]:
        """`(frame_idx, masks)` of the sampled frames alone, without propagation; at any time, in seconds.

        They are encoded for it, and again for the propagation, unless the video came from `encode_video`.
        """
        return self._drafts()


class VideoSegmentations(Iterator):
    """The answers to several prompts about a video, and an iterator over the masks of its frames.

    Yields `(frame_idx, masks)` for every frame in order, masks a list of one array (K, height, width) per prompt, K the
    number of `[SEG]` in its answer; nothing where no answer has any.

    predictions (`list[str]`): the answers, special tokens kept.
    num_objects (`list[int]`): K of each.
    sample_idx (`list[int]`), num_frames (`int`): as in `VideoSegmentation`.
    """

    def __init__(self, answers: list[Answer], sampled: SampledVideo, masks: Iterator[tuple[int, np.ndarray]]):
        self.predictions = [answer.prediction for answer in answers]
        self.num_objects = [len(answer.seg_embeddings) for answer in answers]
        self.sample_idx = sampled.indices
        self.num_frames = sampled.video.num_frames
        self._masks = masks

    def __next__(self) -> tuple[int, list[np.ndarray]]:
        frame_idx, masks = next(self._masks)
        return frame_idx, np.split(masks, np.cumsum(self.num_objects)[:-1])


class Sa2VAiModel(PreTrainedModel, GenerationMixin):
    """Sa2VA-i: `predict_forward` answers and segments in one call, `segment` streams the masks of a video."""

    config_class = Sa2VAiConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = True
    _no_split_modules = ["InternVLVisionLayer", "Sam2Propagator", "Sam2VideoMaskDecoder"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: Sa2VAiConfig):
        super().__init__(config)
        llm_width, sam2_width = config.llm_config.hidden_size, config.sam2_config.mask_decoder_config.hidden_size
        self.vision_model = InternVLVisionModel(config.vision_config)
        self.mlp1 = InternVLMultiModalProjector(
            InternVLConfig(  # of copies: a config resets the attention of the configs it is given
                vision_config=config.vision_config.to_dict(),
                text_config=config.llm_config.to_dict(),
                downsample_ratio=config.downsample_ratio,
            )
        )
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(llm_width, llm_width), nn.ReLU(), nn.Linear(llm_width, sam2_width), nn.Dropout(0.0)
        )
        # The original SAM 2: encodes every frame, and carries masks from frame to frame. Never trained.
        self.propagator = Sam2Propagator(config.sam2_config)
        # The fine-tuned decoder: turns [SEG] into initial masks, without memory.
        self.grounding_encoder = Sam2VideoMaskDecoder(config.sam2_config.mask_decoder_config)
        self._processor: Sa2VAiProcessor | None = None
        self._tokenizer_kwargs: dict[str, Any] = {}
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args, use_flash_attn: bool = False, **kwargs
    ) -> "Sa2VAiModel":
        """As `PreTrainedModel.from_pretrained`, with these differences.

        A weight that is missing or of another shape is an error: without its original decoder Sa2VA-i would propagate
        noise. `use_flash_attn=True` stands for `attn_implementation="flash_attention_2"` where flash-attn is installed.
        `quantization_config` never reaches SAM 2, the decoders and `text_hidden_fcs`.

        Raises:
            ValueError: the checkpoint is not whole (the message names the parts and how to convert), or `device_map`
                offloads SAM 2.
        """
        if use_flash_attn and "attn_implementation" not in kwargs:
            kwargs["attn_implementation"] = _flash_attention_or_sdpa()
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _without_mask_modules(kwargs["quantization_config"])
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        _check_whole(pretrained_model_name_or_path, info)
        _check_not_offloaded(model)
        hub_options = ("cache_dir", "local_files_only", "token", "revision", "subfolder")
        model._tokenizer_kwargs = {key: kwargs[key] for key in hub_options if key in kwargs}
        return (model, info) if with_info else model

    @property
    def processor(self) -> Sa2VAiProcessor:
        """The model's own processor: its tokenizer is read from where the weights came from, at first use."""
        if self._processor is None:
            # given the config, AutoTokenizer does not ask whether to run the code that is running already
            tokenizer = AutoTokenizer.from_pretrained(self.name_or_path, config=self.config, **self._tokenizer_kwargs)
            self._processor = self._processor_for(tokenizer)
        return self._processor

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # The language model

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens (tiles, num_image_tokens, hidden_size) of `pixel_values` (tiles, 3, image_size, image_size)."""
        pixel_values = pixel_values.to(self.vision_model.device, self.vision_model.dtype)
        patches = self.vision_model(pixel_values).last_hidden_state[:, 1:]  # without the class token
        return self.mlp1(merge_patches(patches, self.config.token_grid_size))

    def embed_prompt(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        region_masks: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (1, L, hidden_size) of a prompt, visual tokens in the place of `<IMG_CONTEXT>`.

        Args:
            input_ids, pixel_values, region_masks: of `Sa2VAiProcessor.__call__`. The tokens of a region are those
                of the last tile (the whole image) that it covers, and come after the image's own.
            image_features: of `get_image_features`, where they are there already.
        """
        input_ids = input_ids.to(self.device)
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        features = self.get_image_features(pixel_values) if image_features is None else image_features
        visual_tokens = features.flatten(0, 1)
        if region_masks is not None:
            regions = [features[-1][mask.flatten().to(features.device)] for mask in region_masks]
            visual_tokens = torch.cat([visual_tokens, *regions])
        is_visual = (input_ids == self.config.img_context_token_id)[..., None].to(embeddings.device)
        return embeddings.masked_scatter(is_visual, visual_tokens.to(embeddings.device, embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        region_masks: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        sam2_pixel_values: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        **kwargs,
    ) -> Sa2VAiOutput:
        """The language model's output for B prompts with their visual tokens; with `labels` and `masks`, the losses.

        Args:
            input_ids, attention_mask: (B, L).
            pixel_values: the tiles of all prompts, one prompt after the other.
            region_masks: for B = 1 only.
            labels: (B, L), -100 where a token is not to be learnt.
            sam2_pixel_values: for each prompt, (F, 3, H, W) sampled frames as SAM 2 sees them.
            masks: for each prompt, (K, F, height, width) true masks, K the number of `[SEG]` in its labels.
            kwargs: as the language model takes them.
        Raises:
            ValueError: K is another number than that of `[SEG]`.
        """
        embeddings = self.embed_prompt(input_ids, pixel_values, region_masks)
        decoded = self.get_decoder()(
            inputs_embeds=embeddings, attention_mask=attention_mask, **{"use_cache": labels is None, **kwargs}
        )
        states, head = decoded.last_hidden_state, self.get_output_embeddings()
        if labels is None:
            return Sa2VAiOutput(logits=head(states), past_key_values=decoded.past_key_values)
        text_loss = _next_token_loss(states, labels.to(states.device), head)
        if masks is None:
            return Sa2VAiOutput(loss=text_loss, text_loss=text_loss)
        seg_states = [of_prompt[ids == self.config.seg_token_id] for of_prompt, ids in zip(states, labels, strict=True)]
        mask_loss, dice_loss = self._mask_losses(seg_states, sam2_pixel_values, masks)
        loss = text_loss + MASK_WEIGHT * mask_loss + DICE_WEIGHT * dice_loss
        return Sa2VAiOutput(loss=loss, text_loss=text_loss, mask_loss=mask_loss, dice_loss=dice_loss)

    def _mask_losses(
        self, seg_states: Sequence[Tensor], sam2_pixel_values: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of every object in every frame, decoded as in `predict_forward`, without memory.

        Every part runs in every step, with a weight of 0 where no prompt has a `[SEG]`: sharded training would hang
        if one process left a part out.
        """
        of_prompts, sizes = [], []
        for number, (states, frames, true) in enumerate(zip(seg_states, sam2_pixel_values, masks, strict=True)):
            if len(states) != len(true):
                raise ValueError(f"Prompt {number} has {len(states)} [SEG] in its labels and {len(true)} masks.")
            if len(states):
                logits = self._training_logits(states, frames).flatten(0, 1)
                true = true.transpose(0, 1).flatten(0, 1).to(logits.device)
                of_prompts.append(torch.stack(mask_losses(logits, true)))
                sizes.append(len(true))
        if not sizes:
            states, frames = seg_states[0].new_zeros(1, seg_states[0].shape[-1]), sam2_pixel_values[0]
            nothing = 0 * self._training_logits(states, frames).mean()
            return nothing, nothing
        weights = torch.tensor(sizes, device=of_prompts[0].device) / sum(sizes)
        mask_loss, dice_loss = (weights[:, None] * torch.stack(of_prompts)).sum(dim=0)  # autocast would round `@`
        return mask_loss, dice_loss

    def _training_logits(self, seg_states: Tensor, sam2_pixel_values: Tensor) -> Tensor:
        """(F, K, 4h, 4w) logits of the initial masks of F frames."""
        seg_embeddings = self.text_hidden_fcs(seg_states)
        with torch.no_grad():
            pyramid = self.propagator.encode_images(sam2_pixel_values)
        frames = [[level[[index]] for level in pyramid] for index in range(len(sam2_pixel_values))]
        return torch.stack([self._decode_initial(frame, seg_embeddings).logits[:, 0].float() for frame in frames])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        region_masks: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Generated token ids (1, N) alone, without the prompt's. Takes what the language model's `generate` takes."""
        embeddings = self.embed_prompt(input_ids, pixel_values, region_masks, image_features)
        generation_config = copy.deepcopy(kwargs.pop("generation_config", self.generation_config))
        kwargs = generation_config.update(**kwargs)  # returns what is no generation setting
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask.to(embeddings.device)
        return self.language_model.generate(inputs_embeds=embeddings, generation_config=generation_config, **kwargs)

    # What callers use

    def preparing_for_generation(
        self,
        tokenizer: PreTrainedTokenizerBase | Sa2VAiProcessor,
        max_new_tokens: int = 2048,
        torch_dtype: torch.dtype | None = None,
        **kwargs,
    ) -> None:
        """Set the tokenizer, the answer's length limit and the dtype for the calls to come (optional; drop-in)."""
        self._processor = self._resolve_processor(tokenizer)
        self.generation_config.max_new_tokens = max_new_tokens
        if torch_dtype is not None:
            self.to(torch_dtype)

    def compile_for_video(self) -> None:
        """Compile SAM 2 and the fine-tuned decoder with `torch.compile`, for many or long videos.

        Masks are the same up to rounding. The first frames after it wait for the compiler, and so does the first
        request with several objects; it needs what `torch.compile` needs: Triton on a GPU, a C++ compiler on a CPU.
        """
        self.propagator.compile_parts()
        self.grounding_encoder.compile()

    def encode_video(
        self, video: Video | Sequence | str | Path | np.ndarray, max_kept_frames: int | None = None
    ) -> EncodedVideo:
        """`video`, for several calls that follow one another; no frame of it is encoded twice.

            video = model.encode_video("dog.mp4")
            model.predict_forward(video=video, text="<image>Please segment the dog.")
            model.segment(video, "the cat")

        Nothing is encoded yet: the calls keep what they encode. (For prompts that are known together: `segment_each`.)
        The language model's cache of the last question is kept too, on its own device: 0.05 GB for five frames with
        the 4B model, 0.25 GB with the 26B.

        Args:
            max_kept_frames: of how many frames SAM 2's features are kept in the CPU's memory, all by default. A frame
                is 8.3 MB in bfloat16 with Hiera-L, twice that in float32.
        """
        video = open_video(video)
        return EncodedVideo(video, video.num_frames if max_kept_frames is None else max_kept_frames, PromptCache())

    @torch.no_grad()
    def predict_forward(
        self,
        image: Image.Image | str | Path | np.ndarray | None = None,
        video: Video | Sequence | str | Path | np.ndarray | None = None,
        text: str | None = None,
        past_text: str | None = "",
        mask_prompts: Sequence | np.ndarray | Tensor | None = None,
        tokenizer: PreTrainedTokenizerBase | Sa2VAiProcessor | None = None,
        processor: Sa2VAiProcessor | None = None,
        sample_num_frames: int | None = None,
        *,
        sample_idx: Sequence[int] | None = None,
        max_prompt_frames: int | None = None,
        return_drafts_only: bool = False,
        decoding: str | None = None,
        sampling: str | None = None,
        max_new_tokens: int | None = None,
        max_objects: int | None = None,
        return_rle: bool = False,
    ) -> dict[str, Any]:
        """Answer a prompt about an image, a video or neither, and segment what the answer points at.

        Args:
            image: a PIL image, a path or a (height, width, 3) uint8 array.
            video: a path to a video file or a folder of frames, a list of PIL images or of paths, or a
                (T, height, width, 3) uint8 array. For long videos see `segment`.
            text: the prompt, taken as it is. `<image>` marks where the image or the frames stand; put first if absent.
            past_text: of the last turn's result; give the same image or video again with it.
            mask_prompts: (n, height, width) regions of the image, region1 .. regionN in the text.
            tokenizer, processor: the model's own if absent; either argument takes either.
            sample_num_frames, sampling, decoding, max_prompt_frames: see `Sa2VAiConfig`, whose values are the defaults.
            sample_idx: the sampled frames themselves, in the place of `sample_num_frames` and `sampling`.
            return_drafts_only: stop at the initial masks of the sampled frames, without propagation.
            max_new_tokens: limit of the answer's length. A `[SEG]` that is cut off as the last token has no mask.
            max_objects: how many objects are propagated as one batch; all by default. Memory of the device bounds it.
            return_rle: masks as COCO run-length codes (needs pycocotools): a list of T in the place of an array, some
                hundred times smaller, for long videos.
        Returns:
            `prediction` (str): the answer, special tokens kept.
            `prediction_masks` (list, one per `[SEG]`): bool arrays (T, height, width); (1, height, width) for an image,
                (number of sampled frames, height, width) for drafts. Empty without `[SEG]`.
            `past_text` (str): for the next turn.
            `sample_idx` (list of int, video only): the sampled frames.
        Raises:
            ValueError, FileNotFoundError: before any model work, naming what was given and what was expected.
        """
        if not text:
            raise ValueError(f"`text` must be the prompt. Got {text!r}.")
        if image is not None and video is not None:
            raise ValueError("Give an `image` or a `video`, not both.")
        if mask_prompts is not None and image is None:
            raise ValueError("`mask_prompts` go with an `image`, and only with one.")
        options = self._options(
            sample_num_frames=sample_num_frames,
            sampling=sampling,
            decoding=decoding,
            max_prompt_frames=max_prompt_frames,
            sample_idx=sample_idx,
            max_new_tokens=max_new_tokens,
            drafts_only=return_drafts_only,
            return_rle=return_rle,
            max_objects=max_objects,
        )
        processor = self._resolve_processor(processor if processor is not None else tokenizer)
        past_text = past_text or ""
        # callers wrap the original in autocast; the model has a dtype of its own, and mixing two is an error
        with torch.autocast(self.device.type, enabled=False):
            if video is not None:
                return self._predict_video(processor, open_video(video), text, past_text, options)
            if image is not None:
                return self._predict_image(processor, load_image(image), text, past_text, mask_prompts, options)
            return self._predict_text(processor, text, past_text, options)

    def segment(
        self,
        video: Video | Sequence | str | Path | np.ndarray,
        text: str,
        *,
        past_text: str = "",
        processor: Sa2VAiProcessor | PreTrainedTokenizerBase | None = None,
        sample_num_frames: int | None = None,
        sample_idx: Sequence[int] | None = None,
        max_prompt_frames: int | None = None,
        decoding: str | None = None,
        sampling: str | None = None,
        max_new_tokens: int | None = None,
        max_objects: int | None = None,
    ) -> VideoSegmentation:
        """Segment a video of any length, frame by frame.

        The answer is there when the call returns; the masks come as the result is iterated over:

            for frame_idx, masks in model.segment("dog.mp4", "the dog that jumps first"):
                ...                                                 # masks: (K, height, width) bool

        What is held at a time: one frame, the prompt frames' masks and memory, 6 memories and 15 pointers.

        Args:
            text: a request ("Please segment the dog."), a question, or a phrase alone (see `segmentation_request`).
            others: as in `predict_forward`.
        Raises:
            ValueError, FileNotFoundError: as `predict_forward`, at the call.
        """
        options = self._options(
            sample_num_frames=sample_num_frames,
            sampling=sampling,
            decoding=decoding,
            max_prompt_frames=max_prompt_frames,
            sample_idx=sample_idx,
            max_new_tokens=max_new_tokens,
            max_objects=max_objects,
        )
        processor = self._resolve_processor(processor)
        return self._segment_video(processor, open_video(video), segmentation_request(text), past_text, options)

    @torch.no_grad()
    def segment_each(
        self,
        video: Video | Sequence | str | Path | np.ndarray,
        texts: Sequence[str],
        *,
        processor: Sa2VAiProcessor | PreTrainedTokenizerBase | None = None,
        sample_num_frames: int | None = None,
        max_prompt_frames: int | None = None,
        decoding: str | None = None,
        sampling: str | None = None,
        max_new_tokens: int | None = None,
        max_objects: int | None = None,
        probabilities: bool = False,
    ) -> VideoSegmentations:
        """Answer several prompts about one video, each on its own, and segment it for all of them at once.

        Frames are decoded, seen by the vision model, read by the language model and encoded by SAM 2 once for all
        prompts.

        Args:
            texts: prompts, taken as they are.
            probabilities: yield float32 probabilities in 0..1 in the place of bool masks.
            others: as in `predict_forward`.
        """
        options = self._options(
            sample_num_frames=sample_num_frames,
            sampling=sampling,
            decoding=decoding,
            max_prompt_frames=max_prompt_frames,
            max_new_tokens=max_new_tokens,
            max_objects=max_objects,
        )
        processor = self._resolve_processor(processor)
        sampled = SampledVideo.sample(open_video(video), options)
        prompts = [processor.prompt_text(text, has_media=True) for text in texts]
        cache = sampled.video.prompt_cache or PromptCache()
        answers = [self._answer_video(processor, sampled, prompt, options, cache) for prompt in prompts]
        seg_embeddings = torch.cat([answer.seg_embeddings for answer in answers])
        masks: Iterator[tuple[int, np.ndarray]] = iter(())
        if len(seg_embeddings):
            masks = to_arrays(self._video_masks(processor, sampled, seg_embeddings, options, probabilities))
        return VideoSegmentations(answers, sampled, masks)

    # One function per mode

    @torch.no_grad()
    def _segment_video(
        self, processor: Sa2VAiProcessor, video: Video, text: str, past_text: str, options: CallOptions
    ) -> VideoSegmentation:
        sampled = SampledVideo.sample(video, options)
        prompt = processor.prompt_text(text, past_text, has_media=True)
        answer = self._answer_video(processor, sampled, prompt, options, sampled.video.prompt_cache)

        def drafts() -> Iterator[tuple[int, np.ndarray]]:
            return self._draft_masks(processor, sampled, answer.seg_embeddings, options)

        if options.drafts_only:
            masks = drafts()
        elif len(answer.seg_embeddings):
            masks = to_arrays(self._video_masks(processor, sampled, answer.seg_embeddings, options))
        else:
            masks = iter(())
        return VideoSegmentation(answer, sampled, masks, drafts)

    def _predict_video(
        self, processor: Sa2VAiProcessor, video: Video, text: str, past_text: str, options: CallOptions
    ) -> dict[str, Any]:
        segmentation = self._segment_video(processor, video, text, past_text, options)
        return {
            "prediction": segmentation.prediction,
            "prediction_masks": _masks_of_objects((masks for _, masks in segmentation), options.return_rle),
            "past_text": segmentation.past_text,
            "sample_idx": segmentation.sample_idx,
        }

    def _predict_image(
        self,
        processor: Sa2VAiProcessor,
        image: Image.Image,
        text: str,
        past_text: str,
        mask_prompts: Sequence | np.ndarray | Tensor | None,
        options: CallOptions,
    ) -> dict[str, Any]:
        original_size = image.size[::-1]
        if mask_prompts is not None:
            mask_prompts = check_mask_prompts(mask_prompts, original_size)
        prompt = processor.prompt_text(text, past_text, has_media=True)
        inputs = processor(prompt, image=image, mask_prompts=mask_prompts)
        answer = self._answer(processor, prompt, inputs, options)
        masks: list[np.ndarray] = []
        if len(answer.seg_embeddings):
            decoded = self._decode_initial(self._encode(processor, image), answer.seg_embeddings)
            masks = [_to_array(self.propagator.masks_at(decoded.logits, original_size))]
        return {
            "prediction": answer.prediction,
            "prediction_masks": _masks_of_objects(masks, options.return_rle),
            "past_text": answer.past_text,
        }

    def _predict_text(
        self, processor: Sa2VAiProcessor, text: str, past_text: str, options: CallOptions
    ) -> dict[str, Any]:
        prompt = processor.prompt_text(text, past_text)
        answer = self._answer(processor, prompt, processor(prompt), options)
        return {"prediction": answer.prediction, "prediction_masks": [], "past_text": answer.past_text}

    # From the answer to the masks

    def _answer_video(
        self,
        processor: Sa2VAiProcessor,
        sampled: SampledVideo,
        prompt: str,
        options: CallOptions,
        prompt_cache: PromptCache | None,
    ) -> Answer:
        inputs = processor(prompt, frames=sampled.frames)
        image_features = sampled.video.image_features(
            sampled.indices, lambda: self.get_image_features(inputs["pixel_values"])
        )
        if prompt_cache is None or self.generation_config.cache_implementation is not None:
            return self._answer(processor, prompt, inputs, options, image_features=image_features)
        prompt_ids = inputs["input_ids"][0]
        cache = prompt_cache.take(sampled.indices, prompt_ids)
        answer = self._answer(processor, prompt, inputs, options, image_features=image_features, past_key_values=cache)
        prompt_cache.put(sampled.indices, torch.cat([prompt_ids, answer.token_ids.to(prompt_ids.device)]), cache)
        return answer

    def _answer(
        self,
        processor: Sa2VAiProcessor,
        prompt: str,
        inputs: BatchFeature,
        options: CallOptions,
        **generation: Any,
    ) -> Answer:
        if options.max_new_tokens is not None:
            generation["max_new_tokens"] = options.max_new_tokens
        with last_states(self.get_decoder().norm) as states:
            token_ids = self.generate(
                **inputs,
                eos_token_id=processor.stop_token_ids,
                pad_token_id=processor.tokenizer.pad_token_id,
                **generation,
            )[0]
        seg_states = select_seg_states(torch.cat(states), token_ids, processor.seg_token_id)
        prediction = processor.decode(token_ids)
        seg_embeddings = self.text_hidden_fcs(seg_states.to(self.text_hidden_fcs[0].weight.device))
        return Answer(prediction, processor.past_text(prompt, prediction), token_ids, seg_embeddings)

    def _encode(self, processor: Sa2VAiProcessor, frame: Image.Image) -> tuple[Tensor, ...]:
        """SAM 2's feature pyramid of one frame."""
        return self.propagator.encode_images(processor.sam2_pixel_values([frame]))

    def _decode_initial(self, pyramid: Sequence[Tensor], seg_embeddings: Tensor) -> DecodedMasks:
        """Masks from `[SEG]` of one sampled frame, given as its feature pyramid."""
        features = self.propagator.features_for(self.grounding_encoder, pyramid)
        return self.propagator.decode_seg(self.grounding_encoder, features, seg_embeddings)

    def _pyramids(
        self, processor: Sa2VAiProcessor, video: EncodedVideo, frames: Iterable[tuple[int, Image.Image]]
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(frame_idx, feature pyramid) of `frames`, in order; what `video` keeps is not encoded again.

        Frames are decoded and resized in the background, and encoded a few at a time.
        """
        device, batch_size = self.propagator.device, self.propagator.frames_per_batch

        def prepared() -> Iterator[tuple[int, Tensor | None]]:
            for frame_idx, frame in frames:
                if video.feature_pyramid(frame_idx) is not None:
                    yield frame_idx, None
                    continue
                pixel_values = processor.sam2_pixel_values([frame])
                yield frame_idx, pixel_values.pin_memory() if device.type == "cuda" else pixel_values

        for batch in batches(in_background(prepared(), batch_size), batch_size):
            new = {idx: pixels.to(device, non_blocking=True) for idx, pixels in batch if pixels is not None}
            if new:
                levels = [level.split(1) for level in self.propagator.encode_images(torch.cat(list(new.values())))]
                pyramids = dict(zip(new, zip(*levels, strict=True), strict=True))
            for frame_idx, _ in batch:
                if frame_idx in new:
                    video.keep_pyramid(frame_idx, pyramids[frame_idx])
                    yield frame_idx, pyramids[frame_idx]
                else:
                    yield frame_idx, tuple(level.to(device) for level in video.feature_pyramid(frame_idx))

    @torch.no_grad()
    def _draft_masks(
        self, processor: Sa2VAiProcessor, sampled: SampledVideo, seg_embeddings: Tensor, options: CallOptions
    ) -> Iterator[tuple[int, np.ndarray]]:
        if len(seg_embeddings) == 0:
            return
        original_size = sampled.video.original_size
        for frame_idx, pyramid in self._pyramids(processor, sampled.video, sampled):
            decoded = self._decode_initial(pyramid, seg_embeddings)
            if options.decoding == "memory":
                masks = self.propagator.masks_at(decoded.logits, original_size)
            else:
                masks = initial_masks(decoded, original_size)
            yield frame_idx, _to_array(masks)

    @torch.no_grad()
    def _video_masks(
        self,
        processor: Sa2VAiProcessor,
        sampled: SampledVideo,
        seg_embeddings: Tensor,
        options: CallOptions,
        probabilities: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """Every frame is encoded once: the sampled ones here, the others as they are tracked."""
        consistent = options.decoding == "consistent"
        decoder = self.propagator.mask_decoder if consistent else self.grounding_encoder
        video, original_size = sampled.video, sampled.video.original_size
        groups = seg_embeddings.split(options.max_objects or len(seg_embeddings))  # each propagates as one batch
        trackers = [ObjectTracker(self.propagator, decoder, gate_masks=consistent) for _ in groups]
        prompt_idx = set(sampled.indices[: options.max_prompt_frames])
        sampled_only = {}
        for frame_idx, pyramid in self._pyramids(processor, video, sampled):
            features = self.propagator.features_for(decoder, pyramid)
            if frame_idx not in prompt_idx:
                sampled_only[frame_idx] = features
                continue
            for tracker, group in zip(trackers, groups, strict=True):
                decoded = self._decode_initial(pyramid, group)
                if consistent:
                    tracker.add_mask_prompt(frame_idx, features, initial_masks(decoded, original_size))
                else:
                    tracker.add_seg_prompt(frame_idx, features, decoded)

        def features_to_track() -> Iterator[FrameFeatures]:
            others = ((idx, frame) for idx, frame in enumerate(video) if idx not in sampled.indices)
            pyramids = self._pyramids(processor, video, others)
            for frame_idx in range(video.num_frames):
                if frame_idx in sampled_only:
                    yield sampled_only.pop(frame_idx)
                elif frame_idx not in prompt_idx:
                    yield self.propagator.features_for(decoder, next(pyramids)[1])

        for frame_idx, logits in track_frames(trackers, video.num_frames, features_to_track()):
            logits = self.propagator.full_size_logits(logits, original_size)
            yield frame_idx, logits.sigmoid() if probabilities else logits > 0

    # Defaults

    def _options(self, **given) -> CallOptions:
        """What is given, and the config's value for a setting of decoding that is None."""
        for name in ("sample_num_frames", "sampling", "decoding", "max_prompt_frames"):
            if given[name] is None:
                given[name] = getattr(self.config, name)
        return CallOptions(**given)

    def _resolve_processor(self, given: Sa2VAiProcessor | PreTrainedTokenizerBase | None) -> Sa2VAiProcessor:
        """`given` as a processor; anything with a `.tokenizer` is one (a Hub copy of this file has its own class)."""
        if given is None:
            return self.processor
        processor = given if hasattr(given, "tokenizer") else self._processor_for(given)
        if processor.seg_token_id != self.config.seg_token_id:
            raise ValueError(
                f"[SEG] is token {processor.seg_token_id} of the given tokenizer and {self.config.seg_token_id} of "
                "this model; it is another model's tokenizer."
            )
        return processor

    def _processor_for(self, tokenizer: PreTrainedTokenizerBase) -> Sa2VAiProcessor:
        return Sa2VAiProcessor.from_config(self.config, tokenizer)


def merge_patches(patches: Tensor, grid_size: int) -> Tensor:
    """Pixel shuffle (version 2) of InternVL: each r x r block of patches becomes one token.

    Args:
        patches: (tiles, side * side, channels), row by row, side = r * grid_size.
    Returns:
        (tiles, grid_size * grid_size, r * r * channels), a block's patches row by row in the last dimension.
    """
    ratio = int(patches.shape[1] ** 0.5) // grid_size
    blocks = patches.unflatten(1, (grid_size, ratio, grid_size, ratio))  # (tiles, row, r, column, r, channels)
    return blocks.transpose(2, 3).flatten(3, 5).flatten(1, 2)


@contextmanager
def last_states(norm: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the last position's state, (1, hidden_size), of every pass through the language model's final norm.

    The same numbers as `output_hidden_states=True`, without the prompt's and the other layers'.
    """
    states: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, args, output: states.append(output[0, -1:]))
    try:
        yield states
    finally:
        handle.remove()


def select_seg_states(states: Tensor, token_ids: Tensor, seg_token_id: int) -> Tensor:
    """States (K, hidden_size) at the generated `[SEG]` tokens.

    Args:
        states: (N, hidden_size), one per step; step i takes generated token i - 1 as its input.
        token_ids: (N,) generated ids. The last is never an input, so it has no state.
    """
    is_seg = (token_ids[:-1] == seg_token_id).to(states.device)
    return states[1:][is_seg]


def _next_token_loss(states: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Cross-entropy of the labels, a mean over those that are not -100; `head` sees no other state.

    Args:
        states: (B, L, hidden_size); each predicts the label one position on.
    """
    is_learnt = labels[:, 1:] != -100
    return nn.functional.cross_entropy(head(states[:, :-1][is_learnt]).float(), labels[:, 1:][is_learnt])


def initial_masks(decoded: DecodedMasks, original_size: tuple[int, int]) -> Tensor:
    """(K, height, width) bool masks of a sampled frame, straight from stride 4."""
    return resize(decoded.logits, original_size)[:, 0] > 0


def to_arrays(masks: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, np.ndarray]]:
    """`masks` as arrays. A GPU's are fetched while it computes the next frame's: it never waits for the CPU."""
    fetching: tuple[int, Tensor, torch.cuda.Event] | None = None
    for frame_idx, of_frame in masks:
        if not of_frame.is_cuda:
            yield frame_idx, _to_array(of_frame)
            continue
        fetched, done = of_frame.to("cpu", non_blocking=True), torch.cuda.Event()
        done.record(torch.cuda.current_stream(of_frame.device))
        if fetching is not None:
            yield _arrived(*fetching)
        fetching = frame_idx, fetched, done
    if fetching is not None:
        yield _arrived(*fetching)


def _arrived(frame_idx: int, fetched: Tensor, done: "torch.cuda.Event") -> tuple[int, np.ndarray]:
    done.synchronize()
    return frame_idx, fetched.numpy().copy()  # out of pinned memory, which is scarce


def _to_array(masks: Tensor) -> np.ndarray:
    return masks.cpu().numpy()


def _masks_of_objects(frames_masks: Iterable[np.ndarray], return_rle: bool) -> list[np.ndarray] | list[list[dict]]:
    """(T, height, width) masks, or T codes, of each object, from (K, height, width) masks of each frame."""
    if return_rle:
        codes = [[to_rle(mask) for mask in masks] for masks in frames_masks]
        return [list(of_object) for of_object in zip(*codes, strict=True)]
    masks = list(frames_masks)
    return list(np.stack(masks, axis=1)) if masks else []


def _flash_attention_or_sdpa() -> str:
    if is_flash_attn_2_available():
        return "flash_attention_2"
    logger.warning("`use_flash_attn=True`, but flash-attn is not installed: using PyTorch's sdpa attention.")
    return "sdpa"


def _without_mask_modules(quantization_config: Any) -> Any:
    """A copy of `quantization_config` that skips `NEVER_QUANTIZED`, besides what it skips already (else the head)."""
    config = copy.deepcopy(quantization_config)
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    name = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
    setattr(config, name, [*(getattr(config, name, None) or ["lm_head"]), *NEVER_QUANTIZED])
    return config


def _check_whole(name_or_path: str | Path, loading_info: dict[str, Any]) -> None:
    """Raise a ValueError if a weight of the model was not in the checkpoint."""
    lacking = sorted(set(loading_info["missing_keys"]) | {key for key, *_ in loading_info["mismatched_keys"]})
    if not lacking:
        return
    parts = sorted({_part_of(key) for key in lacking})
    raise ValueError(
        f"{name_or_path} is not a whole Sa2VA-i checkpoint: {len(lacking)} weights are missing or of another shape, in "
        f"{', '.join(parts)} (first: {lacking[0]}). Convert the published Sa2VA or Sa2VA-i checkpoint with "
        "`sa2va-i convert SOURCE OUT --sam2 sam2_hiera_large.pt` and load OUT."
    )


def _check_not_offloaded(model: "Sa2VAiModel") -> None:
    """Raise a ValueError if the device map left SAM 2's weights on disk or in offloaded memory.

    They are read by methods, and accelerate brings offloaded weights back for `forward` alone.
    """
    for part in ("propagator", "grounding_encoder"):
        if any(parameter.is_meta for parameter in getattr(model, part).parameters()):
            raise ValueError(
                f"`device_map` offloads {part}: {model.hf_device_map}. SAM 2 must lie on a device whole; offload or "
                "quantise the language model instead."
            )


def _part_of(key: str) -> str:
    part, _, rest = key.partition(".")
    if part == "propagator":
        return "the original mask decoder (propagator)" if rest.startswith("mask_decoder.") else "the original SAM 2"
    return part
