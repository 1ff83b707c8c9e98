"""VinePPO for language models under noisy rewards: PPO whose values are sampled, not learned.

Differs from ppo_baseline.py in:
 1. There is no critic. The value of a state is the mean outcome of --vine-samples continuations
    that the policy itself samples from there (Kazemnejad et al. 2024, arXiv 2410.01679).
 2. States that are valued are those after the prompt and after every line of an answer; all tokens
    of a line share its value. --gae-lambda acts from line to line: 0, the default, is the paper's.
 3. --vine-judge says who judges the continuations: the noisy channel of the episodes (observed), or
    the truth (clean). The latter is a diagnosis and no method: it asks what nobody could know.
 4. Every continuation is one more call of the verifier, counted in charts/verifier_calls.
Answers have one turn: no dialogue.

    python vine_ppo_baseline.py                      # embedded model and data, 20 % flips
    python vine_ppo_baseline.py --vine-samples 9 --vine-judge clean
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from utils import metrics, noise
from utils.args import RewardArgs, RunArgs, TaskArgs, parse_args
from utils.errors import stop
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
    gae_lambda: float = 0.0
    """lambda from line to line: 0 is one step, 1 the return of the episode"""
    vine_samples: int = 4
    """K: continuations of every state, whose mean outcome is its value"""
    vine_judge: Literal["observed", "clean"] = "observed"
    """continuations are judged as episodes are, errors included; or by the truth, a diagnosis"""


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


# Vine: no critic
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


# Vine: which states are valued
def line_starts(batch: Batch, chat) -> Tensor:
    """(33) (B, T) bool: where the first token of an answer, or of a line of it, is chosen. A line
    begins behind a token that has a line break; empty lines belong to the one that follows."""
    mask, chosen = batch["mask"], batch["tokens"]
    texts = {token: chat.tokenizer.decode(token) for token in chosen[mask].unique().tolist()}
    breaks = [token for token, text in texts.items() if "\n" in text]
    blanks = [token for token in breaks if not texts[token].strip()]

    def is_any(tokens: list[int]) -> Tensor:
        return mask & torch.isin(chosen, torch.tensor(tokens, device=mask.device))

    def one_later(x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :-1], (1, 0))

    is_break = is_any(breaks)
    is_end = is_break & ~(is_any(blanks) & one_later(is_break))
    return mask & (one_later(is_end) | ~one_later(mask))


# Vine: in place of the critic
def sample_values(
    policy, env: Environment, episodes: list, scores: Tensor, batch: Batch, args: Args, update: int
) -> tuple[Tensor, list[Episode]]:
    """(34) V (B, T), constant within a line: the mean outcome of --vine-samples continuations from
    its start. And the continuations, as episodes."""
    starts, mask = batch["starts"], batch["mask"]
    places = [(episodes[row], column) for row, column in starts.nonzero().tolist()]
    prefixes = [(*e.prompt, *e.tokens[:length]) for e, length in places]
    states = dict(zip(prefixes, places, strict=True))  # each once: a group shares its prompt
    forks = [place for place in states.values() for _ in range(args.vine_samples)]
    prompts = [e.prompt + e.tokens[:length] for e, length in forks]
    room = [args.max_new_tokens - length for _, length in forks]
    seed_torch(args.seed, "vine", update)
    answers = generate(policy, env.chat, prompts, room, args.temperature, args.rollout_batch_size)
    vines = [
        episode.branch(length, answer, env.chat)
        for (episode, length), answer in zip(forks, answers, strict=True)
    ]
    outcomes = env.grade(vines)
    if args.vine_judge == "observed":  # numbered behind the episodes: their flips are others
        judged = torch.cat([scores, env.score(vines, outcomes)])
        outcomes = observe(args, judged, [*episodes, *vines], update)[len(episodes) :]
    means = outcomes.view(-1, args.vine_samples).mean(1).tolist()
    value_of = dict(zip(states, means, strict=True))
    values = torch.tensor([value_of[prefix] for prefix in prefixes], device=mask.device)
    line = starts.flatten().cumsum(0).view_as(starts) - 1  # number of the line that a token is in
    return torch.where(mask, values[line], 0.0), vines


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


# Vine: gamma is 1, and lambda acts from line to line
def gae(rewards: Tensor, values: Tensor, mask: Tensor, starts: Tensor, lam: float) -> Tensor:
    """(35) Vine: generalised advantage estimation from line to line, all tensors (B, T):

        delta_t = r_t + V_{t+1} - V_t,    A_t = delta_t + lambda_{t+1} A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and
    V after the last token is 0. Vine: lambda_t is --gae-lambda where a line starts and 1 within it,
    so that at 0 an advantage is the next line's value less its own, plus the rewards in between."""
    passed = torch.where(starts, lam, 1.0)  # Vine: the share of A_t that the token before it gets
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]  # Vine
        advantage = delta + next_advantage  # Vine
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], passed[:, t] * advantage, next_advantage)  # Vine
        advantages[:, t] = advantage * mask[:, t]
    return advantages


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


def total_loss(policy, part: Batch, args: Args) -> tuple[Tensor, Batch]:  # Vine: no critic
    """(10) The policy's loss and the entropy bonus of a micro-batch; and their terms, for the
    log."""
    hidden = hidden_states(policy.get_decoder(), part)
    logprobs, entropy = logprobs_and_entropy(policy.lm_head, hidden, part, args.temperature)
    policy_term, stats = policy_loss(
        logprobs, part["logprobs"], part["advantages"], part["weights"], args.clip_range
    )
    loss = policy_term - args.entropy_coef * (entropy * part["weights"]).sum()  # Vine
    return loss, {"losses/policy": policy_term, "losses/total": loss} | stats


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    # --- 7.1 models, world, optimizer ---
    if args.task == "dialogue" or args.max_turns > 1:  # Vine
        stop("VinePPO samples the rest of one answer: give --max-turns 1, and no --task dialogue")
    device = set_up(args)
    observe(args, torch.empty(0), [], update=0)  # stops where no channel is called --noise
    policy, chat = start_policy(args, device)
    reference = frozen(policy)  # the initial policy, for the KL penalty
    env = Environment(args, chat, device)  # problems, a user, and a judge who may err
    if args.vine_judge == "clean" and any(p.answer is None for p in env.task.train):  # Vine
        stop("--vine-judge clean: there are problems without a reference answer")
    critic = None  # Vine
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

        # --- 7.4 values and advantages ---
        starts = batch["starts"] = line_starts(batch, chat)  # Vine: values are sampled
        batch["values"], vines = sample_values(policy, env, episodes, scores, batch, args, update)
        advantages = gae(rewards, batch["values"], mask, starts, args.gae_lambda)  # Vine
        batch["advantages"] = whiten(advantages, mask) * batch["sampler"]  # 1, as a rule
        log.lap("score")

        # --- 7.5 update: micro-batches add up to the gradient of their minibatch ---
        for epoch in range(args.epochs):
            order = permutation(len(episodes), args.seed, "minibatches", update, epoch)
            for rows in order.split(args.minibatch_size):
                minibatch = {name: x[rows] for name, x in batch.items()}
                minibatch["weights"] = token_weights(minibatch["mask"])
                optimizer.zero_grad()
                for _, part in micro_batches(minibatch, args.micro_batch_size):
                    loss, terms = total_loss(policy, part, args)  # Vine
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
        row |= metrics.of_critic(batch, rewards, errors, gamma=1.0)
        row |= metrics.of_advantages(advantages, errors, mask, args.gae_lambda, steps=starts)
        # Vine: what the values cost
        row["charts/verifier_calls"] = len(episodes) + len(vines)
        row["vine/lines"] = starts.sum().item() / len(episodes)
        row["vine/states"] = len(vines) // args.vine_samples
        if update % args.eval_every == 0 or update == args.updates:
            row |= evaluate(policy, env, run, args, update)
            run.transcripts(update, env.transcripts(episodes, batch | {"rewards": rewards}))
        run.log(update, row)
        run.checkpoint(update, policy, critic, optimizer, env)

    finish(run)


if __name__ == "__main__":
    main(parse_args(Args, __doc__))
