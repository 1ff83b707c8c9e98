"""PPO with a critic for language models under noisy rewards: the parent of every script here.

A causal LM (the policy) answers questions; a rule says whether the final answer is right; a noise
channel corrupts what the optimiser is told of it; a critic of the policy's own architecture learns
the value of every state; generalised advantage estimation and the clipped objective of PPO do the
rest. Evaluation is always greedy, clean and held out.

Where to look next: `diff ppo_baseline.py vrpo_math.py` shows what VRPO adds to the critic
(docs/lesson.md explains every change), `diff ppo_baseline.py grpo_baseline.py` what is left when
the critic goes. Choices that papers leave open are in docs/details.md; numbers such as (4) are the
equations of docs/algorithm.md.

    python ppo_baseline.py                           # embedded model and data, 20 % flips
    python ppo_baseline.py --noise none --seed 2
    python ppo_baseline.py --task dialogue           # a simulated user, a learned reward model
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import utils  # isort: skip  # noqa: F401  from here on Ctrl-C is one line
import torch
from torch import Tensor, nn

from utils import ranks, tensors
from utils.args import RewardArgs, RunArgs, TaskArgs, check_flags, parse_args
from utils.checkpoints import start_critic
from utils.engine import start_engine, truncated_ratios
from utils.generation import generate
from utils.keyed import coin, permutation, seed_torch
from utils.models import frozen, load_policy, pick_device, save_memory, trainable, twin
from utils.report import metrics
from utils.report.finish import finish
from utils.run import Run
from utils.tensors import Batch, logprobs_and_entropy, micro_batches, on_grid, pack, put, take
from utils.world.environment import Environment, Episode

# ==== 1. Args =====================================================================================


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


@dataclass
class MethodArgs:
    gamma: float = 1.0
    """discount per token"""
    gae_lambda: float = 0.95
    """lambda of the policy's advantages"""
    critic_lambda: float = 0.95
    """lambda of the critic's targets; 1 is the observed return"""
    critic_backbone: Literal["separate", "shared"] = "separate"
    """a second transformer that starts as the policy, or a head on the policy's hidden states"""
    critic_init: str | None = None
    """a run's checkpoints/<update>/critic to start from, in place of policy and a fresh head"""
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


@dataclass
class Args(MethodArgs, UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Seed, model, data, noise and the like are in utils/args.py."""


# ==== 2. Noisy reward and the grid ================================================================
#
#   tokens    P  P  P  a  b  E  .  .    P prompt, a b answer, E EOS, . padding on the right
#   inputs    P  P  P  a  b  E  .       = tokens[:-1]: column t is the state before token t + 1
#   targets   P  P  a  b  E  .  .       = tokens[1:]: the token chosen there
#   mask      0  0  1  1  1  0  0       1 where the policy chose it; not prompt, user or padding
#   rewards   0  0  0  0  r  0  0       on the last token of the episode
#
# This is the only shift (`pack` makes it): log-probabilities, values, rewards, advantages and
# losses all live on the grid of `targets`, (B, T).


def observe(args: Args, scores: Tensor, episodes: list[Episode], update: int) -> Tensor:
    """(1) The rewards (B,) that the optimiser is told: each score, 0 or 1 or on that scale, through
    the channel `--noise`. By default, `symmetric`, it is flipped with probability --noise-rate.

    Every draw is keyed by the seed and by what it is for, so that all methods meet the same flips.
    """
    lengths = [episode.length for episode in episodes]
    long = sorted(lengths, reverse=True)[max(1, len(lengths) // 4) - 1]  # of the longest quarter
    observed = []
    for i, (episode, score) in enumerate(zip(episodes, scores.tolist(), strict=True)):
        key = (episode.problem.key, update, i)  # a coin of its own for every episode
        flip_rate = args.noise_rate  # all there is to `symmetric`
        match args.noise:
            case "none" | "gaussian" | "majority-vote":
                flip_rate = 0.0
            case "asymmetric":
                flip_rate = args.false_positive_rate
                if score > 0.5:
                    flip_rate = args.false_negative_rate
            case "persistent":  # the same prompts are misjudged in every update
                key = (episode.problem.key,)
            case "group":  # all episodes of a prompt are misjudged together
                key = (episode.problem.key, update)
            case "length":  # what is wrong may pass if it is long
                if score > 0.5 or episode.length < long:
                    flip_rate = 0.0
            case "random":  # a fair coin, whatever the answer
                flip_rate = 0.5
        draw = coin(args.seed, args.noise, *key)  # uniform in (0, 1)
        if args.noise == "gaussian":
            score += args.noise_sigma * NormalDist().inv_cdf(draw)
        observed.append(1.0 - score if draw < flip_rate else score)
    return torch.tensor(observed, device=scores.device)


def place_rewards(observed: Tensor, mask: Tensor) -> Tensor:
    """(2) Rewards (B, T): those of the episodes (B,), each on the last token that the policy
    chose."""
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(is_last, observed.unsqueeze(1), 0.0)


def token_weights(mask: Tensor) -> Tensor:
    """Weights (B, T) that sum to one over a minibatch, however it is cut into micro-batches."""
    return mask / mask.sum().clamp(min=1)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """The sum of weights * x over the tokens that have a weight: micro-batches add up to a mean.
    Elsewhere x may be infinite, and 0 * inf is NaN."""
    return torch.where(weights > 0, weights * x, 0.0).sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(6) Mean zero and variance one over the masked tokens, zero elsewhere."""
    chosen = x[mask]
    deviation = chosen.std()
    if deviation < 1e-5 * chosen.abs().max():  # all equal: what is left is rounding
        return torch.zeros_like(x)
    return torch.where(mask, (x - chosen.mean()) / (deviation + 1e-8), 0.0)


# ==== 3. Models: policy, frozen reference, critic =================================================


def hidden_states(transformer: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (N, D) of the N = mask.sum() states in which the policy chose a token, row
    by row (`on_grid` puts N numbers back). Padding is on the right and attention is causal, so no
    attention mask is needed."""
    return transformer(input_ids=inputs, use_cache=False).last_hidden_state[tensors.cells(mask)]


class Critic(nn.Module):
    """V(state) = w . h + b on a causal-LM backbone that starts as a copy of the policy's, or is the
    policy's own if shared."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = None
        if args.critic_backbone == "separate":
            self.backbone = twin(policy.get_decoder())
        self.head = nn.Linear(policy.lm_head.in_features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, features: Tensor) -> Tensor:
        """V (N,) of N states, in float32 whatever the precision of the backbone."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float()).squeeze(-1)


def make_optimizer(policy, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """One AdamW, with a group for each part that has a learning rate of its own (`schedule` sets
    it) and is clipped by itself."""
    groups = {"policy": trainable(policy)}
    if critic.backbone is not None:
        groups["critic"] = trainable(critic.backbone)
    groups["head"] = list(critic.head.parameters())
    named = [{"name": name, "params": parameters} for name, parameters in groups.items()]
    return torch.optim.AdamW(named, weight_decay=0.0, fused=True)


def schedule(optimizer: torch.optim.Optimizer, update: int, args: Args) -> None:
    """The learning rates of an update; during --critic-warmup the policy stands still."""
    rates = {"policy": args.learning_rate}
    rates |= {"critic": args.critic_learning_rate, "head": args.head_learning_rate}
    share = 1.0
    if args.lr_schedule == "linear":
        share = 1.0 - (update - 1) / args.updates
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]] * share
    for parameter in optimizer.param_groups[0]["params"]:  # the policy's
        parameter.requires_grad_(update > args.critic_warmup)


# ==== 4. Rollout ==================================================================================


def rollout(
    policy, env: Environment, problems: list, args: Args, temperature: float
) -> list[Episode]:
    """One episode for every problem: policy and user take turns until the user is content, or for
    --max-turns answers."""
    episodes = [env.begin(problem) for problem in problems]
    live = episodes
    for turn in range(args.max_turns):
        if turn > 0:
            live = env.reply(live)
        prompts = [episode.tokens for episode in live]
        answers = generate(
            policy, env.chat, prompts, args.max_new_tokens, temperature, args.rollout_batch_size
        )
        for episode, answer in zip(live, answers, strict=True):
            episode.say(answer, env.chat)
    return episodes


@torch.no_grad()
def reference_logprobs(reference, batch: Batch, args: Args) -> Tensor:
    """log pi_ref (B, T) of the tokens that the policy chose."""
    grid = torch.zeros_like(batch["logprobs"])
    for rows, part in micro_batches(batch, args.micro_batch_size):
        mask, tokens = part["mask"], part["targets"][tensors.cells(part["mask"])]
        hidden = hidden_states(reference.get_decoder(), part["inputs"], mask)
        logprobs, _ = logprobs_and_entropy(reference.lm_head, hidden, tokens, args.temperature)
        put(grid, rows, logprobs, mask)
    ranks.add_up(grid)
    return grid


@torch.no_grad()
def score_tokens(policy, critic: Critic, batch: Batch, args: Args) -> Batch:
    """What the critic says before the update: `values` (B, T)."""
    backbone = policy.get_decoder() if critic.backbone is None else critic.backbone
    scores = {"values": torch.zeros_like(batch["logprobs"])}
    for rows, part in micro_batches(batch, args.micro_batch_size):
        mask = part["mask"]
        features = hidden_states(backbone, part["inputs"], mask)
        values = critic.values(features)
        put(scores["values"], rows, values, mask)
    ranks.add_up(*scores.values())
    return scores


# ==== 5. Advantages ===============================================================================


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(3) log pi - log pi_ref of every token (B, T): --kl-in reward subtracts it times
    --kl-coef."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """(4) Generalised advantage estimation (Schulman et al. 2016), all tensors (B, T):

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and
    V after the last token is 0."""
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


def advantages_and_targets(rewards: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Batch]:
    """(5) A (B, T), not yet whitened; and what the critic is fitted to: `returns` (B, T)."""
    values, mask = batch["values"], batch["mask"]
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    returns = gae(rewards, values, mask, args.gamma, args.critic_lambda) + values
    return advantages, {"returns": returns}


# ==== 6. Losses ===================================================================================


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """(7) -E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)] with rho = pi / pi_old (Schulman et al.
    2017), and statistics."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    outside = (ratio - 1).abs() > clip_range
    stats = {
        "losses/approx_kl": weighted_sum(ratio - 1 - log_ratio, weights),
        "losses/clipfrac": weighted_sum(outside.float(), weights),
    }
    return weighted_sum(loss, weights), stats


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor) -> Tensor:
    """(8) k3 estimate of KL(pi || pi_ref): E[exp(d) - 1 - d] with d = log pi_ref - log pi
    (Schulman 2020)."""
    d = ref_logprobs - logprobs
    return weighted_sum(d.exp() - 1 - d, weights)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> Tensor:
    """(9) E[(V - R)^2]; with `clip` the larger of it and the error of V kept near the rollout's."""
    loss = (values - returns) ** 2
    if clip is not None:
        kept = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.max(loss, (kept - returns) ** 2)
    return weighted_sum(loss, weights)


def critic_loss(
    critic: Critic, features: Tensor, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """(9) E[(V - R)^2] / Var(R) of a micro-batch, from features (N, D): about 1 for the best
    constant. And its terms, for the log."""
    values = on_grid(critic.values(features), part["mask"])
    loss = value_loss(values, part["values"], part["returns"], part["weights"], args.value_clip)
    return loss / return_variance, {"losses/value": loss / return_variance}


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    check_flags(args)
    device = pick_device(args.device, args.tf32, args.deterministic)
    dtype = getattr(torch, args.dtype)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    # --- 7.1 models, world, optimizer ---
    seed_torch(args.seed, "adapters")
    policy, chat = load_policy(
        args.model, device, args.lora_rank, dtype, args.system_prompt, args.thinking
    )
    reference = frozen(policy, dtype)
    env = Environment(args, chat, device)
    start_engine(policy, args)
    seed_torch(args.seed, "critic")
    critic = start_critic(Critic(policy, args), args).to(device)
    save_memory(args, policy, reference, critic.backbone)
    optimizer = make_optimizer(policy, critic, args)
    run = Run(args)
    run.print(f"{run.folder}: {env}")
    start = run.restore(policy, critic, optimizer, env)  # 0 for a fresh run

    with precision:
        if args.noise == "majority-vote":  # the initial policy's majority is the right answer
            env.vote(lambda some: rollout(reference, env, some, args, args.temperature), run)
        if start == 0:
            held_out = rollout(policy, env, env.held_out, args, temperature=0.0)
            run.samples(0, env.show(held_out))
            run.log(0, {"charts/episodes": 0, **env.evaluate(held_out)})

    for update in range(start + 1, args.updates + 1):
        clock = metrics.Clock()
        evaluates = update % args.eval_every == 0 or update == args.updates
        schedule(optimizer, update, args)

        # --- 7.2 rollout: the same prompts for every method that shares the seed ---
        seed_torch(args.seed, "rollout", update)
        with precision:
            episodes = rollout(policy, env, env.problems(update), args, args.temperature)
        batch = pack(episodes, chat.pad_id, device)  # the grid, with log pi_old of the sampling
        clock.lap("rollout")

        # --- 7.3 reward: the truth, the judge's word, what the optimiser is told of it ---
        clean = env.grade(episodes)  # (B,)
        with precision:
            scores = env.score(episodes, clean)  # (B,) `clean` itself, unless a model judges
        observed = observe(args, scores, episodes, update)  # (B,)
        rewards = place_rewards(observed, batch["mask"])  # (B, T)
        batch["mask"] = env.counted(batch["mask"], episodes)  # --truncated mask: less of it
        mask = batch["mask"]

        # --- 7.4 advantages ---
        if update == 1 and args.critic_init is None:
            nn.init.constant_(critic.head.bias, observed.mean().item())  # all that is known
        ref_logprobs = torch.full_like(rewards, torch.nan)  # NaN is an empty cell of the log
        with precision:
            if args.kl_coef > 0 or evaluates:  # a pass that a mere metric is not worth
                ref_logprobs = reference_logprobs(reference, batch, args)
            batch |= score_tokens(policy, critic, batch, args)
        kl = kl_penalty(batch["logprobs"], ref_logprobs, mask)
        if args.kl_in == "reward" and args.kl_coef > 0:
            rewards = rewards - args.kl_coef * kl
        advantages, critic_targets = advantages_and_targets(rewards, batch, args)
        batch |= critic_targets
        batch["ref_logprobs"] = ref_logprobs
        batch["advantages"] = whiten(advantages, mask)
        batch["advantages"] = batch["advantages"] * truncated_ratios(batch, args)
        return_variance = batch["returns"][mask].var().clamp(min=0.01)
        clock.lap("score")

        # --- 7.5 update: micro-batches add up to the gradient of their minibatch ---
        averages = metrics.Averages(device)
        for epoch in range(args.epochs):
            order = permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for rows in order.split(args.minibatch_size):
                minibatch = take(batch, rows)
                minibatch["weights"] = token_weights(minibatch["mask"])
                averages.new_minibatch()
                optimizer.zero_grad()
                for _, part in micro_batches(minibatch, args.micro_batch_size):
                    part_mask, weights = part["mask"], part["weights"]
                    tokens = part["targets"][tensors.cells(part_mask)]
                    with precision:
                        hidden = hidden_states(policy.get_decoder(), part["inputs"], part_mask)
                        logprobs, entropy = logprobs_and_entropy(
                            policy.lm_head, hidden, tokens, args.temperature
                        )
                        features = (
                            hidden
                            if critic.backbone is None
                            else hidden_states(critic.backbone, part["inputs"], part_mask)
                        )
                        critic_term, terms = critic_loss(
                            critic, features, part, return_variance, args
                        )
                    logprobs = on_grid(logprobs, part_mask)
                    entropy = on_grid(entropy, part_mask)
                    policy_term, stats = policy_loss(
                        logprobs, part["logprobs"], part["advantages"], weights, args.clip_range
                    )
                    loss = policy_term + args.value_coef * critic_term  # (10)
                    if args.entropy_coef > 0:
                        loss = loss - args.entropy_coef * weighted_sum(entropy, weights)
                    if args.kl_in == "loss" and args.kl_coef > 0:
                        loss = loss + args.kl_coef * kl_loss(
                            logprobs, part["ref_logprobs"], weights
                        )
                    loss.backward()
                    averages.add({"losses/policy": policy_term, "losses/total": loss})
                    averages.add(terms | stats)
                ranks.add_gradients(optimizer)
                averages.end_minibatch()
                for group in optimizer.param_groups:
                    norm = nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm)
                    averages.add({f"losses/grad_norm_{group['name']}": norm})
                averages.check_finite(update)
                optimizer.step()
        clock.lap("update")

        # --- 7.6 log: docs/metrics.md ---
        clean_rewards = rewards - place_rewards(observed - clean, mask)
        clean_advantages, _ = advantages_and_targets(clean_rewards, batch, args)
        row = {
            **metrics.of_update(clock, averages, optimizer, episodes, update),
            **metrics.of_rollout(env, episodes, clean, observed),
            "reward/total": rewards.sum(1).mean().item(),
            "objective/kl_ref": kl.sum(1).mean().item(),
            "objective/entropy": batch["entropy"][mask].mean().item(),
            "objective/advantage_noise": metrics.advantage_noise(
                advantages, clean_advantages, mask
            ),
            **metrics.of_critic(batch, rewards, clean_rewards, advantages, args.gamma),
        }

        # --- 7.7 evaluate and save ---
        if evaluates:
            with precision:
                held_out = rollout(policy, env, env.held_out, args, temperature=0.0)
            row |= env.evaluate(held_out)
            run.samples(update, env.show(held_out))
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
