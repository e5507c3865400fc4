"""Job files: what is accepted, and what every kind of mistake looks like to its author."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, field_validator

from aotrain.integrations.config_file import STRICT, ConfigError, JobError, Section, load_config


class Inner(Section):
    rate: float = 0.1
    steps: int
    enabled: bool = False
    kind: Literal["linear", "cosine"] = "linear"
    name: str = "x"
    pair: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    async_: bool = Field(default=False, alias="async")


class Optional(Section):
    project: str = "p"


class Root(Section):
    inner: Inner
    other: Optional | None = None
    items: list[str] = Field(default=["a"])
    path: str | None = None

    @field_validator("path")
    @classmethod
    def _exists(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).exists():
            raise ValueError(f"no such file: {value!r}")
        return value


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return write_file


def problems(path, *overrides, **options):
    with pytest.raises(ConfigError) as caught:
        load_config(path, Root, overrides, **options)
    return [str(problem) for problem in caught.value.problems]


def test_values_types_and_defaults(write):
    config = load_config(write("inner: {rate: 4e-3, steps: 7, pair: [0.8, 0.9], async: true}"), Root)
    assert config.inner.rate == 0.004
    assert config.inner.steps == 7
    assert config.inner.pair == (0.8, 0.9)
    assert config.inner.async_ is True
    assert config.inner.kind == "linear"
    assert config.items == ["a"]


@pytest.mark.parametrize("text", ["4e-3", "4.0e-3", "4E-3", "+4e-3", "0.004", ".4e-2", "4.e-3"])
def test_every_spelling_of_a_number(write, text):
    assert load_config(write(f"inner: {{steps: 1, rate: {text}}}"), Root).inner.rate == 0.004


def test_int_is_accepted_for_float(write):
    assert load_config(write("inner: {steps: 1, rate: 2}"), Root).inner.rate == 2.0


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("steps: true", "got True (bool), want a valid integer"),
        ("steps: 1.5", "got 1.5 (float), want a valid integer"),
        ("steps: '3'", "got '3' (str), want a valid integer"),
        ("rate: true", "got True (bool), want a valid number"),
        ("rate: fast", "got 'fast' (str), want a valid number"),
        ("enabled: 1", "got 1 (int), want a valid boolean"),
        ("name: 3", "got 3 (int), want a valid string"),
        ("kind: cosin", "got 'cosin' (str), want one of linear, cosine; did you mean 'cosine'?"),
    ],
    ids=lambda text: text.split(":")[0] if ":" in text else "",
)
def test_wrong_type_names_line_key_got_and_want(write, line, wanted):
    steps = "" if line.startswith("steps") else "  steps: 1\n"
    path = write(f"# a comment\ninner:\n{steps}  {line}\n")
    number = 3 if not steps else 4
    key = line.split(":")[0]
    assert problems(path) == [f"{path}:{number}: inner.{key}: {wanted}"]


def test_unknown_key_names_the_nearest_one(write):
    path = write("inner:\n  steps: 1\n  rat: 0.1\n")
    assert problems(path) == [f"{path}:3: inner.rat: unknown key; did you mean 'inner.rate'?"]


def test_key_in_the_wrong_section_is_found_elsewhere(write):
    path = write("inner: {steps: 1}\nproject: mine\n")
    assert problems(path) == [f"{path}:2: project: unknown key; did you mean 'other.project'?"]


def test_key_like_nothing_lists_the_valid_ones(write):
    path = write("inner: {steps: 1}\nother: {zzz: 1}\n")
    assert problems(path) == [f"{path}:2: other.zzz: unknown key; valid here: project"]


def test_missing_key(write):
    path = write("inner:\n  rate: 1.0\n")
    assert problems(path) == [f"{path}:1: inner.steps: is missing and has no default"]


def test_all_problems_at_once(write):
    path = write("inner:\n  rate: high\n  stepz: 1\npath: /nowhere/at/all\nitems: 3\n")
    found = problems(path, "inner.enabled=maybe")
    keys = {text.split(": ")[1] for text in found}
    assert keys == {"inner.rate", "inner.stepz", "inner.steps", "path", "items", "inner.enabled"}
    assert f"{path}:4: path: no such file: '/nowhere/at/all'" in found


def test_the_message_lists_every_problem(write):
    with pytest.raises(ConfigError, match=r"2 problems in the job:\n  .*inner.rate.*\n  .*inner.steps"):
        load_config(write("inner: {rate: x}"), Root)


def test_errors_are_value_errors():
    assert issubclass(ConfigError, JobError)
    assert issubclass(JobError, ValueError)


def test_broken_yaml_names_the_line(write):
    path = write("inner:\n  steps: [1, 2\nother: 3\n")
    (text,) = problems(path)
    assert text.startswith(f"{path}:3: broken YAML: ")


def test_unsafe_tag_is_refused(write):
    path = write("inner: !!python/object/apply:os.system ['true']\n")
    (text,) = problems(path)
    assert text.startswith(f"{path}:1: broken YAML: could not determine a constructor")


def test_value_in_place_of_a_section(write):
    path = write("inner: 3\n")
    assert problems(path) == [f"{path}:1: inner: got 3 (int), want a section of key: value lines"]


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text\n"], ids=["list", "text"])
def test_top_level_must_be_a_mapping(write, text):
    path = write(text)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}:1: want a mapping of sections at the top")


def test_empty_file_reports_what_is_missing(write):
    path = write("# nothing\n")
    assert problems(path) == [f"{path}: inner: is missing and has no default"]


def test_missing_file(tmp_path):
    path = tmp_path / "absent.yaml"
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: cannot read the job file: ")


def test_duplicate_key_names_both_lines(write):
    path = write("inner:\n  steps: 1\n  steps: 2\n")
    assert problems(path) == [f"{path}:3: inner.steps: is given twice, first at {path}:2; keep one"]


def test_overrides_win_in_order(write):
    path = write("inner: {steps: 1}")
    config = load_config(path, Root, ["inner.steps=2", "inner.steps=3", "inner.rate=1e-5", "items=[b, c]", "other={}"])
    assert (config.inner.steps, config.inner.rate, config.items, config.other) == (3, 1e-5, ["b", "c"], Optional())


def test_override_null_clears_an_optional_section(write):
    assert load_config(write("inner: {steps: 1}\nother: {project: q}"), Root, ["other=null"]).other is None


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("inner.rat=1", "--set inner.rat: inner.rat: unknown key; did you mean 'inner.rate'?"),
        ("inner.steps=x", "--set inner.steps: inner.steps: got 'x' (str), want a valid integer"),
        ("inner.steps", "--set inner.steps: want key.path=value"),
        ("=3", "--set =3: want key.path=value"),
        ("inner.steps.deep=3", "--set inner.steps.deep: inner.steps.deep: inner.steps is a value, not a section"),
        ("inner.name=[1", "--set inner.name: inner.name: broken YAML value '[1'"),
    ],
)
def test_bad_override_names_itself(write, override, start):
    (text,) = problems(write("inner: {steps: 1}"), override)
    assert text.startswith(start)


def test_alias_moves_to_its_key(write):
    aliases = {"speed": "inner.rate", "old.kind": "inner.kind"}
    config = load_config(write("speed: 0.5\nold: {kind: cosine}\ninner: {steps: 1}"), Root, aliases=aliases)
    assert (config.inner.rate, config.inner.kind) == (0.5, "cosine")


def test_alias_beside_its_key_is_a_problem(write):
    path = write("speed: 0.5\ninner: {steps: 1, rate: 0.1}")
    assert problems(path, aliases={"speed": "inner.rate"}) == [
        f"{path}:1: speed: is another name of inner.rate, which is given too; keep one"
    ]


def test_alias_keeps_its_line_in_errors(write):
    path = write("inner: {steps: 1}\nspeed: slow\n")
    (text,) = problems(path, aliases={"speed": "inner.rate"})
    assert text == f"{path}:2: inner.rate: got 'slow' (str), want a valid number"


def test_check_of_the_whole_config(write):
    path = write("inner:\n  steps: 1\n  rate: 3.0\n")

    def check(config):
        if config.inner.rate > config.inner.steps:
            yield "inner.rate", "is above inner.steps"

    assert problems(path, check=check) == [f"{path}:3: inner.rate: is above inner.steps"]


def test_config_cannot_be_changed(write):
    config = load_config(write("inner: {steps: 1}"), Root)
    with pytest.raises(ValueError, match="frozen"):
        config.inner.steps = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    __pydantic_config__ = STRICT
    path: str
    pair: tuple[float, float] = (0.9, 0.95)
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataclassRoot:
    __pydantic_config__ = STRICT
    passing: Passing
    inner: Inner | None = None
    rate: float = 0.1


def test_a_schema_of_frozen_dataclasses(write):
    config = load_config(write("passing: {path: a, pair: [1, 2e-1]}\ninner: {steps: 1}\nrate: 2e-5\n"), DataclassRoot)
    assert config == DataclassRoot(passing=Passing(path="a", pair=(1.0, 0.2)), inner=Inner(steps=1), rate=2e-5)


def test_unnamed_keys_are_gathered_for_the_function_that_takes_them(write):
    text = "passing: {path: a, revision: main, limit: 1e3, nested: {kwargs: [1]}, kwargs: 7}"
    config = load_config(write(text), DataclassRoot, ["passing.limit=5", "passing.more.deep=null"])
    assert config.passing.kwargs == {
        "revision": "main",
        "limit": 5,
        "nested": {"kwargs": [1]},
        "kwargs": 7,
        "more": {"deep": None},
    }


def test_mistakes_in_dataclasses_look_the_same(write):
    path = write("passing:\n  pth: a\nratee: 1\nrate: '2e-5'\ninner: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, DataclassRoot, ["passing.pair=1"], flag="--")
    assert sorted(str(problem) for problem in caught.value.problems) == sorted(
        [
            "--passing.pair: passing.pair: got 1 (int), want a list",
            f"{path}:1: passing.path: is missing and has no default",
            f"{path}:2: passing.pth: unknown key; did you mean 'passing.path'?",
            f"{path}:3: ratee: unknown key; did you mean 'rate'?",
            f"{path}:4: rate: got '2e-5' (str), want a valid number",
            f"{path}:5: inner: got 3 (int), want a section of key: value lines",
        ]
    )


def test_an_override_goes_below_a_key_that_was_written_by_another_name(write):
    path = write("inner: {steps: 1}\nother: mine\n")
    assert load_config(path, Root, ["other.project=yours"], aliases={"other": "other.project"}).other.project == "yours"
