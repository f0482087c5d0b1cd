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
"""Name of the pipeline."""

Entries = list[dict[str, Any]]
"""The answer for one image: a list with one entry."""


def register() -> None:
    """Make ``TASK`` known to ``transformers.pipeline``: it does not know it before.

    Example::

        register()
        pipe = transformers.pipeline(TASK, model=vilu.Guard("out/predictor"))
        pipe("photo.jpg")[0]["decision"]  # "accept"

    Raises:
        MissingModelError: If transformers is not installed.
    """
    registry = import_extra("transformers.pipelines", "hf").PIPELINE_REGISTRY
    if registry.supported_tasks.get(TASK, {}).get("impl") is not SelectivePipeline:
        registry.register_pipeline(TASK, pipeline_class=SelectivePipeline)


class SelectivePipeline:
    """A guard's answers in the shape of the task "zero-shot-image-classification".

    An image gives a list with one entry, the model's answer; a list of images gives a list of
    these, and any other iterable, as a data set, an iterator over them in bounded memory. An entry
    has ``label``, ``score`` (how likely the label is right, 1 - ``failure_probability``),
    ``failure_probability``, ``decision`` and ``reason`` as in ``vilu.Answer``, and ``runners_up``:
    the next answers, each with ``label`` and its zero-shot probability as ``score``. What is not
    known is None: a bad image has a reason and no label.

    It is no ``transformers.Pipeline``: that moves a network and its processors about, which a guard
    keeps together.

    Args:
        model: The guard, which knows classes, prompts, device and batch size.
        task: Name of the task.
        settings: What ``transformers.pipeline`` adds: a ``dtype`` of "auto", and nothing else.

    Raises:
        UsageError: If ``model`` is no guard, there are other settings, or an image is no path,
            bytes or Pillow picture.
    """

    # ``transformers.pipeline`` would load these beside the model
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
        if settings.get("dtype") == "auto":  # transformers adds it
            settings.pop("dtype")
        _refuse(settings)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], **settings: object
    ) -> Entries | list[Entries] | Iterator[Entries]:
        """The entries of one image, or of each of many."""
        _refuse(settings)
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            (answer,) = self.model([images])
            return _entries(answer)
        answers = self.model.stream(images)
        if isinstance(images, list | tuple):
            return [_entries(answer) for answer in answers]
        return map(_entries, answers)


def _refuse(settings: Iterable[str]) -> None:
    names = sorted(settings)
    if names:
        raise UsageError(
            f"this pipeline takes no {', '.join(names)}: classes and prompts are those of the "
            "predictor, and all else is set where the guard is made, as in vilu.Guard(folder, "
            "device='cpu', batch_size=32)."
        )


def _entries(answer: Answer) -> Entries:
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
        "runners_up": [{"label": name, "score": share} for name, share in answer.runners_up],
    }
    return [entry]
