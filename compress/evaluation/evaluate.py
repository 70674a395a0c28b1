"""`compress eval`: perplexity of a checkpoint, and its fidelity to a reference, streamed block by block.

Neither model is ever in memory as a whole: a block of each at a time, side by side, and the hidden states of both (in memory
or on disk). Of these, at the end, the heads make logits, chunk by chunk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.store import Allowance, HiddenStates, embedded
from compress.checkpoint.budget import Budget, parse_budget
from compress.checkpoint.source import find_source
from compress.checkpoint.stream import StreamedModel
from compress.errors import CheckpointError, RecipeError
from compress.evaluation.blocks import OTHER_BASIS, in_one_basis, not_comparable, obstacle, run_in_step
from compress.evaluation.fidelity import compare, score
from compress.evaluation.size import sizes
from compress.evaluation.speed import measure_speed
from compress.evaluation.windows import Windows, cut_windows
from compress.pipeline.progress import Progress, Silent
from compress.report.frame import frame

if TYPE_CHECKING:
    from compress.pipeline.plan import Plan
    from compress.pipeline.run import Machine
    from compress.recipe import Evaluation

BATCH_TOKENS = 4096
DEFAULT_LENGTH = 2048  # the window of the published tables, or the model's context where that is shorter


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    settings: Evaluation | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    memory_budget: Budget | str | int | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on a text, and KL and top-1 agreement with `reference` where one is given.

    Args:
        model, reference: folders or Hub ids, original or compressed; they must share a tokenizer.
        settings: the text and the windows; by default the shipped held-out text.
        memory_budget: of a stack, measure what fits: as `compress.load` has it.

    Returns: a dictionary for JSON (docs/report.schema.json): "text", "model", "size", with a reference also "reference",
        "fidelity" and "hidden_states", and "speed" if `settings` ask for it.
    Raises: RecipeError, CheckpointError, NumericsError with the remedy.
    """
    from compress.pipeline.run import Machine, compute_device
    from compress.recipe import Evaluation

    settings, machine, progress = settings or Evaluation(), machine or Machine(), progress or Silent()
    budget = None if memory_budget is None else parse_budget(memory_budget)
    source = find_source(str(model), revision, budget)
    other = None if reference is None else find_source(str(reference))
    folder, reference_folder = source.fetch(budget=budget), None if other is None else other.fetch()
    device, dtype = compute_device(machine), torch.float32
    run = _Evaluation(settings, machine, progress, device, dtype, trust_remote_code, budget)
    found = {**frame("evaluation"), **run(folder, reference_folder), "size": sizes(source, other)}
    if settings.speed:
        if budget is not None:
            raise RecipeError("--speed: measures a whole stack; leave out memory_budget, or speed")
        found["speed"] = measure_speed(
            folder, reference=reference_folder, machine=machine, progress=progress, trust_remote_code=trust_remote_code
        )
    return found


def evaluate_run(plan: Plan, source: Path, out: Path, machine: Machine, progress: Progress) -> dict[str, Any]:
    """The evaluation that a recipe asks for: the result beside the original, in the dtype of the run."""
    from compress.pipeline.run import compute_place

    settings = plan.recipe.evaluation
    assert settings
    device, dtype = compute_place(plan, machine)
    remote_code = plan.recipe.model.trust_remote_code
    run = _Evaluation(settings, machine, progress, device, dtype, remote_code)
    with_original = run(out, source if settings.reference else None)
    if not settings.reference:
        with_original["reference"] = run(source, None)["model"]
    if settings.speed:
        with_original["speed"] = measure_speed(
            out, reference=source, machine=machine, progress=progress, trust_remote_code=remote_code
        )
    if settings.tasks:
        from compress.evaluation.zeroshot import evaluate_tasks_of_run

        with_original["tasks"] = evaluate_tasks_of_run(settings, out, source, machine, progress, remote_code)
    return with_original


class _Evaluation:
    def __init__(
        self,
        settings: Evaluation,
        machine: Machine,
        progress: Progress,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
        budget: Budget | None = None,
    ):
        self.budget = budget  # of the model that is measured
        self.settings, self.machine, self.progress = settings, machine, progress
        self.device, self.dtype, self.trust_remote_code = device, dtype, trust_remote_code

    def __call__(self, folder: Path, reference: Path | None) -> dict[str, Any]:
        model = self._open(folder, self.budget)
        windows = self.windows(folder, model)
        text = {
            "data": list(self.settings.data),
            "windows": len(windows.ids),
            "length": windows.ids.shape[1],
            "stride": windows.stride,
            "text_tokens": windows.n_text_tokens,
            "text_bytes": windows.n_text_bytes,
            "begins_with_bos": windows.bos,
        }
        with _scratch() as scratch:
            if reference is None:
                hidden = self.final_hidden(model, windows, Path(scratch))
                scores = score(windows, hidden, model.logits, model.architecture.vocab_size, str(folder))
                model.close()
                return {"text": text, "model": {"path": str(folder), **scores.to_dict(windows)}}
            original = self._open(reference)
            self._check_same_tokens(model, original)
            reference_hidden, hidden, blocks = self._both(original, model, windows, Path(scratch))
            theirs, ours, fidelity = compare(
                windows,
                reference_hidden,
                original.logits,
                hidden,
                model.logits,
                model.architecture.vocab_size,
                str(folder),
            )
            model.close()
            original.close()
        return {
            "text": text,
            "reference": {"path": str(reference), **theirs.to_dict(windows)},
            "model": {"path": str(folder), **ours.to_dict(windows)},
            "fidelity": fidelity,
            "hidden_states": blocks,
        }

    def _open(self, folder: Path, budget: Budget | None = None) -> StreamedModel:
        return StreamedModel(
            folder, self.dtype, self.device, trust_remote_code=self.trust_remote_code, budget=budget
        )  # fmt: skip

    def _check_same_tokens(self, model: StreamedModel, reference: StreamedModel) -> None:
        if model.architecture.vocab_size != reference.architecture.vocab_size:
            raise CheckpointError(
                f"{reference.folder}: vocabulary of {reference.architecture.vocab_size}, {model.folder} has "
                f"{model.architecture.vocab_size}: they cannot be compared token by token"
            )

    def windows(self, folder: Path, model: StreamedModel) -> Windows:
        from compress.calibration.data import load_text, load_tokenizer

        limit = model.architecture.max_positions
        length = self.settings.length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
        if limit is not None and length > limit:
            raise RecipeError(
                f"evaluation.length: {length} tokens, but the model has {limit} positions; use at most {limit}"
            )
        tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        text = load_text(self.settings)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        if len(ids) and int(ids.max()) >= model.architecture.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer gives id {int(ids.max())}, the model has {model.architecture.vocab_size} rows of "
                f"embeddings: it is another model's tokenizer; put the right one beside the weights"
            )
        bos = bool(len(ids)) and tokenizer.bos_token_id is not None and int(ids[0]) == tokenizer.bos_token_id
        return cut_windows(ids, length, len(text.encode()), self.settings.stride, self.settings.max_tokens, bos)

    @torch.no_grad()
    def _both(
        self, original: StreamedModel, model: StreamedModel, windows: Windows, scratch: Path
    ) -> tuple[HiddenStates, HiddenStates, dict[str, Any]]:
        """Final normed hidden states of both models, and how they drift apart, where blocks correspond to each other."""
        allowance = self._allowance()
        reason = obstacle(model, original)
        if reason is not None:
            theirs = self.final_hidden(original, windows, scratch, allowance)
            return theirs, self.final_hidden(model, windows, scratch, allowance), not_comparable(reason)
        theirs, ours = (self._embedded(m, windows, scratch, allowance) for m in (original, model))
        if not in_one_basis(ours, theirs):
            runs = ((original, theirs), (model, ours))
            theirs, ours = (self._through(m, hidden, scratch) for m, hidden in runs)
            return theirs, ours, not_comparable(OTHER_BASIS)
        self.progress.begin(f"evaluate {model.folder.name} beside {original.folder.name}", model.n_blocks, "block")
        errors = run_in_step(model, ours, original, theirs, self.progress.advance)
        theirs, ours = self._normed(original, theirs, scratch), self._normed(model, ours, scratch)
        self.progress.end()
        return theirs, ours, errors.to_dict()

    @torch.no_grad()
    def final_hidden(
        self, model: StreamedModel, windows: Windows, scratch: Path, allowance: Allowance | None = None
    ) -> HiddenStates:
        """Final normed hidden states of all windows: every block is loaded once and runs on all of them."""
        return self._through(model, self._embedded(model, windows, scratch, allowance or self._allowance()), scratch)

    def _through(self, model: StreamedModel, hidden: HiddenStates, scratch: Path) -> HiddenStates:
        """Final normed hidden states, in the place of those that enter block 0."""
        self.progress.begin(f"evaluate {model.folder.name}", model.n_blocks, "block")
        for index in range(model.n_blocks):
            block = model.load_block(index)
            for batch in range(len(hidden)):
                hidden[batch] = model.call_block(block, index, hidden[batch].to(self.device))
            model.unload_block(index)
            self.progress.advance(1)
        normed = self._normed(model, hidden, scratch)
        self.progress.end()
        return normed

    def _allowance(self) -> Allowance:
        from compress.pipeline.run import activation_limit

        return Allowance(activation_limit(self.machine))

    def _embedded(self, model: StreamedModel, windows: Windows, scratch: Path, allowance: Allowance) -> HiddenStates:
        """What enters the first block, a batch of windows at a time."""
        batches = list(windows.ids.split(max(1, BATCH_TOKENS // windows.ids.shape[1])))
        return embedded(model.embed, batches, allowance, scratch)

    def _normed(self, model: StreamedModel, hidden: HiddenStates, scratch: Path) -> HiddenStates:
        """The last block's output through the final norm; in the same place unless that changes the width."""
        width = model.final_norm(hidden[0][:1, :1].to(self.device)).shape[-1]
        normed = hidden
        if width != hidden.shapes[0][-1]:
            shapes: list[tuple[int, ...]] = [(*shape[:2], width) for shape in hidden.shapes]
            normed = HiddenStates(shapes, self.dtype, hidden.allowance, scratch)
        for batch in range(len(hidden)):
            normed[batch] = model.final_norm(hidden[batch].to(self.device))
            if normed is not hidden:
                hidden.drop(batch)
        if normed is not hidden:
            hidden.close()
        return normed


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for activations that do not fit into memory. Raises: CheckpointError if there is no room for one."""
    try:
        return tempfile.TemporaryDirectory(prefix="compress-eval-")
    except OSError as error:
        raise CheckpointError(
            f"no folder for temporary files can be made: {error.strerror or error}; set TMPDIR to one with room"
        ) from None
