"""How much a script computes in an update, counted: a change that doubles the work or the logits in
memory fails here, and one that would have a GPU wait."""

import importlib
import io
import sys
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from ppo_baseline import hidden_states
from tests.conftest import CRITICS, ROOT, SCRIPTS, read_metrics
from utils import generation, prefixes, tensors
from utils.models import load_policy, save_memory, twin

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


@pytest.mark.parametrize("name", ["grpo_baseline", "vrpo_math", "dvpo_math"])
def test_no_micro_batch_and_few_tokens_wait_for_a_gpu(name, run_main, monkeypatch):
    """Twice as many micro-batches wait no more often; `take` looks at masks on the CPU."""
    every = generation.EOS_EVERY["cuda"]
    monkeypatch.setattr(generation, "EOS_EVERY", {"cpu": every})
    flags = {"model": MODEL, "updates": 1, "eval_every": 10, "max_new_tokens": 32, "kl_coef": 0.1}
    found = []
    for size in (2, 1):
        with Calls() as calls:
            run_main(name, run_name=f"by-{size}", micro_batch_size=size, **flags)
        assert calls.waits.pop("take") > 10
        found.append(calls.waits)
    assert found[0] == found[1]
    rollouts = 3  # before, in and after the update
    assert 0 < found[0]["decode"] <= rollouts * (32 / every + 3)
    assert found[0].total() < 70 + found[0]["decode"]


@pytest.mark.parametrize("warmup", [0, 1])
def test_weights_are_cast_once(warmup, run_main, tiny_model):
    """In bfloat16: for a rollout once; for a micro-batch once; the reference when it is made; the
    policy in the passes of --critic-warmup too, although it stands still."""
    flags = {"updates": 1, "kl_coef": 0.1, "dtype": "bfloat16", "critic_warmup": warmup}
    with Calls() as calls:
        run_main("vrpo_math", micro_batch_size=1, eval_every=10, **flags)
    mlp = (64, 32)  # two layers have two such weights each
    rollouts, micro_batches = 3, 2 * 8
    training = micro_batches * (1 + (warmup == 0))  # the critic, the policy
    scoring = 1  # the critic: all parts of the batch under one autocast
    expected = 4 * (rollouts + training + scoring)
    assert calls.casts[mlp, True] == expected
    assert calls.casts[mlp, False] == 4 + 4 * micro_batches * warmup


def test_keys_are_kept_like_values(tiny_model, monkeypatch):
    policy, chat = load_policy(str(tiny_model), torch.device("cpu"))
    update, dtypes = generation.RoomyLayer.update, set()

    def noticed(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        dtypes.update(x.dtype for x in (*found, *self.buffers))
        return found

    monkeypatch.setattr(generation.RoomyLayer, "update", noticed)
    with torch.autocast("cpu", torch.bfloat16):
        generation.generate(policy, chat, [chat.prompt_ids("1 + 1")], 4, 1.0)
    assert dtypes == {torch.bfloat16}


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
    flags = SimpleNamespace(gradient_checkpointing=True, share_prefixes=False, shard=False)
    save_memory(flags, policy, twin(policy), None)
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


def test_shared_prefixes_give_the_same_gradients_from_fewer_tokens(tiny_model, monkeypatch):
    """Two prompts of one template, three answers each; of padding and of an answer's first tokens
    too, what rows have in common is read once."""
    monkeypatch.setattr(prefixes, "ON", False)
    policy, chat = load_policy(str(tiny_model), torch.device("cpu"))
    policy.double()  # sums in another order round less
    pad, starts = chat.pad_id, [[5, 6, 7, 8], [5, 6, 9, 8, 7]]
    ends = [[11, 12, pad, pad, pad], [11, 13, 14, 15, pad], [11, 12, 16, 17, 18]]
    rows = [start + end for start in starts for end in ends]
    mask = [[False] * (len(row) - 6) + [True] * 5 for row in rows]
    for i in (0, 3):  # nothing is chosen after EOS
        mask[i][-2:] = [False, False]
    rows = [row + [pad] * (10 - len(row)) for row in rows]
    mask = torch.tensor([row + [False] * (10 - len(row)) for row in mask])
    inputs, read, found = torch.tensor(rows), [], []
    attend = LlamaDecoderLayer.forward

    def noticed(self, hidden, *args, **kwargs):
        read.append(hidden.shape[0] * hidden.shape[1])
        return attend(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", noticed)
    assert prefixes.in_order(inputs[[0, 3, 1, 4]]).tolist() == [0, 2, 1, 3]
    weights = torch.randn(int(mask.sum()), 32, generator=torch.Generator().manual_seed(0))
    for on in (False, True):
        model, reference = twin(policy), twin(policy)
        save_memory(
            SimpleNamespace(gradient_checkpointing=False, share_prefixes=on, shard=False),
            model, reference, None,
        )  # fmt: skip
        read.clear()
        hidden = hidden_states(model.get_decoder(), inputs, mask)
        (hidden * weights).sum().backward()
        found.append((hidden, [p.grad for p in model.parameters()], read[0]))
    (plain, plainly, all_tokens), (shared, once, fewer) = found
    assert (all_tokens, fewer) == (60, 28)
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once, plainly, rtol=1e-5, atol=1e-5)


def test_a_run_with_shared_prefixes_is_the_same(run_main):
    """Of PPO, whose critic has a backbone of its own: the same metrics but for rounding."""
    plain, shared = (
        pd.read_csv(io.StringIO(read_metrics(run_main("ppo_baseline", run_name=f"{x}", **flags))))
        for x in (False, True)
        for flags in ({"share_prefixes": x, "kl_coef": 0.1},)
    )
    kept = [
        name for name in plain if "explained_variance" not in name
    ]  # of a return that is constant
    pd.testing.assert_frame_equal(plain[kept], shared[kept], rtol=1e-2, atol=1e-4)


def test_a_run_with_gradient_checkpointing_is_the_same(run_main):
    flags = {"kl_coef": 0.1, "lora_rank": 2}
    plain, again = (
        run_main("vrpo_math", run_name=f"again-{x}", gradient_checkpointing=x, **flags)
        for x in (False, True)
    )
    assert read_metrics(plain) == read_metrics(again)
