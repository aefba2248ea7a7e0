"""The propagator: the original SAM 2, which carries initial masks to every frame of a video.

`Sam2Propagator` is transformers' `Sam2VideoModel`, parameter for parameter, with a loop of its own: the masks of
`Sam2VideoModel.propagate_in_video_iterator` differ from those of the SAM 2 that Sa2VA-i is built on, and it keeps every
frame. The modules are the native ones; what is written here is the order in which they run and what they remember.

Letters in shapes: K objects, B frames, C channels (256), H x W the size of SAM 2's input (1024), h x w = H/16 x W/16.
Logits are at stride 4, (K, 1, 4h, 4w); > 0 is foreground. `frame_idx` is the position in the whole video.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Sam2VideoConfig, Sam2VideoModel
from transformers.models.sam2.modeling_sam2 import Sam2FeedForward, Sam2MultiScaleAttention, do_pool
from transformers.models.sam2_video.modeling_sam2_video import (
    Sam2VideoMemoryAttentionLayer,
    apply_rotary_pos_emb_2d,
)

ABSENT_LOGIT = -1024.0  # the logit of every pixel of an object that SAM 2 scores as absent
# A mask given by the caller becomes these logits; SAM 2 treats it like a prediction of its own that is certain.
MASK_PROMPT_SCALE, MASK_PROMPT_BIAS = 20.0, -10.0
TOKENS_OF_PART = 1024  # that a layer works on at a time on a CPU

Rope = tuple[Tensor, Tensor]  # cosines and sines ([1,] h * w, C)


class FrameFeatures(NamedTuple):
    """Image features of B frames as one mask decoder takes them.

    stride4: (B, C/8, 4h, 4w) and stride8: (B, C/4, 2h, 2w), through that decoder's own `conv_s0` and `conv_s1`.
    stride16: (B, C, h, w), the same for every decoder; also what memory attention and memory encoder see.
    """

    stride4: Tensor
    stride8: Tensor
    stride16: Tensor


class DecodedMasks(NamedTuple):
    """The mask of highest predicted IoU of each object.

    logits: (K, 1, 4h, 4w), not gated by the object score.
    tokens: (K, C), the decoder's output token of that mask, from which an object pointer is made.
    object_score_logits: (K, 1); > 0 where the object is in the frame.
    candidates: (K, M, 4h, 4w), the logits of all M masks it was chosen from, and iou_scores: (K, M), how good the
        decoder thinks they are; for training.
    """

    logits: Tensor
    tokens: Tensor
    object_score_logits: Tensor
    candidates: Tensor
    iou_scores: Tensor

    @property
    def is_present(self) -> Tensor:
        return self.object_score_logits > 0


class PromptMemory(NamedTuple):
    """What is remembered of a prompt frame.

    features: (K, h * w, 64) in bfloat16; pointers: (K, C).
    keys: (K, h * w, C) for each layer of memory attention. Unlike a tracked frame's, the temporal index of a prompt
        frame never changes, and neither do they: made once, read by every frame.
    """

    features: Tensor
    keys: list[Tensor]
    pointers: Tensor


class FrameMemory(NamedTuple):
    """What is remembered of a tracked frame. features: (K, h * w, 64) in bfloat16; pointers: (K, C)."""

    features: Tensor
    pointers: Tensor


class HieraAttention(nn.Module):
    """Attention within the windows of a block of the image encoder, with the layers of transformers' own module.

    That one also computes attention weights, between heads, that nothing reads. On a CPU a few windows at a time.
    """

    def __init__(self, attention: Sam2MultiScaleAttention):
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_attention_heads, self.query_stride = attention.num_attention_heads, attention.query_stride

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """(B, height, width, C) of B windows; height and width are divided by the query stride, if there is one."""
        return _in_parts(self._attend, hidden_states, TOKENS_OF_PART // hidden_states[0, ..., 0].numel())

    def _attend(self, windows: Tensor) -> Tensor:
        size = windows.shape[1:3]
        query, key, value = self.qkv(windows).flatten(1, 2).chunk(3, dim=-1)
        if self.query_stride:
            query = do_pool(query.unflatten(1, size), self.query_stride)
            size = query.shape[1:3]
            query = query.flatten(1, 2)
        heads = (one.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2) for one in (query, key, value))
        attended = F.scaled_dot_product_attention(*heads)
        return self.proj(attended.transpose(1, 2).flatten(2).unflatten(1, size))


class HieraFeedForward(nn.Module):
    """The layers of transformers' own module, on a CPU for some tokens at a time."""

    def __init__(self, feed_forward: Sam2FeedForward):
        super().__init__()
        self.proj_in, self.proj_out = feed_forward.proj_in, feed_forward.proj_out
        self.activation = feed_forward.activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        return _in_parts(self._project, tokens, TOKENS_OF_PART).view_as(hidden_states)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.proj_out(self.activation(self.proj_in(tokens)))


def _in_parts(layer: Callable[[Tensor], Tensor], states: Tensor, length: int) -> Tensor:
    """layer(states); where it is faster, `length` of the first dimension at a time, and at least one."""
    if not _is_plain_cpu(states):
        return layer(states)
    return torch.cat([layer(part) for part in states.split(max(length, 1))])


def _is_plain_cpu(states: Tensor) -> bool:
    """Whether to work part by part, so that what is made of a part stays in the processor's cache.

    Not with gradients, which keep it all, nor in what is compiled, where loops are rolled out.
    """
    is_plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return states.device.type == "cpu" and states.dtype == torch.float32 and is_plain


class Sam2Propagator(Sam2VideoModel):
    """The complete original SAM 2: image encoder, prompt encoder, mask decoder, memory encoder, memory attention."""

    _no_split_modules = ["Sam2Propagator"]  # its methods call each other's parameters: one device holds them all

    def __init__(self, config: Sam2VideoConfig):
        if config.memory_attention_num_attention_heads != 1:
            heads = config.memory_attention_num_attention_heads
            raise ValueError(
                f"SAM 2's memory attention has one head. Got memory_attention_num_attention_heads={heads}."
            )
        super().__init__(config)
        for block in self.vision_encoder.backbone.blocks:
            block.attn, block.mlp = HieraAttention(block.attn), HieraFeedForward(block.mlp)
        self._attend = _attend

    @property
    def image_side(self) -> int:
        """Side in pixels of the square frames it takes."""
        return self.config.image_size

    def compile_parts(self) -> None:
        """Compile what every frame runs through; see `Sa2VAiModel.compile_for_video`."""
        for part in (self.vision_encoder, self.mask_decoder, self.memory_encoder):
            part.compile()
        # memory grows over the first frames: without `dynamic` each length would be compiled
        self._attend = torch.compile(_attend, dynamic=True)

    @property
    def frames_per_batch(self) -> int:
        """How many frames are best encoded at a time: a CPU is busy with one, a GPU would wait for its next kernel."""
        return 4 if self.device.type == "cuda" else 1

    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature pyramid of B frames, before any decoder's own convolutions.

        Args:
            pixel_values: (B, 3, H, W), normalised as `Sa2VAiProcessor.sam2_pixel_values` does.
        Returns:
            (B, C, 4h, 4w), (B, C, 2h, 2w), (B, C, h, w).
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        return tuple(self.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states)

    def features_for(self, decoder: nn.Module, feature_pyramid: Sequence[Tensor]) -> FrameFeatures:
        """The feature pyramid of `encode_images` as `decoder` takes it."""
        device = decoder.conv_s0.weight.device  # a device map may put the fine-tuned decoder elsewhere
        stride4, stride8, stride16 = feature_pyramid
        return FrameFeatures(decoder.conv_s0(stride4.to(device)), decoder.conv_s1(stride8.to(device)), stride16)

    def decode_seg(self, decoder: nn.Module, features: FrameFeatures, seg_embeddings: Tensor) -> DecodedMasks:
        """Masks of one frame from `[SEG]`, without memory, as in training (arXiv:2509.19082, consistent decoding).

        Args:
            decoder: the fine-tuned mask decoder.
            features: of one frame (B = 1), made for `decoder`.
            seg_embeddings: (K, C), the projected `[SEG]` states.
        """
        seg_embeddings = seg_embeddings.to(self.device, self.dtype)
        no_points = self._no_points(len(seg_embeddings))
        return self._decode(
            decoder,
            features,
            image_embeddings=features.stride16 + self.no_memory_embedding[0, :, :, None, None],
            # K prompts on one image: the decoder's second batch dimension
            sparse=torch.cat([no_points, seg_embeddings[:, None]], dim=1)[None],
            dense=self._no_mask(),
        )

    def decode_tracked(self, decoder: nn.Module, features: FrameFeatures, image_embeddings: Tensor) -> DecodedMasks:
        """Masks of one frame from memory alone. `image_embeddings`: (K, C, h, w), of `recall`."""
        no_points = self._no_points(len(image_embeddings))
        return self._decode(decoder, features, image_embeddings, sparse=no_points[:, None], dense=self._no_mask())

    def decode_mask_prompt(self, decoder: nn.Module, features: FrameFeatures, masks: Tensor) -> DecodedMasks:
        """The decoder's view of masks that are given: wanted for its tokens, which become object pointers.

        Args:
            masks: (K, 1, H, W) of 0 and 1.
        """
        num_objects = len(masks)
        return self._decode(
            decoder,
            features,
            image_embeddings=features.stride16.expand(num_objects, -1, -1, -1),
            sparse=self._no_points(num_objects)[:, None],
            dense=self.prompt_encoder.mask_embed(self.mask_downsample(masks.to(self.dtype))),
            multimask_output=False,
        )

    def object_pointers(self, tokens: Tensor, is_present: Tensor) -> Tensor:
        """(K, C) pointers from decoder tokens (K, C); the learnt "no object" where `is_present` (K, 1) is false."""
        return torch.where(is_present, self.object_pointer_proj(tokens), self.no_object_pointer)

    def encode_memory(self, features: FrameFeatures, logits: Tensor) -> Tensor:
        """(K, h * w, 64) memory features of one frame and its masks' logits (K, 1, 4h, 4w).

        Kept in bfloat16 whatever the model's dtype, as the original does: float32 results depend on it.
        """

        def encode(logits: Tensor) -> Tensor:
            probabilities = resize(logits, self.image_side).sigmoid()
            masks = probabilities * self.config.sigmoid_scale_for_mem_enc + self.config.sigmoid_bias_for_mem_enc
            memory, _ = self.memory_encoder(features.stride16, masks.to(self.dtype))
            return memory.flatten(2).transpose(1, 2).to(torch.bfloat16)

        return _in_parts(encode, logits, 1)

    def prompt_keys(self, features: Tensor) -> list[Tensor]:
        """Keys (K, h * w, C) of a prompt frame in each layer of memory attention; `features` of `encode_memory`."""
        tokens, position = self._memory_tokens([(self.config.num_maskmem - 1, features)])
        placed_tokens, rope = tokens + position, self._rope()
        return [_frame_keys(layer, placed_tokens, rope) for layer in self.memory_attention.layers]

    def recall(
        self,
        features: FrameFeatures,
        prompts: Sequence[PromptMemory],
        tracked: Sequence[tuple[int, Tensor]],
        pointers: Sequence[Tensor],
    ) -> Tensor:
        """Image embeddings (K, C, h, w) of one frame, after attention to what is remembered.

        Args:
            features: of the frame (B = 1).
            prompts: of all prompt frames, at least one.
            tracked: (temporal index, (K, h * w, 64) features); the index picks a row of the temporal encoding.
            pointers: each (K, C). They carry no position: SAM 2.0 gives pointers none.
        """
        height, width = features.stride16.shape[-2:]
        image_position = self.vision_encoder.neck.position_encoding(
            features.stride16.shape, features.stride16.device, features.stride16.dtype
        )
        # (1, h * w, C): the objects part where memory comes in, behind the first layer's self-attention
        states = (features.stride16 + 0.1 * image_position).flatten(2).transpose(1, 2)
        rope = self._rope()
        memory = [prompt.features.to(self.dtype) for prompt in prompts]
        if tracked:
            tokens, position = self._memory_tokens(tracked)
            memory.append(tokens)
            placed_tokens = tokens + position
        if pointers:
            # a pointer is wider than the memory: it becomes C / 64 tokens
            pointer_tokens = torch.stack(list(pointers), dim=1).flatten(1).unflatten(1, (-1, self.mem_dim))
            memory.append(pointer_tokens)
        in_chunks = _is_plain_cpu(states)  # elsewhere their number, which grows, is not to be seen by the compiler
        if not in_chunks:
            memory = [_joined(memory)]
        for number, layer in enumerate(self.memory_attention.layers):
            keys = [prompt.keys[number] for prompt in prompts]
            if tracked:
                keys.append(_frame_keys(layer, placed_tokens, rope))
            if pointers:
                keys.append(layer.cross_attn_image.k_proj(pointer_tokens))
            if not in_chunks:
                keys = [_joined(keys)]
            states = self._attend(layer, states, keys, memory, rope)
        return self.memory_attention.layer_norm(states).transpose(1, 2).unflatten(2, (height, width))

    def propagate(self, frames: Sequence[Tensor], prompt_masks: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Carry masks of a few frames to all frames (semi-supervised video object segmentation).

        Args:
            frames: one (3, H, W) tensor per frame, normalised as `Sa2VAiProcessor.sam2_pixel_values` does; read by
                index, so a lazy sequence is held one frame at a time.
            prompt_masks: for at least one frame_idx, the (K, height, width) bool masks there, at any one size.
        Yields:
            (frame_idx, logits) in order, logits (K, 1, 4h, 4w); `masks_at` turns them into masks of the video's size.
        """
        if not prompt_masks:
            raise ValueError("`prompt_masks` is empty; give the masks of at least one frame.")

        def encode(frame: Tensor) -> FrameFeatures:
            return self.features_for(self.mask_decoder, self.encode_images(frame[None]))

        tracker = ObjectTracker(self, self.mask_decoder)
        with torch.no_grad():
            for frame_idx in sorted(prompt_masks):
                tracker.add_mask_prompt(frame_idx, encode(frames[frame_idx]), prompt_masks[frame_idx])
        others = (encode(frames[idx]) for idx in range(len(frames)) if idx not in prompt_masks)
        yield from track_frames([tracker], len(frames), others)

    def masks_at(self, logits: Tensor, original_size: tuple[int, int]) -> Tensor:
        """(K, height, width) bool masks at `original_size` from propagated logits, by way of H x W as SAM 2 does."""
        return self.full_size_logits(logits, original_size) > 0

    def full_size_logits(self, logits: Tensor, original_size: tuple[int, int]) -> Tensor:
        """(K, height, width) float32 logits at `original_size`, by way of H x W."""
        return resize(resize(logits, self.image_side), original_size)[:, 0]

    def _decode(
        self,
        decoder: nn.Module,
        features: FrameFeatures,
        image_embeddings: Tensor,
        sparse: Tensor,
        dense: Tensor,
        multimask_output: bool = True,
    ) -> DecodedMasks:
        device = features.stride4.device  # the decoder's
        outputs = decoder(
            image_embeddings=image_embeddings.to(device),
            image_positional_embeddings=self.get_image_wide_positional_embeddings().to(device),
            sparse_prompt_embeddings=sparse.to(device),
            dense_prompt_embeddings=dense.to(device),
            multimask_output=multimask_output,
            high_resolution_features=[features.stride4, features.stride8],
        )
        logits, iou_scores, tokens, object_score_logits = (output.to(self.device) for output in outputs)
        # the two batch dimensions, images and prompts, are one: objects
        candidates, iou_scores = logits.flatten(0, 1), iou_scores.flatten(0, 1)
        best = iou_scores.argmax(dim=-1)
        objects = torch.arange(len(best), device=best.device)
        return DecodedMasks(
            logits=candidates[objects, best][:, None],
            tokens=tokens.flatten(0, 1)[objects, best],
            object_score_logits=object_score_logits.flatten(0, 1),
            candidates=candidates,
            iou_scores=iou_scores,
        )

    def _no_points(self, num_objects: int) -> Tensor:
        """(K, 2, C). Without a point prompt SAM 2 still embeds one padding point, and pads it once more."""
        return self.prompt_encoder.not_a_point_embed.weight.expand(num_objects, 2, -1)

    def _no_mask(self) -> Tensor:
        return self.prompt_encoder.no_mask_embed.weight[:, :, None, None]

    def _rope(self) -> Rope:
        memory_attention = self.memory_attention
        if not hasattr(memory_attention, "position_ids"):  # older transformers keep the result
            return memory_attention.rotary_emb()
        return memory_attention.rotary_emb(self.memory_temporal_positional_encoding, memory_attention.position_ids)

    def _memory_tokens(self, memories: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """Memories (temporal index, features), one after the other: (K, S, 64), and their position (S, 64)."""
        shape = torch.Size((1, self.mem_dim, *self.backbone_feature_sizes[-1]))
        spatial = self.memory_encoder.position_encoding(shape, self.device, self.dtype)[0].flatten(1).transpose(0, 1)
        temporal = self.memory_temporal_positional_encoding[:, 0, 0]  # (7, 64)
        tokens = torch.cat([memory.to(self.dtype) for _, memory in memories], dim=1)
        return tokens, torch.cat([spatial + temporal[index] for index, _ in memories])


class MemoryBank:
    """What SAM 2 remembers of one set of objects: prompt frames for good, the last 6 memories, the last 15 pointers.

    Nothing older is ever read (`num_maskmem` = 7, `max_object_pointers_in_encoder` = 16), so nothing older is kept:
    its size does not depend on the length of the video.
    """

    def __init__(self, num_maskmem: int, max_object_pointers: int):
        self._memory_reach = num_maskmem - 1
        self._pointer_reach = max_object_pointers - 1
        self._prompts: dict[int, PromptMemory] = {}
        self._tracked_features: dict[int, Tensor] = {}
        self._tracked_pointers: dict[int, Tensor] = {}

    def add_prompt_frame(self, frame_idx: int, memory: PromptMemory) -> None:
        self._prompts[frame_idx] = memory

    def add_tracked_frame(self, frame_idx: int, memory: FrameMemory) -> None:
        """Frames are added in order; what no later frame can read is dropped."""
        self._tracked_features[frame_idx] = memory.features
        self._tracked_pointers[frame_idx] = memory.pointers
        self._tracked_features = _within(self._tracked_features, frame_idx + 1, self._memory_reach)
        self._tracked_pointers = _within(self._tracked_pointers, frame_idx + 1, self._pointer_reach)

    def prompts(self) -> list[PromptMemory]:
        """Every prompt frame, past or future; they count as the farthest, at any distance."""
        return list(self._prompts.values())

    def tracked_for(self, frame_idx: int) -> list[tuple[int, Tensor]]:
        """(temporal index, features) of the tracked frames in reach; the index is the distance less one."""
        tracked = _within(self._tracked_features, frame_idx, self._memory_reach)
        return [(frame_idx - idx - 1, features) for idx, features in tracked.items()]

    def pointers_for(self, frame_idx: int) -> list[Tensor]:
        """Pointers of the prompt frames up to `frame_idx`, then of the tracked frames in reach, the nearest first."""
        prompts = [memory.pointers for idx, memory in self._prompts.items() if idx <= frame_idx]
        return prompts + list(reversed(_within(self._tracked_pointers, frame_idx, self._pointer_reach).values()))

    def __len__(self) -> int:
        """Number of frames of which anything is kept."""
        return len(self._prompts.keys() | self._tracked_features.keys() | self._tracked_pointers.keys())


def _within(tracked: dict[int, Tensor], frame_idx: int, reach: int) -> dict[int, Tensor]:
    """The entries at most `reach` frames before `frame_idx`; prompt frames between count as distance too."""
    return {idx: entry for idx, entry in tracked.items() if frame_idx - idx <= reach}


class ObjectTracker:
    """Follows K objects through one video: prompt it on a few frames, then call `track` on the others in order.

    Args:
        propagator: the modules.
        decoder: decodes every frame: the propagator's own mask decoder, or (memory decoding) the fine-tuned one.
        gate_masks: whether an object that SAM 2 scores as absent has an empty mask. Its pointer is gated in any case.
    """

    def __init__(self, propagator: Sam2Propagator, decoder: nn.Module, gate_masks: bool = True):
        self._propagator = propagator
        self._decoder = decoder
        self._gate_masks = gate_masks
        self._prompt_logits: dict[int, Tensor] = {}
        self.memory = MemoryBank(propagator.config.num_maskmem, propagator.config.max_object_pointers_in_encoder)

    def add_mask_prompt(self, frame_idx: int, features: FrameFeatures, masks: Tensor) -> None:
        """Take `masks`, (K, height, width) bool, as the truth of this frame.

        The masks go to H x W and back to stride 4 before they are remembered, and are not made binary again: SAM 2's
        way, kept because the memory depends on it.
        """
        propagator = self._propagator
        masks = masks[:, None].to(propagator.device)
        full_size = (resize(masks, propagator.image_side, antialias=True) >= 0.5).float()
        logits = resize(
            full_size * MASK_PROMPT_SCALE + MASK_PROMPT_BIAS, propagator.prompt_encoder.mask_input_size, antialias=True
        )
        decoded = propagator.decode_mask_prompt(self._decoder, features, full_size)
        is_present = decoded.is_present & full_size.flatten(1).any(dim=1, keepdim=True)
        self._add_prompt(frame_idx, features, logits, propagator.object_pointers(decoded.tokens, is_present))

    def add_seg_prompt(self, frame_idx: int, features: FrameFeatures, decoded: DecodedMasks) -> None:
        """Take the masks that `[SEG]` gave on this frame as they are, logits and all (the original Sa2VA)."""
        pointers = self._propagator.object_pointers(decoded.tokens, decoded.is_present)
        self._add_prompt(frame_idx, features, decoded.logits, pointers)

    def is_prompt_frame(self, frame_idx: int) -> bool:
        return frame_idx in self._prompt_logits

    def prompt_logits(self, frame_idx: int) -> Tensor:
        """Logits (K, 1, 4h, 4w) of a prompt frame, which are its result too."""
        return self._prompt_logits[frame_idx]

    def track(self, frame_idx: int, features: FrameFeatures) -> Tensor:
        """Logits (K, 1, 4h, 4w) of a frame without a prompt. Frames must come in order."""
        return self.remember(frame_idx, features, self.decode(frame_idx, features))

    def decode(self, frame_idx: int, features: FrameFeatures) -> DecodedMasks:
        """What memory says of a frame without a prompt."""
        memory = self.memory
        image_embeddings = self._propagator.recall(
            features, memory.prompts(), memory.tracked_for(frame_idx), memory.pointers_for(frame_idx)
        )
        return self._propagator.decode_tracked(self._decoder, features, image_embeddings)

    def remember(self, frame_idx: int, features: FrameFeatures, decoded: DecodedMasks) -> Tensor:
        """Logits (K, 1, 4h, 4w) of the frame, gated, which is from now on part of the memory."""
        propagator = self._propagator
        logits = decoded.logits
        if self._gate_masks:
            logits = torch.where(decoded.is_present[..., None, None], logits, ABSENT_LOGIT)
        pointers = propagator.object_pointers(decoded.tokens, decoded.is_present)
        self.memory.add_tracked_frame(frame_idx, FrameMemory(propagator.encode_memory(features, logits), pointers))
        return logits

    def _add_prompt(self, frame_idx: int, features: FrameFeatures, logits: Tensor, pointers: Tensor) -> None:
        self._prompt_logits[frame_idx] = logits
        memory = self._propagator.encode_memory(features, logits)
        self.memory.add_prompt_frame(frame_idx, PromptMemory(memory, self._propagator.prompt_keys(memory), pointers))


def track_frames(
    trackers: Sequence[ObjectTracker], num_frames: int, features: Iterator[FrameFeatures]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (frame_idx, logits) of every frame of a video, in order, holding none of them.

    Frames before the first prompt are tracked too: their memory is the prompt frames to come. The logits of the objects
    come one tracker after the other.

    Args:
        trackers: with their prompts, on the same frames and with the same decoder.
        features: of each frame that does not prompt, in order; asked for one at a time.
    """
    for frame_idx in range(num_frames):
        if trackers[0].is_prompt_frame(frame_idx):
            yield frame_idx, torch.cat([tracker.prompt_logits(frame_idx) for tracker in trackers])
            continue
        with torch.no_grad():
            of_frame = next(features)
            logits = [tracker.track(frame_idx, of_frame) for tracker in trackers]
        yield frame_idx, torch.cat(logits)


def _frame_keys(layer: Sam2VideoMemoryAttentionLayer, tokens: Tensor, rope: Rope) -> Tensor:
    """Keys (K, S, C) of the tokens (K, S, 64), with their position, of S / (h * w) frames."""
    keys = layer.cross_attn_image.k_proj(tokens)
    return _rotate(keys.unflatten(1, (-1, rope[0].shape[-2])), rope).flatten(1, 2)


def _attend(
    layer: Sam2VideoMemoryAttentionLayer,
    states: Tensor,
    keys: Sequence[Tensor],
    memory: Sequence[Tensor],
    rope: Rope,
) -> Tensor:
    """States (K, h * w, C) after one layer of memory attention; states (1, h * w, C) before are those of every object.

    As the layer's own `forward`, which makes all keys itself.

    Args:
        keys: each (K, S, C), of some of the tokens, as this layer makes them.
        memory: each (K, S, 64), the same tokens in the same order.
    """
    normed = layer.layer_norm1(states)[:, None]
    own, _ = layer.self_attn(normed, normed, normed, position_embeddings=rope)
    states = states + layer.dropout1(own[:, 0])
    attention = layer.cross_attn_image
    query = _rotate(attention.q_proj(layer.layer_norm2(states)), rope).expand(len(memory[0]), -1, -1)
    if _is_plain_cpu(query):
        # the weights of a token sum to 1: projecting after them is the same, and a fourth of the arithmetic before
        recalled = attention.v_proj(_blockwise_attention(query * attention.scaling, keys, memory))
    else:
        # one head: the kernels want four dimensions
        query, values = query[:, None], attention.v_proj(_joined(memory))[:, None]
        recalled = F.scaled_dot_product_attention(query, _joined(keys)[:, None], values, scale=attention.scaling)[:, 0]
    states = states + layer.dropout2(attention.o_proj(recalled))

    def feed_forward(tokens: Tensor) -> Tensor:
        return layer.linear2(layer.dropout(layer.activation(layer.linear1(tokens))))

    projected = _in_parts(feed_forward, layer.layer_norm3(states).flatten(0, 1), TOKENS_OF_PART)
    return states + layer.dropout3(projected.view_as(states))


def _joined(chunks: Sequence[Tensor]) -> Tensor:
    """(K, S, C) of all chunks."""
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks), dim=1)


def _blockwise_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], block: tuple[int, int] = (1024, 512)
) -> Tensor:
    """softmax(query keys^T) values, block by block, so that the weights of a block stay in the processor's cache.

    PyTorch's own attention on a CPU does the same, but only for values as wide as the keys, and all in one tensor.

    Args:
        query: (K, L, C), scaled.
        keys, values: each (K, S, C) and (K, S, D), one after the other.
    """
    results = []
    for number, rows in enumerate(query):
        blocks = [
            pair
            for some_keys, some_values in zip(keys, values, strict=True)
            for pair in zip(some_keys[number].split(block[1]), some_values[number].split(block[1]), strict=True)
        ]
        results.append(_in_parts(partial(_attend_rows, blocks=blocks), rows, block[0]))
    return torch.stack(results)


def _attend_rows(query: Tensor, blocks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of (L, C) to blocks of keys (S, C) and values (S, D), with a running sum and maximum; (L, D)."""
    query = query * math.log2(math.e)  # powers of 2 take a third of the time of powers of e here
    largest = query.new_full((len(query), 1), -torch.inf)
    total, summed = torch.zeros_like(largest), query.new_zeros(len(query), blocks[0][1].shape[1])
    for keys, values in blocks:
        weights = query @ keys.T
        new_largest = torch.maximum(largest, weights.amax(dim=1, keepdim=True))
        # below 2^-86 a weight is lost in the sum; subnormal ones would slow the product down
        weights.sub_(new_largest).clamp_(min=-86).exp2_()
        rescale = (largest - new_largest).exp2_()
        total = total * rescale + weights.sum(dim=1, keepdim=True)
        summed = torch.addmm(summed * rescale, weights, values)
        largest = new_largest
    return summed / total


def _rotate(states: Tensor, rope: Rope) -> Tensor:
    """Rotary position encoding of (..., h * w, C)."""
    rotated, _ = apply_rotary_pos_emb_2d(states, states[..., :0, :], *rope)
    return rotated


def resize(images: Tensor, size: int | tuple[int, int], antialias: bool = False) -> Tensor:
    """Bilinear resize of (N, 1, height, width) to `size`, in float32."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=antialias)
