"""How much a script computes in an update, counted: a change that doubles the work or the logits in
memory fails here."""

import importlib
from collections import Counter

import pandas as pd
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaModel

from tests.conftest import CRITICS, ROOT, SCRIPTS
from utils import generation, tensors

EPISODES, EPOCHS = 8, 2
MODEL = str(ROOT / "assets" / "tiny_math")  # its answers differ in length


class Work:
    """Passes and tokens of every use of a decoder, and the largest number of logits that exist at
    once, in update 1."""

    def __init__(self, vocabulary: int):
        self.passes, self.tokens, self.logits, self.where = (
            Counter(),
            Counter(),
            Counter(),
            "outside",
        )
        self.vocabulary = vocabulary

    def count(self, module, args, output):
        if isinstance(module, LlamaModel):
            kind = (
                "trained" if torch.is_grad_enabled() else "decoded" if module.cached else "scored"
            )
            self.passes[self.where, kind] += 1
            self.tokens[self.where, kind] += output.last_hidden_state.shape[:2].numel()
        elif isinstance(output, torch.Tensor) and output.shape[-1] == self.vocabulary:
            self.logits[self.where] = max(self.logits[self.where], len(output))


@pytest.fixture
def work_of(run_main, monkeypatch, tokenizer):
    """work_of(script, **flags): the work of its first update, and its episodes."""

    def measure(name: str, **flags):
        module, work = importlib.import_module(name), Work(len(tokenizer))
        episodes = []
        forward, pack, log = LlamaModel.forward, module.pack, module.Run.log

        def noticed(self, *args, **kwargs):
            self.cached = kwargs.get("past_key_values") is not None
            return forward(self, *args, **kwargs)

        def packed(some, *rest):
            episodes.append(list(some))
            return pack(some, *rest)

        def logged(run, update, metrics):
            work.where = update + 1
            return log(run, update, metrics)

        monkeypatch.setattr(LlamaModel, "forward", noticed)
        monkeypatch.setattr(module, "pack", packed)
        monkeypatch.setattr(module.Run, "log", logged)
        handle = register_module_forward_hook(work.count)
        try:
            flags = {
                "model": MODEL,
                "max_new_tokens": 32,
                "minibatch_size": 8,
                "eval_every": 10,
                "micro_batch_size": 1,
            } | flags
            folder = run_main(name, updates=2, epochs=EPOCHS, **flags)
        finally:
            handle.remove()
        work.kl = pd.read_csv(folder / "metrics.csv")["objective/kl_ref"].notna().tolist()[1:]
        return work, episodes

    return measure


@pytest.mark.parametrize(
    "name, models",
    [("grpo_baseline", 1), ("vine_ppo_baseline", 1), *((name, 2) for name in CRITICS)],
)
def test_passes_and_tokens_of_an_update(work_of, name, models):
    """`models` is how many transformers are trained: the policy, and the critic where there is
    one."""
    work, (first, second) = work_of(name)
    for update, episodes in ((1, first), (2, second)):
        inputs = sum(
            len(e.tokens) - 1 for e in episodes
        )  # with one row in a pass there is no padding
        assert work.passes[update, "trained"] == models * EPOCHS * EPISODES
        assert work.tokens[update, "trained"] == models * EPOCHS * inputs
        # before the update: the critic; the policy's log-probabilities are those of sampling, and
        # as the KL to the reference has no weight, its pass is made in the last update alone, the
        # one that ends with an evaluation
        scored = models - 1 + (update == 2)
        assert work.passes[update, "scored"] == scored * EPISODES
        assert work.tokens[update, "scored"] == scored * inputs
    assert work.kl == [False, True]
    if name == "vine_ppo_baseline":
        return  # continuations are decoded too: tests/test_vine.py
    # decoding: every distinct prompt once; then a row takes part until it has ended, or a little
    # longer
    answers = [sum(e.chosen) for e in first]
    prompts = {tuple(e.problem.prompt_ids) for e in first}
    read = len(prompts) * max(map(len, prompts))
    assert len(prompts) == EPISODES / 2 and len(set(answers)) > 1
    assert work.passes[1, "decoded"] == max(answers)
    fed = work.tokens[1, "decoded"] - read
    assert sum(answers) - EPISODES <= fed <= (sum(answers) - EPISODES) / generation.COMPACT_AT


def test_a_kl_weight_brings_the_reference_back(work_of):
    work, _ = work_of("grpo_baseline", kl_coef=0.1)
    assert work.passes[1, "scored"] == EPISODES and work.kl == [True, True]


@pytest.mark.parametrize("micro_batch_size, padded", [(1, False), (2, True), (4, True)])
def test_padding_is_cut_in_every_micro_batch(work_of, micro_batch_size, padded):
    """Tokens of the training passes: rows of similar length together, cut to the longest of each
    micro-batch."""
    work, (episodes, _) = work_of("grpo_baseline", micro_batch_size=micro_batch_size)
    least = EPOCHS * sum(len(e.tokens) - 1 for e in episodes)
    most = EPOCHS * EPISODES * max(len(e.tokens) - 1 for e in episodes)
    tokens = work.tokens[1, "trained"]
    assert tokens == least if not padded else least <= tokens < (least + most) / 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_logits_at_once(work_of, monkeypatch, tokenizer, name):
    """However many tokens there are: rollout, scoring, training and evaluation stay below
    LOGITS_AT_ONCE."""
    rows = 3
    monkeypatch.setattr(tensors, "LOGITS_AT_ONCE", rows * len(tokenizer) + 5)
    work, (episodes, _) = work_of(name, micro_batch_size=4)
    assert sum(sum(e.chosen) for e in episodes) > 10 * rows
    assert all(work.logits[update] == rows for update in (1, 2)) and work.logits["outside"] == rows
