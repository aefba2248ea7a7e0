"""The scripts that train the small model, a step each: from nothing to a Sa2VA-i that answers and is scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sa2va_i import Sa2VAiModel
from sa2va_i.training import small
from sa2va_i.training.recipe import TrainConfig, train
from sa2va_i.training.small import build, evaluate_sam2, join, pack, train_places, train_sam2, train_vision, train_words
from sa2va_i.training.small.loop import Phase, run
from sa2va_i.training.small.pixels import PixelHeads, labelled_frames, pixel_losses
from sa2va_i.training.small.train_places import IGNORED, MOTIONS, PRESENCE, QUESTIONS, PlaceHeads, place_labels
from sa2va_i.training.small.train_sam2 import apart_loss, build_sam2, frame_losses, sample_frames, scene_with_twins
from sa2va_i.training.small.train_words import asked_for, conversation, tokens_of, word_losses
from sa2va_i.training.synthetic import Scene

SMALL = Path(small.__file__).parent


@pytest.fixture
def call(monkeypatch):
    def call(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        module.main()

    return call


def test_from_nothing_to_a_scored_model(call, tmp_path, capsys):
    threads = ("--threads", torch.get_num_threads())
    phases = ("pixels", "pairs", "clips", "all", "names", "frozen", "memory")
    one_step_each = [argument for phase in phases for argument in (f"--{phase}", 1)]
    call(train_sam2, tmp_path / "sam2", *one_step_each, *threads)
    call(train_vision, tmp_path / "vision", "--steps", 1, *threads)
    call(build, tmp_path / "vision" / "vision", tmp_path / "untrained")
    call(train_places, tmp_path / "untrained", tmp_path / "places", "--steps", 1, *threads)
    call(train_words, tmp_path / "places", tmp_path / "words", "--steps", 1, *threads)
    call(join, tmp_path / "words" / "words", tmp_path / "sam2" / "sam2", tmp_path / "joined")
    last = tmp_path / "joined"
    for stage in ("masks", "together"):
        content = yaml.safe_load((SMALL / f"{stage}.yaml").read_text())
        content.update(model=str(last), out=str(tmp_path / stage))
        content["trainer"].update(max_steps=1, warmup_steps=0, per_device_train_batch_size=1, use_cpu=True)
        last = train(TrainConfig(**content))
    model = Sa2VAiModel.from_pretrained(last)
    sam2 = train_sam2.Sam2Propagator.from_pretrained(tmp_path / "sam2" / "sam2").state_dict()
    assert all(torch.equal(sam2[name], tensor) for name, tensor in model.propagator.state_dict().items())
    started = model.propagator.mask_decoder.state_dict()  # of which the fine-tuned decoder is a copy that was trained
    tuned = model.grounding_encoder.state_dict()
    assert started.keys() == tuned.keys()
    assert any(not torch.equal(started[name], tuned[name]) for name in started)
    call(pack, last, tmp_path / "packed")
    packed = Sa2VAiModel.from_pretrained(tmp_path / "packed", dtype="auto")
    assert packed.dtype == torch.float32
    assert all(
        torch.equal(tensor, model.state_dict()[name].half().float()) for name, tensor in packed.state_dict().items()
    )
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size < 16e6
    call(evaluate_sam2, tmp_path / "packed", "--scenes", 1, *threads)
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= scores["J&F"] <= 1
    assert scores["objects"] >= 3


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def train_for(steps: int, folder: Path) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def backward(seed: int) -> dict[str, torch.Tensor]:
            loss = module(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().mean()
            loss.backward()
            return {"loss": loss}

        run(folder, {"module": module}, [Phase("one", steps, 1e-2, backward)], save_every=3)
        return module.weight

    whole = train_for(6, tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6
    untouched = train_for(6, tmp_path / "whole")  # done already: nothing happens
    torch.testing.assert_close(untouched, whole)

    stopped = {"folder": tmp_path / "stopped"}
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def killed(seed: int) -> dict[str, torch.Tensor]:
            if seed >= 4 * 4:
                raise KeyboardInterrupt
            loss = module(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().mean()
            loss.backward()
            return {"loss": loss}

        run(stopped["folder"], {"module": module}, [Phase("one", 6, 1e-2, killed)], save_every=3)
    torch.testing.assert_close(train_for(6, stopped["folder"]), whole)


def test_pixel_labels_are_those_of_the_shapes():
    images, labels = labelled_frames([3])
    assert len(images) == 2
    assert labels.shape == (2, 3, 144, 192)
    scene = Scene(3)
    frame_idx = int(np.random.default_rng((3, 2)).choice(scene.num_frames, 2, replace=False)[0])
    _, masks = scene.render(frame_idx)
    for shape, mask in zip(scene.shapes, masks):
        for of_words, words, word in zip(labels[0], small.pixels.VOCABULARIES, shape.identity):
            assert (of_words.numpy()[mask] == words.index(word) + 1).all()
    assert (labels[0].numpy()[:, ~masks.any(axis=0)] == 0).all()


def test_pixel_losses_fall_when_the_answer_is_given():
    """Feature maps that are the labels themselves, one channel a class, through heads that read them off."""
    _, labels = labelled_frames([3])
    heads = PixelHeads([15])
    with torch.no_grad():
        heads.levels[0].weight.copy_(30 * torch.eye(15)[:, :, None, None])
        heads.levels[0].bias.zero_()
    channels = [torch.nn.functional.one_hot(one.long(), size) for one, size in zip(labels.unbind(1), (5, 7, 3))]
    features = torch.cat(channels, dim=-1).permute(0, 3, 1, 2).float()
    perfect = pixel_losses(heads, [features], labels)
    wrong = pixel_losses(heads, [features.roll(1, dims=1)], labels)
    assert perfect["right"] == 1
    assert perfect["pixels"] < 1e-3 < 1 < wrong["pixels"]


def test_frames_of_a_clip():
    for seed in range(100):
        length, frames, prompts = sample_frames(np.random.default_rng(seed), 6)
        assert len(frames) == 6
        assert len(set(np.diff(frames))) == 1
        assert 0 <= frames[0] < frames[-1] < length
        assert 1 <= len(prompts) <= 3


def test_a_group_is_some_of_the_shapes_as_one():
    masks = np.eye(5, dtype=bool)[:, None, None]  # each shape in a place of its own
    random = np.random.default_rng(0)
    groups = [train_sam2.with_group(random, masks) for _ in range(50)]
    assert all(np.array_equal(objects[:-1], masks) for objects in groups)
    assert {int(objects[-1].sum()) for objects in groups} == {2, 3, 4}


def test_a_right_mask_costs_less_than_a_wrong_one():
    targets = torch.zeros(2, 96, 96)
    targets[0, 20:60, 20:60] = 1  # the second object is not there
    sam2 = build_sam2()
    features = sam2.features_for(sam2.mask_decoder, sam2.encode_images(torch.zeros(1, 3, 192, 192)))
    decoded = sam2.decode_seg(sam2.mask_decoder, features, torch.zeros(2, 128))
    logits = torch.nn.functional.interpolate(targets[:, None], (48, 48)) * 20 - 10
    right = decoded._replace(candidates=logits.expand(-1, 3, -1, -1), object_score_logits=torch.tensor([[9.0], [-9.0]]))
    wrong = decoded._replace(
        candidates=-logits.expand(-1, 3, -1, -1), object_score_logits=torch.tensor([[-9.0], [9.0]])
    )
    cheap, dear = frame_losses(right, targets), frame_losses(wrong, targets)
    assert cheap["chosen_iou"] > 0.9 > 0.1 > dear["chosen_iou"]
    for name in ("focal", "dice", "presence"):
        assert cheap[name] < 0.2 < dear[name]
    seen_where_it_is_not = right._replace(candidates=logits[[0, 0]].expand(-1, 3, -1, -1))
    assert frame_losses(seen_where_it_is_not, targets)["focal"] == cheap["focal"]
    assert frame_losses(seen_where_it_is_not, targets, learns_absence=True)["focal"] > 1


def test_telling_shapes_apart():
    """A mask of both shapes of a colour is dear, and dearer than one of shapes of two colours."""
    targets = torch.zeros(3, 8, 8)
    targets[0, :4], targets[1, 4:] = 1, 1  # the third is not there
    alike = [("circle", "red", "small"), ("square", "red", "small"), ("star", "blue", "small")]
    own = (20 * targets - 10)[:, None]
    assert apart_loss(own, targets, alike) < 1e-3
    both = torch.full_like(own, 10)
    both[2] = -10
    unlike = [alike[0], ("square", "blue", "small"), ("star", "green", "small")]
    mixed = torch.stack([both[0], own[1], own[2]])
    assert apart_loss(both, targets, alike) > 3
    assert apart_loss(mixed, targets, alike) > apart_loss(mixed, targets, unlike) > 1


def test_scenes_for_names_share_colors_where_they_can():
    def num_shared(scene: Scene) -> int:
        return len(scene.shapes) - len({shape.color for shape in scene.shapes})

    assert any(num_shared(Scene(seed)) == 0 for seed in range(0, 80, 4))
    assert all(num_shared(scene_with_twins(range(seed, seed + 4))) for seed in range(0, 80, 4))


@pytest.fixture(scope="module")
def scene() -> Scene:
    """With a shape that comes late, one that leaves and comes back, and one that disappears."""
    events = {"late", "returns", "vanishes"}
    return next(scene for scene in map(Scene, range(100)) if events <= {shape.event for shape in scene.shapes})


@pytest.fixture(scope="module")
def masks(scene) -> np.ndarray:
    return scene.render_all([2, 7, 12, 17, 22])[1]


@pytest.fixture(scope="module")
def labels(scene, masks) -> dict[str, np.ndarray]:
    return place_labels(scene, masks, 12)


class TestPlaces:
    def places_of(self, masks, shape, frame) -> np.ndarray:
        """(12, 12) places that are a shape's."""
        return masks[shape, frame].reshape(12, 12, 12, 16).mean(axis=(1, 3)) > 0.5

    def test_what_is_there(self, scene, masks, labels):
        filled = 0
        for number, shape in enumerate(scene.shapes):
            for frame in range(5):
                places = self.places_of(masks, number, frame)
                filled += places.sum()
                for name, words, word in zip(QUESTIONS, small.pixels.VOCABULARIES, shape.identity):
                    assert (labels[name][frame][places] == words.index(word) + 1).all()
        assert filled > 20
        empty = ~masks.any(axis=0).reshape(5, 12, 12, 12, 16).any(axis=(2, 4))
        assert (labels["kind"][empty] == 0).all()
        assert (labels["motion"][empty] == IGNORED).all()

    def test_what_happens(self, scene, masks, labels):
        for number, shape in enumerate(scene.shapes):
            visible = masks[number].any(axis=(1, 2))
            for frame in range(1, 5):
                places = self.places_of(masks, number, frame)
                if not places.any():
                    continue
                came_before = visible[:frame].any()
                motion = MOTIONS.index(shape.motion) if came_before else IGNORED
                assert (labels["motion"][frame][places] == motion).all()
                back = came_before and not visible[int(visible.argmax()) : frame].all()
                presence = "back" if back else "late" if not visible[0] else "from the start"
                assert (labels["presence"][frame][places] == PRESENCE.index(presence)).all()
        seen = {PRESENCE[one] for one in np.unique(labels["presence"]) if one != IGNORED}
        assert seen == set(PRESENCE)

    def test_what_is_gone(self, scene, masks, labels):
        gone = 0
        for number, shape in enumerate(scene.shapes):
            for frame in range(1, 5):
                left = masks[number, frame - 1].any() and not masks[number, frame].any()
                places = self.places_of(masks, number, frame - 1)
                if left:
                    gone += places.sum()
                    assert (labels["gone_kind"][frame][places] == scene_kind(shape)).all()
                else:
                    assert (labels["gone_kind"][frame][places] == 0).all()
        assert gone
        assert (labels["gone_kind"][0] == 0).all()

    def test_heads_read_each_token_at_its_places(self):
        heads = PlaceHeads(3)
        states = torch.randn(2, 5 * 4, 3)  # tokens of a 2 x 2 grid
        scores = heads(states)
        assert scores["motion"].shape == (2, 5, 4, 4, len(MOTIONS))
        token, total = states[1, 3 * 4 + 1 * 2 + 0], sum(QUESTIONS.values())  # frame 3, row 1, column 0
        of_token = heads.scores(token).reshape(2, 2, total)
        torch.testing.assert_close(torch.cat(list(scores.values()), dim=-1)[1, 3, 2:4, 0:2], of_token)


class TestWords:
    def test_looks_are_at_the_shapes_that_answers_name(self, scene):
        turns, looks = conversation(np.random.default_rng(0), scene)
        names = [said.count("the ") for _, said in turns]
        assert len(looks) == sum(names) + len(turns)
        position = 0
        for (_, said), number in zip(turns, names):
            *of_names, of_seg = [look.shapes for look in looks[position : position + number + 1]]
            order = [said.index(scene.name(target)) for (target,) in of_names]
            assert order == sorted(order)
            assert of_seg == [target for (target,) in of_names]
            position += number + 1
        assert max(names) > 1

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("the small red circle", {"kind": 1, "color": 1, "size": 1}),
            ("all stars", {"kind": 4}),
            ("the green shape moving left", {"color": 2, "motion": MOTIONS.index("left")}),
            ("the square that stays still", {"kind": 2, "motion": MOTIONS.index("still")}),
            ("the shape that appears last", {"presence": PRESENCE.index("late")}),
            ("the shape that leaves and comes back", {"presence": PRESENCE.index("back")}),
            ("the shape that disappears", {}),
        ],
    )
    def test_what_is_asked_for(self, text, said):
        assert {name: value for name, value in asked_for(text).items() if value != IGNORED} == said

    def test_tokens_hold_their_places(self, masks):
        tokens = tokens_of(masks, 6)
        assert tokens.shape == (len(masks), 5 * 36)
        filled = 0
        for number in range(len(masks)):
            here = masks[number].reshape(5, 6, 24, 6, 32).mean(axis=(2, 4)) > 0.6
            assert tokens[number][here.flatten()].all()
            filled += here.sum()
        assert filled

    def test_what_the_attention_teaches(self):
        """The loss of attention teaches the layers up to the one that is looked at, and no later ones."""
        model = build.build(train_vision.build_vision(), build.build_tokenizer())
        tokenizer = build.build_tokenizer()
        model.preparing_for_generation(tokenizer)
        model.language_model.set_attn_implementation("eager")
        losses = word_losses(model, PlaceHeads(160), [1, 2])
        assert 0 < losses["share"] < 1
        losses["attention"].backward()
        layers = model.language_model.model.layers
        assert layers[train_words.LAYER].self_attn.q_proj.weight.grad.abs().sum() > 0
        assert layers[train_words.LAYER + 1].self_attn.q_proj.weight.grad is None  # only what leads there is taught


def scene_kind(shape) -> int:
    return small.pixels.VOCABULARIES[0].index(shape.kind) + 1
