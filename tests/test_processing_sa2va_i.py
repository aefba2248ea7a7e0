import shutil
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from sa2va_i.processing_sa2va_i import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAM2_MEAN,
    SAM2_STD,
    Sa2VAiProcessor,
    VideoFile,
    batches,
    check_mask_prompts,
    check_sample_idx,
    first_frame_indices,
    in_background,
    load_image,
    open_video,
    segmentation_request,
    split_into_tiles,
    tile_grid,
    to_pixel_values,
    uniform_frame_indices,
)


class TestSampling:
    @pytest.mark.parametrize(
        ("num_frames", "expected"), [(1, [0]), (3, [0, 1, 2]), (9, [0, 2, 4, 6, 8]), (100, [0, 24, 49, 74, 99])]
    )
    def test_uniform(self, num_frames, expected):
        assert uniform_frame_indices(num_frames, num_samples=5) == expected

    def test_one_sample_is_the_first_frame(self):
        assert uniform_frame_indices(10, 1) == [0]

    def test_first(self):
        assert first_frame_indices(10, 4) == [0, 1, 2, 3]
        assert first_frame_indices(2, 4) == [0, 1]

    def test_own(self):
        assert check_sample_idx((7, 2, 2), 8) == [2, 7]

    @pytest.mark.parametrize("sample_idx", [[8], [-1], []])
    def test_own_out_of_range(self, sample_idx):
        with pytest.raises(ValueError, match=r"sample_idx.*0\.\.7"):
            check_sample_idx(sample_idx, 8)


class TestTiles:
    @pytest.mark.parametrize(
        ("size", "grid"),
        [
            ((448, 448), (1, 1)),
            ((800, 800), (2, 2)),
            ((1200, 900), (4, 3)),
            ((1300, 650), (4, 2)),
            ((100, 1300), (1, 12)),
        ],
    )
    def test_grid_is_the_nearest_aspect_ratio(self, size, grid):
        assert tile_grid(*size, min_tiles=1, max_tiles=12, tile_size=448) == grid

    @pytest.mark.parametrize(("size", "grid"), [((400, 200), (2, 1)), ((1260, 630), (2, 1)), ((1270, 635), (4, 2))])
    def test_more_pixels_take_more_tiles(self, size, grid):
        """One aspect ratio: the larger grid is taken from half of its 8 x 448 x 448 pixels on."""
        assert tile_grid(*size, 1, 12, 448) == grid

    def test_thumbnail_comes_last_and_only_with_several(self):
        image = Image.new("RGB", (1200, 900), "red")
        assert len(split_into_tiles(image, 1, 12, 448, use_thumbnail=True)) == 13
        assert len(split_into_tiles(image, 1, 12, 448, use_thumbnail=False)) == 12
        assert len(split_into_tiles(image, 1, 1, 448, use_thumbnail=True)) == 1

    def test_tiles_go_row_by_row(self):
        image = Image.new("RGB", (200, 200))
        image.paste("white", (100, 0, 200, 100))
        tiles = split_into_tiles(image, 4, 4, 100, use_thumbnail=False)
        assert [np.asarray(tile).mean() > 127 for tile in tiles] == [False, True, False, False]


def test_pixel_values(frames):
    pixels = to_pixel_values(frames[:2], 56, IMAGENET_MEAN, IMAGENET_STD)
    resized = np.asarray(frames[1].resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float64)
    expected = (resized / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert pixels.shape == (2, 3, 56, 56)
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0), expected, atol=1e-5)


def test_sam2_normalisation_is_imagenets_in_bfloat16():
    assert tuple(torch.tensor(IMAGENET_MEAN).bfloat16().tolist()) == SAM2_MEAN
    assert tuple(torch.tensor(IMAGENET_STD).bfloat16().tolist()) == SAM2_STD


class TestImages:
    def test_sources(self, frames, tmp_path):
        frames[0].save(tmp_path / "frame.png")
        for source in (frames[0], tmp_path / "frame.png", str(tmp_path / "frame.png"), np.asarray(frames[0])):
            assert np.array_equal(load_image(source), frames[0])

    def test_a_file_is_turned_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
        assert load_image(tmp_path / "phone.jpg").size == (20, 40)
        assert open_video([tmp_path / "phone.jpg"]).original_size == (40, 20)

    @pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), float)])
    def test_bad_array(self, array):
        with pytest.raises(ValueError, match=r"\(height, width, 3\) uint8"):
            load_image(array)

    def test_bad_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_image(tmp_path / "nowhere.png")
        (tmp_path / "text.png").write_text("no image")
        with pytest.raises(ValueError, match=r"text\.png"):
            load_image(tmp_path / "text.png")


class TestVideos:
    @pytest.fixture
    def folder(self, frames, tmp_path):
        for idx, frame in enumerate(frames):
            frame.save(tmp_path / f"frame_{idx}.png")  # frame_10 sorts before frame_2 as text
        (tmp_path / "notes.txt").write_text("not a frame")
        return tmp_path

    def test_frames_from_anywhere_are_the_same(self, frames, folder):
        files = [folder / f"frame_{idx}.png" for idx in range(len(frames))]
        for source in (frames, tuple(frames), folder, str(folder), files, np.stack(frames)):
            video = open_video(source)
            assert (video.num_frames, video.original_size) == (12, (60, 80))
            assert all(np.array_equal(ours, frame) for ours, frame in zip(video, frames, strict=True))
            assert np.array_equal(video.frames_at([3, 7])[1], frames[7])

    def test_file(self, video_file, frames):
        video = open_video(video_file)
        assert (video.num_frames, video.original_size, video.fps) == (12, (60, 80), 10)
        decoded = list(video)
        assert len(decoded) == 12
        assert all(np.abs(np.subtract(ours, frame, dtype=int)).mean() < 12 for ours, frame in zip(decoded, frames))
        assert all(np.array_equal(ours, decoded[idx]) for ours, idx in zip(video.frames_at([0, 5, 11]), (0, 5, 11)))

    def test_file_is_decoded_as_it_is_asked_for(self, video_file):
        decoded = []

        class Counting(VideoFile):
            def _decode(self):
                for frame in super()._decode():
                    decoded.append(frame.pts)
                    yield frame

        video = Counting(video_file)
        decoded.clear()
        next(iter(video))
        assert len(decoded) == 1

    def test_a_phones_video_is_turned_upright(self, video_file, tmp_path):
        """Phones store upright videos lying, with a rotation in the track header."""
        data = bytearray(video_file.read_bytes())
        matrix = data.index(b"tkhd") + 4 + 40  # after the header's fields of version 0
        one = 0x00010000
        data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
        (tmp_path / "phone.mp4").write_bytes(data)
        upright, lying = open_video(tmp_path / "phone.mp4"), open_video(video_file)
        assert upright.original_size == (80, 60)
        (first,) = upright.frames_at([0])
        assert np.array_equal(first, np.rot90(lying.frames_at([0])[0], k=-1))  # a quarter clockwise

    def test_an_opened_video_is_taken_as_it_is(self, video_file):
        video = open_video(video_file)
        assert open_video(video) is video

    @pytest.mark.parametrize("empty", [[], np.zeros((0, 4, 4, 3), np.uint8)])
    def test_no_frames(self, empty):
        with pytest.raises(ValueError, match="no frames"):
            open_video(empty)

    def test_folder_without_images(self, tmp_path):
        with pytest.raises(ValueError, match="no images"):
            open_video(tmp_path)

    def test_frames_of_different_sizes(self, frames):
        with pytest.raises(ValueError, match=r"\(60, 80\) for frame 0 and \(30, 80\) for frame 2"):
            open_video([*frames[:2], Image.new("RGB", (80, 30))])

    def test_bad_array(self):
        with pytest.raises(ValueError, match=r"\(T, height, width, 3\) uint8.*\(2, 3, 4\)"):
            open_video(np.zeros((2, 3, 4), np.uint8))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4"):
            open_video(tmp_path / "nowhere.mp4")

    def test_not_a_video(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video")
        with pytest.raises(ValueError, match=r"text\.mp4 cannot be read as a video"):
            open_video(tmp_path / "text.mp4")

    @pytest.mark.parametrize("kept", [0.5, 0.9])
    def test_truncated(self, video_file, tmp_path, kept):
        """The index of this file stands at its start, so it opens; the frames at its end are gone."""
        data = video_file.read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(ValueError, match=r"cut\.mp4.*frame \d+"):
            open_video(tmp_path / "cut.mp4")


class TestText:
    def test_template_wraps_the_text(self, small_processor):
        prompt = small_processor.prompt_text("<image>Hello.", has_media=True)
        assert prompt == "<|im_start|>user\n<image>Hello.<|im_end|>\n<|im_start|>assistant\n"

    def test_image_token_is_put_first_where_none_is(self, small_processor):
        assert "user\n<image>Hello." in small_processor.prompt_text("Hello.", has_media=True)

    def test_image_token_is_taken_out_without_an_image(self, small_processor):
        assert "<image>" not in small_processor.prompt_text("<image>Hello.")

    def test_turns_join(self, small_processor):
        first = small_processor.prompt_text("One?", has_media=True)
        for answer in ("Yes.<|im_end|>", "Yes."):  # closed by the model, or cut off
            past = small_processor.past_text(first, answer)
            second = small_processor.prompt_text("Two?", past, has_media=True)
            assert second.count("<image>") == 1
            assert "assistant\nYes.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>" in second

    def test_frames_become_spans(self, small_processor, frames):
        inputs = small_processor("<image>Hello.", frames=frames[:3])
        text = small_processor.tokenizer.decode(inputs.input_ids[0])
        assert text == "\n".join(["<img>" + "<IMG_CONTEXT>" * 4 + "</img>"] * 3) + "Hello."
        assert inputs.pixel_values.shape == (3, 3, 56, 56)

    def test_regions_follow_the_image(self, small_processor, frames):
        masks = torch.zeros(2, 60, 80, dtype=torch.bool)
        masks[0], masks[1, :30, :40] = True, True
        inputs = small_processor("<image>Hello.", image=frames[0], mask_prompts=masks)
        text = small_processor.tokenizer.decode(inputs.input_ids[0])
        context = "<IMG_CONTEXT>"
        regions = f"region1<vp>{context * 4}</vp>, region2<vp>{context}</vp>"
        assert f"</img>\nThere are 2 part regions in the picture: {regions}.\nHello." in text
        assert inputs.region_masks.sum((1, 2)).tolist() == [4, 1]

    def test_an_image_that_is_spoken_of_must_be_there(self, small_processor):
        past = small_processor.past_text("<image>Hello.", "Yes.")
        with pytest.raises(ValueError, match="no image and no video"):
            small_processor(past)

    def test_two_image_tokens(self, small_processor, frames):
        with pytest.raises(ValueError, match="may stand once"):
            small_processor("<image><image>", frames=frames[:1])

    def test_a_spelled_out_past_must_fit(self, small_processor, frames):
        """A caller may keep past turns with the spans spelled out, as with the original."""
        span = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
        assert small_processor(span + "Hello.", frames=frames[:1]).pixel_values is not None
        with pytest.raises(ValueError, match="4 <IMG_CONTEXT> tokens.*make 8"):
            small_processor(span + "Hello.", frames=frames[:2])

    @pytest.mark.parametrize(
        ("text", "request_"),
        [
            ("the dog that jumps first", "Please segment the dog that jumps first."),
            ("the dog.", "Please segment the dog."),
            ("Please segment the dog.", "Please segment the dog."),
            ("Segment everything", "Segment everything"),
            ("Where is the dog?", "Where is the dog?"),
            ("<image>the dog", "<image>the dog"),
        ],
    )
    def test_segmentation_request(self, text, request_):
        assert segmentation_request(text) == request_


class TestMaskPrompts:
    def test_forms(self):
        masks = np.zeros((2, 6, 8), np.uint8)
        masks[:, 1, 1] = 1
        for given in (masks, torch.from_numpy(masks), list(masks), [masks], masks.tolist()):
            checked = check_mask_prompts(given, (6, 8))
            assert (checked.shape, checked.dtype) == ((2, 6, 8), torch.bool)

    @pytest.mark.parametrize("shape", [(6, 8), (2, 8, 6), (2, 2, 6, 8)])
    def test_wrong_shape(self, shape):
        with pytest.raises(ValueError, match=r"\(n, 6, 8\)"):
            check_mask_prompts(np.ones(shape), (6, 8))

    def test_empty_region(self):
        with pytest.raises(ValueError, match=r"none in \[1\]"):
            check_mask_prompts(np.stack([np.ones((6, 8)), np.zeros((6, 8))]), (6, 8))


class TestTokenizer:
    @pytest.mark.parametrize("token", ["[SEG]", "<IMG_CONTEXT>"])
    def test_without_a_token(self, token, tmp_path, small_checkpoint, small_config):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (small_checkpoint / name).read_text(encoding="utf-8")
            (tmp_path / name).write_text(text.replace(token, "<other>"), encoding="utf-8")
        shutil.copy(small_checkpoint / "config.json", tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=small_config)
        with pytest.raises(ValueError, match=token.replace("[", r"\[").replace("]", r"\]")):
            Sa2VAiProcessor(tokenizer)

    def test_unknown_template(self, tokenizer):
        with pytest.raises(ValueError, match="vicuna"):
            Sa2VAiProcessor(tokenizer, template="vicuna")

    def test_stop_tokens(self, small_processor, tokenizer):
        words = tokenizer.convert_ids_to_tokens(small_processor.stop_token_ids)
        assert set(words) == {"<|im_end|>", "<|endoftext|>"}


class TestInBackground:
    def test_order_and_bound(self):
        made = []

        def items():
            for number in range(20):
                made.append(number)
                yield number

        for number in in_background(items(), 3):
            assert len(made) <= number + 4
            assert made[: number + 1] == list(range(number + 1))
        assert number == 19

    def test_in_another_thread(self):
        threads = in_background((threading.get_ident() for _ in range(3)), 1)
        assert threading.get_ident() not in set(threads)

    def test_an_error_comes_where_its_item_would(self):
        def items():
            yield "first"
            raise ValueError("broken at frame 1")

        found = in_background(items(), 4)
        assert next(found) == "first"
        with pytest.raises(ValueError, match="broken at frame 1"):
            next(found)

    def test_nothing_goes_on_when_nobody_asks(self):
        made, threads = [], threading.active_count()
        found = in_background((made.append(number) for number in range(1000)), 2)
        next(found)
        found.close()
        assert len(made) <= 3
        assert threading.active_count() == threads

    def test_no_items(self):
        assert list(in_background([], 2)) == []


def test_batches_have_two_sizes():
    assert list(batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches(range(5), 3)) == [[0, 1, 2], [3], [4]]
    assert list(batches([], 3)) == []
