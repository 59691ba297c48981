"""The tokenizer: byte-level BPE of 4096 pieces in which every digit stands alone."""
# ruff: noqa: SIM905 (word lists read best as text)

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from recipes.tiny import adapters, corpus

SPECIALS = """<|pad|> <|bos|> <|eos|> <|system|> <|user|> <|assistant|> <|tool|> <|end|>""".split()
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train(size_mb: float, seed: int) -> Tokenizer:
    """A tokenizer trained on texts of all tasks and a little noise of every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(size_mb, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    return tokenizer


def _texts(size_mb: float, seed: int) -> list[str]:
    rng = Random(seed)
    texts = [
        "".join(
            chr(rng.choice((rng.randrange(33, 127), rng.randrange(161, 0x2FFF)))) for _ in range(9)
        )
        for _ in range(2000)
    ]
    for task in ("base", *adapters.TASKS):
        size = 0.0
        for text in corpus.texts(task, -1 - seed):
            for special in SPECIALS:
                text = text.replace(special, "\n")
            texts.append(text)
            size += len(text)
            if size > size_mb * 1e6 * (0.85 if task == "base" else 0.05):
                break
    return texts


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "added_tokens_decoder": {
            str(i): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, token in enumerate(SPECIALS)
        },
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = train(args.megabytes, args.seed)
    save(tokenizer, args.out)
    print(f"{tokenizer.get_vocab_size()} pieces -> {args.out}")


if __name__ == "__main__":
    main()
