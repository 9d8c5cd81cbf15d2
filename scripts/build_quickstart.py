"""Builds the quickstart model and data: word problems, tokenizer and a tiny pre-trained Llama.

    python scripts/build_quickstart.py [--output mftctl/data/quickstart] [--only-data]

Writes `data/{train,validation,test,retained,preferences,preferences_validation}.jsonl` and `model/` to the output
folder. The data are the same on every
machine; the checkpoint depends on the order of floating-point operations in the machine's matrix products. Takes about
6 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_problems import Preference, Problem, json_lines, quickstart_data

SEED = 0
VOCABULARY_TOKENS = 1024
BATCH_PROBLEMS = 64
LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.05
LABEL_IGNORED = -100
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)


def write_data(folder: Path, splits: Mapping[str, Sequence[Problem | Preference]]) -> None:
    """Writes one JSON Lines file per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        (folder / f"{name}.jsonl").write_text(json_lines(part), encoding="utf-8", newline="\n")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level subword tokenizer with whole words and single digits (with or without a space before) as tokens."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 8 layers and about 0.9 million parameters in fp32, seeded."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, corpus: list[Problem]) -> list[tuple[list[int], int]]:
    """Token IDs of each problem and the number of prompt tokens."""
    prompts = [f"<|user|>{problem.question}<|end|><|assistant|>" for problem in corpus]
    answers = [f"{problem.answer}<|end|>" for problem in corpus]
    pairs = zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True)
    return [(prompt + answer, len(prompt)) for prompt, answer in pairs]


def batches(encoded: list[tuple[list[int], int]], pad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (input_ids, labels) of problems of similar length, in random order; the prompt has no loss."""
    rng = random.Random(SEED)
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index][0]), rng.random()))
    groups = [order[start : start + BATCH_PROBLEMS] for start in range(0, len(order), BATCH_PROBLEMS)]
    rng.shuffle(groups)
    result = []
    for group in groups:
        longest = max(len(encoded[index][0]) for index in group)
        input_ids = torch.full((len(group), longest), pad)
        labels = torch.full((len(group), longest), LABEL_IGNORED)
        for row, index in enumerate(group):
            tokens, prompt_tokens = encoded[index]
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt_tokens : len(tokens)] = torch.tensor(tokens[prompt_tokens:])
        result.append((input_ids, labels))
    return result


def pretrain(model: LlamaForCausalLM, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Trains the model in place, one step per batch, with warm-up and a cosine schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warmup_steps = max(1, int(WARMUP_SHARE * len(steps)))
    model.train()
    started_seconds, running = time.perf_counter(), 0.0
    for step, (input_ids, labels) in enumerate(steps):
        progress = max(0, step - warmup_steps) / (len(steps) - warmup_steps)
        scale = min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        # Rows are right-padded, and in a causal model real tokens never attend to the padding.
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 49 or step + 1 == len(steps):
            print(
                f"step {step + 1}/{len(steps)}  loss {running:.4f}  {time.perf_counter() - started_seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    """Builds everything in the output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "mftctl" / "data" / "quickstart")
    parser.add_argument("--only-data", action="store_true", help="write no model")
    arguments = parser.parse_args()
    output: Path = arguments.output
    splits, pairs, corpus = quickstart_data()
    write_data(output / "data", {**splits, **pairs})
    if arguments.only_data:
        return
    train = splits["train"]
    tokenizer = build_tokenizer(
        [text for problem in corpus[:10_000] + 4 * train for text in (problem.question, problem.answer)]
    )
    model = build_model(tokenizer)
    print(f"{len(corpus)} problems, {len(tokenizer)} tokens in the vocabulary, {model.num_parameters()} parameters")
    pretrain(model, batches(encode(tokenizer, corpus), tokenizer.pad_token_id))
    model.generation_config = GenerationConfig(
        max_new_tokens=64, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    model.to(torch.bfloat16).save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")


if __name__ == "__main__":
    main()
