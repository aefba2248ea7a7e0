"""The demo behind its page: uploads, answers as HTML, files to take away, and several visits at once."""

import json

import numpy as np
import pytest
from PIL import Image

from masks_in import masks_in
from sa2va_i.evaluation.masks import decode
from sa2va_i.files import staged_folder
from sa2va_i.overlay import VideoWriter, object_color
from sa2va_i.processing_sa2va_i import open_video
from sa2va_i.space.results import files_in, writing
from sa2va_i.space.service import MAX_ENCODED, MAX_QUESTION, Service, Settings, Update
from sa2va_i.space.uploads import Limits, open_upload
from sa2va_i.space.wording import answer_html, conversation_html, error_html, progress_html


@pytest.fixture
def service(seg_model):
    service = Service(seg_model)
    yield service
    service.close()


@pytest.fixture(scope="module")
def other_video(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "backwards.mp4"
    with VideoWriter(path, fps=10) as writer:
        for frame in frames[::-1][:8]:
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def photo(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    frames[3].save(path)
    return path


def last(updates) -> Update:
    *_, update = updates
    return update


class TestUploads:
    def test_what_is_taken(self, video_file, photo):
        assert open_upload(video_file, Limits()).num_frames == 12
        assert open_upload(photo, Limits()).size == (80, 60)

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (Limits(num_bytes=100), "0 MB"),
            (Limits(seconds=0.5), r"lasts \d+ s"),
            (Limits(num_frames=11), "has 12 frames; the limit here is 11"),
            (Limits(num_pixels=1000), "80 x 60 pixels"),
        ],
    )
    def test_limits(self, video_file, limits, message, monkeypatch):
        monkeypatch.setattr("sa2va_i.space.uploads.open_video", lambda path: pytest.fail("decoded before the check"))
        with pytest.raises(ValueError, match=message):
            open_upload(video_file, limits)

    def test_large_photo(self, photo):
        with pytest.raises(ValueError, match="80 x 60 pixels"):
            open_upload(photo, Limits(num_pixels=1000))

    @pytest.mark.parametrize("name", ["notes.txt", "notes.mp4", "broken.mp4", "broken.png", "empty.mp4"])
    def test_what_is_no_media(self, name, tmp_path, video_file):
        content = {"notes": b"no media", "broken": video_file.read_bytes()[:300], "empty": b""}
        path = tmp_path / name
        path.write_bytes(content[path.stem])
        with pytest.raises(ValueError, match="cannot be read as a") as error:
            open_upload(path, Limits())
        assert str(tmp_path) not in str(error.value)  # a visitor sees no path


class TestWording:
    def test_each_seg_in_its_color(self):
        html = answer_html("<p> a dog </p> [SEG] and [SEG].<|im_end|>")
        first, second = (",".join(map(str, object_color(number))) for number in (0, 1))
        assert f'<mark style="background:rgb({first})' in html
        assert ">1 a dog</mark> and <mark" in html
        assert f"rgb({second})" in html
        assert html.endswith(">2</mark>.")

    def test_everything_is_escaped(self):
        evil = "<script>alert(1)</script>"
        for html in (
            answer_html(f"{evil} <p>{evil}</p> [SEG]"),
            conversation_html([(evil, answer_html(evil))]),
            error_html(evil),
            progress_html(Update(evil)),
            progress_html(Update(evil, 1, 2)),
        ):
            assert "<script" not in html
            assert "&lt;script" in html

    def test_progress(self):
        assert '<progress value="3" max="12">' in progress_html(Update("Tracking", 3, 12))
        assert "Tracking 3 of 12" in progress_html(Update("Tracking", 3, 12))
        assert "<progress" not in progress_html(Update("Done"))


def test_files_hold_the_masks(frames, tmp_path):
    masks = np.random.default_rng(0).random((2, 12, 60, 80)) > 0.5
    with staged_folder(tmp_path / "out") as staged, writing(staged, 2, fps=10) as writer:
        for frame_idx, frame in enumerate(frames):
            writer.write(frame_idx, frame, masks[:, frame_idx])
    files = files_in(tmp_path / "out", fps=10)
    assert np.array_equal(masks_in(files.masks), masks)
    codes = json.loads(files.codes.read_text())["objects"]
    assert np.array_equal(np.stack([[decode(code) for code in of_object] for of_object in codes]), masks)
    assert open_video(files.overlay).num_frames == 12


class TestService:
    def test_masks_are_those_of_predict_forward(self, service, seg_model, video_file):
        updates = list(service.ask("me", video_file, "the disk"))
        expected = seg_model.predict_forward(video=video_file, text="Please segment the disk.")
        masks = masks_in(updates[-1].files.masks)
        assert np.array_equal(masks, expected["prediction_masks"])
        assert masks.any()
        assert not masks.all()
        assert updates[-1].prediction == expected["prediction"]
        assert [(one.done, one.total) for one in updates if one.stage == "Tracking"] == [(n + 1, 12) for n in range(12)]
        assert [caption for _, caption in updates[-1].drafts] == [f"Frame {idx}" for idx in expected["sample_idx"]]

    def test_photo(self, service, seg_model, photo):
        update = last(service.ask("me", photo, "the disk"))
        expected = seg_model.predict_forward(image=photo, text="Please segment the disk.")
        assert np.array_equal(masks_in(update.files.masks), expected["prediction_masks"])
        assert Image.open(update.files.overlay).size == (80, 60)

    def test_a_second_question_encodes_nothing(self, service, seg_model, video_file, monkeypatch):
        first = last(service.ask("me", video_file, "the disk"))
        encoded = []
        forward = seg_model.propagator.vision_encoder.forward
        monkeypatch.setattr(
            seg_model.propagator.vision_encoder,
            "forward",
            lambda pixels, **kwargs: encoded.append(len(pixels)) or forward(pixels, **kwargs),
        )
        monkeypatch.setattr(seg_model.vision_model, "forward", lambda *args, **kwargs: pytest.fail("seen again"))
        second = last(service.ask("me", video_file, "And the other?", first.past_text))
        assert encoded == []
        assert second.past_text.startswith(first.past_text)
        assert second.files != first.files
        assert first.files.masks.is_file()  # what was offered stays
        monkeypatch.undo()

    def test_draft(self, service, video_file):
        update = last(service.ask("me", video_file, "the disk", settings=Settings(num_frames=3, draft_only=True)))
        assert len(update.drafts) == 3
        assert update.files is None

    def test_settings_reach_the_model(self, service, seg_model, video_file):
        settings = Settings(num_frames=4, num_prompt_frames=1, decoding="memory")
        update = last(service.ask("me", video_file, "the disk", settings=settings))
        options = {"sample_num_frames": 4, "max_prompt_frames": 1, "decoding": "memory"}
        expected = seg_model.predict_forward(video=video_file, text="Please segment the disk.", **options)
        assert np.array_equal(masks_in(update.files.masks), expected["prediction_masks"])

    def test_stopping_leaves_nothing(self, service, video_file):
        updates = service.ask("me", video_file, "the disk")
        while next(updates).stage != "Tracking":
            pass
        assert list(service._root.rglob("*.zip"))
        updates.close()
        assert not [path for path in service._root.rglob("*") if path.is_file()]

    def test_no_object(self, service, small_model, video_file, answering):
        service._model = small_model
        with answering(small_model, "It is not there.<|im_end|>"):
            update = last(service.ask("me", video_file, "the disk"))
        assert (update.num_objects, update.files, update.drafts) == (0, None, ())

    def test_visits_are_apart(self, service, seg_model, video_file, other_video):
        """Two visits, their questions interleaved."""
        mine, yours = service.ask("me", video_file, "the disk"), service.ask("you", other_video, "the disk")
        for _ in range(8):
            my_last, your_last = next(mine), next(yours)
        my_last, your_last = last(mine), last(yours)
        for update, path in ((my_last, video_file), (your_last, other_video)):
            expected = seg_model.predict_forward(video=path, text="Please segment the disk.")
            assert np.array_equal(masks_in(update.files.masks), expected["prediction_masks"])
        service.forget("me")
        assert not my_last.files.masks.exists()
        assert your_last.files.masks.exists()

    def test_encodings_of_few_visits_are_kept(self, service, video_file):
        for visit in range(MAX_ENCODED + 2):
            last(service.ask(str(visit), video_file, "the disk", settings=Settings(draft_only=True)))
        assert list(service._encoded) == [str(visit) for visit in range(2, MAX_ENCODED + 2)]

    def test_another_upload_of_a_visit(self, service, seg_model, video_file, other_video):
        last(service.ask("me", video_file, "the disk", settings=Settings(draft_only=True)))
        update = last(service.ask("me", other_video, "the disk"))
        expected = seg_model.predict_forward(video=other_video, text="Please segment the disk.")
        assert np.array_equal(masks_in(update.files.masks), expected["prediction_masks"])

    def test_close_removes_everything(self, service, video_file):
        update = last(service.ask("me", video_file, "the disk"))
        service.close()
        assert not update.files.masks.exists()
        assert not service._root.exists()

    @pytest.mark.parametrize(
        ("question", "message"),
        [("  ", "type what to look for"), ("a" * (MAX_QUESTION + 1), "501 characters"), ("<image> the dog", "<image>")],
    )
    def test_bad_questions(self, service, video_file, question, message):
        with pytest.raises(ValueError, match=message):
            list(service.ask("me", video_file, question))

    def test_facts(self, service, video_file, photo):
        assert service.look_at(video_file) == "Video, 12 frames, 1.2 s, 80 x 60"
        assert service.look_at(photo) == "Photo, 80 x 60"
