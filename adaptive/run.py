"""Generate text with an exported folder.

python run.py "Once upon a time"
python run.py --chat "Why is the sky blue?"
python run.py --chat                          a conversation, a line at a time
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

# Parsed before onnxruntime is imported: --help and a mistyped flag answer at once.
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("prompt", nargs="?", help="text to continue; - reads it from standard input")
PARSER.add_argument("--chat", action="store_true", help="the prompt is what a user says")
PARSER.add_argument("--system", help="what the system message says, with --chat")
PARSER.add_argument("--folder", default=str(Path(__file__).resolve().parent), help="exported folder; default: this one")
PARSER.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer; as certified, or 128")
PARSER.add_argument("--threads", type=int, metavar="N", help="threads that compute; default: the cores there are")
PARSER.add_argument("--policy", default="certified", help="full, certified (default), or budget=SHARE: about that "
                    "share of the FLOPs, on prompts like those surveyed")  # fmt: skip
PARSER.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0, the default, is certified")
PARSER.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the probability; 1")
PARSER.add_argument("--seed", type=int, help="of sampling")
PARSER.add_argument("--stats", action="store_true", help="depth of every token, tokens/s and FLOPs, at the end")
PARSER.add_argument("--json", action="store_true", help="one JSON object instead of text; implies --stats")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = PARSER.parse_args(argv)
    if args.prompt is None and (not args.chat or args.json):
        PARSER.error("give a prompt, or --chat without --json for a conversation")
    if args.threads is not None and args.threads < 1:
        PARSER.error(f"--threads {args.threads}: it must be at least 1")
    if args.system is not None and not args.chat:
        PARSER.error("--system is for --chat: give that, too")
    if sys.stdin is None and args.prompt in (None, "-"):
        PARSER.error("standard input is closed; give the prompt itself")
    from adaptive.sealed import read

    try:
        read(Path(args.folder))  # before numpy is imported, as one may have come into the folder
        from adaptive.runtime import Runtime

        began = time.perf_counter()
        runtime = Runtime.load(args.folder, args.threads)
        loaded = time.perf_counter() - began
        settle(args, runtime.manifest["certificate"])
        if args.prompt is None:
            return talk(runtime, args)
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        answer(runtime, first_messages(args, prompt) if args.chat else prompt, args, loaded)
    except (ValueError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 141
    return 0


def settle(args, certificate: dict | None) -> None:
    """Fills in what the command line leaves to the certificate, and says where it asks for more than that."""
    if args.policy == "certified" and certificate is None:
        args.policy = "full"
    most = 128 if certificate is None else certificate["max_new_tokens"]
    if args.max_new_tokens is None:
        args.max_new_tokens = most
    elif args.policy == "certified" and args.max_new_tokens > most:
        print(f"note: certified are answers of up to {most} tokens, not {args.max_new_tokens}", file=sys.stderr)


def first_messages(args, prompt: str) -> list[dict[str, str]]:
    """Returns the conversation that a prompt begins."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": prompt}]


def talk(runtime, args) -> int:
    """Holds a conversation until the input ends."""
    messages: list[dict[str, str]] = []
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print(flush=True)
            return 0
        if line.strip():
            messages += first_messages(args, line.strip())[bool(messages) and bool(args.system) :]
            messages.append({"role": "assistant", "content": answer(runtime, messages, args, None)})


def answer(runtime, asked, args, loaded: float | None) -> str:
    """Prints the answer to a text or a conversation, as it comes; returns it."""
    ids = runtime.texts.encode(asked) if isinstance(asked, str) else runtime.texts.chat(asked)
    settings = dict(policy=args.policy, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    began, tokens, first, last = time.perf_counter(), [], 0.0, 0.0
    for token in runtime.generate(ids, args.max_new_tokens, **settings):
        last = time.perf_counter() - began  # what finds that the answer ends is no token
        first = first or last
        tokens.append(token)
        if not args.json:
            print(token.text, end="", flush=True)
    text = "".join(token.text for token in tokens)
    found = stats(runtime, tokens, len(ids), first, last) if args.stats or args.json else {}
    if args.json:
        found |= {"load_seconds": loaded, "policy": args.policy, "ids": [token.id for token in tokens]}
        print(json.dumps({"text": text, **found}), flush=True)
    else:
        print(flush=True)
        if args.stats:
            print(report(found), file=sys.stderr)
    return text


def stats(runtime, tokens, prompt_tokens: int, first: float, seconds: float) -> dict:
    """Returns what an answer took, as plain numbers."""
    from adaptive.costs import Costs

    out = {"prompt_tokens": prompt_tokens, "tokens": len(tokens), "first_token_seconds": round(first, 4)}
    if len(tokens) > 1:
        out["tokens_per_second"] = round((len(tokens) - 1) / (seconds - first), 2)
    if tokens:
        trace, costs = runtime.trace(tokens, prompt_tokens), runtime.manifest["costs"]
        out |= {
            "mean_depth": round(trace.mean_depth, 2),
            "layers": trace.layers,
            "relative_flops": round(Costs(costs["shape"], costs["exits"]).price(trace).relative_flops, 4),
            "depths": [token.depth for token in tokens],
            "scores": [None if token.score != token.score else round(token.score, 4) for token in tokens],
        }
    return out


def report(found: dict) -> str:
    """Returns the figures of an answer, as people read them."""
    lines = [
        f"{found['tokens']} tokens after {found['prompt_tokens']}; first one in {found['first_token_seconds']:.3f} s"
        + (f"; then {found['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in found else "")
    ]
    if found["tokens"]:
        lines.append(f"mean depth {found['mean_depth']} of {found['layers']}, FLOPs {found['relative_flops']:.3f}")
        lines.append("depths " + " ".join(map(str, found["depths"])))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
