"""A prompt as a file: read it once, keep its state (a constant number of bytes), go on from it later, bit-exactly."""

import tempfile
from pathlib import Path

import torch

import linearize
from linearize.models import load_model

loaded = load_model()
model, tokenizer = loaded.model, loaded.tokenizer
linearize.attach(model, None, "hedgehog", {"window": 32})

file = Path(tempfile.mkdtemp()) / "prompt.safetensors"
prompt = tokenizer("Once upon a time, there was a big dog.", return_tensors="pt")["input_ids"]
linearize.prefix(model, prompt, file=file)
print(f"{prompt.shape[1]} tokens in a file of {file.stat().st_size:,} bytes")

# Later, in another process: only the new tokens are read.
cache = linearize.restore(model, file)
more = tokenizer(" The dog", add_special_tokens=False, return_tensors="pt")["input_ids"]
ids = torch.cat([prompt, more], 1)
out = model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(out[0], skip_special_tokens=True))

again = model.generate(ids, max_new_tokens=16, do_sample=False)
print("the same as from the whole prompt:", torch.equal(out, again))
