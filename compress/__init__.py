"""compress: post-training compression of language models, block by block.

    compress.run(recipe)             compress a model
    compress.plan(recipe)            what that would do: bytes, memory, time
    compress.load(folder)            any checkpoint, compressed or not, as a transformers model
    compress.evaluate(model, …)      perplexity and fidelity

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
    from compress.pipeline.plan import plan as plan
    from compress.pipeline.run import run as run

__version__ = "0.1.0"

_API = {  # name -> where it lives
    "run": "compress.pipeline.run:run",
    "plan": "compress.pipeline.plan:plan",
    "load": "compress.checkpoint.load:load",
    "evaluate": "compress.evaluation.evaluate:evaluate",
}
__all__ = ["__version__", "evaluate", "load", "plan", "run"]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    module, _, attribute = _API[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})


_install()
