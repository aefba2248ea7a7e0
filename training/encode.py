"""From samples to the tensors of `Sa2VAiModel.forward`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..processing_sa2va_i import TEMPLATES, Sa2VAiProcessor
from .data import Sample, SampleError

IGNORED = -100  # label of a token that is not learnt


class Collator:
    """Samples to a batch. Only the answers are learnt, each with the token that ends it.

    Args:
        processor: of the model.
        max_length: longest sequence in tokens.
        with_masks: whether SAM 2's frames and the masks go into the batch; without them only the text is learnt.
    """

    def __init__(self, processor: Sa2VAiProcessor, max_length: int = 8192, with_masks: bool = True):
        self._processor, self._max_length, self._with_masks = processor, max_length, with_masks

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels` (B, L); `pixel_values`; lists of `sam2_pixel_values` and `masks`
        by sample; `sample_ids`, which the model does not take."""
        encoded = [self.encode(sample) for sample in samples]
        pad_token_id = self._processor.tokenizer.pad_token_id or 0
        input_ids, labels, pixel_values = zip(*encoded, strict=True)
        batch = {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "pixel_values": torch.cat(pixel_values),
            "sample_ids": [sample.id for sample in samples],
        }
        if self._with_masks:
            batch["sam2_pixel_values"] = [self._processor.sam2_pixel_values(sample.frames) for sample in samples]
            batch["masks"] = [torch.from_numpy(sample.masks) for sample in samples]
        return batch

    def encode(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (L,), labels (L,) and tiles of one sample.

        The text is that of a conversation in turns, as `Sa2VAiProcessor.past_text` writes it.
        """
        processor, template = self._processor, TEMPLATES[self._processor.template]
        media = {"image": sample.frames[0]} if sample.is_image else {"frames": sample.frames}
        (first, _), *_ = sample.turns
        prompt = processor(processor.prompt_text(first, has_media=True), **media)
        pieces = [(prompt["input_ids"][0], False)]
        for number, (asked, said) in enumerate(sample.turns):
            if number:
                pieces.append((self._ids("\n" + template.instruction.format(text=asked)), False))
            pieces.append((self._ids(said + template.end), True))
        input_ids = torch.cat([ids for ids, _ in pieces])
        if len(input_ids) > self._max_length:
            raise SampleError(f"sample {sample.id}: {len(input_ids)} tokens, more than {self._max_length}.")
        labels = torch.cat([ids if is_learnt else torch.full_like(ids, IGNORED) for ids, is_learnt in pieces])
        return input_ids, labels, prompt["pixel_values"]

    def _ids(self, text: str) -> Tensor:
        return self._processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
