"""Our heads in vLLM: the same acceptance length as here, and a loop that learns while it serves.

    python -m bench.vllm_loop compare T --draft HEAD      the same requests there and here
    python -m bench.vllm_loop record T --into DIR         answers, their hidden states into DIR
    python -m bench.vllm_loop serve T --out OUT           takes every new version while it serves

By hand, with vLLM (docs/engines.md); T is the byte-level target as a directory.  `record` and
`serve` run beside `python -m formats.engine learn`, each in a process of its own.  Answers at
temperature 0 are compared with those of the target here, without a draft.
"""

import argparse
import time
from pathlib import Path

import torch

from aurora import Arm
from formats.huggingface import load_draft, load_target
from generation import Request
from support.command import command
from support.corpus import prompts_of
from support.draft_length import FixedLength

AT_ONCE = 4  # requests that an engine runs
COUNTS = "drafts", "draft_tokens", "accepted_tokens"


class Engine:
    """vLLM, stepped by hand so that a swap falls between two steps of requests that run."""

    def __init__(self, args, **more):
        from vllm import LLM

        self.args = args
        self.llm = LLM(
            args.target, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
            max_model_len=512, max_num_seqs=AT_ONCE, enable_prefix_caching=False,
            enable_chunked_prefill=False, max_num_batched_tokens=1024, disable_log_stats=False,
            **more)

    def answers(self, prompts, between=lambda: None, **extra):
        """Yields the number of a prompt and its answer, in the order in which they end."""
        from vllm import SamplingParams

        engine, waiting = self.llm.llm_engine, list(enumerate(prompts))[::-1]
        while waiting or engine.has_unfinished_requests():
            while waiting and engine.get_num_unfinished_requests() < AT_ONCE:
                i, ids = waiting.pop()
                params = SamplingParams(
                    temperature=self.args.temperature, max_tokens=self.args.new, seed=i,
                    ignore_eos=True, detokenize=False, **extra)
                engine.add_request(str(i), {"prompt_token_ids": ids}, params)
            for done in engine.step():
                if done.finished:
                    yield int(done.request_id.split("-")[0]), list(done.outputs[0].token_ids)
            between()

    def counts(self):
        """Rounds that drafted, tokens drafted, tokens accepted, since the engine began."""
        found = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        return torch.tensor([found.get(f"vllm:spec_decode_num_{name}", 0) for name in COUNTS])


def speculative(args, head):
    config = {"method": "eagle3", "model": str(head), "num_speculative_tokens": args.K,
              "rejection_sample_method": "block"}
    return config | ({"draft_sample_method": "probabilistic"} if args.temperature else {})


def length(counts):
    """Acceptance length, as vLLM defines it."""
    return 1 + (counts[2] / counts[0]).item()


def here(args, prompts, head=None):
    """-> answers of the target here, and the acceptance length of rounds that drafted K tokens."""
    target, _ = load_target(args.target)
    draft = load_draft(head, target).eval() if head else None
    arm, rounds, answers = Arm(draft, FixedLength(args.K if head else 0)), [], []
    for i, ids in enumerate(prompts):
        served = arm.serve(target.eval(), Request(ids, args.new, i, args.temperature)).generation
        answers.append(served.answer())
        rounds += [r.accepted for r in served.rounds[0] if r.drafted == args.K]
    return answers, 1 + sum(rounds) / max(1, len(rounds))


def compare(args, prompts):
    answers, own = here(args, prompts, args.draft)
    engine = Engine(args, speculative_config=speculative(args, args.draft))
    same = sum(answers[i] == answer for i, answer in engine.answers(prompts))
    print(f"T {args.temperature}, K {args.K}, {len(prompts)} prompts: acceptance length "
          f"{length(engine.counts()):.3f} there, {own:.3f} here; {same} answers the same")


def record(args, prompts):
    layers = load_target(args.target)[0].config.num_hidden_layers
    ids = {"eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3, layers]}
    connector = {"kv_connector": args.connector, "kv_role": "kv_producer",
                 "kv_connector_extra_config": {"shared_storage_path": args.into}}
    if args.connector_module:
        connector["kv_connector_module_path"] = args.connector_module
    engine = Engine(args, kv_transfer_config=connector, speculative_config={
        "method": "extract_hidden_states", "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": ids}})
    begun, extra = time.perf_counter(), {"kv_transfer_params": {"include_output_tokens": True}}
    count = sum(1 for _ in engine.answers(prompts, extra_args=extra))
    print(f"{count} answers recorded in {time.perf_counter() - begun:.0f} s")


def serve(args, prompts):
    """Every version serves each prompt about once: it stays until as many have been answered."""
    answers, out = here(args, prompts)[0], Path(args.out)
    newest = args.first or (out / "latest").read_text().strip()
    engine = Engine(args, speculative_config=speculative(args, out / newest),
                    worker_extension_cls="formats.vllm_swap.Swap")
    state = {"serves": newest, "since": 0, "swaps": 0, "before": engine.counts()}

    def tell():
        now = engine.counts()
        print(f"{state['serves']}: acceptance length {length(now - state['before']):.3f}, "
              f"{state['since']} answers", flush=True)
        state["before"], state["since"] = now, 0

    def between():
        newest = (out / "latest").read_text().strip()
        if newest == state["serves"] or state["since"] < len(prompts):
            return
        tell()
        running = engine.llm.llm_engine.get_num_unfinished_requests()
        (seconds,) = engine.llm.collective_rpc("swap", args=(str(out / newest),))
        state.update(serves=newest, swaps=state["swaps"] + 1)
        print(f"swapped in {1000 * seconds:.0f} ms, {running} requests running", flush=True)

    total = same = 0
    end, many = time.monotonic() + args.minutes * 60, prompts * 1000  # never none that runs
    for i, answer in engine.answers(many, between):
        state["since"] += 1
        total += 1
        same += answer == answers[i % len(prompts)]
        done = state["swaps"] >= args.swaps and state["since"] >= len(prompts)
        if done or time.monotonic() > end:
            break
    tell()
    print(f"{state['swaps']} swaps; {same} of {total} answers are the target's own")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm_loop", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = {"compare": compare, "record": record, "serve": serve}
    parser.add_argument("command", choices=commands)
    parser.add_argument("target", metavar="T")
    parser.add_argument("--draft", metavar="HEAD", help="of compare: an EAGLE-3 directory")
    parser.add_argument("--into", metavar="DIR", help="of record")
    parser.add_argument("--connector", default="ExampleHiddenStatesConnector")
    parser.add_argument("--connector-module", metavar="MODULE", help="where that is, if not vLLM's")
    parser.add_argument("--out", help="of serve: what the learner exports to, with a version")
    parser.add_argument("--first", metavar="VERSION", help="that serve begins with, not the latest")
    parser.add_argument("--swaps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="that serve waits for swaps")
    parser.add_argument("--traffic", default="python")
    parser.add_argument("--count", type=int, default=24, help="of prompts")
    parser.add_argument("--skip", type=int, default=0, help="the first prompts")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--K", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args(argv)
    texts = prompts_of(args.traffic, "traffic", args.skip + args.count, 0)[args.skip :]
    tokenizer = load_target(args.target)[1]
    commands[args.command](args, [tokenizer.encode(text) for text in texts])


if __name__ == "__main__":
    command(main, "bench.vllm_loop")
