"""The methods: one literal list, and how a name and options become a method."""

from __future__ import annotations

from typing import Any, get_args

from keepset.errors import RecipeError, did_you_mean
from keepset.methods.bm25 import Bm25
from keepset.methods.datainf import DataInf
from keepset.methods.davir import Davir, DavirRef, RhoMean, RhoSum
from keepset.methods.dsir import Dsir
from keepset.methods.ekfac import Ekfac
from keepset.methods.el2n import El2n, GradNorm
from keepset.methods.forgetting import Forgetting
from keepset.methods.gist import Gist
from keepset.methods.ifd import Ifd
from keepset.methods.in_run_shapley import InRunShapley
from keepset.methods.influence import Influence
from keepset.methods.instructdiff import InstructDiff
from keepset.methods.knn_shapley import KnnShapley
from keepset.methods.length import Length
from keepset.methods.less import GradCosine, Less, TracIn
from keepset.methods.loss import Loss, LossRef
from keepset.methods.metagradient import Metagradient
from keepset.methods.method import Method
from keepset.methods.perplexity import Perplexity
from keepset.methods.random_ import Random
from keepset.methods.rds import Rds, RdsPlus
from keepset.methods.rose import Rose
from keepset.methods.tmc_shapley import TmcShapley
from keepset.recipe import MethodSpec

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Random, Length, Bm25, Rds, RdsPlus, Dsir, KnnShapley, Perplexity, Loss, LossRef, Ifd, El2n, Forgetting,
        GradNorm, Davir, DavirRef, RhoSum, RhoMean, InstructDiff, Rose, Less, TracIn, GradCosine, Gist, Influence,
        DataInf, Ekfac, InRunShapley, TmcShapley, Metagradient,
    )
}  # fmt: skip


def find_method(name: str) -> type[Method]:
    """Look a method up.

    Raises:
        RecipeError: there is none of that name, with the closest one.
    """
    if name not in METHODS:
        hint = did_you_mean(name, list(METHODS)) or f"; there are: {', '.join(METHODS)}"
        raise RecipeError(f"methods: no method '{name}'{hint}")
    return METHODS[name]


def needs_model(name: str) -> bool:
    """Whether a method needs a tokenizer or a model."""
    return "text" not in find_method(name).needs


def method_of(spec: MethodSpec) -> Method:
    """The method that a recipe's entry means, with its options, without looking at them again."""
    return find_method(spec.name)(**spec.options)


def check_options(spec: MethodSpec) -> Method:
    """Check a method's options before anything runs.

    Raises:
        RecipeError: an unknown option, a value that isn't one of its choices, or an option that does nothing.
    """
    options = find_method(spec.name).options()
    for key, value in spec.options.items():
        if key not in options:
            hint = did_you_mean(key, list(options)) or f"; it has: {', '.join(options) or 'none'}"
            raise RecipeError(f"method {spec.name}: no option '{key}'{hint}")
        check_value(spec.name, key, value, options[key][0])
    if spec.shots is not None and "target" not in METHODS[spec.name].needs:
        raise RecipeError(f"method {spec.label}: shots does nothing here: {spec.name} looks at no target; remove it")
    method = method_of(spec)
    for names, why in method.idle():
        for name in names:
            if getattr(method, name) != options[name][1]:
                raise RecipeError(f"method {spec.label}: {name} does nothing here: {why}; remove it")
    return method


def check_value(method: str, option: str, value: Any, kind: Any) -> None:
    """Check the value of one option.

    Raises:
        RecipeError: it is none of the choices, or of another type.
    """
    choices = get_args(kind)
    if choices and value not in choices:
        raise RecipeError(f"method {method}: {option} is one of {', '.join(map(str, choices))}, not '{value}'")
    number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool)
    if not choices and not number and not isinstance(value, kind):
        raise RecipeError(f"method {method}: {option} must be {kind.__name__}, not '{value}'")
