"""InternLM2's sentencepiece tokenizer as a `tokenizer.json` that gives the same ids.

The published one comes with a Python class of its own, which is remote code; the model inside is a byte-fallback BPE,
which the tokenizers library runs. Nothing of the source is executed.
"""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from .files import read_json, write_json

SPACE = "▁"
# Encoded by both on the way out: words, code, spaces, newlines, other scripts, emoji, characters outside the vocabulary
PROBES = (
    "Please segment the dog that jumps first.",
    "def f(x):\n\treturn  x ** 2\n\n",
    "  two  spaces   three ",
    "请分割视频中最先跳起来的狗。",
    "Ünïcödé, ελληνικά, 日本語, العربية",
    "🐕🏽‍🦺 jumps 🎉",
    "\u0001\ufffd\u200b",
)


def convert_internlm2_tokenizer(source: Path, out: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` to the folder `out`.

    Args:
        source: folder with `tokenizer.model` and `tokenizer_config.json`.
    Raises:
        ValueError: the result gives other ids than sentencepiece on a probe.
    """
    sentencepiece = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    config = read_json(source / "tokenizer_config.json")
    added = {int(token_id): AddedToken(**fields) for token_id, fields in config["added_tokens_decoder"].items()}
    bos_token = config["bos_token"] if config.get("add_bos_token", True) else None
    tokenizer = build_tokenizer(sentencepiece, added, bos_token)
    check_same_ids(tokenizer, sentencepiece)
    tokenizer.save(str(out / "tokenizer.json"))
    kept = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens", "model_max_length")
    write_json(
        out / "tokenizer_config.json",
        {
            # `LlamaTokenizerFast` would be rebuilt by transformers 5, with other ids
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": config["added_tokens_decoder"],
            **{name: config[name] for name in kept if name in config},
        },
    )


def build_tokenizer(
    sentencepiece: SentencePieceProcessor, added: dict[int, AddedToken], bos_token: str | None
) -> Tokenizer:
    """The tokenizer of a sentencepiece BPE model and of tokens added to it by id.

    Args:
        added: a token within the vocabulary takes the place of the piece there (`[UNUSED_TOKEN_n]`).
        bos_token: put before every text; None for nothing.
    """
    pieces = [sentencepiece.id_to_piece(piece_id) for piece_id in range(sentencepiece.get_piece_size())]
    scores = [sentencepiece.get_score(piece_id) for piece_id in range(len(pieces))]
    whole = {  # never put together from parts
        piece
        for piece_id, piece in enumerate(pieces)
        if sentencepiece.is_control(piece_id) or sentencepiece.is_byte(piece_id) or sentencepiece.is_unknown(piece_id)
    }
    for token_id, token in added.items():
        if token_id < len(pieces):
            pieces[token_id] = token.content
        whole.add(token.content)
    vocabulary = {piece: piece_id for piece_id, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, dict(zip(pieces, scores, strict=True)), skip_tokens=whole)

    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=sentencepiece.id_to_piece(sentencepiece.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if sentencepiece.encode("a", out_type=str)[0].startswith(SPACE):  # a space is put before every text
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    if bos_token is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, vocabulary[bos_token])]
        )
    return tokenizer


def check_same_ids(tokenizer: Tokenizer, sentencepiece: SentencePieceProcessor) -> None:
    """Raise a ValueError if the two differ on a probe."""
    for probe in PROBES:
        ours, theirs = tokenizer.encode(probe, add_special_tokens=False).ids, sentencepiece.encode(probe)
        if ours != theirs:
            raise ValueError(f"tokenizer.model cannot be converted: {probe!r} gives {ours} and not {theirs}.")
