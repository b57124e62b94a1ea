"""How recipes differ: intervals and p-values, and learning curves."""

import itertools
import sys

from result_tables import (
    CURVE_COLUMNS,
    CURVES,
    FIGURE,
    HEADINGS,
    PREDICTIONS,
    RESULTS,
    Budget,
    Summary,
    block_of,
    format_difference,
    format_table,
    main_scores,
    pairs_of,
    read_table,
    summarize,
)
from significance import Pair, difference, holm, permutation_test
from streams import write_required
from utils import UserError, atomic_write


def compare_recipes(names: list[str], budget: Budget) -> None:
    """Do `compare`: print how recipes differ from the first, in each setting that they share."""

    def alike(summary: Summary) -> tuple[str, ...]:
        # Recipes with other tasks can be compared in the tasks that they share.
        return *summary.setting[:-1], summary.remark

    shown = rows_of_recipes(names, budget)
    rows, p_values = [], []
    for setting, rows_of in itertools.groupby(sorted(shown, key=alike), key=alike):
        of_recipe: dict[str, list[Summary]] = {}
        for summary in rows_of:
            of_recipe.setdefault(summary.recipe, []).append(summary)
        for name in names[1:]:
            # Rows that differ in their data only; those with other dev rows make no pairs.
            both = itertools.product(of_recipe.get(names[0], []), of_recipe.get(name, []))
            pairs: dict[str, Pair] = next(filter(None, itertools.starmap(pairs_of, both)), {})
            scores = {score: [pair] for score, pair in pairs.items()}
            if len(pairs) > 1:
                scores["mean"] = [*pairs.values()]
            for score, of_score in scores.items():
                found = difference(of_score)
                p_values.append(max(found.p, permutation_test(of_score)))
                row = {"setting": ", ".join(filter(None, setting)), "recipe": name}
                row |= {"seeds": str(len(of_score[0].first)), "score": HEADINGS.get(score, score)}
                rows.append(row | {"difference (95% interval)": format_difference(found)})
    if left := [name for name in names[1:] if name not in {row["recipe"] for row in rows}]:
        where = f"{PREDICTIONS} has no dev predictions of the same seeds and rows in one setting"
        problem = f"{', '.join(left)}: cannot be compared with {names[0]}; {where}"
        if not rows:
            raise UserError(problem)
        print(problem, file=sys.stderr)
    for row, p, corrected in zip(rows, p_values, holm(p_values), strict=True):
        row |= {"p": f"{p:.4f}", "p, Holm": f"{corrected:.4f}"}
    for title, of_setting in itertools.groupby(rows, key=lambda row: row.pop("setting")):
        table = [*of_setting]
        text = f"Differences from {names[0]}, {title}:\n\n{format_table(table, list(table[0]))}\n"
        write_required(text)


def rows_of_recipes(names: list[str], budget: Budget) -> list[Summary]:
    """Return the rows with a budget. Raises UserError for a recipe without one."""
    summaries = summarize()
    for name in names:
        budgets = {s.cells["budget"] for s in summaries if s.recipe == name}
        if budget.title not in budgets:
            there = f"; it has {', '.join(sorted(budgets))}" if budgets else "; `run` makes them"
            raise UserError(f"{RESULTS}: {name} has no rows with --budget {budget}{there}")
    return [summary for summary in summaries if summary.cells["budget"] == budget.title]


def rows_with_curve(names: list[str], budget: Budget, runs: set[str]) -> list[Summary]:
    """Return the rows of these recipes, by default of those of the main table, that one of the runs
    belongs to. Raises UserError for a name without one."""
    of_recipe: dict[str, list[Summary]] = {}
    for summary in summarize():
        if summary.cells["budget"] == budget.title and runs & set(summary.runs.values()):
            of_recipe.setdefault(summary.recipe, []).append(summary)
    if missing := [name for name in names if name not in of_recipe]:
        raise UserError(f"{CURVES}: no run of {', '.join(missing)} with --budget {budget}")
    chosen = names or [name for name in of_recipe if block_of(name) == "main"]
    return [row for name in of_recipe if name in chosen for row in of_recipe[name]]


def plot_curves(names: list[str], budget: Budget) -> None:
    """Do `plot`: draw the dev scores after each epoch. A task has a panel, a recipe a line: the
    mean over seeds, in a band from the worst to the best."""
    from matplotlib.figure import Figure

    curves = read_table(CURVES, CURVE_COLUMNS).astype({"epoch": int, "value": float})
    shown = rows_with_curve(names, budget, set(curves["run"]))
    runs = {run for summary in shown for run in summary.runs.values()}
    curves = curves[curves["run"].isin(runs) & (curves["split"] == "dev")]
    scores = main_scores(curves["metric"].unique())
    if not scores:
        raise UserError(f"{CURVES}: no run of these recipes with --budget {budget}")
    size = (max(3.7 * len(scores), 8), 3 + 0.2 * len(shown))
    figure = Figure(figsize=size, layout="constrained", dpi=100)
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for summary in shown:
        name = f"{summary.recipe} {summary.remark}".strip()
        label = f"{name} ({', '.join(summary.setting[:3])}, seeds: {summary.cells['seeds']})"
        own = curves[curves["run"].isin(summary.runs.values())]
        for panel, score in zip(panels, scores, strict=True):
            values = own[own["metric"] == score].groupby("epoch")["value"]
            (line,) = panel.plot(values.mean(), label=label, marker=".")
            low, high = values.min(), values.max()
            panel.fill_between(low.index, low, high, alpha=0.15, color=line.get_color())
    for panel, (score, title) in zip(panels, scores.items(), strict=True):
        panel.set(title=title, xlabel="epoch", ylabel=score)
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize="small")
    with atomic_write(FIGURE) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    print(f"picture: {FIGURE}")
