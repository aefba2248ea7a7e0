import copy

import pytest
import torch
from transformers import Sam2VideoModel

from sa2va_i.sam2_propagator import (
    FrameFeatures,
    FrameMemory,
    MemoryBank,
    ObjectTracker,
    PromptMemory,
    Sam2Propagator,
    _blockwise_attention,
    resize,
    track_frames,
)

NUM_FRAMES = 24
SIDE = 192


@pytest.fixture(scope="module")
def propagator(small_model):
    return small_model.propagator


@pytest.fixture(scope="module")
def video() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, SIDE, SIDE, generator=generator) for _ in range(NUM_FRAMES)]


def box(x: int, y: int) -> torch.Tensor:
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, y : y + 20, x : x + 25] = True
    return mask


LEFT, RIGHT, NOTHING = box(5, 10), box(45, 30), torch.zeros(1, 60, 80, dtype=torch.bool)


@torch.no_grad()
def features_of(propagator, video) -> list[FrameFeatures]:
    return [propagator.features_for(propagator.mask_decoder, propagator.encode_images(frame[None])) for frame in video]


def propagate(propagator, video, prompts) -> torch.Tensor:
    """(T, K, 4h, 4w) logits."""
    return torch.stack([logits[:, 0] for _, logits in propagator.propagate(video, prompts)])


def test_masks_follow_the_video(propagator, video):
    """The weights are random, yet nothing is constant: equality tests below would otherwise prove nothing."""
    logits = propagate(propagator, video[:6], {0: LEFT})
    masks = logits > 0
    assert masks.any((1, 2, 3)).sum() > 2
    assert all(not torch.equal(masks[t], masks[t + 1]) for t in range(5))


@torch.no_grad()
def test_image_encoder_is_that_of_transformers(propagator, video):
    native = Sam2VideoModel(propagator.config).eval()
    native.load_state_dict(propagator.state_dict())
    ours, other = propagator.encode_images(video[0][None]), propagator.encode_images(video[1][None])
    expected = native.vision_encoder(video[0][None], return_dict=True).fpn_hidden_states
    for ours_of_level, other_of_level, expected_of_level in zip(ours, other, expected, strict=True):
        torch.testing.assert_close(ours_of_level, expected_of_level, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(other_of_level, expected_of_level, atol=1e-3)


def test_every_frame_comes_out_once_and_in_order(propagator, video):
    assert [idx for idx, _ in propagator.propagate(video[:5], {3: LEFT})] == [0, 1, 2, 3, 4]


def test_prompt_frame_gives_its_mask_back(propagator, video):
    *_, (_, logits) = propagator.propagate(video[:3], {2: LEFT})
    assert torch.equal(propagator.masks_at(logits, (60, 80)), LEFT)


def test_prompt_frames_in_the_future_condition_the_past(propagator, video):
    """A loop that only looks back passes every other test."""
    alone = propagate(propagator, video[:6], {0: LEFT})
    both = propagate(propagator, video[:6], {0: LEFT, 5: RIGHT})
    assert not torch.equal(alone[1], both[1])


def test_frames_before_the_first_prompt_are_tracked(propagator, video):
    logits = propagate(propagator, video[:4], {3: LEFT})
    assert not torch.equal(logits[0], logits[1])


def test_objects_of_one_batch_do_not_see_each_other(propagator, video):
    together = propagate(propagator, video[:5], {0: torch.cat([LEFT, RIGHT]), 3: torch.cat([RIGHT, LEFT])})
    left = propagate(propagator, video[:5], {0: LEFT, 3: RIGHT})
    right = propagate(propagator, video[:5], {0: RIGHT, 3: LEFT})
    torch.testing.assert_close(together, torch.cat([left, right], dim=1), rtol=0, atol=5e-3)
    assert (left - right).abs().max() > 0.1


def test_empty_prompt_mask_gives_the_no_object_pointer(propagator, video):
    tracker = ObjectTracker(propagator, propagator.mask_decoder)
    with torch.no_grad():
        features = propagator.features_for(propagator.mask_decoder, propagator.encode_images(video[0][None]))
        tracker.add_mask_prompt(0, features, torch.cat([NOTHING, LEFT]))
    nothing, left = tracker.memory.pointers_for(0)[0]
    assert torch.equal(nothing, propagator.no_object_pointer[0])
    assert not torch.equal(left, nothing)


def test_absent_objects_have_no_mask_unless_ungated(propagator, video, monkeypatch):
    """SAM 2 empties the mask of an object it scores as absent; the original Sa2VA's memory decoding does not."""
    score_head = propagator.mask_decoder.pred_obj_score_head
    monkeypatch.setattr(score_head, "forward", lambda tokens: torch.full_like(tokens[..., :1], -1))

    def second_frame(gate_masks):
        tracker = ObjectTracker(propagator, propagator.mask_decoder, gate_masks)
        first, second = features_of(propagator, video[:2])
        with torch.no_grad():
            tracker.add_mask_prompt(0, first, LEFT)
        return list(track_frames([tracker], 2, iter([second])))[1][1]

    assert (second_frame(gate_masks=True) == -1024).all()
    assert (second_frame(gate_masks=False) != -1024).all()


@pytest.mark.parametrize(("reach", "same"), [((7, 16), True), ((6, 16), False), ((7, 15), False)])
def test_forgetting_is_lossless_up_to_the_horizon(propagator, video, reach, same):
    """What is dropped is never read: keeping everything changes nothing, keeping one frame less changes the masks."""
    expected = propagate(propagator, video, {0: LEFT})
    tracker = ObjectTracker(propagator, propagator.mask_decoder)
    tracker.memory = ShortBank(*reach)

    first, *others = features_of(propagator, video)
    with torch.no_grad():
        tracker.add_mask_prompt(0, first, LEFT)
    logits = torch.stack([logits[:, 0] for _, logits in track_frames([tracker], len(video), iter(others))])
    assert torch.equal(logits, expected) is same


class ShortBank(MemoryBank):
    """Never forgets, and reads as far back as `reach` says."""

    def __init__(self, num_maskmem: int, max_object_pointers: int):
        super().__init__(7, 16)
        self._reach = (num_maskmem - 1, max_object_pointers - 1)

    def add_tracked_frame(self, frame_idx, memory):
        self._tracked_features[frame_idx] = memory.features
        self._tracked_pointers[frame_idx] = memory.pointers

    def tracked_for(self, frame_idx):
        return [(index, features) for index, features in super().tracked_for(frame_idx) if index < self._reach[0]]

    def pointers_for(self, frame_idx):
        return super().pointers_for(frame_idx)[: 1 + self._reach[1]]


def memory_of(frame_idx: int) -> FrameMemory:
    return FrameMemory(torch.tensor(frame_idx), torch.tensor(-frame_idx))


def prompt_of(frame_idx: int) -> PromptMemory:
    return PromptMemory(torch.tensor(frame_idx), [], torch.tensor(-frame_idx))


def frames_of_prompts(bank: MemoryBank) -> list[int]:
    return [int(prompt.features) for prompt in bank.prompts()]


class TestMemoryBank:
    def test_reaches_six_memories_and_fifteen_pointers(self):
        bank = MemoryBank(7, 16)
        bank.add_prompt_frame(0, prompt_of(0))
        for frame_idx in range(1, 31):
            bank.add_tracked_frame(frame_idx, memory_of(frame_idx))
        memories = [(index, int(features)) for index, features in bank.tracked_for(31)]
        assert memories == [(5, 25), (4, 26), (3, 27), (2, 28), (1, 29), (0, 30)]
        assert frames_of_prompts(bank) == [0]
        assert [-int(pointer) for pointer in bank.pointers_for(31)] == [0, *range(30, 15, -1)]

    def test_size_does_not_grow(self):
        bank = MemoryBank(7, 16)
        for frame_idx in range(3):
            bank.add_prompt_frame(frame_idx, prompt_of(frame_idx))
        sizes = []
        for frame_idx in range(3, 200):
            bank.add_tracked_frame(frame_idx, memory_of(frame_idx))
            sizes.append(len(bank))
        assert max(sizes) == sizes[-1] == 3 + 15

    def test_prompt_frames_take_up_distance(self):
        """Tracked 1..3, prompts 4..8: at frame 9, frame 3 is six frames back and in reach, frame 2 is not."""
        bank = MemoryBank(7, 16)
        for frame_idx in range(1, 4):
            bank.add_tracked_frame(frame_idx, memory_of(frame_idx))
        for frame_idx in range(4, 9):
            bank.add_prompt_frame(frame_idx, prompt_of(frame_idx))
        assert [(index, int(features)) for index, features in bank.tracked_for(9)] == [(5, 3)]
        assert frames_of_prompts(bank) == [4, 5, 6, 7, 8]

    def test_pointers_of_prompt_frames_to_come_are_not_read(self):
        bank = MemoryBank(7, 16)
        bank.add_prompt_frame(2, prompt_of(2))
        bank.add_prompt_frame(8, prompt_of(8))
        assert [-int(pointer) for pointer in bank.pointers_for(5)] == [2]
        assert frames_of_prompts(bank) == [2, 8]


def test_frames_are_asked_for_one_at_a_time_and_prompts_not_at_all(propagator, video):
    first, *others = features_of(propagator, video[:4])
    asked = []

    def features():
        for number, of_frame in enumerate(others, 1):
            asked.append(number)
            yield of_frame

    tracker = ObjectTracker(propagator, propagator.mask_decoder)
    with torch.no_grad():
        tracker.add_mask_prompt(0, first, LEFT)
    for frame_idx, _ in track_frames([tracker], 4, features()):
        assert asked == list(range(1, frame_idx + 1))
    assert frame_idx == 3


def test_propagate_without_a_prompt(propagator, video):
    with pytest.raises(ValueError, match="prompt_masks"):
        next(propagator.propagate(video, {}))


def test_resize_works_in_float32():
    assert resize(torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), (3, 5)).dtype == torch.float32


@pytest.fixture(scope="module")
def remembered() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Memories and pointers of three frames and two objects."""
    generator = torch.Generator().manual_seed(1)
    memories = [torch.randn(2, 12 * 12, 64, generator=generator).bfloat16() for _ in range(3)]
    return memories, [torch.randn(2, 64, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize(("temporal_index", "same"), [(0, True), (1, False)])
def test_recall_equals_the_native_memory_attention(propagator, video, remembered, temporal_index, same, in_training):
    """Keys made ahead, values projected last, and a first self-attention for all objects at once change nothing."""
    (first, second, tracked), pointers = remembered
    spatial = propagator.memory_encoder.position_encoding(torch.Size((1, 64, 12, 12)), "cpu", torch.float32)
    temporal = propagator.memory_temporal_positional_encoding[:, 0, 0]
    with torch.no_grad():
        features = propagator.features_for(propagator.mask_decoder, propagator.encode_images(video[0][None]))
        image_position = propagator.vision_encoder.neck.position_encoding((1, 64, 12, 12), "cpu", torch.float32)
        position = [spatial.flatten(2)[0].T + temporal[index] for index in (6, 6, temporal_index)]
        native = propagator.memory_attention(
            current_vision_features=features.stride16.flatten(2).permute(2, 0, 1).expand(-1, 2, -1),
            current_vision_position_embeddings=image_position.flatten(2).permute(2, 0, 1),
            memory=torch.cat([first, second, tracked, *(pointer[:, None] for pointer in pointers)], 1).transpose(0, 1),
            memory_posision_embeddings=torch.cat([*position, torch.zeros(3, 64)])[:, None],
            num_object_pointer_tokens=3,
        )
    with torch.set_grad_enabled(in_training):
        prompts = [PromptMemory(memory, propagator.prompt_keys(memory), None) for memory in (first, second)]
        recalled = propagator.recall(features, prompts, [(0, tracked)], pointers)
    expected = native.flatten(0, 1).reshape(2, 12, 12, 64).permute(0, 3, 1, 2)
    assert (recalled[0] - recalled[1]).abs().max() > 1e-3
    difference = (recalled - expected).abs().max()
    assert difference < 1e-5 if same else difference > 1e-3


@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (130, 600), (1024, 512), (70, 1025)])
def test_blockwise_attention(length, num_keys):
    """Of any size, and where the largest weight comes late."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, length, 16, generator=generator)
    keys = torch.randn(2, num_keys, 16, generator=generator)
    keys[:, -1] *= 30
    values = torch.randn(2, num_keys, 4, generator=generator)
    expected = torch.softmax(query @ keys.transpose(1, 2), dim=2) @ values
    chunks = keys.split(300, dim=1), values.split(300, dim=1)
    torch.testing.assert_close(_blockwise_attention(query, *chunks, block=(64, 100)), expected)


def test_more_than_one_head_is_refused(propagator):
    config = copy.deepcopy(propagator.config)
    config.memory_attention_num_attention_heads = 2
    with pytest.raises(ValueError, match="one head"):
        Sam2Propagator(config)
