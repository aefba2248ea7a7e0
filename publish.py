"""What a Hub repository holds beside weights and tokenizer: code, configs, the model card; and its upload."""

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .configuration_sa2va_i import Sa2VAiConfig
from .files import read_json, staged_folder
from .modeling_sa2va_i import Sa2VAiModel
from .processing_sa2va_i import Sa2VAiProcessor

CARDS = Path(__file__).parent / "hub_cards"
PICTURE = "overlay.jpg"
SPACE = "https://huggingface.co/spaces/kumuji/Sa2VA-i"
LARGE = 5_000_000_000  # bytes from which an upload is split and can be resumed
REMOTE_CODE = (
    "configuration_sa2va_i.py",
    "processing_sa2va_i.py",
    "sam2_propagator.py",
    "mask_losses_sa2va_i.py",
    "modeling_sa2va_i.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_sa2va_i.Sa2VAiConfig",
    "AutoModel": "modeling_sa2va_i.Sa2VAiModel",
    "AutoModelForCausalLM": "modeling_sa2va_i.Sa2VAiModel",
    "AutoProcessor": "processing_sa2va_i.Sa2VAiProcessor",
}
DATASETS = {  # of the paper: its name and its type on the Hub
    "mevis-valid": ("MeViS", "FudanCVL/MeViS"),
    "ref-youtube-vos": ("Ref-YT-VOS", "ref-youtube-vos"),
    "ref-davis17": ("Ref-DAVIS17", "ref-davis17"),
}


def save_package(
    model: Sa2VAiModel, tokenizer: PreTrainedTokenizerBase, out: Path, loaded_as: torch.dtype | None = None
) -> None:
    """Write a model, its tokenizer and the code that loads it as the folder `out`.

    Args:
        loaded_as: the dtype of `dtype="auto"`, if it is to be another than that of the weights.
    """
    with staged_folder(out) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        model.config.dtype = loaded_as or model.config.dtype
        write_package(staged, model.config)


def write_package(folder: Path, config: Sa2VAiConfig) -> None:
    """Write configs and code into a folder that holds a tokenizer; the token ids in `config` are filled in."""
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    processor = Sa2VAiProcessor.from_config(config, tokenizer)
    processor.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    processor.to_json_file(folder / "processor_config.json")
    config.seg_token_id = processor.seg_token_id
    config.img_context_token_id = processor.img_context_token_id
    config.auto_map = AUTO_MAP
    config.save_pretrained(folder)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=2048,  # as the original
        eos_token_id=processor.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    for name in REMOTE_CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def make_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a converted checkpoint, with the metadata the Hub reads.

    Args:
        folder: of `convert_checkpoint`.
        repo_id: where it will stand, for the code in the card.
    """
    config = Sa2VAiConfig.from_pretrained(folder)
    source = read_json(folder / "conversion.json")["source"]
    licenses, model = _known(config)
    paper = read_paper()
    scores = paper["J&F"].get(model["name"], {})
    license_name = model["language_model"]["license"]
    is_free = license_name in ("apache-2.0", "mit")
    data = ModelCardData(
        model_name=model["name"],
        license="apache-2.0" if is_free else "other",
        license_name=None if is_free else license_name,
        base_model=model["base_model"],
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["sa2va", "sa2va-i", "video", "segmentation", "referring-video-object-segmentation", "custom_code"],
        language=["multilingual"],
        eval_results=[_result(dataset, score, paper) for dataset, score in scores.items()] or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(CARDS / "model_card.md.j2"),
        name=model["name"],
        repo_id=repo_id,
        space=SPACE,
        # a folder on someone's disk says nothing to a reader
        source=source if source.count("/") == 1 and not Path(source).exists() else model["base_model"],
        scores={DATASETS[dataset][0]: score for dataset, score in scores.items()},
        numbers_source=paper["source"],
        language_model=model["language_model"]["name"],
        language_model_license=licenses.get(license_name, "see its own page"),
        vision_size="6B" if config.vision_config.hidden_size == 3200 else "300M",
        sample_num_frames=config.sample_num_frames,
    )


def write_card(folder: Path, repo_id: str) -> None:
    """Write the card into the folder of a converted checkpoint, with its picture."""
    make_card(folder, repo_id).save(folder / "README.md")
    shutil.copyfile(CARDS / PICTURE, folder / PICTURE)


def push_to_hub(folder: Path, repo_id: str, private: bool = False, api: HfApi | None = None) -> str:
    """Upload a converted checkpoint with its card; returns the repository's address.

    The card goes last: a repository that has one is whole.
    """
    api = api or HfApi()
    card = make_card(folder, repo_id)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if sum(file.stat().st_size for file in folder.iterdir()) >= LARGE:
        api.upload_large_folder(repo_id, repo_type="model", folder_path=folder, ignore_patterns=["README.md"])
    else:
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["README.md"])
    api.upload_file(repo_id=repo_id, path_or_fileobj=str(card).encode(), path_in_repo="README.md")
    return str(url)


def read_paper() -> dict[str, Any]:
    """The `J&F` that the authors give, by model and data set, with their `source` and a `note` on them."""
    return read_json(CARDS / "paper.json")


def _known(config: Sa2VAiConfig) -> tuple[dict[str, str], dict[str, Any]]:
    """The licenses of `hub_cards/models.json`, and the model among them that has this config's language model."""
    facts = read_json(CARDS / "models.json")
    llm = config.llm_config
    for model in facts["models"]:
        known = model["language_model"]
        if (llm.model_type, llm.hidden_size, llm.num_hidden_layers) == (
            known["type"],
            known["hidden_size"],
            known["layers"],
        ):
            return facts["licenses"], model
    other = {"name": llm.model_type, "license": "other"}
    return facts["licenses"], {"name": "Sa2VA-i", "base_model": None, "language_model": other}


def _result(dataset: str, score: float, paper: dict[str, Any]) -> EvalResult:
    name, kind = DATASETS[dataset]
    return EvalResult(
        task_type="video-object-segmentation",
        task_name="Referring video object segmentation",
        dataset_type=kind,
        dataset_name=name,
        metric_type="j_and_f",
        metric_name="J&F",
        metric_value=score,
        verified=False,
        source_name=paper["note"],
        source_url=paper["source"],
    )
