"""compress: post-training compression of language models, block by block.

    compress.run(recipe)             compress a model
    compress.plan(recipe)            what that would do: bytes, memory, time
    compress.load(folder)            any checkpoint, compressed or not, as a transformers model
    compress.evaluate(model, …)      perplexity and fidelity
    compress.evaluate_tasks(model, tasks)   benchmarks of lm-eval
    compress.export(folder, format)  a compressed checkpoint in the formats of servers and other libraries
    compress.push(folder, repo)      publish a result on the Hub, with a model card

Importing the package imports neither torch nor transformers. It does see to it that transformers, once imported, loads
what the package writes: `AutoModelForCausalLM.from_pretrained(folder)` then works.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compress.checkpoint.registration import install as _install

if TYPE_CHECKING:
    from compress.checkpoint.load import load as load
    from compress.evaluation.evaluate import evaluate as evaluate
    from compress.evaluation.zeroshot import evaluate_tasks as evaluate_tasks
    from compress.export.run import export as export
    from compress.pipeline.plan import plan as plan
    from compress.pipeline.run import run as run
    from compress.publish.hub import push as push

__version__ = "0.1.0"

_API = {  # name -> where it lives
    "run": "compress.pipeline.run:run",
    "plan": "compress.pipeline.plan:plan",
    "load": "compress.checkpoint.load:load",
    "evaluate": "compress.evaluation.evaluate:evaluate",
    "evaluate_tasks": "compress.evaluation.zeroshot:evaluate_tasks",
    "export": "compress.export",  # the package itself can be called
    "push": "compress.publish.hub:push",
}
__all__ = ["__version__", "evaluate", "evaluate_tasks", "export", "load", "plan", "push", "run"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    module, _, attribute = _API[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})


_install()
