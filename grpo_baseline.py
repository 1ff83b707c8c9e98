"""GRPO for language models under noisy rewards: PPO without the critic; the baseline is the group.

Differs from ppo_baseline.py in:
 1. There is no critic: no values, no GAE, no value loss. An episode's advantage is its score
    relative to the other answers to the same prompt (Shao et al. 2024, arXiv 2402.03300), the same
    for all its tokens.
 2. --advantage has the relatives too: dr_grpo (no division by the group's deviation, arXiv
    2503.20783), rloo (leave one out, arXiv 2402.14740), reinforce_pp (normalised over the batch,
    arXiv 2501.03262), forward (a constant baseline for a known rate of false negatives, arXiv
    2510.00915).
 3. --loss-norm says how tokens are averaged: over the minibatch, within each episode first, or by a
    constant.

    python grpo_baseline.py                          # embedded model and data, 20 % flips
    python grpo_baseline.py --advantage dr_grpo --loss-norm constant
    python grpo_baseline.py --advantage forward --loss-norm constant \
        --assumed-false-negative-rate 0.2
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from utils import metrics, noise
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args
from utils.generation import generate
from utils.keyed import coin, permutation, seed_torch
from utils.models import frozen, set_up, start_policy, trainable
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
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "forward"] = "grpo"
    """how a score becomes an advantage; the first three compare within the group"""
    loss_norm: Literal["token", "sequence", "constant"] = "token"
    """tokens count alike; episodes do; or the sum is divided by episodes x turns x new tokens"""
    assumed_false_negative_rate: float = 0.0
    """P(0 | right) that --advantage forward corrects for"""


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


# GRPO: no critic
def make_optimizer(policy, args: Args) -> torch.optim.Optimizer:
    """AdamW for the policy alone."""
    group = {"name": "policy", "params": trainable(policy), "lr": args.learning_rate}
    return torch.optim.AdamW([group], weight_decay=0.0, fused=True)


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


# GRPO: in place of GAE
def group_advantages(scores: Tensor, args: Args) -> Tensor:
    """(16) Advantages (B,) of scores (B,), the rows of a group standing together.

    GRPO: (r - mean) / (std + 1e-4) of the group; dr_grpo: r - mean; rloo: r - mean of the others;
    of a group of one all three are 0. reinforce_pp: r, which main() then whitens over the tokens of
    the batch; forward: (18)."""
    kind, size = args.advantage, args.samples_per_prompt
    if kind == "reinforce_pp":
        return scores
    if kind == "forward":
        return forward_correction(scores, args.assumed_false_negative_rate)
    groups = scores.view(-1, size)
    centred = groups - groups.mean(1, keepdim=True)
    if kind == "grpo" and size > 1:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    if kind == "rloo" and size > 1:
        centred = centred * size / (size - 1)
    return centred.flatten()


def forward_correction(scores: Tensor, false_negative_rate: float) -> Tensor:
    """(18) GRPO: advantages (B,) r - (1 - FN) (arXiv 2510.00915). Of rewards that err with rates FN
    and FP the mean is 0 for a right answer, -(1 - FN - FP) for a wrong one."""
    return scores - (1 - false_negative_rate)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(6) Mean zero and variance one over the masked tokens, zero elsewhere."""
    chosen = x[mask]
    deviation = chosen.std()
    if deviation < 1e-5 * chosen.abs().max():  # all equal: what is left is rounding
        return torch.zeros_like(x)
    return (x - chosen.mean()) / (deviation + 1e-8) * mask


# ==== 6. Losses ===================================================================================


# GRPO: three ways to average
def token_weights(mask: Tensor, loss_norm: str, max_tokens: int) -> Tensor:
    """(17) Weights (B, T) of a minibatch, however it is cut into micro-batches. They sum to one, or
    with `constant` to the share of the B x max_tokens slots that is filled (Dr.GRPO)."""
    match loss_norm:
        case "token":
            return mask / mask.sum().clamp(min=1)
        case "sequence":
            return mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.any(1).sum().clamp(min=1)
        case "constant":
            return mask / (len(mask) * max_tokens)


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


def total_loss(policy, part: Batch, args: Args) -> tuple[Tensor, Batch]:  # GRPO: no critic
    """(10) The policy's loss and the entropy bonus of a micro-batch; and their terms, for the
    log."""
    hidden = hidden_states(policy.get_decoder(), part)
    logprobs, entropy = logprobs_and_entropy(policy.lm_head, hidden, part, args.temperature)
    policy_term, stats = policy_loss(
        logprobs, part["logprobs"], part["advantages"], part["weights"], args.clip_range
    )
    loss = policy_term - args.entropy_coef * (entropy * part["weights"]).sum()  # GRPO
    return loss, {"losses/policy": policy_term, "losses/total": loss} | stats


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    # --- 7.1 models, world, optimizer ---
    device = set_up(args)
    observe(args, torch.empty(0), [], update=0)  # stops where no channel is called --noise
    policy, chat = start_policy(args, device)
    reference = frozen(policy)  # the initial policy, for the KL penalty
    env = Environment(args, chat, device)  # problems, a user, and a judge who may err
    critic = None  # GRPO
    place(args, policy, reference)
    optimizer = make_optimizer(policy, args)
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

        # --- 7.4 advantages ---
        # GRPO: one score an episode, one advantage for all its tokens
        scores = rewards.sum(1)  # (B,)
        advantages = group_advantages(scores, args).unsqueeze(1) * mask
        if args.advantage == "reinforce_pp":
            advantages = whiten(advantages, mask)
        batch["advantages"] = advantages * batch["sampler"]  # 1, as a rule
        log.lap("score")

        # --- 7.5 update: micro-batches add up to the gradient of their minibatch ---
        max_tokens = args.max_turns * args.max_new_tokens  # GRPO
        for epoch in range(args.epochs):
            order = permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for rows in order.split(args.minibatch_size):
                minibatch = {name: x[rows] for name, x in batch.items()}
                minibatch["weights"] = token_weights(minibatch["mask"], args.loss_norm, max_tokens)
                optimizer.zero_grad()
                for _, part in micro_batches(minibatch, args.micro_batch_size):
                    loss, terms = total_loss(policy, part, args)  # GRPO
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
        row = log.row(update, optimizer, episodes)
        row |= metrics.of_rollout(env, episodes, batch, rewards, clean, observed)
        clean_scores = scores + clean - observed  # GRPO: what there is of a baseline to look at
        row |= metrics.of_groups(scores, clean_scores, group_advantages, mask, args)
        if update % args.eval_every == 0 or update == args.updates:
            row |= evaluate(policy, env, run, args, update)
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
