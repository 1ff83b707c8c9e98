"""Robust-Bellman PPO for language models under noisy rewards: PPO whose critic backs up the worst case.

The worst-case family that papers on noisy supervision compare themselves with: robust Bellman operators, and the ideas of RFQI
(Panaganti et al. 2022) and CQL (Kumar et al. 2020) on a state value.

Differs from ppo_baseline.py in, by `--worst-case`:
 1. ensemble-min: K value heads, each fitted to the same targets; V is the lowest of them, in GAE and in the targets.
 2. contamination: with probability rho the next state is the worst of the batch; its value is (1 - rho) V(s') + rho min V.
 3. conservative: alpha (log sum exp V - mean V) over the tokens of an episode is added to the critic's loss, which presses
    down the values that stand out from the episode.

Ours: everything but the three ideas (the README has the list). With --critic-lambda 1 the targets of ensemble-min are the
observed returns, into which no worst case enters.

    python robust_ppo_baseline.py                            # embedded model and data, 20 % of the rewards flipped
    python robust_ppo_baseline.py --worst-case contamination --contamination 0.1
    python robust_ppo_baseline.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset openai/gsm8k --dataset-config main \\
        --max-prompt-tokens 256 --max-new-tokens 256 --learning-rate 1e-6 --critic-learning-rate 5e-6 --micro-batch-size 8
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.checkpoints import load_checkpoint, restore_critic, restore_policy, save_checkpoint
from utils.errors import stop
from utils.generation import generate
from utils.keyed import coin, permutation, seed_torch
from utils.models import load_policy, pick_device, trainable, twin
from utils.run import Run, check_flags, parse_args, peak_memory_gb
from utils.world.reward_model import load_reward_model, on_reward_scale
from utils.world.tasks import load_task
from utils.world.votes import majority_vote

# ==== 1. Args =========================================================================================================


@dataclass
class Args:
    # --- the run ---
    seed: int = 1
    """seed of everything random: data order, sampling, noise, minibatches"""
    run_name: str | None = None
    """the run is written to runs/<run-name>; default: script, noise, seed and time"""
    resume: Path | None = None
    """run directory to continue from its newest checkpoint; its flags are the defaults"""
    device: str = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the forward passes (autocast); weights and optimizer stay in float32"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "vrpo"
    """project name on Weights & Biases"""
    # --- the task ---
    task: Literal["math", "science", "dialogue"] = "math"
    """math, science, or task-oriented dialogue with a simulated user; the defaults of some flags go with it"""
    model: str = "assets/tiny_math"
    """policy at the start and frozen reference: a Hugging Face folder or hub id"""
    dataset: str = "assets/data/tiny_math"
    """a folder with <split>.jsonl, .json, .csv or .parquet, or a hub id"""
    dataset_config: str | None = None
    """configuration of the data set (a subfolder of a local one); default: the usual one"""
    train_split: str | None = None
    """split to train on; a slice such as train[:90%] is allowed; default: train"""
    test_dataset: str | None = None
    """data set of the held-out problems, NAME or NAME:CONFIG; default: the same"""
    test_split: str | None = None
    """held-out split; training problems that stand in it too are dropped; default: test"""
    question_column: str | None = None
    """column of the question; default: the first of question, problem, prompt, ..."""
    answer_column: str | None = None
    """column of the reference, bare or ending in `#### n` or a box; default: the first of answer, solution, ..."""
    choices_column: str | None = None
    """column with a list of options; the reference then is the right one's label, letter, position or text"""
    prompt_template: str = "{question}"
    """the user message around the question"""
    system_prompt: str | None = None
    """system message that opens every conversation"""
    thinking: bool = False
    """let a model think whose chat template knows it (Qwen3); what counts stands behind </think>"""
    schema: Path = Path("assets/data/tiny_dialogue")
    """dialogue: a folder in the format of Schema-Guided Dialogue, with a folder for each split or for both"""
    max_prompt_tokens: int = 128
    """problems with longer prompts are counted and dropped"""
    # --- rollout ---
    updates: int = 40
    """updates, each of prompts-per-update x samples-per-prompt episodes"""
    prompts_per_update: int = 64
    """different prompts in an update"""
    samples_per_prompt: int = 4
    """episodes for each of them (a group, for the methods and noise channels that have groups)"""
    max_turns: int = 1
    """answers in an episode, at most; in math the user asks to check the work before every further one"""
    max_new_tokens: int = 48
    """tokens of one answer, EOS included"""
    temperature: float = 1.0
    """sampling temperature; the log-probabilities are those of the tempered distribution"""
    truncated: Literal["wrong", "grade", "mask"] = "wrong"
    """an answer without EOS is wrong (0), is graded as it stands, or is graded and left out of every loss"""
    rollout_batch_size: int = 256
    """episodes decoded at once, in evaluation too (bounds the memory of the KV cache)"""
    # --- reward and its noise ---
    reward_model: str | None = None
    """a sequence-classification model whose scores replace the clean reward: a Hugging Face folder or a hub id"""
    reward_per: Literal["episode", "turn"] = "episode"
    """the reward model's score at the end of the episode, or at the end of every turn what the turn adds to it"""
    noise: Literal[
        "none", "symmetric", "asymmetric", "gaussian", "persistent", "group", "length", "random", "majority-vote"
    ] = "symmetric"  # fmt: skip
    """channel between the clean reward, or the reward model's score, and the one that the optimiser sees"""
    noise_rate: float = 0.2
    """probability of an error: symmetric, persistent, group, length"""
    false_negative_rate: float = 0.2
    """P(0 | right): asymmetric"""
    false_positive_rate: float = 0.2
    """P(1 | wrong): asymmetric"""
    noise_sigma: float = 0.5
    """standard deviation: gaussian"""
    vote_samples: int = 8
    """answers of the initial policy whose majority becomes the label: majority-vote"""
    # --- optimisation ---
    epochs: int = 2
    """passes over the episodes of an update"""
    minibatch_size: int = 64
    """episodes in one optimizer step"""
    micro_batch_size: int = 16
    """episodes in one forward pass (gradients accumulate; bounds memory, and short rows travel together)"""
    learning_rate: float = 3e-5
    """AdamW learning rate of the policy"""
    lora_rank: int = 0
    """rank of LoRA adapters on every linear layer of policy and critic, the weights being frozen; 0 trains the weights"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: every learning rate falls to zero over the run"""
    max_grad_norm: float = 1.0
    """norm at which each group of parameters is clipped by itself"""
    clip_range: float = 0.2
    """epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon]"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: float = 0.0
    """weight of the KL divergence to the reference"""
    kl_in: Literal["reward", "loss"] = "reward"
    """the KL penalty is a reward on every token, or the k3 estimate in the loss"""
    # --- evaluation and checkpoints ---
    eval_every: int = 10
    """updates between greedy evaluations on clean held-out problems (also at the start and the end)"""
    eval_size: int = 512
    """held-out problems, the first of the test split"""
    save_every: int = 10
    """updates between checkpoints (also at the end and on SIGTERM or Ctrl-C)"""
    # --- PPO ---
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """lambda of the policy's advantages"""
    critic_lambda: float = 0.95
    """lambda of the critic's targets; 1 is the observed return"""
    critic_backbone: Literal["separate", "shared"] = "separate"
    """separate: a second transformer, initialised from the policy; shared: a head on the policy's own hidden states"""
    critic_learning_rate: float = 1e-3
    """AdamW learning rate of the critic's backbone, if separate"""
    head_learning_rate: float = 1e-3
    """AdamW learning rate of the critic's head"""
    critic_warmup: int = 0
    """first updates that train the critic alone"""
    value_coef: float = 1.0
    """weight of the critic's loss"""
    value_clip: float | None = None
    """the value may move this far from the rollout's in an update (off by default)"""
    # --- robust PPO ---
    worst_case: Literal["ensemble-min", "contamination", "conservative"] = "ensemble-min"
    """the lowest of several heads, a next state that may be the worst of the batch, or a loss that lowers what stands out"""
    value_heads: int = 4
    """K: ensemble-min"""
    contamination: float = 0.05
    """rho, probability of the worst next state: contamination"""
    conservative_coef: float = 0.1
    """alpha, weight of the loss: conservative"""


# ==== 2. Task and noisy reward ========================================================================================


def observe(
    args: Args, clean: list[float], keys: list[str], lengths: list[int], update: int
) -> list[float]:
    """The observed rewards of a batch: every clean reward (0 or 1), or score on that scale, through the channel `--noise`.

    `keys` are the prompts, `lengths` the generated tokens of each episode. Draws are independent for each episode, but
    `persistent` errs on the same prompts in every update and `group` on whole prompts of this update.
    """
    long = sorted(lengths)[-max(1, len(lengths) // 4)]  # the longest quarter begins here
    observed = []
    for i, (reward, key, length) in enumerate(zip(clean, keys, lengths, strict=True)):
        flip_rate = {
            "symmetric": args.noise_rate,
            "asymmetric": args.false_negative_rate if reward > 0.5 else args.false_positive_rate,
            "persistent": args.noise_rate,
            "group": args.noise_rate,
            "length": args.noise_rate if reward < 0.5 and length >= long else 0.0,
            "random": 0.5,  # whatever the answer, the observed reward is a fair coin
        }.get(args.noise, 0.0)
        scope = {"persistent": (key,), "group": (key, update)}.get(args.noise, (key, update, i))
        draw = coin(args.seed, args.noise, *scope)
        if args.noise == "gaussian":
            reward += args.noise_sigma * NormalDist().inv_cdf(draw)
        observed.append(1.0 - reward if draw < flip_rate else reward)
    return observed


def channel_metrics(clean: Tensor, observed: Tensor) -> dict[str, float]:
    """Share of flipped rewards, and Youden's J = P(1 | right) - P(1 | wrong): 1 is a clean channel, 0 a useless one."""
    clean, observed = (
        clean[~clean.isnan()],
        observed[~clean.isnan()],
    )  # where no reference is known, nothing is
    right, says_right = clean > 0.5, observed > 0.5
    youden_j = says_right[right].float().mean() - says_right[~right].float().mean()
    return {
        "reward/flip_rate": (right != says_right).float().mean().item(),
        "reward/youden_j": youden_j.item(),
    }


# ==== 3. Masked-tensor helpers ========================================================================================
#
#   tokens    P  P  P  a  b  E  .  .      P prompt, a b answer, E EOS, . padding: rows are padded on the right
#   inputs    P  P  P  a  b  E  .         = tokens[:-1]: position t is the state in which token t + 1 is chosen
#   targets   P  P  a  b  E  .  .         = tokens[1:]: the token chosen there
#   mask      0  0  1  1  1  0  0         1 where the policy chose the target; user turns and padding are 0
#   rewards   0  0  0  0  r  0  0         on the last token of the turn
#
# This is the only shift: log-probabilities, values, rewards, advantages and losses all live on the grid of `targets`, (B, T).


def pack(episodes: list, pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Episodes as `inputs`, `targets` (B, T) int64, `mask` (B, T) bool, `logprobs` and `entropy` (B, T) of the policy that
    sampled; T is the longest episode minus one."""
    width = max(len(e.tokens) for e in episodes)

    def grid(name: str, filler) -> Tensor:
        return torch.tensor(
            [getattr(e, name) + [filler] * (width - len(e.tokens)) for e in episodes], device=device
        )

    tokens = grid("tokens", pad_id)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "mask": grid("chosen", False)[:, 1:],
    }
    return batch | {
        "logprobs": grid("logprobs", 0.0)[:, 1:],
        "entropy": grid("entropy", 0.0)[:, 1:],
    }


def take(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch, cut to the longest of them: no computing on columns that are padding throughout."""
    width = (
        int(batch["mask"][rows].any(0).nonzero().max().item()) + 1
        if batch["mask"][rows].any()
        else 1
    )
    return {key: value[rows, :width] for key, value in batch.items()}


def by_length(mask: Tensor) -> Tensor:
    """Row indices (B,) from the shortest row to the longest: consecutive ones need little padding."""
    return mask.cumsum(1).argmax(1).argsort(stable=True)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """The inverse of x[mask]: values (N, ...) back on the grid (B, T, ...), zero where the mask is."""
    return values.new_zeros((*mask.shape, *values.shape[1:])).index_put((mask,), values)


def token_weights(mask: Tensor) -> Tensor:
    """Weights (B, T) that sum to one over the minibatch, so that it may be split into micro-batches at will."""
    return mask / mask.sum().clamp(min=1)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """sum of weights * x over the tokens of nonzero weight: a mean over the minibatch, summed micro-batch by micro-batch."""
    return torch.where(weights > 0, weights * x, 0.0).sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean zero and variance one over the masked tokens, zero elsewhere."""
    return torch.where(mask, (x - x[mask].mean()) / (x[mask].std() + 1e-8), 0.0)


def turn_ends(mask: Tensor) -> Tensor:
    """(B, T) bool: the last token of every turn. It is the EOS, which the policy chose too, unless the turn was cut off."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def place_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores (B, K) of the last K turns of each episode, the last turn's in the last column, as rewards (B, T) on the last
    tokens of those turns."""
    ends = turn_ends(mask)
    turns_to_go = ends.sum(1, keepdim=True) - ends.cumsum(1)  # 0 at the end of the last turn
    scored = ends & (turns_to_go < scores.shape[1])
    return torch.where(
        scored, scores.gather(1, (scores.shape[1] - 1 - turns_to_go).clamp(min=0)), 0.0
    )


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the masked tokens: 1 is a perfect critic, 0 a constant, below 0 worse than that. NaN where
    all returns are equal."""
    variance = returns[mask].var()
    return (1 - (returns - values)[mask].var() / variance).item() if variance > 0 else float("nan")


def advantage_noise(advantages: Tensor, without_errors: Tensor, mask: Tensor) -> float:
    """1 - max(0, corr(A, A without the reward errors))^2 over the masked tokens: the share of the variance of the advantages that
    does not follow the clean rewards. Both have the same values, so a critic's own errors are not seen. NaN where either is constant."""
    return (
        1
        - torch.corrcoef(torch.stack([advantages[mask], without_errors[mask]]))[0, 1]
        .clamp(min=0)
        .item()
        ** 2
    )


# ==== 4. Models: policy, frozen reference, critic =====================================================================


def hidden_states(decoder: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (N, D) of the N states in which the policy chose a token. Padding is on the right and attention is
    causal, so no attention mask is needed, and the LM head is never applied to a prompt."""
    return decoder(input_ids=inputs, use_cache=False).last_hidden_state[mask]


LOGITS_AT_ONCE = 2**23  # 32 MB in float32


def logprobs_and_entropy(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi, (N,) each, from hidden states (N, D). Logits are the largest tensors there are, so
    no more than LOGITS_AT_ONCE of them exist at a time: each chunk's are computed again in the backward pass."""

    def chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = (head(hidden).float() / temperature).log_softmax(-1)  # (n, V)
        return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(
            logprobs.exp() * logprobs
        ).sum(-1)

    rows = max(1, LOGITS_AT_ONCE // head.out_features)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    parts = [
        checkpoint(chunk, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


class Critic(nn.Module):
    """robust: V_k(state) = w_k . h + b_k on a causal-LM backbone that starts as a copy of the policy's (or is the policy's, if
    shared); one head, but for ensemble-min."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = twin(policy.get_decoder()) if args.critic_backbone == "separate" else None
        self.head = nn.Linear(
            policy.lm_head.in_features, args.value_heads if args.worst_case == "ensemble-min" else 1
        )
        # robust: the first head starts as PPO's does; heads that all start alike would stay alike
        nn.init.normal_(self.head.weight, std=0.3 * policy.lm_head.in_features**-0.5)
        nn.init.zeros_(self.head.weight[0])
        nn.init.zeros_(self.head.bias)

    def features(self, inputs: Tensor, mask: Tensor, policy_hidden: Tensor | None) -> Tensor:
        """Hidden states (N, D) from which the value is read."""
        return (
            policy_hidden if self.backbone is None else hidden_states(self.backbone, inputs, mask)
        )

    def values(self, features: Tensor) -> Tensor:
        """robust: V_k (N, K) of N states, in float32 whatever the precision of the backbone."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


def make_optimizer(policy, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """One AdamW, a parameter group for each part that has its own learning rate and is clipped by itself."""
    groups = [{"name": "policy", "params": trainable(policy), "lr": args.learning_rate}]
    if critic.backbone is not None:
        groups.append(
            {
                "name": "critic",
                "params": trainable(critic.backbone),
                "lr": args.critic_learning_rate,
            }
        )
    head = [p for name, p in critic.named_parameters() if not name.startswith("backbone.")]
    groups.append({"name": "head", "params": head, "lr": args.head_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


# ==== 5. Rollout ======================================================================================================


@dataclass
class Episode:
    """One conversation: its tokens, which of them the policy chose and out of which distribution, and the policy's answers."""

    problem: object
    tokens: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    finished: bool = False  # the last answer ended with EOS

    def add(
        self,
        tokens: list[int],
        logprobs: list[float] | None = None,
        entropy: list[float] | None = None,
    ) -> None:
        """The next tokens: the policy's own, with log-probability and entropy, or those of the prompt or the user, without."""
        self.tokens += tokens
        self.chosen += [logprobs is not None] * len(tokens)
        self.logprobs += logprobs or [0.0] * len(tokens)
        self.entropy += entropy or [0.0] * len(tokens)


def rollout(policy, chat, task, problems: list, args: Args, temperature: float) -> list[Episode]:
    """Play one episode for every problem: the policy answers, the user replies or is content, for up to --max-turns turns.
    An answer that was cut off ends its episode, since the user would have to speak in the middle of it."""
    live = episodes = [Episode(problem) for problem in problems]
    for episode in episodes:
        episode.add(episode.problem.prompt_ids)
    for turn in range(args.max_turns):
        for start in range(0, len(live), args.rollout_batch_size):
            some = live[start : start + args.rollout_batch_size]
            answers = generate(
                policy, chat, [e.tokens for e in some], args.max_new_tokens, temperature
            )
            for episode, answer in zip(some, answers, strict=True):
                episode.add(*answer)
                episode.completions.append(chat.decode(answer.tokens))
                episode.finished = answer.tokens[-1] in chat.eos_ids
        if turn + 1 < args.max_turns:
            replies = [(e, task.reply(e.problem, e.completions)) for e in live if e.finished]
            replies = [(e, reply) for e, reply in replies if reply is not None]
            for episode, reply in replies:
                episode.add(chat.user_turn_ids(reply))
            live = [episode for episode, _ in replies]
    return episodes


def judged(episode: Episode, args: Args) -> list[str]:
    """The answers of an episode as they are judged: one that was cut off is empty unless --truncated says otherwise."""
    cut_off = args.truncated == "wrong" and not episode.finished
    return [*episode.completions[:-1], ""] if cut_off else episode.completions


def transcripts(
    task, chat, episodes: list[Episode], rewards: Tensor, batch: dict, args: Args
) -> list[dict]:
    """An episode of every prompt: what was said, reward and value at the end of each turn, the true outcome, every token."""
    rows, batch = [], batch | {"rewards": rewards}
    for i in range(0, len(episodes), args.samples_per_prompt):
        episode = episodes[i]
        ends = turn_ends(batch["mask"][i : i + 1])[0]
        row = {key: batch[key][i][ends].tolist() for key in ("rewards", "values") if key in batch}
        row["messages"] = task.messages(episode.problem, episode.completions)
        row["outcome"] = task.measure([(episode.problem, judged(episode, args))])
        row["tokens"] = {
            "text": [chat.tokenizer.decode(t) for t in episode.tokens[1:]],
            "chosen": episode.chosen[1:],
        }
        grids = {
            key: batch[key][i]
            for key in ("values", "advantages", "entropy", "rewards")
            if key in batch
        }
        row["tokens"] |= {
            k: x[: len(episode.tokens) - 1].double().round(decimals=4).tolist()
            for k, x in grids.items()
        }
        rows.append(row)
    return rows


@torch.no_grad()
def score_tokens(policy, reference, critic: Critic, batch: dict, args: Args) -> dict[str, Tensor]:
    """What is fixed before the update, each (B, T): `values`, and `ref_logprobs`, NaN where the reference is None. Rows of similar
    length go through the models together.
    robust: also `heads` (B, T, K), the lowest of which the values are."""
    parts = (
        {}
        if reference is not None
        else {"ref_logprobs": torch.full_like(batch["logprobs"], torch.nan)}
    )
    for rows in by_length(batch["mask"]).split(args.micro_batch_size):
        part = take(batch, rows)
        inputs, mask, targets = part["inputs"], part["mask"], part["targets"][part["mask"]]
        scores = {}
        if reference is not None:
            hidden = hidden_states(reference.get_decoder(), inputs, mask)
            scores["ref_logprobs"], _ = logprobs_and_entropy(
                reference.lm_head, hidden, targets, args.temperature
            )
        hidden = (
            hidden_states(policy.get_decoder(), inputs, mask) if critic.backbone is None else None
        )
        scores["heads"] = critic.values(critic.features(inputs, mask, hidden))  # robust: (N, K)
        scores["values"] = scores["heads"].amin(-1)
        for key, value in scores.items():
            grid = parts.setdefault(key, value.new_zeros((*batch["mask"].shape, *value.shape[1:])))
            grid[rows, : mask.shape[1]] = spread(value, mask)
    return parts


# ==== 6. Advantages ===================================================================================================


# robust: what a state's value counts for in the state before it
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, rho: float = 0.0
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016), all tensors (B, T):

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and V after the last is 0.
    The loop over columns costs a thousandth of an update.
    robust: with probability rho the next state is the worst of the batch, its value is backed up and the path ends there."""
    backups = torch.lerp(values, values[mask].amin(), rho)  # robust: (1 - rho) V + rho min V
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * (1 - rho) * lam * next_advantage  # robust
        next_value = torch.where(mask[:, t], backups[:, t], next_value)  # robust
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


def advantages_and_targets(
    rewards: Tensor, batch: dict, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """A (B, T), not yet whitened, of the rewards and what `score_tokens` found; and what the critic is fitted to: `returns` (B, T)."""
    values, mask = batch["values"], batch["mask"]
    rho = args.contamination if args.worst_case == "contamination" else 0.0  # robust
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda, rho)
    targets = {"returns": gae(rewards, values, mask, args.gamma, args.critic_lambda, rho) + values}
    return advantages, targets


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi - log pi_ref of every token, (B, T): what `--kl-in reward` subtracts, times --kl-coef."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


# ==== 7. Losses =======================================================================================================


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)] with rho = pi / pi_old (Schulman et al. 2017); statistics beside it."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    stats = {
        "losses/approx_kl": weighted_sum(ratio - 1 - log_ratio, weights),
        "losses/clipfrac": weighted_sum(((ratio - 1).abs() > clip_range).float(), weights),
    }
    return weighted_sum(loss, weights), stats


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor) -> Tensor:
    """k3 estimate of KL(pi || pi_ref): E[exp(d) - 1 - d] with d = log pi_ref - log pi (Schulman 2020)."""
    d = ref_logprobs - logprobs
    return weighted_sum(d.exp() - 1 - d, weights)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> Tensor:
    """E[(V - R)^2]; with `clip` the larger of it and the error of V kept within `clip` of the rollout's value."""
    loss = (values - returns) ** 2
    if clip is not None:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.max(loss, (kept - returns) ** 2)
    return weighted_sum(loss, weights)


# robust: after the idea of CQL
def conservative_gap(values: Tensor, mask: Tensor) -> Tensor:
    """log sum exp V - mean V over the masked tokens of each episode, (B, 1), of values (B, T); 0 where there are none. The
    gradient is softmax(V) - 1 / n: it lowers the values that stand out and lifts the rest. Every token counts its episode's."""
    count = mask.sum(1, keepdim=True)
    highest = values.masked_fill(~mask, -1e9).logsumexp(1, keepdim=True)
    return torch.where(
        count > 0,
        highest - torch.where(mask, values, 0.0).sum(1, keepdim=True) / count.clamp(min=1),
        0.0,
    )


def critic_loss(
    critic, features: Tensor, part: dict, unit: Tensor, update: int, args: Args
) -> tuple[Tensor, dict]:
    """The critic's loss on a micro-batch and its terms, from features (N, D); `unit` is the variance of the returns, so that a
    constant critic has 1."""
    heads = spread(critic.values(features), part["mask"]).unbind(-1)
    pairs = zip(heads, part["heads"].unbind(-1), strict=True)
    fits = [
        value_loss(v, old, part["returns"], part["weights"], args.value_clip) for v, old in pairs
    ]
    loss = sum(fits) / len(fits) / unit  # robust: the mean over heads
    losses = {"losses/value": loss}
    if args.worst_case == "conservative":  # robust: in units of the returns' standard deviation
        gap = conservative_gap(heads[0] / unit.sqrt(), part["mask"])
        losses["robust/conservative_gap"] = weighted_sum(gap.expand_as(heads[0]), part["weights"])
        loss = loss + args.conservative_coef * losses["robust/conservative_gap"]
    return loss, losses


# ==== 8. Evaluation ===================================================================================================


def evaluate(policy, chat, task, args: Args) -> tuple[dict[str, float], list[dict]]:
    """The task's own measures on clean held-out problems, answered greedily, and the completions behind them."""
    episodes = rollout(policy, chat, task, task.test[: args.eval_size], args, temperature=0.0)
    outcomes = task.measure([(e.problem, judged(e, args)) for e in episodes])
    metrics = {f"eval/{name}": value for name, value in outcomes.items()}
    metrics["eval/response_length"] = sum(sum(e.chosen) for e in episodes) / len(episodes)
    right = [task.grade(e.problem, judged(e, args)) for e in episodes]
    return metrics, [
        task.show(e.problem, e.completions) | {"right": r}
        for e, r in zip(episodes, right, strict=True)
    ]


# ==== 9. Main loop ====================================================================================================


def main(args: Args) -> None:
    check_flags(args)
    device = pick_device(args.device)
    seed_torch(args.seed, "adapters")
    policy, chat = load_policy(
        args.model,
        device,
        args.lora_rank,
        getattr(torch, args.dtype),
        args.system_prompt,
        args.thinking,
    )
    task = load_task(args, chat)
    reference = twin(policy).requires_grad_(False)
    judge = (
        load_reward_model(args.reward_model, device, args.micro_batch_size)
        if args.reward_model
        else None
    )
    seed_torch(args.seed, "critic")
    critic = Critic(policy, args).to(device)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    run = Run(args)
    run.print(
        f"{run.folder}: {len(task.train)} training, {len(task.test)} test problems; dropped: {task.dropped or 0}"
    )

    start, folder, state = load_checkpoint(args.resume, device, run.print)  # 0 for a fresh run
    if start:
        restore_policy(policy, folder, state)
        restore_critic(critic, state)
    optimizer = make_optimizer(policy, critic, args)
    rates = [group["lr"] for group in optimizer.param_groups]  # the flags', not the checkpoint's
    if start:
        optimizer.load_state_dict(state["optimizer"])
    run.rewind(start)
    labels, scale = (
        {},
        state["scale"].get(args.reward_model) if start else None,
    )  # scale: of the first batch's scores
    if args.noise == "majority-vote":
        visited = [
            p
            for u in range(args.updates)
            for p in task.batch(args.seed, u + 1, args.prompts_per_update)
        ]
        with precision:
            labels = majority_vote(
                lambda some: rollout(reference, chat, task, some, args, args.temperature),
                task,
                visited,
                args,
                run,
            )
    if start == 0:
        with precision:
            metrics, samples = evaluate(policy, chat, task, args)
        run.log(0, {"charts/episodes": 0, **metrics})
        run.samples(0, samples)

    for update in range(start + 1, args.updates + 1):
        began = time.perf_counter()
        last = update == args.updates
        evaluates = update % args.eval_every == 0 or last
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (
                1.0 - (update - 1) / args.updates if args.lr_schedule == "linear" else 1.0
            )
        for parameter in optimizer.param_groups[0][
            "params"
        ]:  # the policy's: until then the critic trains alone
            parameter.requires_grad_(update > args.critic_warmup)

        # --- 9.1 rollout: the same prompts and the same noise for every method that shares the seed ---
        problems = task.batch(args.seed, update, args.prompts_per_update)
        problems = [p for p in problems for _ in range(args.samples_per_prompt)]
        seed_torch(args.seed, "rollout", update)
        with precision:
            episodes = rollout(policy, chat, task, problems, args, args.temperature)
        batch = pack(episodes, chat.pad_id, device)
        rolled = time.perf_counter()

        # --- 9.2 observed reward ---
        lengths = [sum(e.chosen) for e in episodes]
        clean = [task.grade(e.problem, judged(e, args)) for e in episodes]
        finished = torch.tensor([e.finished for e in episodes], device=device)
        if judge:  # what the channel is given: the reward model's score, the majority's pseudo-label, or the truth
            with precision:
                raw = judge.score_episodes(task, episodes, args.reward_per).to(
                    device
                )  # (B, K), the last K turns
            scores, scale = on_reward_scale(raw, scale)
            if args.truncated == "wrong":
                scores[~finished, -1] = scores[~finished, -1].clamp(max=0.0)
        else:
            seen = clean
            if labels:
                labelled = [replace(e.problem, answer=labels[e.problem.key]) for e in episodes]
                seen = [
                    task.grade(p, judged(e, args)) for p, e in zip(labelled, episodes, strict=True)
                ]
            scores = torch.tensor(seen, device=device).unsqueeze(1)  # (B, 1)
        observed = observe(args, scores[:, -1].tolist(), [p.key for p in problems], lengths, update)
        clean, observed = torch.tensor(clean, device=device), torch.tensor(observed, device=device)
        scores[:, -1] = observed
        gains = scores.diff(
            dim=1, prepend=torch.zeros_like(scores[:, :1])
        )  # what each turn adds; they sum to observed
        rewards = place_rewards(gains, batch["mask"])

        # --- 9.3 advantages ---
        if args.truncated == "mask":
            batch["mask"] = batch["mask"] & finished.unsqueeze(1)
        mask = batch["mask"]
        if mask.sum() < 2:
            stop(
                f"update {update}: all answers were cut off and --truncated mask leaves none; raise --max-new-tokens"
            )
        if update == 1:
            nn.init.constant_(
                critic.head.bias, observed.mean().item()
            )  # begin with the best constant
        compared = (
            reference if args.kl_coef > 0 or evaluates else None
        )  # a mere metric is not worth a pass every time
        with precision:
            batch |= score_tokens(policy, compared, critic, batch, args)
        kl = kl_penalty(batch["logprobs"], batch["ref_logprobs"], mask)
        if args.kl_in == "reward" and args.kl_coef > 0:
            rewards = rewards - args.kl_coef * kl
        advantages, critic_targets = advantages_and_targets(rewards, batch, args)
        batch |= critic_targets | {"advantages": whiten(advantages, mask)}
        return_variance = (
            batch["returns"][mask].var().clamp(min=0.01)
        )  # unit of the value loss: 1 is a constant critic
        scored = time.perf_counter()

        # --- 9.4 update: micro-batches add up to the gradient of their minibatch ---
        history = []
        orders = [
            permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for epoch in range(args.epochs)
        ]
        minibatches = [
            rows for order in orders for rows in order.to(device).split(args.minibatch_size)
        ]
        for minibatch in (take(batch, rows) for rows in minibatches):
            minibatch["weights"] = token_weights(minibatch["mask"])
            stats: dict[str, Tensor] = {}
            optimizer.zero_grad()
            for micro in by_length(minibatch["mask"]).split(args.micro_batch_size):
                part = take(minibatch, micro)
                chosen, weights = part["mask"], part["weights"]
                with precision:
                    hidden = hidden_states(policy.get_decoder(), part["inputs"], chosen)
                    targets = part["targets"][chosen]
                    logprobs, entropy = logprobs_and_entropy(
                        policy.lm_head, hidden, targets, args.temperature
                    )
                    features = critic.features(part["inputs"], chosen, hidden)
                    critic_term, losses = critic_loss(
                        critic, features, part, return_variance, update, args
                    )
                logprobs, entropy = spread(logprobs, chosen), spread(entropy, chosen)
                losses["losses/policy"], micro_stats = policy_loss(
                    logprobs, part["logprobs"], part["advantages"], weights, args.clip_range
                )
                loss = losses["losses/policy"] + args.value_coef * critic_term
                loss = loss - args.entropy_coef * weighted_sum(
                    entropy, weights
                )  # 0 too: frees the logits
                if args.kl_in == "loss" and args.kl_coef > 0:
                    loss = loss + args.kl_coef * kl_loss(logprobs, part["ref_logprobs"], weights)
                loss.backward()
                for key, value in {**losses, **micro_stats, "losses/total": loss}.items():
                    stats[key] = stats.get(key, 0.0) + value.detach()
            for group in optimizer.param_groups:
                norm = nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                stats[f"losses/grad_norm_{group['name']}"] = norm.to(
                    device
                )  # on the CPU while there are no gradients
            if not torch.stack(list(stats.values())).isfinite().all():
                numbers = {key: value.item() for key, value in stats.items()}
                stop(f"update {update}: not finite, so the weights were not touched: {numbers}")
            optimizer.step()
            history.append(stats)
        mean = {key: torch.stack([stats[key] for stats in history]).mean().item() for key in stats}
        updated = time.perf_counter()

        # --- 9.5 log: losses are means over all minibatches of the update ---
        sampled = task.measure([(e.problem, judged(e, args)) for e in episodes])
        zeros, observed, clean = (
            torch.zeros_like(rewards),
            observed.unsqueeze(1),
            clean.unsqueeze(1),
        )  # (B, T), (B, 1)
        observed_returns = gae(
            rewards, zeros, mask, args.gamma, 1.0
        )  # V = 0, lambda = 1: the discounted return
        clean_rewards = rewards - place_rewards(observed - clean, mask)
        clean_returns = gae(clean_rewards, zeros, mask, args.gamma, 1.0)
        without_errors, _ = advantages_and_targets(clean_rewards, batch, args)
        metrics = {
            "charts/episodes": update * len(episodes),
            "charts/tokens_per_second": sum(lengths) / (updated - began),
            "charts/response_length": sum(lengths) / len(lengths),
            "charts/turns": sum(len(e.completions) for e in episodes) / len(episodes),
            "charts/eos_rate": finished.float().mean().item(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/peak_memory_gb": peak_memory_gb(device),
            "time/rollout": rolled - began,
            "time/score": scored - rolled,
            "time/update": updated - scored,
            "reward/observed": observed.mean().item(),
            "reward/clean": clean.mean().item(),
            **channel_metrics(clean, observed),
            **{f"sampled/{name}": share for name, share in sampled.items()},
            "reward/total": rewards.sum(1).mean().item(),
            "objective/kl_ref": kl.sum(1).mean().item(),
            "objective/entropy": batch["entropy"][mask].mean().item(),
            "objective/advantage_noise": advantage_noise(advantages, without_errors, mask),
            **mean,
            "critic/explained_variance": explained_variance(
                batch["values"], observed_returns, mask
            ),
            "critic/explained_variance_clean": explained_variance(
                batch["values"], clean_returns, mask
            ),
            "critic/value_mean": batch["values"][mask].mean().item(),
            "critic/return_mean": observed_returns[mask].mean().item(),
            "critic/advantage_std": advantages[mask].std().item(),
            "robust/doubt": (batch["heads"].mean(-1) - batch["values"])[mask]
            .mean()
            .item(),  # robust
        }

        # --- 9.6 evaluate and checkpoint ---
        if evaluates:
            with precision:
                eval_metrics, samples = evaluate(policy, chat, task, args)
            metrics |= eval_metrics
            run.samples(update, samples)
            run.transcripts(update, transcripts(task, chat, episodes, rewards, batch, args))
        run.log(update, metrics)
        leaving = run.interrupt
        if update % args.save_every == 0 or last or leaving:
            state = {
                "critic": critic,
                "optimizer": optimizer.state_dict(),
                "scale": {args.reward_model: scale},
            }
            save_checkpoint(run.folder, update, policy, chat.tokenizer, state)
        if leaving and not last:
            run.leave(leaving, update)

    run.finish()


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
