"""Make training text without a data set: the model's own prompts, and its own answers to them.

    python train/text.py --config configs/demo_text.yaml
    python train/text.py --output runs/mine/text --train 2000 --texts notes/ wikitext:wikitext-2-raw-v1
    python train/text.py --output runs/mine/text --train 2000 --prompts my_prompts.jsonl

The chat template's opening of a user turn is enough for a chat model to write prompts, and then answers: text from the
distribution that the exits will meet. A model without a template goes on from its first token. In the output folder:

    train.safetensors          rows of prompt and sampled answer; only the answer is labelled
    prompts.json               disjoint prompts to select thresholds on, to certify on, to report on
    local.safetensors          rows of the texts named by `texts`, if any
    parts/KEY/                 finished batches of one model and its settings; an interrupted run takes what is there
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from adaptive.checked import Checked, load_config


@dataclass
class TextConfig(Checked):
    """What text to make, and how much.

    Attributes:
        output: folder to write to
        model: id or folder of the model whose text it is
        train: number of prompts whose answers become training rows
        select: number of prompts to choose thresholds on
        certify: number of prompts to certify on
        report: number of prompts to report on
        prompt_tokens: most tokens of a prompt
        answer_tokens: most tokens of an answer
        temperature: of the answers; 0 takes the most likely token, which is what exits learn most from
        batch_size: rows generated at once
        dtype: that the model runs in; auto = float32 on a CPU, as it was saved elsewhere. A CPU with AMX is twice as
            fast in bfloat16, and says other things now and then
        seed: equal seeds make equal text
        texts: local files or folders, or data set names, to add as training rows
        prompts: file, folder or data set of texts whose first `train` different ones are the prompts of the training
            rows; none = the model's own. The other parts are the model's own either way
    """

    output: str
    model: str = "smollm2-135m-instruct"
    train: int = 400
    select: int = 64
    certify: int = 400
    report: int = 48
    prompt_tokens: int = 48
    answer_tokens: int = 128
    temperature: float = 0.0
    batch_size: int = 64
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    texts: list[str] = field(default_factory=list)
    prompts: str | None = None

    def problems(self) -> list[str]:
        """One line for each fault."""
        return self._below(
            1, "train", "select", "certify", "report", "prompt_tokens", "answer_tokens", "batch_size"
        ) + self._below(0, "temperature", "seed")


if __name__ == "__main__":
    # Before the heavy imports: --help and a mistyped key answer at once.
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    CONFIG = load_config(TextConfig)

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaptive.config import ExitConfig
from adaptive.data import digest, load_tokens, read_texts, save_tokens
from adaptive.model import EarlyExitModel
from adaptive.outcomes import UNPENALIZED
from adaptive.pretrained import resolve
from adaptive.prompts import encode, left_pad
from adaptive.rows import load_rows
from adaptive.runs import write_json


def main(config: TextConfig) -> None:
    """Writes the text, or what is missing of it."""
    folder = Path(config.output)
    record = folder / "text.json"
    if made_with(record, config):
        print(f"{folder} is finished, with this configuration; nothing to do")
        return
    tokenizer = AutoTokenizer.from_pretrained(resolve(config.model))
    model = loaded(config)
    finished = folder / "parts" / key_of(model, tokenizer, config)
    given = given_prompts(config)
    own = config.train - len(given)
    wanted = own + config.select + config.certify + config.report
    prompts = given + own_prompts(model, tokenizer, config, finished, wanted)
    shares = np.cumsum([0, config.train, config.select, config.certify, config.report])
    parts = {
        name: prompts[start:end]
        for name, start, end in zip(("train", "select", "certify", "report"), shares[:-1], shares[1:], strict=True)
    }
    rows = own_answers(model, tokenizer, config, finished, parts["train"])
    save_tokens(folder / "train.safetensors", rows, {"model": config.model, "seed": config.seed})
    if config.texts:
        local = load_rows(config.texts, config.model, rows["input_ids"].shape[1])
        save_tokens(folder / "local.safetensors", {name: value.numpy() for name, value in local.items()})
    write_json(folder / "prompts.json", {name: parts[name] for name in ("select", "certify", "report")})
    write_json(record, asdict(config))
    print(
        f"{len(rows['input_ids'])} rows with {int((rows['labels'] >= 0).sum())} answer tokens, and "
        f"{wanted - own} prompts, are in {folder}"
    )


def given_prompts(config: TextConfig) -> list[str]:
    """Returns the prompts that the training rows were given; none where they are the model's own.

    Raises:
        ValueError: fewer than `train` different ones.
    """
    if config.prompts is None:
        return []
    texts = list(dict.fromkeys(read_texts(config.prompts)))
    if len(texts) < config.train:
        raise ValueError(
            f"`prompts`={config.prompts} has {len(texts)} different ones, `train` wants {config.train}; "
            "give more of them, or set `train` lower"
        )
    return texts[: config.train]


def key_of(model: EarlyExitModel, tokenizer, config: TextConfig) -> str:
    """Returns what finished batches are kept under: a digest of all that decides them but the prompts answered."""
    sizes = config.batch_size, config.prompt_tokens, config.answer_tokens, config.temperature, config.seed
    return short(digest(model.view.inner.state_dict()), opening_of(tokenizer), sizes)


def short(*values) -> str:
    """Returns a digest of plain values for the name of a file."""
    return digest(repr(values).encode())[:16]


def made_with(record: Path, config: TextConfig) -> bool:
    """Returns whether a file holds this configuration, wherever its folder was then; fields that it is too old to have
    were at their defaults."""
    if not record.exists():
        return False
    then = asdict(TextConfig(config.output)) | json.loads(record.read_text())
    return then | {"output": config.output} == asdict(config)


def loaded(config: TextConfig) -> EarlyExitModel:
    """Returns the model behind our own decoding loop, which is the faster one on a CPU."""
    backbone = AutoModelForCausalLM.from_pretrained(resolve(config.model), dtype=config.dtype)
    if torch.cuda.is_available():
        backbone.cuda()
    elif config.dtype == "auto":
        backbone.float()  # most CPUs multiply float32 several times faster than bfloat16
    return EarlyExitModel.from_backbone(backbone, ExitConfig(depths=[1], head="norm"))


def own_prompts(model: EarlyExitModel, tokenizer, config: TextConfig, folder: Path, wanted: int) -> list[str]:
    """Returns different prompts that the model writes when it is given the opening of a user turn."""
    opening = opening_of(tokenizer)
    prompts: dict[str, None] = {}
    batch = 0
    with tqdm(total=wanted, desc="prompts", unit="prompt") as bar:
        while len(prompts) < wanted:
            path = folder / f"prompts-{batch}.json"
            if not path.exists():
                texts = sample(
                    model,
                    tokenizer,
                    [opening] * config.batch_size,
                    config.prompt_tokens,
                    1.0,
                    seed=seed_of(config, 0, batch),
                )
                write_json(path, {"texts": [tokenizer.decode(t, skip_special_tokens=True).strip() for t in texts]})
            before = len(prompts)
            # A prompt of a word or two gives nothing to answer.
            prompts |= {text: None for text in json.loads(path.read_text())["texts"] if len(text.split()) > 3}
            bar.update(min(len(prompts), wanted) - before)
            batch += 1
            if batch > 20 + 10 * wanted // config.batch_size:
                raise ValueError(
                    f"after {batch} batches the model wrote only {len(prompts)} different prompts of the "
                    f"{wanted} wanted; ask for fewer, or give prompts of your own to train/calibrate.py"
                )
    # In the order in which they were written the common ones come first, and the parts must be alike.
    order = np.random.default_rng(config.seed).permutation(wanted)
    return [list(prompts)[i] for i in order]


def seed_of(config: TextConfig, kind: int, batch: int) -> int:
    """Returns a batch's seed. Rows count on from it, so neighbouring seeds must be far apart."""
    return int(np.random.SeedSequence([config.seed, kind, batch]).generate_state(1, np.uint64)[0] >> 2)


def opening_of(tokenizer) -> list[int]:
    """Returns the ids that a chat begins with up to where the user's words go, or the first token of any text."""
    if tokenizer.chat_template is None:
        return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    mark = "\N{SNOWMAN}"  # no white space, which many templates trim
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return tokenizer.encode(text[: text.index(mark)], add_special_tokens=False)


def own_answers(model: EarlyExitModel, tokenizer, config: TextConfig, folder: Path, prompts: list[str]) -> dict:
    """Returns training rows: prompt and sampled answer, right-padded; labels on the answer only."""
    encoded = encode(prompts, tokenizer)
    batches = range(0, len(encoded), config.batch_size)
    pieces = []
    for start in tqdm(batches, desc="answers", unit="batch"):
        chunk = encoded[start : start + config.batch_size]
        path = folder / f"answers-{start}-{short(chunk)}.safetensors"
        if not path.exists():
            answers = sample(
                model, tokenizer, chunk, config.answer_tokens, config.temperature, seed=seed_of(config, 1, start)
            )
            width = max(map(len, answers))
            ids = np.array([answer + [-1] * (width - len(answer)) for answer in answers], dtype=np.int32)
            save_tokens(path, {"input_ids": ids})
        answers = [row[row >= 0].tolist() for row in load_tokens(path)[0]["input_ids"]]
        pieces += [(prompt, answer) for prompt, answer in zip(chunk, answers, strict=True)]
    return as_rows(pieces, pad=tokenizer.pad_token_id or 0)


def as_rows(pieces: list[tuple[list[int], list[int]]], pad: int) -> dict[str, np.ndarray]:
    """Returns "input_ids", "labels" and "attention_mask" int32 [rows, tokens] of (prompt, answer) ids."""
    width = max(len(prompt) + len(answer) for prompt, answer in pieces)
    rows = {
        "input_ids": np.full((len(pieces), width), pad, np.int32),
        "labels": np.full((len(pieces), width), -100, np.int32),
        "attention_mask": np.zeros((len(pieces), width), np.int32),
    }
    for index, (prompt, answer) in enumerate(pieces):
        end = len(prompt) + len(answer)
        rows["input_ids"][index, :end] = prompt + answer
        rows["labels"][index, len(prompt) : end] = answer
        rows["attention_mask"][index, :end] = 1
    return rows


def sample(
    model: EarlyExitModel, tokenizer, prompts: list[list[int]], new: int, temperature: float, seed: int
) -> list[list[int]]:
    """Returns what the model says after each prompt, the end of the turn included if it came to one."""
    ids, mask = left_pad(prompts, tokenizer.pad_token_id or 0, model.device)
    settings = UNPENALIZED | {"do_sample": bool(temperature)}
    if temperature:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, seed=seed, return_dict_in_generate=True, **settings
    )
    answers = out.sequences[:, ids.shape[1] :]
    return [answer[: int(length)].tolist() for answer, length in zip(answers, out.trace.valid.sum(1), strict=True)]


if __name__ == "__main__":
    main(CONFIG)
