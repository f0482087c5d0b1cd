"""Test that docs/stability.md's promise is kept.

Names, arguments, results, commands and options may go only after a notice. For a release, run

    python -m tests.compat.test_public_names >tests/compat/public_names.txt
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pytest
import torch
import typer

import vilu
from vilu.cli.app import app

RECORDED = Path(__file__).with_name("public_names.txt").read_text(encoding="utf-8").splitlines()


def commands(group: object, above: str = "vilu") -> Iterator[str]:
    """Yield every command with its group and its options, as `vilu inspect --json --seal`."""
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above} {name}")
        else:
            options = [
                max(p.opts, key=len) for p in command.params if p.param_type_name == "option"
            ]
            yield " ".join([f"{above} {name}", *sorted(options)])


def signature(name: str, thing: object) -> str:
    """Return a name with arguments and result: `vilu.score(predictor, *, split=) -> Outcomes`."""
    try:
        shape = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not callable, or written in C
        return name
    written, keywords = [], False
    for parameter in shape.parameters.values():
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords:
            written.append("*")
            keywords = True
        optional = parameter.default is not inspect.Parameter.empty or parameter.kind in {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        }
        written.append(parameter.name + "=" * optional)
    result = (
        ""
        if shape.return_annotation is inspect.Signature.empty or isinstance(thing, type)
        else (f" -> {shape.return_annotation}")
    )
    return f"{name}({', '.join(written)}){result}"


def methods(name: str, cls: type, *, inherited: bool) -> Iterator[str]:
    """Yield a class's public methods.

    If ``inherited`` is false, methods from its public base classes are left out.
    """
    public = {
        getattr(vilu, one) for one in vilu.__all__ if isinstance(getattr(vilu, one), type)
    } - {cls}
    seen = set[str]()
    for home in cls.__mro__:
        if home.__module__.startswith("vilu") and (inherited or home not in public):
            for method, thing in vars(home).items():
                if (method == "__call__" or not method.startswith("_")) and method not in seen:
                    bare = (
                        thing.__func__ if isinstance(thing, classmethod | staticmethod) else thing
                    )
                    if inspect.isfunction(bare) and bare.__module__.startswith("pydantic"):
                        continue  # pydantic's own, whose argument names differ between versions
                    if inspect.isfunction(bare) or isinstance(thing, property | cached_property):
                        seen.add(method)
                        yield signature(f"{name}.{method}", bare)


def names(*, inherited: bool) -> set[str]:
    """Return all public names now."""
    found = set(commands(typer.main.get_command(app)))
    for module, at in ((vilu, "vilu"), (vilu.metrics, "vilu.metrics")):
        for name in module.__all__:
            thing = getattr(module, name)
            found.add(signature(f"{at}.{name}", thing))
            found |= (
                set(methods(f"{at}.{name}", thing, inherited=inherited))
                if isinstance(thing, type)
                else set()
            )
    return found


def parts(line: str) -> tuple[list[str], list[str], str]:
    """Return positional arguments, all arguments (optional ones with =), and the result."""
    inside, _, result = line.partition("(")[2].partition(")")
    arguments = [word for word in inside.split(", ") if word]
    return (
        arguments[: arguments.index("*")] if "*" in arguments else arguments,
        [a for a in arguments if a != "*"],
        result,
    )


def broken(old: str, new: str) -> bool:
    """Return whether a right call would now fail, or give another result."""
    if "(" not in old:
        return set(old.split()) - set(new.split()) != set()
    (places, arguments, result), (now_places, now, now_result) = parts(old), parts(new)
    bare = [word.rstrip("=") for word in places]
    needed = {word for word in now if not word.endswith("=")}
    return (
        [word.rstrip("=") for word in now_places][: len(bare)] != bare
        or {word.rstrip("=") for word in arguments} - {word.rstrip("=") for word in now} != set()
        or needed - set(arguments) != set()
        or result != now_result
    )


def key(line: str) -> str:
    """Return the name that a line describes."""
    return line.partition("(")[0].partition(" --")[0]


def test_what_was_public_is_public() -> None:
    """Every recorded public name must still work.

    A release records the names. If a notice is over, a person changes the line.
    """
    assert len(RECORDED) > 200
    today = {key(line): line for line in names(inherited=True)}
    gone = [line for line in RECORDED if key(line) not in today]
    assert gone == []
    assert [(line, today[key(line)]) for line in RECORDED if broken(line, today[key(line)])] == []


@pytest.mark.parametrize(
    ("now", "breaks"),
    [
        ("f(a, b=, *, c=, d=) -> int", False),
        ("f(a=, b=, c=) -> int", False),
        ("f(b=, a, *, c=) -> int", True),
        ("f(a, *, b=, c=) -> int", True),
        ("f(a, b, *, c=) -> int", True),
        ("f(a, b=, *, c=, d) -> int", True),
        ("f(a, b=) -> int", True),
        ("f(a, b=, *, c=) -> str", True),
    ],
)
def test_what_breaks_a_call(now: str, breaks: bool) -> None:
    assert broken("f(a, b=, *, c=) -> int", now) is breaks
    assert broken("vilu fit --seed --set", "vilu fit --new --seed --set") is False
    assert broken("vilu fit --seed --set", "vilu fit --set") is True


def test_a_former_name_of_0_2_0_works_with_a_warning() -> None:
    text = torch.eye(2)[[0, 1, 0]]
    batch = vilu.Batch(torch.eye(2), text, torch.tensor([0, 1]), torch.arange(2), logit_scale=1)
    with pytest.deprecated_call(match="first_equal_index"):
        assert batch.first_equal.tolist() == [0, 1, 0]


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}\n" for name in sorted(names(inherited=False)))
