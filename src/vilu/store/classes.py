"""What a store may hold of its classes and of the model, beside the class texts."""

from __future__ import annotations

import logging

from torch import Tensor

from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import fill_templates, prompt_texts
from vilu.store.manifest import ClassColumn, Run
from vilu.validate import require_usable

logger = logging.getLogger(__name__)


def class_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """The columns (``vilu.columns``) of classes and model that a run asks for, float32.

    Raises:
        UsageError: If a prompt has not exactly one ``{}``.
        DataError: If a prompt has an unusable embedding.
    """
    columns: dict[ClassColumn, Tensor] = {}
    if run.prompts:
        prompts = prompt_texts(backbone, run.names, run.prompts)
        columns["prompts"] = require_usable(prompts.flatten(0, 1), "prompt").view(prompts.shape)
    if run.features is not None:
        columns |= _linear_columns(backbone, run)
    return columns


def _linear_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """Both last maps and what the text's maps, where there are such maps."""
    if backbone.projections is None:
        logger.info("the last maps of %s are not both linear: of its features the images' are kept", run.space.backbone)
        return {}
    image, text = backbone.projections
    columns: dict[ClassColumn, Tensor] = {"image_projection": image, "text_projection": text}
    if len(run.templates) == 1:
        columns["text_features"] = backbone.encode_text_features(fill_templates(run.names, run.templates))
    else:
        logger.info("no text_features: a class text is the mean over %d templates, of no text", len(run.templates))
    return columns
