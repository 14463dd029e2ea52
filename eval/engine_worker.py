"""One inference engine in a process of its own, timed on request; started by eval/engines.py in that engine's venv.

python eval/engine_worker.py ENGINE MODEL THREADS

Reads one JSON object a line: {"prompt": [ids], "new": N, "exit": index or null, "share": of tokens that leave there};
answers with the seconds that the prompt and the N - 1 tokens after the first one took, and the process's memory in MB.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

START = time.perf_counter()


class Forced:
    """A policy under which an even share of the tokens leaves at one exit, whatever the gate says."""

    def __init__(self, exit, share):
        self.exit, self.share, self.seen = exit, share, 0.0

    def asks(self, exit):
        """Returns whether this is the exit."""
        return exit == self.exit

    def leaves(self, exit, scores, progress):
        """Returns whether it is this token's turn."""
        self.seen += self.share
        leave = self.seen >= 1
        self.seen -= leave
        return leave


def adaptive(model, threads):
    """An exported folder."""
    sys.path.insert(0, model)
    from runtime import Runtime
    from session import Session

    runtime = Runtime.load(model, threads)

    def run(prompt, new, exit, share, stamp):
        policy = runtime.policy("full") if exit is None else Forced(exit, share)
        session, token = Session(runtime, len(prompt) + new), None
        session.prefill(prompt, keep=False)
        for _ in range(new):
            token = session.step(policy, token).pick()
            stamp()

    return run


def genai(model, threads):
    """ONNX Runtime GenAI."""
    import onnxruntime_genai as og

    config = og.Config(model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    loaded = og.Model(config)

    def run(prompt, new, exit, share, stamp):
        params = og.GeneratorParams(loaded)
        params.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = og.Generator(loaded, params)
        generator.append_tokens(prompt)
        for _ in range(new):
            generator.generate_next_token()
            stamp()

    return run


def openvino(model, threads):
    """OpenVINO GenAI."""
    import numpy
    import openvino as ov
    import openvino_genai

    loaded = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def run(prompt, new, exit, share, stamp):
        ids = ov.Tensor(numpy.array([prompt], numpy.int64))
        mask = ov.Tensor(numpy.ones((1, len(prompt)), numpy.int64))
        config = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)

        class Stamps(openvino_genai.StreamerBase):
            def write(self, token):
                stamp()
                return openvino_genai.StreamingStatus.RUNNING

            def end(self):
                pass

        loaded.generate(openvino_genai.TokenizedInputs(ids, mask), config, Stamps())

    return run


def llama(model, threads):
    """llama.cpp."""
    import llama_cpp

    loaded = llama_cpp.Llama(model, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(prompt, new, exit, share, stamp):
        loaded.reset()
        loaded.eval(prompt)
        for _ in range(new):
            token = loaded.sample(temp=0.0, repeat_penalty=1.0)
            stamp()
            loaded.eval([token])

    return run


def transformers(model, threads):
    """transformers in bfloat16, eager."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(prompt, new, exit, share, stamp):
        ids, cache = torch.tensor([prompt]), None
        for _ in range(new):
            out = loaded(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            stamp()

    return run


def memory():
    """Returns (resident now, most ever) in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1), round(peak / 1e6, 1)


def main():
    """Serves requests until the input ends."""
    engine, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    run = {f.__name__: f for f in (adaptive, genai, openvino, llama, transformers)}[engine](model, threads)
    print(json.dumps({"load": time.perf_counter() - START, "rss": memory()[0]}), flush=True)
    for line in sys.stdin:
        request, stamps = json.loads(line), [time.perf_counter()]
        run(request["prompt"], request["new"], request["exit"], request["share"],
            lambda stamps=stamps: stamps.append(time.perf_counter()))  # fmt: skip
        rss, peak = memory()
        seconds = {"prefill": stamps[1] - stamps[0], "decode": stamps[-1] - stamps[1]}
        print(json.dumps({**seconds, "rss": rss, "peak": peak}), flush=True)


if __name__ == "__main__":
    main()
