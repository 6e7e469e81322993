"""Makes a tiny stand-in of a base of the paper: its architecture with random weights, its chat format, its end tokens.

Number of heads, key-value heads, biases, tied embeddings and kind of rotary embedding are the original's; a head has 4
numbers, and there are 2 layers. The tokenizer is a byte-level BPE of a problem file's text with the family's special
tokens. A stand-in answers nothing right: it shows that an experiment loads, fits together and runs, on any machine.

    python scripts/make_stand_in.py qwen2.5-3b data/dapo_math_sample.jsonl models/stand-in-qwen2.5-3b
    pte train configs/paper-qwen2.5-3b.toml --model.path models/stand-in-qwen2.5-3b --model.device cpu --dry-run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from make_text_model import byte_level_bpe, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pte.tasks.problems import BOXED_INSTRUCTION, load_problems

HEAD_DIM = 4
LAYERS = 2
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
    "helpful assistant.<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<｜User｜>{% else %}<｜Assistant｜>"
    "{% endif %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Original:
    """What a stand-in takes over.

    Args:
        architecture: `qwen2` or `llama`.
        heads: Query heads.
        kv_heads: Key and value heads.
        tied: One matrix for embeddings and head.
        max_positions: Trained positions.
        special: Special tokens: the end token, the token for padding, the others.
        begin: Token that starts every text, or None.
        chat_template: Jinja.
    """

    architecture: str
    heads: int
    kv_heads: int
    tied: bool
    max_positions: int
    special: tuple[str, ...]
    begin: str | None
    chat_template: str


QWEN_SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
R1_SPECIAL = ("<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
ORIGINALS = {
    "qwen2.5-3b": Original("qwen2", 16, 2, True, 32768, QWEN_SPECIAL, None, CHATML),
    "qwen2.5-7b": Original("qwen2", 28, 4, False, 32768, QWEN_SPECIAL, None, CHATML),
    "r1-distill-llama-8b": Original("llama", 32, 8, False, 131072, R1_SPECIAL, R1_SPECIAL[2], R1),
}


def make_stand_in(name: str, texts: Sequence[str], directory: Path, *, vocab_size: int = 1024) -> None:
    """Writes model and tokenizer of a stand-in.

    Args:
        name: In `ORIGINALS`.
        texts: What the tokenizer is made from.
        directory: Where they go.
        vocab_size: Tokens at most.
    """
    original = ORIGINALS[name]
    end, pad = original.special[:2]
    bpe = byte_level_bpe([*texts, BOXED_INSTRUCTION], vocab_size=vocab_size, special=original.special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token=pad, bos_token=original.begin, padding_side="left"
    )
    tokenizer.chat_template = original.chat_template
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": original.heads * HEAD_DIM,
        "intermediate_size": 2 * original.heads * HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": original.heads,
        "num_key_value_heads": original.kv_heads,
        "max_position_embeddings": original.max_positions,
        "tie_word_embeddings": original.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if original.architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **shape))
        # The instruction-tuned Qwen2.5 stop at either.
        model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in (end, pad)]
    else:
        llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
        llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        model = LlamaForCausalLM(LlamaConfig(rope_parameters=llama3, **shape))
    model.save_pretrained(directory)
    if original.architecture == "qwen2":
        save_tokenizer(tokenizer, directory)
    else:
        tokenizer.save_pretrained(directory)


def main() -> None:
    """Builds and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ORIGINALS, help="the base that it stands for")
    parser.add_argument("problems", type=Path, help="JSONL file of problems")
    parser.add_argument("directory", type=Path, help="where model and tokenizer go")
    options = parser.parse_args()
    make_stand_in(options.name, [problem.problem for problem in load_problems(options.problems)], options.directory)
    print(f"stand-in of {options.name} in {options.directory}")


if __name__ == "__main__":
    main()
