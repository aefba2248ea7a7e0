"""`sa2va-i`: segment videos and images from a sentence, convert checkpoints, look at checkpoints.

sa2va-i segment dog.mp4 "the dog that jumps first" --model sa2va-i-4b -o out/
sa2va-i convert ByteDance/Sa2VA-4B sa2va-i-4b/ --sam2 facebook/sam2-hiera-large
sa2va-i info sa2va-i-4b/
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import PartialState
from huggingface_hub import HfApi
from PIL import Image
from tqdm import tqdm

from . import publish
from .convert_checkpoint import MAX_SHARD_SIZE, Hub, convert_checkpoint
from .files import check_new_folder, read_json, staged_folder, write_json
from .loading import load
from .modeling_sa2va_i import Sa2VAiModel
from .overlay import VideoWriter, draw_overlay
from .processing_sa2va_i import Video, is_image_file, load_image, open_video, segmentation_request
from .safetensors_io import TensorFiles, checkpoint_files

app = typer.Typer(help="Sa2VA-i: say what to find in a video, get its masks.", no_args_is_help=True)


@app.command()
def segment(
    input: Annotated[Path, typer.Argument(help="A video file, a folder of frames, or an image.")],
    prompt: Annotated[str, typer.Argument(help="A phrase, a request or a question.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id; a published original is converted once.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make for the results.")],
    frames: Annotated[int | None, typer.Option(help="Frames the language model sees (5; 12 for MeViS).")] = None,
    max_prompt_frames: Annotated[int | None, typer.Option(help="Initial masks that are propagated (all).")] = None,
    decoding: Annotated[str | None, typer.Option(help="consistent (Sa2VA-i) or memory (Sa2VA).")] = None,
    sampling: Annotated[str | None, typer.Option(help="uniform (Sa2VA-i) or first (Sa2VA).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of the answer's length.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps, cpu, ... (the accelerator if there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, flash_attention_2, eager.")] = None,
    sam2: Annotated[str | None, typer.Option(help="Original SAM 2, if the model is a plain Sa2VA.")] = None,
    sam2_config: Annotated[Path | None, typer.Option(help="JSON of its Sam2VideoConfig, if not Hiera-L.")] = None,
) -> None:
    """Answer PROMPT about INPUT; write the answer, a PNG mask per object and frame, and an overlay to look at."""
    check_new_folder(out)
    is_image = input.is_file() and is_image_file(input)
    media = load_image(input) if is_image else open_video(input)
    sa2va = load_model(model, device, dtype, attn_implementation, sam2, sam2_config)
    with staged_folder(out) as folder:
        if is_image:
            result = _segment_image(sa2va, media, prompt, max_new_tokens, folder)
        else:
            options = {
                "sample_num_frames": frames,
                "max_prompt_frames": max_prompt_frames,
                "decoding": decoding,
                "sampling": sampling,
                "max_new_tokens": max_new_tokens,
            }
            result = _segment_video(sa2va, media, prompt, options, folder)
        write_json(folder / "answer.json", {"input": str(input), **result})
    print(result["prediction"])
    if result["num_objects"] == 0:
        print("The answer points at nothing (no [SEG]): no masks were written.", file=sys.stderr)
    print(f"{result['num_objects']} object(s) -> {out}", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a published Sa2VA or Sa2VA-i checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    sam2: Annotated[str | None, typer.Option(help="Original SAM 2: file, folder or Hub id. For plain Sa2VA.")] = None,
    sam2_config: Annotated[Path | None, typer.Option(help="JSON of Sam2VideoConfig fields, if not Hiera-L.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (the source's).")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = MAX_SHARD_SIZE,
    verify: Annotated[bool, typer.Option("--verify", help="Load the result and run each part once.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.", envvar="HF_TOKEN")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where Hub downloads are kept.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Hub repository to upload the result to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
) -> None:
    """Convert SOURCE to this package's layout, ready for AutoModel.from_pretrained(OUT, trust_remote_code=True)."""
    convert_checkpoint(
        source,
        out,
        sam2,
        read_json(sam2_config) if sam2_config is not None else None,
        dtype=dtype,
        max_shard_size=max_shard_size,
        verify=verify,
        hub=Hub(revision, token, cache_dir),
        progress=True,
    )
    print(f"Converted {source} -> {out}")
    if push_to_hub is not None:
        print(f"Uploaded {out} -> {publish.push_to_hub(out, push_to_hub, private, HfApi(token=token))}")


@app.command()
def info(model: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")]) -> None:
    """Say what a checkpoint is, from its config and the headers of its weights."""
    for name, value in checkpoint_info(model).items():
        print(f"{name + ':':22}{value}")


@app.command()
def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="mevis-valid_u, mevis-valid, mevis-test, ref-youtube-vos, ref-davis17, revos.")
    ],
    data_root: Annotated[Path, typer.Option(help="Folder of the data set, in its official layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an unfinished one is resumed.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub id; needed to predict.")] = None,
    frames: Annotated[int, typer.Option(help="Frames the language model sees.")] = 5,
    max_prompt_frames: Annotated[int | None, typer.Option(help="Initial masks that are propagated (all).")] = None,
    decoding: Annotated[str, typer.Option(help="consistent (Sa2VA-i) or memory (Sa2VA).")] = "consistent",
    sampling: Annotated[str, typer.Option(help="uniform (Sa2VA-i) or first (Sa2VA).")] = "uniform",
    prompt_style: Annotated[
        str, typer.Option(help="sa2va-i, or sa2va: questions are asked as they stand.")
    ] = "sa2va-i",
    max_objects: Annotated[int | None, typer.Option(help="Objects that are propagated as one batch (all).")] = None,
    workers: Annotated[int, typer.Option(help="Processes that score.")] = 1,
    worst: Annotated[int, typer.Option(help="Draw overlays of so many expressions of lowest J&F.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda, mps, cpu, ... (the accelerator if there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, flash_attention_2, eager.")] = None,
) -> None:
    """Predict DATASET and score it, or zip it for its server.

    A run stops and resumes. Several GPUs or nodes share it: `accelerate launch -m sa2va_i.cli evaluate ...`.
    """
    _require("eval", "pycocotools", "scipy")
    from .evaluation.datasets import open_dataset
    from .evaluation.report import draw_worst, score_run
    from .evaluation.runner import RunOptions, expressions_left, predict, prepare_run
    from .evaluation.submission import write_submission

    data = open_dataset(dataset, data_root)
    state = PartialState(cpu=device == "cpu")
    if any(expressions_left(out, video) for video in data.videos):
        if model is None:
            raise ValueError(f"There are expressions left to predict in {out}: give --model.")
        options = RunOptions(frames, max_prompt_frames, decoding, sampling, prompt_style)
        if state.is_main_process:
            prepare_run(out, model, data, options)
        state.wait_for_everyone()
        sa2va = load_model(model, device or state.device, dtype, attn_implementation)
        predict(data, sa2va, out, options, max_objects, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if not data.has_truth:
        print(f"Submission: {write_submission(data, out)}")
        return
    result = score_run(data, out, workers)
    for picture in draw_worst(data, out, worst) if worst else []:
        print(picture, file=sys.stderr)
    print(json.dumps(result["scores"]))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML of training settings, see training/configs.")],
) -> None:
    """Fine-tune a checkpoint on your data (the Sa2VA-i-FT recipe); a killed run goes on where it stopped.

    Several GPUs or nodes: `accelerate launch -m sa2va_i.cli train CONFIG` or `torchrun -m sa2va_i.cli train CONFIG`.
    """
    _require("train", "peft", "yaml", "pycocotools", "scipy")
    from .training.recipe import TrainConfig
    from .training.recipe import train as train_recipe

    print(f"Trained -> {train_recipe(TrainConfig.from_yaml(config))}")


@app.command()
def synthetic(
    out: Annotated[Path, typer.Argument(help="Folder to make the split in.")],
    split: Annotated[str, typer.Option(help="train or valid_u.")] = "valid_u",
    clips: Annotated[int, typer.Option(help="Number of videos.")] = 200,
    first_seed: Annotated[int | None, typer.Option(help="Of the first video (held out for valid_u, else 0).")] = None,
    per_need: Annotated[int, typer.Option(help="Expressions a video of each kind (appearance, motion, ...).")] = 1,
) -> None:
    """Draw a data set of moving shapes in MeViS' layout, with expressions and exact masks."""
    _require("eval", "pycocotools", "scipy")
    from .training.synthetic import HELD_OUT, write_mevis

    if split not in ("train", "valid_u"):
        raise ValueError(f"`--split` must be train or valid_u, the splits of MeViS with masks. Got {split!r}.")
    if first_seed is None:
        first_seed = 0 if split == "train" else HELD_OUT
    write_mevis(out, range(first_seed, first_seed + clips), split, per_need)
    print(f"{clips} videos -> {out / split}")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="Folder or Hub id; small comes with the package.")] = "small",
    port: Annotated[int | None, typer.Option(help="Of the page (the first free one from 7860 on).")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps, cpu, ... (the accelerator if there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, flash_attention_2, eager.")] = None,
    open_browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
) -> None:
    """Try a model in a browser, on this machine alone (127.0.0.1)."""
    _require("space", "gradio", "pycocotools")
    from .space.page import build_page, serve
    from .space.service import Service

    service = Service(load_model(model, device, dtype, attn_implementation))
    page = build_page(service, f"Model: `{Path(model).name}`.")
    serve(page, service, server_name="127.0.0.1", server_port=port, inbrowser=open_browser)


def _require(extra: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"This command needs {', '.join(missing)}: pip install 'sa2va-i[{extra}]'.")


def load_model(
    name: str,
    device: str | torch.device | None,
    dtype: str,
    attn_implementation: str | None = None,
    sam2: str | None = None,
    sam2_config: Path | None = None,
) -> Sa2VAiModel:
    """The model on `device`, or on the accelerator if there is one, in evaluation mode."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    fields = read_json(sam2_config) if sam2_config is not None else None
    return load(name, sam2, fields, dtype=dtype, **options).to(device).eval()


def checkpoint_info(folder: Path) -> dict[str, Any]:
    """Facts about a checkpoint folder, in the order in which they are printed."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No checkpoint folder with a config.json at {folder}.")
    config = read_json(folder / "config.json")
    weights = TensorFiles(checkpoint_files(folder))
    parameters: Counter[str] = Counter()
    dtypes = set()
    for key in weights:
        like = weights.meta(key)
        parameters[key.partition(".")[0]] += like.numel()
        dtypes.add(str(like.dtype).removeprefix("torch."))
    converted = config.get("model_type") == "sa2va_i"
    facts = {
        "layout": "Sa2VA-i (this package)" if converted else f"{config.get('model_type')} (convert it first)",
        "language model": _summary(config["llm_config"]),
        "vision model": _summary(config["vision_config"]),
        "template": config["template"],
        "dtype": ", ".join(sorted(dtypes)),
        "parameters": f"{sum(parameters.values()) / 1e6:,.1f} M",
    }
    facts |= {f"  {part}": f"{count / 1e6:,.1f} M" for part, count in parameters.items()}
    if converted:
        facts["sampled frames"] = f"{config['sample_num_frames']}, {config['sampling']}"
        facts["decoding"] = config["decoding"]
    return facts


def _summary(config: dict[str, Any]) -> str:
    return f"{config['model_type']}, {config['num_hidden_layers']} layers x {config['hidden_size']}"


def _segment_image(
    model: Sa2VAiModel, image: Image.Image, prompt: str, max_new_tokens: int | None, folder: Path
) -> dict[str, Any]:
    text = segmentation_request(prompt)
    result = model.predict_forward(image=image, text=text, max_new_tokens=max_new_tokens)
    masks = [masks[0] for masks in result["prediction_masks"]]
    if masks:
        (folder / "masks").mkdir()
        for number, mask in enumerate(masks, start=1):
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        draw_overlay(image, masks).save(folder / "overlay.png")
    return {"text": text, "prediction": result["prediction"], "num_objects": len(masks)}


def _segment_video(
    model: Sa2VAiModel, video: Video, prompt: str, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    text = segmentation_request(prompt)
    segmentation = model.segment(video, text, **options)
    if segmentation.num_objects:
        masks = tqdm(segmentation, total=segmentation.num_frames, desc="propagate", unit="frame")
        _write_video_masks(video, masks, segmentation.num_objects, folder)
    return {
        "text": text,
        "prediction": segmentation.prediction,
        "num_objects": segmentation.num_objects,
        "num_frames": segmentation.num_frames,
        "sample_idx": segmentation.sample_idx,
    }


def _write_video_masks(
    video: Video, frames_masks: Iterator[tuple[int, np.ndarray]], num_objects: int, folder: Path
) -> None:
    """`masks/<object>/<frame>.png`, objects from 1, and `overlay.mp4`."""
    for number in range(1, num_objects + 1):
        (folder / "masks" / str(number)).mkdir(parents=True)
    with VideoWriter(folder / "overlay.mp4", video.fps) as writer:
        for frame, (frame_idx, masks) in zip(video, frames_masks, strict=True):
            for number, mask in enumerate(masks, start=1):
                Image.fromarray(mask).save(folder / "masks" / str(number) / f"{frame_idx:05d}.png")
            writer.write(draw_overlay(frame, masks))


def main() -> None:
    """Entry point: what a user can mend is told in one line, without a stack trace."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"sa2va-i: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
