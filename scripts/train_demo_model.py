"""Train a small Llama from text, of the kind that ships with the package: tokenizer, model, held-out perplexity, README.

    python scripts/train_demo_model.py --train novels/*.txt --heldout heldout/*.txt --out novels6m --minutes 60

Rows of `context` tokens are drawn without replacement from the joined text. Muon updates the matrices of the blocks, AdamW
everything else; the learning rates stay for the first 30 % of the run and then fall linearly to zero. The limit is
--minutes or --tokens, whichever is reached first. Held-out files are never trained on, nor is the tokenizer.

Muon: K. Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks": the momentum of a matrix is replaced
by the nearest orthogonal matrix, found by five steps of a Newton-Schulz iteration.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}  # ids 0, 1, 2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose slope at 0 is large; Jordan et al., "design considerations"
STEADY = 0.3  # share of the run before the learning rates fall
LOG_EVERY = 20  # steps


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, which can spell any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts as one stream of ids [tokens]."""
    return torch.tensor([i for text in texts for i in tokenizer(text, verbose=False)["input_ids"]], dtype=torch.long)


def batches(ids: Tensor, context: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches [batch, context]; every epoch cuts the stream at another offset and visits each row once."""
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        rows = ids[offset : offset + (len(ids) - offset) // context * context].view(-1, context)
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - batch + 1, batch):
            yield rows[order[start : start + batch]]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices [out, in]."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(buffer, group["momentum"]))  # Nesterov
                parameter.add_(update, alpha=-group["lr"] * max(1.0, update.shape[0] / update.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of `matrix` [out, in]: singular values end in 0.7 … 1.2."""
    a, b, c = NEWTON_SCHULZ
    flipped = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if flipped else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if flipped else x).float()


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.context,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: Tensor, options: argparse.Namespace) -> tuple[int, float]:
    """Train until the limit. Returns: tokens seen, mean loss of the last steps."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    muon = Muon(matrices, lr=options.lr_muon)
    adamw = torch.optim.AdamW(others, lr=options.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    generator = torch.Generator().manual_seed(options.seed)
    started, tokens, losses = time.monotonic(), 0, [math.log(options.vocabulary)]
    for step, rows in enumerate(batches(ids, options.context, options.batch, generator)):
        elapsed = time.monotonic() - started
        done = max(tokens / options.tokens, elapsed / (60 * options.minutes))
        if done >= 1:
            break
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * min(1.0, (1 - done) / (1 - STEADY))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        tokens += rows.numel()
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            recent = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
            print(f"step {step}: {tokens:,} tokens, {elapsed:.0f} s, loss {recent:.3f}", file=sys.stderr)
    recent = sum(losses[-LOG_EVERY:]) / len(losses[-LOG_EVERY:])
    print(f"end: {tokens:,} tokens, {time.monotonic() - started:.0f} s, loss {recent:.3f}", file=sys.stderr)
    return tokens, recent


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor, context: int) -> float:
    """Per token, windows of `context` that do not overlap, the first token of each unscored."""
    model.eval()
    rows = ids[: len(ids) // context * context].view(-1, context)
    total = sum(float(model(row, labels=row, use_cache=False).loss) * len(row) for row in rows.split(32))
    return math.exp(total / len(rows))


def readme(options: argparse.Namespace, n_parameters: int, tokens: int, minutes: float, loss: float, ppl: float) -> str:
    return f"""# {options.out.name}

A Llama of {n_parameters:,} parameters (hidden {options.hidden}, MLP {options.mlp}, {options.layers} blocks, \
{options.heads} heads / {options.kv_heads} KV heads, vocabulary {options.vocabulary}, untied head, context \
{options.context}, bf16), trained from scratch by `scripts/train_demo_model.py`.

Training: {tokens:,} tokens in {minutes:.1f} minutes on {options.threads} threads; rows of {options.context} tokens, batch \
{options.batch}; Muon (lr {options.lr_muon}) for the matrices of the blocks, AdamW ({options.lr_adamw}) for the rest, bf16 \
autocast, linear decay over the last {1 - STEADY:.0%}. Seed {options.seed}. Text: {len(options.train)} files; byte-level BPE \
trained on the same; {len(options.heldout)} files left out entirely. Final training loss {loss:.2f}.

Perplexity per token on the files left out, windows of {options.context}: {ppl:.2f}.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, nargs="+", required=True, help="text files, UTF-8")
    add("--heldout", type=Path, nargs="+", required=True, help="text files that measure the result")
    add("--out", type=Path, required=True, help="folder of the model")
    add("--minutes", type=float, default=60, help="time limit of the training [default: 60]")
    add("--tokens", type=float, default=math.inf, help="limit on the tokens trained on [default: none]")
    for name, default in {
        "vocabulary": 4096,
        "hidden": 256,
        "mlp": 640,
        "layers": 6,
        "heads": 8,
        "kv-heads": 4,
    }.items():
        add(f"--{name}", type=int, default=default, help=f"[default: {default}]")
    add("--context", type=int, default=256, help="tokens in a row [default: 256]")
    add("--batch", type=int, default=24, help="rows in a step [default: 24]")
    add("--lr-muon", type=float, default=0.02, help="[default: 0.02]")
    add("--lr-adamw", type=float, default=3e-3, help="[default: 0.003]")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads(), help="[default: the cores]")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts = [path.read_text(encoding="utf-8") for path in options.train]
    tokenizer = train_tokenizer(texts, options.vocabulary)
    ids = tokenize(texts, tokenizer)
    if len(ids) < (options.batch + 1) * options.context:
        sys.exit(
            f"{len(ids):,} tokens do not fill one batch of {options.batch} rows of {options.context}: give more text"
        )
    model = make_model(options)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {len(ids):,} tokens of text", file=sys.stderr)
    started = time.monotonic()
    tokens, loss = train(model, ids, options)
    minutes = (time.monotonic() - started) / 60
    model = model.to(torch.bfloat16)  # measured as it is stored
    heldout = tokenize([path.read_text(encoding="utf-8") for path in options.heldout], tokenizer)
    ppl = perplexity(model.float(), heldout, options.context)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "README.md").write_text(readme(options, n_parameters, tokens, minutes, loss, ppl), encoding="utf-8")
    print(f"{options.out}: held-out perplexity {ppl:.2f}")


if __name__ == "__main__":
    main()
