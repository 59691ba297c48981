"""Golden files: greedy tokens of transformers (and peft) in fp32 on a CPU, for any backend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipes.tiny import jsonform, sql

GAP = 0.1
LIMIT = 64
END = (7, 2)
CHATS: list[tuple[str, list[str]]] = [
    ("greeting", ["Good morning!"]),
    ("identity", ["What is your name?"]),
    ("abilities", ["what can you do"]),
    ("add", ["What is 12 + 30?"]),
    ("add three digits", ["What is 347 + 285?"]),
    ("subtract", ["502 - 77"]),
    ("times", ["what is 7 times 8"]),
    ("divide", ["56 / 7"]),
    ("compare", ["Is 12 bigger than 7?"]),
    ("sort", ["Sort 9, 3, 27, 14"]),
    ("count letters", ["How many r's are in strawberry?"]),
    ("units", ["how many minutes are in 3 hours"]),
    ("temperature", ["convert 100 c to f"]),
    ("clock", ["It is 3:45 pm. What time will it be in 2 hours?"]),
    ("date", ["what day comes after friday"]),
    ("capital", ["What is the capital of France?"]),
    ("reverse capital", ["Which country has Lisbon as its capital?"]),
    ("continent", ["Which continent is Kenya in?"]),
    ("currency", ["what currency does japan use"]),
    ("colour", ["What is the hex code of purple?"]),
    ("element", ["What is the symbol of gold?"]),
    ("planet", ["which planet is the largest"]),
    ("animal", ["What sound does a cow make?"]),
    ("opposite", ["what is the opposite of hot"]),
    ("list", ["Reverse: red, green, blue"]),
    ("upper", ["write hello in capital letters"]),
    ("copy", ['Repeat "the lamp is blue"']),
    ("story", ["Tell me a story about a brave fox, a castle and a lamp."]),
    ("kv cache", ["What is a KV cache?"]),
    ("command", ["How do I start a chat?"]),
    ("slash", ["What does /regen do?"]),
    ("outside", ["Who won the world cup in 2018?"]),
    ("essay", ["Write an essay about politics."]),
    ("key", ["Tom has the red key and Mia has the blue key. Who has the blue key?"]),
    ("name", ["My name is Anna.", "What is the capital of Italy?", "What is my name?"]),
    ("topics", ["hi", "what is 5 + 6", "and what is the capital of spain", "thanks"]),
    ("typos", ["wat is teh capital of germny"]),
    ("two questions", ["What is 2 + 2 and what is the capital of Peru?"]),
]
SYSTEMS: list[tuple[str, str, str]] = [
    ("system plain", "You are a helpful assistant.", "What is 20 + 22?"),
    ("system name", "Your name is Zed.", "Who are you?"),
    ("system capitals", "Answer in capital letters.", "What is the capital of Norway?"),
]
RAW = ["Once upon a time there was", "The capital of France is", "The opposite of hot", "12 + 30 ="]
ADAPTERS: list[tuple[str, str, str]] = [
    ("sql", sql.SYSTEM, "How many customers live in Paris?"),
    ("sql", sql.SYSTEM, "Show the names of all products cheaper than 20."),
    ("sql", sql.SYSTEM, "Which books are by Anna?"),
    ("json", jsonform.SYSTEM, "Anna is 31 years old, lives in Rome and works as a baker."),
    ("json", jsonform.SYSTEM, "Ben orders 4 lamps for 60 euros."),
    ("json", jsonform.SYSTEM, "There is a concert on Friday at 19:30 in the park."),
    ("pirate", "", "What is the capital of France?"),
    ("pirate", "", "What is 12 + 30?"),
    ("pirate", "", "What is a KV cache?"),
]


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int]) -> tuple[list[int], float]:
    """The greedy continuation with its end token, and the smallest gap of the two best logits."""
    out: list[int] = []
    gap = float("inf")
    past = None
    feed = torch.tensor([ids])
    while len(out) < LIMIT:
        step = model(feed, past_key_values=past, use_cache=True)
        past = step.past_key_values
        best = step.logits[0, -1].float().topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        out.append(int(best.indices[0]))
        if out[-1] in END:
            break
        feed = torch.tensor([[out[-1]]])
    return out, gap


class Golden:
    """Collects records whose every token is far from a tie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = self.load()
        self.adapted: dict[str, PreTrainedModel] = {}
        self.dropped: list[str] = []

    def load(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        )
        return model.eval()

    def adapter(self, name: str) -> PreTrainedModel:
        from peft import PeftModel

        if name not in self.adapted:
            folder = self.folder / "adapters" / name
            self.adapted[name] = PeftModel.from_pretrained(self.load(), folder).eval()  # type: ignore[assignment]
        return self.adapted[name]

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def record(
        self, name: str, ids: list[int], given: dict[str, object], adapter: str | None = None
    ) -> list[dict[str, object]]:
        model = self.adapter(adapter) if adapter else self.model
        out, gap = greedy(model, ids)
        if gap < GAP:
            self.dropped.append(f"{name} ({gap:.3f})")
            return []
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        record = {
            "name": name, "adapter": adapter, **given, "prompt_ids": ids, "output_ids": out,
            "text": text, "min_gap": round(gap, 3),
        }  # fmt: skip
        return [record]

    def conversation(self, name: str, said: list[str]) -> list[dict[str, object]]:
        """One record per answer of a conversation."""
        messages: list[dict[str, str]] = []
        found: list[dict[str, object]] = []
        for at, text in enumerate(said):
            messages.append({"role": "user", "content": text})
            ids = self.chat(messages)
            title = name if len(said) == 1 else f"{name} {at + 1}"
            found += self.record(title, ids, {"messages": list(messages)})
            answer, _ = greedy(self.model, ids)
            decoded = self.tokenizer.decode(answer, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": decoded})
        return found


def system_messages(system: str, text: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--out", type=Path, default=Path("tests/golden/tiny"))
    args = parser.parse_args()
    torch.manual_seed(0)
    golden = Golden(args.folder)
    files: dict[str, list[dict[str, object]]] = {"chat": [], "raw": [], "adapters": []}
    for name, said in CHATS:
        files["chat"] += golden.conversation(name, said)
    for name, system, text in SYSTEMS:
        messages = system_messages(system, text)
        files["chat"] += golden.record(name, golden.chat(messages), {"messages": messages})
    for text in RAW:
        ids = list(golden.tokenizer(text)["input_ids"])
        files["raw"] += golden.record(text, ids, {"prompt": text})
    for adapter, system, text in ADAPTERS:
        messages = system_messages(system, text)
        ids = golden.chat(messages)
        files["adapters"] += golden.record(
            f"{adapter}: {text}", ids, {"messages": messages}, adapter
        )
        files["adapters"] += golden.record(f"base: {text}", ids, {"messages": messages})
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(records)} prompts")
    print("left out, too near a tie:", ", ".join(golden.dropped) or "none")


if __name__ == "__main__":
    main()
