"""Makes a small Qwen2-architecture model and a BPE tokenizer from the text of a problem file.

No solutions are in the problem files, so the model only learns to continue problem texts for a few steps: it answers
nothing right and is there to exercise the whole pipeline on real problems. Nothing of the data is kept but the
tokenizer's merges and the weights.

    python scripts/make_text_model.py data/gsm8k_train.jsonl models/text-tiny
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pte.tasks.problems import BOXED_INSTRUCTION, load_problems, render_prompt

SPECIAL = ("<pad>", "<bos>", "<eos>")


def byte_level_bpe(texts: list[str], *, vocab_size: int, special: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of the given texts, whose first tokens are the special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer(texts: list[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the given texts, with pad, begin and end tokens."""
    tokenizer = byte_level_bpe(texts, vocab_size=vocab_size, special=SPECIAL)
    begin = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves a tokenizer that AutoTokenizer loads as it is: without a map, Transformers takes Qwen2's own class."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, None]}
    path.write_text(json.dumps(settings, indent=2))


def main() -> None:
    """Builds, trains a little, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path, help="JSONL file of problems")
    parser.add_argument("directory", type=Path, help="where model and tokenizer go")
    parser.add_argument("--steps", type=int, default=200, help="language-model steps on the problem texts")
    parser.add_argument("--batch", type=int, default=16, help="problems in a step")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    problems = load_problems(options.problems)
    texts = [problem.problem for problem in problems]
    tokenizer = make_tokenizer([*texts, BOXED_INSTRUCTION], vocab_size=options.vocab_size)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        rows = torch.randint(len(texts), (options.batch,), generator=generator).tolist()
        prompts = [render_prompt(texts[row], tokenizer, instruction=BOXED_INSTRUCTION) for row in rows]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step + 1}/{options.steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s")
    model.save_pretrained(options.directory)
    save_tokenizer(tokenizer, options.directory)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens in {options.directory}")


if __name__ == "__main__":
    main()
