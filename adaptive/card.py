"""The model card: what the exits are, what was certified, and how to use them."""

from __future__ import annotations

from types import SimpleNamespace

from adaptive import __version__
from adaptive.calibration import BY_TOKEN

_TEMPLATE = """---
library_name: adaptive
pipeline_tag: text-generation
tags: [early-exit]
{base}---

# Early exits for {name}

Exits at depths {depths} of {layers} blocks ({heads}), trained in mode `{mode}` with adaptive-exits {version}.

```python
from adaptive import EarlyExitModel
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = EarlyExitModel.from_pretrained("{{this folder or repository}}")
out = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=64, return_dict_in_generate=True)
print(out.trace.mean_depth)
```

## What is guaranteed

{guarantee}

Full depth is always there: `model.generate(..., policy=[float("inf")] * {count})`.
"""


def model_card(model, source: str | None, mode: str) -> str:
    """Returns the card of an `EarlyExitModel` as Markdown.

    Args:
        model: the model.
        source: where its backbone is loaded from; None if it lies beside the exits.
        mode: that it was trained in.
    """
    name = source or "the model in this folder"
    base = f"base_model: {source}\n" if source and not source.startswith((".", "/")) else ""
    return _TEMPLATE.format(
        base=base,
        name=name,
        depths=list(model.depths),
        layers=model.view.num_layers,
        mode=mode,
        version=__version__,
        heads=", ".join(model.exits.kinds),
        count=model.num_exits,
        guarantee=_guarantee(model.certificate),
    )


def _guarantee(certificate) -> str:
    if certificate is None:
        return "Nothing yet: the exits are not calibrated, and the model runs at full depth until they are."
    c = certificate
    asked = f"asked for: {c.epsilon}" if c.kind == "risk" else "of a compute budget"
    per = "token" if c.harm in BY_TOKEN else "answer"
    if c.bound == "crc":
        sure = "On average over draws of the prompts"
    else:
        sure = f"With probability at least {1 - c.delta:.10g}"
    return (
        f"{sure}, the expected {c.harm} harm per {per} is at most {c.certified:.4f} ({asked}; bound: {c.bound}, {c.n} "
        f"prompts, mean harm on them {c.mean:.4f}). It holds for prompts like those it was certified on, different "
        f"ones counting once each, greedy answers generated with `max_new_tokens={c.max_new_tokens}` and no penalties, "
        "and exactly these weights."
    )


_FOLDER = """---
pipeline_tag: text-generation
tags: [early-exit, onnx]
---

# {name}: early exits, {precision}, {megabytes:.0f} MB

A `{family}` model of {layers} blocks that leaves early where it may, at depths {depths}, exported by adaptive-exits.
It needs neither torch nor adaptive-exits:

```
pip install --no-deps -r requirements.txt   # all that it imports: 165 MB; without --no-deps 200 MB
python run.py "Once upon a time" --stats
python run.py --chat "Why is the sky blue?"
```

```python
from runtime import Runtime

runtime = Runtime.load(".")
for token in runtime.generate("Once upon a time", max_new_tokens=64):
    print(token.text, end="", flush=True)  # token.depth, token.score
```

`--policy certified` is the default, `full` never leaves early, `budget=0.8` spends about that share of the full depth's
FLOPs, on prompts like those surveyed, and promises nothing. Every file's digest is checked when the folder is loaded.

## What is guaranteed

{guarantee}
"""


def folder_card(record: dict, size: int) -> str:
    """Returns the card of an exported folder as Markdown.

    Args:
        record: its manifest.
        size: of its files, in bytes.
    """
    certificate = record["certificate"]
    guarantee = (
        "Nothing: the exported exits are not calibrated, and the default policy is the full depth. Export again with "
        "`--prompts`."
        if certificate is None
        else _guarantee(SimpleNamespace(**certificate))
        + " The full depth that judges harm is this folder's own, at this precision."
        + " No exit is open: leaving would save less time than asking for it takes."
        * all(threshold is None for threshold in certificate["thresholds"])
    )
    return _FOLDER.format(
        **{key: record[key] for key in ("name", "precision", "family", "layers")},
        megabytes=size / 1e6,
        depths=[exit["depth"] for exit in record["exits"]],
        guarantee=guarantee,
    )
