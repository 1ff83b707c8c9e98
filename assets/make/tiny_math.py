"""Make the embedded default again: mini-GSM8K (`assets/data/tiny_math`) and the tiny model that
starts on it.

    python -m assets.make.tiny_math                     # about 10 minutes on two cores, same bytes every time
    python -m assets.make.tiny_math --out /tmp/other --steps 500

The data are word problems of one to four steps whose worked solutions end in `#### n`. The model is
a Llama of 1.1 M parameters, trained by next-token prediction on the solutions of a *careless
student* who, on some wordings, does the wrong thing more often than not: adds where "fewer" asks
for a subtraction, forgets the last step, copies a number that has nothing to do with the question.
Greedy decoding then repeats the student's habits, sampling still finds the right way now and then,
and reinforcement learning has something to repair. The mistakes stand written in the solution, so a
critic can see them."""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from utils.world.answers import is_correct

NAMES = [
    "Ann",
    "Ben",
    "Cara",
    "Dan",
    "Ella",
    "Finn",
    "Gina",
    "Hugo",
    "Iris",
    "Jack",
    "Kim",
    "Leo",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
]
THINGS = [
    "apples",
    "pens",
    "books",
    "coins",
    "cards",
    "shells",
    "stamps",
    "eggs",
    "marbles",
    "stickers",
    "cookies",
    "beads",
]
PLACES = ["shop", "market", "school", "park", "garden", "library"]
BOXES = ["bags", "boxes", "packs", "jars", "baskets"]
LARGEST = 199  # no number in a problem or its solution is larger

# Probability that the careless student makes the mistake that belongs to a kind of step (see
# `Step.careless`).
MISTAKES = {
    "gain": 0.02,
    "lose": 0.02,
    "each": 0.10,
    "change": 0.20,
    "distract": 0.70,
    "times": 0.80,
    "share": 0.85,
    "together": 0.85,
    "fewer": 0.90,
    "half": 0.90,
}


@dataclass
class Step:
    """One line of a solution, `left op right`. An operand is a number, or "#i": the result of line
    i of the solution."""

    kind: str
    left: int | str
    op: str
    right: int | str
    careless: tuple[int | str, str, int | str] | None = None
    """What the careless student writes instead; None: the student stops before this line."""


@dataclass
class Story:
    """A word problem being told: sentences, the steps they ask for, and where the running total
    stands."""

    rng: random.Random
    sentences: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    total: int | str = 0
    value: int = 0

    def number(self, low: int, high: int) -> int:
        """A whole number in [low, high], small ones more often, so that problems vary in
        difficulty."""
        return min(self.rng.randint(low, high), self.rng.randint(low, high))

    def say(self, *templates: str, **words: object) -> None:
        self.sentences.append(self.rng.choice(templates).format(**words))

    def step(
        self, kind: str, left: int | str, op: str, right: int | str, careless: tuple | None
    ) -> str:
        """Add a line to the solution and return the reference to its result."""
        self.steps.append(Step(kind, left, op, right, careless))
        return f"#{len(self.steps) - 1}"


def calculate(left: int, op: str, right: int) -> int:
    return {
        "+": left + right,
        "-": left - right,
        "*": left * right,
        "/": left // right if right else -1,
    }[op]


# --- events: each tells one thing that happens to `name`'s heap of `thing` and adds the steps that it asks for ---


def gain(s: Story, name: str, other: str, thing: str, change: Callable) -> None:
    n = s.number(2, 60)
    s.say("{a} buys {n} more.", "{a} finds {n} {t} in the {p}.", "{b} gives {a} {n} {t}.", "Then {a} gets {n} more {t}.",
          a=name, b=other, n=n, t=thing, p=s.rng.choice(PLACES))  # fmt: skip
    change("gain", "+", n, "-")


def lose(s: Story, name: str, other: str, thing: str, change: Callable) -> None:
    n = s.number(2, max(2, min(60, s.value - 1)))
    s.say("{a} gives {n} {t} to {b}.", "{a} loses {n} of them.", "{a} sells {n} {t} at the {p}.", "{b} takes {n} {t} away.",
          a=name, b=other, n=n, t=thing, p=s.rng.choice(PLACES))  # fmt: skip
    change("lose", "-", n, "+")


def bags(s: Story, name: str, other: str, thing: str, change: Callable) -> None:
    n, each, box = s.number(2, 9), s.number(2, 12), s.rng.choice(BOXES)
    s.say("{a} buys {n} {x} of {e} {t} each.", "{b} brings {a} {n} {x} with {e} {t} in each.",
          a=name, b=other, n=n, x=box, e=each, t=thing)  # fmt: skip
    product = s.step("each", n, "*", each, (n, "+", each))
    change("gain", "+", product, "-")


def half(s: Story, name: str, other: str, thing: str, change: Callable) -> None:
    s.say(
        "{a} gives half of the {t} to {b}.",
        "{a} sells half of them.",
        "Half of the {t} get lost.",
        a=name,
        b=other,
        t=thing,
    )
    change("half", "/", 2, "-")


def distract(s: Story, name: str, other: str, thing: str, change: Callable) -> None:
    """A loss told with a number that does not matter; the careless student takes away the wrong
    one."""
    n, useless = s.number(2, max(2, min(40, s.value - 1))), s.number(2, 30)
    s.say("{b} is {u} years old and takes {n} of them.", "After {u} minutes {a} gives {b} {n} {t}.",
          "In house number {u} {a} loses {n} {t}.", a=name, b=other, u=useless, n=n, t=thing)  # fmt: skip
    change("distract", "-", n, "-", useless)


def fewer(s: Story, name: str, other: str, thing: str) -> str:
    n = s.number(2, max(2, min(40, s.value - 1)))
    s.say("{b} has {n} fewer {t} than {a}.", "{b} has {n} {t} less than {a}.", "That is {n} more than {b} has.",
          a=name, b=other, n=n, t=thing)  # fmt: skip
    return s.step("fewer", s.total, "-", n, (s.total, "+", n))


def more(s: Story, name: str, other: str, thing: str) -> str:
    n = s.number(2, 40)
    s.say(
        "{b} has {n} more {t} than {a}.",
        "{b} has {n} {t} more than {a}.",
        a=name,
        b=other,
        n=n,
        t=thing,
    )
    return s.step("gain", s.total, "+", n, (s.total, "-", n))


def times(s: Story, name: str, other: str, thing: str) -> str:
    n = s.rng.randint(2, 5)
    s.say(
        "{b} has {n} times as many {t} as {a}.",
        "{b} has {n} times as many.",
        a=name,
        b=other,
        n=n,
        t=thing,
    )
    return s.step("times", s.total, "*", n, (s.total, "+", n))


def tell(rng: random.Random) -> tuple[str, list[Step]]:
    """Tell one problem: the question and the steps of its solution (which may still break a rule;
    see `make_problem`)."""
    s = Story(rng)
    (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)

    def change(
        kind: str, op: str, right: int | str, wrong_op: str, wrong_right: int | None = None
    ) -> None:
        wrong = (s.total, wrong_op, right if wrong_right is None else wrong_right)
        s.total = s.step(kind, s.total, op, right, wrong)
        s.value = solve(s.steps)[-1]

    if rng.random() < 0.25:
        n, each, box = s.number(2, 9), s.number(2, 12), rng.choice(BOXES)
        s.say("{a} has {n} {x} with {e} {t} in each.", "There are {n} {x} of {e} {t} at the {p}. {a} takes them all.",
              a=name, n=n, x=box, e=each, t=thing, p=rng.choice(PLACES))  # fmt: skip
        s.total = s.step("each", n, "*", each, (n, "+", each))
        s.value = n * each
    else:
        s.total = s.value = rng.randint(4, 99)
        s.say("{a} has {n} {t}.", "{a} starts with {n} {t}.", "There are {n} {t} in the {p}. {a} takes them all.",
              a=name, n=s.value, t=thing, p=rng.choice(PLACES))  # fmt: skip

    for event in rng.choices(
        [gain, lose, bags, half, distract],
        weights=[3, 3, 1.5, 1.5, 2],
        k=rng.choice([0, 1, 1, 2, 2, 3]),
    ):
        event(s, name, other, thing, change)

    ending = rng.choices(["now", "other", "together", "share", "change"], weights=[3, 2, 2, 1, 1])[
        0
    ]
    if ending == "now":
        s.say(
            "How many {t} does {a} have now?",
            "How many {t} are left for {a}?",
            "How many {t} is that?",
            a=name,
            t=thing,
        )
    elif ending == "share":
        n = rng.randint(2, 9)
        s.say("{a} shares them equally with friends, {n} people in all. How many {t} does each get?",
              "{a} puts them into {n} equal heaps. How many {t} are in a heap?", a=name, n=n, t=thing)  # fmt: skip
        s.step("share", s.total, "/", n, (s.total, "-", n))
    elif ending == "change":
        price = rng.randint(2, 9)
        s.say("{a} sells each for {n} dollars. How many dollars does {a} get?",
              "Each is worth {n} dollars. What are they worth in all?", a=name, n=price)  # fmt: skip
        s.step("change", s.total, "*", price, (s.total, "+", price))
    else:
        theirs = rng.choice([fewer, more, times])(s, name, other, thing)
        if ending == "other":
            s.say("How many {t} does {b} have?", "How many is that for {b}?", b=other, t=thing)
        else:
            s.say(
                "How many {t} do they have together?",
                "How many {t} do {a} and {b} have in all?",
                a=name,
                b=other,
                t=thing,
            )
            s.step("together", s.total, "+", theirs, None)
    return " ".join(s.sentences), s.steps


def solve(steps: list[Step], mistakes: random.Random | None = None) -> list[int | None]:
    """The result of every line (None for a line left out); with `mistakes`, as the careless student
    gets it."""
    return [line[3] if line else None for line in work(steps, mistakes)]


def work(
    steps: list[Step], mistakes: random.Random | None = None, rates: dict[str, float] = MISTAKES
) -> list[tuple[int, str, int, int] | None]:
    """The lines (left, op, right, result) of the right solution or, with `mistakes`, of the
    careless student's, who makes the mistake of a kind of step with the probability `rates` gives
    for it."""
    lines: list[tuple[int, str, int, int] | None] = []
    for step in steps:
        left, op, right = step.left, step.op, step.right
        if mistakes is not None and mistakes.random() < rates[step.kind]:
            if step.careless is None:
                lines.append(None)
                continue
            left, op, right = step.careless
        left, right = (lines[int(x[1:])][3] if isinstance(x, str) else x for x in (left, right))
        lines.append((left, op, right, calculate(left, op, right)))
    return lines


def write_up(lines: list[tuple[int, str, int, int] | None]) -> str:
    """The worked solution as text: one equation a line, then `#### answer`."""
    lines = [line for line in lines if line is not None]
    return "".join(f"{a}{op}{b}={c}\n" for a, op, b, c in lines) + f"#### {lines[-1][3]}"


def in_bounds(lines: list[tuple[int, str, int, int] | None]) -> bool:
    """Numbers stay in [0, LARGEST] and every division is exact."""
    return all(
        0 <= x[3] <= LARGEST
        and 0 < x[0] <= LARGEST
        and (x[1] != "/" or x[2] > 0 and x[0] % x[2] == 0)
        for x in lines
        if x
    )


def make_problem(rng: random.Random) -> tuple[str, list[Step]]:
    """One problem of one to four steps that keeps the rules of `in_bounds`."""
    while True:
        question, steps = tell(rng)
        if 1 <= len(steps) <= 4 and in_bounds(work(steps)):
            return question, steps


def is_test(solution: str) -> bool:
    """Every problem belongs to train or test by the digest of its solution: no solution, whatever
    its story, is in both."""
    return hashlib.sha256(solution.encode()).digest()[0] < 32


def make_data(
    folder: Path, train_size: int, test_size: int, seed: int, make: Callable = make_problem
) -> None:
    """Write train.jsonl and test.jsonl with the columns `question` and `answer`, of problems by
    `make(rng)`."""
    rng, seen = random.Random(seed), set()
    splits = {"train": (train_size, []), "test": (test_size, [])}
    while any(len(rows) < size for size, rows in splits.values()):
        question, steps = make(rng)
        answer = write_up(work(steps))
        size, rows = splits["test" if is_test(answer) else "train"]
        if len(rows) < size and question not in seen:
            seen.add(question)
            rows.append({"question": question, "answer": answer})
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, rows) in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def careless_examples(
    count: int, seed: int, make: Callable = make_problem, rates: dict[str, float] = MISTAKES
) -> list[tuple[str, str]]:
    """(question, the careless student's solution) pairs; no problem of the test set among them."""
    rng, examples = random.Random(seed), []
    while len(examples) < count:
        question, steps = make(rng)
        if is_test(write_up(work(steps))):
            continue
        for _ in range(20):
            lines = work(steps, rng, rates)
            if any(lines) and in_bounds(
                lines
            ):  # a solution needs a line, and the student never meets a negative number
                examples.append((question, write_up(lines)))
                break
    return examples


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(texts: list[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which common words are one token, every digit is its own, and any text
    can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\d| ?[^\s\d]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|end|>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=roles,
        padding_side="left",
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass
class Training:
    """What the makers of the embedded models have in common."""

    batch_size: int = 128
    """examples in one step"""
    learning_rate: float = 2e-3
    """peak learning rate; it warms up over 100 steps and falls to zero along a cosine"""
    hidden_size: int = 128
    """width of the model"""
    layers: int = 4
    """depth of the model"""


def answer_rows(tokenizer, pairs: list[tuple[str, str]]) -> list["Row"]:
    """(question, answer) pairs as rows of which the answer, EOS included, is to be learnt."""
    tokens = [
        (
            tokenizer.encode(f"<|user|>{q}<|assistant|>"),
            tokenizer.encode(f"{a}{tokenizer.eos_token}"),
        )
        for q, a in pairs
    ]
    return [(q + a, [-100] * len(q) + a) for q, a in tokens]


@dataclass
class Args(Training):
    out: Path = Path("assets")
    """folder that receives data/tiny_math and tiny_math"""
    seed: int = 1
    """seed of the data, the initial weights and the training order"""
    train_size: int = 4096
    """problems in train.jsonl"""
    test_size: int = 512
    """problems in test.jsonl, none of whose solutions is in train.jsonl"""
    steps: int = 2000
    """supervised steps of the careless student's pupil"""


@torch.no_grad()
def accuracy(
    model, tokenizer, rows: list[dict], temperature: float | None = None, longest: int = 64
) -> float:
    """Share of right answers by greedy decoding or, with a temperature, by sampling."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": r["question"]}], add_generation_prompt=True, tokenize=False) for r in rows]  # fmt: skip
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    sampling = (
        {"do_sample": False}
        if temperature is None
        else {"do_sample": True, "temperature": temperature, "top_k": 0}
    )
    output = model.generate(
        **{k: inputs[k] for k in ("input_ids", "attention_mask")},
        max_new_tokens=longest,
        **sampling,
    )
    completions = tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(is_correct(c, r["answer"]) for c, r in zip(completions, rows, strict=True)) / len(
        rows
    )


Row = tuple[
    list[int], list[int]
]  # tokens, and labels of the same length: -100 where nothing is to be learnt


def new_model(args, tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def train(
    args,
    tokenizer,
    examples: Callable[[int, int], list[Row]],
    report: Callable[[object], str],
    start: Path | None = None,
) -> LlamaForCausalLM:
    """Next-token prediction, on the labelled tokens alone, from `examples(count, seed)`, of a new
    model or of the one in the folder `start`; prints `report(model)` now and then."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM.from_pretrained(start) if start else new_model(args, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, total_iters=100)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    pool, order, rng = [], [], random.Random(args.seed)
    for step in track(range(args.steps), description="supervised warm start"):
        if not order:  # the next pool of fresh examples, in batches of similar length
            pool = sorted(
                examples(args.batch_size * 50, 1_000_000 * args.seed + step),
                key=lambda row: len(row[0]),
            )
            order = rng.sample(range(50), 50)
        start = order.pop() * args.batch_size
        rows = pool[start : start + args.batch_size]
        width = max(len(tokens) for tokens, _ in rows)
        inputs = torch.tensor(
            [tokens + [tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in rows]
        )
        labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
        hidden = model.model(inputs[:, :-1]).last_hidden_state
        chosen = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[chosen]), labels[:, 1:][chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        (warmup if step < 100 else cosine).step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  {report(model)}", flush=True)
    return model


def main(args: Args) -> None:
    start = time.time()
    torch.set_num_threads(
        2
    )  # the order of summation, and so the last bit of every weight, depends on it
    data, folder = args.out / "data" / "tiny_math", args.out / "tiny_math"
    make_data(data, args.train_size, args.test_size, args.seed)
    test = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer([f"{q}\n{a}" for q, a in careless_examples(4000, seed=args.seed)])

    def examples(count: int, seed: int) -> list[Row]:
        return answer_rows(tokenizer, careless_examples(count, seed))

    model = train(
        args, tokenizer, examples, lambda m: f"greedy accuracy {accuracy(m, tokenizer, test):.3f}"
    )
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    print(
        f"{folder}: {model.num_parameters() / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}; accuracy on {len(test)} held-out "
        f"problems: greedy {accuracy(model, tokenizer, test):.3f}, sampled {accuracy(model, tokenizer, test, 1.0):.3f}; "
        f"{time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
