"""The page of the report: HTML without scripts, and without anything that would have to be loaded."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rlhf_lightning.evaluation.figures import LABELS, STAGES, label

Report = Mapping[str, Any]

STAND_INS = ("reward model", "reward function", "weighted sum of rewards", "ensemble of rewards", "reward")
"""What scores where there is no judge."""

JUDGES = {
    "world": (
        "Judged by the world's own judge, which knows the truth: the right topic, true and distinct facts, register, "
        "length and an ending. It labelled the comparisons (with noise) and made this report; no training step ever "
        "saw its scores."
    ),
    **{
        scorer: (
            f"Nobody here knows the truth about these responses, so the score of the {scorer} stands in for a judge. "
            "PPO was trained to raise this very score: read these numbers as how far it rose, not as proof that people "
            "would agree."
        )
        for scorer in STAND_INS
    },
}
"""Who judged, and what that is worth."""

LENGTHS = {"longer": "the longer one", "shorter": "the shorter one", "equal": "as long as the other"}
"""What is said of the chosen response's length."""

ALTERNATIVES = {
    "win_rate": "Bars: win rate of each policy against demonstrations with 95 % intervals",
    "reward": "Left: accuracy by size of the margin. Right: accuracy by confidence",
    "ppo": "Curves over rollouts: score, judge's score, KL",
    "distance": "Score and judge's score over the square root of the KL to the reference",
    "training": "Curves of the loss of each stage",
    "time": "Bars: what the time of each stage was spent on",
}
"""What is said of a figure to those who cannot see it."""


def page(report: Report, figures: Mapping[str, str]) -> str:
    """Return the whole page; ``figures`` are SVG texts by name."""
    sections = [
        _header(report),
        _headline(report),
        _policies(report, figures),
        _reward(report, figures),
        _ppo(report, figures),
        _samples(report),
        _speed(report, figures),
        _run(report, figures),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What each stage bought</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(report: Report) -> str:
    judge = report["judge"]
    who = JUDGES.get(judge, f"Judged by: {judge}.")
    return f"<header><h1>What each stage bought</h1><p class=lead>{escape(who)}</p></header>"


def _headline(report: Report) -> str:
    """Return the numbers to be read first."""
    cards = [(f"{label(name)} beats demonstrations", percent(r["mean"]), between(r)) for name, r in _rates(report)]
    reward, ppo = report["reward"], report["ppo"]
    if "accuracy" in reward:
        note = f"{reward['pairs']} pairs"
        if "ceiling" in reward:
            note = f"of {percent(reward['ceiling'], 1)} that can be reached"
        cards.append(("reward model picks the better one", percent(reward["accuracy"], 1), note))
    if "kl" in ppo:
        cards.append(("PPO's distance from its start", f"{number(ppo['kl'])} nats", "KL a response"))
    if "total" in report["seconds"]:
        cards.append(("all stages", duration(report["seconds"]["total"]), _memory(report)))
    boxes = [
        f"<div class=card><b>{escape(value)}</b>{escape(name)}<small>{escape(note)}</small></div>"
        for name, value, note in cards
    ]
    return f"<div class=cards>{''.join(boxes)}</div>" if boxes else ""


def _policies(report: Report, figures: Mapping[str, str]) -> str:
    """Return win rates and scores of the policies, beside the figure."""
    scores = report["judge_score"]
    names = list(dict.fromkeys([*report["win_rate"], *scores]))
    if not names:
        return ""
    rates = report["win_rate"]
    head = ["policy", *(["win rate", "95 % interval"] if rates else []), "mean score"]
    rows = []
    for name in names:
        rate = [percent(rates[name]["mean"], 1), between(rates[name], 1)] if name in rates else ["–", ""]
        score = number(scores[name]) if name in scores else "–"
        rows.append([label(name), *(rate if rates else []), score])
    prompts = f" on {report['prompts']} held-out prompts" if "prompts" in report else " on held-out prompts"
    if rates:
        note = f"Each policy's responses{prompts} against the demonstration for the same prompt; a tie counts half."
    else:
        note = f"The mean score of each policy's responses{prompts}. There are no demonstrations to compare them with."
    title = "Against demonstrations" if rates else "Scores"
    return _section(title, note, _beside(_figure("win_rate", figures), table(head, rows)))


def _reward(report: Report, figures: Mapping[str, str]) -> str:
    """Return how good the reward model is."""
    reward = report["reward"]
    if "accuracy" not in reward:
        return ""
    rows = [["accuracy on held-out comparisons", percent(reward["accuracy"], 1)]]
    if "ceiling" in reward:
        rows.append(["the best that the labels' noise allows", percent(reward["ceiling"], 1)])
    rows.append(["pairs", f"{reward['pairs']}"])
    if "card" in reward:
        card = reward["card"]
        rows += [
            ["log loss, nats (guessing: 0.69)", number(card["log_loss"])],
            ["mean margin", number(card["mean_margin"])],
            ["calibration error", percent(card["expected_calibration_error"], 1)],
        ]
        for part in card["length_bins"]:
            of = LENGTHS[part["chosen"]]
            rows.append(
                [f"accuracy where the chosen response is {of}", f"{percent(part['accuracy'], 1)} of {part['pairs']}"]
            )
        if card["best_score_mean"] is not None:
            spread = f"{number(card['best_score_mean'])} ± {number(card['best_score_std'])}"
            rows.append(["score of the best responses, mean ± standard deviation", spread])
        if card["length_correlation"] is not None:
            rows.append(["correlation of score and length", f"{card['length_correlation']:+.2f}"])
    note = "How often it scores the chosen response above the rejected one, and whether it knows how sure it may be."
    return _section("Reward model", note, _figure("reward", figures) + table(["measured", "value"], rows))


def _ppo(report: Report, figures: Mapping[str, str]) -> str:
    """Return what PPO changed, and a warning where the judge does not agree that it is better."""
    ppo = report["ppo"]
    if not ppo:
        return ""
    rows = []
    if "score" in ppo:
        rows.append(["score of the reward", number(ppo["score"]["before"]), number(ppo["score"]["after"])])
    scores = report["judge_score"]
    # Where the reward stands in for a judge, this would be the same number again.
    if report["judge"] not in STAND_INS and {ppo["reference"], "ppo"} <= scores.keys():
        rows.append(["score of the judge", number(scores[ppo["reference"]]), number(scores["ppo"])])
    if "kl" in ppo:
        rows.append(["KL to the reference, nats a response", "0", number(ppo["kl"])])
    note = "Before and after PPO, on held-out prompts. The faint line is each rollout, the clear one its moving mean."
    body = _warning(report) + _figure("ppo", figures) + table(["measured", "before", "after"], rows)
    body += _figure("distance", figures)
    return _section("PPO", note, body)


def _warning(report: Report) -> str:
    ppo, scores = report["ppo"], report["judge_score"]
    if report["judge"] in STAND_INS or "score" not in ppo or not {ppo["reference"], "ppo"} <= scores.keys():
        return ""
    if ppo["score"]["after"] <= ppo["score"]["before"] or scores["ppo"] >= scores[ppo["reference"]]:
        return ""
    return (
        "<p class=warning><b>The reward rose and the judge's score fell.</b> PPO found what the reward model likes and "
        "the judge does not. Raise beta, stop earlier, or train the reward model on more comparisons.</p>"
    )


def _samples(report: Report) -> str:
    """Return prompts with what each policy answered, side by side."""
    samples = report["samples"]
    if not samples:
        return ""
    blocks = [_sample(sample) for sample in samples]
    note = "The first held-out prompts, not the best ones. The number is the score that the text above speaks of."
    return _section("Side by side", note, "".join(blocks))


def _sample(sample: Mapping[str, Any]) -> str:
    # What a person wrote comes first: it is what the others are measured against.
    order = sorted(sample["responses"], key=lambda name: name != "demonstrations")
    answers = "".join(_answer(name, sample["responses"][name], sample["scores"].get(name)) for name in order)
    return f"<article><h3>{escape(prompt_text(sample['prompt']))}</h3><div class=answers>{answers}</div></article>"


def _answer(policy: str, text: str, score: float | None) -> str:
    head = f"<h4>{escape(label(policy))}<span>{'' if score is None else number(score)}</span></h4>"
    shown = escape(text.strip()) or "<i>(empty)</i>"
    return f'<div class="answer {_css_class(policy)}">{head}<p>{shown}</p></div>'


def _speed(report: Report, figures: Mapping[str, str]) -> str:
    """Return how fast each stage was trained, and what its time was spent on."""
    rows = [
        [
            STAGES.get(stage, stage),
            scientific(found["tokens_per_second"]),
            scientific(found.get("sampled_tokens_per_second")),
            scientific(found.get("flops_per_second")),
            percent(found.get("share_of_peak"), 1),
            f"{number(found['seconds_step'])} s",
        ]
        for stage, found in report["throughput"].items()
    ]
    if not rows:
        return ""
    note = (
        "Real tokens of training a second, without padding; tokens sampled in a second of sampling; operations of the "
        "method a second, and their share of what the device was measured to do in products of matrices; seconds of a "
        "step. Validation, checkpoints and export are not in it."
    )
    head = ["stage", "tokens/s", "sampled/s", "FLOP/s", "of the peak", "step"]
    return _section("How fast it was", note, _figure("time", figures) + table(head, rows))


def _run(report: Report, figures: Mapping[str, str]) -> str:
    """Return what is needed to know how the numbers came about."""
    seconds = report["seconds"]
    times = [[STAGES.get(name, name), duration(value)] for name, value in seconds.items()]
    facts = [["seed", str(report["seed"])], ["peak memory", f"{number(report['peak_memory_gb'])} GB"]]
    facts += [[name, str(version)] for name, version in report["versions"].items()]
    tables = _beside(table(["stage", "time"], times), table(["run", ""], facts))
    return _section("The run", "", _figure("training", figures) + tables)


def _section(title: str, note: str, body: str) -> str:
    paragraph = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{body}</section>"


def _beside(left: str, right: str) -> str:
    return f"<div class=beside><div>{left}</div><div>{right}</div></div>" if left else right


def _figure(name: str, figures: Mapping[str, str]) -> str:
    """Return the figure as an image inside of the page: its own document, so that no ids of two figures meet."""
    if name not in figures:
        return ""
    data = base64.b64encode(figures[name].encode()).decode()
    return f'<figure><img alt="{escape(ALTERNATIVES[name])}" src="data:image/svg+xml;base64,{data}"></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table; all texts are escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def prompt_text(prompt: Any) -> str:
    """Return a prompt as one text, a conversation with its roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def percent(value: float | None, digits: int = 0) -> str:
    """Return a share as people read it."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def between(rate: Mapping[str, float | None], digits: int = 0) -> str:
    """Return the limits of an interval of shares as people read them."""
    low, high = rate["low"], rate["high"]
    return "–" if low is None or high is None else f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def number(value: float | None) -> str:
    """Return a number with as many digits as people read."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def scientific(value: float | None) -> str:
    """Return a large number with a unit of thousands."""
    if value is None:
        return "–"
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}".strip()
        value /= 1000
    return f"{value:.3g} P"


def duration(seconds: float) -> str:
    """Return seconds as people read them."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _rates(report: Report) -> Iterable[tuple[str, Mapping[str, float | None]]]:
    rates: Mapping[str, Mapping[str, float | None]] = report["win_rate"]
    return rates.items()


def _memory(report: Report) -> str:
    return f"at most {number(report['peak_memory_gb'])} GB of memory"


def _css_class(policy: str) -> str:
    return policy if policy in LABELS else "other"


STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --quiet: #52606d; --paper: #fff; --wash: #f5f7fa; --line: #e4e7eb;
  --pretrained: #9aa5b1; --sft: #3a7ebf; --ppo: #c8571b; --demonstrations: #2a7f62; --other: #5b5f97; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa5b1; --paper: #16191d; --wash: #20252b;
  --line: #323a43; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 0 0 4px; }
section { margin-top: 44px; padding-top: 20px; border-top: 1px solid var(--line); }
section > p, .lead { color: var(--quiet); max-width: 92ch; margin: 0 0 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 24px; }
.card { background: var(--wash); border-radius: 10px; padding: 14px 16px; font-size: 14px; line-height: 1.35; }
.card b { display: block; font-size: 23px; line-height: 1.3; white-space: nowrap; letter-spacing: -0.01em; }
.card small { display: block; color: var(--quiet); font-size: 13px; }
.beside { display: grid; grid-template-columns: minmax(0, 1.3fr) minmax(0, 1fr); gap: 28px; align-items: start; }
@media (max-width: 860px) { .beside { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0 0 16px; background: #fff; border-radius: 10px; padding: 4px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; max-width: 640px; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 13px; }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); }
th:not(:first-child), td:not(:first-child) { text-align: right; padding-right: 0; padding-left: 10px; }
article { margin: 22px 0 0; }
article h3 { font-size: 16px; margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; }
.answer { background: var(--wash); border-radius: 0 0 10px 10px; border-top: 3px solid var(--other);
  padding: 10px 14px; }
.answer.pretrained, .answer.start { border-color: var(--pretrained); } .answer.sft { border-color: var(--sft); }
.answer.ppo { border-color: var(--ppo); } .answer.demonstrations { border-color: var(--demonstrations); }
.answer h4 { display: flex; justify-content: space-between; margin: 0 0 4px; font-size: 13px; color: var(--quiet); }
.answer h4 span { color: var(--ink); font-variant-numeric: tabular-nums; }
.answer p { margin: 0; font-size: 15px; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
section > .warning { background: #fdecc8; color: #4a3206; border-radius: 10px; padding: 12px 16px; max-width: none; }
"""
