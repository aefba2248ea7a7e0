"""Made-up data sets in the official layouts: a red disk that moves right over grey."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from sa2va_i.processing_sa2va_i import to_rle

NUM_FRAMES, SIZE = 6, (60, 80)
EXPRESSIONS = ("the disk", "the thing that moves right", "what is the red one?", "the ground")


def disk(frame_idx: int, number: int = 0) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return (x - 15 - 8 * frame_idx) ** 2 + (y - 20 - 20 * number) ** 2 < 100


def write_frames(folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    names = [f"{5 * frame_idx:05d}" for frame_idx in range(NUM_FRAMES)]
    for frame_idx, name in enumerate(names):
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        pixels[disk(frame_idx)] = (230, 40, 40)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    return names


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_mevis(root: Path, split: str) -> None:
    videos, masks = {}, {}
    for number, video in enumerate(("aaa", "bbb")):
        frames = write_frames(root / split / "JPEGImages" / video)
        expressions = {
            str(key): {"exp": text, "obj_id": [0], "anno_id": [number]}
            for key, text in enumerate(EXPRESSIONS[: 3 - number])
        }
        videos[video] = {"expressions": expressions, "frames": frames}
        codes = [to_rle(disk(frame_idx)) for frame_idx in range(NUM_FRAMES)]
        masks[str(number)] = [None if frame_idx == 2 else code for frame_idx, code in enumerate(codes)]
    write_json(root / split / "meta_expressions.json", {"videos": videos})
    if split in ("train", "valid_u"):
        write_json(root / split / "mask_dict.json", masks)


def make_youtube(root: Path) -> None:
    videos = {}
    for video in ("aaa", "bbb"):
        frames = write_frames(root / "valid" / "JPEGImages" / video)
        videos[video] = {"expressions": {"0": {"exp": "the disk"}, "1": {"exp": "the ground"}}, "frames": frames}
    write_json(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": videos})
    write_json(root / "meta_expressions" / "test" / "meta_expressions.json", {"videos": {"bbb": videos["bbb"]}})


def write_labels(folder: Path, frames: list[str]) -> None:
    """Palette images of two disks, 1 and 2."""
    folder.mkdir(parents=True)
    for frame_idx, name in enumerate(frames):
        labels = Image.fromarray(disk(frame_idx) + 2 * disk(frame_idx, number=1).astype(np.uint8), mode="P")
        labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        labels.save(folder / f"{name}.png")


def make_youtube_train(root: Path) -> None:
    frames = write_frames(root / "train" / "JPEGImages" / "aaa")
    expressions = {str(key): {"exp": f"disk {key}", "obj_id": str(key + 1)} for key in range(2)}
    write_json(
        root / "meta_expressions" / "train" / "meta_expressions.json",
        {"videos": {"aaa": {"expressions": expressions, "frames": frames}}},
    )
    write_labels(root / "train" / "Annotations" / "aaa", frames)


def make_davis(root: Path) -> None:
    frames = write_frames(root / "valid" / "JPEGImages" / "aaa")
    expressions = {str(key): {"exp": f"object {key // 4} by {key % 4}"} for key in range(8)}
    write_json(
        root / "meta_expressions" / "valid" / "meta_expressions.json",
        {"videos": {"aaa": {"expressions": expressions, "frames": frames}}},
    )
    write_labels(root / "valid" / "Annotations" / "aaa", frames)


def make_revos(root: Path, split: str = "valid") -> None:
    frames = write_frames(root / "JPEGImages" / "aaa")
    expressions = {
        str(key): {"exp": text, "anno_id": [0, 1], "type_id": type_id}
        for key, (text, type_id) in enumerate(zip(EXPRESSIONS, (0, 0, 1, 2)))
    }
    write_json(
        root / f"meta_expressions_{split}_.json", {"videos": {"aaa": {"expressions": expressions, "frames": frames}}}
    )
    codes = [[to_rle(disk(frame_idx, number)) for frame_idx in range(NUM_FRAMES)] for number in range(2)]
    write_json(root / "mask_dict.json", {"0": codes[0], "1": [None, *codes[1][1:]]})
    write_json(root / "mask_dict_foreground.json", {"aaa": {"masks_rle": [list(pair) for pair in zip(*codes)]}})


def make_refcoco(root: Path) -> None:
    """Two images with the disk as a polygon and as a run-length code."""
    (root / "train2014").mkdir(parents=True)
    images, annotations, references = [], [], []
    for number in range(2):
        name = f"COCO_train2014_{number:012d}.jpg"
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        pixels[disk(number)] = (230, 40, 40)
        Image.fromarray(pixels).save(root / "train2014" / name)
        box = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
        code = coco.encode(np.asfortranarray(disk(number).astype(np.uint8)))
        plain = {"size": list(SIZE), "counts": run_lengths(disk(number))}
        assert (coco.decode(coco.frPyObjects(plain, *SIZE)) == coco.decode(code)).all()
        images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"id": 10 + number, "image_id": number, "segmentation": plain if number else box})
        references.append(
            {
                "image_id": number,
                "ann_id": 10 + number,
                "split": "train",
                "sentences": [{"sent": "red"}, {"sent": "disk"}],
            }
        )
    references.append({**references[0], "split": "testA"})
    write_json(root / "refcoco" / "instances.json", {"images": images, "annotations": annotations})
    write_json(root / "refcoco" / "refs(unc).json", references)


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed code: lengths of runs down the columns, of 0 first."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, flat.size]).tolist()
    return lengths if not flat[0] else [0, *lengths]


def make_conversations(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    Image.fromarray(pixels).save(root / "grey.jpg")
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "Nothing but grey."},
        {"from": "human", "value": "Is there a disk?"},
        {"from": "gpt", "value": "No."},
    ]
    items = [{"id": "a", "image": "grey.jpg", "conversations": turns}, {"id": "text only", "conversations": turns[:2]}]
    write_json(root / "llava.json", items)


MAKERS = {
    "mevis-train": lambda root: make_mevis(root, "train"),
    "mevis-valid_u": lambda root: make_mevis(root, "valid_u"),
    "mevis-valid": lambda root: make_mevis(root, "valid"),
    "mevis-test": lambda root: make_mevis(root, "test"),
    "ref-youtube-vos-train": make_youtube_train,
    "ref-youtube-vos": make_youtube,
    "ref-davis17": make_davis,
    "revos-train": lambda root: make_revos(root, "train"),
    "revos": make_revos,
}
