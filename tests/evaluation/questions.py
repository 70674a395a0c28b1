"""Tasks of every kind, written as a user would write them: YAML and questions as local files."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["stone", "river", "under", "the", "old", "bridge", "went", "slowly", "light", "and", "never", "came", "back"]
N_QUESTIONS = 11

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
GENERATE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 5}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{query}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
metadata: {{version: 1}}
"""
SHUFFLED = CHOICE + "process_docs: !function shuffling.shuffled\n"
SHUFFLING = """import random

def _shuffle(doc):
    choices = list(doc["choices"])
    random.shuffle(choices)
    return {"choices": choices, "gold": choices.index(doc["choices"][doc["gold"]])}

def shuffled(dataset):
    return dataset.map(_shuffle, load_from_cache_file=False)
"""
GROUP = """group: both
task: [first, second]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1}
"""


def write_questions(file: Path, seed: int = 0, n: int = N_QUESTIONS, words: int = 9) -> Path:
    picks = random.Random(seed)

    def some(k: int) -> str:
        return " ".join(picks.choice(WORDS) for _ in range(k))

    rows = [
        {"query": some(picks.randint(2, words)), "choices": [some(1), some(2), some(3)], "gold": picks.randrange(3)}
        for _ in range(n)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_tasks(folder: Path) -> Path:
    """Tasks first, second (multiple choice), shuffled, written (generated), flowing (rolling), and the group both."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_questions(folder / "a.jsonl", seed=1)
    other = write_questions(folder / "b.jsonl", seed=2, n=7)
    files = {
        "first": CHOICE.format(name="first", data=data),
        "second": CHOICE.format(name="second", data=other),
        "shuffled": SHUFFLED.format(name="shuffled", data=data),
        "written": GENERATE.format(name="written", data=data),
        "flowing": ROLLING.format(name="flowing", data=data),
        "both": GROUP,
    }
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "shuffling.py").write_text(SHUFFLING)
    return folder
