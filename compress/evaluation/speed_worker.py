"""The process that holds one model for `compress.evaluation.speed`. Not for users.

    python -m compress.evaluation.speed_worker '{"folder": …, "device": …, "prompt_tokens": …, …}'

Says in a line of JSON what was loaded, then answers each line of its input: "round" with seconds, "memory" with bytes.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from compress.errors import CompressError


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not get between the answers

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        task = json.loads(sys.argv[1])
        timed = Timed(task)
        answer(timed.about)
        for line in sys.stdin:
            answer(timed.round() if line.strip() == "round" else timed.memory())
    except CompressError as error:
        answer({"error": type(error).__name__, "message": str(error)})
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        answer({
            "error": "CheckpointError",
            "message": f"{task['name']}: the whole model does not fit into memory with this batch and prompt; use smaller "
            f"ones, another --device, or a machine with more",
        })  # fmt: skip


def _out_of_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    )


class Timed:
    """A loaded model and a prompt."""

    def __init__(self, task: dict[str, Any]):
        import torch
        from transformers.utils import logging

        from compress.checkpoint.load import load
        from compress.pipeline.run import Machine, compute_device
        from compress.runtime.prepare import arithmetic, packed_bytes

        logging.disable_progress_bar()
        self.device = compute_device(Machine(task["device"]))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        _import_everything(task["folder"], task["trust_remote_code"])
        before = peak_resident_bytes()
        start = time.perf_counter()
        exact = task["arithmetic"] == "reference"
        how: dict[str, Any] = {"kernels": "reference"} if exact else {"activations": task["arithmetic"]}
        self.model: Any = load(
            task["folder"], device=self.device, dtype=task["dtype"], attn_implementation=task["attention"],
            trust_remote_code=task["trust_remote_code"], **how,
        )  # fmt: skip
        self._wait()
        seconds = time.perf_counter() - start
        self.new_tokens: int = task["new_tokens"]
        generator = torch.Generator().manual_seed(0)
        shape = (task["batch_size"], task["prompt_tokens"])
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.ids = torch.randint(vocabulary, shape, generator=generator).to(self.device)
        self.before = before
        self.about = {
            "load_seconds": seconds,
            "bytes_in_memory": sum(p.nbytes for p in self.model.parameters()) + packed_bytes(self.model),
            "arithmetic": runs_on(arithmetic(self.model)),
            "bytes_of_weight_files": sum(f.stat().st_size for f in Path(task["folder"]).glob("*.safetensors")),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "machine": {
                "device": str(self.device),
                "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        }

    def round(self) -> dict[str, float]:
        """Seconds of one prefill and one decode."""
        import torch

        from compress.runtime.cache import buffered_cache
        from compress.runtime.decode import chooser, decode

        cache = buffered_cache(self.model, self.ids.shape[1] + self.new_tokens)
        if cache is not None:
            seen: list[float] = []

            def passed(token: object) -> None:
                self._wait()
                seen.append(time.perf_counter())

            self._wait()
            start = time.perf_counter()
            decode(self.model, self.ids, self.new_tokens + 1, chooser(self.model, 0), cache=cache, on_token=passed)
            return {"prefill": seen[0] - start, "decode": seen[-1] - seen[0]}
        with torch.inference_mode():
            self._wait()
            start = time.perf_counter()
            out = self.model(self.ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            self._wait()
            filled = time.perf_counter()
            for _ in range(self.new_tokens):
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
            self._wait()
        return {"prefill": filled - start, "decode": time.perf_counter() - filled}

    def memory(self) -> dict[str, int | None]:
        """The peaks of this process, the rounds included; `before`: when everything but the model was loaded."""
        import torch

        on_gpu = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        return {
            "peak_resident_bytes": peak_resident_bytes(),
            "resident_bytes_before": self.before,
            "peak_cuda_bytes": on_gpu,
        }

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def runs_on(found: dict[str, Any]) -> str | None:
    """What runs the quantized linears, in words; None where a native kernel runs none."""
    if not found["linears"]:
        return None
    n_layers = f"{found['linears']} layers in {found['products']} products"
    return f"{found['kernels']} kernels, {found['activations']} activations, {n_layers}"


def _import_everything(folder: str, trust_remote_code: bool) -> None:
    """Python files are not what loading is timed for: build the model once without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def peak_resident_bytes() -> int:
    """The most memory this process ever had, pages of mapped files included.

    Not of getrusage, which counts what the process was forked from.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """As Linux knows it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
