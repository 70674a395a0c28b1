"""A method may look at the whole model before the first block; what it settles is planned, run, kept and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from compress import methods
from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.checkpoint.load import load
from compress.methods.base import Kept, SiteTask, View
from compress.methods.rtn import RTN, RTNConfig
from compress.pipeline.plan import plan
from compress.pipeline.run import run
from tests.runs import fingerprints, recipe_for
from tests.tiny_models import save_tiny

WORDS = "the old bridge over the river was never as dark as the stone under it, and nobody went there slowly. "


class WatchfulConfig(RTNConfig):
    bits: int = 6
    settled: bool = False


class Watchful(RTN):
    """Rounds the half of the layers with the largest inputs to 8 bits, the others to 4; keeps the last down projection."""

    name = "watchful"
    Config = WatchfulConfig
    looks: ClassVar[list[str]] = []
    seen: ClassVar[dict[str, Any]] = {}

    @classmethod
    def statistics(cls, config: WatchfulConfig):
        return (SecondMoment(),)

    @classmethod
    def observes(cls, config: WatchfulConfig) -> bool:
        return not config.settled

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        cls.looks.append("observe")
        sizes = {}
        for site, statistics in view.sites():
            for layer in site.layers:
                assert tuple(layer.weight.shape) == (
                    view.shapes[layer.name].out_features,
                    view.shapes[layer.name].in_features,
                )
                sizes[layer.name] = 0.0 if statistics is None else float(statistics[SecondMoment()].trace())
        assert sizes.keys() == configs.keys() == view.shapes.keys()
        cls.seen["states"] = list(view.states())
        model = view.model()
        cls.seen["logits"] = model(view.batches[0]).logits
        parent, attribute = view.place(model, next(iter(configs)))
        cls.seen["weight"] = getattr(parent, attribute).weight
        cls.seen["blocks"] = dict(view.blocks)
        cls.seen["remembered"] = view.remember("sum", lambda: sum(sizes.values()))
        largest = sorted(sizes, key=lambda name: -sizes[name])[: len(sizes) // 2]
        chosen: dict[str, Any] = {
            name: config.model_copy(update={"settled": True, "bits": 8 if name in largest else 4})
            for name, config in configs.items()
        }
        chosen[max(name for name in configs if "down_proj" in name)] = Kept("it is the last")
        return chosen

    @classmethod
    def compress(cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator):
        if cls.looks[-1] == "stop":
            cls.looks.append("stopped")
            raise KeyboardInterrupt
        return super().compress(site, statistics, generator)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(methods, "find", lambda name: Watchful)
    monkeypatch.setattr("compress.recipe.methods", methods, raising=False)
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(WORDS * 40)
    Watchful.looks.clear()
    return recipe_for(tmp_path / "model", [{"watchful": {"group_size": 32}}], tmp_path / "text.txt", evaluation=False)


def test_what_was_settled_is_run(recipe, tmp_path: Path):
    planned = plan(recipe)
    assert any("settles" in warning for warning in planned.warnings)
    assert {layer.spec.bits for layer in planned.layers.values()} == {6}
    result = run(recipe, tmp_path / "out")
    bits = [layer.spec.bits for layer in result.plan.layers.values()]
    assert set(bits) == {4, 8} and len(result.plan.layers) == len(planned.layers) - 1
    assert any("it is the last" in warning for warning in result.report["warnings"])
    assert not any("settles" in warning for warning in result.report["warnings"])
    assert "observe" in result.report["seconds"]
    assert load(tmp_path / "out") is not None
    assert Watchful.looks == ["observe"]


def test_the_view_shows_the_model_before_the_run(recipe, tmp_path: Path):
    run(recipe, tmp_path / "out")
    seen, model = Watchful.seen, load(tmp_path / "model", dtype=torch.float32)
    batches = model.config.num_hidden_layers + 1
    assert len(seen["states"]) == batches and seen["blocks"][next(iter(seen["blocks"]))] == 0
    torch.testing.assert_close(seen["weight"], model.model.layers[0].self_attn.q_proj.weight)
    assert seen["logits"].shape[-1] == model.config.vocab_size and not seen["logits"].requires_grad
    assert seen["states"][0].shape == (6, model.config.hidden_size)
    assert seen["remembered"] > 0


def test_an_interrupted_run_settles_once(recipe, tmp_path: Path):
    whole = run(recipe, tmp_path / "whole")
    Watchful.looks.clear()
    observe = Watchful.observe.__func__

    def then_stop(cls, view, configs):
        found = observe(cls, view, configs)
        cls.looks.append("stop")
        return found

    Watchful.observe = classmethod(then_stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "out")
        again = run(recipe, tmp_path / "out")
    finally:
        Watchful.observe = classmethod(observe)
    assert Watchful.looks == ["observe", "stop", "stopped"]
    assert fingerprints(tmp_path / "whole") == fingerprints(tmp_path / "out")
    assert again.plan.specs == whole.plan.specs
