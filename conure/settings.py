"""Settings blocks: dataclasses at the top of a script, one field a line, each with a comment.

A field's type gives the values that it may have. Each field is also a flag of the same name, with the comment as its
help.
"""

import argparse
import dataclasses
import inspect
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from conure.errors import InputError

ROOT = Path(__file__).parents[1]  # where the scripts are


class Range(NamedTuple):
    """The numbers that a field may hold. As in mathematics, "(" excludes `low` itself and ")" excludes `high`."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def allows(self, value: float | tuple[int, ...]) -> bool:
        """Whether the value, or each number of a tuple, is in the range."""
        if isinstance(value, tuple):
            return all(map(self.allows, value))
        above = self.low < value if self.ends[0] == "(" else self.low <= value
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        if self.ends == "[]" and self.high < math.inf:
            return f"from {self.low} to {self.high}"
        low = f"{'above' if self.ends[0] == '(' else 'at least'} {self.low}"
        if self.ends[1] == "]" and self.high == math.inf:
            return low
        return f"{low} and {'below' if self.ends[1] == ')' else 'at most'} {self.high:g}"


class OneOf(tuple):
    """The texts that a field may hold."""

    allows = tuple.__contains__

    def __str__(self) -> str:
        return f"{', '.join(self[:-1])} or {self[-1]}"


Count = Annotated[int, Range(1)]
Interval = Annotated[int, Range(0)]  # in steps; 0 has a meaning of its own
Seed = Annotated[int, Range(0, 2**63 - 1)]
Task = Annotated[int, Range(1, 255)]
Width = Annotated[int, Range(1, 65536)]
Rank = Annotated[int, Range(0, 65536)]
KernelSize = Annotated[int, Range(1, 100)]
Dilations = Annotated[tuple[int, ...], Range(1, 10_000)]
Length = Annotated[int, Range(2)]  # of a sequence of items
Positive = Annotated[float, Range(0, 1e30, "(]")]
NonNegative = Annotated[float, Range(0, math.inf, "[)")]
Share = Annotated[float, Range(0, 1, "()")]
UpTo1 = Annotated[float, Range(0, 1, "(]")]
Below1 = Annotated[float, Range(0, 1, "[)")]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]
SplitSeed = Annotated[int, Range(0, 2**32 - 1)]
SplitBy = Literal["example", "user"]
LeaveOut = Literal["auto", "known", "targets", "nothing"]
Tied = Literal["auto", "yes", "no"]

# Base type → the form of its values on the command line.
FORMS = {
    str: "TEXT",
    int: "INT",
    float: "NUMBER",
    bool: "true|false",
    tuple[int, ...]: "INT,INT,...",
    tuple[str, ...]: "TEXT",  # one a flag; the flag may be given several times
}


def ours(value: Any, original: Any) -> Any:
    """A field whose default is not the original's value; `--as_original` sets it to that."""
    return dataclasses.field(default=value, metadata={"original": original})


def positional() -> Any:
    """A positional argument: no default, given without its name."""
    return dataclasses.field(metadata={"positional": True})


@dataclasses.dataclass
class Running:
    """How a script of the chain runs, whatever it learns. The blocks of all eight scripts inherit these."""

    index_path: str = "Data/Session/index.csv"  # item ids: conure_tp_t1.py writes it, the other scripts read it
    checkpoint_dir: str = "checkpoints"  # checkpoints and results.csv, read and written
    device: Device = "auto"  # auto: cuda if there is a GPU
    precision: Precision = ours("auto", original="float32")  # of products in training; auto: bfloat16 where native
    compile: bool = False  # use torch.compile; the first steps take half a minute or more
    eval_every: Interval = 0  # steps between evaluations on validation; 0: once an epoch
    snapshot_minutes: NonNegative = 10  # between snapshots, from which a run resumes; 0: at evaluations alone
    overwrite: bool = False  # redo a stage that is finished, or that was started with other settings


def of_script(name: str, **changes: Any) -> Any:
    """The settings of a script without flags, with `changes`."""
    block = runpy.run_path(str(ROOT / name), run_name=Path(name).stem)["Hyperparameters"]
    return resolve(block, changes, name)


def from_command_line(block: type, about: str, arguments: list[str] | None = None) -> Any:
    """The block's values, replaced by those on the command line; InputError if one is not allowed."""
    types, given = get_type_hints(block, include_extras=True), {}
    for name, text in vars(parser_of(block, about).parse_args(arguments)).items():
        if text is not None:
            try:
                given[name] = parse(text, kind_and_limits(types[name])[0])
            except ValueError:
                raise InputError(f"--{name} {text!r} is not of the form {form(types[name])}") from None
    return resolve(block, given)


def resolve(block: type, given: dict[str, Any], script: str = "the script") -> Any:
    """The block's values, or the original's with `as_original`, replaced by those `given`.

    InputError if one is not allowed.
    """
    values = block(**given)
    if getattr(values, "as_original", False):
        fields = dataclasses.fields(block)
        original = {field.name: field.metadata["original"] for field in fields if "original" in field.metadata}
        values = block(**original | given)
    for name, of_type in get_type_hints(block, include_extras=True).items():
        value, (kind, limits) = getattr(values, name), kind_and_limits(of_type)
        if not is_of(value, kind):
            raise InputError(f"{name} = {value!r} at the top of {script} is not of the form {form(of_type)}")
        if limits and not limits.allows(value):
            place = f"--{name} {printable(value)}" if name in given else f"{name} = {value!r} at the top of {script}"
            raise InputError(f"{place} makes no sense: it must be {limits}")
    return values


def kind_and_limits(of_type: Any) -> tuple[Any, Range | OneOf | None]:
    """A field's base type, one of FORMS, and its limits."""
    if get_origin(of_type) is Literal:
        return str, OneOf(get_args(of_type))
    return get_args(of_type) if get_origin(of_type) is Annotated else (of_type, None)


def form(of_type: Any) -> str:
    """The form of values of a type on the command line."""
    kind, limits = kind_and_limits(of_type)
    return "|".join(limits) if isinstance(limits, OneOf) else FORMS[kind]


def parse(text: str | list[str], kind: Any) -> Any:
    """The text, or for tuple[str, ...] the texts, as a value of `kind`, one of FORMS; ValueError if malformed."""
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    if kind == tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))
    return tuple(text) if kind == tuple[str, ...] else kind(text)


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of `kind`, one of FORMS; an int may stand for a float."""
    if kind == tuple[int, ...]:
        return isinstance(value, tuple) and len(value) > 0 and all(type(part) is int for part in value)
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(type(part) is str for part in value)
    return type(value) is kind or (kind is float and type(value) is int)


def comments(block: type) -> dict[str, str]:
    """Field → its comment, inherited fields included."""
    source = "".join(inspect.getsource(each) for each in reversed(block.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")


def parser_of(block: type, about: str) -> OneLineParser:
    """A parser with a flag for every field; the help lists those of `Running` last, under a heading."""
    module = sys.modules["__main__"].__spec__  # None for a script
    program = f"-m {module.name.removesuffix('.__main__')}" if module else "%(prog)s"
    first = [field.name for field in dataclasses.fields(block) if "positional" in field.metadata]
    parser = OneLineParser(
        usage=" ".join(["python", program, *map(str.upper, first), "[--name value] ..."]),
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    running = parser.add_argument_group("running")
    inherited = get_type_hints(Running) if issubclass(block, Running) else {}
    types, help_texts = get_type_hints(block, include_extras=True), comments(block)
    more = {bool: {"nargs": "?", "const": "true"}, tuple[str, ...]: {"action": "append"}}  # `--overwrite` means true
    for field in dataclasses.fields(block):
        default = f" [{printable(field.default)}]" if field.default not in ("", (), dataclasses.MISSING) else ""
        if "original" in field.metadata:
            default = f"{default.removesuffix(']')}; the original: {printable(field.metadata['original'])}]"
        (running if field.name in inherited else parser).add_argument(
            field.name if field.name in first else f"--{field.name}",
            metavar=field.name.upper() if field.name in first else form(types[field.name]),
            help=(help_texts.get(field.name, "") + default).replace("%", "%%"),
            **more.get(kind_and_limits(types[field.name])[0], {}),
        )
    return parser


def printable(value: Any) -> str:
    """A value as it is typed on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
