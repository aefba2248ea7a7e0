import subprocess
import sys
import textwrap

import pytest
import torch

import sa2va_i
from sa2va_i.convert_checkpoint import Hub
from sa2va_i.loading import loadable


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SA2VA_I_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_converted_checkpoint_is_loaded_as_it_is(converted, cache):
    assert loadable(converted) == str(converted)
    assert not cache.exists()


@pytest.mark.parametrize("layout", ["sa2va_i", "sa2va"])
def test_an_original_is_converted_once(sources, sam2_config, cache, capsys, layout, reference_model):
    sam2 = sources / "sam2.pt" if layout == "sa2va" else None
    model = sa2va_i.load(sources / layout, sam2=sam2, sam2_config=sam2_config, dtype="float32")
    assert "Converting" in capsys.readouterr().err
    ours, theirs = model.state_dict(), reference_model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(model.processor.tokenizer) == 416
    (made,) = [path for path in cache.iterdir() if path.is_dir()]
    before = made.stat().st_mtime_ns
    sa2va_i.load(sources / layout, sam2=sam2, sam2_config=sam2_config)
    assert "Converting" not in capsys.readouterr().err
    assert made.stat().st_mtime_ns == before


def test_another_source_is_another_conversion(sources, sam2_config, cache):
    sa2va_i.load(sources / "sa2va_i", sam2_config=sam2_config)
    sa2va_i.load(sources / "sa2va", sam2=sources / "sam2.pt", sam2_config=sam2_config)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_a_plain_original_needs_its_sam2(sources, sam2_config):
    with pytest.raises(ValueError, match=r"--sam2"):
        sa2va_i.load(sources / "sa2va", sam2_config=sam2_config)


def test_a_hub_id(sources, sam2_config, tmp_path, monkeypatch):
    """No network here: stand-ins for the two downloads."""
    asked = []

    def download_config(repo_id, filename, **options):
        asked.append((repo_id, filename, options["revision"]))
        return str(sources / "sa2va_i" / filename)

    monkeypatch.setattr("sa2va_i.loading.hf_hub_download", download_config)
    monkeypatch.setattr(
        "sa2va_i.convert_checkpoint.snapshot_download", lambda *args, **options: str(sources / "sa2va_i")
    )
    folder = loadable("kumuji/Sa2VA-i-1B", sam2_config=sam2_config, hub=Hub(revision="v1"))
    assert asked == [("kumuji/Sa2VA-i-1B", "config.json", "v1")]
    assert folder.startswith(str(tmp_path / "cache" / "Sa2VA-i-1B-"))


def test_two_processes_at_once(sources, cache, sam2_config):
    """One converts, the other waits and finds it done."""
    code = textwrap.dedent(
        f"""
        from sa2va_i.loading import loadable
        print(loadable({str(sources / "sa2va_i")!r}, sam2_config={sam2_config!r}))
        """
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    assert len({output for output, _ in results}) == 1
    assert sum("Converting" in error for _, error in results) == 1
