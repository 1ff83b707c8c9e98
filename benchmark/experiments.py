"""The named experiments of benchmark/run.py, as data: which methods meet which noise, with which
flags and seeds.

All methods of an experiment share prompts, noise, budget and evaluation. To add one, add an entry
to EXPERIMENTS."""

from dataclasses import dataclass, field

Flags = dict[str, object]


@dataclass(frozen=True)
class Method:
    script: str
    flags: Flags = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """`flags` hold for all runs; those of the method and of the arm come on top, and last those of
    `extra` for a method in an arm. A method's runs are compared with those of the method that
    `against` names for it, by default the first one (None: with none). A `grid` is reported with
    its arms as columns, VRPO against its rivals, and averages over the noisy arms. `seconds` is
    what a run took on one thread of a two-core machine."""

    about: str
    flags: Flags
    methods: dict[str, Method]
    arms: dict[str, Flags]
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    extra: dict[tuple[str, str], Flags] = field(default_factory=dict)
    against: dict[str, str] | None = field(default_factory=dict)
    grid: bool = False
    seconds: float = 65.0


GRPO = "grpo_baseline"
DR_GRPO = {"advantage": "dr_grpo", "loss_norm": "constant"}
METHODS = {
    "PPO": Method("ppo_baseline"),
    "GRPO": Method(GRPO),
    "Dr.GRPO": Method(GRPO, DR_GRPO),
    "corrected GRPO": Method(GRPO, DR_GRPO),
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
# The noise-corrected method is told the true rates where the channel has them, and 0.2 each where
# nobody could know them. Centring on the group cancels the shift and AdamW a constant factor, so it
# is Dr.GRPO again but for rounding: how far two runs of one method part.
KNOWN = {"none": (0.0, 0.0), "symmetric": ("noise_rate", "noise_rate"), "persistent": ("noise_rate", "noise_rate"),
         "asymmetric": ("false_positive_rate", "false_negative_rate")}  # fmt: skip


def corrected() -> dict[tuple[str, str], Flags]:
    extra = {}
    for arm, flags in ARMS.items():
        fp, fn = (flags.get(name, name) for name in KNOWN.get(flags["noise"], (0.2, 0.2)))
        extra["corrected GRPO", arm] = {
            "assumed_false_positive_rate": fp,
            "assumed_false_negative_rate": fn,
        }
    return extra


# Small runs, so that the grid fits into an evening: 20 updates of 96 episodes over 120 problems, so
# every problem comes four times (a label that is always wrong is met again). At the learning rate
# that `tuning` found best for each of the nine methods.
SMALL: Flags = {
    "updates": 20, "prompts_per_update": 24, "epochs": 1, "minibatch_size": 24, "learning_rate": 1e-4, "train_split": "train[:120]",
    "eval_every": 5, "save_every": 10,
}  # fmt: skip
SYMMETRIC = {"symmetric 0.2": ARMS["symmetric 0.2"]}
RATES = (3e-5, 1e-4, 3e-4)
NO_WORDS: Flags = {"lambda_ent": 0.0, "lambda_ppl": 0.0}


def vrpo(variants: dict[str, Flags]) -> dict[str, Method]:
    return {name: Method("vrpo_math", flags) for name, flags in variants.items()}


def methods(*names: str) -> dict[str, Method]:
    return {name: METHODS[name] for name in names}


EXPERIMENTS = {
    "tuning": Experiment(
        "three learning rates of the policy for every method, on seeds and held-out problems of their own",
        SMALL | SYMMETRIC["symmetric 0.2"] | {"test_split": "train[3584:]"},
        METHODS,
        {f"learning rate {rate:g}": {"learning_rate": rate} for rate in RATES},
        (101, 102),
        {("corrected GRPO", f"learning rate {rate:g}"): {"assumed_false_positive_rate": 0.2, "assumed_false_negative_rate": 0.2}
         for rate in RATES},
        against=None,
    ),
    "noise_grid": Experiment("nine methods under ten rewards", SMALL, METHODS, ARMS, extra=corrected(), grid=True),
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
        vrpo({f"depth {n}": {"bottleneck_layers": n} for n in (1, 0, 2)}) | methods("PPO"),
        SYMMETRIC,
    ),
    "token_ratio": Experiment(
        "share of the tokens under the semantic losses, at two noise rates",
        SMALL,
        vrpo({f"{ratio:.0%} of the tokens": {"token_ratio": ratio} for ratio in (0.8, 0.2, 0.5, 1.0)}) | methods("PPO"),
        {name: ARMS[name] for name in ("symmetric 0.2", "symmetric 0.3")},
    ),
    "beta_sweep": Experiment(
        "the price of the code",
        SMALL,
        vrpo({f"beta {beta:g}": {"beta": beta} for beta in (0.003, 0.0, 0.0003, 0.03, 0.3)}) | methods("PPO"),
        SYMMETRIC,
    ),
    "semantic_head": Experiment(
        "frozen, learned or no LM head, all tokens, and the paper's weights",
        SMALL,
        vrpo({
            "frozen": {},
            "learned": {"lm_head": "learned"},
            "none": NO_WORDS,
            "all tokens": {"token_ratio": 1.0},
            "the paper's weights": {"lambda_ent": 0.5, "lambda_ppl": 0.5},
        })
        | methods("PPO"),
        SYMMETRIC,
    ),
    "advantage_variance": Experiment(
        "the share of the advantages' variance that the flips make (objective/advantage_noise; the critic's own errors count as no noise)",
        SMALL,
        methods("GRPO", "Dr.GRPO", "RLOO", "REINFORCE++", "PPO")
        | vrpo({"bottleneck alone": NO_WORDS, "semantic losses alone": {"bottleneck_layers": 0}})
        | methods("VRPO", "DVPO", "robust PPO"),
        SYMMETRIC,
    ),
    "gae_lambda": Experiment(
        "how far the critic's word replaces the noisy reward in the advantages",
        SMALL,
        {
            f"{name}, lambda {value:g}": Method(METHODS[name].script, {"gae_lambda": value})
            for name in ("PPO", "VRPO")
            for value in (0.95, 0.5, 0.9, 1.0)
        },
        SYMMETRIC,
        against={f"VRPO, lambda {value:g}": "VRPO, lambda 0.95" for value in (0.5, 0.9, 1.0)}
        | {"VRPO, lambda 0.95": "PPO, lambda 0.95"},
    ),
    "length_bias": Experiment(
        "which part of VRPO lets a reward for long answers be exploited, and whether the critic's word does it",
        SMALL,
        methods("PPO", "VRPO")
        | vrpo({"bottleneck alone": NO_WORDS, "semantic losses alone": {"bottleneck_layers": 0}})
        | {f"{name}, lambda 1": Method(METHODS[name].script, {"gae_lambda": 1.0}) for name in ("PPO", "VRPO")},
        {"length": ARMS["length"]},
        against={"VRPO, lambda 1": "VRPO"},
    ),
    "critic_warmup": Experiment(
        "first updates that train the critic alone, within the same number of episodes",
        SMALL,
        {f"{name}, warm-up {n}": Method(METHODS[name].script, {"critic_warmup": n}) for name in ("PPO", "VRPO") for n in (0, 5)},
        SYMMETRIC,
        against={"VRPO, warm-up 5": "VRPO, warm-up 0"},
    ),
    "failures": Experiment(
        "runs that are bound to fail, and two sound ones, for utils/report/diagnose.py (--keep tests/recorded)",
        SMALL | SYMMETRIC["symmetric 0.2"],
        {
            "sound PPO": Method("ppo_baseline"),
            "sound VRPO": Method("vrpo_math"),
            "beta 10": Method("vrpo_math", {"beta": 10.0, "beta_warmup": 1}),
            "token ratio 0.01": Method("vrpo_math", {"token_ratio": 0.01}),
            "noise 0.45": Method("ppo_baseline", {"noise_rate": 0.45}),
            "length-biased reward": Method("ppo_baseline", {"noise": "length", "noise_rate": 1.0, "learning_rate": 3e-4}),
            "policy steps too large": Method("ppo_baseline", {"learning_rate": 3e-3}),
            "critic steps too large": Method("ppo_baseline", {"critic_learning_rate": 0.1, "head_learning_rate": 1.0}),
            "answers cut off": Method("ppo_baseline", {"max_new_tokens": 16}),
            "nothing to compare": Method(GRPO, {"temperature": 0.1}),
        },
        {"once": {}},
        (1,),
        against=None,
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
        seconds=400.0,
    ),
}  # fmt: skip
