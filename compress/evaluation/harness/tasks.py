"""Which tasks: names of lm-eval's, of those in folders of the user's, or YAML files; found, loaded and checked up front.

Reading the harness's 14,000 task files takes seconds, so they are read only where a name is not found among the user's.
A task is loaded before any model is: an unknown name, a broken file, data out of reach must not cost a model's loading.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, RecipeError
from compress.evaluation.harness.surroundings import stay_home
from compress.pipeline.progress import Progress, Silent

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

Seeds = tuple[int | None, int | None, int | None, int | None]
SEEDS: Seeds = (0, 1234, 1234, 1234)  # python, numpy, torch, few-shot: lm-eval's defaults
LISTING = "list them with: compress tasks"
LOCAL = "fetch it on a machine that has a network, or run a task over local files (see docs/evaluation.md)"


@dataclass
class LoadedTasks:
    """Tasks and groups ready to run, with the state of the random generators in which loading left them.

    The harness shuffles some data sets anew each time it looks at them: what follows starts from that state, so that it
    puts the same questions as the harness's own command line, and the same ones to every model.
    """

    objects: list[Any]
    tasks: dict[str, Task]
    groups: dict[str, Any]
    manager: TaskManager
    random_state: tuple[Any, Any, Any]

    def restore_random_state(self) -> None:
        import numpy as np
        import torch

        random.setstate(self.random_state[0])
        np.random.set_state(self.random_state[1])  # noqa: NPY002  # the generator that tasks use
        torch.set_rng_state(self.random_state[2])

    def n_questions(self, limit: float | None, world_size: int = 1) -> int:
        """How many one process puts, about."""
        from lm_eval.evaluator_utils import get_sample_size

        total = 0
        for task in self.tasks.values():
            docs = len(task.eval_docs)
            total += -(-min(get_sample_size(task, limit) or docs, docs) // world_size)
        return total


def _random_state() -> tuple[Any, Any, Any]:
    import numpy as np
    import torch

    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def load_tasks(
    names: Sequence[str],
    include_path: Sequence[str] = (),
    seeds: Seeds = SEEDS,
    progress: Progress | None = None,
    model_args: dict[str, Any] | None = None,
) -> LoadedTasks:
    """Find and load tasks.

    Args:
        names: tasks, groups or tags, with * and ? as in file names, or paths of YAML files.
        include_path: folders of further tasks; theirs win over the harness's of the same name.
        model_args: what the model is, for tasks that make their questions to fit one.

    Raises: RecipeError in one line: an unknown name with the nearest known, a broken file, data out of reach or empty.
    """
    import numpy as np
    import torch

    progress = progress or Silent()
    stay_home()
    index = TaskIndexes(include_path, progress, model_args)
    specs = {label: spec for name in dict.fromkeys(names) for label, spec in index.find(name).items()}
    sowers: tuple[Callable[[int], Any], ...] = (random.seed, np.random.seed, torch.manual_seed)
    for seed, sow in zip(seeds, sowers, strict=False):
        if seed is not None:
            sow(seed)
    progress.begin("load tasks", len(specs), "task")
    objects: list[Any] = []
    for label, spec in specs.items():
        with _errors_of(label):
            made = index.manager._load_spec(spec)
        objects.extend(made if isinstance(made, list) else [made])
        progress.advance(1, label)
    progress.end()
    random_state = _random_state()  # before anything else is done with them: their very names may be drawn at random
    with _errors_of(", ".join(specs)):
        loaded = index.manager.load(objects)
    tasks: dict[str, Task] = loaded["tasks"]
    for name, task in tasks.items():
        with _errors_of(name):
            if not len(task.eval_docs):
                raise IndexError
    return LoadedTasks(objects, tasks, loaded.get("groups", {}), index.manager, random_state)


class TaskIndexes:
    """The tasks of the user's folders, and the harness's with them once a name wants it."""

    def __init__(
        self, include_path: Sequence[str], progress: Progress | None = None, model_args: dict[str, Any] | None = None
    ):
        for folder in include_path:
            if not Path(folder).expanduser().is_dir():
                raise RecipeError(
                    f"evaluation.include_path {folder}: no such folder; name one that holds the YAML files of tasks"
                )
        self.include_path = [str(Path(folder).expanduser()) for folder in include_path]
        self.progress, self.model_args = progress or Silent(), model_args
        self.complete = False
        self.files: dict[str, Entry] = {}  # those given as paths
        self.manager = self._manager()

    def _manager(self) -> TaskManager:
        from lm_eval.tasks import TaskManager

        return TaskManager(
            include_path=list(self.include_path), include_defaults=self.complete, metadata=self.model_args or {}
        )

    def read_all(self) -> None:
        """Take in the harness's own tasks as well."""
        if not self.complete:
            self.complete = True
            self.progress.begin("read the list of tasks", 1, "list")
            self.manager = self._manager()
            self.manager.task_index.update(self.files)
            self.progress.end()

    def find(self, name: str) -> dict[str, str]:
        """What the harness is to load for `name`, by what to call it in messages.

        Raises: RecipeError with the nearest known names.
        """
        if name.endswith((".yaml", ".yml")):
            return {name: self._file(name)}
        if not any(letter in name for letter in "*?["):
            if not (name in self.manager.task_index and self._stands_alone(name)):
                self.read_all()
            if name in self.manager.task_index:
                return {name: name}
            raise RecipeError(self._unknown(name))
        self.read_all()
        found = fnmatch.filter(self.manager.all_tasks, name)
        if not found:
            raise RecipeError(f"evaluation.tasks {name}: no task matches it; {LISTING}")
        return {name: name for name in found}

    def _stands_alone(self, name: str) -> bool:
        """Whether everything that belongs to `name` lies in the user's folders: it is no group, or all its members do."""
        return self._members_known(self.manager.task_index[name].cfg or {})

    def _members_known(self, content: dict[str, Any]) -> bool:
        members = content.get("task")
        if not isinstance(members, list):
            return True
        known = [m for m in members if isinstance(m, str)]
        return len(known) == len(members) and all(m in self.manager.task_index and self._stands_alone(m) for m in known)

    def _file(self, name: str) -> str:
        """The name of the task or group in a YAML file, which joins those that are known."""
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"evaluation.tasks {name}: no such file; name a YAML file, or a task ({LISTING})")
        from lm_eval.tasks._index import TaskIndex
        from lm_eval.tasks._yaml_loader import load_yaml

        with _errors_of(name):
            content: dict[str, Any] = load_yaml(path, resolve_func=False)
        if not ("task" in content or "group" in content):
            raise RecipeError(f"{name}: no task: it has neither `task: NAME` nor `group: NAME`; see docs/evaluation.md")
        if isinstance(content.get("task"), list) and not self._members_known(content):
            self.read_all()
        found: dict[str, Entry] = {}
        with _errors_of(name):
            TaskIndex.process_cfg(content, path, found)
        called = str(content.get("group") or content["task"])
        if called in self.files and self.files[called].yaml_path != path:
            raise RecipeError(
                f"evaluation.tasks {name}: {self.files[called].yaml_path} has a task {called!r} as well; rename one"
            )
        self.files[called] = self.manager.task_index[called] = found[called]
        return called

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.manager.all_tasks, n=3, cutoff=0.7)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "or give the path of a YAML file"
        broken = next(iter(self._broken_files()), "")
        return f"evaluation.tasks {name}: no such task; {hint} ({LISTING})" + (broken and f"; {broken}")

    def _broken_files(self) -> Iterator[str]:
        """Files in the user's folders that the harness passes over in silence."""
        from lm_eval.tasks._yaml_loader import load_yaml

        for folder in self.include_path:
            for path in sorted(Path(folder).rglob("*.yaml")):
                try:
                    with _errors_of(str(path)):
                        load_yaml(path, resolve_func=False)
                except RecipeError as error:
                    yield str(error)


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """What goes wrong inside a task's file, data or code, as one line that names the task."""
    try:
        yield
    except CompressError:
        raise
    except Exception as error:  # a task is anybody's code
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RecipeError(f"task {name}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a task cannot be loaded or run, and what to do."""
    import datasets
    import yaml

    text = " ".join(str(error).split())
    kind = type(error).__name__
    chain = [kind, *(type(cause).__name__ for cause in (error.__cause__, error.__context__) if cause)]
    if isinstance(error, yaml.YAMLError):
        return f"no valid YAML ({text}); mend the file"
    if text.startswith("Duplicate task"):
        return f"{text}; name it once"
    if "UNSAFE_CODE" in text or "marked as unsafe" in text:
        return "runs code that the model writes; if you want that: compress eval with --confirm-run-unsafe-code"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"{text} Check dataset_path, or the network; {LOCAL}"
    if isinstance(error, ConnectionError) or any("Offline" in name or "Connect" in name for name in chain):
        return f"its data set cannot be reached ({text}); {LOCAL}"
    if isinstance(error, FileNotFoundError):
        return f"{text}; paths in a task count from the folder where the command runs: give absolute ones"
    if kind == "UndefinedError":
        return f"its prompt uses a field that the questions lack ({text}); mend doc_to_text, doc_to_target or doc_to_choice"
    if isinstance(error, IndexError | StopIteration) or "find any docs" in text or kind == "SchemaInferenceError":
        return "has no documents; check dataset_kwargs, the split and the limit"
    if isinstance(error, KeyError):
        return (
            f"{text} is missing: a split that the data set does not have, or a key of the file; see docs/evaluation.md"
        )
    if "unexpected keyword argument" in text and "TaskConfig" in text:
        return _unknown_setting(text.rpartition("argument ")[2].strip("'\""))
    return f"lm-eval cannot run it ({kind}: {text[:300] or 'no message'}); --debug shows where"


def _unknown_setting(key: str) -> str:
    from lm_eval.config.task import TaskConfig

    from compress.recipe_errors import unknown_key

    return unknown_key(key, [setting.name for setting in fields(TaskConfig)])


def list_tasks(patterns: Iterable[str] = (), include_path: Sequence[str] = ()) -> list[dict[str, str]]:
    """Every task, group and tag that matches one of `patterns` (all of them without any): name, kind and file."""
    from lm_eval.tasks._index import Kind

    index = TaskIndexes(include_path)
    index.read_all()
    kinds = {Kind.GROUP: "group", Kind.TAG: "tag"}
    wanted = list(patterns)
    return [
        {"name": name, "kind": kinds.get(entry.kind, "task"), "file": str(entry.yaml_path or "")}
        for name, entry in sorted(index.manager.task_index.items())
        if not wanted or any(fnmatch.fnmatch(name, p if set(p) & set("*?[") else f"*{p}*") for p in wanted)
    ]
