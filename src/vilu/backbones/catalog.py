"""Backbones by name."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vilu.artifacts.documents import fill_dataclass
from vilu.errors import MissingModelError, ProvenanceError, UsageError, did_you_mean
from vilu.progress import track
from vilu.registry import REGISTER_FUNCTIONS, Catalogue, toml_tables
from vilu.validation import checked, require_one_of

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vilu.backbones.base import Backbone


SLOW_SECONDS = 2.0
"""Loading times above this limit in seconds are logged."""

CONFIG_FILES = {"open_clip": "open_clip_config.json", "hf": "config.json"}
"""Maps a library that loads named backbones to a file name.

A model folder for the library is recognised by this file. The library's name is also the name of
the ``BackboneKind`` that loads with this library.
"""

DEFAULT_LIBRARY = "open_clip"  # for a hub model if the spec names no library


@dataclass(frozen=True)
class NamedBackbone:
    """A model at a single resolution, for open_clip and for transformers."""

    name: str
    title: str  # for tables
    open_clip: str  # NAME/TAG in open_clip's registry
    open_clip_hub: str  # repository with the weights for open_clip
    hf: str  # repository with the same weights for transformers
    embed_dim: int  # width D of the joint space
    feature_dim: int  # width F of the image features
    image_size: int  # image height and width in pixels
    context_length: int  # number of tokens per text, including special tokens
    quick_gelu: bool  # whether the model uses QuickGELU, x * sigmoid(1.702 x), in place of GELU
    # Whether the model uses the tanh approximation of GELU, Flax's default. For such models,
    # transformers uses the approximation. open_clip uses the approximation only on request.
    tanh_gelu: bool
    # 10^9 floating point operations per image in the image tower, or None if not known
    image_gflop: float | None = None
    # images per second in the image tower, in float32 on 2 CPU cores
    # (``benchmarks/encode_rates.py``), or None if not known
    image_rate: float | None = None
    # texts per second in the text tower, in float32 on 2 CPU cores, or None if not known
    text_rate: float | None = None
    # images per second on a single A100, as published by clip-retrieval
    # (docs/distributed_clip_inference.md), or None if not known
    a100_rate: float | None = None
    reference: str = ""  # source for the model


@dataclass(frozen=True)
class BackboneKind:
    """A backbone kind with a loader. The loader is imported only on demand."""

    name: str
    # "module:function". The function is called with the spec's argument (the part after the colon),
    # the device and the precision.
    loader: str
    description: str  # for display
    extra: str = ""  # vilu extra that the loader needs, or "" if no extra is needed


BACKBONES: Final = Catalogue[NamedBackbone | BackboneKind]("backbone", "vilu.backbones")
"""Maps a name to a backbone: built-in (``assets/backbones.toml``), added, or installed."""


def named_backbones() -> dict[str, NamedBackbone]:
    """Return the backbones that are single models, by name. Backbone kinds are left out."""
    models = {}
    for name, entry in BACKBONES.items():
        if isinstance(entry, NamedBackbone):
            models[name] = entry
    return models


@dataclass(frozen=True)
class NamedSource:
    """A named backbone's loader and location."""

    # the backbone's name in embedding spaces: NAME for open_clip and NAME@hf for transformers, no
    # matter where the weights are
    name: str
    spec: str  # KIND:ARGUMENT, where the kind decides the loader, and the loader gets the argument
    options: dict[str, bool]  # keyword arguments for the loader


def find_named_backbone(spec: str, models: Path | None = None) -> NamedSource | None:
    """Find NAME, NAME@open_clip or NAME@hf on the hub, or in the sub-folder NAME in ``models``.

    If ``spec`` names no library, open_clip loads hub models. For a model in a folder, the
    configuration file there decides the library. Returns None if ``spec`` names no such backbone.
    """
    name, at_sign, library = spec.partition("@")
    model = BACKBONES.get(name)
    if not isinstance(model, NamedBackbone):
        return None
    if at_sign and library not in CONFIG_FILES:
        valid_specs = " or ".join(f"{name}@{known}" for known in CONFIG_FILES)
        raise UsageError(f"{name} is loaded by {valid_specs}. Got {spec!r}.")
    if models is None:
        library = library or DEFAULT_LIBRARY
        argument: str = getattr(model, library)  # the field with the name of the library
    else:
        folder = Path(models) / name
        possible_libraries = [library] if library else list(CONFIG_FILES)
        library = _library_of_folder(folder, model, possible_libraries)
        if library == "open_clip":
            _require_activation(folder / CONFIG_FILES[library], model)
        argument = str(folder)
    options = {"tanh_gelu": model.tanh_gelu} if library == "open_clip" else {}
    full_name = name if library == DEFAULT_LIBRARY else f"{name}@{library}"
    return NamedSource(full_name, f"{library}:{argument}", options)


def _library_of_folder(folder: Path, model: NamedBackbone, libraries: list[str]) -> str:
    """Return the first name in ``libraries`` whose configuration file is in a model's folder.

    If there is no such file, raise MissingModelError. The message says how to get the files.
    """
    for library in libraries:
        if (folder / CONFIG_FILES[library]).is_file():
            return library
    repositories = {"open_clip": model.open_clip_hub, "hf": model.hf}
    files: list[str] = []
    commands: list[str] = []
    for library in libraries:
        files.append(CONFIG_FILES[library])
        commands.append(f"`hf download {repositories[library]} --local-dir {folder}`")
    listed_files = " or ".join(files)
    listed_commands = " or ".join(commands)
    raise MissingModelError(
        f"there is no {listed_files} in the folder {folder}, where {model.title} was "
        f"expected. Where there is a network, {listed_commands} makes that folder. vilu "
        "downloads nothing if it gets a folder of models."
    )


def _require_activation(file: Path, model: NamedBackbone) -> None:
    """Raise ProvenanceError if an open_clip folder configures the wrong activation function.

    open_clip uses the configuration's activation. If the weights were trained with QuickGELU and
    the configuration has GELU, or the reverse, all embeddings are wrong.
    """
    try:
        config = json.loads(file.read_bytes())
        quick_gelu = bool(config["model_cfg"].get("quick_gelu", False))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ProvenanceError(
            f"{file} is no configuration of open_clip ({error!r}); expected model_cfg in it."
        ) from error
    if quick_gelu != model.quick_gelu:
        raise ProvenanceError(
            f"the weights of {model.title} need quick_gelu {json.dumps(model.quick_gelu)}, and "
            f"model_cfg in {file} has {json.dumps(quick_gelu)}: every embedding would be wrong. "
            "Correct the file if the weights are those of this model."
        )


PRECISIONS = ("fp32", "bf16")


@checked
def load_backbone(
    spec: str,
    *,
    device: str = "auto",
    precision: str = "fp32",
    models: str | Path | None = None,
    full_decode: bool = False,
) -> Backbone:
    """Return the frozen dual encoder named by ``spec``, ready to encode.

    Args:
        spec: NAME (loaded by open_clip) or NAME@hf (loaded by transformers) for a
            ``NamedBackbone``, and KIND or KIND:ARGUMENT for a ``BackboneKind``. See ``BACKBONES``.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "fp32", or "bf16" to run the image tower in bfloat16. Embeddings are float32 in
            both cases.
        models: Folder with a sub-folder per named backbone, in open_clip's or transformers' format.
            Named backbones are then loaded from this folder and never from the hub. For specs with
            a path (KIND:FOLDER, open_clip:NAME/FILE), FOLDER or FILE is looked for in this folder
            first.
        full_decode: Whether JPEGs are decoded in full. By default, a large JPEG is decoded at 1/2,
            1/4 or 1/8 size, but no smaller than twice the size to which the model resizes.

    Raises:
        UsageError: If the spec, the device or the precision is unknown.
        MissingModelError: If the weights or an optional dependency are not on this machine, or not
            in ``models``.
        ProvenanceError: If the weights do not fit the model.

    Examples:
        >>> import vilu
        >>> model = vilu.load_backbone("compact", device="cpu")  # pip install "vilu[compact]"
        >>> cat, kitten, truck = model.encode_texts(
        ...     ["a photo of a cat.", "a photo of a kitten.", "a photo of a truck."]
        ... )
        >>> round(float(cat @ kitten), 1), round(float(cat @ truck), 1)  # cosines
        (0.7, 0.1)
    """
    from vilu.backbones.base import DualEncoder
    from vilu.device import SeparateGenerator, resolve_device

    models_folder = None if models is None else Path(models)
    named_source = find_named_backbone(spec, models_folder)
    full_spec = spec if named_source is None else named_source.spec
    kind, _, argument = full_spec.partition(":")
    entry = BACKBONES.get(kind)
    if not isinstance(entry, BackboneKind):
        raise _unknown_backbone(spec, kind)
    require_one_of("precision", precision, PRECISIONS)
    module_name, _, function_name = entry.loader.partition(":")
    options = {} if named_source is None else named_source.options
    if named_source is None and models_folder is not None:
        argument = _with_local_path(argument, models_folder)
    logger.info("loading %s ...", spec)
    start = time.monotonic()
    with track(f"load {spec}", total=None, unit="steps"), SeparateGenerator():
        module = importlib.import_module(module_name)
        load = getattr(module, function_name)
        torch_device = resolve_device(device)
        backbone: Backbone = load(argument, torch_device, precision, **options)
    seconds = time.monotonic() - start
    if seconds > SLOW_SECONDS:
        logger.info("%s loaded in %.1f s", spec, seconds)
    if named_source is not None:
        # Embedding spaces from the same model must match. So the name must not depend on where the
        # weights are.
        backbone.space = replace(backbone.space, backbone=named_source.name)
    if isinstance(backbone, DualEncoder) and not full_decode:
        backbone.reduce_jpegs()
    return backbone


def _unknown_backbone(spec: str, kind: str) -> UsageError:
    """Return the error for a spec without a backbone. ``kind`` is the spec's part before ":"."""
    known_names = list(BACKBONES)
    name, _, _ = kind.partition("@")
    hint = did_you_mean(name, known_names, cutoff=0.5)
    listed_names = ", ".join(known_names)
    return UsageError(f"there is no backbone {spec!r}; known are {listed_names}.{hint}")


def _with_local_path(argument: str, models: Path) -> str:
    """Replace FOLDER, or FILE in NAME/FILE, by the path in ``models``, if that path exists.

    Embedding spaces name such models without local paths. So a saved predictor finds the model in
    ``models``.
    """
    model, slash, last_name = argument.rpartition("/")
    path = models / last_name
    is_single_name = slash == "" and last_name != ""  # the form FOLDER
    is_name_and_file = model != "" and "/" not in model  # the form NAME/FILE
    is_folder_there = is_single_name and path.is_dir()
    is_file_there = is_name_and_file and path.is_file()
    if is_folder_there or is_file_there:
        return f"{model}{slash}{path.absolute()}"
    return argument


def add_backbone(entry: NamedBackbone | BackboneKind) -> None:
    """Add a named backbone, or a backbone kind with a loader.

    Raises:
        UsageError: If the name is already taken, or has invalid characters.
    """
    name = entry.name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"a backbone's name is letters, digits, '.', '_' and '-'. Got {name!r} instead."
        )
    # ``setdefault`` adds the entry, or returns the earlier entry with the same name
    if BACKBONES.registered.setdefault(name, entry) != entry:
        raise UsageError(f"there is another backbone {name!r} already. Give this one another name.")


def _add_backbone(entry: object) -> bool:
    """Add ``entry`` if ``entry`` is a backbone. Return whether ``entry`` is a backbone."""
    if not isinstance(entry, NamedBackbone | BackboneKind):
        return False
    add_backbone(entry)
    return True


REGISTER_FUNCTIONS["a vilu.backbones.catalog.BackboneKind or NamedBackbone"] = _add_backbone


def add_backbones(source: Path | str) -> list[str]:
    """Add the backbones in a TOML file or TOML text, and return the backbones' names.

    Each backbone is a table. A table with a key ``loader`` has the keys of ``BackboneKind``.
    Every other table has the keys of ``NamedBackbone``.

    Raises:
        UsageError: If the source cannot be read, if a key is missing, unknown or of a wrong type,
            or if a name is already taken.
    """
    tables = toml_tables(source)
    return add_tables(tables)


def add_tables(tables: Mapping[str, dict[str, Any]]) -> list[str]:
    """Add backbones and return the backbones' names.

    ``tables`` maps a backbone's name to a table. ``add_backbones`` describes the tables.
    """
    for name, table in tables.items():
        entry_class: type[NamedBackbone | BackboneKind] = NamedBackbone
        if "loader" in table:
            entry_class = BackboneKind
        values = {"name": name, **table}
        entry = fill_dataclass(entry_class, values, title=f"backbone {name!r}")
        add_backbone(entry)
    return list(tables)


def _add_built_in_backbones() -> None:
    """Add the backbones in ``assets/backbones.toml``."""
    package = resources.files("vilu")
    file = package.joinpath("assets", "backbones.toml")
    toml = file.read_text(encoding="utf-8")
    add_backbones(toml)


_add_built_in_backbones()
