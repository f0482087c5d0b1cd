"""The help for commands: commands and options in groups, and names of values, such as PATH."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeAlias

from typer.core import TyperCommand, TyperGroup, TyperOption

# typer does not export the classes of its contexts and formatters.
Context: TypeAlias = Any
Formatter: TypeAlias = Any
HelpRow: TypeAlias = tuple[str, str]

# Command groups in `vilu --help`.
PHOTOS: Final = "Photos"
EMBEDDINGS: Final = "Embeddings and scores"
GUARANTEES: Final = "Guarantees"
SHARING: Final = "Share and serve"
LOOKING_UP: Final = "Look up"
RESEARCH: Final = "From other packages"

# Option groups in a command's help. Options that most users need have no group.
ARGUMENTS: Final = "Arguments"
OPTIONS: Final = "Options"
DATA: Final = "Which images and labels"
MODEL: Final = "Model and prompts"
CLASSIFIER: Final = "A classifier of yours"
TABLE: Final = "Tables of answers"
PAIRS: Final = "Image-caption pairs, and two models"
SPEED: Final = "Speed and memory"
GUARANTEE: Final = "The guarantee"
SORTING: Final = "What happens to the photos"
LIMITS: Final = "Limits"
MORE: Final = "More options"
COMMON: Final = "Common options"
GROUPS: Final = (
    ARGUMENTS,
    OPTIONS,
    GUARANTEE,
    SORTING,
    DATA,
    TABLE,
    MODEL,
    CLASSIFIER,
    PAIRS,
    SPEED,
    LIMITS,
    MORE,
    COMMON,
)
"""Option groups in the order of the help. All further groups follow."""

METAVAR_OF_TYPE: Final[Mapping[str, str]] = {
    "<path>": "PATH",
    "<str>": "TEXT",
    "<list[str]>": "TEXT",
    "<list[Path]>": "PATH",
    "<list[int]>": "N",
    "<int>": "N",
    "<int range>": "N",
    "<float>": "NUMBER",
    "<float range>": "NUMBER",
}
"""Maps typer's name for a type to the value name in help texts."""

SHARE: Final = "SHARE"
"""A number from 0 to 1."""

METAVAR_OF_OPTION: Final[Mapping[str, str]] = {
    "backbone": "MODEL",
    "confidence": SHARE,
    "coverage": SHARE,
    "device": "DEVICE",
    "false_alarm": SHARE,
    "host": "HOST",
    "images": "PATH",
    "key": "KEY",
    "main": "METHOD",
    "max_body": "MIB",
    "max_error_rate": SHARE,
    "max_json": "MIB",
    "max_miss": SHARE,
    "max_risk": SHARE,
    "method": "METHOD",
    "min_coverage": SHARE,
    "min_iou": SHARE,
    "outside_share": SHARE,
    "port": "PORT",
    "prompts": "PROMPT",
    "replicas": "N|MIN:MAX",
    "revision": "REVISION",
    "sizes": "N,N,...",
    "split": "SPLIT",
    "template": "PROMPT",
    "timeout": "SECONDS",
}
"""Maps an option to the value name in help texts, where the type says too little."""


class PanelledCommand(TyperCommand):
    """Command with grouped options in the help, the most needed options first."""

    def __init__(self, name: str | None, **settings: Any) -> None:  # noqa: ANN401 - typer's
        super().__init__(name, **settings)
        for parameter in self.params:
            _set_metavar(parameter)

    def format_options(self, ctx: Context, formatter: Formatter) -> None:
        """Write the arguments, then the options group by group."""
        groups: dict[str, list[HelpRow]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is None:
                continue
            name, text = row
            if parameter.name == "help":
                group = COMMON
            elif isinstance(parameter, TyperOption):
                group = parameter.rich_help_panel or OPTIONS
            else:
                group = ARGUMENTS
                name = str(parameter.metavar)
            groups.setdefault(group, []).append((name, with_range_in_words(text)))
        _write_groups(formatter, groups.items())


def with_range_in_words(text: str) -> str:
    """Return an option's help, with "1 to 9" for "1<=x<=9", and "at least 1" for "x>=1"."""
    # leave out a maximum of ten or more digits, because nobody reaches it
    text = re.sub(r"([\d.]+)<=x<=\d{10,}", r"at least \1", text)
    text = re.sub(r"([\d.]+)<=x<=([\d.]+)", r"\1 to \2", text)
    return re.sub(r"x>=([\d.]+)", r"at least \1", text)


def _set_metavar(parameter: Any) -> None:  # noqa: ANN401 - a parameter of typer
    """Set a parameter's value name in the help, such as PATH, unless the parameter has one."""
    if parameter.metavar is not None:
        return
    if isinstance(parameter, TyperOption):
        context: Any = None  # typer needs a context only to change the case of choices
        type_name = parameter.display_type(context)
        metavar = METAVAR_OF_TYPE.get(type_name)
        if metavar is not None:  # without a metavar, typer lists the possible values
            parameter.metavar = METAVAR_OF_OPTION.get(parameter.name, metavar)
    else:
        parameter.metavar = parameter.name.upper()


class PanelledGroup(TyperGroup):
    """Commands that the help lists in groups."""

    def format_commands(self, ctx: Context, formatter: Formatter) -> None:
        """Write the names and the first sentences of the commands, group by group."""
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))  # 6 columns for spaces, as in typer
        groups: dict[str, list[HelpRow]] = {}
        for name in names:
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None)
            group = panel or "Commands"
            sentence = command.get_short_help_str(width)
            groups.setdefault(group, []).append((name, sentence))
        _write_groups(formatter, groups.items())


def _write_groups(formatter: Formatter, groups: Iterable[tuple[str, list[HelpRow]]]) -> None:
    for heading, rows in groups:
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows)
