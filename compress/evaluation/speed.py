"""How quick a model is, beside the one it was made from: tokens per second of prefill and decode, time to load, memory.

    prefill   one forward over the whole prompt, which also fills the key-value cache
    decode    one new token per forward, from the cache, the likeliest each time

The whole model must fit into memory. Each model lives in a process of its own, so that its memory is its own; the models
take turns, so that whatever else the machine does meets both. A first round warms up and does not count. Prompts are
random tokens: what the text says changes nothing about the work, except for which experts of a mixture are used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from compress import errors
from compress.errors import CheckpointError, CompressError, RecipeError
from compress.pipeline.progress import Progress, Silent

if TYPE_CHECKING:
    from compress.checkpoint.source import Source
    from compress.pipeline.run import Machine

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 64, 5
WORKER = "compress.evaluation.speed_worker"
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class SpeedSettings:
    """What is timed. `prompt_tokens` None: 512, or what the model's positions leave room for. `arithmetic`: of quantized layers
    on a CPU: "int8" or "float" activations on native kernels, or "reference", torch alone."""

    prompt_tokens: int | None = None
    new_tokens: int = NEW_TOKENS
    batch_size: int = 1
    repeats: int = REPEATS
    dtype: str = "auto"
    attention: str | None = None
    arithmetic: str = "int8"


def measure_speed(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    settings: SpeedSettings | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Time `model`, and `reference` in turns with it.

    Returns: a dictionary for JSON: "settings", "machine", "model", with a reference "reference" and "ratio" (medians over
        the rounds of model / reference in tokens per second: above 1 the model is quicker).
    Raises: RecipeError, CheckpointError with the remedy.
    """
    from compress.checkpoint.source import find_source

    settings, progress = settings or SpeedSettings(), progress or Silent()
    places = {"model": find_source(str(model), revision)}
    if reference is not None:
        places["reference"] = find_source(str(reference))
    lengths = prompt_length(settings, list(places.values()))
    device = "auto" if machine is None else machine.device
    common = {**asdict(settings), "prompt_tokens": lengths, "device": device, "trust_remote_code": trust_remote_code}
    progress.begin("time " + " and ".join(s.name for s in places.values()), settings.repeats + 1, "round")
    workers: dict[str, _Worker] = {}
    loaded: dict[str, dict[str, Any]] = {}
    try:
        for role, source in places.items():
            folder = source.fetch()
            workers[role] = _Worker({**common, "folder": str(folder), "name": source.name})
            loaded[role] = workers[role].read()  # one after the other: loading is timed
        rounds: dict[str, list[dict[str, float]]] = {role: [] for role in workers}
        for number in range(settings.repeats + 1):
            order = list(workers) if number % 2 else list(reversed(workers))
            for role in order:
                seconds = workers[role].ask("round")
                if number:  # the first one warms up
                    rounds[role].append(seconds)
            progress.advance(1)
        memory = {role: worker.ask("memory") for role, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    progress.end()
    about = {key: loaded["model"].pop(key) for key in ("machine", "dtype", "attention")}
    for role in loaded.keys() - {"model"}:
        theirs = {key: loaded[role].pop(key) for key in about}
        if theirs != about:
            progress.note(
                f"the models do not run alike: {_differences(about, theirs)}; --dtype and --attention set both"
            )
    found: dict[str, Any] = {
        "settings": {"prompt_tokens": lengths, **{k: v for k, v in asdict(settings).items() if k in
                     ("new_tokens", "batch_size", "repeats")}},
        "machine": {**about["machine"], "dtype": about["dtype"], "attention": about["attention"]},
    }  # fmt: skip
    for role in ("reference", "model"):
        if role in workers:
            speeds = {phase: _speed(phase, rounds[role], settings, lengths) for phase in PHASES}
            found[role] = {
                "path": str(model if role == "model" else reference),
                **loaded[role],
                **memory[role],
                **speeds,
            }
    if reference is not None:
        found["ratio"] = {
            phase: median(b[phase] / a[phase] for a, b in zip(rounds["model"], rounds["reference"], strict=True))
            for phase in PHASES
        }
    return found


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    return ", ".join(f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key])


def _speed(phase: str, rounds: list[dict[str, float]], settings: SpeedSettings, prompt_tokens: int) -> dict[str, Any]:
    """Tokens per second of all sequences of the batch together."""
    n_tokens = settings.batch_size * (prompt_tokens if phase == "prefill" else settings.new_tokens)
    speeds = [n_tokens / seconds[phase] for seconds in rounds]
    return {"tokens_per_second": median(speeds), "min": min(speeds), "max": max(speeds), "rounds": speeds}


def prompt_length(settings: SpeedSettings, sources: list[Source]) -> int:
    """Tokens of the prompt. Raises: RecipeError if a model has not enough positions."""
    from compress.models.families import architecture_of

    limits = {s.name: architecture_of(s.config, s.infos.keys()).max_positions for s in sources}
    name, limit = min(
        ((n, limit) for n, limit in limits.items() if limit is not None), key=lambda p: p[1], default=("", None)
    )
    if limit is None:
        return settings.prompt_tokens or PROMPT_TOKENS
    room = limit - settings.new_tokens
    if room < 1:
        raise RecipeError(f"--new-tokens {settings.new_tokens}: {name} has {limit} positions; use fewer than that")
    if settings.prompt_tokens is not None and settings.prompt_tokens > room:
        raise RecipeError(
            f"--prompt-tokens {settings.prompt_tokens}: {name} has {limit} positions, {settings.new_tokens} of which the new "
            f"tokens take; use at most {room}"
        )
    return settings.prompt_tokens or min(PROMPT_TOKENS, room)


class _Worker:
    """A process that holds one model, and answers a line of JSON to each line that it is given."""

    def __init__(self, task: dict[str, Any]):
        self.name = task["name"]
        root = str(Path(errors.__file__).parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; `read` says how
        return self.read()

    def read(self) -> dict[str, Any]:
        """Its next answer. Raises: the error that ended it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if not line:
            code = self._process.wait()
            raise CheckpointError(
                f"{self.name}: the process that was to run it ended with {f'signal {-code}' if code < 0 else code}; if memory "
                f"ran out, use a machine with more, or time the models one at a time"
            )
        if "error" in answer:
            kind = getattr(errors, answer["error"], CheckpointError)
            raise (kind if issubclass(kind, CompressError) else CheckpointError)(answer["message"])
        return answer

    def close(self) -> None:
        """End it."""
        with self._process as process:
            if process.poll() is None:
                process.kill()
