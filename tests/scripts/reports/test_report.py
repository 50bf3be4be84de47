import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from minrl.agents import checkpoint
from minrl.agents.checkpoint import CheckpointFolder, load_weights, pack_weights
from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.native_step import native_step
from minrl.agents.step_policy import StepPolicy
from minrl.errors import ConfigError
from minrl.scripts.evaluate import EvaluateConfig, evaluate_run
from minrl.scripts.report import make_report, report, write_report
from minrl.scripts.reports import latency
from minrl.scripts.reports.cells import MISSING, mark_best
from minrl.scripts.reports.collect import find_runs
from minrl.scripts.reports.content import PICTURES, lead_of
from minrl.scripts.reports.drawing import RC
from minrl.scripts.reports.figures import draw_costs
from minrl.scripts.reports.latency import measure_latency
from minrl.scripts.reports.markdown import make_markdown
from minrl.scripts.reports.methods import name_methods
from minrl.scripts.reports.palette import styles_of
from minrl.scripts.reports.panels import mean_curve
from minrl.scripts.reports.score_tables import overview, score_table
from minrl.scripts.reports.stored import FORMAT, read_report
from minrl.scripts.train import train
from minrl.scripts.train_config import quick


class Page(HTMLParser):
    """What is in a page: tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def trained(hopper_id, tmp_path_factory):
    """The folder of a short real run of one seed."""
    config = dataclasses.replace(
        quick((hopper_id,)),
        steps=4,
        batch_size=8,
        eval_every=2,
        eval_episodes=1,
        final_episodes=0,
        run_dir=tmp_path_factory.mktemp("runs") / "mingru-s0",
    )
    train(config)
    evaluate_run(config.run_dir, EvaluateConfig(episodes=2))
    return config.run_dir


def test_one_real_run_makes_a_report(trained, tmp_path):
    report((trained,), output=tmp_path)
    study = json.loads((tmp_path / "report.json").read_text())
    (run,) = study["runs"]
    assert run["parameters"] > 10_000
    assert run["step_seconds"] > 0
    assert study["tasks"][0]["score_note"].startswith("embedded minrl data")
    acting = {row["acting"]: row for row in study["latency"]["rows"]}
    assert 0 < acting["recurrent"]["median"] < 1
    has_compiled = native_step(StepPolicy(DecisionAgent.load(trained).model)) is not None
    compiled = [name for name, row in acting.items() if row["compiled"]]
    assert compiled == ["recurrent", "windowed"] * has_compiled
    assert set(acting) == {"recurrent", "windowed", *["recurrent, eager"] * has_compiled}
    cell = overview(study).rows[0][-1]
    assert cell.below.endswith(", compiled") == has_compiled
    if has_compiled:
        assert acting["recurrent"]["median"] < acting["recurrent, eager"]["median"]
    page = (tmp_path / "report.html").read_text()
    assert "One seed, which has no spread" in page
    assert 'class="bold' not in page
    assert "not D4RL-v2 scores" in page
    assert "may not be compared with published D4RL tables" in page


def test_what_acts_on_windows_is_compiled_too(trained):
    (run,), _ = find_runs([trained])
    run.refresh_every = 1
    timed = measure_latency([run], name_methods([run]))["rows"]
    (as_trained,) = [row for row in timed if row["as_trained"]]
    has_compiled = native_step(StepPolicy(DecisionAgent.load(trained).model)) is not None
    assert (as_trained["acting"], as_trained["compiled"]) == ("windowed", has_compiled)


def test_without_a_compiler_nothing_is_called_compiled(trained, monkeypatch):
    monkeypatch.setattr(latency, "native_step", lambda policy: None)
    (run,), _ = find_runs([trained])
    timed = measure_latency([run], name_methods([run]))["rows"]
    assert [(row["acting"], row["compiled"]) for row in timed] == [
        ("recurrent", False),
        ("windowed", False),
    ]


def test_a_header_describes_no_more_than_the_weights_beside_it(trained, tmp_path):
    """A model of 5 GB, say, which would be built to count its parameters."""
    path = tmp_path / "copy"
    shutil.copytree(trained, path)
    folder = CheckpointFolder(path / "checkpoints")
    header = folder.header(folder.last())
    weights = folder.weights(folder.last())
    header["model"]["config"]["num_layers"] = 1 << 30
    weights.with_suffix(".json").write_text(checkpoint._seal(header))
    assert find_runs([path])[0][0].parameters == find_runs([trained])[0][0].parameters > 10_000
    tensors, header = load_weights(weights)
    header["model"]["config"]["num_layers"] = 1 << 30
    weights.write_bytes(pack_weights(tensors, header))
    assert find_runs([path])[0][0].parameters is None


@pytest.fixture(scope="module")
def study(writers, tmp_path_factory):
    """Two methods and an outside agent on two tasks, something missing everywhere."""
    folder = tmp_path_factory.mktemp("runs")
    write_run, write_peer = writers(folder)
    for seed, score in ((0, 50.0), (1, 60.0), (2, 61.0)):
        write_run(f"mingru-s{seed}", lambda step, score=score: score - step, seed=seed)
        write_run(f"gru-s{seed}", lambda step: 30.0, backbone="gru", seed=seed)
        write_peer(f"iql-s{seed}", 40.0 + seed, seed=seed)
    write_run("mingru-s0", lambda step: 20.0, dataset="minrl/walker2d/medium-v0")
    return make_report((folder,), latency=False)


def test_methods_of_one_seed_are_reported_without_intervals(writers, tmp_path):
    write_run, _ = writers(tmp_path)
    write_run("mingru-s0")
    write_run("gru-s0", backbone="gru")
    report((tmp_path,), output=tmp_path, latency=False)
    page = (tmp_path / "report.html").read_text()
    assert "one seed per task" in page
    assert page.count("no interval") == 1
    assert "Comparing methods" not in page
    assert "Performance profiles" not in page
    assert 'class="bold' not in page


def test_data_without_reference_scores_is_not_said_to_have_any(writers, tmp_path):
    write_run, _ = writers(tmp_path)
    path = write_run("mingru-s0", environment="Pendulum-v1")
    file = path / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line | {"environment_id": "Pendulum-v1", "normalized": None} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = make_report((tmp_path,), latency=False)
    assert study["tasks"][0]["unit"] == "return_mean"
    text = make_markdown(study, {}, {})
    assert "no reference scores are known" in text
    assert "D4RL" not in text.partition("## Protocol")[2].partition("\n## ")[0]


def test_what_is_not_finished_is_said_at_the_top(writers, tmp_path):
    write_run, _ = writers(tmp_path)
    write_run("mingru-s0")
    (write_run("mingru-s1", seed=1) / "evaluations.jsonl").unlink()
    study = make_report((tmp_path,), latency=False)
    assert lead_of(study).endswith("1 run. 1 of 2 runs are finished")


@pytest.fixture(scope="module")
def pages(study, tmp_path_factory):
    """The folder of their report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(study, folder)
    return folder


def test_the_page_needs_nothing_else(pages):
    text = (pages / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    links = [value for _, found in page.tags for name, value in found.items() if "href" in name]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    anchors = {found["id"] for tag, found in page.tags if tag == "section"}
    assert {found["href"][1:] for tag, found in page.tags if tag == "a"} == anchors
    assert not re.search(r"\bnan\b|None\b", "".join(page.text))


def test_figures_are_sound_svg_with_a_colour_of_the_page(pages):
    page = (pages / "report.html").read_text()
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        ElementTree.fromstring(figure)  # noqa: S314 - our own
        assert "currentColor" in figure
    files = sorted((pages).glob("*.svg"))
    assert len(files) == 5
    for file in files:
        ElementTree.parse(file)  # noqa: S314
        assert "currentColor" not in file.read_text()
        assert file.name in (pages / "report.md").read_text()


def test_pages_are_made_again_from_the_figures(pages, tmp_path):
    report((pages / "report.json",), output=tmp_path)
    made, again = (
        json.loads((path / "report.json").read_text())["made"] for path in (pages, tmp_path)
    )
    for file in pages.iterdir():
        assert file.read_text().replace(made, again) == (tmp_path / file.name).read_text()


def test_what_is_no_report_is_refused(study, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"not the report\.json"):
        read_report(path)
    path.write_text(json.dumps({"report": FORMAT}))
    with pytest.raises(ConfigError, match="it has no ablations"):
        read_report(path)
    path.write_text(json.dumps(study | {"report": 0}))
    with pytest.raises(ConfigError, match="format 0"):
        read_report(path)


def test_a_file_is_no_folder_to_write_to(pages):
    with pytest.raises(ConfigError, match=r"report\.md is no folder to write to: File exists"):
        report((pages / "report.json",), output=pages / "report.md")


def test_both_pages_have_all_figures_of_the_tables(study, pages):
    page = "".join(Page((pages / "report.html").read_text()).text)
    markdown = (pages / "report.md").read_text().replace("\\_", "_")
    for table in (overview(study), score_table(study, "last"), score_table(study, "best")):
        for row in (table.heads, *table.rows):
            for cell in row:
                assert cell.text.replace(" % ", "\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}") in page
                assert cell.below in page
                assert cell.text in markdown


def test_markdown_sets_words_left_and_figures_right(study, pages):
    assert "\n| method | IQM, last (1 task) | IQM, best" in (pages / "report.md").read_text()
    lost = study | {"left_out": [{"folder": "a", "reason": "lost"}], "unfinished": 1}
    text = make_markdown(lost, {"aggregates": ""}, {"aggregates": "drawn.svg"})
    assert "\n| folder | reason |\n|---|---|\n" in text
    assert (
        "\n| task | mingru | gru | d3rlpy IQL\N{NO-BREAK SPACE}† |\n|---|---:|---:|---:|\n" in text
    )
    assert text.count(PICTURES["aggregates"][1]) == 1


def test_missing_runs_and_other_peoples_code_are_shown_as_such(study):
    table = score_table(study, "last")
    assert [cell.text for cell in table.heads] == [
        "task",
        "mingru",
        "gru",
        "d3rlpy IQL\N{NO-BREAK SPACE}†",
    ]
    by_task = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert by_task["hopper medium"] == ["53.0", "30.0", "41.0"]
    assert by_task["walker2d medium"] == ["20.0", MISSING, MISSING]
    assert any("d3rlpy 2.8.1, 500 steps" in note for note in table.notes)
    assert [cell.text for cell in score_table(study, "best").heads] == ["task", "mingru", "gru"]


def test_only_what_the_best_may_be_by_chance_is_bold(study):
    rows = {row[0].text: row[1:] for row in score_table(study, "last").rows}
    # 53 ± 6.1 over three seeds: from 37.9 to 68.1, where 41 is and 30 is not.
    assert [cell.bold for cell in rows["hopper medium"]] == [True, False, True]
    assert not any(cell.top for cell in rows["hopper medium"])  # another is as good
    assert not any(cell.bold for cell in rows["walker2d medium"])  # one seed


def test_what_is_clearly_best_is_highlighted_and_what_tells_nothing_apart_is_not():
    best = {"a": (50.0, (45.0, 55.0)), "b": (40.0, None)}
    assert mark_best(best) == {"a": {"bold": True, "top": True}}
    assert mark_best(best | {"b": (46.0, None)}) == {}
    assert mark_best({"a": (50.0, None), "b": (40.0, None)}) == {}


def test_published_numbers_come_last_and_apart(pages):
    page = (pages / "report.html").read_text()
    ours, _, others = page.partition('<section id="published" class="others">')
    assert "ReBRAC" in others
    assert "ReBRAC" not in ours
    assert "<section" not in others
    assert "not comparable" in others


def test_the_protocol_names_every_setting_in_which_methods_differ(write_run, tmp_path):
    write_run("mamba-s0", backbone="mamba")
    write_run("mingru-s0")
    write_run("mingru,convolution=4-s0", model={"convolution": 4})
    of_the_task = {"targets": (5000.0, 2500.0), "model": {"return_scale": 500.0}}
    write_run("mingru-s0", dataset="minrl/walker2d/medium-v0", **of_the_task)
    settings = make_report((tmp_path,), latency=False)["protocol"]["settings"]
    assert settings["expansion"] == {"1": ["mingru"], "2": ["mamba"]}
    assert settings["width"] == {"64": ["mamba", "mingru"]}
    assert settings["acting"] == {"recurrent": ["mamba", "mingru"]}
    unsaid = {"convolution", "mlp ratio", "backbone", "seed", "device", "parameters matched to"}
    unsaid |= {"targets", "return scale"}
    assert not unsaid & set(settings)


def test_the_protocol_says_of_which_tasks_a_setting_is(write_run, tmp_path):
    walker = "minrl/walker2d/medium-v0"
    for backbone in ("mingru", "gru"):
        write_run(f"{backbone}-s0", backbone=backbone, model={"width": 256})
        write_run(f"{backbone}-s0", backbone=backbone, dataset=walker)
    settings = make_report((tmp_path,), latency=False)["protocol"]["settings"]
    assert settings["width"] == {"256": ["hopper medium"], "64": ["walker2d medium"]}
    write_run("lstm-s0", backbone="lstm", dataset=walker, model={"width": 96})
    settings = make_report((tmp_path,), latency=False)["protocol"]["settings"]
    assert settings["width"] == {
        "256": ["gru on hopper medium", "mingru on hopper medium"],
        "64": ["gru on walker2d medium", "mingru on walker2d medium"],
        "96": ["lstm"],
    }


def test_only_settings_of_the_preset_are_said_to_have_been_chosen(write_run, tmp_path):
    write_run("mingru-s0", batch_size=64)
    write_run("gru-s0", backbone="gru", batch_size=64)
    write_run("gru,dropout=0.5-s0", backbone="gru", batch_size=64, model={"dropout": 0.5})
    write_run("transformer-s0", backbone="transformer", batch_size=64)
    study = make_report((tmp_path,), latency=False)
    assert study["protocol"]["chosen_on"] == {
        "minGRU on Hopper medium-expert": ["learning rate", "weight decay", "dropout"],
        "minGRU on Walker2d medium-expert, seeds 0 to 2": ["noise on the returns"],
        "minGRU on medium-replay and -expert data, seeds 0 to 3": ["return that a step is told"],
        "the same, the Transformer's on all data, seed 0": ["timesteps that it is told"],
        "minGRU's training speed": ["tokens", "context length"],
    }
    page = make_markdown(study | {"made": ""}, {}, {})
    assert "noise on the returns: chosen on minGRU on Walker2d" in page


def test_what_scores_cost_is_drawn_with_the_names_of_the_methods(study):
    costly = json.loads(json.dumps(study))
    for cell in costly["cells"]:
        cell["parameters"] = 200_000 + len(cell["method"])
    rows = [
        {"method": name, "median": 1e-4, "as_trained": name != "eager"}
        for name in ("mingru", "gru", "eager")
    ]
    costly["latency"] = {"rows": rows}
    styles = styles_of(study["methods"])
    with mpl.rc_context(RC):
        drawn = draw_costs(costly, styles)
    assert drawn.count(">mingru<") == drawn.count(">gru<") == 2
    assert ">eager<" not in drawn
    assert draw_costs(study, styles) is None  # nothing is known of ours


def test_curves_are_drawn_where_runs_have_steps_in_common():
    def run(steps, seconds):
        curve = {"3600": {"steps": steps, "return": steps, "score": [0.5 * x for x in steps]}}
        return {"targets": [3600.0], "curve": curve, "step_seconds": seconds}

    runs = [run([2, 4, 6], 0.1), run([4, 6], 0.3)]
    x, mean, low, high = mean_curve(runs, "score", "seconds")
    assert x == pytest.approx([4 * 0.2, 6 * 0.2])
    for values in (mean, low, high):
        assert values == pytest.approx([2.0, 3.0])
    assert mean_curve([run([2], None)], "score", "seconds") is None
    assert mean_curve([run([2], 0.1), run([4], 0.1)], "score", "steps") is None


def test_a_backbone_that_this_version_has_not_is_a_method_like_others(write_run, tmp_path):
    write_run("mingru-s0")
    write_run("rwkv-s0", backbone="rwkv")
    study = make_report((tmp_path,), latency=False)
    assert [method["name"] for method in study["methods"]] == ["mingru", "rwkv"]


def test_a_study_and_runs_of_another_condition_keep_their_names(write_run, tmp_path):
    """A transformer's timesteps are its preset's, and no reason to name others by theirs."""
    to_go = {"condition": "return-to-go", "max_timestep": 1000}
    for backbone in ("mingru", "transformer"):
        for seed in range(4):
            write_run(f"{backbone}-s{seed}", backbone=backbone, seed=seed, model=to_go)
            told = {"max_timestep": 1000 if backbone == "transformer" else 0}
            write_run(f"new/{backbone}-s{seed}", backbone=backbone, seed=seed, model=told)
    study = make_report((tmp_path,), latency=False)
    assert {method["name"] for method in study["methods"]} == {
        "mingru",
        "mingru, condition=return-to-go, max_timestep=1000",
        "transformer",
        "transformer, condition=return-to-go",
    }
