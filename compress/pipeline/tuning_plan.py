"""The step that tunes the finished model, as the plan knows it: the last of a recipe, and the only one of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import RecipeError, naming
from compress.modules.spec import ModuleSpec

if TYPE_CHECKING:
    from compress.methods.tuning import TuningMethod
    from compress.recipe import Recipe


@dataclass(frozen=True)
class TuningPlan:
    """One step that tunes. `teacher`: the model that is the original, where it is not the recipe's own."""

    number: int
    method: type[TuningMethod]
    config: Any
    teacher: str | None

    @property
    def rows(self) -> int:
        """Calibration rows of an iteration."""
        return self.method.iteration_rows(self.config)

    @property
    def iterations(self) -> int:
        return self.method.iterations(self.config)


def plan_tuning(recipe: Recipe) -> TuningPlan | None:
    """The recipe's last step, if it tunes the result.

    Raises: RecipeError if such a step stands elsewhere, or names layers, or has no original to compare with.
    """
    from compress.methods import find
    from compress.methods.tuning import TuningMethod

    found = None
    for number, step in enumerate(recipe.steps):
        method = find(step.method)
        if not issubclass(method, TuningMethod):
            continue
        where = f"steps.{number}"
        if number != len(recipe.steps) - 1:
            raise RecipeError(f"{where}: {step.method} tunes the finished model; put it last, and name it once")
        for key, value in (("layers", step.layers), ("skip", step.skip), ("overrides", step.overrides)):
            if value:
                raise RecipeError(
                    f"{where}.{key}: {step.method} tunes the whole model, not single layers; leave {key} out"
                )
        config: Any = step.config
        found = TuningPlan(number, method, config, method.teacher(config))
    return found


def check_tuning(
    tuning: TuningPlan | None, source_specs: Mapping[str, ModuleSpec], specs: Mapping[str, ModuleSpec], stacked: bool
) -> None:
    """Raises: RecipeError if the model cannot be tuned so."""
    if tuning is None:
        return
    with naming(f"steps.{tuning.number}.{tuning.method.name}"):
        if stacked:
            raise RecipeError("a stack has no one size to be tuned at; leave this step out")
        if source_specs and tuning.teacher is None:
            raise RecipeError("the recipe's model is compressed already; name the original as teacher")
        if not specs and tuning.teacher is None and not source_specs and tuning.number == 0:
            raise RecipeError("there is nothing compressed to tune; put it behind the steps that compress")
