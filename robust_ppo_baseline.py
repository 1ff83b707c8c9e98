"""Robust-Bellman PPO for language models under noisy rewards: PPO whose critic backs up the worst
case.

The worst-case family that papers on noisy supervision compare themselves with: robust Bellman
operators, and the ideas of RFQI (Panaganti et al. 2022) and CQL (Kumar et al. 2020) on a state
value.

Differs from ppo_baseline.py in, by --worst-case:
 1. ensemble-min: K value heads, each fitted to the same targets; V is the lowest of them, in GAE
    and in the targets.
 2. contamination: with probability rho the next state is the worst of the batch; its value is
    (1 - rho) V(s') + rho min V.
 3. conservative: alpha (log sum exp V - mean V) over the tokens of an episode is added to the
    critic's loss, which presses down the values that stand out from the episode.

Ours: everything but the three ideas (docs/details.md). With --critic-lambda 1 the targets of
ensemble-min are the observed returns, into which no worst case enters.

    python robust_ppo_baseline.py                    # embedded model and data, 20 % flips
    python robust_ppo_baseline.py --worst-case contamination --contamination 0.1
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from utils import metrics, noise
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args
from utils.checkpoints import start_critic
from utils.generation import generate
from utils.keyed import coin, permutation, seed_torch
from utils.models import frozen, set_up, start_policy, trainable, twin
from utils.report.finish import finish
from utils.run import Run
from utils.scale.memory import place
from utils.scale.processes import add_gradients, add_up
from utils.tensors import Batch, hidden_states, logprobs_and_entropy, micro_batches
from utils.world.environment import Environment, Episode

# ==== 1. Flags ====================================================================================


@dataclass
class UpdateArgs:
    updates: int = 40
    """updates, each of prompts-per-update x samples-per-prompt episodes"""
    prompts_per_update: int = 64
    """different prompts in an update"""
    samples_per_prompt: int = 4
    """episodes for each of them (a group, for methods and noise channels that have groups)"""
    epochs: int = 2
    """passes over the episodes of an update"""
    minibatch_size: int = 64
    """episodes in one optimizer step"""
    micro_batch_size: int = 16
    """episodes in one forward pass (gradients accumulate; bounds memory)"""
    learning_rate: float = 3e-5
    """AdamW learning rate of the policy"""
    max_grad_norm: float = 1.0
    """norm at which each group of parameters is clipped by itself"""
    clip_range: float = 0.2
    """epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon]"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: float = 0.0
    """weight of the KL penalty, a reward on every token"""


@dataclass
class MethodArgs:
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """lambda of the policy's advantages"""
    critic_lambda: float = 0.95
    """lambda of the critic's targets; 1 is the observed return"""
    critic_learning_rate: float = 1e-3
    """AdamW learning rate of the critic's backbone"""
    head_learning_rate: float = 1e-3
    """AdamW learning rate of the critic's head"""
    critic_init: str | None = None
    """a run's checkpoints/<update>/critic to start from, in place of policy and a fresh head"""
    # --- robust PPO ---
    worst_case: Literal["ensemble-min", "contamination", "conservative"] = "ensemble-min"
    """the lowest of several heads, a next state that may be the worst, or a loss that lowers"""
    value_heads: int = 4
    """K: ensemble-min"""
    contamination: float = 0.05
    """rho, probability of the worst next state: contamination"""
    conservative_coef: float = 0.1
    """alpha, weight of the loss: conservative"""


@dataclass
class Args(MethodArgs, UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Seed, model, data, noise and the like are in utils/args.py."""


# ==== 2. Noisy reward =============================================================================
#
#   prompt   tokens behind it
#   P  P  P  a  b  E  .     a b answer, E EOS, . padding
#   mask     1  1  1  0     the policy chose it; 0 on padding and on the words of a user
#   rewards  0  0  r  0     on the last token of the episode
#
# Every number per token is (B, T), and its column t belongs to the t-th token behind the prompt:
# log-probabilities, values, rewards, advantages and losses. utils/tensors.py makes this layout.


def observe(args: Args, scores: Tensor, episodes: list[Episode], update: int) -> Tensor:
    """(1) The rewards (B,) that the optimiser sees: each score (B,), 0 or 1 or on that scale, is
    flipped with probability --noise-rate. Draws are keyed, so that all methods meet the same flips.
    Other channels than `symmetric` are in utils/noise.py."""
    if args.noise != "symmetric":
        return noise.channel(args, scores, episodes, update)
    keys = [(episode.problem.key, update, i) for i, episode in enumerate(episodes)]
    draws = [coin(args.seed, "symmetric", *key) for key in keys]  # uniform in (0, 1)
    flipped = torch.tensor(draws, dtype=torch.float64, device=scores.device) < args.noise_rate
    return torch.where(flipped, 1 - scores, scores)


def place_rewards(observed: Tensor, batch: Batch) -> Tensor:
    """(2) Rewards (B, T): those of the episodes (B,), each on its last token."""
    return torch.zeros_like(batch["logprobs"]).scatter(1, batch["last"], observed.unsqueeze(1))


# ==== 3. Models and critic ========================================================================


class Critic(nn.Module):
    """robust: V_k(state) = w_k . h + b_k, where h is the last hidden state of a transformer that
    starts as a copy of the policy's; one head, but for ensemble-min."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = twin(policy.get_decoder())
        heads = args.value_heads if args.worst_case == "ensemble-min" else 1  # robust
        self.head = nn.Linear(policy.lm_head.in_features, heads)
        # robust: the first head starts as PPO's does; heads that all start alike would stay alike
        nn.init.normal_(self.head.weight, std=0.3 * policy.lm_head.in_features**-0.5)
        nn.init.zeros_(self.head.weight[0])
        nn.init.zeros_(self.head.bias)

    def forward(self, part: Batch) -> Tensor:
        """robust: V_k (b, T, K) of the states before each token."""
        return self.head(hidden_states(self.backbone, part))


def make_optimizer(policy, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """One AdamW, with a group for each part that has a learning rate of its own and is clipped by
    itself."""
    groups = [
        {"name": "policy", "params": trainable(policy), "lr": args.learning_rate},
        {"name": "critic", "params": trainable(critic.backbone), "lr": args.critic_learning_rate},
        {"name": "head", "params": trainable(critic.head), "lr": args.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


# ==== 4. Rollout ==================================================================================


def rollout(
    policy, env: Environment, problems: list, args: Args, temperature: float
) -> list[Episode]:
    """One episode for every problem: policy and user take turns until the user is content, or for
    --max-turns answers."""
    episodes = live = [Episode(problem) for problem in problems]
    for turn in range(args.max_turns):
        if turn > 0:
            live = env.reply(live)
        prompts = [episode.prompt + episode.tokens for episode in live]
        answers = generate(
            policy, env.chat, prompts, args.max_new_tokens, temperature, args.rollout_batch_size
        )
        for episode, answer in zip(live, answers, strict=True):
            episode.say(answer, env.chat)
    return episodes


def evaluate(policy, env: Environment, run: Run, args: Args, update: int) -> dict[str, float]:
    """Greedy answers to the held-out problems, judged by the truth: the metrics eval/, and rows of
    samples.jsonl."""
    held_out = rollout(policy, env, env.held_out, args, temperature=0.0)
    run.samples(update, env.show(held_out))
    return env.evaluate(held_out)


@torch.no_grad()
def score_tokens(critic: Critic, batch: Batch, args: Args) -> Batch:
    """(27) What the critic says before the update: `values` (B, T), 0 where nothing was chosen.
    robust: they are the lowest of the `heads` (B, T, K)."""
    scores = {"values": torch.zeros_like(batch["logprobs"])}
    shape = (*batch["mask"].shape, critic.head.out_features)  # robust
    scores["heads"] = torch.zeros(shape, device=batch["mask"].device)
    for rows, part in micro_batches(batch, args.micro_batch_size):
        T = part["mask"].shape[1]
        heads = critic(part) * part["mask"].unsqueeze(-1)  # robust: (b, T, K)
        scores["values"][rows, :T] = heads.amin(-1)
        scores["heads"][rows, :T] = heads
    add_up(*scores.values())  # of all processes
    return scores


# ==== 5. Advantages ===============================================================================


@torch.no_grad()
def kl_penalty(reference, batch: Batch, args: Args) -> Tensor:
    """(3) log pi - log pi_ref (B, T) of the tokens that the policy chose; --kl-coef times of it is
    taken off their rewards."""
    ref_logprobs = torch.zeros_like(batch["logprobs"])
    for rows, part in micro_batches(batch, args.micro_batch_size):
        hidden = hidden_states(reference.get_decoder(), part)
        logprobs, _ = logprobs_and_entropy(reference.lm_head, hidden, part, args.temperature)
        ref_logprobs[rows, : logprobs.shape[1]] = logprobs
    add_up(ref_logprobs)  # of all processes
    return (batch["logprobs"] - ref_logprobs) * batch["mask"]


# robust: what a state's value counts for in the state before it
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, rho: float = 0.0
) -> Tensor:
    """(28) Generalised advantage estimation (Schulman et al. 2016), all tensors (B, T):

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and
    V after the last token is 0.
    robust: with probability rho the next state is the worst of the batch; its value is backed up
    and the path ends there."""
    backups = torch.lerp(values, values[mask].amin(), rho)  # robust: (1 - rho) V + rho min V
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * (1 - rho) * lam * next_advantage  # robust
        next_value = torch.where(mask[:, t], backups[:, t], next_value)  # robust
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = advantage * mask[:, t]
    return advantages


def advantages_and_targets(rewards: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Batch]:
    """(5) A (B, T), not yet whitened; and what the critic is fitted to: `returns` (B, T)."""
    values, mask = batch["values"], batch["mask"]
    rho = args.contamination if args.worst_case == "contamination" else 0.0  # robust
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda, rho)
    returns = gae(rewards, values, mask, args.gamma, args.critic_lambda, rho) + values
    return advantages, {"returns": returns}


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(6) Mean zero and variance one over the masked tokens, zero elsewhere."""
    chosen = x[mask]
    deviation = chosen.std()
    if deviation < 1e-5 * chosen.abs().max():  # all equal: what is left is rounding
        return torch.zeros_like(x)
    return (x - chosen.mean()) / (deviation + 1e-8) * mask


# ==== 6. Losses ===================================================================================


def token_weights(mask: Tensor) -> Tensor:
    """Weights (B, T) that sum to one over a minibatch, however it is cut into micro-batches."""
    return mask / mask.sum().clamp(min=1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_range: float
) -> tuple[Tensor, Batch]:
    """(7) -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)] with rho = pi / pi_old (Schulman et al.
    2017), and statistics."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -(torch.min(ratio * advantages, clipped * advantages) * weights).sum()
    outside = (ratio - 1).abs() > clip_range
    stats = {
        "losses/approx_kl": ((ratio - 1 - log_ratio) * weights).sum(),
        "losses/clipfrac": (outside * weights).sum(),
    }
    return loss, stats


# robust: after the idea of CQL
def conservative_gap(values: Tensor, mask: Tensor) -> Tensor:
    """(29) log sum exp V - mean V over the masked tokens of each episode, (B, 1), of values (B, T);
    0 where there are none. The gradient is softmax(V) - 1 / n: it lowers the values that stand out
    and lifts the rest."""
    count = mask.sum(1, keepdim=True)
    highest = values.masked_fill(~mask, -1e9).logsumexp(1, keepdim=True)
    mean = torch.where(mask, values, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(count > 0, highest - mean, 0.0)


def critic_loss(
    critic: Critic, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, Batch]:
    """(27) robust: E[(V_k - R)^2] / Var(R) of a micro-batch, a mean over heads.
    And its terms, for the log."""
    heads, weights = critic(part), part["weights"]  # robust: (b, T, K)
    errors = (heads - part["returns"].unsqueeze(-1)) ** 2
    loss = (errors.mean(-1) * weights).sum() / return_variance  # robust
    terms = {"losses/value": loss}
    if args.worst_case == "conservative":  # robust: in units of the returns' standard deviation
        gap = conservative_gap(heads[..., 0] / return_variance.sqrt(), part["mask"])
        gap = (gap * weights).sum()  # every token counts its episode's
        terms["robust/conservative_gap"] = gap
        loss = loss + args.conservative_coef * gap
    return loss, terms


def total_loss(
    policy, critic: Critic, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, Batch]:
    """(10) The policy's loss, the critic's and the entropy bonus of a micro-batch; and their terms,
    for the log."""
    hidden = hidden_states(policy.get_decoder(), part)
    logprobs, entropy = logprobs_and_entropy(policy.lm_head, hidden, part, args.temperature)
    policy_term, stats = policy_loss(
        logprobs, part["logprobs"], part["advantages"], part["weights"], args.clip_range
    )
    critic_term, terms = critic_loss(critic, part, return_variance, args)
    loss = policy_term + critic_term - args.entropy_coef * (entropy * part["weights"]).sum()
    return loss, {"losses/policy": policy_term, "losses/total": loss} | stats | terms


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    # --- 7.1 models, world, optimizer ---
    device = set_up(args)
    observe(args, torch.empty(0), [], update=0)  # stops where no channel is called --noise
    policy, chat = start_policy(args, device)
    reference = frozen(policy)  # the initial policy, for the KL penalty
    env = Environment(args, chat, device)  # problems, a user, and a judge who may err
    seed_torch(args.seed, "critic")
    critic = start_critic(Critic(policy, args), args).to(device)
    place(args, policy, reference, critic.backbone)
    optimizer = make_optimizer(policy, critic, args)
    run = Run(args)
    run.print(f"{run.folder}: {env}")
    start = run.restore(policy, critic, optimizer, env)  # 0 for a fresh run
    env.prepare(lambda some: rollout(reference, env, some, args, args.temperature), run)
    if start == 0:
        run.log(0, {"charts/episodes": 0, **evaluate(policy, env, run, args, update=0)})

    for update in range(start + 1, args.updates + 1):
        log = metrics.UpdateLog(device)

        # --- 7.2 rollout: the same prompts for every method that shares the seed ---
        seed_torch(args.seed, "rollout", update)
        episodes = rollout(policy, env, env.problems(update), args, args.temperature)
        batch = env.pack(episodes)  # tokens, mask, logprobs, ...: utils/tensors.py
        mask = batch["mask"]  # (B, T)
        log.lap("rollout")

        # --- 7.3 reward: the truth, the judge's word, what the optimiser sees of it ---
        clean = env.grade(episodes)  # (B,) logged, never used
        scores = env.score(episodes, clean)  # (B,) `clean` itself, unless a model judges
        observed = observe(args, scores, episodes, update)  # (B,)
        rewards = place_rewards(observed, batch)  # (B, T)
        if args.kl_coef > 0:
            batch["kl"] = kl_penalty(reference, batch, args)  # (B, T)
            rewards = rewards - args.kl_coef * batch["kl"]

        # --- 7.4 values and advantages ---
        if update == 1 and args.critic_init is None:
            nn.init.constant_(critic.head.bias, observed.mean().item())  # all that is known
        batch |= score_tokens(critic, batch, args)
        advantages, targets = advantages_and_targets(rewards, batch, args)
        batch |= targets
        batch["advantages"] = whiten(advantages, mask) * batch["sampler"]  # 1, as a rule
        return_variance = batch["returns"][mask].var().clamp(min=0.01)
        log.lap("score")

        # --- 7.5 update: micro-batches add up to the gradient of their minibatch ---
        for epoch in range(args.epochs):
            order = permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for rows in order.split(args.minibatch_size):
                minibatch = {name: x[rows] for name, x in batch.items()}
                minibatch["weights"] = token_weights(minibatch["mask"])
                optimizer.zero_grad()
                for _, part in micro_batches(minibatch, args.micro_batch_size):
                    loss, terms = total_loss(policy, critic, part, return_variance, args)
                    loss.backward()
                    log.add(terms)
                add_gradients(optimizer)  # of all processes
                norms = {
                    group["name"]: nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                    for group in optimizer.param_groups
                }
                log.end_minibatch(norms, update)  # stops at a NaN before the weights are touched
                optimizer.step()
        log.lap("update")

        # --- 7.6 log (docs/metrics.md), evaluate, save ---
        errors = observed - (scores if args.reward_fn else clean)  # (B,)
        row = log.row(update, optimizer, episodes)
        row |= metrics.of_rollout(env, episodes, batch, rewards, clean, observed)
        row |= metrics.of_critic(batch, rewards, errors, args.gamma)
        decay = args.gamma * args.gae_lambda
        if args.worst_case == "contamination":  # robust
            decay *= 1 - args.contamination
        row |= metrics.of_advantages(advantages, errors, mask, decay)
        # robust: how far the lowest head lies below the mean
        row["robust/doubt"] = (batch["heads"].mean(-1) - batch["values"])[mask].mean().item()
        if update % args.eval_every == 0 or update == args.updates:
            row |= evaluate(policy, env, run, args, update)
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
