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

One grid holds an episode of any number of turns: the user's words are outside the mask, GAE jumps
over them, bottleneck and semantic losses act on the assistant's tokens of all turns.

Where reward/observed, the reward model's opinion, drifts from eval/average, it is being exploited.

    python vrpo_dialogue.py                          # embedded assistant, user and reward model
    python vrpo_dialogue.py --reward-per turn
"""

import copy
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import utils  # isort: skip  # noqa: F401  from here on Ctrl-C is one line
import torch
from torch import Tensor, nn

from utils import ranks, tensors
from utils.args import NOISES, RewardArgs, RunArgs, TaskArgs, check_flags, parse_args
from utils.checkpoints import start_critic
from utils.engine import start_engine, truncated_ratios
from utils.errors import stop
from utils.generation import generate
from utils.keyed import coin, permutation, row_seeds, seed_torch
from utils.models import frozen, load_policy, pick_device, save_memory, trainable, twin
from utils.report import metrics
from utils.report.finish import finish
from utils.run import Run
from utils.tensors import (
    Batch,
    logprobs_and_entropy,
    micro_batches,
    on_grid,
    pack,
    put,
    take,
    turn_ends,
)
from utils.world.environment import Environment, Episode
from utils.world.solutions import kept_to_solution, with_reading

# ==== 1. Args =====================================================================================


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
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: every learning rate falls to zero over the run"""
    max_grad_norm: float = 1.0
    """norm at which each group of parameters is clipped by itself"""
    clip_range: float = 0.2
    """epsilon: the ratio is clipped to [1 - epsilon, 1 + epsilon]"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    kl_coef: float = 0.05
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
    # --- VRPO ---
    beta: float = 0.003
    """weight of the bottleneck's KL to the prior"""
    beta_warmup: int = 10
    """updates over which beta rises to its value, so that the critic learns before it pays"""
    latent_dim: int = 64
    """width of the latent code z"""
    bottleneck_layers: Literal[0, 1, 2] = 1
    """Gaussian layers between hidden state and decoder; 0 is PPO's linear head"""
    value_samples: int = 16
    """latent samples over which the rollout's values are averaged (one in the loss)"""
    token_ratio: float = 0.8
    """share of the tokens, the most uncertain ones, on which the semantic losses act"""
    lambda_ent: float = 0.003
    """weight of the entropy loss (0.5 in the paper starves the value here: docs/details.md)"""
    lambda_ppl: float = 0.003
    """weight of the perplexity loss (likewise)"""
    critic_reads: Literal["nothing", "solution"] = "nothing"
    """ours: how far the answer kept to the worked solution, which the policy does not see"""
    lm_head: Literal["frozen", "learned"] = "frozen"
    """LM head of the semantic losses: the initial policy's, or a copy that learns (ablation)"""
    # --- dialogue ---
    reward_per: Literal["episode", "turn"] = "episode"
    """the reward model's score at the end, or at the end of every turn what the turn adds to it"""


@dataclass
class Args(MethodArgs, UpdateArgs, RewardArgs, TaskArgs, RunArgs):
    """Seed, model, data, noise and the like are in utils/args.py."""

    task: Literal["math", "science", "dialogue"] = "dialogue"
    model: str = "assets/tiny_dialogue"
    max_turns: int = 12
    reward_model: str | None = "assets/tiny_reward"
    noise: NOISES = "none"


# ==== 2. Noisy reward and the grid ================================================================
#
#   tokens    P  P  P  a  b  E  .  .    P prompt, a b answer, E EOS, . padding on the right
#   inputs    P  P  P  a  b  E  .       = tokens[:-1]: column t is the state before token t + 1
#   targets   P  P  a  b  E  .  .       = tokens[1:]: the token chosen there
#   mask      0  0  1  1  1  0  0       1 where the policy chose it; not prompt, user or padding
#   rewards   0  0  0  0  r  0  0       dialogue: on the last token of the last turn, or of each
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


# VRPO: the encoder of a Gaussian code
def gaussian_encoder(width: int, latent_dim: int) -> nn.Linear:
    """h -> (mu, log sigma), one behind the other. It starts open, with mu of order 1 and sigma of
    1/e: close to the prior the value's gradient would drown in the code's noise."""
    encoder = nn.Linear(width, 2 * latent_dim)
    with torch.no_grad():
        encoder.weight[:latent_dim].normal_(std=width**-0.5)  # mu
        encoder.weight[latent_dim:] = 0.0  # log sigma
        encoder.bias[:latent_dim] = 0.0
        encoder.bias[latent_dim:] = -1.0
    return encoder


class Critic(nn.Module):
    """VRPO: V(state) through a variational bottleneck, and an LM head, on a causal-LM backbone that
    starts as a copy of the policy's, or is the policy's own if shared."""

    def __init__(self, policy, args: Args):
        super().__init__()
        self.backbone = None
        if args.critic_backbone == "separate":
            self.backbone = twin(policy.get_decoder())
        # VRPO: Gaussian layers, then a decoder of two layers; without them PPO's linear head
        width = policy.lm_head.in_features + (args.critic_reads == "solution")
        self.encoders = nn.ModuleList()
        for _ in range(args.bottleneck_layers):
            self.encoders.append(gaussian_encoder(width, args.latent_dim))
            width = args.latent_dim
        self.decoder = nn.Identity()
        if args.bottleneck_layers > 0:
            self.decoder = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # VRPO: the LM head that reads the critic's hidden states, and the price of its code
        self.lm_head = frozen(policy.lm_head, getattr(torch, args.dtype))
        if args.lm_head == "learned":
            self.lm_head = copy.deepcopy(policy.lm_head).float().requires_grad_(True)
        self.beta = args.beta  # rises during --beta-warmup

    # VRPO: the mean over some samples of the code, with the nats that it costs
    def values(self, features: Tensor, part: Batch, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """(11) V, the bottleneck's KL and the last layer's mean sigma, (N,) each, of the masked
        tokens of `part`. V averages the decoder over the code: at z = mu, an untypical point, it
        was never trained."""
        with torch.autocast(features.device.type, enabled=False):
            z = with_reading(features.float(), part).unsqueeze(0)  # VRPO: (1, N, D)
            kl = sigma = torch.zeros(len(features), device=features.device)
            for layer, encoder in enumerate(self.encoders):
                mu, log_sigma = encoder(z).chunk(2, dim=-1)
                log_sigma = log_sigma.clamp(-5, 2)  # neither certain nor without bounds
                kl = kl + gaussian_kl(mu, log_sigma).mean(0)
                sigma = log_sigma.exp().mean((0, 2))
                noise = tensors.row_normal(
                    part["seed"] + layer, part["mask"], samples, mu.shape[-1]
                )
                z = mu + log_sigma.exp() * noise  # (samples, N, latent_dim)
            return self.head(self.decoder(z)).squeeze(-1).mean(0), kl, sigma


def make_optimizer(policy, critic: Critic, args: Args) -> torch.optim.Optimizer:
    """One AdamW, with a group for each part that has a learning rate of its own (`schedule` sets
    it) and is clipped by itself."""
    groups = {"policy": trainable(policy)}
    if critic.backbone is not None:
        groups["critic"] = trainable(critic.backbone)
    if args.lm_head == "learned":  # VRPO
        groups["lm_head"] = list(critic.lm_head.parameters())
    groups["head"] = [*critic.encoders.parameters(), *critic.decoder.parameters()]  # VRPO
    groups["head"] += critic.head.parameters()
    named = [{"name": name, "params": parameters} for name, parameters in groups.items()]
    return torch.optim.AdamW(named, weight_decay=0.0, fused=True)


def schedule(optimizer: torch.optim.Optimizer, update: int, args: Args) -> None:
    """The learning rates of an update; during --critic-warmup the policy stands still."""
    rates = {"policy": args.learning_rate}
    rates |= {"critic": args.critic_learning_rate, "head": args.head_learning_rate}
    rates["lm_head"] = args.critic_learning_rate  # VRPO: part of a language model, not of a value
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
    """What the critic says before the update: `values` (B, T).
    VRPO: also `entropy_active`, `perplexity_active` (B, T) bool, the tokens about which its LM head
    is least certain."""
    backbone = policy.get_decoder() if critic.backbone is None else critic.backbone
    scores = {"values": torch.zeros_like(batch["logprobs"])}
    critic_entropy = torch.zeros_like(batch["logprobs"])  # VRPO
    critic_nll = torch.zeros_like(batch["logprobs"])
    for rows, part in micro_batches(batch, args.micro_batch_size):
        mask = part["mask"]
        features = hidden_states(backbone, part["inputs"], mask)
        values, _, _ = critic.values(features, part, args.value_samples)  # VRPO
        put(scores["values"], rows, values, mask)
        # VRPO: the same pass tells what the LM head thinks of the tokens
        tokens = part["targets"][tensors.cells(mask)]
        logprobs, entropy = logprobs_and_entropy(critic.lm_head, features, tokens, temperature=1.0)
        put(critic_entropy, rows, entropy, mask)
        put(critic_nll, rows, -logprobs, mask)
    ranks.add_up(*scores.values(), critic_entropy, critic_nll)  # VRPO
    scores["entropy_active"] = most_uncertain(critic_entropy, batch["mask"], args.token_ratio)
    scores["perplexity_active"] = most_uncertain(critic_nll, batch["mask"], args.token_ratio)
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


# VRPO: the three terms that PPO's value loss does not have
def gaussian_kl(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """(12) KL(N(mu, sigma^2) || N(0, I)) = sum of (mu^2 + sigma^2 - 1) / 2 - log sigma over the
    last dimension, in nats."""
    return (0.5 * (mu**2 + (2 * log_sigma).exp() - 1) - log_sigma).sum(-1)


def most_uncertain(uncertainty: Tensor, mask: Tensor, token_ratio: float) -> Tensor:
    """(13) (B, T) bool: the share `token_ratio` of the masked tokens, those of the largest
    uncertainty (entropy, or negative log likelihood)."""
    values = uncertainty[mask]
    ranked = values.argsort(descending=True, stable=True)
    active = torch.zeros_like(values, dtype=torch.bool)
    active[ranked[: round(token_ratio * len(values))]] = True
    return on_grid(active, mask)


def semantic_losses(
    entropy: Tensor, logprobs: Tensor, entropy_weights: Tensor, perplexity_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(14) L_ent = E[H(P_V)] and L_ppl = E[-log P_V(y*)], each over its own uncertain tokens;
    P_V = softmax(W_frozen h_critic), and y* is the token that the policy chose."""
    return weighted_sum(entropy, entropy_weights), weighted_sum(-logprobs, perplexity_weights)


def critic_loss(
    critic: Critic, features: Tensor, part: Batch, return_variance: Tensor, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """(15) VRPO: MSE + beta L_KL + lambda_ent L_ent + lambda_ppl L_ppl of a micro-batch, from
    features (N, D), the MSE in units of Var(R). And its terms, for the log."""
    mask, weights = part["mask"], part["weights"]
    values, ib_kl, sigma = critic.values(features, part, samples=1)
    values = on_grid(values, mask)
    mse = value_loss(values, part["values"], part["returns"], weights, args.value_clip)
    mse = mse / return_variance
    ib_kl = weighted_sum(on_grid(ib_kl, mask), weights)
    sigma = weighted_sum(on_grid(sigma, mask), weights)
    tokens = part["targets"][tensors.cells(mask)]
    logprobs, entropy = logprobs_and_entropy(critic.lm_head, features, tokens, temperature=1.0)
    logprobs, entropy = on_grid(logprobs, mask), on_grid(entropy, mask)
    ent, ppl = semantic_losses(
        entropy, logprobs, part["entropy_weights"], part["perplexity_weights"]
    )
    loss = mse + critic.beta * ib_kl + args.lambda_ent * ent + args.lambda_ppl * ppl
    terms = {"losses/value": mse, "vrpo/ib_kl": ib_kl, "vrpo/latent_std": sigma}
    return loss, terms | {"vrpo/entropy_aux": ent, "vrpo/perplexity_aux": ppl}


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    check_flags(args)
    if args.reward_per == "turn" and not args.reward_model:  # dialogue
        stop("--reward-per turn: only a reward model judges turns; give --reward-model")
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
        critic.beta = args.beta * min(1.0, update / args.beta_warmup)  # VRPO

        # --- 7.2 rollout: the same prompts for every method that shares the seed ---
        seed_torch(args.seed, "rollout", update)
        with precision:
            episodes = rollout(policy, env, env.problems(update), args, args.temperature)
        batch = pack(episodes, chat.pad_id, device)  # the grid, with log pi_old of the sampling
        clock.lap("rollout")

        # --- 7.3 reward: the truth, the judge's word, what the optimiser is told of it ---
        clean = env.grade(episodes)  # (B,)
        with precision:
            if args.reward_per == "turn":  # dialogue: (B, K), after each turn
                scores = env.score_turns(episodes)
            else:
                scores = env.score(episodes, clean).unsqueeze(1)
        observed = observe(args, scores[:, -1], episodes, update)  # (B,)
        gains = turn_gains(scores, observed)  # dialogue
        rewards = place_rewards(gains, batch["mask"])  # (B, T)
        batch["mask"] = env.counted(batch["mask"], episodes)  # --truncated mask: less of it
        mask = batch["mask"]

        # --- 7.4 advantages ---
        if update == 1 and args.critic_init is None:
            nn.init.constant_(critic.head.bias, observed.mean().item())  # all that is known
        batch["seed"] = row_seeds(mask, args.seed, "latent", update)  # VRPO: of the code
        ref_logprobs = torch.full_like(rewards, torch.nan)  # NaN is an empty cell of the log
        with precision:
            if args.kl_coef > 0 or evaluates:  # a pass that a mere metric is not worth
                ref_logprobs = reference_logprobs(reference, batch, args)
            if args.critic_reads == "solution":  # VRPO
                batch["kept"] = kept_to_solution(reference, chat, episodes, batch, args)
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
            batch["seed"] = row_seeds(mask, args.seed, "latent", update, epoch)  # VRPO
            for rows in order.split(args.minibatch_size):
                minibatch = take(batch, rows)
                minibatch["weights"] = token_weights(minibatch["mask"])
                # VRPO: the uncertain tokens of each semantic loss
                minibatch["entropy_weights"] = token_weights(minibatch["entropy_active"])
                minibatch["perplexity_weights"] = token_weights(minibatch["perplexity_active"])
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
        errors = (observed - clean).unsqueeze(1)  # dialogue: on the last turn
        clean_rewards = rewards - place_rewards(errors, mask)
        clean_advantages, _ = advantages_and_targets(clean_rewards, batch, args)
        active = batch["entropy_active"] | batch["perplexity_active"]  # VRPO
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
            "vrpo/active_tokens": active[mask].float().mean().item(),  # VRPO
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
