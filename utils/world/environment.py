"""What the policy meets: problems, a user who replies, the truth, and a judge who may err."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from utils.errors import stop
from utils.generation import Answer
from utils.scale.processes import from_first
from utils.tensors import Batch, pack, turn_ends
from utils.world.problems import Problem
from utils.world.tasks import load_task


@dataclass
class Episode:
    """One conversation: the tokens behind its prompt, which of them the policy chose and out of
    which distribution, and the policy's answers."""

    problem: Problem
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    finished: bool = False
    """the last answer ended with EOS"""

    @property
    def prompt(self) -> list[int]:
        return self.problem.prompt_ids

    @property
    def length(self) -> int:
        """Tokens that the policy chose."""
        return sum(self.chosen)

    def branch(self, length: int, answer: Answer, chat) -> "Episode":
        """Another end of an episode of one turn: `answer` follows its first `length` tokens, and
        both are the new episode's one answer."""
        parts = zip(Answer._fields, answer, strict=True)
        branch = Episode(self.problem)
        branch.say(Answer(*(getattr(self, name)[:length] + new for name, new in parts)), chat)
        return branch

    def hear(self, tokens: list[int]) -> None:
        """Tokens of the user's: nothing that the policy chose."""
        self.tokens += tokens
        self.chosen += [False] * len(tokens)
        for numbers in (self.logprobs, self.entropy, self.gap):
            numbers += [0.0] * len(tokens)

    def say(self, answer: Answer, chat) -> None:
        """The policy's next answer."""
        self.chosen += [True] * len(answer.tokens)
        for name, new in zip(Answer._fields, answer, strict=True):
            getattr(self, name).extend(new)
        self.completions.append(chat.decode(answer.tokens))
        self.finished = answer.tokens[-1] in chat.eos_ids


class Environment:
    """Task, user and judge, as the flags say. Attributes: `chat`, the policy's chat format; `task`
    with its problems; `held_out`, those of the evaluation; `scale`, mean and deviation of the
    reward model's first scores, or 0 and the unit of the reward function's; `labels`, what a
    majority takes for right, by problem; `begun`, an update and how many problems had been drawn by
    its end: 0, 0 or what a checkpoint says."""

    def __init__(self, args, chat, device: torch.device):
        self.args, self.chat, self.device = args, chat, device
        self.task = load_task(args, chat)
        self.held_out = self.task.test[: args.eval_size]
        self.reward_model = self.reward_fn = None
        if args.reward_model:
            from utils.dialogue.reward_model import load_reward_model

            self.reward_model = load_reward_model(args.reward_model, device, args.micro_batch_size)
        if args.reward_fn:
            from utils.world.reward_fn import RewardFunction

            self.reward_fn = RewardFunction(args.reward_fn)
        self.scale: tuple[float, float] | None = None
        self.labels: dict[str, str] = {}
        self.begun = 0, 0
        self.save: Callable[[], None] = lambda: None  # `Run.restore` puts its own here

    def __str__(self) -> str:
        task = self.task
        dropped = f"; dropped: {task.dropped or 0}"
        return f"{len(task.train)} training, {len(task.test)} test problems{dropped}"

    # ---- episodes ----

    def problems(self, update: int) -> list[Problem]:
        """The problems of an update, each --samples-per-prompt times."""
        args = self.args
        different = self.task.batch(args.seed, self.drawn(update - 1), args.prompts_per_update)
        return [problem for problem in different for _ in range(args.samples_per_prompt)]

    def drawn(self, update: int) -> int:
        """How many problems have been drawn by the end of an update."""
        start, problems = self.begun
        return problems + (update - start) * self.args.prompts_per_update

    def reply(self, episodes: list[Episode]) -> list[Episode]:
        """The user's next words are added; returns the episodes that go on. One ends where the user
        is content, or an answer was cut off: the user would have to speak in the middle of it."""
        going_on = []
        for episode in episodes:
            said = None
            if episode.finished:
                said = self.task.reply(episode.problem, episode.completions)
            if said is not None:
                episode.hear(self.chat.user_turn_ids(said))
                going_on.append(episode)
        return going_on

    # ---- rewards ----

    def judged(self, episode: Episode) -> list[str]:
        """An episode's answers as they are judged: one that was cut off is empty, unless
        --truncated says otherwise."""
        if self.args.truncated == "wrong" and not episode.finished:
            return [*episode.completions[:-1], ""]
        return episode.completions

    def grade(self, episodes: list[Episode]) -> Tensor:
        """The truth (B,): 1 right, 0 wrong, NaN where no reference is known."""
        verdicts = from_first(
            lambda: [self.task.grade(e.problem, self.judged(e)) for e in episodes]
        )
        return torch.tensor(verdicts, device=self.device)

    def score(self, episodes: list[Episode], clean: Tensor) -> Tensor:
        """What the judge says (B,), before noise: the reward model's score on the scale of 0 and 1,
        the number of the user's function, the verdict by the majority's labels, or the truth
        `clean`."""
        if self.reward_model:
            return self.score_turns(episodes, "episode")[:, -1]
        if self.reward_fn:
            asked = [(*self.task.asked(e.problem), e.completions) for e in episodes]
            found = from_first(lambda: self.reward_fn.scores(asked))
            if isinstance(found, str):
                self.save()  # the updates before this one
                self.reward_fn.stop(found)
            return self.limited(self.in_units(torch.tensor(found, device=self.device)), episodes)
        if self.labels:
            labels = [replace(e.problem, answer=self.labels[e.problem.key]) for e in episodes]
            return self.grade(
                [replace(e, problem=label) for e, label in zip(episodes, labels, strict=True)]
            )
        return clean

    def in_units(self, scores: Tensor) -> Tensor:
        """A function's numbers in units of the power of ten that they reached at first: a critic
        begins at their mean and learns in steps of fixed size. Below ten they stay as they are."""
        if self.scale is None:
            most = scores.abs().max().item()
            self.scale = 0.0, 10.0 ** math.floor(math.log10(most)) if most >= 10 else 1.0
        return scores / self.scale[1]

    def score_turns(self, episodes: list[Episode], per: str = "turn") -> Tensor:
        """The reward model's scores (B, K) up to each of the last K turns, the whole episode's in
        the last column; K = 1 for `per` "episode"."""
        from utils.dialogue.reward_model import on_reward_scale

        raw = self.reward_model.score_episodes(self.task, episodes, per).to(self.device)
        scored = sum(min(raw.shape[1], len(e.completions)) for e in episodes)
        if raw.isfinite().sum() < scored:  # NaN stands where an episode has no such turn
            stop(f"--reward-model {self.args.reward_model}: it gives scores that are no numbers")
        scores, self.scale = on_reward_scale(raw, self.scale)
        scores[:, -1] = self.limited(scores[:, -1], episodes)
        return scores

    def limited(self, scores: Tensor, episodes: list[Episode]) -> Tensor:
        """Scores (B,), with --truncated wrong at most 0 for an episode that was cut off."""
        if self.args.truncated != "wrong":
            return scores
        return torch.where(self.finished(episodes), scores, scores.clamp(max=0.0))

    def finished(self, episodes: list[Episode]) -> Tensor:
        """(B,) bool: not cut off."""
        return torch.tensor([e.finished for e in episodes], device=self.device)

    def pack(self, episodes: list[Episode]) -> Batch:
        """The episodes as tensors, in the layout of utils/tensors.py. With --truncated mask those
        that were cut off have no weight in the policy's loss; a critic learns of them as of all."""
        batch = pack(episodes, self.chat.pad_id, self.device)
        if self.args.truncated == "mask":
            batch["sampler"] *= self.finished(episodes).unsqueeze(1)
        return batch

    def prepare(self, play: Callable[[list[Problem]], list[Episode]], run) -> None:
        """What the judge needs before the first update: for --noise majority-vote the answers that
        `play`, the initial policy, gives most often, in the place of the references."""
        if self.args.noise != "majority-vote":
            return
        from utils.world.votes import majority_vote

        args = self.args
        some = min(self.drawn(args.updates), len(self.task.train))  # an epoch has every problem
        visited = self.task.batch(args.seed, 0, some)
        self.labels = majority_vote(play, self.task, visited, args, run)

    # ---- what is reported of episodes ----

    def measure(self, episodes: list[Episode]) -> dict[str, float]:
        """The task's own measures."""
        pairs = [(e.problem, self.judged(e)) for e in episodes]
        return from_first(lambda: self.task.measure(pairs))

    def evaluate(self, episodes: list[Episode]) -> dict[str, float]:
        """The measures of held-out episodes as eval/<name>."""
        metrics = {f"eval/{name}": value for name, value in self.measure(episodes).items()}
        metrics["eval/response_length"] = sum(e.length for e in episodes) / len(episodes)
        return metrics

    def show(self, episodes: list[Episode]) -> list[dict]:
        """The episodes as rows of samples.jsonl."""
        rows = [self.task.show(e.problem, e.completions) for e in episodes]
        verdicts = self.grade(episodes).tolist()
        return [row | {"right": right} for row, right in zip(rows, verdicts, strict=True)]

    def transcripts(self, episodes: list[Episode], batch: Batch) -> list[dict]:
        """One episode of every prompt, as rows of transcripts.jsonl: what was said, reward and
        value at the end of each turn, the true outcome, and numbers for every token behind the
        prompt."""
        rows = []
        for i in range(0, len(episodes), self.args.samples_per_prompt):
            episode, size = episodes[i], len(episodes[i].tokens)
            ends = turn_ends(batch["mask"][i : i + 1])[0]
            row = {
                key: batch[key][i][ends].tolist() for key in ("rewards", "values") if key in batch
            }
            row["messages"] = self.task.messages(episode.problem, episode.completions)
            row["outcome"] = self.measure([episode])
            row["prompt"] = episode.prompt
            text = [self.chat.tokenizer.decode(token) for token in episode.tokens]
            row["tokens"] = {"ids": episode.tokens, "text": text, "chosen": episode.chosen}
            for key in ("values", "advantages", "entropy", "rewards"):
                if key in batch:
                    row["tokens"][key] = batch[key][i, :size].double().round(decimals=4).tolist()
            rows.append(row)
        return rows
