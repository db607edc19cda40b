"""Results as Markdown tables: `python -m study.report` writes those of results/, and the plots.

Every figure comes from a result of bench.py or of a study; nothing is computed here but means and
ratios. The tables of README and RESULTS.md are written from results/*.json, and a test
compares them.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from drafts import ALONE, COPIED, GAMMA, MATCH
from plumbing.cli import run
from plumbing.files import load_checkpoint
from study.plots import is_padded, plot_bench, plot_depth, plot_foresight, plot_gain, plot_labels
from study.statistics import evaluate
from targets.loading import SIZES, TRAINED

# Each target's measurements of a second layer: eagle-koala against eagle in a benchmark, and
# eagle-k2 against eagle-original in ablations.
GAINS = {"small GPT, 16 layers": ("cpu-greedy", ["ablation-pairs", "ablation-long"])}
GAINS |= {"SmolLM2, 30 layers": ("smollm2-four", [])}
# The benchmarks of README's table.
SUMMARY = {"cpu-greedy": "small GPT, greedy", "cpu-sampled": "small GPT, temperature 1"}
SUMMARY |= {"smollm2-greedy": "SmolLM2, greedy"}
# Those beside which all sizes were decoded, after validation and after test prompts.
SIZED = ("cpu-greedy", "smollm2-greedy")
RUNS = {"cpu": "small GPT", "smollm2": "SmolLM2"}  # that came with the code
# What foreseeing acceptance brings, by target and temperature.
FORESIGHTS = {
    f"foresight-{run}-{kind}": f"{label}, {kind}"
    for run, label in RUNS.items()
    for kind in ("greedy", "sampled")
}
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "trained/README.md")
# The discriminator's figures, see discriminator.py, and their names in tables.
JUDGED = {"share_found": "share", "gradient_ratio": "gradients", "cosine": "cosine"}
JUDGED |= {"cosine_of_p": "of CE", "dose": "dose"}

# ---------------------------------------------------------------------------------------- tables


def table(header: str, rows: list[list]) -> str:
    """A Markdown table. `header`: the names of its columns, with " | " between them."""
    names = header.split(" | ")
    header, *body = [f"| {' | '.join(map(str, cells))} |" for cells in [names, *rows]]
    return "\n".join([header, "|" + "---|" * len(names), *body])


def with_interval(value: float, interval: list[float], digits: int = 2, unit: str = "") -> str:
    """A figure with its 95 % interval behind it."""
    low, high = interval
    return f"{value:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def size_name(gamma: int, nodes: int) -> str:
    """A draft's size, as short as a table wants it."""
    return f"tree of {nodes}, {gamma} deep" if nodes else f"chain of {gamma}"


def draft_name(method: dict) -> str:
    gamma, nodes, match = method["gamma"], method["nodes"], method.get("lookup", 0)
    copies = f"copies where {match} match" if match else ""
    if method["head"] == "lookup":
        return f"{copies}, of {gamma}"
    size = size_name(gamma, nodes)
    size += " (chosen)" if method["chosen"] else ""
    return f"{copies}, else {size}" if match else size


def ablation_table(result: dict) -> str:
    """An ablation's cells, means over seeds. All taus are estimates, on held-out text."""
    rows = []
    for cell, row in result["cells"].items():
        heads = list(row["heads"].values())
        mean = {key: np.mean([h[key] for h in heads]) for key in heads[0] if key != "dtype"}
        tau = f"{mean['tau_sampled']:.3f} ({mean['tau_tuned']:.3f} at {mean['heat']:.2g})"
        ratio = {k: " ± ".join(f"{x:.4f}" for x in pair) for k, pair in row["ratios"].items()}
        sampled = f"{ratio['tau_sampled']} ({ratio['tau_tuned']})" if ratio else ""
        judged = [f"{name} {mean[key]:.2f}" for key, name in JUDGED.items() if key in mean]
        if "recovered" in row:
            judged += ["brings back " + " ± ".join(f"{x:.2f}" for x in row["recovered"])]
        cells = [cell, len(heads), f"{mean['parameters'] / 1e6:.2f} M"]
        cells += [f"{mean['head_tokens'] / 1e6:.2f} M", f"{mean['seconds'] / 60:.1f}"]
        cells += [f"{mean['agree_1']:.3f}, {mean['agree_4']:.3f}", f"{mean['tau_estimate']:.3f}"]
        cells += [tau, row["against"] or "", ratio.get("tau_estimate", ""), sampled]
        rows.append([*cells, ", ".join(judged)])
    header = "cell | seeds | parameters | tokens | minutes | agreement 1, 4 | tau, greedy | "
    header += "tau at temperature 1 (q at its best) | against | ratio, greedy | "
    return table(header + "ratio at temperature 1 (q at its best) | discriminator", rows)


def foresight_table(result: dict) -> str:
    """What foreseeing acceptance brings: a run of study/foresight.py."""
    told, valid, rows = result["foreseen"], result["validation"], []
    test = result.get("test", {}).get("figures")
    names = ("best", "q", "logistic", "judge", "oracle of 1", "oracle of 4")
    gains = any(valid[name]["share"] for name in names)  # has the oracle anything to share?
    for name in names:
        f = valid[name]
        shape = ", width {}, patience {}".format(*f["shape"]) if "shape" in f else ""
        row = [name + shape, f"{told[name]['bce']:.3f}" if name in told else "", f"{f['tau']:.2f}"]
        row += [size_name(*f["size"]) if "size" in f else f"{f['nodes']:.1f}, {f['steps']:.1f}"]
        row += [f"{f['speed']:.2f}x", f"{f['share']:.0%}" if gains else ""]
        if test and name in test["heads"]:
            figures = test["heads"][name]
            row += [with_interval(figures["tau"], figures["tau_interval"])]
            row += [with_interval(figures["speedup"], figures["speedup_interval"], unit="x")]
            others = test["comparisons"].get(name, [])
            for o in others:
                runs = "{:.2f} to {:.2f}".format(*o["net_speed_range"])
                row += [f"{with_interval(o['net_speed'], o['net_speed_interval'], 3)} ({runs})"]
        rows.append(row + [""] * (9 - len(row)))
    header = "tree by | cross entropy | tau | tokens, steps | speed | share of the oracle's gain"
    return table(header + " | tau, decoded | speedup, decoded | against best (runs)", rows)


def depth_table(result: dict) -> str:
    """Where K layers pay, by the target's depth: a run of study/depth.py."""
    rows, nets, besides = [], [], sorted({row["more"] for row in result["table"]})
    parts = [result, *result["real"].values()]
    for part in parts:
        whole = [row for row in part["table"] if "task" not in row]
        found = {(row["kind"], row["depth"], row["more"]): row["heads"] for row in whole}
        for (kind, depth, more), heads in found.items():
            if more:
                continue
            for layers, f in heads.items():
                row = [kind, depth_name(part, depth), layers, size_name(*f["size"])]
                row += [with_interval(f["tau"], f["tau_interval"])]
                row += [f"{f['verify']:.2f} + {f['draft']:.2f}"]
                row += [with_interval(f["speed"], f["speed_interval"], unit="x")]
                check = part["decoded"][str(depth)][layers]
                ratio = f"{check['speedup'] / check['predicted']:.2f}"
                row += [ratio if kind == "greedy" else ""]  # which alone is decoded
                each = [found[kind, depth, other][layers] for other in besides]
                row += [with_interval(f["net"], f["net_interval"], 3) for f in each]
                rows.append(row)
        nets += [nets_row(part, row) for row in part["table"] if "task" in row or not row["more"]]
    header = "decoding | target's layers | K | its draft | tau | c_verify + c_draft | "
    shown = [f"net speed, {m:g} more a draft step" if m else "net speed" for m in besides]
    blocks = [table(" | ".join([header + "speed | decoded / predicted", *shown]), rows)]
    shown = [i for i, (_, nodes) in enumerate(result["sizes"]) if nodes or i % 2]
    header = "decoding | target's own layers | tau against one layer, of | "
    header += " | ".join(size_name(*result["sizes"][i]) for i in shown)
    rows = [
        [kind, part["layers"], k, *(with_interval(ratios[i][0], ratios[i][1:], 3) for i in shown)]
        for part in parts
        for kind, found in part["tau_ratios"].items()
        for k, ratios in found.items()
    ]
    blocks.append(table(header, rows))
    header = "decoding | texts | target's layers | best K | net speed of two layers | of three"
    blocks.append(table(header, nets))
    blocks.append("\n".join(line for part in parts for line in crossovers(part)))
    bits = [f"{name} {value:.3f}" for name, value in result["bits"].items()]
    blocks += ["Bits per byte of held-out text: " + ", ".join(bits) + "."] if bits else []
    return "\n\n".join(blocks)


def depth_name(part: dict, depth: int) -> str:
    return f"{depth}" if depth == part["layers"] else f"{part['layers']}, padded to {depth}"


def nets_row(part: dict, row: dict) -> list:
    """The fastest K, and the others against one layer, of all texts or of those of a task."""
    heads, kind = {k: f for k, f in row["heads"].items() if k != "wide"}, row["kind"]
    texts = row.get("texts", len(part["texts"][f"{kind}-test"]))
    best = max(heads, key=lambda k: heads[k]["speed"])
    cells = [kind, f"{row.get('task', 'all')} ({texts})", depth_name(part, row["depth"]), best]
    return cells + [with_interval(heads[k]["net"], heads[k]["net_interval"], 3) for k in ("2", "3")]


def crossovers(result: dict) -> list[str]:
    """Where a second layer begins to pay, a line for each kind of text and cost of a draft step."""
    lines, found = [], {}
    ends = f"layers ({result['layers']} of its own)." if is_padded(result) else "layers."
    for row in result["table"]:
        if "task" not in row:
            bounds = row["depth"], *row["heads"]["2"]["net_interval"]
            found.setdefault((row["kind"], row["more"]), []).append(bounds)
    for (kind, more), rows in found.items():
        slower = [depth for depth, low, high in rows if high < 1]
        faster = [depth for depth, low, high in rows if low > 1]
        between = [depth for depth, low, high in rows if low <= 1 <= high]
        parts = [("slower than one at", slower), ("undecided at", between), ("faster at", faster)]
        told = [f"{words} {', '.join(map(str, depths))}" for words, depths in parts if depths]
        besides = f", a draft step {more:g} dearer" if more else ""
        lines.append(f"- Two layers, {kind}{besides}: {'; '.join(told)} {ends}")
    return lines


def overhead_table(result: dict) -> str:
    """What a head takes by its layers: a run of study/overhead.py."""
    target, rows = result["target"], []
    for row in result["overhead"]:
        share = row["parameters"] / target["parameters"]
        cells = [row["kind"], row["layers"], f"{row['parameters'] / 1e6:.2f} M ({share:.1%})"]
        cells += [f"{row['cache_bytes'] / 1e3:.2f} kB", f"{row['held_bytes'] / 1e6:.1f} MB"]
        cells += [f"{row['step']:.2f} s", f"{row['step_with_d']:.2f} s"]
        rows.append(cells)
    cells = ["the target", "", f"{target['parameters'] / 1e6:.1f} M"]
    cells += [f"{target['cache_bytes'] / 1e3:.2f} kB", f"{target['held_bytes'] / 1e6:.1f} MB"]
    rows.append([*cells, "", ""])
    header = "head | K | parameters (of the target's) | keys and values of a token | memory"
    return table(f"{header} | training step without D | with a learnt D", rows)


def conditions(result: dict) -> str:
    """A benchmark's conditions, in one line."""
    figures, config, candidates = result["figures"], result["config"], result["candidates"]
    few = "" if figures["loop_free"] >= 30 else " (FEWER THAN 30: no headline figure)"
    loops = "" if figures["headline"] == "loop-free" else ", SO ALL ARE USED"
    how = "greedy" if config["temperature"] == 0 else f"temperature {config['temperature']:g}"
    return (
        f"{figures['loop_free']} loop-free prompts ({candidates['looped']} of "
        f"{candidates['candidates']} candidates looped){few}{loops} x {config['max_new_tokens']} "
        f"tokens, {how}, {config['runs']} runs, seed {config['seed']}; {result['device']}, "
        f"{result['dtype']}; plain decoding {figures['autoregressive_tokens_per_second']:.0f} "
        f"tokens/s, {result['baseline_share']:.0%} of a bare loop."
    )


def bench_tables(result: dict, fold: bool = False) -> str:
    """A benchmark's conditions and three tables. `fold`: the last two are shown on a click."""
    figures, config, rows = result["figures"], result["config"], []
    greedy = config["temperature"] == 0

    def range_of(low: float, high: float, digits: int) -> str:
        """The lowest and the highest of the runs; of a single one there is no spread."""
        return f" ({low:.{digits}f} to {high:.{digits}f})" if config["runs"] > 1 else ""

    for name, f in figures["heads"].items():
        method, tau = result["methods"][name], with_interval(f["tau"], f["tau_interval"])
        loops = f"{f['tau_on_loops']:.2f}" if f["tau_on_loops"] else "none"
        speedup = with_interval(f["speedup"], f["speedup_interval"], unit="x")
        speedup += range_of(*f["speedup_range"], 2)
        row = [method["head"], draft_name(method), tau, loops, speedup]
        row += [f"{f['predicted_speedup']:.2f}x", f"{f['c_verify']:.2f} + {f['c_draft']:.2f}"]
        row += [f"{f['elsewhere']:.1%}"]
        rows.append(row + ([f"{f['identical']:.0%}"] if greedy else []))
    header = "head | draft | tau [95 %] | tau on loops | speedup [95 %] (runs) | predicted"
    header += " | c_verify + c_draft | elsewhere" + (" | identical" if greedy else "")
    parts, rows = [conditions(result), table(header, rows)], []
    for name, others in figures["comparisons"].items():
        for f in others:
            ratio = with_interval(f["tau_ratio"], f["tau_ratio_interval"], 3)
            speed = with_interval(f["net_speed"], f["net_speed_interval"], 3)
            speed += range_of(*f["net_speed_range"], 3)
            rows.append([name, f["with"], ratio, speed, f"{f['predicted']:.3f}"])
    further = {}
    if rows:
        header = "this | against | tau ratio [95 %] | net speed [95 %] (runs) | predicted"
        further["Two methods compared"] = table(header, rows)
    by_task = "By task (loop-free prompts): tau, speedup measured (and predicted)"
    for title, body in (further | {by_task: task_table(result)}).items():
        if fold:
            title = f"<details><summary>{title}</summary>"
            body += "\n\n</details>"
        parts += [title, body]
    return "\n\n".join(parts)


def task_table(result: dict) -> str:
    """Of each method and task: tau, and the speedup measured (and predicted)."""
    heads, rows = result["figures"]["heads"], []
    tasks = next(iter(heads.values()))["tau_by_task"]
    counts = Counter(sample["task"] for sample in result["samples"] if not sample["loop"])
    for name, f in heads.items():
        method = result["methods"][name]
        row = [method["head"], draft_name(method)]
        for task in tasks:
            tau, speedup = f["tau_by_task"].get(task), f["speedup_by_task"].get(task)
            expected = f["predicted_by_task"].get(task)
            row.append(f"{tau:.2f}, {speedup:.2f}x ({expected:.2f}x)" if tau else "")
        rows.append(row)
    return table(" | ".join(["head", "draft", *(f"{t} ({counts[t]})" for t in tasks)]), rows)


def is_result(name: str) -> bool:
    return (RESULTS / f"{name}.json").is_file()


def read_result(name: str) -> dict:
    """A committed result of bench.py or of a study."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def summary_table() -> str:
    """README's table: chains of 4, copies alone, and the fastest draft measured."""
    rows = []
    for name, label in SUMMARY.items():
        result = read_result(name)
        heads, methods = result["figures"]["heads"], result["methods"]
        fastest = max(heads, key=lambda method: heads[method]["speedup"])
        usual = [name for name in ("eagle", "eagle-koala", "lookup") if name in heads]
        for method in dict.fromkeys([*usual, fastest]):
            f, draft = heads[method], draft_name(methods[method]).removesuffix(" (chosen)")
            tau = with_interval(f["tau"], f["tau_interval"])
            speedup = with_interval(f["speedup"], f["speedup_interval"], unit="x")
            row = [label, methods[method]["head"], draft, tau, speedup]
            rows.append([*row, f"{f['predicted_speedup']:.2f}x"])
    return table("target, decoding | head | draft | tau [95 %] | speedup [95 %] | predicted", rows)


def auto_table() -> str:
    """The size that `auto` chose, against the one measured fastest on validation prompts.

    Both speeds are measured on test prompts.
    """
    rows = []
    for name in SIZED:
        valid, test = (read_result(f"sizes-{name}-{part}") for part in ("valid", "test"))
        measured, methods = valid["figures"]["heads"], test["methods"]
        for auto in [name for name, method in methods.items() if method["chosen"]]:
            head = methods[auto]["head"]
            fixed = [n for n, m in methods.items() if m["head"] == head and not m["chosen"]]
            best = max(fixed, key=lambda name: measured[name]["speedup"])
            keys = ("samples", "seconds", "isolated_seconds")
            parts = [test[key] for key in keys]
            found = evaluate(methods, test["config"]["seed"], *parts, {auto: [best, head]})
            ratios = [
                with_interval(f["net_speed"], f["net_speed_interval"], 3)
                for f in found["comparisons"][auto]
            ]
            sizes = [draft_name(methods[m]).removesuffix(" (chosen)") for m in (best, auto)]
            rows.append([SUMMARY[name], head, *sizes, *ratios])
    header = "target, decoding | head | fastest on validation prompts | chosen by costs"
    return table(f"{header} | its net speed [95 %] | that against a chain of 4 [95 %]", rows)


def copies_table() -> str:
    """The predicted speedup of copies by match and by length, along validation texts."""
    rows, matches, lengths = [], (1, 2, 3, 4), (2, 4, 6, 12, 16)
    for folder, label in RUNS.items():
        found = json.loads((TRAINED / folder / SIZES).read_text("utf-8"))["copies"]
        for kind in ("greedy", "sampled"):
            for name, match in (("alone", ALONE), ("eagle", MATCH)):
                speed = {tuple(row[:2]): f"{row[-1]:.2f}" for row in found[f"{name}, {kind}"]}
                beside = "copies alone" if name == "alone" else f"before {name}'s chain of {GAMMA}"
                row = [f"{label}, {kind}", beside, *(speed[COPIED, m] for m in matches), match]
                rows.append([*row, *(speed[n, match] for n in lengths)])
    header = [f"match {m}, {COPIED} copied" for m in matches] + ["match"]
    header += [f"{n} copied" for n in lengths]
    return table(" | ".join(["target, decoding", "draft", *header]), rows)


def trained_table() -> str:
    """The weights in trained/, by their own records."""
    rows = []
    for path in sorted(TRAINED.glob("*/*.pt"), key=lambda path: (path.parent.name, path.stem)):
        kind = "target" if path.stem == "target" else "draft head"
        record = load_checkpoint(path, kind)["training"]
        if kind == "target":
            figure, what = f"{record['valid_bits_per_byte']:.3f} bits per byte", "target"
        else:
            figure = f"tau {record['valid']['tau_estimate']:.2f}, estimated"
            used = record["settings"]
            what = f"K = {used['layers']}, lambda = {used['adversarial_weight']:g}"
        size, minutes = path.stat().st_size / 1e6, record["seconds"] / 60
        row = [f"{path.parent.name}/{path.name}", what, f"{record['parameters'] / 1e6:.2f} M"]
        row += [f"{size:.1f} MB", figure, f"{minutes:.0f}", f"`{record['origin']['command']}`"]
        rows.append([*row, record["origin"]["commit"]])
    header = "file | what | parameters | size | held-out text | minutes | command | at commit"
    return table(header, rows)


SPECIAL = {"results/*.json": summary_table, "trained": trained_table}
SPECIAL |= {"auto": auto_table, "copies": copies_table}


def tables_of(name: str) -> str:
    """The tables of a block with this name, see `with_tables`."""
    if name in SPECIAL:
        return SPECIAL[name]()
    result = read_result(Path(name).stem)
    kinds = {"foreseen": foresight_table, "overhead": overhead_table, "table": depth_table}
    for key, made in kinds.items():
        if key in result:
            return made(result)
    return ablation_table(result) if "cells" in result else bench_tables(result, True)


def with_tables(text: str) -> str:
    """A document with new tables in each block from `<!-- NAME -->` to `<!-- end -->`.

    NAME is results/FILE.json, for that result; or one of SPECIAL.
    """
    names = "|".join(map(re.escape, SPECIAL))
    block = rf"(<!-- ({names}|results/[^ ]+\.json) -->\n).*?<!-- end -->"
    return re.sub(
        block,
        lambda found: f"{found[1]}{tables_of(found[2])}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text("utf-8")), "utf-8")
    gains = {
        label: (read_result(bench), [read_result(name) for name in ablations])
        for label, (bench, ablations) in GAINS.items()
    }
    plot_gain(gains, RESULTS / "koala-gain.png")
    plot_labels(read_result("ablation-labels"), RESULTS / "labels.png")
    there = {name: title for name, title in FORESIGHTS.items() if is_result(name)}
    if there:
        found = {title: read_result(name) for name, title in there.items()}
        plot_foresight(found, RESULTS / "foresight.png")
    beside = {"SmolLM2": read_result("depth-smollm2")}
    plot_depth(read_result("depth-cpu"), RESULTS / "depth.png", beside)
    for name in ("cpu-greedy", "smollm2-greedy", "smollm2-four"):
        plot_bench(read_result(name), RESULTS / f"{name}.png")


if __name__ == "__main__":
    run(main)
