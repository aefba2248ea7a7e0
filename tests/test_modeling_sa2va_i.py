import copy
import json
import logging
import shutil
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    InternVLModel,
)

import small_model as small_model_builder
from sa2va_i import Sa2VAiModel, VideoSegmentation, modeling_sa2va_i
from sa2va_i.evaluation.masks import decode
from sa2va_i.modeling_sa2va_i import last_states, merge_patches, select_seg_states

ONE, TWO, NONE = "It is [SEG].<|im_end|>", "It is [SEG] and [SEG].<|im_end|>", "It is not there.<|im_end|>"
TEXT = "<image>Please segment the disk."
OF_FRAMES = 5 * (4 + 2)  # tokens, of the sampled frames of the small model


@pytest.fixture
def encoded_frames(small_model, monkeypatch) -> list[torch.Tensor]:
    """Every frame that SAM 2's image encoder sees."""
    seen = []
    forward = small_model.propagator.vision_encoder.forward

    def count(pixel_values, **kwargs):
        seen.extend(pixel_values)
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(small_model.propagator.vision_encoder, "forward", count)
    return seen


@pytest.fixture
def seen_frames(small_model, monkeypatch) -> list[torch.Tensor]:
    """Every frame that the vision model sees."""
    seen = []
    forward = small_model.vision_model.forward

    def count(pixel_values, **kwargs):
        seen.extend(pixel_values)
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(small_model.vision_model, "forward", count)
    return seen


@pytest.fixture
def read_tokens(small_model) -> Iterator[list[int]]:
    """How many tokens of each prompt the language model reads."""
    read = []

    def count(module, args, kwargs):
        if (embeddings := kwargs.get("inputs_embeds")) is not None:  # generated tokens come as ids
            read.append(embeddings.shape[1])

    handle = small_model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    yield read
    handle.remove()


class TestPredictVideo:
    def test_result(self, small_model, frames, answering):
        with answering(small_model, TWO):
            result = small_model.predict_forward(video=frames, text=TEXT)
        assert result["prediction"] == TWO
        assert result["sample_idx"] == [0, 2, 5, 8, 11]
        assert [(masks.shape, masks.dtype) for masks in result["prediction_masks"]] == [((12, 60, 80), bool)] * 2
        one, two = result["prediction_masks"]
        assert one.any()
        assert not one.all()
        assert not np.array_equal(one, two)

    def test_any_source_gives_the_same(self, small_model, frames, answering, tmp_path):
        for idx, frame in enumerate(frames[:4]):
            frame.save(tmp_path / f"{idx}.png")
        results = []
        for video in (frames[:4], np.stack(frames[:4]), tmp_path, sorted(tmp_path.iterdir())):
            with answering(small_model, ONE):
                results.append(small_model.predict_forward(video=video, text=TEXT)["prediction_masks"][0])
        assert all(np.array_equal(result, results[0]) for result in results)

    def test_without_seg(self, small_model, frames, answering, encoded_frames):
        with answering(small_model, NONE):
            result = small_model.predict_forward(video=frames, text=TEXT)
        assert (result["prediction"], result["prediction_masks"]) == (NONE, [])
        assert encoded_frames == []

    @pytest.mark.parametrize("answer", [ONE, TWO])
    @pytest.mark.parametrize("decoding", ["consistent", "memory"])
    @pytest.mark.parametrize("max_prompt_frames", [None, 1])
    def test_every_frame_is_encoded_once(
        self, small_model, frames, answering, encoded_frames, answer, decoding, max_prompt_frames
    ):
        """The original encodes K x (n + T + U) frames: 44 of this video for two objects."""
        with answering(small_model, answer):
            small_model.predict_forward(video=frames, text=TEXT, decoding=decoding, max_prompt_frames=max_prompt_frames)
        assert len(encoded_frames) == 12
        assert len({frame.sum().item() for frame in encoded_frames}) == 12

    def test_objects_propagate_as_one_batch(self, small_model, frames, answering, monkeypatch):
        sizes = []
        track = modeling_sa2va_i.ObjectTracker.track

        def record(self, *args):
            logits = track(self, *args)
            sizes.append(len(logits))
            return logits

        monkeypatch.setattr(modeling_sa2va_i.ObjectTracker, "track", record)
        with answering(small_model, TWO):
            small_model.predict_forward(video=frames, text=TEXT)
        assert sizes == [2] * 7

    def test_drafts_are_the_initial_masks(self, small_model, frames, answering, encoded_frames):
        with answering(small_model, ONE):
            drafts = small_model.predict_forward(video=frames, text=TEXT, return_drafts_only=True)
        assert drafts["prediction_masks"][0].shape == (5, 60, 80)
        assert len(encoded_frames) == 5
        with answering(small_model, ONE):
            whole = small_model.predict_forward(video=frames, text=TEXT)
        # a prompt frame gives its initial mask back, but for pixels on the border: the masks went to stride 4 and back
        same = drafts["prediction_masks"][0] == whole["prediction_masks"][0][drafts["sample_idx"]]
        assert same.mean() > 0.95

    def test_own_sampled_frames(self, small_model, frames, answering):
        with answering(small_model, ONE):
            own = small_model.predict_forward(video=frames, text=TEXT, sample_idx=[8, 0, 2, 5, 11])
        with answering(small_model, ONE):
            uniform = small_model.predict_forward(video=frames, text=TEXT)
        with answering(small_model, ONE):
            other = small_model.predict_forward(video=frames, text=TEXT, sample_idx=[1, 3])
        assert own["sample_idx"] == uniform["sample_idx"]
        assert np.array_equal(own["prediction_masks"], uniform["prediction_masks"])
        assert other["sample_idx"] == [1, 3]
        assert not np.array_equal(other["prediction_masks"], uniform["prediction_masks"])

    @pytest.mark.parametrize(
        "option", [{"max_prompt_frames": 1}, {"decoding": "memory"}, {"sampling": "first"}, {"sample_num_frames": 2}]
    )
    def test_options_change_the_masks(self, small_model, frames, answering, option):
        with answering(small_model, ONE):
            plain = small_model.predict_forward(video=frames, text=TEXT)
        with answering(small_model, ONE):
            other = small_model.predict_forward(video=frames, text=TEXT, **option)
        assert not np.array_equal(plain["prediction_masks"], other["prediction_masks"])

    def test_more_prompt_frames_than_there_are(self, small_model, frames, answering):
        with answering(small_model, ONE):
            plain = small_model.predict_forward(video=frames, text=TEXT)
        with answering(small_model, ONE):
            other = small_model.predict_forward(video=frames, text=TEXT, max_prompt_frames=99)
        assert np.array_equal(plain["prediction_masks"], other["prediction_masks"])

    def test_options_default_to_the_config(self, small_model, frames, answering, monkeypatch):
        monkeypatch.setattr(small_model.config, "sample_num_frames", 3)
        monkeypatch.setattr(small_model.config, "sampling", "first")
        with answering(small_model, NONE):
            assert small_model.predict_forward(video=frames, text=TEXT)["sample_idx"] == [0, 1, 2]

    def test_autocast_around_the_call_changes_nothing(self, small_model, frames, answering):
        """ComfyUI's nodes call the original like this."""
        with answering(small_model, ONE):
            plain = small_model.predict_forward(video=frames, text=TEXT)
        with answering(small_model, ONE), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = small_model.predict_forward(video=frames, text=TEXT, past_text=None)
        assert np.array_equal(plain["prediction_masks"], under_autocast["prediction_masks"])

    def test_arguments_are_not_modified(self, small_model, frames, answering):
        array, sample_idx = np.stack(frames), [4, 1]
        before = array.copy()
        with answering(small_model, ONE):
            small_model.predict_forward(video=array, text=TEXT, sample_idx=sample_idx)
        assert np.array_equal(array, before)
        assert sample_idx == [4, 1]


class TestPredictImage:
    def test_result(self, small_model, frames, answering):
        with answering(small_model, TWO):
            result = small_model.predict_forward(image=frames[0], text=TEXT)
        assert [(masks.shape, masks.dtype) for masks in result["prediction_masks"]] == [((1, 60, 80), bool)] * 2
        assert "sample_idx" not in result

    def test_sources(self, small_model, frames, answering, tmp_path):
        frames[0].save(tmp_path / "frame.png")
        results = []
        for image in (frames[0], np.asarray(frames[0]), tmp_path / "frame.png"):
            with answering(small_model, ONE):
                results.append(small_model.predict_forward(image=image, text=TEXT)["prediction_masks"][0])
        assert all(np.array_equal(result, results[0]) for result in results)

    def test_regions_change_the_prompt(self, small_model, frames, answering, monkeypatch):
        masks = np.zeros((2, 60, 80), bool)
        masks[0, 20:40, 10:30] = masks[1, :, 40:] = True
        before = masks.copy()
        with answering(small_model, TWO):
            result = small_model.predict_forward(image=frames[0], text="Segment region1, region2.", mask_prompts=masks)
        assert len(result["prediction_masks"]) == 2
        assert np.array_equal(masks, before)

    def test_region_tokens_are_the_covered_cells_of_the_whole_image(self, small_model, small_processor, frames):
        masks = torch.zeros(1, 60, 80, dtype=torch.bool)
        masks[0, 30:, 40:] = True  # the last of 2 x 2 cells
        inputs = small_processor("<image>Hello.", image=frames[0], mask_prompts=masks)
        with torch.no_grad():
            embeddings = small_model.embed_prompt(inputs.input_ids, inputs.pixel_values, inputs.region_masks)
            features = small_model.get_image_features(inputs.pixel_values)
        visual = embeddings[inputs.input_ids == small_processor.img_context_token_id]
        assert torch.equal(visual, torch.cat([features.flatten(0, 1), features[-1][3:]]))


class TestConversation:
    def test_text_only(self, small_model, answering, encoded_frames):
        with answering(small_model, "Hello.<|im_end|>"):
            result = small_model.predict_forward(text="<image>Hi!")
        assert (result["prediction"], result["prediction_masks"]) == ("Hello.<|im_end|>", [])
        assert "<image>" not in result["past_text"]
        assert encoded_frames == []

    def test_the_second_turn_knows_the_first(self, small_model, frames, answering, monkeypatch):
        prompts = []
        generate = small_model.generate
        monkeypatch.setattr(small_model, "generate", lambda **kw: (prompts.append(kw["input_ids"]), generate(**kw))[1])
        with answering(small_model, ONE):
            first = small_model.predict_forward(video=frames, text=TEXT)
        with answering(small_model, ONE):
            second = small_model.predict_forward(video=frames, text="And now?", past_text=first["past_text"])
        first_ids, second_ids = (ids[0].tolist() for ids in prompts)
        assert second_ids[: len(first_ids)] == first_ids
        text = small_model.processor.tokenizer.decode(second_ids[len(first_ids) :])
        assert text == f"{ONE}\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        assert len(second["prediction_masks"]) == 1
        assert second["past_text"].startswith(first["past_text"])

    def test_a_past_image_must_be_given_again(self, small_model, frames, answering):
        with answering(small_model, ONE):
            first = small_model.predict_forward(image=frames[0], text=TEXT)
        with pytest.raises(ValueError, match="no image and no video"):
            small_model.predict_forward(text="And now?", past_text=first["past_text"])


class TestSegment:
    def test_streamed_equals_whole(self, small_model, frames, video_file, answering):
        for video in (frames, video_file):
            with answering(small_model, TWO):
                whole = small_model.predict_forward(video=video, text=TEXT)
            with answering(small_model, TWO):
                segmentation = small_model.segment(video, TEXT)
            assert isinstance(segmentation, VideoSegmentation)
            streamed = list(segmentation)
            assert [idx for idx, _ in streamed] == list(range(12))
            assert np.array_equal(np.stack([masks for _, masks in streamed], axis=1), whole["prediction_masks"])
            assert segmentation.prediction == whole["prediction"]
            assert segmentation.past_text == whole["past_text"]
            assert (segmentation.num_objects, segmentation.num_frames) == (2, 12)
        with answering(small_model, TWO):
            other = small_model.segment(frames, TEXT, max_prompt_frames=1)
        assert not np.array_equal(np.stack([masks for _, masks in other], axis=1), whole["prediction_masks"])

    def test_the_answer_comes_before_any_tracking(self, small_model, frames, answering, encoded_frames):
        with answering(small_model, ONE):
            segmentation = small_model.segment(frames, TEXT)
        assert segmentation.prediction == ONE
        assert encoded_frames == []
        next(segmentation)
        assert len(encoded_frames) == 5

    def test_a_phrase_becomes_a_request(self, small_model, frames, answering):
        with answering(small_model, ONE):
            assert "user\n<image>Please segment the disk.<" in small_model.segment(frames, "the disk").past_text

    def test_batches_of_frames_give_the_same_masks(self, small_model, frames, answering, monkeypatch):
        """As on a GPU: the 12 frames are 5 sampled ones and 7 others."""
        with answering(small_model, TWO):
            expected = [masks for _, masks in small_model.segment(frames, TEXT)]
        encode_images, sizes = small_model.propagator.encode_images, []
        monkeypatch.setattr(
            small_model.propagator,
            "encode_images",
            lambda pixels: (sizes.append(len(pixels)), encode_images(pixels))[1],
        )
        monkeypatch.setattr(modeling_sa2va_i.Sam2Propagator, "frames_per_batch", 4)
        with answering(small_model, TWO):
            masks = [masks for _, masks in small_model.segment(frames, TEXT)]
        assert sizes == [4, 1, 4, 1, 1, 1]
        assert np.array_equal(masks, expected)
        assert not np.array_equal(masks[0], masks[1])

    def test_without_seg(self, small_model, frames, answering):
        with answering(small_model, NONE):
            assert list(small_model.segment(frames, TEXT)) == []

    def test_holds_no_frame(self, small_model, frames, answering, monkeypatch):
        """Frames are asked for as they are tracked, few ahead, and the bank stays as it is once it is full."""
        asked, sizes = [], []

        class Endless(modeling_sa2va_i.Video):
            num_frames, original_size = 60, (60, 80)

            def __iter__(self):
                for idx in range(60):
                    asked.append(idx)
                    yield frames[idx % 12]

            def frames_at(self, indices):
                return [frames[idx % 12] for idx in indices]

        tracker_init = modeling_sa2va_i.ObjectTracker.__init__
        trackers = []
        monkeypatch.setattr(
            modeling_sa2va_i.ObjectTracker,
            "__init__",
            lambda self, *args, **kwargs: (trackers.append(self), tracker_init(self, *args, **kwargs))[1],
        )
        with answering(small_model, ONE):
            segmentation = small_model.segment(Endless(), TEXT)
        for frame_idx, _ in segmentation:
            assert not asked or asked[-1] <= frame_idx + 3
            sizes.append(len(trackers[0].memory))
        assert max(sizes[20:]) <= 5 + 15  # prompt frames among the last 15 leave fewer of them
        assert sizes[30:45] == sizes[45:]


class TestBadInput:
    """One error that names what came in, before any model work."""

    @pytest.fixture(autouse=True)
    def _no_model_work(self, small_model, monkeypatch):
        def fail(*args, **kwargs):
            pytest.fail("the model was run")

        monkeypatch.setattr(small_model.vision_model, "forward", fail)
        monkeypatch.setattr(small_model, "generate", fail)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "text.*None"),
            ({"text": ""}, "text.*''"),
            ({"video": [], "text": "a"}, "no frames"),
            ({"video": "nowhere.mp4", "text": "a"}, r"nowhere\.mp4"),
            ({"image": "nowhere.png", "text": "a"}, r"nowhere\.png"),
            ({"video": [Image.new("RGB", (4, 4)), Image.new("RGB", (4, 6))], "text": "a"}, "one size"),
            ({"video": [Image.new("RGB", (4, 4))], "image": Image.new("RGB", (4, 4)), "text": "a"}, "not both"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "sample_idx": [1]}, r"sample_idx.*\[1\]"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "sample_num_frames": 0}, "sample_num_frames.*0"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "max_prompt_frames": 0}, "max_prompt_frames.*0"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "max_objects": 0}, "max_objects.*0"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "decoding": "x"}, "decoding.*'x'"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "sampling": "x"}, "sampling.*'x'"),
            ({"video": [Image.new("RGB", (4, 4))], "text": "a", "mask_prompts": np.ones((1, 4, 4))}, "mask_prompts"),
            ({"image": Image.new("RGB", (4, 4)), "text": "a", "mask_prompts": np.ones((1, 3, 4))}, r"\(n, 4, 4\)"),
        ],
    )
    def test_predict_forward(self, small_model, arguments, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            small_model.predict_forward(**arguments)

    def test_segment_raises_at_the_call(self, small_model):
        with pytest.raises(ValueError, match="no frames"):
            small_model.segment([], "the dog")

    def test_tokenizer_of_another_model(self, small_model, tokenizer, frames):
        other = copy.deepcopy(small_model.processor)
        other.seg_token_id += 1
        with pytest.raises(ValueError, match=r"another model's tokenizer"):
            small_model.predict_forward(image=frames[0], text="a", processor=other)


class TestLoading:
    """Through the Auto classes, with the code that lies beside the weights."""

    def test_auto_classes(self, converted, frames, answering):
        model = AutoModel.from_pretrained(converted, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        assert AutoConfig.from_pretrained(converted, trust_remote_code=True).template == "qwen_chat"
        tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True, use_fast=False)
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        assert processor.seg_token_id == model.config.seg_token_id
        for given in ({}, {"tokenizer": tokenizer}, {"processor": processor}, {"tokenizer": processor}):
            with answering(model, ONE):
                result = model.predict_forward(image=frames[0], text=TEXT, **given)
            assert result["prediction"] == ONE
        assert model.generation_config.max_new_tokens == 2048

    def test_processor_files_say_the_same_as_the_config(self, converted):
        model = Sa2VAiModel.from_pretrained(converted)
        processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
        ours = model.processor
        names = [name for name in vars(ours) if name not in ("tokenizer", "chat_template")]
        assert {name: getattr(processor, name) for name in names} == {name: getattr(ours, name) for name in names}

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
    def test_callers_arguments(self, small_checkpoint, dtype, frames, answering):
        model = Sa2VAiModel.from_pretrained(
            small_checkpoint, torch_dtype=dtype, low_cpu_mem_usage=True, device_map="cpu", local_files_only=True
        )
        assert model.dtype == getattr(torch, dtype if dtype != "auto" else "float32")
        with answering(model, TWO):
            result = model.predict_forward(video=frames[:3], text=TEXT)
        assert [masks.shape for masks in result["prediction_masks"]] == [(3, 60, 80)] * 2

    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
    def test_device_map(self, small_checkpoint, device_map, frames, answering):
        model = Sa2VAiModel.from_pretrained(small_checkpoint, device_map=device_map)
        with answering(model, ONE):
            assert len(model.predict_forward(video=frames[:2], text=TEXT)["prediction_masks"]) == 1

    def test_offloading_sam2_raises(self, small_config):
        """On a GPU that is too small, `device_map="auto"` leaves the last parts on the meta device."""
        model = Sa2VAiModel(small_config)
        modeling_sa2va_i._check_not_offloaded(model)
        model.grounding_encoder.to("meta")
        model.hf_device_map = {"": 0, "grounding_encoder": "cpu"}
        with pytest.raises(ValueError, match=r"offloads grounding_encoder.*language model instead"):
            modeling_sa2va_i._check_not_offloaded(model)

    def test_for_causal_lm(self, converted):
        model = AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True)
        assert model.config.llm_config.model_type == "qwen2"

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_reaches_every_part(self, small_checkpoint, implementation):
        model = Sa2VAiModel.from_pretrained(small_checkpoint, attn_implementation=implementation)
        used = {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        }
        assert {name.partition(".")[0] for name in used} >= {
            "vision_model",
            "language_model",
            "propagator",
            "grounding_encoder",
        }
        assert set(used.values()) == {implementation}

    def test_use_flash_attn_without_flash_attn(self, small_checkpoint, caplog, monkeypatch):
        monkeypatch.setattr(modeling_sa2va_i, "is_flash_attn_2_available", lambda: False)
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with caplog.at_level(logging.WARNING):
            model = Sa2VAiModel.from_pretrained(small_checkpoint, use_flash_attn=True)
        assert model.config._attn_implementation == "sdpa"
        messages = [record.getMessage() for record in caplog.records]
        assert len([message for message in messages if "flash-attn is not installed" in message]) == 1

    def test_round_trip(self, small_checkpoint, small_model, tmp_path):
        Sa2VAiModel.from_pretrained(small_checkpoint).save_pretrained(tmp_path)
        again = Sa2VAiModel.from_pretrained(tmp_path).state_dict()
        assert again.keys() == small_model.state_dict().keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in small_model.state_dict().items())

    @pytest.mark.parametrize(
        ("prefix", "part"),
        [
            ("propagator.mask_decoder.", "original mask decoder"),
            ("propagator.shared_image_embedding.", "original SAM 2"),
            ("propagator.memory_encoder.", "original SAM 2"),
            ("grounding_encoder.conv_s0.", "grounding_encoder"),
            ("text_hidden_fcs.0.bias", "text_hidden_fcs"),
            ("language_model.model.norm", "language_model"),
        ],
    )
    def test_missing_weights_raise(self, small_checkpoint, tmp_path, prefix, part):
        """transformers only warns, and fills them with noise."""
        folder = shutil.copytree(small_checkpoint, tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        kept = {key: tensor for key, tensor in weights.items() if not key.startswith(prefix)}
        assert len(kept) < len(weights)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{part}.*sa2va-i convert"):
            Sa2VAiModel.from_pretrained(folder)

    def test_unconverted_checkpoint_raises(self, sources):
        with pytest.raises(ValueError, match="sa2va-i convert"):
            Sa2VAiModel.from_pretrained(sources / "sa2va_i")

    def test_loading_info_is_still_given(self, small_checkpoint):
        model, info = Sa2VAiModel.from_pretrained(small_checkpoint, output_loading_info=True)
        assert isinstance(model, Sa2VAiModel)
        assert not info["missing_keys"]


class TestQuantization:
    @pytest.mark.peers
    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes(self, bits, tokenizer, tmp_path):
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `peers` is not installed")
        config = small_model_builder.config_for(tokenizer)
        config.llm_config.hidden_size = config.vision_config.hidden_size = 128  # its blocks are of 64
        model = Sa2VAiModel(config)
        model.save_pretrained(tmp_path)
        quantized = Sa2VAiModel.from_pretrained(
            tmp_path,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        )
        linear = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
        parts = {name.partition(".")[0] for name, part in quantized.named_modules() if isinstance(part, linear)}
        assert parts == {"language_model", "vision_model", "mlp1"}

    @pytest.mark.parametrize("skipped", [None, ["vision_model"]])
    def test_masks_are_never_quantized(self, skipped):
        given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        config = modeling_sa2va_i._without_mask_modules(given)
        assert set(config.llm_int8_skip_modules) == {
            *(skipped or ["lm_head"]),
            "propagator",
            "grounding_encoder",
            "text_hidden_fcs",
        }
        assert given.llm_int8_skip_modules == skipped

    def test_a_dict_will_do(self):
        given = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        config = modeling_sa2va_i._without_mask_modules(given)
        assert config.load_in_4bit
        assert "propagator" in config.llm_int8_skip_modules
        assert given == {"quant_method": "bitsandbytes", "load_in_4bit": True}


def test_merge_patches_is_pixel_shuffle():
    patches = torch.randn(2, 8 * 8, 5)
    expected = InternVLModel.pixel_shuffle(None, patches.view(2, 8, 8, 5), scale_factor=0.5).flatten(1, 2)
    assert torch.equal(merge_patches(patches, grid_size=4), expected)


def test_last_states_are_the_hidden_states(small_model, small_processor):
    prompt = small_processor(small_processor.prompt_text("Hello."))
    with last_states(small_model.get_decoder().norm) as states:
        output = small_model.generate(
            **prompt, max_new_tokens=6, output_hidden_states=True, return_dict_in_generate=True, eos_token_id=-1
        )
    expected = torch.cat([step[-1][0, -1:] for step in output.hidden_states])
    assert len(states) == 6
    assert torch.equal(torch.cat(states), expected)


def test_seg_states_are_those_at_the_token():
    """Step i takes generated token i - 1; the last token is never taken."""
    states = torch.arange(5.0)[:, None]
    token_ids = torch.tensor([9, 1, 9, 1, 9])
    assert select_seg_states(states, token_ids, seg_token_id=9).flatten().tolist() == [1.0, 3.0]


def test_forward_gives_logits(small_model, small_processor, frames):
    """With labels it gives their loss instead: see test_training.py."""
    inputs = small_processor(small_processor.prompt_text(TEXT, has_media=True), frames=frames[:2])
    output = small_model(**inputs)
    assert output.logits.shape == (1, inputs["input_ids"].shape[1], small_model.config.llm_config.vocab_size)
    assert output.past_key_values is not None


def test_length_limit_cuts_the_answer(small_model, frames, answering):
    with answering(small_model, ONE):
        result = small_model.predict_forward(image=frames[0], text=TEXT, max_new_tokens=2)
    assert len(small_model.processor.tokenizer(result["prediction"]).input_ids) == 2
    assert result["prediction_masks"] == []


def test_remote_code_needs_only_torch_transformers_numpy_pillow(converted):
    """Every other import would be asked of each user at load time."""
    from transformers.dynamic_module_utils import get_imports

    needed = {name for file in converted.glob("*.py") for name in get_imports(file)}
    allowed = {"torch", "transformers", "numpy", "PIL"}
    assert needed - sys.stdlib_module_names <= allowed


def test_generation_config_beside_the_weights(converted):
    content = json.loads((converted / "generation_config.json").read_text())
    assert content["eos_token_id"] == [399, 400]
    assert content["do_sample"] is False


class TestSegmentEach:
    PROMPTS = ("<image>\nPlease segment the disk.", "<image>\nPlease segment all.", "<image>\nIs there a cat?")
    ANSWERS = (ONE, TWO, NONE)

    @pytest.fixture
    def one_by_one(self, small_model, frames, answering):
        results = []
        for text, answer in zip(self.PROMPTS, self.ANSWERS):
            with answering(small_model, answer):
                results.append(small_model.predict_forward(video=frames, text=text))
        return results

    def segment_each(self, model, frames, answering, **options):
        tokens = [token for answer in self.ANSWERS for token in model.processor.tokenizer(answer).input_ids]
        with answering(model, tokens):
            segmentations = model.segment_each(frames, self.PROMPTS, **options)
        masks = [masks for _, masks in segmentations]
        return segmentations, [np.stack(of_prompt, axis=1) for of_prompt in zip(*masks)]

    @pytest.mark.parametrize("decoding", ["consistent", "memory"])
    def test_equals_one_by_one(self, small_model, frames, answering, decoding):
        segmentations, masks = self.segment_each(small_model, frames, answering, max_objects=1, decoding=decoding)
        assert segmentations.predictions == list(self.ANSWERS)
        assert segmentations.num_objects == [1, 2, 0]
        with answering(small_model, ONE):
            alone = small_model.predict_forward(video=frames, text=self.PROMPTS[0], decoding=decoding)
        assert np.array_equal(masks[0], alone["prediction_masks"])  # one object a batch in both

    @pytest.mark.parametrize("max_objects", [None, 1, 2])
    def test_batches_change_nothing(self, small_model, frames, answering, one_by_one, max_objects):
        """But roundings: batches of another size may differ in undecided pixels."""
        _, masks = self.segment_each(small_model, frames, answering, max_objects=max_objects)
        for ours, alone in zip(masks, one_by_one):
            expected = np.array(alone["prediction_masks"]).reshape(ours.shape)
            assert (ours != expected).mean() < 1e-3 if ours.size else True
        assert masks[2].shape == (0, 12, 60, 80)
        assert (masks[0][0] != masks[1][0]).mean() > 1e-3  # twin: another prompt's object

    @pytest.mark.parametrize(("max_objects", "sizes"), [(None, {2}), (1, {1})])
    def test_size_of_a_batch(self, small_model, frames, answering, monkeypatch, max_objects, sizes):
        seen, decode_tracked = set(), small_model.propagator.decode_tracked
        monkeypatch.setattr(
            small_model.propagator, "decode_tracked", lambda d, f, e: (seen.add(len(e)), decode_tracked(d, f, e))[1]
        )
        with answering(small_model, TWO):
            small_model.predict_forward(video=frames, text=TEXT, max_objects=max_objects)
        with answering(small_model, TWO):
            list(small_model.segment(frames, TEXT, max_objects=max_objects))
        assert seen == sizes

    def test_everything_is_seen_once(self, small_model, frames, answering, encoded_frames, seen_frames):
        self.segment_each(small_model, frames, answering, max_objects=2)
        assert len(seen_frames) == 5
        assert len(encoded_frames) == 12

    def test_probabilities(self, small_model, frames, answering):
        _, masks = self.segment_each(small_model, frames, answering)
        _, probabilities = self.segment_each(small_model, frames, answering, probabilities=True)
        assert probabilities[1].dtype == np.float32
        assert all(np.array_equal(soft > 0.5, hard) for soft, hard in zip(probabilities, masks))

    def test_no_object_at_all(self, small_model, frames, answering, encoded_frames):
        with answering(small_model, NONE):
            segmentations = small_model.segment_each(frames, self.PROMPTS[:1])
        assert list(segmentations) == []
        assert encoded_frames == []

    def test_frames_are_read_once(self, small_model, frames, answering, read_tokens):
        self.segment_each(small_model, frames, answering)
        assert read_tokens[0] > OF_FRAMES
        assert max(read_tokens[1:]) < OF_FRAMES


class TestRunLengthCodes:
    @pytest.mark.parametrize("medium", ["video", "image"])
    def test_they_decode_to_the_masks(self, small_model, frames, answering, medium):
        given = frames if medium == "video" else frames[0]
        results = []
        for return_rle in (False, True):
            with answering(small_model, TWO):
                results.append(small_model.predict_forward(**{medium: given}, text=TEXT, return_rle=return_rle))
        masks, codes = (result["prediction_masks"] for result in results)
        assert masks[0].any()
        assert np.array_equal([[decode(code) for code in of_object] for of_object in codes], masks)
        json.dumps(codes)

    def test_without_seg(self, small_model, frames, answering):
        with answering(small_model, NONE):
            assert small_model.predict_forward(video=frames, text=TEXT, return_rle=True)["prediction_masks"] == []

    def test_without_pycocotools(self, small_model, frames, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
        with pytest.raises(ImportError, match="pip install pycocotools"):
            small_model.predict_forward(video=frames, text=TEXT, return_rle=True)


class TestEncodedVideo:
    def ask(self, model, video, answering, answer=TWO, **options):
        with answering(model, answer):
            return model.predict_forward(video=video, text=TEXT, **options)

    @pytest.mark.parametrize("options", [{}, {"decoding": "memory"}, {"max_prompt_frames": 1}])
    def test_the_same_masks(self, small_model, frames, answering, options):
        expected = self.ask(small_model, frames, answering, **options)
        video = small_model.encode_video(frames)
        for _ in range(2):  # from fresh and from kept encodings
            result = self.ask(small_model, video, answering, **options)
            assert np.array_equal(result["prediction_masks"], expected["prediction_masks"])
        other = self.ask(small_model, small_model.encode_video(frames[::-1]), answering, **options)
        assert not np.array_equal(other["prediction_masks"], expected["prediction_masks"])

    def test_later_questions_encode_nothing(self, small_model, frames, answering, encoded_frames, seen_frames):
        video = small_model.encode_video(frames)
        first = self.ask(small_model, video, answering, ONE)
        assert (len(seen_frames), len(encoded_frames)) == (5, 12)
        with answering(small_model, TWO):
            small_model.predict_forward(video=video, text="And the others?", past_text=first["past_text"])
        with answering(small_model, ONE):
            list(small_model.segment(video, "the disk"))
        assert (len(seen_frames), len(encoded_frames)) == (5, 12)
        self.ask(small_model, frames, answering, ONE)  # twin: the frames themselves
        assert (len(seen_frames), len(encoded_frames)) == (10, 24)

    def test_other_sampled_frames_are_seen_anew(self, small_model, frames, answering, seen_frames):
        video = small_model.encode_video(frames)
        self.ask(small_model, video, answering)
        result = self.ask(small_model, video, answering, sample_num_frames=3)
        assert len(seen_frames) == 8
        expected = self.ask(small_model, frames, answering, sample_num_frames=3)
        assert np.array_equal(result["prediction_masks"], expected["prediction_masks"])

    def test_how_many_are_kept(self, small_model, frames, answering, encoded_frames):
        video = small_model.encode_video(frames, max_kept_frames=4)
        self.ask(small_model, video, answering)
        encoded_frames.clear()
        self.ask(small_model, video, answering)
        assert len(encoded_frames) == 8

    def test_frames_and_past_turns_are_read_once(self, small_model, frames, answering, read_tokens):
        """The frames, and what stands before them, are read at the first question alone."""
        video = small_model.encode_video(frames)
        first = self.ask(small_model, video, answering, ONE)
        with answering(small_model, NONE):
            again = small_model.predict_forward(video=video, text=TEXT.replace("disk", "other disk"))
        with answering(small_model, NONE):
            small_model.predict_forward(video=video, text="And the others?", past_text=again["past_text"])
        whole, second_question, second_turn = read_tokens
        assert whole > OF_FRAMES + 10
        assert max(second_question, second_turn) < OF_FRAMES
        read_tokens.clear()
        with answering(small_model, NONE):  # twins: other frames, and no kept encodings
            small_model.predict_forward(video=video, text=TEXT, sample_idx=[0, 2, 5, 8, 10])
        with answering(small_model, NONE):
            small_model.predict_forward(video=frames, text="And the others?", past_text=first["past_text"])
        assert min(read_tokens) > OF_FRAMES

    def test_what_was_read_once_gives_the_same_states(self, small_model, frames, answering):
        texts = ["<image>Please segment the disk.", "<image>Please segment the disks.", "<image>What moves?"]

        def embeddings(video, text):
            with answering(small_model, TWO), pytest.MonkeyPatch.context() as patch:
                seen, decode = [], small_model._decode_initial
                patch.setattr(small_model, "_decode_initial", lambda p, e: (seen.append(e), decode(p, e))[1])
                result = small_model.predict_forward(video=video, text=text, sample_num_frames=2)
            assert result["prediction"] == TWO
            return seen[0]

        kept, found = small_model.encode_video(frames), []
        for text in texts:
            found.append(embeddings(kept, text))
            torch.testing.assert_close(found[-1], embeddings(frames, text), rtol=0, atol=1e-5)
        assert (found[0] - found[1]).abs().max() > 1e-3

    def test_an_answer_that_fails_leaves_no_cache(self, small_model, frames, answering, read_tokens, monkeypatch):
        video = small_model.encode_video(frames)
        self.ask(small_model, video, answering, ONE)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(modeling_sa2va_i, "select_seg_states", lambda *args: 1 / 0)
            self.ask(small_model, video, answering, ONE)
        read_tokens.clear()
        self.ask(small_model, video, answering, ONE)
        assert read_tokens[0] > OF_FRAMES

    def test_a_cache_of_the_users_choice(self, small_model, frames, answering, monkeypatch):
        monkeypatch.setattr(small_model.generation_config, "cache_implementation", "static")
        video = small_model.encode_video(frames)
        for _ in range(2):
            assert self.ask(small_model, video, answering, ONE)["prediction"] == ONE

    def test_initial_masks_beside_the_propagated(self, small_model, frames, answering, encoded_frames):
        drafts = self.ask(small_model, frames, answering, return_drafts_only=True)
        encoded_frames.clear()
        with answering(small_model, TWO):
            segmentation = small_model.segment(small_model.encode_video(frames), "the disk")
        initial = dict(segmentation.initial_masks())
        assert list(initial) == segmentation.sample_idx
        assert np.array_equal(np.stack(list(initial.values()), axis=1), drafts["prediction_masks"])
        assert len(encoded_frames) == 5
        assert len(list(segmentation)) == 12
        assert len(encoded_frames) == 12

    def test_initial_masks_of_no_object(self, small_model, frames, answering, encoded_frames):
        with answering(small_model, NONE):
            assert list(small_model.segment(frames, "the disk").initial_masks()) == []
        assert encoded_frames == []


@pytest.mark.slow
def test_compiled_gives_the_same_masks(frames):
    """A minute and more of compiling; one object and several, memory that fills, batches of none and all."""
    model = small_model_builder.build()
    small_model_builder.always_answer_seg(model)

    def logits(prompts):
        found = []
        for _, of_frame in model.segment_each(frames, prompts, probabilities=True):
            found.append(np.concatenate(of_frame))
        return np.stack(found)

    plain = [logits(["one"]), logits(["one", "two"])]
    assert (plain[0][0] - plain[0][1]).max() > 0.5
    model.compile_for_video()
    for expected, prompts in zip(plain, (["one"], ["one", "two"]), strict=True):
        compiled = logits(prompts)
        assert not np.array_equal(compiled, expected)  # other kernels ran
        assert np.abs(compiled - expected).max() < 0.02
        assert ((compiled > 0.5) != (expected > 0.5)).mean() < 1e-4
