"""VRPO for task-oriented dialogue: credit for every turn, under a learned reward that errs.

The policy is the assistant, a simulated user has a goal, and a reward model that ranks seven pairs
in ten as the true outcome does takes the place of the verifier. What the optimiser sees is that
model's score; whether the goal was reached is logged and never used.

Differs from vrpo_math.py in:
 1. Credit: with --reward-per turn the reward model judges the dialogue after every turn, and what a
    turn adds to the score is the reward on its last token. The rewards of an episode sum to the
    score of the whole dialogue, which alone goes through the noise channel.
 2. The task, with its defaults (utils/args.py): up to twelve turns, the embedded reward model, a KL
    penalty that keeps the policy where the reward model knows its way.

One row holds an episode of any number of turns: the user's words are outside the mask, GAE jumps
over them, bottleneck and semantic losses act on the assistant's tokens of all turns.

Where reward/observed, the reward model's opinion, drifts from eval/average, it is being exploited.

    python vrpo_dialogue.py                          # embedded assistant, user and reward model
    python vrpo_dialogue.py --reward-per turn
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from utils import metrics, noise
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args
from utils.checkpoints import start_critic
from utils.errors import stop
from utils.generation import generate
from utils.keyed import coin, permutation, row_seeds, seed_torch
from utils.models import frozen, set_up, start_policy, trainable, twin
from utils.report.finish import finish
from utils.run import Run
from utils.scale.memory import place
from utils.scale.processes import add_gradients, add_up
from utils.tensors import (
    Batch,
    hidden_states,
    logprobs_and_entropy,
    micro_batches,
    row_normal,
    turn_ends,
)
from utils.world.environment import Environment, Episode

# ==== 1. Flags ====================================================================================


@dataclass
class UpdateArgs:
    updates: int = 30
    """updates, each of prompts-per-update x samples-per-prompt episodes"""
    prompts_per_update: int = 32
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
    kl_coef: float = 0.05
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
    # --- VRPO ---
    beta: float = 0.003
    """weight of the bottleneck's KL to the prior"""
    beta_warmup: int = 10
    """updates over which beta rises to its value, so that the critic learns before it pays"""
    latent_dim: int = 64
    """width of the latent code z"""
    value_samples: int = 16
    """latent samples over which the rollout's values are averaged (one in the loss)"""
    token_ratio: float = 0.8
    """share of the tokens, the most uncertain ones, on which the semantic losses act"""
    lambda_ent: float = 0.003
    """weight of the entropy loss (0.5 in the paper starves the value here: docs/details.md)"""
    lambda_ppl: float = 0.003
    """weight of the perplexity loss (likewise)"""
    # --- dialogue ---
    reward_per: Literal["episode", "turn"] = "episode"
    """the reward model's score at the end, or at the end of every turn what the turn adds to it"""


@dataclass
class Args(MethodArgs, UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Seed, model, data, noise and the like are in utils/args.py."""

    task: Literal["math", "science", "long", "dialogue"] = "dialogue"
    model: str = "assets/tiny_dialogue"
    dataset: str = "assets/data/tiny_dialogue"
    max_turns: int = 12
    reward_model: str | None = "assets/tiny_reward"
    noise: str = "none"


# ==== 2. Noisy reward =============================================================================
#
#   prompt   tokens behind it
#   P  P  P  a  b  E  .     a b answer, E EOS, . padding
#   mask     1  1  1  0     the policy chose it; 0 on padding and on the words of a user
#   rewards  0  0  r  0     dialogue: on the last token of the last turn, or of each
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


# dialogue: credit for what each turn adds
def turn_gains(scores: Tensor, observed: Tensor) -> Tensor:
    """What each of the last K turns adds (B, K), of the scores (B, K) after each turn. The last one
    has gone through the noise channel: the gains sum to `observed` (B,)."""
    scores = torch.cat([scores[:, :-1], observed.unsqueeze(1)], dim=1)
    return scores.diff(dim=1, prepend=torch.zeros_like(observed).unsqueeze(1))


def place_rewards(gains: Tensor, mask: Tensor) -> Tensor:
    """(32) dialogue: rewards (B, T), the gains (B, K) on the last tokens of the turns. An episode's
    last turn is the last column: of (0, 0.2, 0.5) one with two turns has 0.2 and 0.5."""
    ends = turn_ends(mask)
    turns_to_go = ends.sum(1, keepdim=True) - ends.cumsum(1)  # 0 at the end of the last turn
    column = gains.shape[1] - 1 - turns_to_go
    return torch.where(ends & (column >= 0), gains.gather(1, column.clamp(min=0)), 0.0)


# ==== 3. Models and critic ========================================================================


# VRPO: the price of the latent code
def gaussian_kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """(12) KL(N(mu, sigma^2) || N(0, I)) = sum of (mu^2 + sigma^2 - 1) / 2 - log sigma over the
    last dimension, in nats."""
    return (0.5 * (mu**2 + (2 * log_sigma).exp() - 1) - log_sigma).sum(-1)


class Critic(nn.Module):
    """VRPO: V(state) through a variational bottleneck, from a latent code z ~ N(mu(h), sigma(h)^2)
    of the last hidden state h of a transformer that starts as a copy of the policy's; and a frozen
    LM head that reads h too."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = twin(policy.get_decoder())
        width, latent = policy.lm_head.in_features, args.latent_dim
        # VRPO: mu and log sigma, side by side. The code starts open, with mu of order 1 and sigma
        # of 1/e: close to the prior the value's gradient would drown in the code's noise
        self.encoder = nn.Linear(width, 2 * latent)
        nn.init.normal_(self.encoder.weight[:latent], std=width**-0.5)
        nn.init.zeros_(self.encoder.weight[latent:])
        nn.init.zeros_(self.encoder.bias[:latent])
        nn.init.constant_(self.encoder.bias[latent:], -1.0)
        self.decoder = nn.Sequential(nn.Linear(latent, latent), nn.SiLU())
        self.head = nn.Linear(latent, 1)
        nn.init.zeros_(self.head.weight)  # every value is the bias at first
        nn.init.zeros_(self.head.bias)
        self.lm_head = frozen(policy.lm_head)  # VRPO: as it is in the initial policy
        self.beta = args.beta  # rises during --beta-warmup

    def forward(self, part: Batch, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """(11) Values (b, T) of the states before each token. VRPO: their mean over some samples of
        the latent code, as the decoder was never trained at z = mu, an untypical point; the nats
        (b, T) that the code costs; and the hidden states (b, T, D)."""
        hidden = hidden_states(self.backbone, part)
        mu, log_sigma = self.encoder(hidden).chunk(2, dim=-1)
        log_sigma = log_sigma.clamp(-5, 2)  # neither certain nor without bounds
        noise = row_normal(part["seed"], part["mask"], samples, mu.shape[-1])
        z = mu + log_sigma.exp() * noise  # (samples, b, T, latent_dim)
        values = self.head(self.decoder(z)).squeeze(-1).mean(0)
        return values, gaussian_kl(mu, log_sigma), hidden


def make_optimizer(policy, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """One AdamW, with a group for each part that has a learning rate of its own and is clipped by
    itself."""
    bottleneck = nn.ModuleList([critic.encoder, critic.decoder, critic.head])  # VRPO
    groups = [
        {"name": "policy", "params": trainable(policy), "lr": args.learning_rate},
        {"name": "critic", "params": trainable(critic.backbone), "lr": args.critic_learning_rate},
        {"name": "head", "params": trainable(bottleneck), "lr": args.head_learning_rate},
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
    """What the critic says before the update: `values` (B, T), 0 where nothing was chosen. VRPO:
    also `entropy_active`, `perplexity_active` (B, T) bool, the tokens about which its LM head is
    least certain."""
    scores = {"values": torch.zeros_like(batch["logprobs"])}
    critic_logprobs = torch.zeros_like(batch["logprobs"])  # VRPO
    critic_entropy = torch.zeros_like(batch["logprobs"])
    for rows, part in micro_batches(batch, args.micro_batch_size):
        T = part["mask"].shape[1]
        values, _, hidden = critic(part, args.value_samples)  # VRPO
        scores["values"][rows, :T] = values * part["mask"]
        # VRPO: the same pass tells what the LM head thinks of the tokens
        logprobs, entropy = logprobs_and_entropy(critic.lm_head, hidden, part, temperature=1.0)
        critic_logprobs[rows, :T], critic_entropy[rows, :T] = logprobs, entropy
    add_up(*scores.values(), critic_logprobs, critic_entropy)  # of all processes
    mask, ratio = batch["mask"], args.token_ratio  # VRPO
    scores["entropy_active"] = most_uncertain(critic_entropy, mask, ratio)
    scores["perplexity_active"] = most_uncertain(-critic_logprobs, mask, ratio)
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


def advantages_and_targets(rewards: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Batch]:
    """(5) A (B, T), not yet whitened; and what the critic is fitted to: `returns` (B, T)."""
    values, mask = batch["values"], batch["mask"]
    advantages = gae(rewards, values, mask, args.gamma, args.gae_lambda)
    returns = gae(rewards, values, mask, args.gamma, args.critic_lambda) + values
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


# VRPO: the terms that PPO's critic does not have
def most_uncertain(uncertainty: Tensor, mask: Tensor, token_ratio: float) -> Tensor:
    """(13) (B, T) bool: the share `token_ratio` of the masked tokens, those of the largest
    uncertainty (entropy, or negative log likelihood)."""
    ranked = uncertainty[mask].argsort(descending=True, stable=True)
    active = torch.zeros_like(ranked, dtype=torch.bool)
    active[ranked[: round(token_ratio * len(ranked))]] = True
    return mask.masked_scatter(mask, active)


def semantic_losses(critic: Critic, hidden: Tensor, part: Batch) -> tuple[Tensor, Tensor]:
    """(14) L_ent = E[H(P_V)] and L_ppl = E[-log P_V(y*)], each over its own uncertain tokens, from
    the critic's hidden states (b, T, D); P_V = softmax(W_frozen h), and y* is the token that the
    policy chose."""
    logprobs, entropy = logprobs_and_entropy(critic.lm_head, hidden, part, temperature=1.0)
    ent = (entropy * part["entropy_weights"]).sum()
    return ent, -(logprobs * part["perplexity_weights"]).sum()


def critic_loss(
    critic: Critic, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, Batch]:
    """(15) VRPO: E[(V - R)^2] / Var(R) + beta L_KL + lambda_ent L_ent + lambda_ppl L_ppl of a
    micro-batch. And its terms, for the log."""
    values, kl, hidden = critic(part, samples=1)  # VRPO
    mse = ((values - part["returns"]) ** 2 * part["weights"]).sum() / return_variance
    ib_kl = (kl * part["weights"]).sum()
    ent, ppl = semantic_losses(critic, hidden, part)
    loss = mse + critic.beta * ib_kl + args.lambda_ent * ent + args.lambda_ppl * ppl
    terms = {"losses/value": mse, "vrpo/ib_kl": ib_kl}
    return loss, terms | {"vrpo/entropy_aux": ent, "vrpo/perplexity_aux": ppl}


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
    if args.reward_per == "turn" and not args.reward_model:  # dialogue
        stop("--reward-per turn: only a reward model judges turns; give --reward-model")
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
        critic.beta = args.beta * min(1.0, update / args.beta_warmup)  # VRPO

        # --- 7.2 rollout: the same prompts for every method that shares the seed ---
        seed_torch(args.seed, "rollout", update)
        episodes = rollout(policy, env, env.problems(update), args, args.temperature)
        batch = env.pack(episodes)  # tokens, mask, logprobs, ...: utils/tensors.py
        mask = batch["mask"]  # (B, T)
        log.lap("rollout")

        # --- 7.3 reward: the truth, the judge's word, what the optimiser sees of it ---
        clean = env.grade(episodes)  # (B,) logged, never used
        if args.reward_per == "turn":  # dialogue: (B, K), after each turn
            turns = env.score_turns(episodes)
        else:
            turns = env.score(episodes, clean).unsqueeze(1)
        scores = turns[:, -1]  # dialogue: (B,) of whole episodes
        observed = observe(args, scores, episodes, update)  # (B,)
        rewards = place_rewards(turn_gains(turns, observed), mask)  # (B, T) dialogue
        if args.kl_coef > 0:
            batch["kl"] = kl_penalty(reference, batch, args)  # (B, T)
            rewards = rewards - args.kl_coef * batch["kl"]

        # --- 7.4 values and advantages ---
        if update == 1 and args.critic_init is None:
            nn.init.constant_(critic.head.bias, observed.mean().item())  # all that is known
        batch["seed"] = row_seeds(mask, args.seed, "latent", update)  # VRPO: of the latent codes
        batch |= score_tokens(critic, batch, args)
        advantages, targets = advantages_and_targets(rewards, batch, args)
        batch |= targets
        batch["advantages"] = whiten(advantages, mask) * batch["sampler"]  # 1, as a rule
        return_variance = batch["returns"][mask].var().clamp(min=0.01)
        log.lap("score")

        # --- 7.5 update: micro-batches add up to the gradient of their minibatch ---
        for epoch in range(args.epochs):
            batch["seed"] = row_seeds(mask, args.seed, "latent", update, epoch)  # VRPO
            order = permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for rows in order.split(args.minibatch_size):
                minibatch = {name: x[rows] for name, x in batch.items()}
                minibatch["weights"] = token_weights(minibatch["mask"])
                for kind in ("entropy", "perplexity"):  # VRPO: of the uncertain tokens
                    minibatch[f"{kind}_weights"] = token_weights(minibatch[f"{kind}_active"])
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
        if update % args.eval_every == 0 or update == args.updates:
            row |= evaluate(policy, env, run, args, update)
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
