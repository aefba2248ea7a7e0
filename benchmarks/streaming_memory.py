"""Peak memory of segmenting a long video against a short one: `segment` must hold neither frames nor masks.

    python benchmarks/streaming_memory.py                       # 40 and 400 frames
    python benchmarks/streaming_memory.py --frames 40 4000

Each length runs in a process of its own, from an mp4 file, with a small random SAM 2 (192 px) and a language model that
answers [SEG] to everything. Prints a table and, last, one line of JSON.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZE = (640, 480)


def write_video(path: Path, num_frames: int) -> None:
    import numpy as np
    from PIL import Image

    from sa2va_i.overlay import VideoWriter

    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    with VideoWriter(path, fps=25) as writer:
        for frame_idx in range(num_frames):
            writer.write(Image.fromarray(np.roll(noise, 3 * frame_idx, axis=1)))


def small_model():
    """Random, but for a language model that says "[SEG]" after every prompt, and stops."""
    import torch
    from transformers import AutoTokenizer

    from sa2va_i import Sa2VAiConfig, Sa2VAiModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/reference/checkpoint_files", config=Sa2VAiConfig())
    seg, end = tokenizer.convert_tokens_to_ids(["[SEG]", "<|im_end|>"])
    torch.manual_seed(0)
    model = Sa2VAiModel(
        Sa2VAiConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
            },
            llm_config={
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
            sam2_config=json.loads((ROOT / "tests/small_sam2.json").read_text()),
            seg_token_id=seg,
            img_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
    ).eval()
    language_model = model.language_model
    with torch.no_grad():
        # without the layers' contributions the state is the last token's embedding: each token has one successor
        for layer in language_model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = language_model.get_input_embeddings().weight
        (newline,) = tokenizer("\n").input_ids
        language_model.lm_head.weight.zero_()
        language_model.lm_head.weight[seg] = embedding[newline]  # the prompt's last token
        language_model.lm_head.weight[end] = embedding[seg]
    model.preparing_for_generation(tokenizer, max_new_tokens=8)
    return model


def measure(path: Path) -> dict:
    """Run `segment` on the video and report this process's peak resident memory."""
    import torch

    torch.set_num_threads(2)
    segmentation = small_model().segment(path, "the noise")
    num_frames = sum(1 for _ in segmentation)
    assert segmentation.num_objects == 1, segmentation.prediction
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"num_frames": num_frames, "peak_mb": round(peak_mb, 1), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for num_frames in arguments.frames:
            path = Path(folder) / f"{num_frames}.mp4"
            write_video(path, num_frames)
            command = [sys.executable, __file__, "--measure", str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    for run in runs:
        run["ratio"] = round(run["peak_mb"] / runs[0]["peak_mb"], 3)
        print(f"{run['num_frames']:6} frames  {run['peak_mb']:8.1f} MB  x{run['ratio']}")
    print(json.dumps({"device": f"cpu ({platform.machine()})", "dtype": "float32", "video": SIZE, "runs": runs}))


if __name__ == "__main__":
    main()
