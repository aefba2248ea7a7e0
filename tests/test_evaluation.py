"""The benchmarks on made-up data in each official layout, end to end."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import small_model as builder
from fake_datasets import EXPRESSIONS, MAKERS, NUM_FRAMES, SIZE, disk
from sa2va_i import cli
from sa2va_i.evaluation.datasets import DATASETS, MeViS, open_dataset
from sa2va_i.evaluation.masks import union_of
from sa2va_i.evaluation.metrics import boundary, boundary_accuracy, region_similarity, robustness
from sa2va_i.evaluation.report import Score, draw_worst, label_maps, score_run, summary
from sa2va_i.evaluation.runner import (
    RunOptions,
    expression_prompt,
    expressions_left,
    predict,
    prediction_folder,
    prepare_run,
    read_masks,
)
from sa2va_i.evaluation.submission import write_submission
from sa2va_i.processing_sa2va_i import to_rle


@pytest.fixture
def dataset_of(tmp_path):
    def dataset_of(name: str):
        MAKERS[name](tmp_path / "data")
        return open_dataset(name, tmp_path / "data")

    return dataset_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The small model, which answers [SEG] to everything."""
    folder = tmp_path_factory.mktemp("model") / "Sa2VA-i-4B"
    model = builder.build()
    builder.always_answer_seg(model)
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return cli.load_model(str(checkpoint), "cpu", "auto")


def finish(dataset, model, folder, **options):
    prepare_run(folder, "small", dataset, RunOptions(**options))
    predict(dataset, model, folder, RunOptions(**options))


class TestMetrics:
    """Against a plain implementation of the published definitions, written here."""

    @staticmethod
    def plain_j(truth, prediction):
        union = np.logical_or(truth, prediction).sum()
        return np.logical_and(truth, prediction).sum() / union if union else 1.0

    @staticmethod
    def plain_boundary(mask):
        """A pixel is on the boundary if its right, lower or lower right neighbour is of the other kind."""
        height, width = mask.shape
        result = np.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                below, right = min(y + 1, height - 1), min(x + 1, width - 1)
                neighbours = (mask[y, right], mask[below, x], mask[below, right])
                result[y, x] = any(neighbour != mask[y, x] for neighbour in neighbours)
        return result

    def plain_f(self, truth, prediction):
        radius = int(np.ceil(0.008 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
        of_truth, predicted = (np.argwhere(self.plain_boundary(mask)) for mask in (truth, prediction))
        if len(of_truth) == 0 or len(predicted) == 0:
            return float(len(of_truth) == len(predicted))
        squared = ((of_truth[:, None] - predicted[None]) ** 2).sum(-1)
        precision, recall = (squared.min(axis) <= radius**2 for axis in (0, 1))
        precision, recall = precision.mean(), recall.mean()
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def pairs(self):
        random = np.random.default_rng(0)
        blob = ndimage.gaussian_filter(random.standard_normal((4, 40, 50)), (0, 4, 4)) > 0
        noise = random.random((40, 50)) > 0.5
        empty, full, pixel, border = (np.zeros((40, 50), bool) for _ in range(4))
        full[:], pixel[17, 23], border[:, -3:] = True, True, True
        border[-2:] = True
        masks = [*blob, noise, empty, full, pixel, border, np.roll(border, 5), np.roll(blob[0], 1)]
        return [(a, b) for a in masks for b in masks]

    def test_equal_to_the_plain_ones(self):
        truth, prediction = (np.stack(masks) for masks in zip(*self.pairs()))
        j, f = region_similarity(truth, prediction), boundary_accuracy(truth, prediction)
        plain_j = [self.plain_j(*pair) for pair in self.pairs()]
        plain_f = [self.plain_f(*pair) for pair in self.pairs()]
        np.testing.assert_allclose(j, plain_j, atol=1e-6)
        np.testing.assert_allclose(f, plain_f, atol=1e-6)
        assert np.std(j) > 0.1
        assert np.std(f) > 0.1

    def test_boundaries(self):
        for mask, _ in self.pairs()[::11]:
            assert np.array_equal(boundary(mask), self.plain_boundary(mask))

    def test_empty_against_empty_is_one(self):
        empty = np.zeros((1, 20, 20), bool)
        assert region_similarity(empty, empty) == boundary_accuracy(empty, empty) == 1

    def test_robustness(self):
        truth, prediction, foreground = np.zeros((3, 3, 10, 10), bool)
        truth[0, :5], prediction[0, :7], foreground[0, :] = True, True, True  # 20 of 100 wrong
        prediction[1, 0], foreground[1, 0, 0] = True, True  # more wrong than there are objects
        assert robustness(truth, prediction, foreground).tolist() == [0.8, 0.0, 1.0]

    def test_overlapping_objects_do_not_wrap_around(self):
        """Adding uint8 masks makes 256 of them nothing."""
        mask = np.ones((5, 5), bool)
        assert union_of([[[to_rle(mask)] * 256]], (5, 5)).all()
        assert union_of([[to_rle(mask)]] * 256, (5, 5)).all()
        assert not union_of([[None]], (5, 5)).any()


class TestDatasets:
    @pytest.mark.parametrize("name", DATASETS)
    def test_missing_files_show_the_tree(self, name, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=rf"(?s){name} is not whole.*missing\. Expected:.*JPEGImages/<video>"
        ):
            open_dataset(name, tmp_path)

    def test_unknown_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"mevis-valid_u.*'coco'"):
            open_dataset("coco", tmp_path)

    def test_youtube_drops_the_test_videos(self, dataset_of):
        assert [video.name for video in dataset_of("ref-youtube-vos").videos] == ["aaa"]

    def test_revos_leaves_out_type_2(self, dataset_of):
        (video,) = dataset_of("revos").videos
        assert [(one.id, one.split) for one in video.expressions] == [
            ("0", "referring"),
            ("1", "referring"),
            ("2", "reasoning"),
        ]

    def test_masks(self, dataset_of):
        dataset = dataset_of("mevis-valid_u")
        truth = dataset.truth(dataset.videos[0], dataset.videos[0].expressions[0])
        assert truth.shape == (NUM_FRAMES, *SIZE)
        assert np.array_equal(truth[1], disk(1))
        assert not truth[2].any()

    def test_masks_of_davis(self, dataset_of):
        dataset = dataset_of("ref-davis17")
        (video,) = dataset.videos
        assert [one.targets for one in video.expressions] == [("1",)] * 4 + [("2",)] * 4
        assert np.array_equal(dataset.truth(video, video.expressions[5])[0], disk(0, number=1))

    def test_masks_of_revos(self, dataset_of):
        dataset = dataset_of("revos")
        (video,) = dataset.videos
        assert np.array_equal(dataset.truth(video, video.expressions[0])[1], disk(1) | disk(1, number=1))
        assert np.array_equal(dataset.foreground(video)[0], disk(0) | disk(0, number=1))

    def test_secret_masks(self, dataset_of):
        dataset = dataset_of("mevis-valid")
        with pytest.raises(NotImplementedError, match="server"):
            dataset.truth(dataset.videos[0], dataset.videos[0].expressions[0])


class TestRun:
    @pytest.mark.parametrize("name", ["mevis-valid_u", "ref-davis17", "revos"])
    def test_to_the_score(self, dataset_of, model, tmp_path, name):
        dataset, folder = dataset_of(name), tmp_path / "run"
        finish(dataset, model, folder)
        content = score_run(dataset, folder)
        rows = list(csv.DictReader((folder / "scores.csv").open()))
        number = sum(len(video.expressions) for video in dataset.videos)
        assert content["num_expressions"] == len(rows) == number
        means = content["scores"]["expressions"]
        if name == "revos":
            assert means["overall J&F"] == pytest.approx((means["referring J&F"] + means["reasoning J&F"]) / 2)
            assert "overall R" in means
        else:
            assert means["J&F"] == pytest.approx(100 * np.mean([float(row["J&F"]) for row in rows]), abs=1e-3)
        assert ("davis-annotators" in content["scores"]) is (name == "ref-davis17")
        assert "| J&F |" in (folder / "report.md").read_text() or name == "revos"

    def test_true_masks_score_100(self, dataset_of, model, tmp_path):
        dataset, folder = dataset_of("mevis-valid_u"), tmp_path / "run"
        finish(dataset, model, folder)
        assert score_run(dataset, folder)["scores"]["expressions"]["J&F"] < 90
        for video in dataset.videos:
            for expression in video.expressions:
                for frame, mask in zip(video.frames, dataset.truth(video, expression)):
                    Image.fromarray(mask).save(prediction_folder(folder, video, expression) / f"{frame}.png")
        assert score_run(dataset, folder, num_workers=2)["scores"]["expressions"] == {"J": 100, "F": 100, "J&F": 100}

    def test_equals_one_by_one(self, dataset_of, model, tmp_path):
        """All expressions of a video together, or each alone through `predict_forward`."""
        dataset = dataset_of("mevis-valid_u")
        finish(dataset, model, tmp_path / "run")
        video = dataset.videos[0]
        for expression in video.expressions:
            result = model.predict_forward(video=video.files, text=expression_prompt(expression.text))
            assert (read_masks(tmp_path / "run", video, expression) != result["prediction_masks"][0]).mean() < 1e-3

    def test_unfinished_runs_are_not_scored(self, dataset_of, tmp_path):
        dataset = dataset_of("mevis-valid_u")
        with pytest.raises(ValueError, match="5 of 5 expressions of mevis-valid_u are left"):
            score_run(dataset, tmp_path / "run")

    def test_only_what_is_left_is_predicted(self, dataset_of, model, tmp_path, monkeypatch):
        dataset, folder = dataset_of("mevis-valid_u"), tmp_path / "run"
        finish(dataset, model, folder)
        video = dataset.videos[0]
        lost = prediction_folder(folder, video, video.expressions[1])
        for file in lost.iterdir():
            file.unlink()
        lost.rmdir()
        (lost.parent / ".1.partial").mkdir()  # as a killed run leaves it
        assert expressions_left(folder, video) == [video.expressions[1]]
        asked = []
        each = model.segment_each
        monkeypatch.setattr(
            model,
            "segment_each",
            lambda files, texts, **options: (asked.extend(texts), each(files, texts, **options))[1],
        )
        finish(dataset, model, folder)
        assert asked == ["<image>\nPlease segment the thing that moves right."]
        assert not any(expressions_left(folder, video) for video in dataset.videos)

    def test_another_run_is_not_mixed_in(self, dataset_of, tmp_path):
        dataset = dataset_of("mevis-valid_u")
        prepare_run(tmp_path / "run", "small", dataset, RunOptions())
        prepare_run(tmp_path / "run", "small", dataset, RunOptions())
        with pytest.raises(ValueError, match="sample_num_frames = 5, and this one has 12"):
            prepare_run(tmp_path / "run", "small", dataset, RunOptions(sample_num_frames=12))

    def test_answers_without_seg_are_empty_masks(self, dataset_of, small_model, answering, tmp_path):
        dataset = dataset_of("ref-youtube-vos")
        no_answer = small_model.processor.tokenizer("It is not there.<|im_end|>").input_ids
        with answering(small_model, no_answer * 2):
            finish(dataset, small_model, tmp_path / "run")
        video = dataset.videos[0]
        assert not read_masks(tmp_path / "run", video, video.expressions[0]).any()

    @pytest.mark.parametrize(
        ("expression", "style", "prompt"),
        [
            ("the dog", "sa2va-i", "<image>\nPlease segment the dog."),
            ("who wins?", "sa2va-i", "<image>\nPlease segment who wins?."),
            ("who wins?", "sa2va", "<image>\nwho wins? Please respond with segmentation mask."),
            ("the dog.", "sa2va", "<image>\nPlease segment the dog."),
        ],
    )
    def test_prompts(self, expression, style, prompt):
        assert expression_prompt(expression, style) == prompt


def test_label_maps():
    """The more probable object wins, nothing below a half does, and where two are sure the first is taken."""
    probabilities = np.zeros((2, 1, 1, 4), np.float16)
    probabilities[0, 0, 0], probabilities[1, 0, 0] = (0.9, 0.6, 0.4, 0.7), (0.8, 0.7, 0.45, 0.7)
    assert label_maps(probabilities)[0, 0].tolist() == [1, 2, 0, 1]


def test_overall_is_the_mean_of_the_splits():
    scores = [Score("a", "0", "referring", 1.0, 1.0, 1.0)] * 3 + [Score("a", "1", "reasoning", 0.0, 0.5, 0.0)]
    assert summary(scores)["overall J"] == 50
    assert summary(scores)["reasoning J&F"] == 25


class TestSubmission:
    @pytest.mark.parametrize(
        ("name", "prefix"), [("mevis-valid", ""), ("mevis-test", ""), ("ref-youtube-vos", "Annotations/")]
    )
    def test_names(self, dataset_of, model, tmp_path, name, prefix):
        dataset = dataset_of(name)
        finish(dataset, model, tmp_path / "run")
        path = write_submission(dataset, tmp_path / "run")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            mask = Image.open(archive.open(names[0]))
            assert (mask.mode, mask.size) == ("L", SIZE[::-1])
            assert set(np.unique(mask)) <= {0, 255}
        expected = [
            f"{prefix}{video.name}/{one.id}/{frame}.png"
            for video in dataset.videos
            for one in video.expressions
            for frame in video.frames
        ]
        assert names == expected

    def test_a_missing_frame(self, dataset_of, model, tmp_path):
        dataset = dataset_of("mevis-valid")
        finish(dataset, model, tmp_path / "run")
        video = dataset.videos[0]
        (prediction_folder(tmp_path / "run", video, video.expressions[0]) / f"{video.frames[3]}.png").unlink()
        with pytest.raises(ValueError, match=rf"{video.frames[3]}\.png is missing"):
            write_submission(dataset, tmp_path / "run")
        assert not list((tmp_path / "run").glob("*.zip"))

    def test_data_sets_with_masks_are_not_submitted(self, dataset_of, tmp_path):
        with pytest.raises(ValueError, match="score the run"):
            write_submission(dataset_of("ref-davis17"), tmp_path / "run")


def test_worst(dataset_of, model, tmp_path):
    dataset = dataset_of("mevis-valid_u")
    finish(dataset, model, tmp_path / "run")
    score_run(dataset, tmp_path / "run")
    pictures = draw_worst(dataset, tmp_path / "run", 2)
    assert [picture.name[:3] for picture in pictures] == ["001", "002"]
    assert Image.open(pictures[0]).size == (2 * SIZE[1], 3 * SIZE[0])
    assert pictures[0].with_suffix(".txt").read_text().strip() in EXPRESSIONS


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(*arguments):
            monkeypatch.setattr("sys.argv", ["sa2va-i", "evaluate", *map(str, arguments)])
            with pytest.raises(SystemExit) as stop:
                cli.main()
            return (stop.value.code or 0, *capsys.readouterr())

        return run

    def test_score(self, run, dataset_of, checkpoint, tmp_path):
        dataset_of("mevis-valid_u")
        arguments = ("mevis-valid_u", "--data-root", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu")
        code, out, _ = run(*arguments, "--model", checkpoint, "--worst", 1)
        assert code == 0
        scores = json.loads(out.splitlines()[-1])
        assert scores["expressions"].keys() == {"J", "F", "J&F"}
        assert len(list((tmp_path / "run" / "worst").glob("*.png"))) == 1
        code, again, _ = run(*arguments)  # done: no model is needed
        assert (code, json.loads(again.splitlines()[-1])) == (0, scores)

    def test_submission(self, run, dataset_of, checkpoint, tmp_path):
        dataset_of("mevis-valid")
        code, out, _ = run(
            *("mevis-valid", "--data-root", tmp_path / "data", "--out", tmp_path / "run"),
            *("--device", "cpu", "--model", checkpoint),
        )
        assert code == 0
        assert (tmp_path / "run" / "mevis-valid.zip").is_file()
        assert "mevis-valid.zip" in out
        assert "authors" not in out

    def test_the_authors_number_stands_beside(self, dataset_of, model, tmp_path):
        dataset = dataset_of("ref-davis17")
        prepare_run(tmp_path / "run", "somewhere/Sa2VA-i-4B", dataset, RunOptions())
        predict(dataset, model, tmp_path / "run", RunOptions())
        score_run(dataset, tmp_path / "run")
        assert "The authors give J&F 78.6 for Sa2VA-i-4B" in (tmp_path / "run" / "report.md").read_text()

    def test_model_is_needed_to_predict(self, run, dataset_of, tmp_path):
        dataset_of("revos")
        code, _, error = run("revos", "--data-root", tmp_path / "data", "--out", tmp_path / "run", "--device", "cpu")
        assert code == 2
        assert "--model" in error


def masks_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


class TestProcesses:
    """Real ones: killed, and two through accelerate."""

    @pytest.fixture
    def command(self, dataset_of, checkpoint, tmp_path):
        dataset_of("mevis-valid_u")
        arguments = [
            "evaluate",
            "mevis-valid_u",
            "--data-root",
            tmp_path / "data",
            "--model",
            checkpoint,
            "--device",
            "cpu",
        ]
        return [str(argument) for argument in arguments]

    @pytest.fixture
    def expected(self, command, tmp_path):
        subprocess.run([sys.executable, "-m", "sa2va_i.cli", *command, "--out", tmp_path / "one"], check=True)
        return masks_of(tmp_path / "one" / "predictions")

    def test_killed_and_resumed(self, command, expected, tmp_path):
        folder = tmp_path / "killed"
        slow = textwrap.dedent(
            f"""
            import sys, time
            from sa2va_i import cli
            from sa2va_i.evaluation import runner
            write = runner._ExpressionWriter.write
            def slowly(self, *args):
                time.sleep(0.1)
                write(self, *args)
            runner._ExpressionWriter.write = slowly
            sys.argv = ["sa2va-i", *{command!r}, "--out", {str(folder)!r}]
            cli.main()
            """
        )
        run = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not list(folder.glob("predictions/*/.*.partial/*.png")):
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        dataset = MeViS(tmp_path / "data", "valid_u")
        left = sum(len(expressions_left(folder, video)) for video in dataset.videos)
        assert left > 0
        for video in dataset.videos:  # what counts as done is whole
            for expression in set(video.expressions) - set(expressions_left(folder, video)):
                assert len(read_masks(folder, video, expression)) == NUM_FRAMES
        subprocess.run([sys.executable, "-m", "sa2va_i.cli", *command, "--out", folder], check=True)
        assert masks_of(folder / "predictions") == expected

    def test_two_processes_equal_one(self, command, expected, tmp_path):
        """Through torchrun: `accelerate launch --cpu` starts one process, whatever number it is given."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sa2va_i.cli"]
        run = subprocess.run(
            [*launch, *command, "--out", str(tmp_path / "two")],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
        assert all(f"0/{share} " in run.stderr for share in (3, 2))  # a video each
        ours = masks_of(tmp_path / "two" / "predictions")
        assert ours.keys() == expected.keys()
        assert (tmp_path / "two" / "scores.json").is_file()
        assert sum(ours[name] == expected[name] for name in ours) >= 0.9 * len(ours)  # another number of threads
