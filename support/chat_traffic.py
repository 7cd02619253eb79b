"""What people ask of a model that follows instructions, for checkpoints that do: in our own words
around text of this machine (support/corpus.py says which).

    chat      plain questions, of everyday and technical matters
    summary   summarise this section of documentation
    answers   answer a question from such a section
    explain   explain this Python function, or write its docstring
    rewrite   write this function again, with type hints, other names, ..

Splits are those of the corpus, by file; of `chat`, by what is asked about.
"""

import ast
import functools
import random
import re
import textwrap
from collections import Counter

from model import UserError
from support.corpus import split_of, texts_of

CLASSES = ("chat", "summary", "answers", "explain", "rewrite")
SECTION = 250, 600  # characters of a text that is asked about
PROSE = 0.9  # of its characters, letters, blanks and the commonest marks
FUNCTION = 120, 600

SUBJECTS = (
    "baking bread", "bees", "bicycles", "binary search", "black holes", "calendars", "candles",
    "chess", "cleaning a kitchen", "climbing", "clouds", "coffee", "compilers", "coral reefs",
    "databases", "deserts", "dreams", "earthquakes", "electric cars", "email", "encryption",
    "exercise", "fractions", "friendship", "gardening", "glaciers", "good manners", "gravity",
    "growing tomatoes", "hash tables", "honesty", "interviews", "job applications", "kites",
    "learning a language", "libraries", "lighthouses", "magnets", "maps", "memory", "money",
    "mountains", "music", "negotiation", "olive oil", "operating systems", "owls", "painting",
    "paper", "patience", "percentages", "photography", "planets", "poetry", "prime numbers",
    "public speaking", "rain", "recursion", "regular expressions", "rivers", "salt", "saving time",
    "sewing", "ships", "silence", "sleep", "sorting algorithms", "spiders", "stress", "tea",
    "teamwork", "testing software", "the brain", "the heart", "the internet", "the moon",
    "the printing press", "the roman empire", "tides", "train journeys", "trees", "trust",
    "unit tests", "vegetables", "version control", "volcanoes", "walking", "whales", "wind",
    "windmills", "wood", "writing letters",
)
QUESTIONS = (
    "What should everybody know about {}?", "Explain {} to a child of ten.",
    "Give me five facts about {}.", "Why does {} matter?", "Write a short story about {}.",
    "Write a poem of eight lines about {}.", "What are common mistakes when it comes to {}?",
    "I know nothing about {}. Where do I start?", "List three questions about {} and answer them.",
    "How would you describe {} in one paragraph?", "What is the history of {}, in short?",
    "What are the advantages and disadvantages of {}?", "Give me some tips on {}.",
    "Write a short email to a friend about {}.", "How has {} changed over the last hundred years?",
    "What surprises most people about {}?", "Compare {} with something similar.",
    "Make a plan for a school lesson about {}.", "What would the world be like without {}?",
    "Write a dialogue between two people who talk about {}.", "Is {} important? Give reasons.",
    "What words does one need to talk about {}? Explain each of them.",
)
TASKS = {
    "summary": ("Summarise this section:", "Give a summary of the following text.",
                "What are the main points of this text?", "Put this text into two sentences.",
                "Shorten the following for a busy reader."),
    "answers": ("What does this text say about \"{}\"?", "Using only the text below, explain "
                "\"{}\".", "Read the text and answer: what is \"{}\" for?",
                "According to this text, when does \"{}\" matter? Quote what you use."),
    "explain": ("Explain this Python function.", "What does this function do, step by step?",
                "Write a docstring for this function.", "Write the documentation of this function: "
                "what it takes, what it returns, what it raises."),
    "rewrite": ("Rewrite this function with type hints.", "Add type hints and a docstring to this "
                "function, and change nothing else.", "Write this function again with clearer "
                "names of its variables.", "Repeat this function with a comment on every step."),
}


def is_prose(text):
    return len(re.findall(r"[A-Za-z \n,.'`]", text)) >= PROSE * len(text)


def sections(split):
    """Paragraphs of documentation that stand together, as long as SECTION says."""
    for text in texts_of("docs", split):
        section = ""
        for paragraph in [*text.split("\n\n"), ""]:
            longer = f"{section}\n\n{paragraph}".strip("\n")
            if not paragraph or not is_prose(paragraph) or len(longer) > SECTION[1]:
                if SECTION[0] <= len(section) <= SECTION[1]:
                    yield section
                longer = paragraph.strip("\n") if is_prose(paragraph) else ""
            section = longer


def functions(split):
    """Functions without a docstring, as long as FUNCTION says."""
    for source in texts_of("python", split):
        try:
            tree = ast.parse(source)
        except SyntaxError:  # what was cut out of it was all of a body
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                lines = source.split("\n")[node.lineno - 1 : node.end_lineno]
                text = textwrap.dedent("\n".join(lines))
                if FUNCTION[0] <= len(text) <= FUNCTION[1]:
                    yield text


def a_word_of(text):
    """What a question about the text can be about: of its long words the commonest, of equals the
    first."""
    words = Counter(re.findall(r"[A-Za-z_]{6,}", text))
    return max(words, key=words.get) if words else "it"


@functools.cache
def texts_to_ask_about(what, split):
    """Each of them once."""
    return list(dict.fromkeys(what(split)))


def questions_of(kind, split):
    """-> every prompt of this class and split, in a fixed order."""
    if kind == "chat":
        mine = [x for x in SUBJECTS if split_of(f"chat/{x}") == split]
        return [question.format(x) for question in QUESTIONS for x in mine]
    code = kind in ("explain", "rewrite")
    prompts = []
    for i, text in enumerate(texts_to_ask_about(functions if code else sections, split)):
        task = TASKS[kind][i % len(TASKS[kind])].format(a_word_of(text))
        prompts.append(f"{task}\n\n```python\n{text}\n```" if code else f"{task}\n\n{text}")
    return prompts


def prompts_of(kind, split, count, seed):
    """`count` prompts of this class from this split; fewer are the first of more.  Raises
    UserError where text is too scarce."""
    if kind not in CLASSES:
        raise UserError(f"unknown class of prompts {kind!r}: expected some of {','.join(CLASSES)}")
    prompts = questions_of(kind, split)
    random.Random(f"{kind} {seed}").shuffle(prompts)
    if len(prompts) < count:
        raise UserError(f"the {split} text of this machine gives {len(prompts)} prompts of class "
                        f"{kind}, not {count}: ask for fewer, or give prompts of your own")
    return prompts[:count]


def user_says(text):
    return [{"role": "user", "content": text}]
