import json
import re
import shutil

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from sa2va_i import Sa2VAiConfig, Sa2VAiProcessor
from sa2va_i.convert_checkpoint import write_configs
from sa2va_i.internlm2_tokenizer import PROBES, convert_internlm2_tokenizer

UNUSED = [f"[UNUSED_TOKEN_{number}]" for number in range(4)]
IN_VOCABULARY = ["<|im_end|>", "<|im_start|>"]  # take the place of unused pieces, as published
APPENDED = ["<img>", "</img>", "<IMG_CONTEXT>", "[SEG]", "<vp>", "</vp>"]
CORPUS = [
    "Please segment the dog that jumps first, and the cat that does not jump.",
    "It is the red circle in the first frame of the video.  Two spaces,   three spaces.",
    "for frame_idx, masks in model.segment(video): print(frame_idx, masks.shape)",
    "请分割视频中最先跳起来的狗。它是一只棕色的狗。",
    "the that this then there these they them than thing think third",
]
TEXTS = [
    *PROBES,
    "<|im_start|>user\nPlease segment the dog.<|im_end|>\n<|im_start|>assistant\n",
    "Sure, it is [SEG].<|im_end|>",
    "[SEG][SEG] and [SEG]",
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nThere are 1 part regions in the picture: region1<vp><IMG_CONTEXT></vp>.\n",
    "<s> and </s> and <0x0A> in a text",
    "它是 [SEG]。",
    "",
    " ",
    "\n\n  \n",
]


@pytest.fixture(scope="module", params=[False, True], ids=["no space in front", "space in front"])
def source(request, tmp_path_factory):
    """A published InternLM2 tokenizer in small: sentencepiece BPE with byte fallback, and tokens added to it."""
    folder = tmp_path_factory.mktemp("internlm2")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        user_defined_symbols=UNUSED,
        minloglevel=2,
    )
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {token: model.piece_to_id(unused) for token, unused in zip(IN_VOCABULARY, UNUSED)}
    ids |= {token: model.get_piece_size() + number for number, token in enumerate(APPENDED)}
    ids |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    fields = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "InternLM2Tokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
                "added_tokens_decoder": {str(i): {"content": token, **fields} for token, i in ids.items()},
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "</s>",
                "model_max_length": 8192,
                "add_bos_token": True,
                "add_eos_token": False,
            }
        )
    )
    (folder / "tokenization_internlm2.py").write_text("raise RuntimeError('the source code was run')")
    return folder


@pytest.fixture(scope="module")
def tokenizer(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_internlm2_tokenizer(source, folder)
    return AutoTokenizer.from_pretrained(folder, config=Sa2VAiConfig())


def published_ids(source, text: str) -> list[int]:
    """What the slow class does: added tokens are cut out of the text, sentencepiece encodes what lies between."""
    model = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    added = json.loads((source / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    id_of = {fields["content"]: int(token_id) for token_id, fields in added.items()}
    pattern = "(" + "|".join(map(re.escape, id_of)) + ")"
    ids = [model.bos_id()]
    for part in filter(None, re.split(pattern, text)):
        ids += [id_of[part]] if part in id_of else model.encode(part)
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids(source, tokenizer, text):
    assert tokenizer(text).input_ids == published_ids(source, text)


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_decoding_gives_the_text_back(tokenizer, text):
    decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=False)
    assert decoded.replace(" ", "") == text.replace(" ", "")
    assert decoded.count("[SEG]") == text.count("[SEG]")


def test_without_a_bos_token(source, tmp_path):
    """Phi3's sentencepiece is of the same kind, and may put nothing in front."""
    shutil.copy(source / "tokenizer.model", tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    convert_internlm2_tokenizer(tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=Sa2VAiConfig())
    assert tokenizer("It is [SEG].").input_ids == published_ids(source, "It is [SEG].")[1:]


def test_the_processor_takes_it(tokenizer):
    processor = Sa2VAiProcessor(tokenizer, template="internlm2_chat")
    assert tokenizer.convert_ids_to_tokens(processor.stop_token_ids) == ["</s>", "<|im_end|>"]


def test_a_conversion_writes_it(source, tmp_path):
    """Beside the configs, which then name its ids; the class in the source is not run."""
    config = Sa2VAiConfig(template="internlm2_chat")
    write_configs(tmp_path, source, config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert tokenizer("It is [SEG].").input_ids == published_ids(source, "It is [SEG].")
    assert config.seg_token_id == tokenizer.convert_tokens_to_ids("[SEG]")
    assert not (tmp_path / "tokenizer.model").exists()


def test_a_model_that_cannot_be_converted(tmp_path):
    """A unigram model is no BPE: the probes tell."""
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}, "bos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"tokenizer\.model cannot be converted"):
        convert_internlm2_tokenizer(tmp_path, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
