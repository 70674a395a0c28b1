"""From text to rows of tokens: every kind of file, seeded and spread, and what is said when there is nothing to read."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress import shipped
from compress.calibration import documents as docs
from compress.calibration.data import check_data, load_text, load_tokenizer, load_tokens
from compress.errors import CheckpointError, RecipeError
from compress.recipe import Calibration, Evaluation

TEXTS = [f"Document {i}. " + "The cat sat on the mat, and the dog looked on. " * (3 + i % 5) for i in range(40)]
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def spec(data, **fields):
    return Calibration(data=data, **{"samples": 4, "length": 16, **fields})


def read(data, seed=None, **fields):
    source = docs.find_text(Calibration(data=str(data), **fields), "calibration")
    return list(docs.documents(source, seed))


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(params=["jsonl", "json", "parquet"])
def data_file(request, tmp_path):
    """TEXTS, in each kind of file that has documents."""
    path = tmp_path / f"data.{request.param}"
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    if request.param == "jsonl":
        write_lines(path, records)
    elif request.param == "json":
        path.write_text(json.dumps(records))
    else:
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)
    return path


# --- reading ---


def test_documents_come_in_order_without_a_seed_and_all_of_them_with_one(data_file, monkeypatch):
    monkeypatch.setattr(docs, "PIECE_BYTES", 500)
    assert read(data_file) == TEXTS
    shuffled = read(data_file, seed=1)
    assert sorted(shuffled) == sorted(TEXTS)
    assert shuffled != TEXTS
    assert shuffled == read(data_file, seed=1) != read(data_file, seed=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("aé漢𝄞 \n\n"), min_size=1, max_size=300), piece=st.integers(8, 50))
def test_a_text_is_cut_without_loss(tmp_path, text, piece):
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docs, "PIECE_BYTES", piece)
        patch.setattr(docs, "BORDER_BYTES", 8)
        assert "".join(read(path)) == text


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.text(max_size=20), min_size=1, max_size=12), piece=st.integers(1, 60))
def test_every_line_is_read_once(tmp_path, records, piece):
    path = tmp_path / "t.jsonl"
    write_lines(path, [{"text": r} for r in records])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docs, "PIECE_BYTES", piece)
        assert read(path) == records
        assert sorted(read(path, seed=3)) == sorted(records)


def test_few_rows_of_a_large_file_read_little_of_it(tmp_path, shipped_tokenizer, monkeypatch):
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"Call me Ishmael. Some years ago, never mind how long. \n" * 20_000)
    pieces = []
    original = docs._text_piece
    monkeypatch.setattr(docs, "_text_piece", lambda *a: pieces.append(a[1]) or original(*a))
    load_tokens(spec(str(path), samples=8, length=256), shipped_tokenizer)
    assert len(pieces) * docs.PIECE_BYTES < path.stat().st_size / 100
    assert max(pieces) - min(pieces) > path.stat().st_size / 3  # and from all over it


def test_globs_and_several_files(tmp_path):
    for i in range(3):
        write_lines(tmp_path / f"{i}.jsonl", [{"text": f"file {i}"}])
    assert read(tmp_path / "*.jsonl") == ["file 0", "file 1", "file 2"]
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert load_text(Evaluation(data=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])) == "one\n\ntwo\n\n"


# --- rows ---


def test_rows_are_the_same_each_time_and_other_with_another_seed(data_file, shipped_tokenizer):
    rows = load_tokens(spec(str(data_file)), shipped_tokenizer)
    assert rows.fingerprint() == load_tokens(spec(str(data_file)), shipped_tokenizer).fingerprint()
    assert rows.fingerprint() != load_tokens(spec(str(data_file), seed=1), shipped_tokenizer).fingerprint()
    assert rows.lengths == [16] * 4
    assert all(row.dtype == torch.long and row.dim() == 1 for row in rows.rows)


def test_loading_leaves_the_global_generators_alone(shipped_tokenizer):
    torch.manual_seed(0), random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    load_tokens(spec("shipped", packing="padded"), shipped_tokenizer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_packed_rows_are_windows_of_the_text(shipped_tokenizer):
    rows = load_tokens(spec("shipped", samples=30, length=200), shipped_tokenizer)
    text = shipped.calibration_text_path().read_text(encoding="utf-8")
    inside = sum(shipped_tokenizer.decode(row[5:-5]) in text for row in rows.rows)
    assert inside > 15  # the others go over the border of two pieces
    assert len({tuple(row.tolist()) for row in rows.rows}) == 30


def test_padded_rows_are_documents_cut_off(data_file, shipped_tokenizer):
    rows = load_tokens(spec(str(data_file), packing="padded", length=50, samples=40), shipped_tokenizer)
    whole = {tuple(shipped_tokenizer(text)["input_ids"][:50]) for text in TEXTS}
    assert {tuple(row.tolist()) for row in rows.rows} == whole
    assert min(rows.lengths) < max(rows.lengths) == 50


def test_documents_keep_their_special_tokens_and_text_files_get_none(tmp_path, shipped_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(shipped.model_path())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    path = write_lines(tmp_path / "d.jsonl", [{"text": t} for t in TEXTS])
    rows = torch.cat(load_tokens(spec(path, samples=8, length=64), tokenizer).rows)
    assert (rows == tokenizer.bos_token_id).sum() >= 4
    rows = torch.cat(load_tokens(spec("shipped", samples=8, length=64), tokenizer).rows)
    assert (rows == tokenizer.bos_token_id).sum() == 0


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_conversations_go_through_the_template(tmp_path, form):
    tokenizer = load_tokenizer(shipped.model_path())
    tokenizer.chat_template = TEMPLATE
    if form == "messages":
        talk = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "Nobody."}]
    else:
        talk = [{"from": "human", "value": "Who is there?"}, {"from": "gpt", "value": "Nobody."}]
    path = write_lines(tmp_path / "chat.jsonl", [{"id": i, form: talk} for i in range(20)])
    rows = load_tokens(spec(path, chat=True, packing="padded", length=64), tokenizer)
    assert {tokenizer.decode(row) for row in rows.rows} == {"[user]Who is there?[assistant]Nobody."}


# --- perplexity text ---


def test_a_text_file_is_used_as_it_is():
    heldout = shipped.heldout_text_path().read_text(encoding="utf-8")
    assert load_text(Evaluation()) == heldout
    head = load_text(Evaluation(max_tokens=100))
    assert heldout.startswith(head)
    assert len(head) < len(heldout)


def test_rows_are_joined_as_the_literature_joins_wikitext(tmp_path):
    rows = ["", " = Title = \n", "", " First line. \n", " Second. \n"]
    path = write_lines(tmp_path / "wiki.jsonl", [{"text": row} for row in rows])
    assert load_text(Evaluation(data=path)) == "\n\n".join(rows)


def test_wikitext_raw_is_read_byte_for_byte(shared):
    path = shared / "data" / "wikitext-2" / "wiki.test.raw"
    assert load_text(Evaluation(data=str(path))).encode() == path.read_bytes()


# --- refusals ---


def refuse(data, tokenizer=None, error=RecipeError, **fields):
    with pytest.raises(error) as caught:
        if tokenizer is None:
            check_data(Calibration(data=data, **fields), "calibration")
        else:
            load_tokens(spec(data, **fields), tokenizer, vocab_size=4096)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_not_there_or_of_no_use(tmp_path):
    assert "no file" in refuse(str(tmp_path / "missing.jsonl"))
    assert "no file" in refuse("folder/missing.txt")
    assert "no file" in refuse(str(tmp_path / "*.jsonl"))
    assert "is a folder" in refuse(str(tmp_path))
    (tmp_path / "x.csv").write_text("a,b")
    assert "unknown kind of file '.csv'; known: .txt" in refuse(str(tmp_path / "x.csv"))
    (tmp_path / "empty.txt").touch()
    assert "is empty" in refuse(str(tmp_path / "empty.txt"))
    (tmp_path / "blank.txt").write_text(" \n\n ")
    assert "holds no text" in refuse(str(tmp_path / "blank.txt"))
    (tmp_path / "latin.txt").write_bytes("café au lait".encode("latin-1"))
    assert "not UTF-8 text (byte 3)" in refuse(str(tmp_path / "latin.txt"))
    assert "calibration.data: is missing" in refuse(None)
    assert "--set calibration.data=shipped" in refuse(None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "{\n", "line at byte 0: not JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1]\n', None),
        ("a.jsonl", "[1]\n", "expected objects"),
        ("a.jsonl", '{"text": 3}\n', "expected text, got 3"),
        ("a.json", '{"text": "x"}', "expected a list"),
        ("a.json", "[", "one object per line is called .jsonl"),
        ("a.parquet", "PAR1 but not really", "not a Parquet file"),
    ],
)
def test_damaged_files(tmp_path, shipped_tokenizer, name, content, says):
    path = tmp_path / name
    path.write_text(content)
    if says is None:  # the first record is fine: found when the rows are loaded
        assert "expected objects" in refuse(str(path), shipped_tokenizer)
    else:
        assert says in refuse(str(path))


def test_a_missing_column_is_told_which_there_are(tmp_path, data_file):
    assert "has no column 'txt'; columns: id, text" in refuse(str(data_file), column="txt")
    path = write_lines(tmp_path / "odd.jsonl", [{"id": 1, "words": "some text"}])
    assert "name one of its columns: id, words" in refuse(path)
    check_data(Calibration(data=path, column="words"), "calibration")
    path = write_lines(tmp_path / "chat.jsonl", [{"id": 1, "messages": [{"role": "user", "content": "x"}]}])
    assert "calibration.chat=true" in refuse(path)
    assert "calibration.chat=true" in refuse(path, column="messages")
    assert "columns: id, messages" in refuse(path, column="words", chat=True)


def test_chat_needs_a_template_and_conversations(tmp_path, shipped_tokenizer):
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert "no chat template" in refuse(path, shipped_tokenizer, chat=True)
    assert "is plain text" in refuse("shipped", chat=True)
    tokenizer = load_tokenizer(shipped.model_path())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in refuse(path, tokenizer, chat=True)
    path = write_lines(tmp_path / "text.jsonl", [{"messages": "plain text"}])
    assert "calibration.chat=false" in refuse(path, chat=True)


def test_too_little_text_is_told_how_much_there_is(tmp_path, shipped_tokenizer):
    path = write_lines(tmp_path / "few.jsonl", [{"text": text} for text in TEXTS])
    message = refuse(path, shipped_tokenizer, samples=10_000)
    n_rows = int(message.partition("samples=")[2].partition(",")[0])
    assert len(load_tokens(spec(path, samples=n_rows), shipped_tokenizer).rows) == n_rows
    assert "gives 0 rows of 100000 tokens" in refuse(path, shipped_tokenizer, length=100_000)
    assert "gives 40 documents, 41 are wanted" in refuse(path, shipped_tokenizer, samples=41, packing="padded")


def test_another_models_tokenizer_is_refused(shipped_tokenizer):
    with pytest.raises(CheckpointError, match="another model's tokenizer"):
        load_tokens(spec("shipped"), shipped_tokenizer, vocab_size=100)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_told_what_else_there_is():
    message = refuse("owner/data", split="train_sft", subset="en")
    assert "'owner/data' (split 'train_sft', subset 'en') cannot be loaded from the Hub" in message
    assert "--set calibration.data=FILE.jsonl" in message
    assert "--set calibration.data=shipped" in message
    with pytest.raises(RecipeError, match="split 'test'.*--set evaluation.data=shipped"):
        check_data(Evaluation(data="owner/data"), "evaluation")


def test_only_what_needs_them_imports_datasets_and_transformers():
    code = (
        "import sys; from compress.calibration.data import check_data, load_text; from compress.recipe import Evaluation;"
        "check_data(Evaluation(), 'evaluation'); load_text(Evaluation());"
        "print([m for m in ('transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
