"""The lineage drawing."""

import re

from report_pages import Folder, Page

from align.report.html.gather import gather
from align.report.html.graph import HEIGHT, WIDTH, lineage


def drawing(tmp_path, needs):
    folder = Folder(tmp_path)
    for name, before in needs.items():
        kind = "eval" if name == "eval" else "sft"
        folder.stage(name, kind, {"model": {"model_name_or_path": "x"}}, needs=before)
    return Page(str(lineage(gather(folder.close()), {})))


def boxes(page):
    return [
        tuple(float(found[key]) for key in ("x", "y"))
        for tag, found in page.tags
        if tag == "rect" and found["class"] == "node"
    ]


def test_nodes_do_not_overlap_and_arrows_go_right(tmp_path):
    needs = {
        "a": [],
        "b": ["a"],
        "c": ["a", "b"],
        "d": ["a"],
        "e": ["c", "d", "a"],
        "f": ["b", "e"],
    }
    page = drawing(tmp_path, needs)
    places = boxes(page)
    assert len(places) == len(needs)
    for at, (x, y) in enumerate(places):
        for left, top in places[at + 1 :]:
            assert abs(x - left) >= WIDTH or abs(y - top) >= HEIGHT
    arrows = [found["d"] for tag, found in page.tags if tag == "path" and found["class"] == "arrow"]
    assert len(arrows) == sum(map(len, needs.values()))
    for arrow in arrows:
        xs = [float(x) for x in re.findall(r"(?:M|H|C[\d. -]* )(\d+(?:\.\d+)?)", arrow)]
        assert xs[0] < float(re.findall(r"(\d+\.\d) \d+\.\d$", arrow)[0])


def test_an_evaluation_shows_its_nearest_models_only(tmp_path):
    page = drawing(
        tmp_path, {"sft": [], "rs": ["sft"], "ppo": ["sft"], "eval": ["sft", "rs", "ppo"]}
    )
    label = page.tags[0][1]["aria-label"]
    assert label == "sft leads to rs; sft leads to ppo; rs leads to eval; ppo leads to eval"


def test_every_stage_links_to_its_section(tmp_path):
    page = drawing(tmp_path, {"sft": [], "rs": ["sft"]})
    assert page.attributes("href") == ["#stage-sft", "#stage-rs"]
    assert page.within("text").count("✓") == 2


def test_many_rounds_are_drawn_in_no_time(tmp_path):
    """Each round reads all before it: the ways back from the last one double with every round."""
    needs = {str(at): [str(before) for before in range(at)] for at in range(24)}
    page = drawing(tmp_path, needs | {"eval": ["0", "22", "23"]})
    assert page.tags[0][1]["aria-label"].endswith("23 leads to eval")
    assert "22 leads to eval" not in page.tags[0][1]["aria-label"]
