"""Run by the tests in a process that cannot import compress: what does stock transformers make of these folders?

Reads jobs, one JSON object a line, prints one answer a line.

    {"do": "compare", "folder": …, "twin": …, "dequantize": bool}  ->  {"logits": difference, "weights": [differing]}
    {"do": "load", "folder": …, "class": "AutoModelForCausalLM"}   ->  {"error": message or null}
"""

import importlib.util
import json
import sys

import torch
import transformers

assert importlib.util.find_spec("compress") is None, "compress can be imported here: the test would prove nothing"


def compare(job: dict) -> dict:
    options = {}
    if job["dequantize"]:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"], **options)
    twin = transformers.AutoModelForCausalLM.from_pretrained(job["twin"])
    ids = torch.arange(2 * 24).view(2, 24)
    with torch.no_grad():
        difference = (model(ids).logits - twin(ids).logits).abs().max().item()  # makes the weights dense
    state = model.state_dict()
    weights = [name for name, weight in twin.state_dict().items() if not torch.equal(weight, state[name])]
    return {"logits": difference, "weights": weights}


def load(job: dict) -> dict:
    model_class = getattr(transformers, job["class"])
    model_class.from_pretrained(job["folder"])
    return {}


transformers.logging.set_verbosity_error()
for line in sys.stdin:
    job = json.loads(line)
    try:
        answer = {"error": None, **(compare(job) if job["do"] == "compare" else load(job))}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print("answer", json.dumps(answer), flush=True)
