"""The words of a mergekit config where they mean the same here; ours named where they do not."""

from collections.abc import Mapping
from typing import TypeAlias

from loramerge.io._yaml import Value

__all__ = ["Problem", "translated"]

# A path in the file, what is wrong there, and what to write instead.
Problem: TypeAlias = tuple[str, str, str | None]

MARKS = ("merge_method", "models", "parameters", "dtype", "out_dtype")
DENSE = {"space": "dense", "scale": "paper"}
# What mergekit calls it, and what it is here. Only task_arithmetic is the same to the last word.
METHODS: Mapping[str, Mapping[str, str]] = {
    "task_arithmetic": {"method": "arithmetic"},
    "linear": {"method": "arithmetic"},
    "ties": {"method": "ties", **DENSE},
    "dare_ties": {"method": "ties", "sparsify": "dare", **DENSE},
    "dare_linear": {"method": "dare", "space": "dense"},
    "della": {"method": "ties", "sparsify": "della", **DENSE},
    "della_linear": {"method": "della", "space": "dense"},
    "breadcrumbs": {"method": "breadcrumbs"},
    "breadcrumbs_ties": {"method": "ties", "sparsify": "breadcrumbs", **DENSE},
    "sce": {"method": "sce", **DENSE},
    "slerp": {"method": "slerp"},
    "nuslerp": {"method": "slerp"},
    "multislerp": {"method": "karcher"},
    "karcher": {"method": "karcher"},
    "model_stock": {"method": "stock"},
}
# Those of mergekit that work on whole weights alone, and why there is no counterpart.
WHOLE: Mapping[str, tuple[str, str]] = {
    "arcee_fusion": ("weighs softmaxes of whole weights", "sce and consensus select entries"),
    "nearswap": ("moves what two whole models nearly share", "slerp goes from one to another"),
    "passthrough": ("stacks layers of whole models", "select takes modules, scale multiplies"),
    "ram": ("counts the models that leave an entry alone; a LoRA leaves none", "see: consensus"),
    "ramplus_tl": ("counts the models that leave an entry alone; a LoRA leaves none", "see: sce"),
}
# What stands beside the words to write, where the words alone are not the same merge.
BESIDE = {
    "nuslerp": "t: the second weight's share of both, and lengths go along the arc as well",
    "slerp": "both adapters in their order, t as it is, and no base_model",
}
# Methods whose base model is one of the two that are merged.
BETWEEN = ("slerp", "nearswap", "arcee_fusion")
# Options of a method that mergekit lets differ between models, and that are the method's own here,
# under the name they have here.
SHARED = {
    "density": "density",
    "gamma": "gamma",
    "epsilon": "epsilon",
    "lambda": "lambda",
    "select_topk": "density",
    "t": "t",
}
# What only whole models have, or what is otherwise said here.
OF_MODELS = {
    "slices": "choose layers with include and exclude",
    "modules": "choose modules with include and exclude",
    "tokenizer": "adapters have no tokenizer: leave it out",
    "tokenizer_source": "adapters have no tokenizer: leave it out",
    "chat_template": "adapters have no chat template: leave it out",
}
OF_PARAMETERS = {
    "normalize": "weights are factors here, never divided by their sum: write the quotients",
    "rescale": "what is dropped at random is always made up for, nothing else is: leave it out",
    "int8_mask": "there are no masks to store: leave it out",
    "filter_wise": "updates are compared as whole matrices: leave it out",
    "nuslerp_flatten": "updates are compared as whole matrices: leave it out",
    "nuslerp_row_wise": "updates are compared as whole matrices: leave it out",
    "max_iter": "it goes on until float64 shows no step: leave it out",
    "tol": "it goes on until float64 shows no step: leave it out",
}


def translated(
    found: dict[str, Value], path: str, problems: list[Problem]
) -> dict[str, Value] | None:
    """A step with mergekit's words replaced; what has no counterpart becomes a problem.

    None where that is the method itself, so that there is nothing more to say of the step.

    mergekit works on whole models: with a base model named, updates against it are what adapters
    hold, and the base model itself, listed among the models, contributes nothing. Its dtype is
    that of the result.
    """
    if not any(key in found for key in (*MARKS, *OF_MODELS)):
        return found
    if whole := WHOLE.get(str(theirs := found.get("merge_method"))):
        reason, hint = whole
        problems.append((f"{path}.merge_method", f"is mergekit's {theirs}: it {reason}", hint))
        return None
    ours = {key: value for key, value in found.items() if key not in (*MARKS, *OF_MODELS)}
    for key in found:
        if key in OF_MODELS:
            problems.append((f"{path}.{key}", "is mergekit's", OF_MODELS[key]))
    for theirs, own in (
        ("models", "adapters"),
        ("merge_method", "method"),
        ("dtype", "save_dtype"),
    ):
        if theirs in found and own in found:
            problems.append((f"{path}.{theirs}", f"and {own} mean the same", "leave one out"))
    parameters = dict(_mapping(found.get("parameters"), f"{path}.parameters", problems))
    weight = parameters.pop("weight", None)
    if "models" in found:
        ours["adapters"] = _adapters(found, path, weight, parameters, problems)
    if "merge_method" in found:
        ours["method"] = _method(found["merge_method"], path, ours, parameters, problems)
    if dtype := found.get("out_dtype") or found.get("dtype"):
        ours["save_dtype"] = dtype
    for key, value in parameters.items():
        if key in SHARED and isinstance(value, int | float):
            ours.setdefault(SHARED[key], value)
        else:
            problems.append(_refused(f"{path}.parameters.{key}", key, value))
    return ours


def _mapping(found: Value, path: str, problems: list[Problem]) -> Mapping[str, Value]:
    if not isinstance(found, dict | None):
        problems.append((path, "is no mapping", None))
    return found if isinstance(found, dict) else {}


def _refused(path: str, key: str, value: Value) -> Problem:
    if key in (*SHARED, "weight"):
        return path, f"is {value!r}; it must be one number", "see --module-weight for modules"
    return path, "has no meaning here", OF_PARAMETERS.get(key)


def _adapters(
    found: Mapping[str, Value],
    path: str,
    weight: Value,
    shared: dict[str, Value],
    problems: list[Problem],
) -> Value:
    """The models as adapters; what all of them say of an option goes into `shared`."""
    base = None if found.get("merge_method") in BETWEEN else found.get("base_model")
    models = found["models"]
    made: list[Value] = []
    said: list[Mapping[str, Value]] = []
    for place, one in enumerate(models if isinstance(models, list) else []):
        where = f"{path}.models[{place}]"
        entry = _mapping(one, where, problems)
        model = entry.get("model")
        if model == base:
            continue
        own = _mapping(entry.get("parameters"), f"{where}.parameters", problems)
        # mergekit writes base+adapter for a model with an adapter on it.
        plain = model.removeprefix(f"{base}+") if isinstance(model, str) else model
        factor = own.get("weight", weight)
        made.append(
            {"reference": plain} if factor is None else {"reference": plain, "weight": factor}
        )
        said.append({key: value for key, value in own.items() if key != "weight"})
    for key in dict.fromkeys(key for one in said for key in one):
        values = [one.get(key, shared.get(key)) for one in said]
        if any(value != values[0] for value in values):
            problems.append((f"{path}.models", f"differ in {key}", f"one {key} counts for all"))
        shared.setdefault(key, values[0])
    return made


def _method(
    theirs: Value,
    path: str,
    ours: Mapping[str, Value],
    parameters: dict[str, Value],
    problems: list[Problem],
) -> Value:
    """Our name of a method, where it is the same."""
    undivided = parameters.get("normalize") is False
    if theirs == "task_arithmetic" or (theirs == "linear" and undivided):
        if undivided:
            del parameters["normalize"]
        return "arithmetic"
    written = METHODS.get(str(theirs))
    if written is None:
        return theirs
    said = "write " + ", ".join(f"{key}: {value}" for key, value in written.items())
    if theirs == "linear":
        said += f", and the weights divided by their sum{_quotients(ours)}"
    if beside := BESIDE.get(str(theirs)):
        said += f", with {beside}"
    problems.append((f"{path}.merge_method", f"is mergekit's {theirs}", said))
    return written["method"]


def _quotients(ours: Mapping[str, Value]) -> str:
    adapters = ours.get("adapters")
    entries = adapters if isinstance(adapters, list) else []
    found = [one.get("weight") for one in entries if isinstance(one, dict)]
    weights = [float(weight) for weight in found if isinstance(weight, int | float)]
    if not sum(weights) or len(weights) != len(entries):
        return ""
    return ": " + ", ".join(f"{weight / sum(weights):.6g}" for weight in weights)
