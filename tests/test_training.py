"""Training: frames, data, encoding, what trains, and the recipe end to end on a small random model."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel

import small_model as builder
from fake_datasets import MAKERS, NUM_FRAMES, SIZE, disk, make_conversations, make_refcoco, write_json
from sa2va_i import Sa2VAiModel, cli
from sa2va_i.evaluation.datasets import open_dataset
from sa2va_i.processing_sa2va_i import SEG
from sa2va_i.training import recipe
from sa2va_i.training.data import (
    Conversations,
    Draw,
    Mixture,
    ReferringImages,
    ReferringVideos,
    Sample,
    SampleError,
    SyntheticScenes,
)
from sa2va_i.training.encode import IGNORED, Collator
from sa2va_i.training.frames import FRAME_RULES, first_frames, random_frames, uniform_frames
from sa2va_i.training.parts import Lora, merge, set_trained
from sa2va_i.training.recipe import TrainConfig, make_source, train
from sa2va_i.training.synthetic import HELD_OUT


class TestFrames:
    @pytest.mark.parametrize("rule", FRAME_RULES.values())
    @pytest.mark.parametrize(("num_frames", "num_samples"), [(1, 8), (8, 8), (9, 8), (100, 8), (100, 1)])
    def test_increasing_and_in_the_video(self, rule, num_frames, num_samples):
        for seed in range(50):
            indices = rule(np.random.default_rng(seed), num_frames, num_samples)
            assert indices == sorted(indices)
            assert 0 <= indices[0] <= indices[-1] < num_frames
            assert len(indices) == min(num_frames, num_samples)
            assert num_frames > num_samples or indices == list(range(num_frames))

    def test_uniform_is_the_formula_with_one_offset(self):
        """Written out as in the issue: pad = T/n/2, i = (T - 2 pad)/(n - 1), offset in U(-i/2, i/2)."""
        num_frames, num_samples = 103, 8
        pad = num_frames / num_samples / 2
        base = np.linspace(pad - 0.5, num_frames - 1 - (pad - 0.5), num_samples)
        interval = (num_frames - 2 * pad) / (num_samples - 1)
        offset = np.random.default_rng(4).uniform(-interval / 2, interval / 2)
        expected = np.rint(base + offset).astype(int).tolist()
        assert uniform_frames(np.random.default_rng(4), num_frames, num_samples) == expected
        assert uniform_frames(np.random.default_rng(5), num_frames, num_samples) != expected

    def test_random_and_first(self):
        draws = {tuple(random_frames(np.random.default_rng(seed), 20, 3)) for seed in range(30)}
        assert len(draws) > 20
        assert all(len(set(draw)) == 3 for draw in draws)
        assert first_frames(np.random.default_rng(0), 20, 3) == [0, 1, 2]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


class TestData:
    @pytest.mark.parametrize("name", ["mevis-train", "ref-youtube-vos-train", "revos-train"])
    def test_videos(self, name, tmp_path, random):
        MAKERS[name](tmp_path)
        dataset = open_dataset(name, tmp_path)
        source = ReferringVideos(dataset, Draw(num_frames=4, sampling="random", num_objects=5))
        sample = source.sample(0, random)
        assert sample.id == f"{name}/aaa"
        assert len(sample.turns) == 5
        assert sample.masks.shape == (5, 4, *SIZE)
        assert [frame.size for frame in sample.frames] == [SIZE[::-1]] * 4
        assert sample.turns[0][0].startswith("<image>")
        assert sum("<image>" in question for question, _ in sample.turns) == 1
        assert all(answer.count(SEG) == 1 for _, answer in sample.turns)
        texts = [expression.text for expression in dataset.videos[0].expressions]
        truths = [dataset.truth(dataset.videos[0], one) for one in dataset.videos[0].expressions]
        for (question, _), masks in zip(sample.turns, sample.masks):
            truth = truths[next(index for index, text in enumerate(texts) if text.rstrip(".") in question)]
            assert all(any((mask == of_frame).all() for of_frame in truth) for mask in masks)

    def test_masks_are_of_the_sampled_frames(self, tmp_path, random):
        MAKERS["ref-youtube-vos-train"](tmp_path)
        source = ReferringVideos(open_dataset("ref-youtube-vos-train", tmp_path), Draw(2, "first", 1))
        sample = source.sample(0, random)
        number = 0 if "disk 0" in sample.turns[0][0] else 1
        expected = np.stack([disk(0, number), disk(1, number)])
        if number == 0:  # the other lies over it in the label maps' sum
            expected &= ~np.stack([disk(0, 1), disk(1, 1)])
        np.testing.assert_array_equal(sample.masks[0], expected)

    def test_a_split_without_public_masks_is_refused(self, tmp_path):
        MAKERS["mevis-valid"](tmp_path)
        with pytest.raises(ValueError, match=r"mevis-valid.*not public"):
            ReferringVideos(open_dataset("mevis-valid", tmp_path), Draw())

    def test_refcoco(self, tmp_path, random):
        make_refcoco(tmp_path)
        source = ReferringImages(tmp_path / "refcoco", tmp_path / "train2014", "unc", Draw(num_objects=3))
        assert len(source) == 2  # testA is left out
        polygon, code = source.sample(0, random), source.sample(1, random)
        assert polygon.is_image
        assert polygon.masks.shape == (3, 1, *SIZE)
        assert 380 <= polygon.masks[0].sum() <= 420  # 20 x 20
        np.testing.assert_array_equal(code.masks[0, 0], disk(1))
        assert {question.rstrip(".").split()[-1] for question, _ in polygon.turns} <= {"red", "disk", "it", "mask"}

    def test_refcoco_as_a_pickle_is_not_read(self, tmp_path):
        make_refcoco(tmp_path)
        (tmp_path / "refcoco" / "refs(unc).json").rename(tmp_path / "refcoco" / "refs(unc).p")
        with pytest.raises(FileNotFoundError, match=r"refs\(unc\).json is missing.*pickle.load"):
            ReferringImages(tmp_path / "refcoco", tmp_path / "train2014", "unc", Draw())

    def test_conversations(self, tmp_path, random):
        make_conversations(tmp_path)
        source = Conversations(tmp_path / "llava.json", tmp_path)
        assert len(source) == 1
        sample = source.sample(0, random)
        assert [answer for _, answer in sample.turns] == ["Nothing but grey.", "No."]
        assert sample.turns[0][0].replace("\n", "") == "<image>What is this?"
        assert sample.masks.shape == (0, 1, *SIZE)

    def test_synthetic(self, random):
        sample = SyntheticScenes(10, Draw(4, "uniform", 5), descriptions=1.0).sample(3, random)
        assert sample.masks.shape[:2] == (5, 4)
        assert len(sample.turns) == 6
        assert SEG not in sample.turns[0][1]
        with pytest.raises(ValueError, match="held out"):
            SyntheticScenes(2, Draw(), first_seed=HELD_OUT - 1)

    def test_a_sample_follows_from_seed_and_index(self):
        source = SyntheticScenes(10, Draw(3))
        one, same, other = (Mixture([(source, 2)], seed)[4] for seed in (0, 0, 1))
        assert one.turns == same.turns
        assert one.turns != other.turns
        assert len(Mixture([(source, 2)], 0)) == 20
        assert Mixture([(source, 2)], 0)[14].turns != one.turns  # the second time over, something else is drawn

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda root: (root / "train/JPEGImages/aaa/00005.jpg").unlink(), "00005.jpg"),
            (lambda root: Image.new("RGB", (40, 30)).save(root / "train/JPEGImages/aaa/00005.jpg"), "differ in size"),
            (lambda root: change(root, "mask_dict.json", {"size": [30, 40], "counts": "X9"}), "size"),
            (lambda root: change(root, "meta_expressions.json", []), "names no object"),
        ],
    )
    def test_bad_data_are_named_or_skipped(self, spoil, message, tmp_path, caplog):
        MAKERS["mevis-train"](tmp_path)
        spoil(tmp_path)
        sources = [(ReferringVideos(open_dataset("mevis-train", tmp_path), Draw(NUM_FRAMES, num_objects=3)), 1)]
        with pytest.raises(SampleError, match=rf"mevis-train/aaa(.|\n)*{message}"):
            Mixture(sources, 0)[0]
        lenient = Mixture(sources, 0, "skip")
        loader = torch.utils.data.DataLoader(lenient, collate_fn=list, num_workers=1)  # counts in another process
        assert [sample.id for (sample,) in loader] == ["mevis-train/bbb"] * 2
        assert lenient.num_skipped == 1

    def test_too_many_bad_samples_stop(self, tmp_path):
        MAKERS["mevis-train"](tmp_path)
        for file in (tmp_path / "train" / "JPEGImages").rglob("*.jpg"):
            file.write_bytes(b"")
        sources = [(ReferringVideos(open_dataset("mevis-train", tmp_path), Draw()), 1)]
        with pytest.raises(SampleError, match="in a row"):
            Mixture(sources, 0, "skip")[0]


def change(root, name, value):
    """Spoil every mask of object 0, or every expression's objects, of the video aaa."""
    path = root / "train" / name
    content = json.loads(path.read_text())
    if name == "mask_dict.json":
        content["0"] = [value] * NUM_FRAMES
    else:
        for expression in content["videos"]["aaa"]["expressions"].values():
            expression["anno_id"] = value
    write_json(path, content)


@pytest.fixture
def sample() -> Sample:
    return SyntheticScenes(10, Draw(3, "uniform", 2), descriptions=1.0).sample(0, np.random.default_rng(1))


class TestEncode:
    def test_the_answers_are_learnt(self, sample, small_processor):
        _, labels, pixel_values = Collator(small_processor).encode(sample)
        assert len(pixel_values) == 3
        learnt = small_processor.tokenizer.decode(labels[labels != IGNORED])
        assert learnt == "".join(answer + "<|im_end|>" for _, answer in sample.turns)
        assert (labels == small_processor.seg_token_id).sum() == len(sample.masks)

    def test_the_text_is_that_of_a_conversation_in_turns(self, sample, small_processor):
        """As `predict_forward` builds it with `past_text`, so that training and use see the same tokens."""
        past = ""
        for question, answer in sample.turns:
            prompt = small_processor.prompt_text(question, past, has_media=True)
            past = small_processor.past_text(prompt, answer)
        expected = small_processor(past, frames=sample.frames)["input_ids"][0]
        input_ids, _, _ = Collator(small_processor).encode(sample)
        assert small_processor.tokenizer.decode(input_ids) + "\n" == small_processor.tokenizer.decode(expected)

    def test_batch(self, sample, small_processor):
        other = SyntheticScenes(10, Draw(2, "uniform", 1)).sample(1, np.random.default_rng(1))
        batch = Collator(small_processor)([sample, other])
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert lengths[0] > lengths[1]
        assert (batch["labels"][1, lengths[1] :] == IGNORED).all()
        assert [len(frames) for frames in batch["sam2_pixel_values"]] == [3, 2]
        assert len(batch["pixel_values"]) == 5
        assert batch["sample_ids"] == ["synthetic/0", "synthetic/1"]
        assert "masks" not in Collator(small_processor, with_masks=False)([sample])

    def test_too_long(self, sample, small_processor):
        with pytest.raises(SampleError, match=r"synthetic/0: \d+ tokens, more than 20"):
            Collator(small_processor, max_length=20).encode(sample)


class TestForward:
    """`Sa2VAiModel.forward` with labels and masks."""

    @pytest.fixture
    def batch(self, sample, small_processor):
        batch = Collator(small_processor)([sample])
        batch.pop("sample_ids")
        return batch

    def test_the_loss_is_the_weighted_sum(self, small_model, batch):
        with torch.no_grad():
            output = small_model(**batch)
        expected = output.text_loss + 2.0 * output.mask_loss + 0.5 * output.dice_loss
        torch.testing.assert_close(output.loss, expected)
        assert min(output.text_loss, output.mask_loss, output.dice_loss) > 0

    def test_text_loss_alone_is_the_language_models(self, small_model, batch):
        del batch["masks"], batch["sam2_pixel_values"]
        with torch.no_grad():
            output = small_model(**batch)
            embeddings = small_model.embed_prompt(batch["input_ids"], batch["pixel_values"])
            expected = small_model.language_model(
                inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]
            )
            plain = small_model(**{**batch, "labels": None})
        torch.testing.assert_close(output.loss, expected.loss)
        assert output.logits is None
        assert output.mask_loss is None
        torch.testing.assert_close(plain.logits, expected.logits)
        assert plain.loss is None

    def test_masks_are_decoded_as_in_use(self, small_model, small_processor, sample, answering):
        """The same [SEG] states, and the same initial masks, as `predict_forward` gives for the same answer."""
        question, answer = sample.turns[1]
        alone = Sample("one", sample.frames, [("<image>" + question, answer)], sample.masks[:1])
        with answering(small_model, answer + "<|im_end|>"):
            result = small_model.predict_forward(
                video=sample.frames,
                text="<image>" + question,
                sample_idx=range(3),
                return_drafts_only=True,
                max_new_tokens=40,
            )
        batch = Collator(small_processor)([alone])
        logits = []
        original = small_model._training_logits

        def keep(*args):
            logits.append(original(*args))
            return logits[-1]

        small_model._training_logits = keep
        try:
            with torch.no_grad():
                small_model(**{name: value for name, value in batch.items() if name != "sample_ids"})
        finally:
            del small_model._training_logits
        height, width = sample.masks.shape[2:]
        ours = torch.nn.functional.interpolate(logits[0], (height, width), mode="bilinear")[:, 0] > 0
        drafts = result["prediction_masks"][0]
        assert (ours.numpy() != drafts).mean() < 1e-3
        assert (ours.numpy() != drafts[::-1]).mean() > 1e-2  # it can fail

    def test_a_mask_without_a_seg_is_refused(self, small_model, batch):
        batch["masks"] = [batch["masks"][0][:1]]
        with pytest.raises(ValueError, match=r"2 \[SEG\] in its labels and 1 masks"):
            small_model(**batch)

    def test_without_any_seg_every_part_still_runs(self, tokenizer, small_processor, tmp_path):
        make_conversations(tmp_path)
        sample = Conversations(tmp_path / "llava.json", tmp_path).sample(0, np.random.default_rng(0))
        model = builder.build()
        batch = Collator(small_processor)([sample])
        batch.pop("sample_ids")
        output = model(**batch)
        assert output.mask_loss == output.dice_loss == 0
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.text_hidden_fcs.parameters())


class TestParts:
    def test_what_trains_gets_a_gradient_and_nothing_else(self, sample, small_processor):
        model = builder.build()
        set_trained(model, ("mlp1", "language_model", "text_hidden_fcs", "grounding_encoder"), Lora(4, 8, 0.0))
        with torch.no_grad():  # LoRA starts at B = 0, where A has no gradient yet
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        batch = Collator(small_processor)([sample])
        batch.pop("sample_ids")
        model(**batch).loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert not trained & without
        assert all(parameter.requires_grad or parameter.grad is None for parameter in model.parameters())
        for part in ("mlp1", "text_hidden_fcs", "grounding_encoder"):
            assert any(name.startswith(part) for name in trained)
            assert gradient(model, trained, part) > 0
        language_model = {name for name in trained if name.startswith("language_model.")}
        assert all(any(word in name for word in ("lora_", "embed_tokens", "lm_head")) for name in language_model)
        for word in ("lora_A", "lora_B", "embed_tokens", "lm_head"):
            assert gradient(model, {name for name in language_model if word in name}, "") > 0
        assert not any(name.startswith(("propagator", "vision_model")) for name in trained)

    def test_merging_changes_no_logit(self, small_config, tokenizer):
        model = builder.build()
        adapter = set_trained(model, ("language_model",), Lora(4, 8, 0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        ids = tokenizer("Please segment the disk.", return_tensors="pt").input_ids
        with torch.no_grad():
            before = model(input_ids=ids).logits
            merge(model, adapter)
            after = model(input_ids=ids).logits
            untouched = builder.build()(input_ids=ids).logits
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
        assert (after - untouched).abs().max() > 1e-2
        assert model.state_dict().keys() == builder.build().state_dict().keys()

    def test_unknown_part(self, small_model):
        with pytest.raises(ValueError, match="propagator"):
            set_trained(small_model, ("propagator",), None)


def gradient(model, names, part) -> float:
    return sum(p.grad.abs().sum().item() for name, p in model.named_parameters() if name in names and part in name)


@pytest.fixture(scope="module")
def settings(small_checkpoint) -> dict:
    return {
        "model": str(small_checkpoint),
        "data": [{"source": "synthetic", "num_scenes": 12}],
        "num_frames": 2,
        "num_objects": 2,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
        "trainer": {
            "learning_rate": 5e-4,
            "per_device_train_batch_size": 2,
            "max_steps": 8,
            "bf16": False,
            "logging_steps": 1,
            "save_steps": 5,
            "warmup_steps": 0,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }


class Logs(list):
    """What a Trainer logs, step by step."""

    def __init__(self, monkeypatch):
        super().__init__()
        log = recipe.Sa2VAiTrainer.log

        def keep(trainer, logs, *args, **kwargs):
            log(trainer, logs, *args, **kwargs)
            if "loss" in logs:
                self.append(dict(logs))

        monkeypatch.setattr(recipe.Sa2VAiTrainer, "log", keep)


class TestRecipe:
    def test_trains_resumes_and_saves(self, settings, small_model, tmp_path, monkeypatch):
        """Eight steps; then, from the checkpoint at five, the last three again: the same losses."""
        logs = Logs(monkeypatch)
        out = train(TrainConfig(**settings, out=str(tmp_path / "one")))
        assert sum(entry["loss"] for entry in logs[-3:]) < 0.8 * sum(entry["loss"] for entry in logs[:3])
        assert logs[0]["loss"] == pytest.approx(
            logs[0]["text_loss"] + 2 * logs[0]["mask_loss"] + 0.5 * logs[0]["dice_loss"], rel=1e-3
        )
        trained = AutoModel.from_pretrained(out, trust_remote_code=True)
        before, after = small_model.state_dict(), trained.state_dict()
        assert before.keys() == after.keys()
        same = {name for name in before if torch.equal(before[name], after[name])}
        frozen = {name for name in before if name.startswith(("propagator.", "vision_model."))}
        assert frozen <= same  # not one bit
        for part in ("mlp1", "language_model", "text_hidden_fcs", "grounding_encoder"):
            assert any(name.startswith(part) and name not in same for name in before)
        result = trained.predict_forward(video=[Image.new("RGB", (32, 24))] * 2, text="Segment it.", max_new_tokens=4)
        assert result["prediction"]

        first = list(logs)
        logs.clear()
        (tmp_path / "two.run").mkdir()
        (tmp_path / "one.run" / "checkpoint-5").rename(tmp_path / "two.run" / "checkpoint-5")
        again = train(TrainConfig(**settings, out=str(tmp_path / "two")))
        assert [entry["loss"] for entry in logs] == pytest.approx([entry["loss"] for entry in first[5:]], rel=1e-4)
        resumed = Sa2VAiModel.from_pretrained(again).state_dict()
        assert all(torch.allclose(after[name], resumed[name], atol=1e-5) for name in after)

    def test_a_run_follows_from_its_seed(self, settings, tmp_path):
        results = []
        for number, seed in enumerate((5, 5, 6)):
            torch.manual_seed(number)  # what came before does not matter
            changed = {**settings, "trainer": {**settings["trainer"], "max_steps": 2, "seed": seed}}
            out = train(TrainConfig(**changed, out=str(tmp_path / str(number))))
            results.append(Sa2VAiModel.from_pretrained(out).state_dict())
        one, same, other = results
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one if name.startswith("language_model"))

    def test_the_result_is_not_overwritten(self, settings, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="out"):
            train(TrainConfig(**settings, out=str(tmp_path / "out")))

    @pytest.mark.parametrize("on_error", ["stop", "skip"])
    def test_a_loss_that_is_no_number(self, on_error, settings, tmp_path, monkeypatch):
        logs = Logs(monkeypatch)
        forward = Sa2VAiModel.forward
        calls = []

        def broken(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            calls.append(1)
            if len(calls) == 2:
                output.loss = output.loss * math.nan
            return output

        monkeypatch.setattr(Sa2VAiModel, "forward", broken)
        changed = {**settings, "trainer": {**settings["trainer"], "max_steps": 3}}
        config = TrainConfig(**changed, out=str(tmp_path / "out"), on_error=on_error)
        if on_error == "stop":
            with pytest.raises(SampleError, match=r"loss is nan on the samples synthetic/\d+, synthetic/\d+"):
                train(config)
            return
        out = train(config)
        assert logs[-1]["num_skipped"] == 1
        assert all(tensor.isfinite().all() for tensor in Sa2VAiModel.from_pretrained(out).state_dict().values())

    def test_bfloat16(self, settings, tmp_path, monkeypatch):
        """Frozen weights in bfloat16, trained ones in float32, autocast in between: as on a GPU."""
        logs = Logs(monkeypatch)
        changed = {**settings, "trainer": {**settings["trainer"], "max_steps": 2, "bf16": True}}
        train(TrainConfig(**changed, out=str(tmp_path / "out"), dtype="bfloat16"))
        assert all(math.isfinite(entry["loss"]) for entry in logs)
        losses = torch.tensor([entry[name] for entry in logs for name in ("mask_loss", "dice_loss") if name in entry])
        assert not torch.equal(losses.bfloat16().float(), losses)  # losses themselves are not rounded

    def test_two_processes(self, settings, tmp_path):
        """Through torchrun, one with masks and one without in some steps: both run every part, so neither waits."""
        make_conversations(tmp_path)
        talk = {"source": "conversations", "file": str(tmp_path / "llava.json"), "images": str(tmp_path), "repeats": 6}
        changed = {**settings, "data": [*settings["data"], talk], "out": str(tmp_path / "out")}
        changed["trainer"] = {**settings["trainer"], "max_steps": 4, "per_device_train_batch_size": 1}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "sa2va_i.cli", "train"]
        subprocess.run(
            [*launch, str(tmp_path / "config.yaml")],
            check=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )
        state = json.loads((tmp_path / "out.run" / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["epoch"] == pytest.approx(4 / 9)  # 18 samples: two a step
        Sa2VAiModel.from_pretrained(tmp_path / "out")


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"frames": 3}, r"unknown settings \['frames'\]"),
            ({"sampling": "last"}, "sampling"),
            ({"on_error": "ignore"}, "on_error"),
            ({"num_frames": 0}, "num_frames"),
            ({"data": []}, "names no source"),
        ],
    )
    def test_wrong_settings(self, change, message, settings, tmp_path):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "out"), **change}))
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_yaml(path)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"source": "coco"}, r"mevis-train.*'coco'"),
            ({"source": "synthetic"}, r"synthetic.*num_scenes"),
            ({"source": "refcoco", "root": "here"}, r"refcoco.*images"),
        ],
    )
    def test_wrong_sources(self, entry, message):
        with pytest.raises(ValueError, match=message):
            make_source(entry, Draw())

    def test_sources_of_every_kind(self, tmp_path):
        make_refcoco(tmp_path)
        make_conversations(tmp_path)
        MAKERS["mevis-train"](tmp_path)
        entries = [
            {"source": "mevis-train", "root": tmp_path},
            {"source": "refcoco", "root": tmp_path / "refcoco", "images": tmp_path / "train2014", "split_by": "unc"},
            {"source": "conversations", "file": tmp_path / "llava.json", "images": tmp_path},
            {"source": "synthetic", "num_scenes": 3, "repeats": 2},
        ]
        assert [len(make_source(entry, Draw())) for entry in entries] == [2, 2, 1, 3]

    def test_command(self, settings, tmp_path, monkeypatch, capsys):
        path = tmp_path / "config.yaml"
        changed = {**settings, "trainer": {**settings["trainer"], "max_steps": 1}, "out": str(tmp_path / "out")}
        path.write_text(yaml.safe_dump(changed))
        monkeypatch.setattr("sys.argv", ["sa2va-i", "train", str(path)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        assert f"Trained -> {tmp_path / 'out'}" in capsys.readouterr().out
