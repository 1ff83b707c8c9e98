"""DVPO for language models under noisy rewards: PPO whose critic predicts a distribution of returns
(arXiv 2512.03847).

Differs from ppo_baseline.py in:
 1. The critic has several light heads on one backbone, each with M quantiles of the return; the
    ensemble is their mean.
 2. GAE runs once for every quantile. The policy's advantage is the mean over quantiles, which is
    GAE on the mean value.
 3. The critic's loss is quantile regression plus six terms, each with its weight: head consistency;
    the means of the lower and of the upper tail; a punishment of pessimism; a lower tail that may
    only contract and an upper one that may only expand; their curvature. --lambda-... flags set to
    0 from the right end of that list are the paper's ablation.

Ours where the paper is silent (docs/details.md): the losses themselves, in units of the returns'
standard deviation; tails by level, their order only once training has sorted the quantiles.

    python dvpo_math.py                              # embedded model and data, 20 % flips
    python dvpo_math.py --lambda-shape 0 --lambda-curvature 0 --lambda-shift 0
"""

from dataclasses import dataclass

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
    # --- DVPO ---
    quantile_heads: int = 3
    """heads of the ensemble"""
    quantiles: int = 200
    """M, quantiles of each head"""
    huber_kappa: float = 1.0
    """where quantile regression turns from squared to absolute errors, in deviations of returns"""
    tail_share: float = 0.1
    """share of the quantiles in the lower tail, and in the upper"""
    lambda_consistency: float = 0.1
    """weight of the heads' disagreement"""
    lambda_cvar: float = 0.1
    """weight of the lower tail's mean (conditional value at risk)"""
    lambda_gain: float = 0.1
    """weight of the upper tail's mean"""
    lambda_shift: float = 0.1
    """weight of the punishment of pessimism"""
    lambda_shape: float = 0.1
    """weight of the tails' spread"""
    lambda_curvature: float = 0.1
    """weight of the tails' curvature"""


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
    """DVPO: quantiles of the return, some linear heads of M each, on the last hidden state of a
    transformer that starts as a copy of the policy's."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = twin(policy.get_decoder())
        self.shape = (args.quantile_heads, args.quantiles)  # DVPO
        width = policy.lm_head.in_features
        self.head = nn.Linear(width, args.quantile_heads * args.quantiles)
        nn.init.normal_(self.head.weight, std=0.1 * width**-0.5)  # DVPO: heads differ at first
        nn.init.zeros_(self.head.bias)

    def forward(self, part: Batch) -> Tensor:
        """(19) DVPO: theta (b, T, H, M) of the states before each token; V is the mean over H and
        M."""
        return self.head(hidden_states(self.backbone, part)).unflatten(-1, self.shape)  # DVPO


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
    """What the critic says before the update: `values` (B, T), 0 where nothing was chosen. DVPO:
    also the ensemble's `quantiles` (B, T, M), whose mean the values are."""
    scores = {"values": torch.zeros_like(batch["logprobs"])}
    shape = (*batch["mask"].shape, args.quantiles)  # DVPO
    scores["quantiles"] = torch.zeros(shape, device=batch["mask"].device)
    for rows, part in micro_batches(batch, args.micro_batch_size):
        T = part["mask"].shape[1]
        quantiles = critic(part).mean(2) * part["mask"].unsqueeze(-1)  # DVPO: over heads (b, T, M)
        scores["values"][rows, :T] = quantiles.mean(-1)
        scores["quantiles"][rows, :T] = quantiles
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


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """(4) Generalised advantage estimation (Schulman et al. 2016), all tensors (B, T):

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lambda A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and
    V after the last token is 0."""
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = advantage * mask[:, t]
    return advantages


# DVPO: a recursion for every quantile
def distributional_gae(
    rewards: Tensor, quantiles: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """(20) A_j (B, T, M): GAE of the rewards (B, T) with the j-th quantiles (B, T, M) as values.
    GAE is linear, so that the mean over j is GAE on the mean value."""
    over_quantiles = torch.vmap(gae, in_dims=(None, -1, None, None, None), out_dims=-1)
    return over_quantiles(rewards, quantiles, mask, gamma, lam)


def advantages_and_targets(rewards: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Batch]:
    """(5) A (B, T), not yet whitened; and what the critic is fitted to: `returns` (B, T).
    DVPO: the mean over quantiles is for the policy; every quantile, `target_quantiles` (B, T, M),
    for the critic."""
    quantiles, mask = batch["quantiles"], batch["mask"]
    advantages = distributional_gae(rewards, quantiles, mask, args.gamma, args.gae_lambda).mean(-1)
    targets = distributional_gae(rewards, quantiles, mask, args.gamma, args.critic_lambda)
    targets = targets + quantiles
    return advantages, {"returns": targets.mean(-1), "target_quantiles": targets}


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


# DVPO: each term is (N,), a mean over heads, of predicted quantiles theta (N, H, M) and target
# quantiles (N, 1, M), by level.
def squares_below(x: Tensor, t: Tensor) -> Tensor:
    """sum over k of relu(x - t_k)^2, for x (N, HM) and sorted t (N, M): by prefix sums, since a
    table of all pairs takes some fifty times as long."""
    count = torch.searchsorted(t, x.detach())
    first = nn.functional.pad(t.cumsum(-1), (1, 0)).gather(-1, count)
    second = nn.functional.pad((t**2).cumsum(-1), (1, 0)).gather(-1, count)
    return count * x**2 - 2 * x * first + second


def quantile_loss(theta: Tensor, target: Tensor, kappa: float) -> Tensor:
    """(21) L_qr: quantile Huber loss |tau_i - 1{u < 0}| L_kappa(u) / kappa, u = target_k - theta_i,
    tau_i = (i - 1/2) / M, mean over all pairs (Dabney et al. 2018). Of u > 0, L_kappa(u) is
    (u^2 - relu(u - kappa)^2) / 2, hence the sums of squares."""
    heads, count = theta.shape[1:]
    tau = ((torch.arange(count, device=theta.device) + 0.5) / count).repeat(heads)
    x, t = theta.flatten(1), target.squeeze(1).sort(-1).values  # (N, HM) and (N, M)
    low = squares_below(x, t) - squares_below(x - kappa, t)
    high = squares_below(-x, -t.flip(-1)) - squares_below(-x - kappa, -t.flip(-1))
    return (((1 - tau) * low + tau * high) / (2 * kappa * count)).mean(1)


def consistency_loss(theta: Tensor) -> Tensor:
    """(22) L_cons: mean of (theta_a - theta_b)^2 over pairs of heads and quantiles, which is twice
    the variance over heads."""
    if theta.shape[1] == 1:
        return torch.zeros_like(theta[:, 0, 0])
    return 2 * theta.var(1).mean(-1)


def tails(theta: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest `share` of the quantiles (last dimension), one at least."""
    count = max(1, round(share * theta.shape[-1]))
    return theta[..., :count], theta[..., -count:]


def cvar_loss(theta: Tensor, target: Tensor, share: float) -> Tensor:
    """(23) L_cvar: squared error of the lower tail's mean."""
    low, target_low = tails(theta, share)[0], tails(target, share)[0]
    return ((low.mean(-1) - target_low.mean(-1)) ** 2).mean(1)


def gain_loss(theta: Tensor, target: Tensor, share: float) -> Tensor:
    """(23) L_gain: squared error of the upper tail's mean."""
    high, target_high = tails(theta, share)[1], tails(target, share)[1]
    return ((high.mean(-1) - target_high.mean(-1)) ** 2).mean(1)


def shift_loss(theta: Tensor, target: Tensor) -> Tensor:
    """(24) L_shift: how far the mean lies below the target's; to lie above costs nothing."""
    return (target.mean(-1) - theta.mean(-1)).relu().mean(1)


def shape_loss(theta: Tensor, target: Tensor, share: float) -> Tensor:
    """(25) L_shape: noise may not widen the lower tail beyond the target's variance, caution not
    narrow the upper one below it."""
    low, high = (tail.var(-1, correction=0) for tail in tails(theta, share))
    target_low, target_high = (tail.var(-1, correction=0) for tail in tails(target, share))
    return ((low - target_low).relu() + (target_high - high).relu()).mean(1)


def curvature_loss(theta: Tensor, share: float) -> Tensor:
    """(26) L_curv: mean second difference of the quantiles where it is above zero in the lower
    tail, below zero in the upper."""
    low, high = (tail.mean(-1) for tail in tails(theta.diff(n=2, dim=-1), share))
    return (low.relu() + (-high).relu()).mean(1)


def critic_loss(
    critic: Critic, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, Batch]:
    """DVPO: quantile regression and six companions on the N chosen tokens of a micro-batch, in
    units of the returns' deviation. And the terms, for the log; the squared error is only there to
    compare."""
    cells, unit, share = part["cells"], return_variance.sqrt(), args.tail_share
    theta = critic(part).flatten(0, 1)[cells] / unit  # DVPO: (N, H, M)
    target = part["target_quantiles"].flatten(0, 1)[cells].unsqueeze(1) / unit  # (N, 1, M)
    weights = part["weights"].flatten()[cells]  # (N,)
    terms = {
        "dvpo/quantile": quantile_loss(theta, target, args.huber_kappa),
        "dvpo/consistency": consistency_loss(theta),
        "dvpo/cvar": cvar_loss(theta, target, share),
        "dvpo/gain": gain_loss(theta, target, share),
        "dvpo/shift": shift_loss(theta, target),
        "dvpo/shape": shape_loss(theta, target, share),
        "dvpo/curvature": curvature_loss(theta, share),
        "losses/value": (theta.mean((1, 2)) - target.mean((1, 2))) ** 2,
    }
    terms = {key: (term * weights).sum() for key, term in terms.items()}
    loss = terms["dvpo/quantile"] + args.lambda_consistency * terms["dvpo/consistency"]
    loss = loss + args.lambda_cvar * terms["dvpo/cvar"] + args.lambda_gain * terms["dvpo/gain"]
    loss = loss + args.lambda_shift * terms["dvpo/shift"] + args.lambda_shape * terms["dvpo/shape"]
    return loss + args.lambda_curvature * terms["dvpo/curvature"], terms


def of_quantiles(batch: Batch, args: Args) -> dict[str, float]:
    """DVPO: what the ensemble predicted before the update, for the log."""
    quantiles = batch["quantiles"][batch["mask"]]  # (N, M)
    low, high = tails(quantiles, args.tail_share)
    return {
        "dvpo/crossing_rate": (quantiles.diff() < 0).float().mean().item(),
        "dvpo/spread": quantiles.std(-1).mean().item(),
        "dvpo/low_tail": low.mean().item(),
        "dvpo/high_tail": high.mean().item(),
    }


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
        row |= metrics.of_advantages(advantages, errors, mask, args.gamma * args.gae_lambda)
        row |= of_quantiles(batch, args)  # DVPO
        if update % args.eval_every == 0 or update == args.updates:
            row |= evaluate(policy, env, run, args, update)
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
