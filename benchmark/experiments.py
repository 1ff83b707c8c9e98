"""The named experiments of benchmark/run.py, as data: which methods meet which noise, with which
flags and seeds.

All methods of an experiment share prompts, noise, budget and evaluation. To add one, add an entry
to EXPERIMENTS."""

from dataclasses import dataclass, field
from typing import Literal

Flags = dict[str, object]


@dataclass(frozen=True)
class Method:
    """A script, the flags that it is given, and the recipes that are applied to it."""

    script: str
    flags: Flags = field(default_factory=dict)
    recipes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """`flags` hold for all runs; those of the method and of the arm come on top, and last those of
    `extra` for a method in an arm. A method's runs are compared with those of the method that
    `against` names for it, by default the first one (None: with none). A `grid` is reported with
    its arms as columns, VRPO against its rivals, and averages over the noisy arms. `measures` are
    further columns of the tables, with their titles. `score` is what methods are compared by: the
    mean of the evaluations after the start, the last one, or the mean over the run of the sampled
    answers' clean accuracy. `seconds` is what a run took on one thread of a two-core machine."""

    about: str
    flags: Flags
    methods: dict[str, Method]
    arms: dict[str, Flags]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    extra: dict[tuple[str, str], Flags] = field(default_factory=dict)
    against: dict[str, str] | None = field(default_factory=dict)
    grid: bool = False
    measures: dict[str, str] = field(default_factory=dict)
    score: Literal["evaluations", "last", "mean"] = "evaluations"
    seconds: float = 65.0


GRPO = "grpo_baseline"
DR_GRPO = {"advantage": "dr_grpo", "loss_norm": "constant"}
METHODS = {
    "PPO": Method("ppo_baseline"),
    "GRPO": Method(GRPO),
    "Dr.GRPO": Method(GRPO, DR_GRPO),
    "REINFORCE++": Method(GRPO, {"advantage": "reinforce_pp"}),
    "RLOO": Method(GRPO, {"advantage": "rloo"}),
    "VRPO": Method("vrpo_math"),
    "DVPO": Method("dvpo_math"),
    "robust PPO": Method("robust_ppo_baseline"),
}
ARMS: dict[str, Flags] = {
    "no noise": {"noise": "none"},
    "symmetric 0.1": {"noise": "symmetric", "noise_rate": 0.1},
    "symmetric 0.2": {"noise": "symmetric", "noise_rate": 0.2},
    "symmetric 0.3": {"noise": "symmetric", "noise_rate": 0.3},
    "persistent 0.2": {"noise": "persistent", "noise_rate": 0.2},
    # both have Youden's J = 0.6, as symmetric 0.2 has
    "false positives": {
        "noise": "asymmetric",
        "false_positive_rate": 0.35,
        "false_negative_rate": 0.05,
    },
    "false negatives": {
        "noise": "asymmetric",
        "false_positive_rate": 0.05,
        "false_negative_rate": 0.35,
    },
    "length": {"noise": "length", "noise_rate": 0.8},
    "majority vote": {"noise": "majority-vote"},
    "coin": {"noise": "random"},
}

# Small runs, so that the grid fits into an evening: 20 updates of 96 episodes over 120 problems, so
# every problem comes four times (a label that is always wrong is met again). At the learning rate
# that `tuning` found best for every method.
SMALL: Flags = {
    "updates": 20, "prompts_per_update": 24, "epochs": 1, "minibatch_size": 24,
    "learning_rate": 1e-4, "train_split": "train[:120]", "eval_every": 5, "save_every": 10,
}  # fmt: skip
SYMMETRIC = {"symmetric 0.2": ARMS["symmetric 0.2"]}
RATES = (3e-5, 1e-4, 3e-4)
NO_WORDS: Flags = {"lambda_ent": 0.0, "lambda_ppl": 0.0}


# SmolLM2-135M after a supervised start; docs/results/real-model.md makes model and data.
REAL: Flags = {
    "dtype": "bfloat16", "lora_rank": 16, "share_prefixes": True, "max_prompt_tokens": 160,
    "updates": 40, "prompts_per_update": 16, "samples_per_prompt": 8, "epochs": 1,
    "minibatch_size": 128, "micro_batch_size": 32, "rollout_batch_size": 128,
    "learning_rate": 2e-4, "eval_every": 8, "eval_size": 250, "save_every": 8,
}  # fmt: skip


# The world of long answers: each run has 576 training problems of its own, met once.
LONG: Flags = {
    "task": "long", "updates": 24, "prompts_per_update": 24, "epochs": 1, "minibatch_size": 24,
    "learning_rate": 1e-4, "eval_every": 8, "eval_size": 256, "save_every": 12,
}  # fmt: skip


def horizon(lam: float) -> Flags:
    """Lambda of advantages and targets alike."""
    return {"gae_lambda": lam, "critic_lambda": lam}


LAMBDAS = (1.0, 0.99, 0.95, 0.5)
FAR = horizon(1.0)


def with_critics(critic: Flags, vrpo: Flags, vrpo_script: str = "vrpo_math") -> dict[str, Method]:
    """PPO, GRPO and VRPO with the critic's earlier settings and those that are given."""
    critic = {"critic_lambda": 1.0} | critic
    vrpo = critic | {"beta": 0.01, "lambda_ent": 0.05, "lambda_ppl": 0.05} | vrpo
    return {
        "PPO": Method("ppo_baseline", critic),
        "GRPO": Method(GRPO),
        "VRPO": Method(vrpo_script, vrpo),
    }


def vrpo(variants: dict[str, Flags]) -> dict[str, Method]:
    return {name: Method("vrpo_math", flags) for name, flags in variants.items()}


def layers(count: int) -> Method:
    """VRPO with so many Gaussian layers."""
    return Method("vrpo_math", {"bottleneck_layers": count}, ("bottleneck_layers",))


def both(word: str, flag: str, *values: float, recipes: tuple[str, ...] = ()) -> dict[str, Method]:
    """PPO and VRPO with each value of a flag."""
    return {
        f"{name}, {word} {value:g}": Method(METHODS[name].script, {flag: value}, recipes)
        for name in ("PPO", "VRPO")
        for value in values
    }


def lambdas(name: str, *values: float) -> dict[str, Method]:
    """A method with a critic at each value of both lambdas."""
    return {f"{name}, lambda {x:g}": Method(METHODS[name].script, horizon(x)) for x in values}


def methods(*names: str) -> dict[str, Method]:
    return {name: METHODS[name] for name in names}


def oracle(share: float, **flags) -> Method:
    """PPO whose values are an oracle's for that share (benchmark/studies/oracle.py)."""
    script = "benchmark.studies.oracle" if share else "ppo_baseline"
    return Method(script, ({"oracle_share": share} if share else {}) | flags)


def vine(samples: int, judge: str) -> Method:
    return Method("vine_ppo_baseline", {"vine_samples": samples, "vine_judge": judge})


# What a critic is worth: the oracle's share in PPO's values, and critics as they are. HALF is the
# lambda at which the critic's word counts most.
SHARES = (1.0, 0.0, 0.5, 0.25, 0.1)
HALF: Flags = {"gae_lambda": 0.5}
READS = ("critic_reads",)
KNOWN = {
    "critic/explained_variance_first": "explained variance, first state",
    "critic/explained_variance_last": "last state",
}


LONG_MEASURES = {"sampled/right_steps": "right steps"}
READING = {
    f"VRPO that reads, lambda {lam:g}": Method("vrpo_math", {"gae_lambda": lam}, READS)
    for lam in (0.5, 0.95)
}


# Recipes, each on the first script that it names, with the flags that it needs to act.
KL: Flags = {"kl_coef": 0.05}
RECIPES: dict[str, Flags] = {
    "huber": {}, "value_clip": {}, "value_probability": {}, "hl_gauss": {}, "bounded_values": {},
    "prompt_normalised_error": {}, "pessimistic_ensemble": {}, "shared_backbone": {},
    "critic_warmup": {}, "explained_variance_gate": {}, "lambda_gate": HALF, "lambda_by_error": {},
    "lambda_by_length": {}, "group_baseline": {}, "no_whitening": {}, "clip_higher": {},
    "dual_clip": {}, "clipped_weights": {}, "sequence_ratio": {"clip_range": 3e-4},
    "uncertain_fifth": {}, "imitate_right_answers": {}, "negative_first": {},
    "linear_schedule": {}, "kl_in_loss": KL, "master_key": {}, "majority_relabel": {},
    "reads_reference": {}, "informative_groups": {}, "target_nats": {}, "learned_lm_head": {},
    "critic_reads": HALF,
}  # fmt: skip
ON = {
    "informative_groups": GRPO, "sequence_ratio": GRPO, "target_nats": "vrpo_math", "learned_lm_head": "vrpo_math",
    "critic_reads": "vrpo_math",
}  # fmt: skip
PARENTS = {"ppo_baseline": "PPO", GRPO: "GRPO", "vrpo_math": "VRPO"}


# What buys flips back, by rate: about 4 / (1 - 2 rate)^2 answers to a prompt in place of 4. The
# minibatches grow with them, so that all runs make the same number of steps.
BOUGHT = {0.3: 25, 0.2: 11, 0.1: 6, 0.4: 100}


def answers(count: int) -> Flags:
    return {"samples_per_prompt": count, "minibatch_size": 6 * count}


DOSES: dict[str, Flags] = {"no noise": ARMS["no noise"]}
for _rate, _count in BOUGHT.items():
    _flips: Flags = {"noise": "symmetric", "noise_rate": _rate}
    DOSES |= {f"symmetric {_rate}": _flips}
    DOSES |= {f"symmetric {_rate}, {_count} answers": _flips | answers(_count)}
DOSES["no noise, 25 answers"] = ARMS["no noise"] | answers(25)  # the control


EXPERIMENTS = {
    "tuning": Experiment(
        "three learning rates of the policy for every method, on seeds and held-out problems of "
        "their own",
        SMALL | SYMMETRIC["symmetric 0.2"] | {"test_split": "train[3584:]"},
        METHODS,
        {f"learning rate {rate:g}": {"learning_rate": rate} for rate in RATES},
        (101, 102),
        against=None,
        score="last",
    ),
    "noise_grid": Experiment(
        "eight methods under ten rewards",
        SMALL,
        METHODS,
        ARMS,
        grid=True,
    ),
    "fresh_flips": Experiment(
        "PPO, GRPO and VRPO under flips, on twenty seeds that nothing was chosen on",
        SMALL,
        methods("PPO", "GRPO", "VRPO"),
        {name: ARMS[name] for name in ("symmetric 0.2", "symmetric 0.1", "symmetric 0.3")},
        tuple(range(6, 26)),
        seconds=55.0,
    ),
    "long_runs": Experiment(
        "the scripts' own defaults: 10,240 episodes, two epochs, all training problems",
        {},
        methods("PPO", "GRPO", "VRPO", "DVPO", "robust PPO"),
        SYMMETRIC,
        seconds=420.0,
    ),
    "bottleneck_depth": Experiment(
        "no, one and two Gaussian layers",
        SMALL,
        {f"depth {n}": layers(n) for n in (1, 0, 2)} | methods("PPO"),
        SYMMETRIC,
    ),
    "token_ratio": Experiment(
        "share of the tokens under the semantic losses, at two noise rates",
        SMALL,
        vrpo({f"{x:.0%} of the tokens": {"token_ratio": x} for x in (0.8, 0.2, 0.5, 1.0)})
        | methods("PPO"),
        {name: ARMS[name] for name in ("symmetric 0.2", "symmetric 0.3")},
    ),
    "beta_sweep": Experiment(
        "the price of the code",
        SMALL,
        vrpo({f"beta {x:g}": {"beta": x} for x in (0.003, 0.0, 0.0003, 0.03, 0.3)})
        | methods("PPO"),
        SYMMETRIC,
    ),
    "semantic_head": Experiment(
        "frozen, learned or no LM head, all tokens, and the paper's weights",
        SMALL,
        {
            "frozen": METHODS["VRPO"],
            "learned": Method("vrpo_math", recipes=("learned_lm_head",)),
        }
        | vrpo(
            {
                "none": NO_WORDS,
                "all tokens": {"token_ratio": 1.0},
                "the paper's weights": {"lambda_ent": 0.5, "lambda_ppl": 0.5},
            }
        )
        | methods("PPO"),
        SYMMETRIC,
    ),
    "advantage_variance": Experiment(
        "the share of the advantages' variance that the flips make (objective/advantage_noise; the "
        "critic's own errors count as no noise)",
        SMALL,
        methods("GRPO", "Dr.GRPO", "RLOO", "REINFORCE++", "PPO")
        | vrpo({"bottleneck alone": NO_WORDS})
        | {"semantic losses alone": layers(0)}
        | methods("VRPO", "DVPO", "robust PPO"),
        SYMMETRIC,
    ),
    "gae_lambda": Experiment(
        "how far the critic's word replaces the noisy reward in the advantages",
        SMALL,
        both("lambda", "gae_lambda", 0.95, 0.5, 0.9, 1.0),
        SYMMETRIC,
        against={f"VRPO, lambda {value:g}": "VRPO, lambda 0.95" for value in (0.5, 0.9, 1.0)}
        | {"VRPO, lambda 0.95": "PPO, lambda 0.95"},
    ),
    "length_bias": Experiment(
        "which part of VRPO lets a reward for long answers be exploited, and whether the critic's "
        "word does it",
        SMALL,
        methods("PPO", "VRPO")
        | vrpo({"bottleneck alone": NO_WORDS})
        | {"semantic losses alone": layers(0)}
        | both("lambda", "gae_lambda", 1.0),
        {"length": ARMS["length"]},
        against={"VRPO, lambda 1": "VRPO"},
    ),
    "critic_warmup": Experiment(
        "first updates that train the critic alone, within the same number of episodes",
        SMALL,
        both("warm-up", "critic_warmup", 0, 5, recipes=("critic_warmup",)),
        SYMMETRIC,
        against={"VRPO, warm-up 5": "VRPO, warm-up 0"},
    ),
    "failures": Experiment(
        "runs that are bound to fail, and two sound ones, for utils/report/diagnose.py "
        "(--keep tests/recorded)",
        SMALL | SYMMETRIC["symmetric 0.2"],
        {
            "sound PPO": Method("ppo_baseline"),
            "sound VRPO": Method("vrpo_math"),
            "beta 10": Method("vrpo_math", {"beta": 10.0, "beta_warmup": 1}),
            "token ratio 0.01": Method("vrpo_math", {"token_ratio": 0.01}),
            "noise 0.45": Method("ppo_baseline", {"noise_rate": 0.45}),
            "length-biased reward": Method(
                "ppo_baseline", {"noise": "length", "noise_rate": 1.0, "learning_rate": 3e-4}
            ),
            "policy steps too large": Method("ppo_baseline", {"learning_rate": 3e-3}),
            "critic steps too large": Method(
                "ppo_baseline", {"critic_learning_rate": 0.1, "head_learning_rate": 1.0}
            ),
            "answers cut off": Method("ppo_baseline", {"max_new_tokens": 16}),
            "nothing to compare": Method(GRPO, {"temperature": 0.1}),
        },
        {"once": {}},
        (1,),
        against=None,
        score="last",
    ),
    "critic_worth": Experiment(
        "how much a critic must know of the steps before it pays: an oracle's share in PPO's values "
        "by flips, and what the learned critics and VinePPO are worth",
        SMALL,
        {"PPO": METHODS["PPO"], "PPO, lambda 0.5": oracle(0.0, **HALF)}
        | {f"oracle {share:g}": oracle(share, **HALF) for share in SHARES if share}
        | {"blind": oracle(1.0, oracle_knows="nothing", **HALF)}
        | {"VRPO": Method("vrpo_math", HALF), "DVPO": Method("dvpo_math", HALF)}
        | {"Vine 4": vine(4, "observed"), "Vine 4, clean": vine(4, "clean")}
        | {"VRPO that reads": Method("vrpo_math", HALF, READS)}
        | {
            "PPO that reads": Method(
                "vrpo_math",
                HALF | NO_WORDS | {"bottleneck_layers": 0},
                (*READS, "bottleneck_layers"),
            )
        }
        | {"reads, no semantic losses": Method("vrpo_math", HALF | NO_WORDS, READS)}
        | {"reads, beta 0": Method("vrpo_math", HALF | NO_WORDS | {"beta": 0.0}, READS)}
        | {"PPO after imitation": Method("benchmark.studies.imitation")},
        {name: ARMS[name] for name in ("symmetric 0.3", "no noise", "symmetric 0.2")}
        | {"symmetric 0.4": {"noise": "symmetric", "noise_rate": 0.4}},
        measures=KNOWN | {"charts/verifier_calls": "verifier calls an update"},
        score="last",
        seconds=75.0,
    ),
    "critic_lambda_and_error": Experiment(
        "the same at 30 % flips: other lambdas, an oracle that errs, VinePPO with more samples",
        SMALL | ARMS["symmetric 0.3"],
        {
            f"oracle {share:g}, lambda {lam:g}": oracle(share, gae_lambda=lam)
            for lam in (0.95, 0.8)
            for share in (1.0, 0.25, 0.0)
        }
        | {f"error {x:g}": oracle(1.0, oracle_error=x, **HALF) for x in (0.1, 0.2, 0.4)}
        | {"Vine 16": vine(16, "observed"), "Vine 16, clean": vine(16, "clean")},
        {"symmetric 0.3": {}},
        (1, 2, 3),
        against=None,
        score="last",
        seconds=90.0,
    ),
    "science_methods": Experiment(
        "the methods on science questions",
        SMALL | {"task": "science", "train_split": None},
        methods("PPO", "GRPO", "VRPO", "DVPO"),
        {name: ARMS[name] for name in ("no noise", "symmetric 0.2", "coin")},
        (1, 2, 3),
        seconds=90.0,
    ),
    "dialogue_methods": Experiment(
        "the methods on dialogues under the learned reward model",
        {"task": "dialogue", "updates": 20, "eval_every": 5, "save_every": 10},
        methods("PPO", "GRPO", "DVPO") | {"VRPO": Method("vrpo_dialogue")},
        {"reward model": {}},
        (1, 2, 3),
        score="last",
        seconds=400.0,
    ),
    # --keep benchmark/results/dialogue; reward-model.png there: python -m utils.plot of these runs
    "dialogue": Experiment(
        "dialogues in longer runs: under the reward model, without KL, under the truth and under a "
        "coin",
        {"task": "dialogue", "micro_batch_size": 32},
        with_critics({"critic_learning_rate": 5e-4}, {}, "vrpo_dialogue"),
        {
            "reward model": {},
            "no KL": {"kl_coef": 0.0},
            "truth": {"reward_model": None},
            "coin": {"reward_model": None, "noise": "random"},
        },
        (1, 2, 3),
        measures={
            "eval/tcr": "TCR",
            "eval/acr": "ACR",
            "eval/gcr": "GCR",
            "eval/impatient": "broken off by the user",
        },
        score="last",
        seconds=600.0,
    ),
    "long_tuning": Experiment(
        "three learning rates of the policy on long answers, on seeds and held-out problems of "
        "their own",
        LONG | {"train_split": "train[:3584]", "test_split": "train[3584:]"},
        methods("GRPO") | lambdas("PPO", 1.0, 0.95) | lambdas("VRPO", 1.0) | READING,
        {
            f"{arm}, learning rate {rate:g}": ARMS[arm] | {"learning_rate": rate}
            for arm in ("symmetric 0.2", "no noise")
            for rate in RATES
        },
        (101, 102),
        against=None,
        score="mean",
        seconds=120.0,
    ),
    "long_answers": Experiment(
        "all methods on long answers, those with a critic at four lambdas",
        LONG,
        lambdas("PPO", *LAMBDAS)
        | lambdas("VRPO", *LAMBDAS)
        | methods("GRPO", "Dr.GRPO", "RLOO", "REINFORCE++")
        | READING
        | {"mean reward, lambda 0.95": oracle(1.0, oracle_knows="mean", **horizon(0.95))}
        | lambdas("DVPO", 1.0, 0.95)
        | lambdas("robust PPO", 1.0, 0.95)
        | {"oracle, lambda 0.5": oracle(1.0, **HALF), "Vine 4": vine(4, "observed")},
        {name: ARMS[name] for name in ("symmetric 0.2", "no noise", "symmetric 0.1")},
        measures=LONG_MEASURES | KNOWN,
        score="mean",
        seconds=120.0,
    ),
    "long_default": Experiment(
        "today's default of lambda and 1, on seeds that neither was chosen on",
        LONG,
        lambdas("PPO", 0.95, 1.0),
        {name: ARMS[name] for name in ("symmetric 0.2", "no noise")},
        (11, 12, 13, 14, 15),
        measures=LONG_MEASURES | KNOWN,
        score="mean",
        seconds=150.0,
    ),
    # the data: python -m assets.make.tiny_long --only-data --easy-steps 0 0 --out runs/long/25, and
    #   8 8 for 100, 13 14 for 150
    "long_lengths": Experiment(
        "lambda and a critic that reads, by the length of the answer, under 20 % flips",
        LONG | SYMMETRIC["symmetric 0.2"],
        lambdas("PPO", 1.0, 0.95) | READING,
        {
            "25 tokens": {"dataset": "runs/long/25"},
            "56 tokens": {},
            "100 tokens": {"dataset": "runs/long/100", "max_new_tokens": 144},
            "150 tokens": {
                "dataset": "runs/long/150",
                "max_new_tokens": 208,
                "max_prompt_tokens": 160,
            },
        },
        (1, 2, 3),
        measures=LONG_MEASURES | KNOWN,
        score="mean",
        seconds=250.0,
    ),
    "long_parts": Experiment(
        "VRPO and its parts on long answers at lambda 1, on seeds of their own",
        LONG,
        lambdas("PPO", 1.0)
        | {
            "VRPO, lambda 1": Method("vrpo_math", FAR),
            "no price": Method("vrpo_math", FAR | {"beta": 0.0}),
            "no semantic losses": Method("vrpo_math", FAR | NO_WORDS),
            "no code": Method("vrpo_math", FAR | {"bottleneck_layers": 0}, ("bottleneck_layers",)),
        },
        SYMMETRIC,
        tuple(range(11, 31)),
        measures=LONG_MEASURES | KNOWN,
        score="mean",
        seconds=120.0,
    ),
    # the critic: python ppo_baseline.py --task long --learning-rate 0 --critic-lambda 1
    #   --prompts-per-update 24 --epochs 1 --minibatch-size 24 --updates 100 --save-every 100
    #   --eval-size 1 --seed 1000 --run-name long-critic; then runs/long-critic/checkpoints/000100/critic
    # It explains nothing (docs/results/long-answers.md); nor did --noise none --updates 30 --epochs 2
    #   --critic-learning-rate 1e-4, or 3e-4
    "long_critics": Experiment(
        "a critic that has valued 9,600 answers of the initial policy before the run begins, under "
        "the same flips",
        LONG | SYMMETRIC["symmetric 0.2"],
        lambdas("PPO", 1.0, 0.95, 0.5)
        | {
            f"critic with time, lambda {lam:g}": Method(
                "ppo_baseline",
                horizon(lam) | {"critic_init": "runs/long-critic/checkpoints/000100/critic"},
            )
            for lam in (1.0, 0.95, 0.5)
        },
        SYMMETRIC,
        against={
            f"critic with time, lambda {lam:g}": f"PPO, lambda {lam:g}" for lam in (1.0, 0.95, 0.5)
        },
        measures=LONG_MEASURES | KNOWN,
        score="mean",
        seconds=180.0,
    ),
    "price": Experiment(
        "how many more answers buy back what flips take",
        SMALL | {"train_split": None},
        methods("PPO", "GRPO", "VRPO", "DVPO")
        | {"VRPO that reads": Method("vrpo_math", HALF, READS)},
        DOSES,
        seconds=150.0,
    ),
    "recipes": Experiment(
        "every recipe and the script that it changes, without noise and under flips",
        SMALL | {"train_split": None},
        methods("PPO", "GRPO", "VRPO")
        | {"PPO, KL 0.05": Method("ppo_baseline", KL)}
        | {f"{name}, lambda 0.5": Method(METHODS[name].script, HALF) for name in ("PPO", "VRPO")}
        | {"Monte-Carlo targets": Method("ppo_baseline", {"critic_lambda": 1.0})}
        | {
            name: Method(ON.get(name, "ppo_baseline"), flags, (name,))
            for name, flags in RECIPES.items()
        }
        | {f"{count} bottleneck layers": layers(count) for count in (0, 2)}
        | vrpo({"the paper's weights": {"lambda_ent": 0.5, "lambda_ppl": 0.5}}),
        {name: ARMS[name] for name in ("symmetric 0.2", "no noise")},
        against={name: PARENTS[ON[name]] for name in ON}
        | {"kl_in_loss": "PPO, KL 0.05", "lambda_gate": "PPO, lambda 0.5"}
        | {"critic_reads": "VRPO, lambda 0.5"}
        | dict.fromkeys(
            ("0 bottleneck layers", "2 bottleneck layers", "the paper's weights"), "VRPO"
        ),
        seconds=70.0,
    ),
    "word_problems": Experiment(
        "SmolLM2-135M on word problems of one equation",
        REAL
        | {"model": "runs/words/start", "dataset": "runs/words", "max_new_tokens": 24}
        | {"system_prompt": "Answer with one equation."},
        methods("PPO", "GRPO", "VRPO") | {"VRPO that reads": Method("vrpo_math", HALF, READS)},
        {name: ARMS[name] for name in ("no noise", "symmetric 0.2")},
        (1, 2),
        measures=KNOWN,
        score="last",
        seconds=1100.0,
    ),
}
