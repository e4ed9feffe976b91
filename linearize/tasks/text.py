"""Causal language models: documents, perplexity, what both write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data import text
from linearize.data.examples import Examples
from linearize.data.selfgen import selfgen
from linearize.data.text import Tokens
from linearize.evaluate import generation, quality
from linearize.plan import Plan
from linearize.report import looks, schema
from linearize.storage import write_atomic
from linearize.surgery.attach import Surgery
from linearize.tasks.base import HELD_OUT, Exam, Say, Task, Teacher, Variant, called, diagnosed
from linearize.types import InputError

PROMPT_TOKENS = 24  # of a prompt for the side-by-side sample
DIAGNOSED = 4, 256  # documents whose attention maps are looked into, and how many tokens of each: maps are T x T
PICTURED = 96  # tokens of an attention picture


class Documents(Exam):
    """Documents whose every token is predicted."""

    unit = "documents"
    followed = "perplexity over the teacher's"

    def __init__(self, documents: list[Tensor], plan: Plan, words: str = "") -> None:
        self.documents, self.plan, self.words = documents, plan, words

    @property
    def count(self) -> int:
        return len(self.documents)

    @property
    def example(self) -> dict[str, Tensor]:
        return {"input_ids": self.documents[0][None, : DIAGNOSED[1]]}

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[quality.Score]:
        plan = self.plan.eval
        return quality.measure(
            model, self.documents, variants, teacher=teacher, batch=plan.batch, window=plan.window,
            residual=0 if progress is False else 4, progress=progress,
        )  # fmt: skip

    def rows(self, scores: Sequence[quality.Score], seed: int) -> list[schema.Row]:
        rows = [schema.Row(**asdict(row)) for row in quality.table(scores, seed=seed)]
        for name, span in self.plan.eval.parts.items():
            first, last = map(int, span.split("-"))
            some = quality.table([s.take(range(first, last + 1)) for s in scores], resamples=0)
            for row, part in zip(rows, some, strict=True):
                values = asdict(part)
                row.parts[name] = {k: values[k] for k in schema.Row.METRICS if values.get(k) is not None}
        return rows

    def pack(self, score: quality.Score) -> dict[str, Tensor]:
        tensors = {"nll": score.nll_N, "kl": score.kl_N, "agree": score.agree_N}
        if score.residual is not None:
            tensors["residual"] = torch.tensor(score.residual, dtype=torch.float64)
        return tensors

    def unpack(self, name: str, tensors: dict[str, Tensor]) -> quality.Score:
        residual = tensors["residual"].tolist() if "residual" in tensors else None
        targets = quality.targets(self.documents, self.plan.eval.window)
        return quality.Score(name, targets, tensors["nll"], tensors["kl"], tensors["agree"], residual)

    def few(self, most: int) -> Documents:
        return Documents(self.documents[:: max(1, len(self.documents) // most)], self.plan)

    def follow(self, scores: Sequence[quality.Score]) -> float:
        return quality.table([scores[0], scores[-1]], resamples=0)[1].ratio

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        sizes = torch.tensor([len(ids) for ids in self.documents])
        write_atomic(folder / HELD_OUT, save({"ids": torch.cat(self.documents), "sizes": sizes}))


class Text(Task):
    """Decoders of text."""

    name = "text"

    def read(self, given: Any, work: Path | None, say: Say) -> Tokens:
        plan, settings = self.plan, self.plan.data
        source = settings.source if given is None else given
        if isinstance(source, Tokens):
            sequences = source
        elif isinstance(source, Examples):
            raise InputError(f"{type(source).__name__} are no text, which this model reads: give texts")
        elif source in (None, "self"):
            sequences = self._written(work, say)
        else:
            if not isinstance(source, str | Path):
                found: Any = list(source)
            elif settings.chat:
                found = text.read_chats(source, split=settings.split, column=settings.text_column)
            else:
                found = text.read_texts(source, split=settings.split, text_column=settings.text_column)
            sequences = text.tokenize(
                found, self.processor, settings.length, chat=settings.chat, completion_only=settings.completion_only,
                seed=plan.seed,
            )  # fmt: skip
        config: Any = self.model.config
        sequences.check(config, allow_longer=plan.longer())
        return sequences

    def _written(self, work: Path | None, say: Say) -> Tokens:
        """What the teacher writes."""
        plan, settings = self.plan, self.plan.data
        wanted = min(sum(stage.tokens for stage in plan.stages), settings.self_tokens) + settings.valid_tokens
        say(f"the teacher writes {wanted:,} tokens")
        prompts: Any = None
        if settings.prompts:
            prompts = (text.read_chats if settings.chat else text.read_texts)(settings.prompts)
        model: Any = self.model
        return selfgen(
            model, self.processor, wanted, settings.length, batch=settings.self_batch, prompts=prompts,
            seed=plan.seed if settings.self_seed is None else settings.self_seed,
            folder=settings.self_folder or (work and work / "selfgen"), completion_only=settings.completion_only,
            allow_longer=plan.longer(),
        )  # fmt: skip

    def exam(self, valid: Examples | None) -> Documents:
        plan = self.plan
        if valid is not None:
            assert isinstance(valid, Tokens)
            return self._documents(_held_out(valid, plan))
        source = plan.eval.source or plan.data.valid
        assert source is not None
        texts = text.read_texts(source, split=plan.eval.split, limit=plan.eval.limit)
        return self._documents(text.documents(texts, self.processor, plan.eval.length, limit=plan.eval.limit))

    def kept(self, folder: Path) -> Documents | None:
        from safetensors.torch import load

        if not (folder / HELD_OUT).is_file():
            return None
        kept = load((folder / HELD_OUT).read_bytes())
        documents = list(kept["ids"].split(kept["sizes"].tolist()))
        return self._documents([ids[: self.plan.eval.length] for ids in documents[: self.plan.eval.limit]])

    def _documents(self, documents: list[Tensor]) -> Documents:
        plan = self.plan
        own = f"held-out part of {called(plan.data.source, 'text the teacher wrote')}"
        name = called(plan.eval.source or plan.data.valid, own)
        words = f"{name}: {len(documents)} documents of at most {plan.eval.length} tokens"
        return Documents(documents, plan, words)

    def samples(
        self, surgery: Surgery, exam: Exam, teacher: Teacher
    ) -> tuple[list[schema.Sample], schema.Generation | None]:
        assert isinstance(exam, Documents)
        plan = self.plan
        long_enough = [ids for ids in exam.documents if len(ids) > PROMPT_TOKENS]
        if self.processor is None or plan.eval.generate < 4 or not long_enough:
            return [], None
        model: Any = surgery.model
        given = generation.prompts(long_enough, PROMPT_TOKENS, 16)
        found = generation.generation(
            model, self.processor, given, new=plan.eval.generate, teacher=teacher, seed=plan.seed, temperature=0.8
        )
        return [schema.Sample(**vars(s)) for s in found.samples], schema.Generation(**found.as_dict())

    def diagnostics(self, surgery: Surgery, exam: Exam) -> looks.Diagnostics:
        assert isinstance(exam, Documents)
        count, tokens = DIAGNOSED
        batches = [{"input_ids": ids[None, :tokens]} for ids in sorted(exam.documents, key=len)[-count:]]
        shown = {"input_ids": batches[-1]["input_ids"][:, :PICTURED]}
        labels = None
        if self.processor is not None:
            labels = [self.processor.decode([i]) for i in shown["input_ids"][0].tolist()]
        return diagnosed(surgery, batches, shown, labels)


def _held_out(valid: Tokens, plan: Plan) -> list[Tensor]:
    """The documents of held-out sequences."""
    found: list[Tensor] = []
    for index in range(len(valid)):
        item = valid[index]
        starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
        for first, last in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True):
            piece = item["input_ids"][first:last][: plan.eval.length]
            if len(piece) > 16:  # the end of a document that was cut tells little
                found.append(piece)
    return found[: plan.eval.limit]
