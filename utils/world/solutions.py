"""What a critic may read that the policy may not: how far an answer has kept to the problem's worked
solution (recipes/critic_reads.patch; an asymmetric critic, Pinto et al. 2017)."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from utils.generation import Answer
from utils.scale.processes import add_up
from utils.tensors import Batch, hidden_states, micro_batches, pack
from utils.world.environment import Episode

SHARPNESS = 20  # a cosine of 0.9, as strangers may have it, counts 0.12


def worked(problem, chat, longest: int) -> Episode:
    """The problem's own solution, as if the policy had said it, of at most `longest` tokens."""
    tokens = chat.tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
    tokens = [*tokens, min(chat.eos_ids)][:longest]
    nothing = [0.0] * len(tokens)
    episode = Episode(problem)
    episode.say(Answer(tokens, nothing, nothing, nothing), chat)
    return episode


@torch.no_grad()
def kept_to_solution(reference, chat, episodes: list[Episode], batch: Batch, args) -> Tensor:
    """(B, T), from 1 down to 0: is the state one that the worked solution, too, passes through, and
    were all before it? The largest cosine between the frozen reference's hidden state there and
    those along the solution, to the 20th power, and of these the smallest so far. It is exactly 1
    while the answer repeats the solution's words. Costs a pass of the reference over the
    episodes and one over their solutions."""
    decoder, kept = reference.get_decoder(), torch.zeros_like(batch["logprobs"])
    for rows, part in micro_batches(batch, args.micro_batch_size):
        solutions = [worked(episodes[i].problem, chat, args.max_new_tokens) for i in rows.tolist()]
        other = pack(solutions, chat.pad_id, kept.device)
        said, solved = (normalize(hidden_states(decoder, x), dim=-1) for x in (part, other))
        cosines = said @ solved.mT  # (b, T, S)
        nearest = cosines.masked_fill(~other["mask"].unsqueeze(1), 0.0).amax(-1)
        nearest = nearest.clamp(0, 1).masked_fill(~part["mask"], 1.0).cummin(1).values
        kept[rows, : nearest.shape[1]] = torch.where(part["mask"], nearest**SHARPNESS, 0.0)
    add_up(kept)
    return kept
