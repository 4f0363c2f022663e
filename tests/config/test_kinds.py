"""Tests of `mergevq.config.kinds`, on a few classes of settings that are made for it."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from mergevq.config.kinds import kind_of, members_of, unions, with_kinds
from mergevq.config.recipes import RECIPES
from mergevq.config.training import TokenizerRun


@dataclass(frozen=True, kw_only=True, slots=True)
class Dry:
    """No sauce.

    Not even a little.
    """

    kind: Literal["dry"] = "dry"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wet:
    """A sauce."""

    kind: Literal["wet"] = "wet"
    num_spoons: int = 2
    """Spoons of it."""
    is_hot: bool = False
    """Whether it burns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noodles:
    """Long ones, with a sauce."""

    kind: Literal["noodles"] = "noodles"
    sauce: Dry | Wet = field(default_factory=Dry)
    """Poured on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rice:
    """Grains."""

    kind: Literal["rice"] = "rice"
    num_grains: int = 1000
    """Grains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bowl:
    """A bowl, which is too small for much rice."""

    food: Noodles | Rice = field(default_factory=Noodles)
    """Content of the bowl."""
    most_grains: int = 10
    """Room for rice."""

    def __post_init__(self):
        """Reject what does not fit."""
        if isinstance(self.food, Rice) and self.food.num_grains > self.most_grains:
            raise ValueError("food does not fit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table."""

    main_bowl: Bowl = field(default_factory=Bowl)
    """The bowl."""
    spare: Bowl | None = None
    """Another, or none."""
    name: str = ""
    """Length of the table."""
    style: Literal["plain"] = "plain"
    """A text with one value, which is no part."""


# ----------------------------------------------------------------------------- what there is


def test_a_kind_is_the_one_value_of_a_field_of_that_name():
    @dataclass
    class Several:
        kind: Literal["a", "b"] = "a"

    @dataclass
    class Text:
        kind: str = "a"

    assert [kind_of(cls) for cls in (Dry, Wet, Noodles)] == ["dry", "wet", "noodles"]
    assert [kind_of(cls) for cls in (Bowl, Several, Text, int, None)] == [None] * 5


def test_members_are_the_dataclasses_of_an_annotation():
    assert members_of(Dry | Wet) == [Dry, Wet]
    assert members_of(Dry | None) == [Dry]
    assert members_of(Bowl) == [Bowl]
    assert members_of(int | str) == members_of(tuple[Dry, ...]) == []


def test_unions_are_found_wherever_they_are():
    assert [(union.name, list(union.members)) for union in unions(Table)] == [
        ("main_bowl.food", ["noodles", "rice"]),
        ("main_bowl.food.sauce", ["dry", "wet"]),
        ("spare.food", ["noodles", "rice"]),
        ("spare.food.sauce", ["dry", "wet"]),
    ]


def test_a_union_is_described_by_the_first_lines_of_its_members():
    *_, sauce = unions(Noodles)
    assert sauce.describe() == [("dry", "No sauce."), ("wet", "A sauce.")]


def test_a_part_with_one_kind_so_far_is_a_union_too():
    @dataclass
    class Single:
        food: Rice

    assert [(union.name, union.members) for union in unions(Single)] == [("food", {"rice": Rice})]


def test_every_part_of_a_tokenizer_is_found():
    names = {union.name for union in unions(TokenizerRun)}
    seams = ("stem", "reducer", "quantizer", "expander", "decoder")
    assert names >= {f"model.{seam}" for seam in seams}


@pytest.mark.parametrize("run", ["digits32", "digits32_ar"])
def test_every_kind_is_said_in_one_line_and_is_its_own_default(run):
    for union in unions(type(RECIPES[run]())):
        for (kind, about), member in zip(union.describe(), union.members.values(), strict=True):
            assert member().kind == kind
            assert about.endswith("."), f"{member} says no more than {about!r} in its first line"


# -------------------------------------------------------------------------- on a command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--main-bowl.food.kind", "rice"],
        ["--main-bowl.food.kind=rice"],
        ["--main_bowl.food.kind", "rice"],
        ["--main-bowl.food.kind", "noodles", "--main-bowl.food.kind", "rice"],
    ],
)
def test_a_part_of_another_kind_has_its_defaults(arguments):
    table, left = with_kinds(Table(name="mine"), arguments)
    # It does not fit yet, which would be an error of its own.
    assert table.main_bowl.food == Rice()
    assert (table.name, table.main_bowl.most_grains) == ("mine", 10)
    assert left == []


def test_other_options_are_left_as_they_are_and_in_order():
    given = ["--name", "a b", "--main-bowl.food.kind", "rice", "--main-bowl.food.num-grains=3", "x"]
    table, left = with_kinds(Table(), given)
    assert left == ["--name", "a b", "--main-bowl.food.num-grains=3", "x"]
    # What is left can make the parts fit.
    bowl = replace(table.main_bowl, food=Rice(num_grains=3))
    assert bowl.food.num_grains == 3


def test_a_part_that_is_of_the_kind_keeps_its_settings():
    noodles = Noodles(sauce=Wet(num_spoons=5))
    table = Table(main_bowl=Bowl(food=noodles))
    given = ["--main-bowl.food.kind", "noodles", "--main-bowl.food.sauce.kind", "wet"]
    assert with_kinds(table, given) == (table, [])
    # Of several the last one counts, as in every other option.
    again = ["--main-bowl.food.sauce.kind", "dry", *given]
    assert with_kinds(table, again) == (table, [])


def test_a_part_inside_of_a_part_is_set_after_it():
    start = Table(main_bowl=Bowl(food=Rice(num_grains=3)))
    given = ["--main-bowl.food.sauce.kind", "wet", "--main-bowl.food.kind", "noodles"]
    table, left = with_kinds(start, given)
    assert table.main_bowl.food == Noodles(sauce=Wet())
    assert left == []


def test_what_is_given_stays_as_it_was():
    start = Table()
    with_kinds(start, ["--main-bowl.food.kind", "rice"])
    assert start == Table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--main-bowl.food.kind", "rise"],
            "--main-bowl.food.kind (rise) must be one of noodles, rice; did you mean 'rice'?",
        ),
        (
            ["--main-bowl.food.kind=42"],
            "--main-bowl.food.kind (42) must be one of noodles, rice",
        ),
        (["--main-bowl.food.kind"], "--main-bowl.food.kind () must be one of noodles, rice"),
        (
            ["--main-bowl.food.num-grains", "3"],
            "--main-bowl.food.num-grains is for --main-bowl.food.kind rice, and the kind is "
            "noodles",
        ),
        (
            ["--main-bowl.food.sauce.num-spoons=3"],
            "--main-bowl.food.sauce.num-spoons is for --main-bowl.food.sauce.kind wet, and the "
            "kind is dry",
        ),
        (
            ["--main-bowl.food.sauce.no-is-hot"],
            "--main-bowl.food.sauce.no-is-hot is for --main-bowl.food.sauce.kind wet, and the "
            "kind is dry",
        ),
        (
            ["--main-bowl.food.kind", "rice", "--main-bowl.food.sauce.kind", "wet"],
            "main_bowl.food.sauce.kind (wet) is of a part that is not there",
        ),
        (["--spare.food.kind", "rice"], "spare.food.kind (rice) is of a part that is not there"),
    ],
)
def test_what_is_not_there_is_refused_with_what_there_is(arguments, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all of it is compared
        with_kinds(Table(), arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "arguments", [["--style.kind", "x"], ["--kind", "x"], ["food.kind", "x"], ["--a.num-grains"]]
)
def test_what_is_of_no_part_is_left_to_the_parser(arguments):
    assert with_kinds(Table(), arguments) == (Table(), arguments)
