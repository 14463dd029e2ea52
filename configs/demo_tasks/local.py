"""Data for the demo's tasks that is there without a hub: Python's own help texts, and the run's report prompts."""

import json
import re
from pydoc_data import topics

import datasets
from transformers import AutoTokenizer

from adaptive.pretrained import default_model

PROMPTS = "runs/demo/text/prompts.json"


def help_texts(**_):
    """Returns passages of about 120 words out of Python's help, one per topic."""
    texts = []
    for name in sorted(topics.topics):
        paragraphs = [" ".join(part.split()) for part in topics.topics[name].split("\n\n")]
        prose = [part for part in paragraphs if len(part.split()) > 25 and "::=" not in part]
        words = " ".join(prose).split()
        if len(words) >= 120:
            texts.append(" ".join(words[:120]))
    return {"test": datasets.Dataset.from_dict({"text": texts})}


def last_words(**_):
    """Returns the same passages, cut before a word of at least five letters that they had used before."""
    contexts, wanted = [], []
    for text in help_texts()["test"]["text"]:
        words = text.split()
        for end in range(len(words) - 1, 60, -1):
            if re.fullmatch(r"[a-z]{5,}", words[end]) and words[end] in words[:end]:
                contexts.append(" ".join(words[:end]))
                wanted.append(words[end])
                break
    return {"test": datasets.Dataset.from_dict({"context": contexts, "word": wanted})}


def report_prompts(**_):
    """Returns the prompts that the run keeps for its report, in the chat template of the demo's model: the other tasks
    here go without one."""
    with open(PROMPTS, encoding="utf-8") as file:
        prompts = json.load(file)["report"]
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return {"test": datasets.Dataset.from_dict({"prompt": texts})}


def fresh_words(references, predictions):
    """Returns the share of word triples that an answer has not used before: exits that go wrong repeat themselves."""
    words = predictions[0].split()
    triples = list(zip(words, words[1:], words[2:]))
    return len(set(triples)) / len(triples) if triples else 0.0
