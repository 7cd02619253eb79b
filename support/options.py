"""The command line: every flag and default, once; and what can be refused before it is tried."""

import argparse
import importlib.util
import json
import os
from pathlib import Path

import torch

from model import UserError
from support import chat_traffic, corpus

LEARN_EVERY = 48  # tokens of answers a step of the optimizer, for learners anywhere
WEIGHTS = Path(__file__).parent.parent / "weights"
STATIC = {"static": str(WEIGHTS / "draft.pt"), "static-python": str(WEIGHTS / "draft-python.pt")}
ESTIMATORS = ("expected", "log", "reinforce", "reinforce_textbook", "kl")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells every default but those that the help tells itself, and none and off."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def whole(low, high=2**31 - 1):
    def number(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return value

    return number


def length(text):
    return text if text == "auto" else whole(1, 64)(text)


def real(low, high):
    def number(text):
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return value

    return number


def temperature(text):
    return real(0.01, 100)(text) if float(text) else 0.0


def arguments(argv=None):
    parser = Parser(prog="aurora.py", description="A draft model that learns while it serves.",
                    formatter_class=Defaults)
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--target", default=str(WEIGHTS / "target.pt"), metavar="FILE|DIR|NAME",
        help="of this project, a Hugging Face directory, or a name on its hub")
    add("--draft", default="scratch", metavar="scratch|static|none|FILE|DIR|NAME",
        help="where the draft begins: random, shipped, none at all (the memory alone), what --save "
             "kept, an EAGLE-3 head or a small language model")
    add("--static", metavar="static|FILE|DIR|NAME",
        help="the draft of --compare that never learns; by default what --draft begins with")
    add("--draft-vocab", type=whole(0), default=0, metavar="N",
        help="ids that a scratch draft can say, the lowest ones; 0 is all")
    add("--memory", choices=("shared", "request", "off"),
        help="propose what followed before: in any request, in this one only, or not (default: "
             "shared; off with a fixed draft length, which is the head's)")
    add("--memory-tokens", type=whole(64, 10**9), default=1_000_000, metavar="N",
        help="that the shared memory holds, the oldest forgotten first")

    add = parser.add_argument_group("traffic").add_argument
    add("--traffic", metavar="CLASSES", help="one after the other (default: "
        f"{','.join(corpus.CLASSES)}; a checkpoint's is {','.join(chat_traffic.CLASSES)})")
    add("--requests", type=whole(1), default=8, help="of each class that --traffic names")
    add("--prompts", metavar="FILE",
        help="a prompt a line, or .jsonl with class and prompt, or messages")
    add("--prompt", metavar="TEXT", help="answer this one, streaming")
    add("--chat", action="store_true", help="prompts go into the checkpoint's chat template")
    add("--max-new-tokens", type=whole(1), default=96)

    add = parser.add_argument_group("decoding").add_argument
    add("--num-speculative-tokens", type=length, default="auto", metavar="K",
        help="drafted tokens a round; auto: whatever is fastest at the time")
    add("--rule", choices=("block", "token"), default="block", help="of acceptance")
    add("--temperature", type=temperature, default=0.8, help="0 is greedy")
    add("--top-p", type=real(1e-6, 1), default=1.0, help="1 is off")
    add("--top-k", type=whole(0), default=0, help="0 is off")
    add("--seed", type=whole(0), default=0)

    add = parser.add_argument_group("learning").add_argument
    add("--estimator", choices=ESTIMATORS, default="expected", help="a rung of rl.py's ladder")
    add("--lr", type=real(1e-8, 10), help="of Muon (default: 0.02 for scratch, else 0.005)")
    add("--learn-every", type=whole(1), default=LEARN_EVERY, metavar="TOKENS",
        help="of answers, a step of the optimizer")
    add("--no-gate", action="store_true", help="what is learned always serves")
    add("--no-learn", action="store_true")

    add = parser.add_argument_group("measuring and keeping").add_argument
    add("--compare", action="store_true", help="plain, static and online on the same requests")
    add("--report", metavar="FILE.json")
    add("--log", metavar="FILE.jsonl", help="a line a request")
    add("--save", metavar="DIR", help="keep the learned draft and the learner's state")
    add("--export", metavar="DIR", help="write the learned draft as SGLang and vLLM read it")
    add("--explain", metavar="DIR", help="of --save: what changed there, when and why; serves none")
    add("--version", type=whole(0), metavar="N", help="of --explain: all about this one")
    add("--rollback", nargs=2, metavar=("DIR", "N"),
        help="of --save: its version N is the latest again, as a new one; serves none")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cpu")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the target; auto: what it verifies faster in, as timed at the start")
    try:
        args = parser.parse_args(argv)
    except (ValueError, OverflowError) as error:
        raise UserError(str(error)) from None
    fixed = args.num_speculative_tokens != "auto"
    if fixed and (args.draft == "none" or args.memory not in (None, "off")):
        raise UserError("--num-speculative-tokens K is the head's: it needs a --draft, and goes "
                        "with no --memory but off")
    args.memory = args.memory or ("off" if fixed else "shared")
    own = corpus if os.path.isfile(args.target) else chat_traffic
    args.traffic = args.traffic or ",".join(own.CLASSES)
    args.device = "cpu" if args.device.startswith("cpu:") else args.device
    how_fast(args)
    check(args)
    return args


def how_fast(args):
    """Fills in what hangs on where the draft begins: a random one has more to learn."""
    args.lr = args.lr or (0.02 if args.draft == "scratch" else 0.005)


def check(args):
    """Raises UserError for flags that do not go together, and for what cannot be written."""
    kinds = corpus.CLASSES + chat_traffic.CLASSES
    for kind in args.traffic.split(","):
        if kind not in kinds:
            raise UserError(f"--traffic {kind}: expected some of {','.join(kinds)}")
    files = [path for path in (args.report, args.log) if path is not None]
    if args.prompt is not None and (args.prompts or files or args.save or args.export):
        raise UserError("--prompt only answers: it goes with none of --prompts, --report, --log, "
                        "--save, --export")
    if args.version is not None and not args.explain:
        raise UserError("--version goes with --explain DIR")
    if args.rollback and not args.rollback[1].isdecimal():
        raise UserError(f"--rollback DIR N: expected a version's number, got {args.rollback[1]}")
    if args.draft == "none" and (args.save or args.export):
        raise UserError("--draft none has no weights: nothing to --save or --export")
    if args.static and not args.compare:
        raise UserError("--static goes with --compare")
    if args.draft_vocab and args.draft != "scratch":
        raise UserError("--draft-vocab goes with --draft scratch")
    read = (args.prompts, args.target, args.draft, args.static)
    read = [STATIC.get(path, path) for path in read if path]
    written = [path for path in (*files, args.save, args.export) if path]
    for path in written:
        others = [x for x in written if x is not path]
        others += [x for x in read if path is not args.save or not same(x, path)]  # it goes on
        for other in others:
            if same(path, other) or Path(other).resolve() in Path(path).resolve().parents:
                raise UserError(f"{path} is to be written, and is or lies in {other}: name "
                                "different places")
    if args.report and os.path.exists(args.report) and not os.path.isfile(args.report):
        raise UserError(f"cannot write {args.report}: it is replaced at the end, and is no file")
    for path in files:
        new = not os.path.lexists(path)
        try:
            open(path, "a").close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        if new:
            os.remove(path)
    if args.save is not None and not args.save:
        raise UserError("--save needs a directory")
    if args.export is not None:
        if not importlib.util.find_spec("safetensors"):
            raise UserError("--export needs safetensors: pip install -r requirements-hf.txt")
        parent = Path(args.export).absolute().parent
        if not args.export or Path(args.export).exists() or not os.access(parent, os.W_OK):
            raise UserError(f"--export {args.export}: expected a directory that is not there yet, "
                            "in one that can be written")


def same(path, other):
    """Whether both are one file or directory, by whatever name."""
    if os.path.exists(path) and os.path.exists(other):
        return os.path.samefile(path, other)
    return Path(path).resolve() == Path(other).resolve()


def check_device(device):
    try:
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError):
        raise UserError(f"--device {device} is not to be had here; try --device cpu") from None


def prompts(args):
    """-> [(class, what is said)]: a text as it is, or messages for the chat template."""
    if args.prompt is not None:
        pairs = [("prompt", args.prompt)]
    elif args.prompts is not None:
        pairs = read_prompts(args.prompts)
    else:
        pairs = []
        for kind in args.traffic.split(","):
            source = corpus if kind in corpus.CLASSES else chat_traffic
            earlier = sum(k == kind for k, _ in pairs)
            texts = source.prompts_of(kind, "traffic", earlier + args.requests, args.seed)
            said = texts if source is corpus else map(chat_traffic.user_says, texts)
            pairs += [(kind, x) for x in said][earlier:]
    user = chat_traffic.user_says
    return [(kind, user(x) if args.chat and isinstance(x, str) else x) for kind, x in pairs]


def read_prompts(path):
    """-> [(class, text or messages)]"""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        lines = [line for line in lines if line.strip()]
        pairs = [("prompts", line) for line in lines]
        if path.lower().endswith(".jsonl"):
            objects = [json.loads(line) for line in lines]
            pairs = [(o.get("class", "prompts"), messages_in(o) or o["prompt"]) for o in objects]
            pairs = [(str(k) if isinstance(k, int) else k, said) for k, said in pairs]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f'{path}: expected UTF-8 text, a prompt a line, or in a .jsonl an object '
                        'with "prompt" or "messages" a line') from None
    texts = [x for pair in pairs for x in pair if not isinstance(x, list)]
    if not pairs or not all(isinstance(x, str) and x for x in texts):
        raise UserError(f"{path}: a prompt or class that is empty or no text, or none at all")
    return pairs


def messages_in(content):
    """The messages of a line of a .jsonl, None if it has none.  ValueError if they are not such."""
    messages = content.get("messages")
    for message in messages or ():
        if not all(isinstance(message[key], str) for key in ("role", "content")):
            raise ValueError
    if messages is not None and not (isinstance(messages, list) and messages):
        raise ValueError
    return messages


def encode(said, tokenizer):
    """A text, or messages -> token ids, at least two: one that the target has read, and one that
    follows it.  A prompt of one token follows the begin token."""
    text = said if isinstance(said, str) else tokenizer.chat(said)
    if not text:
        raise UserError("the prompt is empty: give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid Unicode text") from None
    ids = tokenizer.encode(text)
    if len(ids) == 1 and tokenizer.begin not in (None, ids[0]):
        ids = [tokenizer.begin, *ids]
    if len(ids) < 2:
        raise UserError(f"the prompt {text!r} is only {len(ids)} token, and the model has no begin "
                        "token to put before it: give at least two")
    return ids
