"""A ``Guard`` behind ``transformers.pipeline``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Final

from PIL import Image

from vilu.errors import UsageError
from vilu.extras import import_extra
from vilu.guard.guard import Answer, Guard, ImageLike

TASK: Final = "zero-shot-image-classification-selective"
"""The pipeline's name."""

Entries = list[dict[str, Any]]
"""The answer about an image, as a list with one dictionary."""


def register() -> None:
    """Register ``TASK``, so that ``transformers.pipeline`` can make the pipeline.

    Example::

        register()
        pipe = transformers.pipeline(TASK, model=vilu.Guard("out/predictor"))
        pipe("photo.jpg")[0]["decision"]  # "accept"

    Raises:
        MissingModelError: If transformers is not installed.
    """
    registry = import_extra("transformers.pipelines", "hf").PIPELINE_REGISTRY
    registered_class = registry.supported_tasks.get(TASK, {}).get("impl")
    if registered_class is not SelectivePipeline:
        registry.register_pipeline(TASK, pipeline_class=SelectivePipeline)


class SelectivePipeline:
    """A guard's answers in the format of the task "zero-shot-image-classification".

    - A single image gives a list with a single entry, the answer.
    - A list or tuple of images gives a list of such lists.
    - Any other iterable, such as a data set, gives an iterator over such lists. It is read in
      batches, so more images need no more memory.

    An entry is a dictionary with these keys:

    - ``label``, ``failure_probability``, ``decision``, ``reason``, ``zero_shot``, ``likely`` and
      ``quantile``: as in ``vilu.Answer``.
    - ``score``: the probability that the label is right, 1 - ``failure_probability``.
    - ``runners_up``: the next most likely answers, each with ``label`` and the probability as
      ``score``.

    Unknown values are None. For example, a bad image has a reason, and its label is None.

    This class is no ``transformers.Pipeline``. A ``transformers.Pipeline`` moves a network and
    processors between devices, but here the guard holds the network and the preprocessing.

    Args:
        model: The guard, with classes, prompts, device and batch size.
        task: The task's name.
        settings: Only ``dtype="auto"`` is allowed, because ``transformers.pipeline`` adds this
            setting.

    Raises:
        UsageError: If ``model`` is no guard, if there are further settings, or if an image is
            neither a path, nor bytes, nor a Pillow image.
    """

    # Without these attributes ``transformers.pipeline`` would load processors in addition to the
    # model.
    _load_feature_extractor = False
    _load_image_processor = False
    _load_processor = False
    _load_tokenizer = False
    _load_video_processor = False

    def __init__(self, model: Guard, task: str = TASK, **settings: object) -> None:
        if not isinstance(model, Guard):
            raise UsageError(
                f"give the predictor as a guard: model=vilu.Guard(folder). Got {model!r:.60} "
                "instead."
            )
        self.model = model
        self.task = task
        if settings.get("dtype") == "auto":  # ``transformers.pipeline`` adds this setting
            settings.pop("dtype")
        _refuse_settings(settings)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], **settings: object
    ) -> Entries | list[Entries] | Iterator[Entries]:
        """Return the entries for an image, or for every image in a list or iterable."""
        _refuse_settings(settings)
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            (answer,) = self.model([images])
            return _entries(answer)
        answers = self.model.stream(images)
        if isinstance(images, list | tuple):
            return [_entries(answer) for answer in answers]
        return map(_entries, answers)


def _refuse_settings(settings: Iterable[str]) -> None:
    """Raise UsageError if there are any settings."""
    names = sorted(settings)
    if names:
        listed_names = ", ".join(names)
        raise UsageError(
            f"this pipeline takes no {listed_names}: classes and prompts are those of the "
            "predictor, and all other settings are arguments of the guard, as in "
            "vilu.Guard(folder, device='cpu', batch_size=32)."
        )


def _entries(answer: Answer) -> Entries:
    """Return an image's entries, made from the answer."""
    score: float | None = None
    if answer.failure_probability is not None:
        score = 1 - answer.failure_probability
    entry = {
        "label": answer.label,
        "score": score,
        "failure_probability": answer.failure_probability,
        "decision": answer.decision,
        "reason": answer.reason,
        "zero_shot": answer.zero_shot,
        "likely": answer.likely,
        "quantile": answer.quantile,
        "runners_up": [
            {"label": name, "score": probability} for name, probability in answer.runners_up
        ],
    }
    return [entry]
