"""A method of your own: a moving average per head; surgery, cache, stages and reports come for free.

In a package, an entry point of the group "linearize.mixers" makes it known by name: `linearize convert --method ema`.
"""

import torch

import linearize
from linearize.mixers.base import RecurrentMixer
from linearize.models import load_model
from linearize.types import Cost, StateSpec


class Average(RecurrentMixer):
    paper, kinds = "o_t = d o_{t-1} + (1 - d) v_t, with a learned d per head", frozenset({"causal"})

    def __init__(self, shape, config):
        super().__init__(shape, config)
        self.decay_H = torch.nn.Parameter(torch.full((shape.heads,), 2.0))

    def chunked(self, q, k, v, ctx, state):
        decay, mean, out = self.decay_H.sigmoid()[:, None], state[0], []
        for v_BHV in v.repeat_interleave(self.shape.group, 1).float().unbind(2):
            mean = decay * mean + (1 - decay) * v_BHV
            out.append(mean)
        return torch.stack(out, 2).to(q.dtype), (mean,)

    def dense(self, q, k, v, ctx, rows=slice(None)):
        raise NotImplementedError("no map losses and no pictures then; everything else works")

    def state_spec(self):
        return [StateSpec("mean", (-1, self.shape.heads, self.shape.value_dim), torch.float32, 1)]

    def cost(self, tokens):
        return Cost(3.0 * tokens * self.shape.heads * self.shape.value_dim, 0.0)


loaded = load_model()
surgery = linearize.attach(loaded.model, None, Average)
print(loaded.tokenizer.decode(loaded.model.generate(torch.tensor([[0]]), max_new_tokens=8)[0]))
