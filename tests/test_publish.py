import json
import runpy
import sys
from importlib.metadata import version
from types import SimpleNamespace

import gradio
import pytest
from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoConfig

from sa2va_i import Sa2VAiConfig, publish
from sa2va_i.publish import make_card, push_to_hub

LANGUAGE_MODELS = {
    "Sa2VA-i-1B": {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24},
    "Sa2VA-i-4B": {"model_type": "qwen2", "hidden_size": 2048, "num_hidden_layers": 36},
    "Sa2VA-i-8B": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32},
    "Sa2VA-i-26B": {"model_type": "llama", "hidden_size": 6144, "num_hidden_layers": 48},
    "Sa2VA-i-Phi3-4B": {"model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32},
    "Sa2VA-i-InternVL3-2B": {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28},
    "Sa2VA-i-InternVL3-8B": {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28},
    "Sa2VA-i-InternVL3-14B": {"model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 48},
}


@pytest.fixture
def folder_of(tmp_path):
    def folder_of(llm_config: dict, source: str = "ByteDance/Sa2VA"):
        Sa2VAiConfig(llm_config=AutoConfig.for_model(**llm_config)).save_pretrained(tmp_path)
        (tmp_path / "conversion.json").write_text(json.dumps({"source": source}))
        return tmp_path

    return folder_of


@pytest.mark.parametrize(("name", "llm_config"), LANGUAGE_MODELS.items())
def test_every_published_model_has_a_card(folder_of, tmp_path, name, llm_config):
    folder = folder_of(llm_config)
    card = make_card(folder, repo_id="someone/" + name)
    card.save(folder / "README.md")
    metadata = metadata_load(folder / "README.md")
    assert card.content.count(f"# {name}\n") == 1
    assert f'from_pretrained("someone/{name}"' in card.content
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["base_model"]
    assert publish.SPACE in card.content
    assert "{{" not in card.content
    assert "None" not in card.content


def test_numbers_are_the_authors_and_say_so(folder_of):
    card = make_card(folder_of(LANGUAGE_MODELS["Sa2VA-i-4B"]), "someone/model")
    _, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert {result.dataset_name: result.metric_value for result in results} == {
        "MeViS": 56.6,
        "Ref-YT-VOS": 73.2,
        "Ref-DAVIS17": 78.6,
    }
    assert all("not measured with this package" in result.source_name for result in results)
    assert "the authors' numbers" in card.text


def test_without_numbers(folder_of):
    card = make_card(folder_of(LANGUAGE_MODELS["Sa2VA-i-InternVL3-2B"]), "someone/model")
    assert "model-index" not in card.data.to_dict()
    assert "report no numbers" in card.text


def test_research_licence_is_marked(folder_of):
    card = make_card(folder_of(LANGUAGE_MODELS["Sa2VA-i-4B"]), "someone/model")
    assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
    assert "no commercial use" in card.text
    assert make_card(folder_of(LANGUAGE_MODELS["Sa2VA-i-1B"]), "someone/model").data.license == "apache-2.0"


def test_a_model_of_ones_own(converted):
    """Not one of those published: a card without their facts."""
    card = ModelCard.load(converted / "README.md")
    assert f"]({publish.PICTURE})" in card.text
    assert (converted / publish.PICTURE).read_bytes() == (publish.CARDS / publish.PICTURE).read_bytes()
    assert "# Sa2VA-i\n" in card.content
    assert "report no numbers" in card.text


class StandInApi(HfApi):
    """Records what is uploaded, in which order."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, *, private=None, exist_ok=False, **kwargs):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=None, **kwargs):
        self.calls.append(
            ("upload_folder", repo_id, sorted(file.name for file in folder_path.iterdir()), ignore_patterns)
        )

    def upload_large_folder(self, repo_id, folder_path, *, repo_type, ignore_patterns=None, **kwargs):
        self.calls.append(("upload_large_folder", repo_id, repo_type, ignore_patterns))

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, **kwargs):
        self.calls.append(("upload_file", repo_id, path_in_repo, path_or_fileobj.decode()))


class TestUpload:
    def test_order(self, converted):
        api = StandInApi()
        assert push_to_hub(converted, "me/model", private=True, api=api) == "https://huggingface.co/me/model"
        create, folder, card = api.calls
        assert create == ("create_repo", "me/model", True, True)
        assert folder[:2] == ("upload_folder", "me/model")
        assert {"config.json", "model.safetensors", "modeling_sa2va_i.py", "tokenizer.json"} <= set(folder[2])
        assert folder[3] == ["README.md"]
        assert card[:3] == ("upload_file", "me/model", "README.md")  # last: a repository with a card is whole
        assert 'from_pretrained("me/model"' in card[3]

    def test_large(self, converted, monkeypatch):
        api = StandInApi()
        monkeypatch.setattr(publish, "LARGE", 1000)
        push_to_hub(converted, "me/model", api=api)
        assert [call[0] for call in api.calls] == ["create_repo", "upload_large_folder", "upload_file"]


class TestSpace:
    SPACE = publish.CARDS / "space"

    def test_front_matter(self):
        metadata = metadata_load(self.SPACE / "README.md")
        assert metadata["sdk"] == "gradio"
        assert metadata["sdk_version"] == gradio.__version__  # the one the tests ran on
        assert metadata["app_file"] == "app.py"
        assert len(metadata["short_description"]) <= 60  # the Hub's limit

    def test_the_wheel_is_this_version(self):
        requirements = (self.SPACE / "requirements.txt").read_text()
        assert f"sa2va_i-{version('sa2va-i')}-py3-none-any.whl" in requirements

    def test_app(self, monkeypatch, small_checkpoint):
        """It runs as the Space runs it; `spaces` is a package of its own, and serving is tested elsewhere."""
        served = []
        wrapped = []
        gpu = SimpleNamespace(GPU=lambda duration: lambda ask: wrapped.append(ask) or ask)
        monkeypatch.setitem(sys.modules, "spaces", gpu)
        monkeypatch.setattr("sa2va_i.space.page.serve", lambda page, service: served.append((page, service)))
        monkeypatch.setenv("MODEL", str(small_checkpoint))
        runpy.run_path(str(self.SPACE / "app.py"), run_name="__main__")
        ((page, service),) = served
        assert isinstance(page, gradio.Blocks)
        assert wrapped == [service.ask]
        service.close()
