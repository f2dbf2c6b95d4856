"""Hyperparameter blocks on the command line.

A block is a dataclass at the top of a script, one field a line with a comment behind it. Every field is also a flag of
the same name, and its comment is the flag's help.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

from conure.errors import InputError

# The types of fields, and what their values look like on the command line.
KINDS = {
    str: "TEXT",
    int: "INT",
    float: "NUMBER",
    bool: "true|false",
    tuple[int, ...]: "INT,INT,…",
    tuple[str, ...]: "TEXT",  # one a flag; the flag may be given several times
}

# What a value must satisfy, by field name, and how to say so. `task` and `users` are numbers in some blocks and texts,
# which may be anything, in others.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "device": (lambda v: v in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    "precision": (lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
    "seed": (lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "epochs": (lambda v: v >= 1, "at least 1"),
    "snapshot_minutes": (lambda v: 0 <= v < float("inf"), "0 (at evaluations only) or a number of minutes"),
    "eval_every": (lambda v: v >= 0, "0 (once an epoch) or a number of steps"),
    "top_k": (lambda v: v >= 1, "at least 1"),
    "learning_rate": (lambda v: 0 < v <= 1e30, "above 0"),
    "table_rate": (lambda v: 0 < v <= 1e30, "above 0"),
    "beta1": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "test_fraction": (lambda v: 0 < v < 1, "between 0 and 1"),
    "prune_ratio": (lambda v: 0 < v < 1, "between 0 and 1: the share of the free weights that stays free"),
    "channels": (lambda v: 1 <= v <= 65536, "from 1 to 65536"),
    "dilations": (lambda v: 1 <= min(v) and max(v) <= 10_000, "whole numbers from 1 to 10000, such as 1,4,1,4"),
    "kernel_size": (lambda v: 1 <= v <= 100, "from 1 to 100"),
    "negative_fraction": (lambda v: 0 < v <= 1, "above 0 and at most 1: a share of all items"),
    "dropout": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "dtype": (lambda v: v in ("float32", "float16", "bfloat16"), "float32, float16 or bfloat16"),
    "loss": (lambda v: v in ("softmax", "bpr", "bce"), "softmax, bpr or bce"),
    "split": (lambda v: v in ("test", "validation", "heldout"), "test, validation or heldout"),
    "length": (lambda v: v >= 2, "at least 2"),
    "task": (lambda v: isinstance(v, tuple) or 1 <= v <= 255, "from 1 to 255"),
    "items": (lambda v: v >= 3, "at least 3"),
    "targets": (lambda v: v >= 3, "at least 3"),
    "rows": (lambda v: v >= 10, "at least 10"),
    "steps": (lambda v: v >= 1, "at least 1"),
    "first_epochs": (lambda v: v >= 1, "at least 1"),
    "first_seed": (lambda v: v >= 0, "0 or more"),
    "percents": (lambda v: 1 <= min(v) and max(v) <= 99, "whole numbers from 1 to 99, such as 50,70"),
    "depths": (lambda v: min(v) >= 1, "whole numbers from 1, such as 1,3,6"),
    "seeds": (lambda v: v >= 1, "at least 1"),
    "users": (lambda v: isinstance(v, str) or v >= 1, "at least 1"),
    "history": (lambda v: 0 < v <= 1, "above 0 and at most 1: a share of each user's rows"),
    "min_rows": (lambda v: v >= 1, "at least 1"),
    "rho": (lambda v: 0 < v < float("inf"), "above 0"),
    "l2": (lambda v: 0 <= v < float("inf"), "0 or more"),
}


def ours(value: Any, original: Any) -> Any:
    """A field of a block whose value is not the original's; `--as_original` sets it to that."""
    return dataclasses.field(default=value, metadata={"original": original})


def parse(text: str | list[str], kind: type) -> Any:
    """The text, or for tuple[str, ...] the texts, as a value of `kind`, one of KINDS; ValueError if it is none."""
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    if kind == tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))
    return tuple(text) if kind == tuple[str, ...] else kind(text)


def is_of(value: Any, kind: type) -> bool:
    """Whether a field's value is of its type; a whole number may stand for a float."""
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and len(value) > 0 and all(type(part) is int for part in value)
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(type(part) is str for part in value)
    return type(value) is kind or (kind is float and type(value) is int)


def comments(block: type) -> dict[str, str]:
    """The comment behind each field of a hyperparameter block, those that it inherits included."""
    source = "".join(inspect.getsource(each) for each in reversed(block.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def from_command_line(block: type, about: str, arguments: list[str] | None = None) -> Any:
    """The block's values with those given on the command line in their place; InputError if one makes no sense."""
    module = sys.modules["__main__"].__spec__  # None for a script
    parser = OneLineParser(
        usage=f"python {f'-m {module.name}' if module else '%(prog)s'} [--name value] …",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds, help_texts = get_type_hints(block), comments(block)
    forms = {bool: dict(nargs="?", const="true"), tuple[str, ...]: dict(action="append")}  # `--overwrite` means true
    for field in dataclasses.fields(block):
        default = f" [{printable(field.default)}]" if field.default not in ("", ()) else ""
        if "original" in field.metadata:
            default = f"{default.removesuffix(']')}; the original: {printable(field.metadata['original'])}]"
        parser.add_argument(
            f"--{field.name}",
            metavar=KINDS[kinds[field.name]],
            help=(help_texts.get(field.name, "") + default).replace("%", "%%"),
            **forms.get(kinds[field.name], {}),
        )
    values = {}
    for name, text in vars(parser.parse_args(arguments)).items():
        if text is not None:
            try:
                values[name] = parse(text, kinds[name])
            except ValueError:
                raise InputError(f"--{name} {text!r} is not of the form {KINDS[kinds[name]]}") from None
    hyperparameters = block(**values)
    if getattr(hyperparameters, "as_original", False):
        original = {field.name: field.metadata.get("original") for field in dataclasses.fields(block)}
        hyperparameters = block(**{name: v for name, v in original.items() if v is not None} | values)
    for field in dataclasses.fields(hyperparameters):
        value = getattr(hyperparameters, field.name)
        if not is_of(value, kinds[field.name]):
            raise InputError(f"{field.name} = {value!r} at the top of the script is not {KINDS[kinds[field.name]]}")
        allowed, wanted = RULES.get(field.name, (lambda v: True, ""))
        if not allowed(value):
            raise InputError(f"--{field.name} {printable(value)} makes no sense: it must be {wanted}")
    return hyperparameters


def printable(value: Any) -> str:
    """A value as it is typed on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
