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


def measure(path: Path) -> dict:
    """Run `segment` on the video and report this process's peak resident memory."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import small_model

    torch.set_num_threads(2)
    model = small_model.build()
    small_model.always_answer_seg(model)
    segmentation = model.segment(path, "the noise")
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
