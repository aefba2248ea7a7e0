"""The README is true: its Python runs, and so does every `sa2va-i` command in it."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import small_model as builder
from fake_datasets import MAKERS
from sa2va_i import cli, convert_checkpoint, publish

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, code in BLOCKS
    if not language
    for line in code.splitlines()
    if line.startswith("sa2va-i ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, video_file, frames, sources, converted) -> Path:
    """A user's folder, with the files the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    model = builder.build()
    builder.always_answer_seg(model)
    model.save_pretrained(folder / "sa2va-i-4b")
    model.processor.tokenizer.save_pretrained(folder / "sa2va-i-4b")
    for file in converted.glob("*.py"):
        shutil.copy(file, folder / "sa2va-i-4b")
    config = (folder / "sa2va-i-4b" / "config.json").read_text()
    auto_map = str(publish.AUTO_MAP).replace("'", '"')
    (folder / "sa2va-i-4b" / "config.json").write_text(config.replace("{", f'{{"auto_map": {auto_map},', 1))
    shutil.copy(video_file, folder / "dog.mp4")
    MAKERS["mevis-valid_u"](folder / "data" / "mevis")
    frames[0].save(folder / "photo.jpg")
    shutil.copytree(sources / "sa2va", folder / "Sa2VA-4B")
    shutil.copytree(sources / "sa2va_i", folder / "Sa2VA-i-1B")
    shutil.copy(sources / "sam2.pt", folder / "sam2_hiera_large.pt")
    (recipe,) = [code for language, code in BLOCKS if language == "yaml"]
    (folder / "my-recipe.yaml").write_text(recipe)
    return folder


@pytest.mark.parametrize("code", PYTHON)
def test_python(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"]["prediction_masks"][0].shape == (12, 60, 80)
    assert names["frame_idx"] == 11


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, tmp_path, monkeypatch, sam2_config):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(convert_checkpoint, "SAM2_HIERA_LARGE", sam2_config)
    monkeypatch.setenv("SA2VA_I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sa2va_i.space.page.serve", lambda page, service, **options: service.close())
    arguments = shlex.split(command)
    if arguments[1] == "convert":  # its output is another command's input
        arguments[3] = str(tmp_path / "converted")
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_there_is_something_to_test():
    assert len(PYTHON) == 1
    assert {shlex.split(command)[1] for command in COMMANDS} == {
        "segment",
        "convert",
        "demo",
        "evaluate",
        "info",
        "synthetic",
        "train",
    }


def test_files_of_the_map_exist():
    listing = next(code for language, code in BLOCKS if "configuration_sa2va_i.py" in code)
    names = re.findall(r"^([\w./, ]+?)\s{2,}", listing, re.MULTILINE)
    assert all((ROOT / name.strip()).exists() for line in names for name in line.split(","))
    modules = {file.name for file in ROOT.glob("*.py")} - {"__init__.py"}
    assert all(module in listing for module in modules)


def test_make_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_small_model_answers_seg():
    model = builder.build()
    builder.always_answer_seg(model)
    with torch.no_grad():
        assert model.predict_forward(text="Hello.")["prediction"] == "[SEG]<|im_end|>"
