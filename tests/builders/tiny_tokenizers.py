"""Make tokenizers for CLIP and SigLIP in both libraries, with vocabularies that need no hub."""

from __future__ import annotations

import io
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

open_clip = pytest.importorskip("open_clip")
sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

TEXT = (
    "a an the of in is there this what like looks photo picture image showing somebody took "
    "snapshot red green blue "
    "yellow pink grey dog cat house tree car thing number two on by dress hat sweater coat jeans "
    "shirt shoe skirt"
)
WORDS = TEXT.split()
"""Words in the vocabulary. Other words are put together from letters and digits."""

END = "</s>"


def clip_tokenizer() -> Any:
    """Return transformers' tokenizer for CLIP, with open_clip's byte pairs."""
    known = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): number for piece, number in known.encoder.items()}
    return transformers.CLIPTokenizer(
        vocab=vocabulary, merges=list(known.bpe_ranks), model_max_length=known.context_length
    )


@cache
def sentencepiece_model() -> bytes:
    """Return a vocabulary in SigLIP's layout, trained on ``WORDS``.

    The layout has padding 0, end 1 and unknown 2.
    """
    file = io.BytesIO()
    phrases = [" ".join(WORDS[i : i + 5]) for i in range(len(WORDS))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*phrases * 20, *string.ascii_lowercase, *string.digits]),
        model_writer=file,
        vocab_size=200,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()


def vocabulary_size() -> int:
    """Return the number of pieces in the vocabulary."""
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).vocab_size()


def siglip_ids(texts: list[str], length: int = 64) -> Tensor:
    """Return the token numbers (M, length) for clean texts, from SentencePiece itself.

    A row has the pieces, an end, and more ends up to the length.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model()).encode(texts)
    return torch.tensor(
        [[*row[: length - 1], *[1] * (length - len(row[: length - 1]))] for row in pieces]
    )


@cache
def siglip_tokenizer() -> Any:
    """Return transformers' tokenizer for SigLIP.

    It gives no mask, as on the hub, because SigLIP's text tower reads the padding.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spiece.model"
        file.write_bytes(sentencepiece_model())
        return transformers.SiglipTokenizer(vocab_file=str(file), model_input_names=["input_ids"])


def t5_tokenizer() -> Any:
    """Return the tokenizer that open_clip wraps for SigLIP.

    It has the same vocabulary. It does not clean texts, because open_clip does.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto.FromString(sentencepiece_model())
    return transformers.T5Tokenizer(
        vocab=[(piece.piece, piece.score) for piece in proto.pieces],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
        pad_token=END,
        extra_ids=0,
    )
