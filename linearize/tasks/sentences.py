"""Encoders of text: sentences and passages, the vectors they become, classes where there are any."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from linearize.data import sentences as texts
from linearize.data.examples import Examples
from linearize.data.sentences import Form, Pairs, Sentences, read_pairs, read_sentences, sentences
from linearize.evaluate import encoders
from linearize.evaluate.pooling import Pooling
from linearize.plan import Plan
from linearize.report import looks, schema
from linearize.storage import write_atomic
from linearize.surgery.attach import Surgery
from linearize.tasks.base import HELD_OUT, Exam, Pool, Say, Task, Teacher, Variant, called, diagnosed
from linearize.tasks.encoder import Compared
from linearize.types import InputError

DIAGNOSED = 4, 256  # texts whose attention maps are looked into, and how many tokens of each: maps are T x T
PICTURED = 64  # tokens of an attention picture
SAMPLED = 200, 6  # texts among which neighbours are looked for, and of how many they are shown


class Texts(Compared[Sentences]):
    """Sentences or passages, and scored pairs where there are some. passages: halves have to find each other."""

    unit = "texts"

    def __init__(
        self, data: Sentences, plan: Plan, pool: Pool, words: str, pairs: tuple[Pairs, Sentences] | None = None
    ) -> None:
        super().__init__(data, plan, pool, words)
        self.pairs = pairs
        self.notes = (*data.notes, *(pool.notes if isinstance(pool, Pooling) else ()))
        own = not (plan.eval.source or plan.data.valid)
        self.passages = bool(plan.eval.minimum or (own and plan.data.minimum))

    @property
    def wanted(self) -> torch.Tensor | None:
        return None if self.pairs is None else self.pairs[0].scores

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[encoders.Score]:
        more: dict[str, Any] = {
            "teacher": teacher, "pool": self.pool, "batch": self.plan.eval.batch, "progress": progress,
        }  # fmt: skip
        parts = [encoders.measure(model, self.data, variants, **more)]
        if self.passages:
            parts.append(encoders.retrieval(model, self.data, variants, **more))
        if self.pairs is not None:
            pairs, both = self.pairs
            parts.append(encoders.similarity(model, both, pairs, variants, **more))
        return encoders.joined(*parts)

    def few(self, most: int) -> Texts:
        return Texts(self.data.take(0, most), self.plan, self.pool, "")

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        data = self.data
        sizes = data.stops - data.starts
        ids = [data.ids[a:b] for a, b in zip(data.starts.tolist(), data.stops.tolist(), strict=True)]
        tensors = {"ids": torch.cat(ids), "sizes": sizes}
        if data.labels is not None:
            tensors["labels"] = data.labels.clone()
        write_atomic(folder / HELD_OUT, save(tensors))


class Sentence(Task):
    """Encoders of text."""

    name = "sentences"

    @property
    def config(self) -> Any:
        return self.model.config

    def read(self, given: Any, work: Path | None, say: Say) -> Sentences:
        plan, data = self.plan, self.plan.data
        source = data.source if given is None else given
        if isinstance(source, Sentences):
            found = source
        elif isinstance(source, Examples):
            raise InputError(f"{type(source).__name__} are no sentences, which this model reads: give texts")
        elif source in (None, "self"):
            raise InputError("data.source: name texts to train on (--dataset); they need no labels")
        else:
            found = self._sentences(source, data.split, data.length, data.minimum, seed=plan.seed)
        found.check(self.config, allow_longer=plan.longer())
        return found

    def _sentences(
        self, source: Any, split: str | None, length: int, minimum: int | None, limit: int | None = None,
        seed: int | None = None,
    ) -> Sentences:  # fmt: skip
        data, labels = self.plan.data, None
        if isinstance(source, str | Path):
            found, labels = read_sentences(
                source, split=split, text_column=data.text_column, label_column=data.label_column, limit=limit,
                lines=minimum is None,
            )  # fmt: skip
        else:
            found = list(source)
        most = texts.positions(self.config)
        if most is not None and not self.plan.longer():
            length = min(length, most)
        return sentences(
            found, self.processor, self.config, length=length, minimum=minimum, cut=minimum is not None,
            labels=labels, seed=seed,
        )  # fmt: skip

    def exam(self, valid: Examples | None) -> Texts:
        plan = self.plan
        if valid is not None:
            assert isinstance(valid, Sentences)
            return self._texts(valid.take(0, plan.eval.limit))
        source = plan.eval.source or plan.data.valid
        assert source is not None
        limit = None if plan.eval.minimum else plan.eval.limit  # passages are counted after cutting
        found = self._sentences(source, plan.eval.split, plan.eval.length, plan.eval.minimum, limit)
        return self._texts(found.take(0, plan.eval.limit))

    def kept(self, folder: Path) -> Texts | None:
        from safetensors.torch import load

        if not (folder / HELD_OUT).is_file():
            return None
        kept = load((folder / HELD_OUT).read_bytes())
        stops = kept["sizes"].cumsum(0)
        data = Sentences(kept["ids"], stops - kept["sizes"], stops, Form.of(self.processor), labels=kept.get("labels"))
        return self._texts(data.take(0, self.plan.eval.limit))

    def _texts(self, data: Sentences) -> Texts:
        plan = self.plan
        own = f"held-out part of {called(plan.data.source, 'the texts given')}"
        name = called(plan.eval.source or plan.data.valid, own)
        words = f"{name}: {len(data)} texts of at most {data.length} tokens"
        pairs = None
        if plan.eval.pairs:
            if self.processor is None:
                raise InputError("eval.pairs: texts need the model's tokenizer: pass it, convert(..., tokenizer=...)")
            read = read_pairs(plan.eval.pairs)
            pairs = (read, sentences(read.texts, self.processor, self.config))
            words += f"; Spearman on {len(read)} pairs of {Path(plan.eval.pairs).name}"
        return Texts(data, plan, self.pool, words, pairs)

    @functools.cached_property
    def pooling(self) -> Pooling:
        """As the model's own folder says."""
        place = self.folder or getattr(self.model, "name_or_path", "") or None
        return Pooling() if place is None else Pooling.of(place)

    @property
    def pool(self) -> Pool:
        return self.pooling

    @property
    def zero(self) -> list[tuple[str, str, dict[str, Any]]]:
        return [*super().zero, ("none", "none", {})]

    @property
    def carried(self) -> list[str]:
        """sentence-transformers' own files."""
        names = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
        if self.folder is not None and (self.folder / "modules.json").is_file():
            modules = json.loads((self.folder / "modules.json").read_text(encoding="utf-8"))
            names += [module["path"] for module in modules if module.get("path")]
        return names

    # ------------------------------------------------------------------------------------------------ reports
    def samples(self, surgery: Surgery, exam: Exam, teacher: Teacher) -> tuple[list[schema.Sample], None]:
        """The nearest other text, by both."""
        assert isinstance(exam, Texts)
        if self.processor is None or exam.count < 3:
            return [], None
        most, shown = SAMPLED
        data = exam.data.take(0, most)
        student: list[Variant] = [("student", nullcontext)]
        vectors = encoders.embed(surgery.model, data, student, pool=self.pool, teacher=teacher, progress=False)
        near = {}
        for name, vector_NE in vectors.items():
            unit = F.normalize(vector_NE.double(), dim=-1)
            near[name] = (unit @ unit.T).fill_diagonal_(-2).max(1)
        said = []
        for i in range(min(shown, len(data))):
            words = {n: f"{f.values[i]:.3f}  {self._words(data, int(f.indices[i]))}" for n, f in near.items()}
            said.append(schema.Sample(prompt=self._words(data, i), teacher=words["teacher"], student=words["student"]))
        return said, None

    def _words(self, data: Sentences, index: int, most: int = 60) -> str:
        ids = data.ids[int(data.starts[index]) : int(data.stops[index])]
        return self.processor.decode(ids[:most].tolist()) + (" ..." if len(ids) > most else "")

    def diagnostics(self, surgery: Surgery, exam: Exam) -> looks.Diagnostics:
        assert isinstance(exam, Texts)
        count, tokens = DIAGNOSED
        order = exam.data.sizes.argsort(descending=True)[:count].tolist()
        batches = [{k: v[None, :tokens] for k, v in exam.data[i].items() if k != "labels"} for i in order]
        shown = {k: v[:, :PICTURED] for k, v in batches[-1].items()}
        labels = None
        if self.processor is not None:
            labels = [self.processor.decode([i]) for i in shown["input_ids"][0].tolist()]
        return diagnosed(surgery, batches, shown, labels)
