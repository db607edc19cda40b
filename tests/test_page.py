"""The page of a run: it is read back here, as a browser would, and has to say what happened.

The vocabulary is hostile throughout: tokens that spell markup, half a character, an escape code.
"""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from toys import tiny_head, tiny_target

import speculate
from drafts import Draft, chain_shape, fixed_tree
from plumbing.page import page, record
from plumbing.show import compare, harmless, judge, quoted, remark, trace_lines
from speculate import Cycle, Generation, generate

WORDS = [b"<b>", b'"', b"\xc3", b"\n", b"\t  ", b"\xa9", b"&amp;", b"word", b"</div></script>"]
WORDS += [b"'>", b"  ", b"\x1b[2J", b"-->"]
HALVES = {2, 5}  # of one character
ENCODING = SimpleNamespace(decode_bytes=lambda tokens: b"".join(WORDS[t] for t in tokens))
PROMPT, NO_STOP = "<i>asked</i> & \x07", 99
BRANCHES = fixed_tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)), torch.device("cpu"))
RUNS = {
    "drawn chain": dict(temperature=1.0, gamma=3),
    "greedy chain": dict(gamma=3),
    "greedy tree": dict(plan=BRANCHES),
    "drawn tree": dict(temperature=1.0, plan=BRANCHES),
}


class Element:
    def __init__(self, tag: str, attributes: dict):
        self.tag, self.attributes, self.children = tag, attributes, []

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    @property
    def elements(self) -> list["Element"]:
        return [child for child in self.children if isinstance(child, Element)]

    def all(self, wanted: str = "") -> list["Element"]:
        """Those below, in their order: with this tag, or with this class if it begins with a dot."""
        found = []
        for child in self.elements:
            classes = ["." + name for name in child.attributes.get("class", "").split()]
            found += [child] if wanted in ("", child.tag, *classes) else []
            found += child.all(wanted)
        return found

    def percent(self, name: str) -> float:
        assert self.attributes[name].endswith("%")
        return float(self.attributes[name][:-1])


class Reader(HTMLParser):
    """HTML as a tree of elements. One that is not closed, or not in order, is an error."""

    def __init__(self, html: str):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(html)
        self.close()
        assert len(self.open) == 1, f"never closed: {self.open[-1].tag}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "br"):
            self.open.append(self.open[-1].children[-1])

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Element(tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(html: str) -> Element:
    return Reader(html).open[0]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def decoded(target, tokens=20, stop_token=NO_STOP, **request) -> dict:
    """The lanes of a run with a short prompt: plain decoding, and with a head."""
    head, steps, cycles = tiny_head("eagle", 1, target, steps=30), [], []
    request |= dict(prompt_tokens=[1, 2], max_new_tokens=tokens, seed=3, stop_token=stop_token)
    alone = {name: value for name, value in request.items() if name != "plan"}
    plain = generate(target, on_cycle=record(steps), **alone)
    shown = generate(target, head=head, on_cycle=record(cycles), **request)
    return {"plain": (plain, steps), "speculative": (shown, cycles)}


def written(lanes: dict, stop_token=NO_STOP) -> str:
    return page(["a run of <x>"], PROMPT, lanes, ENCODING, {stop_token})


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def run(request, target):
    """(lanes, the page of them)."""
    lanes = decoded(target, **request.param)
    return lanes, written(lanes)


def cards_of(run) -> list[tuple[Element, Cycle]]:
    cycles = [cycle for cycle in run[0]["speculative"][1] if len(cycle.draft.tokens) > 1]
    return list(zip(read(run[1]).all("article"), cycles, strict=True))


def spelt(tokens) -> str:
    return harmless(ENCODING.decode_bytes(tokens).decode("utf-8", "replace"))


# ------------------------------------------------------------------------------------- the page


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(run):
    _, html = run
    read(html)
    for outside in ("http", "//", "src=", "<script", "<link", "<img", "@import", "url(", "script:"):
        assert outside not in html.lower(), outside


def test_a_models_text_never_becomes_markup(run):
    """Whatever the text, the prompt and the facts are, the elements are ours."""
    ours = "html head meta title style body h1 h2 p i b div span br a article header ol li"
    ours += " svg g rect line text"
    html = run[1]
    assert {element.tag for element in read(html).all()} <= set(ours.split())
    (body,) = read(html).all("body")
    assert all(word in body.text for word in ("a run of <x>", "<i>asked", "</div></script>"))
    assert all(character.isprintable() or character in "\n\t" for character in html)


def test_every_link_leads_to_a_card_and_every_card_is_linked(run):
    cards = ["#" + card.attributes["id"] for card in read(run[1]).all("article")]
    links = [link.attributes["href"] for link in read(run[1]).all("a")]
    assert links == 2 * cards  # from the text, and from the lane


def test_the_text_is_the_decoded_text_with_its_accepted_drafts_marked(run):
    lanes, html = run
    result, cycles = lanes["speculative"]
    (text,) = read(html).all(".text")
    prompt, *groups = text.elements
    assert prompt.text == harmless(PROMPT)
    assert text.text == prompt.text + spelt(result.tokens)
    for group, cycle in zip(groups, cycles, strict=True):
        assert len(group.elements) == cycle.accepted
        drafted = "".join(token.text for token in group.elements)
        for shown, tokens in (group.text, cycle.tokens), (drafted, cycle.tokens[: cycle.accepted]):
            whole = [token for token in tokens if token not in HALVES]  # halves show up later
            assert shown.replace("\ufffd", "").replace("é", "") == spelt(whole)


def test_the_token_that_ends_a_text_is_no_part_of_it(target):
    stop = decoded(target)["speculative"][0].tokens[9]
    lanes = decoded(target, stop_token=stop)
    tokens = lanes["speculative"][0].tokens
    assert len(tokens) < 20 and tokens[-1] == stop
    (text,) = read(written(lanes, stop)).all(".text")
    assert text.text == harmless(PROMPT) + spelt(tokens[:-1])


def test_half_a_character_at_the_end_is_shown(target):
    lanes = decoded(target, tokens=1)
    lanes["speculative"][1][0].tokens[:] = [min(HALVES)]
    (text,) = read(written(lanes)).all(".text")
    assert text.text == harmless(PROMPT) + "\ufffd"


def test_the_figures_are_those_that_are_printed(run):
    (plain, _), (shown, _) = run[0].values()
    slow, fast, speedup, tau = (tile.all("b")[0].text for tile in read(run[1]).all(".tile"))
    assert f" {slow} tokens/s decoding" in compare("", plain, plain)
    line = compare("", shown, plain)
    assert f" {fast} tokens/s decoding" in line and line.endswith(f"tau {tau}, speedup {speedup}")


def test_a_text_that_ended_at_once_has_no_speed():
    one, two = Generation([3]), Generation([3, 4], [1], prefill_seconds=1.0, draft_seconds=1.0)
    for shown, baseline in ((one, one), (two, one), (one, two)):
        assert "nothing to time" in compare("", shown, baseline)
        assert remark(shown, baseline, 4) is None
    assert "nothing" not in compare("", two, two)


def test_why_a_draft_did_not_pay_is_told_by_what_its_cycles_cost():
    plain = Generation([0] * 9, [1] * 8, verify_seconds=8.0)  # a step takes a second
    for draft, words in ((4.0, "cannot pay here: a cycle costs 6.0 plain steps (its draft 4.0)"),
                         (2.0, "did not pay: a cycle cost 4.0 plain steps (its draft 2.0) and wrote 3"),
                         (0.5, None)):  # fmt: skip
        slow = Generation([0] * 7, [3, 3], draft_seconds=2 * draft, verify_seconds=4.0)
        told = remark(slow, plain, 4)
        assert told is None if words is None else words in told


def test_the_lanes_show_each_phase_of_each_cycle_on_one_scale(run):
    lanes, html = run
    whole = max(result.seconds for result, _ in lanes.values())
    (drawing,) = read(html).all(".lanes")[0].elements
    groups = [element for element in drawing.elements if element.tag in ("a", "g")]
    cycles = [cycle for _, cycles in lanes.values() for cycle in cycles[1:]]
    for group, cycle in zip(groups, cycles, strict=True):
        blocks = {rect.attributes["class"]: rect.percent("width") for rect in group.all("rect")}
        phases = {"head": "draft", "target": "verify", "rest": "other"}
        share = {kind: 100 * cycle.seconds[phase] / whole for kind, phase in phases.items()}
        assert blocks == pytest.approx(share, abs=1e-3)
        assert [number.text for number in group.all("text")] in ([], [str(len(cycle.tokens))])
    heights = sorted({int(rect.attributes["y"]) for rect in drawing.all("rect")})
    for height, (result, _) in zip(heights, lanes.values(), strict=True):
        blocks = [rect for rect in drawing.all("rect") if int(rect.attributes["y"]) == height]
        ends = [rect.percent("x") + rect.percent("width") for rect in blocks]
        starts = [rect.percent("x") for rect in blocks]
        assert starts == pytest.approx([0, *ends[:-1]], abs=0.01)  # no gap, nothing on top
        assert ends[-1] == pytest.approx(100 * result.seconds / whole, abs=0.01)


def test_the_axis_counts_milliseconds(run):
    lanes, html = run
    whole = max(result.seconds for result, _ in lanes.values())
    ticks = read(html).all(".tick")
    assert 3 <= len(ticks) <= 6
    for tick in ticks:
        number, unit = tick.text.split()
        seconds = tick.percent("x") / 100 * whole
        assert unit == "ms" and float(number) == pytest.approx(1000 * seconds, rel=0.01, abs=1e-9)


def test_plain_decoding_has_one_lane_and_no_cards(target):
    lanes = {"plain": decoded(target)["plain"]}
    body = read(written(lanes))
    assert len(body.all(".name")) == len(body.all(".tile")) == 1
    assert not body.all("article") and "The cycles" not in body.text
    assert body.all(".text")[0].text == harmless(PROMPT) + spelt(lanes["plain"][0].tokens)


# ------------------------------------------------------------------------------------- its cards


def test_there_is_a_card_for_each_cycle_with_a_draft(run):
    cycles = run[0]["speculative"][1]
    numbers = [number for number, cycle in enumerate(cycles) if len(cycle.draft.tokens) > 1]
    assert len(numbers) == len(cards_of(run)) < len(cycles)
    for (card, cycle), number in zip(cards_of(run), numbers):
        assert card.attributes["id"] == f"cycle-{number}"
        name, counts, times = (part.text for part in card.all("header")[0].elements)
        first = trace_lines(number, cycle, ENCODING)[0]
        assert f"{name.lower()}: {counts}; {times}" == first


def test_boxes_are_nested_as_the_tokens_follow_each_other(run):
    for card, cycle in cards_of(run):
        tokens, parents = cycle.draft.tokens.tolist(), cycle.draft.shape.parents.tolist()

        def drafted(parent: int, tokens=tokens, parents=parents) -> list:
            below = [node for node in range(1, len(tokens)) if parents[node] == parent]
            return [(quoted(tokens[node], ENCODING), drafted(node)) for node in below]

        def drawn(items: Element) -> list:
            pairs = ((item.elements[0], item.elements[1:]) for item in items.elements)
            return [
                (box.all(".token")[0].text[2:], [pair for inner in below for pair in drawn(inner)])
                for box, below in pairs
            ]

        assert drawn(card.all("ol")[0]) == drafted(0)
        chain = parents[1:] == list(range(len(tokens) - 1))
        assert (len(card.all(".chain")), len(card.all(".tree"))) == (chain, not chain)


def test_a_box_gives_the_verdict_and_the_figures_of_the_trace(run):
    signs = {"accepted": "✓", "rejected": "✗", "dropped": "–"}
    for card, cycle in cards_of(run):
        lines = trace_lines(1, cycle, ENCODING)
        *boxes, own = card.all(".box")
        for box, line in zip(boxes, lines[1:-1], strict=True):
            p, q, verdict = re.search(r"p (\S+)  q (\S+)  (?:p/q \S+ +u \S+  )?(.*)", line).groups()
            _, drawing, figures = box.all(".bars")[0].elements
            assert "".join(c if isinstance(c, str) else " " for c in figures.children) == f"{p} {q}"
            bars = [rect.percent("width") / 100 for rect in drawing.all("rect")]
            assert bars == pytest.approx([float(p), float(q)], abs=6e-4)
            assert box.all(".why")[0].text.endswith(verdict)
            kind = box.attributes["class"].split()[1]
            assert kind[:6] == verdict[:6].lower() and box.text.startswith(signs[kind])
        assert "  " + " ".join(part.text for part in own.elements) == lines[-1]


def test_a_tick_lies_inside_the_bar_of_p_exactly_where_a_drawn_token_was_accepted(target):
    seen = set()
    for card, cycle in cards_of((lanes := decoded(target, **RUNS["drawn chain"]), written(lanes))):
        for box, p, q, u in zip(card.all(".box"), cycle.p, cycle.q, cycle.u):
            kind, ticks = box.attributes["class"].split()[1], box.all("line")
            seen.add(kind)
            if kind == "dropped":
                assert not ticks
                continue
            (tick,), (bar, _) = ticks, box.all("rect")
            assert tick.percent("x1") == tick.percent("x2") == pytest.approx(100 * u * q, abs=1e-5)
            assert bar.percent("width") == pytest.approx(100 * p, abs=1e-5)
            assert (tick.percent("x1") < bar.percent("width")) == (kind == "accepted")
            assert f"u {u:.3f}" in box.all(".why")[0].text
    assert seen == {"accepted", "rejected", "dropped"}


@pytest.mark.parametrize("name", ["greedy chain", "greedy tree", "drawn tree"])
def test_named_tokens_have_no_tick(target, name):
    html = written(decoded(target, **RUNS[name]))
    assert "bars" in html and "the target's own choice" in html
    assert not [line for box in read(html).all(".box") for line in box.all("line")]
    assert "u times q" not in html


def test_what_a_stop_token_cuts_off_is_dropped_and_not_judged():
    draft = Draft(torch.tensor([0, 7, 10, 7]), chain_shape(3, torch.device("cpu")))
    figures = [0.5, 0.9, 0.9], [0.5, 0.9, 0.9], [0.1, 0.1, 0.1], (0.5, None)
    seconds = dict.fromkeys(("draft", "verify", "other"), 0.0)
    cycle = Cycle([7, 10], draft, [0, 1, 2, 3], *figures, False, seconds)
    verdicts, why = judge(cycle, ENCODING)
    assert [kind for kind, _ in verdicts] == ["accepted", "accepted", "dropped"]
    assert why == "ends the text"


# --------------------------------------------------------------------------------- speculate.py


@pytest.fixture
def speak(tiny_run, call):
    """speculate.py on the tiny run: (status, out, err)."""
    fixed = ["--max_new_tokens", "12", "--device", "cpu", "--dtype", "float32", "The old cat"]
    return lambda *argv: call(speculate.main, "--out_dir", tiny_run.folder, *fixed, *argv)


@pytest.mark.parametrize(
    "flags",
    [(), ("--temperature", "1"), ("--nodes", "6"), ("--head", "none"), ("--trace",)],
    ids=str,
)
def test_writing_a_page_changes_nothing_else(speak, tmp_path, flags):
    """But for the time that everything took."""
    path = tmp_path / "page.html"
    plain, out = (
        re.sub(r" *\b\d+\.\d\b|speedup \S+|.* pay.*\n", "", out)
        for _, out, _ in (speak(*flags), speak(*flags, "--html", path))
    )
    assert out == f"{plain}written: {path}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    body = read(path.read_text("utf-8"))
    assert body.all(".text")[0].text.startswith("The old cat")
    assert bool(body.all("article")) == (flags != ("--head", "none"))


def test_the_page_tells_what_was_printed(speak, tmp_path):
    _, out, _ = speak("--html", tmp_path / "page.html", "--gamma", "3")
    body = read((tmp_path / "page.html").read_text("utf-8"))
    facts = [fact.text for fact in body.all("p")[:3]]
    assert facts[0] == out.splitlines()[0]
    assert facts[1].endswith(" M parameters, temperature 0, drafting a chain of 3")
    assert facts[2] == "the two outputs are identical" in out
    for tile in body.all(".tile"):
        assert tile.all("b")[0].text in out


@pytest.mark.parametrize("file", ["missing/page.html", ".", "text/page.html", "x" * 300])
def test_a_file_that_cannot_be_written_is_refused_before_decoding(
    speak, tmp_path, monkeypatch, file
):
    (tmp_path / "text").write_text("no folder")
    monkeypatch.setattr(speculate, "load", None)  # what comes first of decoding: it must not come
    status, out, err = speak("--html", tmp_path / file)
    assert (status, out) == (2, "")
    assert err.startswith("error: cannot write ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_run_that_fails_leaves_nothing_behind(speak, tmp_path):
    assert speak("--html", tmp_path / "page.html", "--gamma", "0")[0] == 2
    assert not list(tmp_path.iterdir())


def test_nothing_is_collected_without_a_page(speak, monkeypatch):
    monkeypatch.setattr(speculate, "record", None)
    assert speak()[0] == 0


def test_what_is_kept_of_a_cycle_is_small(target):
    for _, cycles in decoded(target, temperature=1.0).values():
        for cycle in cycles:
            assert cycle.draft.q is None and cycle.draft.logits == ()
