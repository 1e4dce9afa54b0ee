"""Recipe files as documents: what they may say, and how each mistake is told by its path."""

from typing import Any

import pytest

from loramerge.document import assign, recipe_document
from loramerge.errors import UsageError
from loramerge.io._yaml import Value, read_yaml
from loramerge.mergekit import METHODS, WHOLE
from loramerge.options import describe
from loramerge.recipe import Named, find, make_recipe
from loramerge.registry import methods
from loramerge.workflow import (
    OF_FILE,
    OF_STEP,
    Workflow,
    make_workflow,
)
from tests.test_method_options import good_values

THREE = """
steps:
  - name: merged
    method: arithmetic
    adapters: [a, {reference: b, weight: -0.5}, {reference: c.safetensors, alpha: 16}]
    rank: full
  - name: small
    method: squeeze
    adapters: merged
    rank: 8
  - method: prune
    adapters: [small]
output: out
"""


def workflow(text: str) -> Workflow:
    return make_workflow(read_yaml(text, "r.yaml"), "r.yaml")


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        workflow(text)
    return caught.value


def test_steps_take_adapters_and_results_by_name() -> None:
    found = workflow(THREE)
    assert [step.name for step in found.steps] == ["merged", "small", None]
    first, second, third = (step.recipe for step in found.steps)
    assert first.adapters == (Named("a"), Named("b", -0.5), Named("c.safetensors", 1.0, 16.0))
    assert (first.settings.rank, second.settings.rank) == ("full", 8)
    assert (second.adapters, third.adapters) == ((Named("merged"),), (Named("small"),))
    assert [step.output for step in found.steps] == [None, None, "out"]
    assert found.sources == list(first.adapters)


def test_one_step_stands_at_the_top() -> None:
    found = workflow("method: dare\nadapters: [a, b]\nlambda: 0.5\ninclude: '*q*'\nsize: 20000")
    (step,) = found.steps
    assert step.recipe.method.name == "arithmetic"
    assert step.recipe.merge.lambda_ == 0.5
    assert step.recipe.settings.include == ("*q*",)
    assert step.recipe.settings.size == "20000"


@pytest.mark.parametrize("name", methods())
def test_every_option_of_a_method_is_a_key_and_gives_the_same_recipe(name: str) -> None:
    method = methods()[name]
    adapters = [Named("a"), Named("b", -0.5)] if method.takes == "many" else [Named("a")]
    rank = {"rank": 4} if method.takes == "one" else {}
    for option in describe(method.options):
        for value in good_values(option):
            values: dict[str, Any] = {**rank, option.name: value}
            try:
                made = make_recipe(name, adapters, values)
            except UsageError:
                continue  # options that do not stand alone
            document = recipe_document(name, adapters, values, None)
            (step,) = make_workflow(document, "r.yaml").steps
            assert step.recipe == made


def test_no_option_of_any_method_has_the_name_of_another_key() -> None:
    for method in methods().values():
        keys = {option.key for option in describe(method.options)}
        assert not keys & {*OF_STEP, *OF_FILE}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "$ is no mapping", None),
        ("[a]", "$ is no mapping", None),
        ("adapters: [a]", "$.method is missing", "loramerge methods"),
        ("method: tis\nadapters: [a]", "$.method is 'tis', no method", "'ties'"),
        ("method: 3", "$.method is 3; it must be text", None),
        ("method: ties", "$: ties needs adapters", "for example"),
        ("method: ties\nadapters: [a]\ndensety: 1", "$.densety is no option of ties", "'density'"),
        ("method: ties\nadapters: [a]\nmax-error: 1", "$.max-error is no option", "'max_error'"),
        ("method: ties\nadapters: [a]\nlambda_: 1", "$.lambda_ is no option", "'lambda'"),
        (
            "method: ties\nadapters: [a]\ndensity: 2",
            "$.density is 2; it must be a number > 0 and <= 1",
            "loramerge ties --help",
        ),
        ("method: ties\nadapters: [a]\nlambda: x", "$.lambda is 'x'; it must be a number", None),
        ("method: ties\nadapters: [a]\nspace: core2", "$.space is 'core2'", "'core'"),
        ("method: ties\nadapters: [3]", "$.adapters[0] is 3", None),
        ("method: ties\nadapters: [{reference: a, wieght: 1}]", "adapters[0].wieght", "'weight'"),
        ("method: ties\nadapters: [{reference: a, weight: x}]", "adapters[0].weight is 'x'", None),
        ("method: ties\nadapters: [{weight: 1}]", "$.adapters[0].reference is missing", None),
        (
            "method: ties\nadapters: [{reference: a, alpha: -1}]",
            "[0].alpha is -1; it must be",
            None,
        ),
        ("method: squeeze\nadapters: a", "$: squeeze needs to know how small", None),
        (
            "method: squeeze\nrank: 2\nadapters: {reference: a, weight: 2}",
            "$.adapters[0].weight is nothing squeeze takes",
            None,
        ),
        ("method: cat\nadapters: [a]\nrank: 2", "$: cat is arithmetic --rank full", None),
        ("steps: []", "$.steps is no list of steps", None),
        ("steps: [3]", "$.steps[0] is no mapping", None),
        (f"{THREE}rank: 8", "$.rank belongs to a step", "steps[0].rank"),
        (THREE.replace("rank: 8", "rank: 8\n    base_model: x"), "[1].base_model belongs", "top"),
        (THREE.replace("rank: 8", "rank: 0"), "$.steps[1].rank is 0; it must be", None),
        (THREE.replace("name: small", "name: merged"), "$.steps[1].name is 'merged'", None),
        (THREE.replace("name: merged", "name: a/b"), "$.steps[0].name is 'a/b'", None),
        (THREE.replace("- name: merged\n    ", "- "), "$.steps[0] has no name", "output"),
        (THREE.replace("adapters: [small]", "adapters: [d]"), "$.steps[1] is used by no", "output"),
        (THREE.replace("[a,", "[small,"), "$.steps[0].adapters names 'small', a later", None),
        (
            THREE.replace("adapters: merged", "adapters: {reference: merged, alpha: 2}"),
            "alpha is for files; merged is the result of a step",
            None,
        ),
        (
            THREE.replace("adapters: merged", "adapters: {reference: merged, from: peft}"),
            "$.steps[1].adapters[0].from is for files; merged is the result of a step",
            None,
        ),
        (
            "method: ties\nadapters: [{reference: a, from: kohja}]",
            "$.adapters[0].from is 'kohja', no layout",
            "'kohya'",
        ),
        ("method: ties\nadapters: [{reference: a, from: 3}]", "adapters[0].from is 3", None),
        ("method: ties\nadapters: [{reference: a, layout: mlx}]", "[0].layout", "'from'"),
    ],
)
def test_a_mistake_is_told_by_its_path(text: str, message: str, hint: str | None) -> None:
    error = refused(text)
    assert error.message.startswith("r.yaml: ")
    assert message in error.message
    assert error.exit_code == 2
    assert hint is None or hint in str(error.hint)


def test_all_mistakes_are_told_at_once() -> None:
    text = THREE.replace("rank: 8", "rank: 0\n    svdd: exact").replace("rank: full", "rank: fill")
    message = refused(text).message
    assert message.startswith("r.yaml has 3 problems: ")
    for said in ("$.steps[0].rank is 'fill'", "$.steps[1].svdd", "$.steps[1].rank is 0"):
        assert said in message


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("output", "x", lambda d: d["output"]),
        ("steps[1].rank", 4, lambda d: d["steps"][1]["rank"]),
        ("$.steps[1].energy", 0.5, lambda d: d["steps"][1]["energy"]),
        ("steps[0].adapters[1].weight", 2, lambda d: d["steps"][0]["adapters"][1]["weight"]),
        ("steps[0].adapters[0].weight", 2, lambda d: d["steps"][0]["adapters"][0]["weight"]),
        ("steps[2].adapters", ["b"], lambda d: d["steps"][2]["adapters"]),
        ("steps[2].adapters[0]", "b", lambda d: d["steps"][2]["adapters"][0]),
    ],
)
def test_a_value_is_set_by_its_path(path: str, value: Value, found: Any) -> None:
    document = read_yaml(THREE, "r.yaml")
    assign(document, path, value)
    assert found(document) == value


def test_an_adapter_whose_weight_is_set_keeps_its_reference() -> None:
    document = read_yaml("method: ties\nadapters: [a, b]", "r.yaml")
    assign(document, "adapters[1].weight", 0.5)
    (step,) = make_workflow(document, "r.yaml").steps
    assert step.recipe.adapters == (Named("a"), Named("b", 0.5))


@pytest.mark.parametrize(
    "path", ["", "steps[3].rank", "steps[x]", "step[0].rank", "output.x", "a..b", "steps[0]rank."]
)
def test_a_path_that_leads_nowhere_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        assign(read_yaml(THREE, "r.yaml"), path, 1)


MERGEKIT = """
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/base
  - model: org/base+a
    parameters: {weight: 0.5}
  - model: b
parameters: {weight: 0.3, lambda: 0.7, normalize: false}
dtype: bfloat16
"""


def test_the_words_of_mergekit_are_understood_where_they_mean_the_same() -> None:
    found = workflow(MERGEKIT)
    (step,) = found.steps
    assert step.recipe.method.name == "arithmetic"
    assert step.recipe.adapters == (Named("a", 0.5), Named("b", 0.3))
    assert step.recipe.merge.lambda_ == 0.7
    assert step.recipe.settings.save_dtype == "bfloat16"
    assert found.base_model == "org/base"


def test_an_option_all_models_agree_on_is_the_methods_own() -> None:
    text = "method: ties\nmodels:\n" + "".join(
        f"- {{model: {name}, parameters: {{density: 0.4, weight: 1}}}}\n" for name in "ab"
    )
    (step,) = workflow(text).steps
    assert step.recipe.canonical()["options"]["density"] == 0.4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("task_arithmetic", "dare_ties", "write method: ties, sparsify: dare, space: dense"),
        ("task_arithmetic", "sce", "write method: sce, space: dense, scale: paper"),
        ("task_arithmetic", "nearswop", "$.method is 'nearswop', no method"),
        ("task_arithmetic", "passthrough", "it stacks layers of whole models"),
        ("normalize: false", "select_topk: 2", "$.density is 2; it must be"),
        ("normalize: false", "filter_wise: true", "compared as whole matrices: leave it out"),
        ("normalize: false", "normalize: true", "$.parameters.normalize has no meaning here"),
        ("normalize: false", "int8_mask: true", "$.parameters.int8_mask has no meaning here"),
        ("lambda: 0.7", "lambda: [0.1, 0.2]", "$.parameters.lambda is [0.1, 0.2]; it must be one"),
        ("weight: 0.3", "weight: [0, 1]", "$.adapters[1].weight is [0, 1]; it must be a number"),
        ("{weight: 0.5}", "{density: 0.1}", "$.models differ in density"),
        ("dtype: bfloat16", "dtype: int8", "$.save_dtype is 'int8'"),
        ("dtype: bfloat16", "dtype: float32\nsave_dtype: float32", "mean the same"),
        ("dtype: bfloat16", "tokenizer_source: union", "adapters have no tokenizer"),
        ("dtype: bfloat16", "slices: []", "choose layers with include and exclude"),
        ("parameters: {weight: 0.3", "parameters: 3 #", "$.parameters is no mapping"),
    ],
)
def test_the_words_of_mergekit_that_mean_something_else_are_told_ours(
    old: str, new: str, said: str
) -> None:
    error = refused(MERGEKIT.replace(old, new))
    assert said in f"{error.message} {error.hint}"


def test_a_linear_merge_is_told_the_weights_that_mergekit_would_use() -> None:
    text = MERGEKIT.replace("task_arithmetic", "linear").replace(", normalize: false", "")
    error = refused(text)
    assert "divided by their sum: 0.625, 0.375" in f"{error.message} {error.hint}"
    (step,) = workflow(MERGEKIT.replace("task_arithmetic", "linear")).steps
    assert step.recipe.method.name == "arithmetic"


@pytest.mark.parametrize("theirs", WHOLE)
def test_what_only_whole_models_can_be_merged_by_is_one_problem(theirs: str) -> None:
    error = refused(MERGEKIT.replace("task_arithmetic", theirs))
    reason, hint = WHOLE[theirs]
    assert error.message == f"r.yaml: $.merge_method is mergekit's {theirs}: it {reason}."
    assert error.hint == hint


def test_both_ends_of_a_slerp_are_adapters() -> None:
    text = (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}"
    )
    error = refused(text)
    said = "write method: slerp, with both adapters in their order, t as it is, and no base_model"
    assert (error.message, error.hint) == ("r.yaml: $.merge_method is mergekit's slerp.", said)


@pytest.mark.parametrize("theirs", METHODS)
def test_what_a_mergekit_user_is_told_to_write_is_a_recipe(theirs: str) -> None:
    values: dict[str, Any] = dict(METHODS[theirs])
    name = values.pop("method")
    find(name)
    make_recipe(name, [Named("a"), Named("b")], values)
