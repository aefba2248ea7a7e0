import json

import av
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sa2va_i import cli

TWO, NONE = "It is [SEG] and [SEG].<|im_end|>", "It is not there.<|im_end|>"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `sa2va-i` with these arguments as the shell does; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sa2va-i", *map(str, arguments)])
        capsys.readouterr()  # what was printed before
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def segment(run, small_model, small_checkpoint, answering, monkeypatch):
    """`sa2va-i segment` with the small model, which answers as told."""
    monkeypatch.setattr(cli, "load_model", lambda *args: small_model)

    def segment(answer, *arguments):
        with answering(small_model, answer):
            return run("segment", *arguments, "--model", small_checkpoint)

    return segment


def read_mask(path) -> np.ndarray:
    return np.asarray(Image.open(path)) > 0


class TestSegment:
    def test_video(self, segment, video_file, tmp_path, small_model, answering):
        code, out, _ = segment(TWO, video_file, "the disk", "-o", tmp_path / "out")
        assert (code, out) == (0, TWO + "\n")
        answer = json.loads((tmp_path / "out" / "answer.json").read_text())
        assert answer["text"] == "Please segment the disk."
        assert answer["prediction"] == TWO
        assert answer["sample_idx"] == [0, 2, 5, 8, 11]
        assert (answer["num_objects"], answer["num_frames"]) == (2, 12)
        with answering(small_model, TWO):
            expected = small_model.predict_forward(video=video_file, text="Please segment the disk.")
        for number, masks in enumerate(expected["prediction_masks"], start=1):
            files = sorted((tmp_path / "out" / "masks" / str(number)).iterdir())
            assert [file.name for file in files] == [f"{idx:05d}.png" for idx in range(12)]
            assert np.array_equal([read_mask(file) for file in files], masks)
        with av.open(str(tmp_path / "out" / "overlay.mp4")) as overlay:
            stream = overlay.streams.video[0]
            assert (stream.width, stream.height, stream.average_rate) == (80, 60, 10)
            assert len(list(overlay.decode(stream))) == 12

    def test_folder_of_frames(self, segment, frames, tmp_path):
        (tmp_path / "frames").mkdir()
        for idx, frame in enumerate(frames[:3]):
            frame.save(tmp_path / "frames" / f"{idx}.jpg")
        code, _, _ = segment(TWO, tmp_path / "frames", "the disk", "-o", tmp_path / "out")
        assert code == 0
        assert len(list((tmp_path / "out" / "masks" / "1").iterdir())) == 3

    def test_image(self, segment, frames, tmp_path):
        frames[0].save(tmp_path / "frame.png")
        code, _, _ = segment(TWO, tmp_path / "frame.png", "the disk", "-o", tmp_path / "out")
        assert code == 0
        assert read_mask(tmp_path / "out" / "masks" / "2.png").shape == (60, 80)
        overlay = np.asarray(Image.open(tmp_path / "out" / "overlay.png"))
        assert overlay.shape == (60, 80, 3)
        assert not np.array_equal(overlay, frames[0])

    def test_nothing_found(self, segment, video_file, tmp_path):
        code, out, error = segment(NONE, video_file, "the disk", "-o", tmp_path / "out")
        assert (code, out) == (0, NONE + "\n")
        assert "no masks" in error
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["answer.json"]

    def test_options_reach_the_model(self, segment, video_file, tmp_path):
        segment(TWO, video_file, "the disk", "-o", tmp_path / "out", "--frames", 3, "--sampling", "first")
        assert json.loads((tmp_path / "out" / "answer.json").read_text())["sample_idx"] == [0, 1, 2]

    def test_an_interrupted_run_leaves_nothing(self, segment, video_file, tmp_path, monkeypatch):
        drawn = []

        def interrupt(frame, masks):
            drawn.append(frame)
            if len(drawn) == 5:
                raise KeyboardInterrupt
            return frame

        monkeypatch.setattr(cli, "draw_overlay", interrupt)
        code, *_ = segment(TWO, video_file, "the disk", "-o", tmp_path / "out")
        assert code == 130
        assert list(tmp_path.iterdir()) == []

    def test_existing_results_are_kept(self, segment, video_file, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "answer.json").write_text("mine")
        code, _, error = segment(TWO, video_file, "the disk", "-o", tmp_path / "out")
        assert (code, error.count("\n")) == (2, 1)
        assert "exists already" in error
        assert (tmp_path / "out" / "answer.json").read_text() == "mine"

    @pytest.mark.parametrize("name", ["nowhere.mp4", "text.mp4", "text.png"])
    def test_bad_input_is_told_in_one_line(self, segment, tmp_path, name):
        if "text" in name:
            (tmp_path / name).write_text("no media")
        code, out, error = segment(TWO, tmp_path / name, "the disk", "-o", tmp_path / "out")
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert name in error
        assert not (tmp_path / "out").exists()


class TestConvertAndInfo:
    def test_convert(self, run, sources, sam2_config, tmp_path, converted):
        (tmp_path / "sam2.json").write_text(json.dumps(sam2_config))
        code, *_ = run(
            *("convert", sources / "sa2va", tmp_path / "out"),
            *("--sam2", sources / "sam2.pt", "--sam2-config", tmp_path / "sam2.json"),
        )
        assert code == 0
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()

    def test_info(self, run, converted):
        code, out, _ = run("info", converted)
        assert code == 0
        facts = dict(line.split(":", 1) for line in out.splitlines())
        assert facts["language model"].strip() == "qwen2, 2 layers x 64"
        assert facts["  grounding_encoder"].strip() == "4.2 M"
        assert facts["dtype"].strip() == "float32"

    def test_info_of_an_unconverted_one(self, run, sources):
        code, out, _ = run("info", sources / "sa2va")
        assert code == 0
        assert "sa2va_chat (convert it first)" in out

    def test_no_such_checkpoint(self, run, tmp_path):
        code, _, error = run("info", tmp_path / "nowhere")
        assert (code, error.count("\n")) == (2, 1)


def test_load_model(small_checkpoint):
    model = cli.load_model(str(small_checkpoint), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("command", [(), ("segment",), ("convert",), ("info",)])
def test_help(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
