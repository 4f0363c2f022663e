"""Every run and every recipe is kept as JSON and read back equal, each setting in each type."""

import dataclasses
import inspect
import json
import types
import typing
from dataclasses import replace

import pytest

from mergevq.config import (
    contest,
    evaluation,
    generator,
    objective,
    parts,
    probing,
    tokenizer,
    training,
)
from mergevq.config.generator import (
    SampleRun,
    SamplingSettings,
)
from mergevq.config.kinds import unions
from mergevq.config.objective import HuggingFace, Semantic
from mergevq.config.parts import flows
from mergevq.config.probing import FinetuneConfig, KnnConfig, LinearConfig, ProbeRun
from mergevq.config.recipes import RECIPES
from mergevq.config.training import DecoderRun, GeneratorRun, TokenizerRun
from mergevq.runtime.settings import from_json, to_json
from tests.support.generators import GOES_WITH
from tests.support.leaves import replaced, value_at

CLASSES = sorted(
    {
        item
        for module in (
            contest,
            evaluation,
            generator,
            objective,
            parts,
            flows,
            probing,
            tokenizer,
            training,
        )
        for _, item in inspect.getmembers(module, dataclasses.is_dataclass)
    },
    key=lambda item: item.__name__,
)
RUNS = {
    # With a quantizer and a teacher that have a part of their own.
    "tokenizer": replace(
        RECIPES["digits32_vq"](), teacher=HuggingFace(), distillation=Semantic(layer=1)
    ),
    "generator": RECIPES["digits32_ar"](),
    "decoder": RECIPES["digits32_prefix_flow"](),
}
UNIONS = [(model, union) for model, run in RUNS.items() for union in unions(type(run))]
MEMBERS = [(model, union.name, kind) for model, union in UNIONS for kind in union.members]
EXAMPLES = {bool: [True, False], int: [1, 2, 8], float: [0.5, 0.25], str: ["a name"]}


def values_of(kind) -> list[object]:
    """Some values of a type of setting, at least one for each member of a union."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is types.NoneType:
        return [None]
    if origin in (types.UnionType, typing.Union):
        return [value for member in arguments for value in values_of(member)]
    if origin is typing.Literal:
        return list(arguments)
    if origin is typing.Annotated:
        return values_of(arguments[0])
    if origin is tuple and arguments[-1] is Ellipsis:
        members = values_of(arguments[0])
        return [tuple(members[:count]) for count in range(1 + len(members))]
    if origin is tuple:
        return [tuple(values_of(item)[0] for item in arguments)]
    if dataclasses.is_dataclass(kind):
        return [example(kind)]
    return list(EXAMPLES[kind])


def example(cls):
    """An instance of the defaults, and of the first value for what has none.

    Where the defaults do not go together, one more setting is given that makes them.
    """
    hints = typing.get_type_hints(cls)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
    ]
    given = {name: values_of(hints[name])[0] for name in missing}
    others = [{}] + [
        {field.name: value}
        for field in dataclasses.fields(cls)
        if field.name not in given
        for value in values_of(hints[field.name])
    ]
    for more in others:
        try:
            return cls(**given, **more)
        except ValueError:
            continue
    raise AssertionError(f"no {cls.__name__} could be made")


def variants(instance):
    """The instance with one setting changed, in each way that its class accepts."""
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        for value in values_of(hints[field.name]):
            try:
                yield field.name, replace(instance, **{field.name: value})
            except ValueError:
                continue


def kept(instance):
    """A value as it comes back from JSON."""
    return from_json(type(instance), json.loads(json.dumps(to_json(instance), allow_nan=False)))


def same(first, second) -> bool:
    """Equal in type too: 1 == 1.0 == True."""
    return first == second and repr(first) == repr(second)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_comes_back_from_json(cls):
    start = example(cls)
    assert same(kept(start), start)
    tried = {name for name, variant in variants(start) if same(kept(variant), variant)}
    failed = {name for name, variant in variants(start) if not same(kept(variant), variant)}
    assert not failed
    assert tried, f"no setting of {cls.__name__} was tried"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_from_json(name):
    run = RECIPES[name]()
    assert isinstance(run, TokenizerRun | GeneratorRun | DecoderRun)
    assert same(kept(run), run)


@pytest.mark.parametrize(("model", "name", "kind"), MEMBERS)
def test_a_part_comes_back_as_the_kind_that_it_was(model, name, kind):
    run = replaced(RUNS[model], {f"{name}.kind": kind} | GOES_WITH.get((name, kind), {}))
    assert value_at(run, f"{name}.kind") == kind
    assert same(kept(run), run)


def inside(record, name):
    """The part of a record by its dotted name."""
    for step in name.split("."):
        record = record[step]
    return record


@pytest.mark.parametrize(("model", "union"), UNIONS, ids=lambda item: getattr(item, "name", item))
@pytest.mark.parametrize("value", ["nope", None, 3, ["cnn"], {"cnn": 1}], ids=repr)
def test_a_kind_that_there_is_not_is_refused_with_those_there_are(model, union, value):
    record = to_json(RUNS[model])
    inside(record, union.name)["kind"] = value
    with pytest.raises(ValueError, match=rf"^{union.name}\.kind ") as caught:
        from_json(type(RUNS[model]), record)
    assert all(kind in str(caught.value) for kind in union.members)


@pytest.mark.parametrize(("model", "union"), UNIONS, ids=lambda item: getattr(item, "name", item))
def test_a_setting_of_no_kind_is_refused_by_name(model, union):
    record = to_json(RUNS[model])
    inside(record, union.name)["colour"] = 3
    with pytest.raises(ValueError, match=rf"^{union.name}\.colour is not a setting of \w+; choose"):
        from_json(type(RUNS[model]), record)


def test_a_setting_of_another_kind_is_refused():
    record = to_json(RUNS["tokenizer"])
    record["model"]["stem"]["width"] = 32
    with pytest.raises(ValueError, match=r"^model\.stem\.width is not a setting of CnnStem;"):
        from_json(TokenizerRun, record)


@pytest.mark.parametrize("setting", [0.5, (0.5, 1.0)])
def test_one_number_and_several_come_back_as_what_they_were(setting):
    settings = SamplingSettings(temperature=setting)
    run = replace(example(SampleRun), settings=settings)
    assert same(kept(run).settings.temperature, setting)


@pytest.mark.parametrize("method", [LinearConfig(), KnnConfig(), FinetuneConfig()])
def test_a_probe_comes_back_with_its_own_method(method):
    run = replace(example(ProbeRun), method=method)
    assert type(kept(run).method) is type(method)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (
            SamplingSettings,
            {"temperature": "hot"},
            r"temperature \('hot'\) must be of type float or",
        ),
        (SamplingSettings, {"temperature": None}, r"temperature \(None\) must be of type"),
        (SamplingSettings, {"temperature": True}, r"temperature \(True\) must be of type"),
        (
            SamplingSettings,
            {"temperature": ["a"]},
            r"temperature\[0\] \('a'\) must be of type float",
        ),
        (SamplingSettings, {"temperature": {}}, r"temperature has the fields  and must have those"),
        (SamplingSettings, {"horizon": 3}, r"horizon is not a setting of SamplingSettings"),
        (ProbeRun, {"model": "", "out": "", "method": {}}, r"must have those of one class alone"),
        (
            ProbeRun,
            {"model": "", "out": "", "method": {"k": 1}},
            r"method has the fields k and must",
        ),
        (ProbeRun, {"model": "", "out": "", "method": 3}, r"must be of type LinearConfig or Knn"),
        (TokenizerRun, {"train": {"seed": 2**64}}, r"train.seed .*must be a finite number of at"),
        (TokenizerRun, {"optim": {"lr": 10**400}}, r"optim.lr .*must be a finite number of at"),
        (TokenizerRun, {"optim": {"lr": float("inf")}}, r"optim.lr .*must be a finite number"),
        (TokenizerRun, {"optim": {"lr": float("nan")}}, r"optim.lr .*must be a finite number"),
    ],
)
def test_what_no_member_of_a_union_takes_is_refused_by_name(cls, values, message):
    with pytest.raises(ValueError, match=message):
        from_json(cls, values)


def test_fields_that_only_one_class_has_choose_it_though_others_are_left_out():
    values = to_json(example(ProbeRun)) | {"method": {"leave_one_out": True}}
    assert from_json(ProbeRun, values).method == KnnConfig(leave_one_out=True)
