"""linearize/report: what is written can be read, what is broken is refused, what is missing is not a zero."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_example import example, row

from linearize.models import Source, source
from linearize.report import card, files, html, plots, provenance, readme, schema, summary, tables, verdict
from linearize.report.looks import Picture
from linearize.report.schema import Bench, Report, Result, Row
from linearize.types import GateError, InputError, StageReport, StorageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report() -> Report:
    return example()


def rows(**nll: float | None) -> list[Row]:
    """Rows by name with underscores for spaces; None leaves one out."""
    return [Row.model_validate(row(name, value)) for name, value in nll.items() if value is not None]


# ------------------------------------------------------------------------------------------------------------- schema
def test_round_trip(report: Report, tmp_path: Path) -> None:
    schema.write(report, tmp_path / "report.json")
    assert schema.read(tmp_path / "report.json", Report) == report
    assert schema.read(tmp_path, Report) == report, "a folder stands for its report.json"
    result = report.result()
    schema.write(result, tmp_path / "result.json")
    assert schema.read(tmp_path / "result.json", Result) == result
    assert not any(stage.series for stage in result.stages)
    assert any(stage.series for stage in report.stages), "the report keeps its own"
    assert list(tmp_path.glob(".*")) == []


def test_written_twice_is_the_same(report: Report, tmp_path: Path) -> None:
    schema.write(report, tmp_path / "a.json")
    schema.write(schema.read(tmp_path / "a.json", Report), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def damaged(report: Report, change: str) -> str:
    raw = report.result().model_dump(mode="json")
    match change:
        case "unknown key":
            raw["rows"][0]["perplexty"] = raw["rows"][0].pop("perplexity")
        case "missing key":
            del raw["commit"]
        case "wrong type":
            raw["stages"][0]["tokens"] = "many"
        case "version":
            raw["version"] = 2
        case "kind":
            raw["kind"] = "bench"
        case "truncated":
            return json.dumps(raw)[:500]
        case "NaN":
            return json.dumps(raw).replace("4.48169", "NaN")
        case "list":
            return json.dumps([raw])
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("unknown key", "unknown key 'rows.0.perplexty': did you mean 'perplexity'?"),
        ("missing key", "missing key 'commit'"),
        ("wrong type", "'stages.0.tokens'"),
        ("version", "'version'"),
        ("kind", "'kind'"),
        ("truncated", "not JSON"),
        ("NaN", "NaN is not a number"),
        ("list", "holds a list"),
    ],
)
def test_bad_files_are_refused_in_one_line(report: Report, tmp_path: Path, change: str, says: str) -> None:
    path = tmp_path / "recipes" / "results" / "bad.json"
    path.parent.mkdir(parents=True)
    path.write_text(damaged(report, change))
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        schema.read(path, Result)
    message = str(caught.value)
    assert "bad.json" in message
    assert "\n" not in message
    assert schema.problems(tmp_path) == [message]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        schema.read(tmp_path / "none.json", Result)
    (tmp_path / "latin.json").write_bytes(b'{"model": "\xe9"}')
    with pytest.raises(InputError, match="UTF-8"):
        schema.read(tmp_path / "latin.json", Result)


def test_what_is_not_finite_is_null() -> None:
    made = Row(name="student", perplexity=float("inf"), nll=float("nan"), kl=np.float32(0.123456789))
    assert made.perplexity is None
    assert made.nll is None
    assert made.kl == 0.123457
    stage = schema.stage(StageReport("transfer", series={"loss": [1.0, float("nan")]}))
    assert stage.first is None
    assert stage.series["loss"] == [1.0, None]


def test_long_series_are_thinned() -> None:
    made = schema.stage(
        StageReport("transfer", steps=1000, series={"loss": [float(i) for i in range(1000)]}), points=10
    )
    assert made.series == {"step": [100.0 * i for i in range(1, 11)], "loss": [49.5 + 100 * i for i in range(10)]}
    uneven = StageReport("transfer", series={"loss": [1.0] * 20, "layer.0": [1.0]})
    assert schema.stage(uneven, points=10).series == uneven.series


def test_stage_speed_and_counted_tokens(report: Report) -> None:
    assert schema.stage(StageReport("transfer", tokens=1000, seconds=4.0)).tokens_per_second == 250
    assert report.trained_tokens == 1_500_000, "self-generation does not count"


def test_absolute_paths_stay_at_home(tmp_path: Path) -> None:
    plan = {"output": {"folder": str(tmp_path / "model")}, "data": {"source": ["data/x.txt", tmp_path / "y.txt"]}}
    made = example(plan=plan, model={"id": str(tmp_path / "teacher")})
    assert str(tmp_path) not in schema.dumps(made.model_dump(mode="json"))
    assert made.model.id == "teacher"
    assert made.plan["data"]["source"] == ["data/x.txt", "y.txt"]
    said = provenance.command(
        ["linearize", "convert", f"--out={tmp_path / 'a'}", "--set", f"data.source={tmp_path / 'b'}"]
    )
    assert said == "linearize convert --out=a --set data.source=b"


def test_average_over_seeds() -> None:
    one, two = (Row(name="student", perplexity=p, kl=k, by_position=[p, 2.0]) for p, k in ((4.0, 0.1), (5.0, None)))
    mean = schema.average([one, two])
    assert mean.perplexity == 4.5
    assert mean.spread == {"perplexity": pytest.approx(0.707107)}
    assert mean.kl is None, "missing in one seed is missing"
    assert mean.by_position == [4.5, 2.0]
    assert schema.average([one]) == one


def test_picture_keeps_the_weights() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(16), 16)
    picture = Picture.pack(0, 1, weights, -weights)
    assert np.abs(np.sqrt(picture.unpack("teacher")) - np.sqrt(weights)).max() <= 0.5 / 255 + 1e-9
    assert not picture.unpack("student").any(), "negative weights show as none"
    with pytest.raises(InputError, match="bytes for size"):
        picture.model_copy(update={"size": 3}).unpack("teacher")


def test_finished(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert not schema.finished(path, "abc123")
    schema.write(report.result(), path)
    assert schema.finished(path, "abc123")
    assert not schema.finished(path, "another plan")


def test_result_files_of_this_repository() -> None:
    assert schema.problems(ROOT) == []


# --------------------------------------------------------------------------------------------------------- provenance
def test_provenance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    told = provenance.gather(
        [
            str(tmp_path / "bin" / "linearize"),
            "convert",
            "--model",
            "/far/away/teacher",
            f"--output-dir={tmp_path}/out x",
        ]
    )
    assert told["command"] == "linearize convert --model teacher '--output-dir=out x'"
    assert str(tmp_path) not in str(told)
    assert "torch" in told["versions"]
    assert Report.model_validate({**example().model_dump(), **told}).machine.cores >= 1


def test_a_surrounding_repository_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site-packages" / "linearize").mkdir(parents=True)
    monkeypatch.setattr(provenance, "_HERE", tmp_path / "site-packages" / "linearize")
    provenance.commit.cache_clear()
    try:
        assert provenance.commit().id is None
    finally:
        provenance.commit.cache_clear()


# ------------------------------------------------------------------------------------------------------------ verdict
@pytest.mark.parametrize(
    ("nll", "gate", "level", "says"),
    [
        ({"teacher": 1.0, "student": 1.05, "linear_off": 1.3, "zero-token window": 1.3}, None, "good", "1.05 times"),
        ({"teacher": 1.0, "student": 1.05, "linear_off": 1.051}, None, "dead", "linear branch does nothing"),
        ({"teacher": 1.0, "student": 1.05, "linear_off": 1.04}, None, "dead", "linear branch does nothing"),
        ({"teacher": 1.0, "student": 1.4, "zero-token window": 1.3}, None, "weak", "an untrained window"),
        ({"teacher": 1.0, "student": 1.2, "window-only student": 1.2}, None, "weak", "a trained window"),
        ({"teacher": 1.0, "student": 1.4}, {"perplexity_ratio": 1.3}, "failed", "wanted at most 1.3"),
        ({"teacher": 1.0, "student": 1.1, "linear_off": 1.1}, {"linear_gain": True}, "failed", "does nothing"),
        ({"teacher": 1.0, "student": 1.1}, {"linear_gain": 0.05}, "failed", "not measured"),
        ({"teacher": 1.0, "student": 1.1, "linear_off": 1.1}, {"linear_gain": False}, "dead", "does nothing"),
        ({"teacher": 1.0}, None, "unknown", "Not measured"),
    ],
)
def test_verdict(nll: dict[str, float], gate: dict[str, object] | None, level: str, says: str) -> None:
    found = verdict.judge(rows(**nll), gate)
    assert found.level == level
    assert says in found.headline
    if level == "failed":
        with pytest.raises(GateError, match="quality gate missed") as caught:
            verdict.enforce(found)
        assert caught.value.code == 4
    else:
        verdict.enforce(found)


def test_a_gain_that_may_be_chance_is_nothing() -> None:
    measured = rows(teacher=1.0, student=1.05, linear_off=1.09)
    measured[1].intervals = {"marginal": (-0.01, 0.09)}
    assert verdict.judge(measured).level == "dead"
    measured[1].intervals = {"marginal": (0.01, 0.07)}
    assert verdict.judge(measured).level == "good"


def test_a_branch_that_helps_only_copies_is_alive() -> None:
    measured = rows(teacher=1.0, student=1.05, linear_off=1.055)
    measured[1].copy_nll, measured[2].copy_nll = 0.5, 0.6
    assert verdict.judge(measured).level == "good"


def test_over_seeds(report: Report) -> None:
    other = example(
        seeds=[1],
        rows=[row("teacher", 1.5), row("student", 1.6)],
        sample=[{"prompt": "b", "teacher": "", "student": ""}],
    )
    both = verdict.over_seeds([report.result(), other.result()])
    assert both.seeds == [0, 1]
    assert [r.name for r in both.rows] == [r.name for r in report.rows]
    assert "window-only student: of seed 0 alone" in both.notes and not any(
        "student: of seed" in n[:12] for n in both.notes
    )
    assert both.row("window-only student") == report.row("window-only student")
    assert both.row("student").spread["nll"] == pytest.approx(0.0282843)  # type: ignore[union-attr]
    assert both.verdict.headline == "1.08 times the teacher's perplexity"
    assert both.trained_tokens == 1_500_000, "of one run"
    with pytest.raises(InputError, match="seed 0"):
        verdict.over_seeds([report.result(), report.result()])


# ------------------------------------------------------------------------------------------------------------- tables
@pytest.mark.parametrize("form", ["rich", "markdown", "html"])
def test_missing_values_are_a_dash(form: str) -> None:
    bare = example(rows=[row("teacher", 1.5), {"name": "student"}], state={}, stages=[])
    table = tables.quality_table(bare)
    assert table.columns == ["", "perplexity", "KL", "top-1", "copy NLL"], "nothing else was measured"
    assert table.rows[1] == ["student", *[tables.MISSING] * 4]
    text = as_text(tables.render(table, form))
    assert "0.0" not in text
    assert text.count(tables.MISSING) == 7


def as_text(rendered: object) -> str:
    if isinstance(rendered, str):
        return rendered
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=200).print(rendered)
    return out.getvalue()


def test_a_measured_zero_is_a_zero() -> None:
    made = example(rows=[row("teacher", 1.5), row("student", 1.5, kl=0.0, top1=1.0)])
    assert tables.quality_table(made).rows[1][3:5] == ["0.000", "100.0 %"]


def test_quality_table_says_what_a_sequence_keeps(report: Report) -> None:
    table = tables.quality_table(report)
    cells = {line[0]: line[-3:] for line in table.rows}
    assert [line[0] for line in table.rows][:4] == ["teacher", "swapped", "after transfer", "after LoRA"]
    assert cells["teacher"] == ["6.8 MiB", "54 MiB", "432 MiB"]
    assert cells["after LoRA"] == ["982 KiB"] * 3
    assert cells["zero-token window"] == ["36 KiB"] * 3
    assert cells["linear off"] == [tables.MISSING] * 3


def test_names_are_text_not_markup() -> None:
    table = tables.Table("[red]t", ["", "x|y"], [["[bold]a|b</td><script>", "`1`"]])
    assert "[bold]a|b</td><script>" in as_text(tables.render(table, "rich"))
    assert r"\[bold\]a\|b&lt;/td&gt;&lt;script&gt;" in tables.render(table, "markdown")
    assert "<script>" not in tables.render(table, "html")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (tables.size(None), "–"), (tables.size(0), "0 B"), (tables.size(1023), "1023 B"), (tables.size(1024), "1 KiB"),
        (tables.size(1.5 * 2**20), "1.5 MiB"), (tables.length(1024), "1k"), (tables.length(65536), "64k"),
        (tables.count(1_500_000), "1.5M"), (tables.count(520_192), "520k"), (tables.count(160_000), "160k"),
        (tables.count(0), "0"),
        (tables.number(1234.5), "1234.5"), (tables.number(1.234, 2, 0.05), "1.23 ± 0.05"),
        (tables.seconds(59.94), "59.9 s"), (tables.seconds(119.7), "2 min 00 s"), (tables.seconds(7200), "2.0 h"),
        (tables.times(0.0022), "0.002×"), (tables.percent(0.5), "50.0 %"),
    ],
)  # fmt: skip
def test_numbers_as_text(text: str, wanted: str) -> None:
    assert text == wanted


@pytest.mark.parametrize("width", [80, 140])
def test_summary(report: Report, width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(summary.summary(report, "out/example"))
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    for words in ("after LoRA", "zero-token window", "432 MiB", "982 KiB", report.verdict.headline, "report.html"):
        assert words in text
    said = " ".join(text.split())
    assert "off by 0.100, 0.200, 0.300 of the teacher's after 1, 3, 5 layers" in said
    assert "on its own continuations: 1.100, on the student's: 1.240. Repeated 4-grams: 2.0 % against 3.0 %" in said
    assert "<b>loved</b>" in text


# ------------------------------------------------------------------------------------------------- page, plots, card
@pytest.fixture(scope="module")
def drawn(report: Report) -> list[plots.Drawing]:
    return plots.drawings(report)


def test_every_picture_is_drawn(drawn: list[plots.Drawing]) -> None:
    from PIL import Image

    assert [d.name for d in drawn] == [
        "loss-transfer-0", "loss", "position", "state", "residual", "heads", "attention", "curve-ratio",
    ]  # fmt: skip
    for drawing in drawn:
        image = Image.open(io.BytesIO(drawing.png))
        assert image.width == round(plots.WIDTH * plots.DPI)
        assert image.getpixel((1, image.height - 2))[:3] == (255, 255, 255)  # type: ignore[index]


def test_pictures_of_a_report_without_numbers() -> None:
    bare = example(
        rows=[], stages=[], state={}, diagnostics={}, curves={}, sample=[], generation=None, sites=[], notes=[]
    )
    assert plots.drawings(bare) == []
    page = html.render(bare)
    assert "Pictures" not in page
    assert bare.verdict.headline in page.replace("&#x27;", "'")


def test_pictures_survive_gaps() -> None:
    """One layer, one step, losses that are zero or missing, a state that never pays."""
    stage = {"name": "transfer", "steps": 1, "tokens": 1, "seconds": 1.0, "series": {"layer.3": [0.0], "loss": [None]}}
    state = {1024: {"state_bytes": 9, "kv_bytes": 1}, 8192: {"state_bytes": 9, "kv_bytes": 8}}
    pair = {"teacher": [[None, 1.0]], "student": [[None, None]]}
    found = example(stages=[stage], state=state, diagnostics={"layers": [3], "entropy": pair})
    assert {"loss-transfer-0", "state", "heads"} <= {d.name for d in plots.drawings(found)}
    assert plots.break_even(found.state) is None


def test_break_even() -> None:
    def state(*points: tuple[int, int, int]) -> dict[int, schema.Bytes]:
        return {n: schema.Bytes(state_bytes=s, kv_bytes=k) for n, s, k in points}

    assert plots.break_even(state((100, 500, 100), (1000, 500, 1000))) == pytest.approx(500)
    assert plots.break_even(state((1000, 500, 1000), (2000, 500, 2000))) == pytest.approx(500), "before the first"
    assert plots.break_even(state((1000, 500, 1000))) is None


def test_page_puts_the_verdict_first_and_escapes() -> None:
    nasty = "<script>alert(1)</script>&\"'"
    made = example(
        model={"id": nasty, "converted": 1, "layers": 2},
        method=nasty,
        recipe=nasty,
        notes=[nasty],
        command=nasty,
        evaluation=nasty,
        sample=[{"prompt": nasty, "teacher": nasty, "student": nasty}],
        verdict={"level": "dead", "headline": f"The linear branch does nothing {nasty}", "lines": [nasty]},
        plan={"method": {"name": nasty}},
        rows=[row(nasty, 1.0)],
        sites=[{"name": nasty, "layer": 0, "converted": False, "why": nasty}],
        stages=[{"name": nasty, "steps": 1, "tokens": 1, "seconds": 1.0}],
    )
    page = html.render(made, plots=False)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 12
    order = [page.index(w) for w in ("The linear branch does nothing", "<table", "class=pair", "<pre>", "<dl>")]
    assert order == sorted(order)
    assert "class='verdict dead'" in page


def test_page_is_self_contained(
    report: Report, drawn: list[plots.Drawing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "drawings", lambda _: drawn)
    html.write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 8
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[^"'\s>]+""", page)
    assert "http" not in page
    assert report.verdict.headline in page.replace("&#x27;", "'")


def test_card(report: Report, drawn: list[plots.Drawing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "drawings", lambda _: drawn)
    files.write_all(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "report.html", "report.json"]
    card.check_card(tmp_path / "README.md")
    from huggingface_hub import ModelCard

    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["license"] == "mit"
    assert {"linearize", "hedgehog", "custom_code"} <= set(data["tags"])
    assert "base_model" not in data, "a model that is not on the hub is no link"
    metrics = data["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics}["perplexity"] == report.row("student").perplexity  # type: ignore
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "kind: transfer" in text, "the recipe is inside"
    assert card.license_of(Source(str(tmp_path), "folder")) == "mit"
    assert card.license_of(Source(str(tmp_path / "nowhere"), "folder")) is None


def test_the_licence_is_read_where_the_base_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    assert {card.license_of(source(task=task)) for task in ("text", "image", "diffusion")} == {"apache-2.0"}
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_license("mit")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert card.license_of(source(tmp_path / "small.gguf")) == "mit"

    asked = []

    def download(name: str, file: str, revision: str | None = None) -> str:
        asked.append((name, file, revision))
        if name == "owner/bare":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        (tmp_path / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
        return str(tmp_path / "README.md")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert card.license_of(source("owner/bare")) is None
    assert card.license_of(source("owner/name", revision="v2")) == "gpl-3.0" and asked[1][2] == "v2"


def test_card_of_an_adapter_on_a_hub_model(tmp_path: Path) -> None:
    made = example(
        model={"id": "owner/name", "source": "hub"},
        sample=[{"prompt": "```", "teacher": "````\n# no heading", "student": ""}],
        plan={"output": {"adapter_only": True}},
    )
    text = str(card.card(made))
    assert "base_model: owner/name" in text
    assert 'linearize.load("owner/name", adapter=' in text
    assert "`````\n```" in text, "a sample cannot close its block"
    assert "licence of the base model applies" in text


def test_a_card_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags: [other]\n---\nhello")
    with pytest.raises(InputError, match="not written by linearize"):
        card.check_card(tmp_path / "README.md")


# ------------------------------------------------------------------------------------------------------------- README
@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("# x\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nend\n")
    (tmp_path / "recipes").mkdir()
    return tmp_path


def test_readme_says_when_there_is_nothing(checkout: Path) -> None:
    assert readme.update(checkout) == ["README.md"]
    text = (checkout / "README.md").read_text()
    assert readme.EMPTY in text
    assert text.startswith("# x\n")
    assert text.endswith("\nend\n")


def test_readme_is_idempotent_and_check_sees_drift(checkout: Path, report: Report) -> None:
    schema.write(report.result(), checkout / "recipes" / "results" / "hedgehog" / "b.json")
    bare = example(rows=[row("teacher", 1.5)], stages=[]).result()
    schema.write(bare, checkout / "recipes" / "results" / "hedgehog" / "a.json")
    seen = example(task="image", rows=[{"name": "teacher", "accuracy": 0.9}], seeds=[0, 1]).result()
    schema.write(seen, checkout / "recipes" / "results" / "hedgehog" / "vit.json")
    blocks = ("encoders", "diffusion")
    lines = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in blocks)
    (checkout / "recipes" / "README.md").write_text(lines)

    with pytest.raises(GateError, match="--update-readme") as caught:
        readme.update(checkout, check=True)
    assert caught.value.code == 4
    assert "old" in (checkout / "README.md").read_text(), "a check writes nothing"

    assert readme.update(checkout) == ["README.md", "recipes/README.md"]
    text = (checkout / "README.md").read_text()
    assert readme.update(checkout) == []
    assert readme.update(checkout, check=True) == []
    assert text.index("[hedgehog/a](recipes/results/hedgehog/a.json)") < text.index("hedgehog/b")
    other = (checkout / "recipes" / "README.md").read_text()
    assert "[hedgehog/vit](results/hedgehog/vit.json) | 2 |" in other and "hedgehog/vit" not in text
    assert "hedgehog/a" not in other and readme.EMPTY in other, "no diffusion model was measured"
    assert "1.062×" in text
    assert "5.64 / 5.16" in text

    (checkout / "README.md").write_text(text.replace("1.062×", "1.000×"))
    with pytest.raises(GateError):
        readme.update(checkout, check=True)


def test_readme_with_a_bad_result_file(checkout: Path) -> None:
    before = (checkout / "README.md").read_text()
    path = checkout / "recipes" / "results" / "bad.json"
    path.parent.mkdir()
    path.write_text("{}")
    with pytest.raises(InputError, match="missing key"):
        readme.update(checkout)
    assert (checkout / "README.md").read_text() == before


@pytest.mark.parametrize(
    "text", ["nothing", "<!-- results:end --><!-- results:begin -->", "<!-- results:begin -->" * 2]
)
def test_readme_without_its_comments(checkout: Path, text: str) -> None:
    (checkout / "README.md").write_text(text)
    with pytest.raises(InputError, match="results:begin"):
        readme.update(checkout)


def test_benchmarks_in_a_readme(checkout: Path, report: Report) -> None:
    kept = {k: getattr(report, k) for k in ("command", "commit", "machine", "versions", "date")}
    bench = Bench(
        **kept,
        name="transfer",
        settings={"length": 256},
        units={"tokens/s": "", "ratio": "×"},
        rows=[schema.Measure(name="stories", metrics={"tokens/s": 900.0})],
    )
    schema.write(bench, checkout / "benchmarks" / "results" / "transfer.json")
    (checkout / "README.md").write_text(
        "<!-- results:begin --><!-- results:end --><!-- benchmarks:begin --><!-- benchmarks:end -->"
    )
    readme.update(checkout)
    text = (checkout / "README.md").read_text()
    assert "[transfer](benchmarks/results/transfer.json)" in text
    assert "| stories | 900.0 | – |" in text


def test_our_own_readme_is_up_to_date() -> None:
    assert readme.update(ROOT, check=True) == []


def test_the_readme_path_does_not_load_the_plots() -> None:
    code = "import sys; import linearize.report.readme, linearize.report.html; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
