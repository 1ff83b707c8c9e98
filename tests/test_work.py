"""How much a script computes in an update, counted: a change that doubles the work or the logits in
memory fails here, and one that would have a GPU wait."""

import importlib
import io
import sys
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from tests.conftest import CRITICS, ROOT, read_metrics
from utils import generation, tensors
from utils.models import load_policy, twin
from utils.run import Run
from utils.scale import prefixes
from utils.scale.memory import place
from utils.world.environment import Environment

EPISODES, EPOCHS = 8, 2
MODEL = str(ROOT / "assets" / "tiny_math")  # its answers differ in length


class Work:
    """Passes and tokens of every use of a decoder, and the largest number of logits that exist at
    once, in update 1."""

    def __init__(self, vocabulary: int):
        self.passes, self.tokens, self.logits = Counter(), Counter(), Counter()
        self.where = "outside"
        self.vocabulary = vocabulary

    def count(self, module, args, output):
        if isinstance(module, LlamaModel):
            kind = "decoded" if module.cached else "scored"
            kind = "trained" if torch.is_grad_enabled() else kind
            self.passes[self.where, kind] += 1
            self.tokens[self.where, kind] += output.last_hidden_state.shape[:2].numel()
        elif isinstance(output, torch.Tensor) and output.shape[-1] == self.vocabulary:
            self.logits[self.where] = max(self.logits[self.where], len(output))


def inputs_of(episodes: list) -> int:
    return sum(len(e.prompt) + len(e.tokens) - 1 for e in episodes)


@pytest.fixture
def work_of(run_main, monkeypatch, tokenizer):
    """work_of(script, **flags): the work of a run of one update, and its episodes."""

    def measure(name: str, **flags):
        work, episodes, module = Work(len(tokenizer)), [], importlib.import_module(name)
        forward, pack, log = LlamaModel.forward, Environment.pack, Run.log
        evaluate = module.evaluate

        def noticed(self, *args, **kwargs):
            self.cached = kwargs.get("past_key_values") is not None
            return forward(self, *args, **kwargs)

        def packed(self, some):
            episodes.append(list(some))
            return pack(self, some)

        def logged(run, update, metrics):
            work.where = update + 1
            return log(run, update, metrics)

        def evaluated(*rest, **more):
            work.where = "evaluation"
            return evaluate(*rest, **more)

        monkeypatch.setattr(module, "evaluate", evaluated)
        monkeypatch.setattr(LlamaModel, "forward", noticed)
        monkeypatch.setattr(Environment, "pack", packed)
        monkeypatch.setattr(Run, "log", logged)
        usual = {"model": MODEL, "max_new_tokens": 20, "minibatch_size": 8, "updates": 1}
        usual |= {"eval_size": 3, "micro_batch_size": 1, "epochs": EPOCHS}
        handle = register_module_forward_hook(work.count)
        try:
            run_main(name, **usual | flags)
        finally:
            handle.remove()
        return work, episodes[0]

    return measure


@pytest.mark.parametrize(
    "name, models",
    [("grpo_baseline", 1), ("vine_ppo_baseline", 1), *((name, 2) for name in CRITICS)],
)
def test_passes_tokens_and_logits_of_an_update(work_of, name, models, monkeypatch, tokenizer):
    """`models` is how many transformers are trained: the policy, and the critic where there is
    one. However many tokens there are, the logits of rollout, scoring, training and evaluation stay
    below LOGITS_AT_ONCE."""
    rows, kl_coef = 3, 0.0 if name == "ppo_baseline" else 0.1
    monkeypatch.setattr(tensors, "LOGITS_AT_ONCE", rows * len(tokenizer) + 5)
    work, episodes = work_of(name, kl_coef=kl_coef)
    assert work.logits["evaluation"] == work.logits[1] == rows
    assert all(e.length > 2 * rows for e in episodes)
    inputs = inputs_of(episodes)  # with one row in a pass there is no padding
    assert work.passes[1, "trained"] == models * EPOCHS * EPISODES
    assert work.tokens[1, "trained"] == models * EPOCHS * inputs
    # before the update: the critic, and for a KL with a weight the reference; the policy's
    # log-probabilities are those of sampling
    scored = models - 1 + (kl_coef > 0)
    assert work.passes[1, "scored"] == scored * EPISODES
    assert work.tokens[1, "scored"] == scored * inputs
    if name == "vine_ppo_baseline":
        return  # continuations are decoded too: tests/test_vine.py
    # decoding: every distinct prompt once; then a row takes part until it has ended, or a little
    # longer
    answers = [e.length for e in episodes]
    prompts = {tuple(e.prompt) for e in episodes}
    read = len(prompts) * max(map(len, prompts))
    assert len(prompts) == EPISODES / 2 and len(set(answers)) > 1
    assert work.passes[1, "decoded"] == max(answers)
    fed = work.tokens[1, "decoded"] - read
    assert sum(answers) - EPISODES <= fed <= (sum(answers) - EPISODES) / generation.COMPACT_AT


@pytest.mark.parametrize("micro_batch_size, padded", [(1, False), (4, True)])
def test_padding_is_cut_in_every_micro_batch(work_of, micro_batch_size, padded):
    """Tokens of the training passes: rows of similar length together, cut to the longest of each
    micro-batch."""
    work, episodes = work_of("grpo_baseline", micro_batch_size=micro_batch_size)
    least = EPOCHS * inputs_of(episodes)
    most = EPOCHS * EPISODES * max(inputs_of([e]) for e in episodes)
    tokens = work.tokens[1, "trained"]
    assert tokens == least if not padded else least <= tokens < (least + most) / 2


ATEN = torch.ops.aten
WAITS = (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal)
INDEXED = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)


class Calls(TorchDispatchMode):
    """What would have to wait for a GPU, by the function of ours or of transformers that asks; and
    casts of weights to bfloat16, by their shape and whether they are trained."""

    def __init__(self):
        super().__init__()
        self.waits, self.casts = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet, kwargs = function._overloadpacket, kwargs or {}
        selects = packet in INDEXED and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if packet in WAITS or selects:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.waits[frame.f_code.co_name] += 1
        is_cast = packet is ATEN._to_copy and kwargs.get("dtype") == torch.bfloat16
        if is_cast and isinstance(args[0], torch.nn.Parameter):
            self.casts[tuple(args[0].shape), args[0].requires_grad] += 1
        return function(*args, **kwargs)


def test_no_micro_batch_and_few_tokens_wait_for_a_gpu(run_main, monkeypatch):
    """Twice as many micro-batches wait no more often; `micro_batches` looks at masks on the CPU."""
    every = generation.EOS_EVERY["cuda"]
    monkeypatch.setattr(generation, "EOS_EVERY", {"cpu": every})
    flags = {"model": MODEL, "updates": 1, "max_new_tokens": 16, "kl_coef": 0.1}
    flags |= {"eval_size": 1, "prompts_per_update": 2}
    found = []
    for size in (2, 1):
        with Calls() as calls:
            run_main("ppo_baseline", run_name=f"by-{size}", micro_batch_size=size, **flags)
        assert calls.waits.pop("micro_batches") > 10
        calls.waits.pop("_materialize_copy")  # weights that are loaded
        found.append(calls.waits)
    assert found[0] == found[1]
    rollouts = 3  # before, in and after the update
    assert 0 < found[0]["decode"] <= rollouts * (16 / every + 3)
    assert found[0].total() < 70 + found[0]["decode"]


def test_weights_are_cast_once(run_main):
    """In bfloat16: for a rollout once; for a pass of a micro-batch once; the reference when it is
    made."""
    flags = {"updates": 1, "kl_coef": 0.1, "dtype": "bfloat16", "prompts_per_update": 2}
    with Calls() as calls:
        run_main("vrpo_math", micro_batch_size=1, **flags)
    mlp = (64, 32)  # two layers have two such weights each
    rollouts, trained, scored = (
        3,
        2 * 2 * 4,
        4,
    )  # policy and critic in two epochs; the critic before
    assert calls.casts[mlp, True] == 4 * (rollouts + trained + scored)
    assert calls.casts[mlp, False] == 4


def test_keys_are_kept_like_values(tiny_model, monkeypatch):
    policy, chat = load_policy(str(tiny_model), torch.device("cpu"))
    update, dtypes = generation.RoomyLayer.update, set()

    def noticed(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        dtypes.update(x.dtype for x in (*found, *self.buffers))
        return found

    monkeypatch.setattr(generation.RoomyLayer, "update", noticed)
    monkeypatch.setattr(tensors, "HALF", True)
    generation.generate(policy, chat, [chat.prompt_ids("1 + 1")], 4, 1.0)
    assert dtypes == {torch.bfloat16}


PLAIN = {"gradient_checkpointing": False, "share_prefixes": False, "shard": False}
PLAIN |= {"rollout_engine": "own"}


def test_gradient_checkpointing_computes_twice_and_keeps_less(tiny_model, monkeypatch):
    """In eval mode, of a twin with weights of its own too: the same gradients to the last bit."""
    forward, calls = LlamaDecoderLayer.forward, []
    tokens = torch.arange(5, 45).view(2, 20)

    def noticed(self, *args, **kwargs):
        calls.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", noticed)
    policy, _ = load_policy(str(tiny_model), torch.device("cpu"))
    plain, found = twin(policy), []
    place(SimpleNamespace(**PLAIN | {"gradient_checkpointing": True}), policy, twin(policy))
    other = twin(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # the twin does not look
    for model in (plain, other):
        kept = 0

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        calls.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        found.append((kept, len(calls), gradients))
    assert not any(calls)
    (all_kept, once, plainly), (kept, twice, again) = found
    assert (once, twice) == (2, 4) and kept < all_kept / 4
    assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))


class Said:
    """An episode as `pack` reads it, all of it chosen."""

    def __init__(self, prompt: list[int], tokens: list[int]):
        self.prompt, self.tokens, self.chosen = prompt, tokens, [True] * len(tokens)
        self.logprobs = self.entropy = self.gap = [0.0] * len(tokens)


def test_shared_prefixes_give_the_same_gradients_from_fewer_tokens(tiny_model, monkeypatch):
    """Two prompts of one template, three answers each; of padding and of an answer's first tokens
    too, what rows have in common is read once."""
    policy, chat = load_policy(str(tiny_model), torch.device("cpu"))
    policy.double()  # sums in another order round less
    starts, ends = (
        [[5, 6, 7, 8], [5, 6, 9, 8, 7]],
        [[11, 12], [11, 13, 14, 15], [11, 12, 16, 17, 18]],
    )
    read, found, attend = [], [], LlamaDecoderLayer.forward
    batch = tensors.pack(
        [Said(*pair) for pair in product(starts, ends)], chat.pad_id, policy.device
    )

    def noticed(self, hidden, *args, **kwargs):
        read.append(hidden.shape[0] * hidden.shape[1])
        return attend(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", noticed)
    assert prefixes.in_order(batch["inputs"][[0, 3, 1, 4]]).tolist() == [0, 2, 1, 3]
    weights = torch.randn((6, 5, 32), generator=torch.Generator().manual_seed(0))
    for on in (False, True):
        model, reference = twin(policy), twin(policy)
        place(SimpleNamespace(**PLAIN | {"share_prefixes": on}), model, reference)
        read.clear()
        hidden = tensors.hidden_states(model.get_decoder(), batch) * batch["mask"].unsqueeze(-1)
        (hidden * weights).sum().backward()
        found.append((hidden, [p.grad for p in model.parameters()], read[0]))
    (plain, plainly, all_tokens), (shared, once, fewer) = found
    assert (all_tokens, fewer) == (6 * 9, 24)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once, plainly, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flag", ["share_prefixes", "gradient_checkpointing"])
def test_a_run_that_saves_memory_is_the_same(flag, run_main):
    """With a critic's backbone too: the same metrics but for rounding."""
    frames = []
    for on in (False, True):
        flags = {
            flag: on,
            "kl_coef": 0.1,
            "lora_rank": 2 * (flag != "share_prefixes"),
            "updates": 1,
            "prompts_per_update": 2,
            "eval_size": 1,
        }
        text = read_metrics(run_main("ppo_baseline", run_name=f"{flag}-{on}", **flags))
        frames.append(pd.read_csv(io.StringIO(text)))
    # of a return that is constant the explained variance is rounding
    kept = [name for name in frames[0] if "explained_variance" not in name]
    exact = 0.0 if flag == "gradient_checkpointing" else 1.0
    near = {"rtol": exact * 1e-2, "atol": exact * 1e-4}
    pd.testing.assert_frame_equal(frames[0][kept], frames[1][kept], **near)
