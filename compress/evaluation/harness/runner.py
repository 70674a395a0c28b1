"""One model after the other through lm-eval: loaded, asked, gone from memory; the results as plain JSON."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.source import Source
from compress.errors import CompressError, NumericsError, RecipeError
from compress.evaluation.harness.tasks import SEEDS, LoadedTasks, Seeds, load_tasks, reason
from compress.evaluation.processes import processes
from compress.pipeline.progress import Progress, Silent

if TYPE_CHECKING:
    from compress.evaluation.harness.language_model import LanguageModel
    from compress.pipeline.run import Machine
    from compress.recipe import Evaluation


@dataclass(frozen=True)
class TaskSettings:
    """What is asked of the harness; names and meanings as its own options have them.

    `batch_size`: a number, "auto" or "auto:N"; None: auto on a GPU, 8 on a CPU. `seeds`: python, numpy, torch, few-shot.
    `arithmetic`: of quantized layers on a CPU: "reference" is torch alone, "float" and "int8" native kernels.
    `cache`: a folder where answers are kept, so that the same evaluation goes on where it was interrupted.
    """

    tasks: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | str | None = None
    apply_chat_template: bool = False
    seeds: Seeds = SEEDS
    dtype: str = "auto"
    arithmetic: str = "reference"
    cache: Path | None = None
    confirm_run_unsafe_code: bool = False

    @classmethod
    def of_recipe(cls, evaluation: Evaluation) -> TaskSettings:
        """What a recipe's section says."""
        return cls(
            evaluation.tasks or (), evaluation.include_path or (), evaluation.num_fewshot, evaluation.limit,
            evaluation.batch_size, evaluation.apply_chat_template,
        )  # fmt: skip


def check_template(tokenizer: Any, name: str) -> None:
    """Raises: RecipeError if there is no chat template to apply."""
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"evaluation.apply_chat_template: the tokenizer of {name} has no chat template; leave it out, or add "
            f"chat_template.jinja to the model's folder"
        )


class Harness:
    """The harness with everything that does not change from model to model."""

    def __init__(
        self, settings: TaskSettings, machine: Machine | None, progress: Progress | None, trust_remote_code: bool
    ):
        from compress.pipeline.run import Machine

        self.settings, self.machine = settings, machine or Machine()
        self.progress, self.trust_remote_code = progress or Silent(), trust_remote_code
        self._accelerator: Any = None

    def part(self) -> None:
        """Of several processes, go on alone."""
        if self._accelerator is not None:
            import torch

            self._accelerator = None
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def load(self, model: str) -> LoadedTasks:
        from compress.evaluation.harness.surroundings import surroundings

        wanted = self.settings
        with surroundings(self.progress):
            return load_tasks(
                wanted.tasks, wanted.include_path, wanted.seeds, self.progress, self._model_args(model)
            )  # fmt: skip

    def _model_args(self, model: str) -> dict[str, Any]:
        return {"pretrained": model, "dtype": self.settings.dtype, "arithmetic": self.settings.arithmetic}

    def run(self, source: Source, tasks: LoadedTasks) -> dict[str, Any]:
        """The results of one model in the harness's form, with every question under "samples"."""
        from compress.evaluation.harness.language_model import cache_file
        from compress.evaluation.harness.surroundings import surroundings

        name = Path(source.name).name
        with self._model(source) as model, surroundings(self.progress, name) as phases:
            model.phases = phases
            cache = None if self.settings.cache is None else cache_file(self.settings.cache, model)
            phases.begin("write prompts", tasks.n_questions(self.settings.limit, model.world_size), "question")
            tasks.restore_random_state()
            try:
                results = self._evaluate(model, source.name, tasks, cache)
            except (CompressError, MemoryError, OSError):
                raise
            except Exception as error:  # tasks are anybody's code
                if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
                    raise
                raise RecipeError(f"{', '.join(self.settings.tasks)} on {source.name}: {reason(error)}") from error
            finally:
                _close_cache(model)
        if not results:
            return {}
        self._check(results, source.name)
        return results

    @contextmanager
    def _model(self, source: Source) -> Iterator[LanguageModel]:
        """Loaded, and gone from memory afterwards."""
        import torch

        from compress.calibration.data import load_tokenizer
        from compress.checkpoint.load import load
        from compress.evaluation.harness.language_model import LanguageModel, join_processes
        from compress.evaluation.harness.surroundings import surroundings
        from compress.pipeline.run import compute_device

        if self._accelerator is None and processes() > 1:
            cpu = self.machine.device == "cpu" or not torch.cuda.is_available()
            self._accelerator = join_processes(cpu)
        accelerator = self._accelerator
        device = compute_device(self.machine) if accelerator is None else accelerator.device
        self._warn_of_memory(source, device)
        with surroundings(self.progress, Path(source.name).name) as phases:
            phases.begin("load", 1, "model")
            folder = source.fetch(self.progress.note)
            tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
            if self.settings.apply_chat_template:
                check_template(tokenizer, source.name)
            exact = self.settings.arithmetic == "reference"
            how: dict[str, Any] = {"kernels": "reference"} if exact else {"activations": self.settings.arithmetic}
            loaded = load(
                folder, dtype=self.settings.dtype, device=device, trust_remote_code=self.trust_remote_code, **how
            )  # fmt: skip
            phases.advance(1)
        with _no_words_about_loaded_models():
            model = LanguageModel(loaded, tokenizer, folder, self.settings.batch_size, accelerator)
        del loaded
        try:
            yield model
        finally:
            model._model = model.pretrained = None  # all that refers to it
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _warn_of_memory(self, source: Source, device: Any) -> None:
        """Unlike all else here, the harness needs the whole model at once."""
        import torch

        from compress.pipeline.estimate import available_memory

        needed = sum(info.nbytes for info in source.infos.values())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
        if needed > free:
            self.progress.note(
                f"{source.name}: tasks need the whole model in memory: {needed / 2**30:.1f} GiB and what batches take; "
                f"{free / 2**30:.1f} GiB are free on {device.type}; if it fails, use a machine with more, or perplexity "
                f"(without --tasks), which streams block by block"
            )

    def _evaluate(self, model: LanguageModel, name: str, tasks: LoadedTasks, cache: str | None) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.utils import handle_non_serializable

        wanted = self.settings
        tracker = EvaluationTracker()
        results = simple_evaluate(
            model=model,
            model_args=self._model_args(name),
            tasks=list(tasks.objects),
            num_fewshot=wanted.num_fewshot,
            batch_size=model.batch_size,
            device=str(model.device),
            use_cache=cache,
            limit=wanted.limit,
            log_samples=True,
            evaluation_tracker=tracker,
            apply_chat_template=wanted.apply_chat_template,
            fewshot_as_multiturn=wanted.apply_chat_template,
            task_manager=tasks.manager,
            random_seed=None,  # sown when the tasks were loaded, and restored
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=wanted.seeds[3],
            confirm_run_unsafe_code=wanted.confirm_run_unsafe_code,
        )
        if results is None:
            return {}
        tracker.general_config_tracker.log_end_time()
        about = {**asdict(tracker.general_config_tracker), "model_source": "hf"}
        seeds = dict(zip(("random_seed", "numpy_seed", "torch_seed"), wanted.seeds, strict=False))
        config = {**results["config"], "model": "hf", **seeds}
        plain: dict[str, Any] = json.loads(
            json.dumps({**results, "config": config, **about}, default=handle_non_serializable)
        )
        for samples in plain["samples"].values():
            samples.sort(key=lambda sample: sample["doc_id"])  # several processes take turns
        return plain

    def _check(self, results: dict[str, Any], name: str) -> None:
        """Answers are numbers, and what was asked for was done."""
        for task, samples in results["samples"].items():
            for sample in samples:
                likelihoods = [r[0] for r in sample["filtered_resps"] if isinstance(r, list) and r]
                if any(isinstance(value, float) and math.isnan(value) for value in likelihoods):
                    raise NumericsError(
                        f"{name}: question {sample['doc_id']} of {task} has no finite likelihood: the model is broken; "
                        f"compress inspect MODEL --check looks for the tensor"
                    )
        asked = self.settings.num_fewshot
        fixed = [task for task in results["samples"] if asked is not None and results["n-shot"].get(task) != asked]
        if fixed:
            self.progress.note(
                f"{', '.join(fixed)}: the task fixes the number of solved examples itself; {asked} was not used"
            )


@contextmanager
def _no_words_about_loaded_models() -> Iterator[None]:
    """The harness warns that a model which is loaded already is the caller's responsibility. It is."""
    import logging

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _close_cache(model: LanguageModel) -> None:
    """The file is written by a thread of its own; what it still has in hand goes to disk."""
    if model.cache_hook.dbdict is not None:
        model.cache_hook.dbdict.close()
