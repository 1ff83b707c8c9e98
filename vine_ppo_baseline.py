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
from statistics import NormalDist
from typing import Literal

import utils  # isort: skip  # noqa: F401  from here on Ctrl-C is one line
import torch
from torch import Tensor, nn

from utils import ranks, tensors
from utils.args import RewardArgs, RunArgs, TaskArgs, check_flags, parse_args
from utils.engine import start_engine, truncated_ratios
from utils.errors import stop
from utils.generation import generate
from utils.keyed import coin, permutation, seed_torch
from utils.models import frozen, load_policy, pick_device, save_memory, trainable
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
    gae_lambda: float = 0.0
    """lambda from line to line: 0 is one step, 1 the return of the episode"""
    vine_samples: int = 4
    """K: continuations of every state, whose mean outcome is its value"""
    vine_judge: Literal["observed", "clean"] = "observed"
    """continuations are judged as episodes are, errors included; or by the truth, a diagnosis"""


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


# Vine: no critic
def make_optimizer(policy) -> torch.optim.Optimizer:
    """AdamW; `schedule` sets its learning rate."""
    group = {"name": "policy", "params": trainable(policy)}
    return torch.optim.AdamW([group], weight_decay=0.0, fused=True)


def schedule(optimizer: torch.optim.Optimizer, update: int, args: Args) -> None:
    """The learning rate of an update. Vine: the policy's alone."""
    share = 1.0
    if args.lr_schedule == "linear":
        share = 1.0 - (update - 1) / args.updates
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * share  # Vine


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


# Vine: which states are valued
def line_starts(batch: Batch, chat) -> Tensor:
    """(33) (B, T) bool: where the first token of an answer, or of a line of it, is chosen. A line
    begins behind a token that has a line break; empty lines belong to the one that follows."""
    mask, targets = batch["mask"], batch["targets"]
    texts = {token: chat.tokenizer.decode(token) for token in targets[mask].unique().tolist()}
    breaks = [token for token, text in texts.items() if "\n" in text]
    blanks = [token for token in breaks if not texts[token].strip()]

    def is_any(tokens: list[int]) -> Tensor:
        return mask & torch.isin(targets, torch.tensor(tokens, device=targets.device))

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
    places = [(episodes[row], column + 1) for row, column in starts.nonzero().tolist()]
    prefixes = [tuple(episode.tokens[:length]) for episode, length in places]
    states = dict(zip(prefixes, places, strict=True))  # each once: a group shares its prompt
    forks = [place for place in states.values() for _ in range(args.vine_samples)]
    tokens = [episode.tokens[:length] for episode, length in forks]
    room = [len(e.problem.prompt_ids) + args.max_new_tokens - length for e, length in forks]
    seed_torch(args.seed, "vine", update)
    answers = generate(policy, env.chat, tokens, room, args.temperature, args.rollout_batch_size)
    vines = [
        episode.branch(length, answer, env.chat)
        for (episode, length), answer in zip(forks, answers, strict=True)
    ]
    outcomes = env.grade(vines)
    if args.vine_judge == "observed":  # numbered behind the episodes: their flips are others
        told = torch.cat([scores, env.score(vines, outcomes)])
        outcomes = observe(args, told, [*episodes, *vines], update)[len(episodes) :]
    means = outcomes.view(-1, args.vine_samples).mean(1).tolist()
    value_of = dict(zip(states, means, strict=True))
    values = torch.tensor([value_of[prefix] for prefix in prefixes], device=mask.device)
    line = starts.flatten().cumsum(0).view_as(starts) - 1  # number of the line that a token is in
    return torch.where(mask, values[line], 0.0), vines


# ==== 5. Advantages ===============================================================================


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(3) log pi - log pi_ref of every token (B, T): --kl-in reward subtracts it times
    --kl-coef."""
    return torch.where(mask, logprobs - ref_logprobs, 0.0)


# Vine: gamma is 1, and lambda acts from line to line
def gae(rewards: Tensor, values: Tensor, mask: Tensor, starts: Tensor, lam: float) -> Tensor:
    """(35) Vine: generalised advantage estimation from line to line, all tensors (B, T):

        delta_t = r_t + V_{t+1} - V_t,    A_t = delta_t + lambda_{t+1} A_{t+1}.

    t + 1 is the next token the *policy* chose: the recursion jumps over user turns and padding, and
    V after the last token is 0. Vine: lambda_t is --gae-lambda where a line starts and 1 within it,
    so that at 0 an advantage is the next line's value less its own, plus the rewards in between."""
    passed = torch.where(starts, lam, 1.0)  # Vine: the share of A_t that the token before it gets
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]  # Vine
        advantage = delta + next_advantage  # Vine
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], passed[:, t] * advantage, next_advantage)  # Vine
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages


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


# ==== 7. Main loop ================================================================================


def main(args: Args) -> None:
    check_flags(args)
    if args.task == "dialogue" or args.max_turns > 1:  # Vine
        stop("VinePPO samples the rest of one answer: give --max-turns 1, and no --task dialogue")
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
    if args.vine_judge == "clean" and any(p.answer is None for p in env.task.train):  # Vine
        stop("--vine-judge clean: there are problems without a reference answer")
    critic = None  # Vine
    save_memory(args, policy, reference, None)
    optimizer = make_optimizer(policy)
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
        ref_logprobs = torch.full_like(rewards, torch.nan)  # NaN is an empty cell of the log
        with precision:
            if args.kl_coef > 0 or evaluates:  # a pass that a mere metric is not worth
                ref_logprobs = reference_logprobs(reference, batch, args)
            # Vine: values are sampled
            batch["starts"] = line_starts(batch, chat)
            batch["values"], vines = sample_values(
                policy, env, episodes, scores, batch, args, update
            )
        kl = kl_penalty(batch["logprobs"], ref_logprobs, mask)
        if args.kl_in == "reward" and args.kl_coef > 0:
            rewards = rewards - args.kl_coef * kl
        # Vine: advantages from line to line
        values, starts = batch["values"], batch["starts"]
        advantages = gae(rewards, values, mask, starts, args.gae_lambda)
        batch["ref_logprobs"] = ref_logprobs
        batch["advantages"] = whiten(advantages, mask)
        batch["advantages"] = batch["advantages"] * truncated_ratios(batch, args)
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
                    logprobs = on_grid(logprobs, part_mask)
                    entropy = on_grid(entropy, part_mask)
                    policy_term, stats = policy_loss(
                        logprobs, part["logprobs"], part["advantages"], weights, args.clip_range
                    )
                    loss = policy_term  # Vine
                    if args.entropy_coef > 0:
                        loss = loss - args.entropy_coef * weighted_sum(entropy, weights)
                    if args.kl_in == "loss" and args.kl_coef > 0:
                        loss = loss + args.kl_coef * kl_loss(
                            logprobs, part["ref_logprobs"], weights
                        )
                    loss.backward()
                    averages.add({"losses/policy": policy_term, "losses/total": loss})
                    averages.add(stats)  # Vine
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
        clean_advantages = gae(clean_rewards, values, mask, starts, args.gae_lambda)  # Vine
        row = {
            **metrics.of_update(clock, averages, optimizer, episodes, update),
            **metrics.of_rollout(env, episodes, clean, observed),
            "reward/total": rewards.sum(1).mean().item(),
            "objective/kl_ref": kl.sum(1).mean().item(),
            "objective/entropy": batch["entropy"][mask].mean().item(),
            "objective/advantage_noise": metrics.advantage_noise(
                advantages, clean_advantages, mask
            ),
            # Vine: what the values cost, and how they foresee the returns
            "charts/verifier_calls": len(episodes) + len(vines),
            "vine/lines": starts.sum().item() / len(episodes),
            "vine/states": len(vines) // args.vine_samples,
            **metrics.of_critic(batch, rewards, clean_rewards, advantages, gamma=1.0),
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
