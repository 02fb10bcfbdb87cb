// The overview: did choosing help, what looks wrong, and one method's figures.

const DATA = JSON.parse($("data").textContent);
const ROWS = DATA.rows, N = ROWS.id.length;
const METHODS = Object.fromEntries(DATA.methods.map((m) => [m.label, m]));
let current = (DATA.methods.find((m) => !m.control) || DATA.methods[0]).label;

const METRICS = new Map(DATA.metrics.map((m) => [m.name, m]));
const lowerIsBetter = (metric) => METRICS.get(metric).lower_is_better;
const byKind = { method: 0, mix: 1, random: 2, longest: 3, shortest: 3, full: 4, base: 5 };
const UNIT = DATA.summary.unit;
const plainLabel = (row) => (row.kind === "random" ? "random" : row.label.split("@")[0]);

// Seeds of one label and budget are one line: the mean over seeds with the summary's interval over items, if it is there,
// else the range over seeds (one seed: its own interval).
function groupsOf(metric) {
  const groups = new Map();
  for (const row of DATA.comparison) {
    const found = row.metrics[metric];
    if (!found || !isNumber(found.value)) continue;
    const key = JSON.stringify([plainLabel(row), row.budget, row.budget === null ? row.n_rows : null]);
    if (!groups.has(key)) groups.set(key, { label: plainLabel(row), budget: row.budget, kind: row.kind, n_rows: row.n_rows, n_tokens: row.n_tokens, values: [], lows: [], highs: [] });
    const group = groups.get(key);
    group.values.push(found.value);
    group.lows.push(found.low);
    group.highs.push(found.high);
  }
  const sign = lowerIsBetter(metric) ? 1 : -1;
  return [...groups.values()].map((g) => {
    const one = g.values.length === 1;
    const told = DATA.verdicts.find((v) => plainLabel(v) === g.label && v.kind === g.kind && v.budget === g.budget), metrics = told ? told.metrics[metric] : null;
    return { ...g, value: g.values.reduce((a, b) => a + b, 0) / g.values.length, versus: told ? told.versus[metric] : null, cost: told ? told.cost : null,
      low: metrics ? metrics.low : one ? g.lows[0] : Math.min(...g.values), high: metrics ? metrics.high : one ? g.highs[0] : Math.max(...g.values) };
  }).sort((a, b) => (byKind[a.kind] ?? 6) - (byKind[b.kind] ?? 6) || sign * (a.value - b.value));
}

const metricNames = () => [...METRICS.keys()];

// The mean of the random choices of one budget.
function randomMean(groups, budget) {
  const random = groups.filter((g) => g.kind === "random" && g.budget === budget).flatMap((g) => g.values);
  return random.length ? random.reduce((a, b) => a + b, 0) / random.length : null;
}

// Budgets that something was trained at, smallest first; base, full and mixes belong to none.
const isSized = (g) => g.kind === "method" || ["random", "longest", "shortest"].includes(g.kind);
const budgetsOf = (groups) => [...new Map(groups.filter(isSized).sort((a, b) => a.n_rows - b.n_rows).map((g) => [g.budget, g])).keys()];

function head() {
  const sum = DATA.summary, kept = DATA.methods.filter((m) => !m.control), metric = metricNames()[0];
  $("title").textContent = visible(sum.run);
  document.title = visible(sum.run) + " · keepset report";
  const names = (kept.length ? kept : DATA.methods).map((m) => m.label);
  const parts = [`${names.join(", ").replace(/, ([^,]*)$/, " and $1")} scored ${whole(sum.rows)} rows`];
  if (sum.model) parts.push(`with ${sum.model}`);
  if (sum.targets.length) parts.push(`for ${sum.targets.join(", ")}`);
  let text = parts.join(" ") + (sum.budgets.length ? ` to keep ${sum.budgets.map((b) => (/%|tokens/.test(b) ? b : whole(+b) + " rows")).join(", ")}.` : ".");
  if (metric) {
    const groups = groupsOf(metric), best = groups.filter((g) => g.kind === "method")[0], random = best ? randomMean(groups, best.budget) : null;
    if (best) text += ` By ${words(metric)}, ${best.label}${budgetsOf(groups).length > 1 ? " at " + best.budget : ""} reached ${short(best.value)}` + (isNumber(best.low) ? ` [${short(best.low)}, ${short(best.high)}]` : "") + (isNumber(random) ? ` against ${short(random)} for a random choice of the same size` + (best.versus && best.versus.low <= 0 && best.versus.high >= 0 ? "; the held-out items don't tell them apart." : ".") : ".");
  }
  $("lede").textContent = visible(text);
  const first = METHODS[current];
  const facts = [["rows scored", whole(sum.rows)], ["kept", whole(first.kept), `${percent(first.kept, first.scored)} by ${first.label}`],
    [UNIT + " kept", whole(first.kept_tokens), isNumber(sum.tokens) ? `${percent(first.kept_tokens, sum.tokens)} of ${whole(sum.tokens)}` : null],
    ["quarantined", whole(sum.quarantined), sum.quarantined ? "see the tab" : null],
    ["time spent", duration(sum.seconds), "all steps"],
    ["findings", whole(DATA.findings.length), DATA.findings.some((f) => f.level === "warning") ? `${DATA.findings.filter((f) => f.level === "warning").length} to look at` : null]];
  $("facts").append(...facts.filter((f) => f[1] !== "–").map(([name, value, note]) => h("div", {}, h("dt", {}, name), h("dd", {}, value, note && h("span", {}, visible(note))))));
}

function choice(label, options, value, onchange) {
  return h("label", { class: "choice" }, h("span", {}, label), h("select", { onchange: (e) => onchange(e.target.value) },
    options.map((o) => h("option", { value: o, selected: o === value }, visible(words(o))))));
}

function comparisonSection() {
  const metrics = metricNames();
  if (!metrics.length) return null;
  const place = h("div", {});
  const budgets = budgetsOf(groupsOf(metrics[0]));
  let metric = metrics[0], budget = budgets[0];
  const draw = () => {
    const groups = groupsOf(metric), shown = groups.filter((g) => !isSized(g) || g.budget === budget);
    const children = [figure(words(metric) + (METRICS.get(metric).unit && ", " + METRICS.get(metric).unit) + (lowerIsBetter(metric) ? ": lower is better" : ": higher is better"), (w) => intervalChart(w, shown, metric, randomMean(groups, budget)),
      "Dot: the value; line: its 95 % interval. Small rings: single seeds. Dashed: the mean of the random choices." + (isNumber(METRICS.get(metric).seen) ? ` Four of five comparisons with random on these items see a difference of ${short(METRICS.get(metric).seen)}.` : ""), { wide: true })];
    const curves = new Map();
    for (const g of groups) if (isNumber(g.n_rows) && g.kind !== "base" && g.kind !== "full") curves.set(g.label, [...(curves.get(g.label) || []), { x: g.n_rows, y: g.value, low: g.low, high: g.high, kind: g.kind }]);
    const series = [...curves].map(([label, points]) => ({ label, kind: points[0].kind, points: points.sort((a, b) => a.x - b.x) })).filter((c) => c.points.length > 1);
    if (series.length) children.push(figure("By budget", (w) => curveChart(w, series, { x: "rows kept", y: words(metric) }), "The same methods at several budgets.", { wide: true }));
    place.replaceChildren(...children);
  };
  draw();
  return h("section", { "aria-labelledby": "h-quality" },
    h("div", { class: "bar" }, h("h2", { id: "h-quality" }, "Did choosing help?"),
      h("div", { class: "choices" }, budgets.length > 1 && choice("Budget", budgets, budget, (b) => { budget = b; draw(); }), metrics.length > 1 && choice("Measure", metrics, metric, (m) => { metric = m; draw(); }))),
    place,
    h("details", { class: "numbers" }, h("summary", {}, "All measures as a table"), comparisonTable(metrics)));
}

function comparisonTable(metrics) {
  const groups = new Map();
  for (const metric of metrics) for (const g of groupsOf(metric)) {
    const key = JSON.stringify([g.label, g.budget, g.n_rows]);
    groups.set(key, { ...g, cells: { ...(groups.get(key) || { cells: {} }).cells, [metric]: g } });
  }
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "All measures" }, h("table", {},
    h("thead", {}, h("tr", {}, ["trained on", "rows", UNIT, "seeds", ...metrics.map(words), "cost"].map((t, i) => h("th", { scope: "col", class: i ? "num" : "" }, visible(t))))),
    h("tbody", {}, [...groups.values()].map((g) => h("tr", {}, h("th", { scope: "row" }, visible(g.label)), h("td", { class: "num" }, g.kind === "base" ? "–" : whole(g.n_rows)), h("td", { class: "num" }, g.kind === "base" ? "–" : whole(g.n_tokens)), h("td", { class: "num" }, g.values.length),
      metrics.map((m) => { const c = g.cells[m]; return h("td", { class: "num" }, c ? short(c.value) : "–", c && isNumber(c.low) && h("small", {}, `${short(c.low)} to ${short(c.high)}`), c && c.versus && h("small", {}, `${c.versus.difference > 0 ? "+" : ""}${short(c.versus.difference)} to random, p ${short(c.versus.p_holm ?? c.versus.p)}`)); }), h("td", { class: "num" }, duration(g.cost)))))));
}

const OUTCOMES = { "loss.target": "the target's loss", "loss.target.preference": "the target's preference loss", "loss.heldout": "the held-out loss", "loss.chosen": "the loss of held-out chosen answers", "loss.preference": "the held-out pairs' preference loss", "margin.implicit_mean.matched": "the margin of held-out pairs of like length", "accuracy.policy_mean.matched": "the accuracy on held-out pairs of like length", "gsm8k.accuracy": "GSM8K's exact match" };
const outcomeName = (name) => OUTCOMES[name] || words(name);

// What every score is worth: held against trainings that differ in their rows alone.
function truthSection() {
  const truth = DATA.truth;
  if (!truth || !(truth.designs.length || truth.deciles.length)) return null;
  const place = h("div", {}), views = ["averaged over queries", "of the mean over queries"], named = { halves: "random halves", "leave-out": "rows left out" };
  let design = truth.designs[0], outcome = design && design.outcomes[0], view = 0;
  const draw = () => {
    const shown = outcome.scores.map((r) => ({ label: r.label, control: ["random", "length"].includes(METHODS[r.label]?.name), ...r.views[view] })).filter((r) => isNumber(r.value)).sort((a, b) => b.value - a.value);
    const how = design.name === "halves" ? `${whole(design.models)} models were trained, each on a random half of ${whole(truth.rows)} rows` : `One model was trained on all of ${whole(truth.rows)} rows, ${whole(design.models - 1)} with some left out`;
    const note = `${how}, from the same start in the same order. Dot: rank correlation of a score's sum over a model's rows with ${outcomeName(outcome.name)} of that model, ${views[view]}; line: its 95 % interval over models and queries.` + (isNumber(outcome.ceilings[view]) ? ` The most that can be reached follows from ${whole(design.again)} models trained a second time with another seed.` : "");
    place.replaceChildren(shown.length ? figure(sentence(`for ${outcomeName(outcome.name)}`), (w) => truthChart(w, shown, outcome.ceilings[view], outcomeName(outcome.name)), note, { wide: true }) : h("p", { class: "note" }, `${sentence(outcomeName(outcome.name))} is the same for all models: it orders nothing.`));
  };
  const byName = (list, name) => list.find((one) => one.name === name);
  const outcomes = design ? design.outcomes.map((o) => o.name) : [];
  if (design) draw();
  const tenths = truth.deciles.length > 0 && h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Trainings on tenths" }, h("table", {}, h("thead", {}, h("tr", {}, ["trained on tenths of", "measure", "order", "p"].map((t, i) => h("th", { scope: "col", class: i > 1 ? "num" : "" }, t)))),
    h("tbody", {}, truth.deciles.map((d) => h("tr", {}, h("th", { scope: "row" }, visible(d.label)), h("td", {}, outcomeName(d.outcome)), h("td", { class: "num" }, short(d.spearman, 2)), h("td", { class: "num" }, short(d.p)))))));
  return h("section", { "aria-labelledby": "h-truth" },
    h("div", { class: "bar" }, h("h2", { id: "h-truth" }, "Do the scores say what training does?"),
      design && h("div", { class: "choices" },
        truth.designs.length > 1 && choice("Trainings", truth.designs.map((d) => named[d.name]), named[design.name], (n) => { design = truth.designs.find((d) => named[d.name] === n); outcome = byName(design.outcomes, outcome.name); draw(); }),
        choice("Outcome", outcomes.map(outcomeName), outcomeName(outcome.name), (n) => { outcome = design.outcomes.find((o) => outcomeName(o.name) === n); draw(); }),
        choice("View", views, views[0], (v) => { view = views.indexOf(v); draw(); }))),
    place, tenths);
}

function findingsSection() {
  if (!DATA.findings.length) return null;
  return h("section", { "aria-labelledby": "h-findings" }, h("h2", { id: "h-findings" }, "What to look at"),
    h("ul", { class: "findings" }, DATA.findings.map((f) => h("li", { class: f.level === "warning" ? "warning" : "info" },
      h("p", { class: "what" }, h("span", { class: "level" }, f.level === "warning" ? "Warning" : "Note"), f.method && h("span", { class: "who" }, visible(f.method)), visible(sentence(String(f.text || f.name || ""))),
        isNumber(f.figure) && !/\d/.test(f.text || "") && h("span", { class: "figure" }, Number.isInteger(f.figure) ? whole(f.figure) : short(f.figure))),
      f.advice && h("p", { class: "advice" }, visible(sentence(String(f.advice))))))));
}

function pointsOf(label, x, y, limit = 6000) {
  const method = ROWS.methods[label], kept = [], rest = [];
  for (let i = 0; i < N; i++) {
    const px = x(method, i), py = y(method, i);
    if (isNumber(px) && isNumber(py)) (method.selected[i] ? kept : rest).push({ x: px, y: py, row: i, kept: !!method.selected[i] });
  }
  // ids are content hashes, so every k-th row in id order is a fair draw
  const thin = (list, room) => { const k = Math.max(1, Math.ceil(list.length / room)); return list.filter((_, i) => i % k === 0); };
  return [...thin(rest, limit / 2), ...thin(kept, limit / 2)];
}

function methodFigures(label) {
  const m = METHODS[label], out = [];
  if (m.histogram) out.push(figure("Scores", (w) => histogramChart(w, m.histogram, m.cut),
    h("span", {}, swatch("kept"), `kept (${whole(m.kept)})  `, swatch("rest"), `not kept (${whole(m.scored - m.kept)}). `, m.histogram.clipped ? `${whole(m.histogram.clipped)} far-out scores stand in the outermost bars.` : "")));
  if (m.has_losses) {
    const per = (name) => (method, i) => (isNumber(method[name][i]) ? method[name][i] / (ROWS.n_tokens[i] || 1) : null);
    const points = pointsOf(label, per("loss_ini"), per("loss_ref"));
    if (points.length) out.push(figure("Loss before and after the reference training", (w) => scatterChart(w, points, { x: "base loss, nats a token", y: "reference loss", alt: `Base loss against reference loss of ${points.length} rows; kept rows lie further below the diagonal if the method finds what can be learned.` }, { diagonal: true }),
      "A row far below the diagonal was learned by the reference model; one on it taught nothing. Point at a dot to read it."));
  }
  const points = pointsOf(label, (_, i) => ROWS.n_tokens[i], (method, i) => method.score[i]);
  if (points.length && m.length) out.push(figure("Score against length", (w) => scatterChart(w, points, { x: "supervised " + UNIT, y: "score", alt: `Score against length of ${points.length} rows; rank correlation ${short(m.length.spearman, 2)}.` }),
    h("span", {}, "Rank correlation ", h("b", {}, short(m.length.spearman, 2)), `, linear ${short(m.length.pearson, 2)}. Mean length: ${short(m.mean_tokens[0])} ${UNIT} in the pool, ${short(m.mean_tokens[1])} kept. `,
      Math.abs(m.length.spearman) >= 0.5 ? h("strong", { class: "flag" }, "The method follows length closely; hold it against the longest rows.") : "")));
  if (m.heat) out.push(figure("What each target task asks for", (w) => heatChart(w, m.heat), "Mean part of the score that each target task gives to a group of rows. Blue-green pulls in, rust pushes out.", { wide: true }));
  const totals = { pool: m.scored, kept: m.kept };
  const mix = Object.entries(m.shares).filter(([, rows]) => rows.length > 1).map(([name, rows]) => figure("Shares by " + name, (w) => shareChart(w, rows, totals), h("span", {}, swatch("rest"), "in the pool  ", swatch("kept"), "kept")));
  if (mix.length) out.push(h("div", { class: "wide mix" }, mix));
  return out;
}
const swatch = (kind) => h("i", { class: "swatch " + kind, "aria-hidden": "true" });

function methodSection() {
  const place = h("div", { class: "figures" }); // filled again for each method
  const draw = (label) => { current = label; place.replaceChildren(...methodFigures(label)); };
  draw(current);
  const labels = DATA.methods.map((m) => m.label);
  return h("section", { "aria-labelledby": "h-method" }, h("div", { class: "bar" }, h("h2", { id: "h-method" }, "What was chosen"), labels.length > 1 && choice("Method", labels, current, draw)), DATA.summary.budgets.length > 1 && h("p", { class: "note" }, `What is kept at the first budget, ${visible(DATA.summary.budgets[0])}.`), place);
}

function overlapSection() {
  const o = DATA.overlap;
  if (!o) return null;
  const cell = (i, j) => {
    if (i === j) return h("td", { class: "self" }, "");
    const value = i > j ? o.jaccard[i][j] : o.spearman[i][j], td = h("td", { class: i > j ? "low" : "up" }, short(value, 2));
    td.style.setProperty("--heat", isNumber(value) ? Math.round(Math.abs(value) * 42) + "%" : "0%");
    return td;
  };
  return h("section", { "aria-labelledby": "h-overlap" }, h("h2", { id: "h-overlap" }, "How the methods agree"),
    h("p", { class: "note" }, "Below the diagonal: share of kept rows in common (Jaccard). Above: rank correlation of the scores."),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Agreement of the methods" }, h("table", { class: "overlap" }, h("thead", {}, h("tr", {}, h("td", {}), o.labels.map((l) => h("th", { scope: "col" }, visible(l))))),
      h("tbody", {}, o.labels.map((l, i) => h("tr", {}, h("th", { scope: "row" }, visible(l)), o.labels.map((_, j) => cell(i, j))))))));
}

function overview() {
  $("panel-overview").append(...[comparisonSection(), truthSection(), findingsSection(), methodSection(), overlapSection()].filter(Boolean));
}
