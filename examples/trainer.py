"""Attention transfer inside transformers' own Trainer, for those who have one: its loss is the stage's objective."""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments

import linearize
from linearize.data.selfgen import selfgen
from linearize.models import load_model
from linearize.plan import TransferPlan
from linearize.stages.transfer import Transfer

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
loaded = load_model()
data = selfgen(loaded.model, loaded.tokenizer, tokens=4096, length=128)
surgery = linearize.attach(loaded.model, None, "hedgehog", {"window": 32})
objective = Transfer(surgery, TransferPlan(kind="transfer", tokens=data.tokens, batch=4, lr=1e-2))


class TransferTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = objective.loss(dict(inputs), self.state.global_step)["loss"]
        return (loss, None) if return_outputs else loss


arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
    use_cpu=not torch.cuda.is_available(), remove_unused_columns=False, save_strategy="no", logging_steps=1,
)  # fmt: skip
trainer = TransferTrainer(model=surgery.model, args=arguments, train_dataset=data)
trainer.train()
print([round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry])
